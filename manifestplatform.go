package ocilocal

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// fitsPlatform compares platforms. What the wanted one leaves empty may be anything.
func fitsPlatform(want, got *ocispec.Platform) bool {
	fits := func(want, got string) bool { return want == "" || want == got }
	return fits(want.OS, got.OS) && fits(want.Architecture, got.Architecture) &&
		fits(want.Variant, got.Variant) && fits(want.OSVersion, got.OSVersion)
}

// choosePlatform returns the first manifest of an index that is for a platform.
func choosePlatform(m *Manifest, want *ocispec.Platform) (ocispec.Descriptor, error) {
	for _, d := range m.doc.Manifests {
		if d.Platform != nil && fitsPlatform(want, d.Platform) {
			return d, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: image index %s has no manifest for platform %s/%s", ErrNotFound, m.Digest(),
		clip(want.OS), clip(want.Architecture))
}
