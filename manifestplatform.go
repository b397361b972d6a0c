package ocilocal

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// normalVariant returns the variant of a platform, and "" for the variant that is usual for the
// architecture. Some tools write linux/arm64/v8 and others linux/arm64, and both mean the same.
func normalVariant(p *ocispec.Platform) string {
	if p.Architecture == "arm64" && p.Variant == "v8" || p.Architecture == "amd64" && p.Variant == "v1" {
		return ""
	}
	return p.Variant
}

// fitsPlatform reports whether got is a platform as wanted. A field that want leaves empty fits
// anything. OS features are not compared.
func fitsPlatform(want, got *ocispec.Platform) bool {
	fits := func(want, got string) bool { return want == "" || want == got }
	variant := want.Variant == "" || normalVariant(want) == normalVariant(got)
	return variant && fits(want.OS, got.OS) && fits(want.Architecture, got.Architecture) && fits(want.OSVersion, got.OSVersion)
}

// choosePlatform returns the first manifest of an image index that is for a platform. If want has
// no variant, a manifest of the usual variant is preferred to an earlier one of another variant.
//
// Errors: [ErrNotFound].
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
