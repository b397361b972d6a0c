package ocilocal

import (
	"bytes"
	"context"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// CollectClosures takes the closures of entries as an import does, from a source that has every
// manifest of raw and stages no config and no layer.
func CollectClosures(ctx context.Context, r *LocalRegistry, entries []ocispec.Descriptor, raw map[string][]byte) error {
	im := r.newImporter(nil)
	im.fetch = func(ctx context.Context, desc ocispec.Descriptor, as role) error {
		if as != roleManifest {
			return nil
		}
		_, _, err := im.stage.put(ctx, bytes.NewReader(raw[string(desc.Digest)]), "", desc.Digest, desc.Size)
		return err
	}
	_, _, err := im.collect(ctx, entries, entries)
	if rm := im.stage.discard(); err == nil {
		err = rm
	}
	return err
}
