package ocilocal

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// normalVariant returns the variant of a platform. The one that image-spec takes for granted is the empty one.
func normalVariant(p *ocispec.Platform) string {
	if p.Architecture == "arm64" && p.Variant == "v8" || p.Architecture == "amd64" && p.Variant == "v1" {
		return ""
	}
	return p.Variant
}

// fitsPlatform compares platforms. Fields that the wanted one leaves empty fit anything.
func fitsPlatform(want, got *ocispec.Platform) bool {
	fits := func(want, got string) bool { return want == "" || want == got }
	variant := want.Variant == "" || normalVariant(want) == normalVariant(got)
	return variant && fits(want.OS, got.OS) && fits(want.Architecture, got.Architecture) && fits(want.OSVersion, got.OSVersion)
}

// choosePlatform returns the first manifest of an index that is for a platform. One of the usual variant
// comes before others if the platform leaves the variant open.
func choosePlatform(m *Manifest, want *ocispec.Platform) (ocispec.Descriptor, error) {
	var found *ocispec.Descriptor
	for i, d := range m.doc.Manifests {
		if d.Platform == nil || !fitsPlatform(want, d.Platform) {
			continue
		}
		if normalVariant(d.Platform) == normalVariant(want) {
			return d, nil
		}
		if found == nil {
			found = &m.doc.Manifests[i]
		}
	}
	if found != nil {
		return *found, nil
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: image index %s has no manifest for platform %s/%s", ErrNotFound, m.Digest(),
		printable(want.OS), printable(want.Architecture))
}
