package interop_test

import (
	"bytes"
	"context"
	"io"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A ggcrManifest is a manifest of a repository, as go-containerregistry reads it: an image by
// [partial.CompressedToImage], or an index. Copy it into your program: it is all that an adapter takes.
type ggcrManifest struct {
	ctx  context.Context
	repo *ocilocal.Repository
	desc ocispec.Descriptor
}

func (m *ggcrManifest) read(desc ocispec.Descriptor) ([]byte, error) {
	rc, err := m.repo.Fetch(m.ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

func (m *ggcrManifest) RawManifest() ([]byte, error) { return m.read(m.desc) }

func (m *ggcrManifest) MediaType() (types.MediaType, error) {
	return types.MediaType(m.desc.MediaType), nil
}

func (m *ggcrManifest) RawConfigFile() ([]byte, error) {
	manifest, err := partial.Manifest(m)
	if err != nil {
		return nil, err
	}
	return m.read(ggcrDescriptor(manifest.Config))
}

func (m *ggcrManifest) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	manifest, err := partial.Manifest(m)
	if err != nil {
		return nil, err
	}
	for _, d := range append(manifest.Layers, manifest.Config) {
		if d.Digest == h {
			return &ggcrLayer{m, d}, nil
		}
	}
	return nil, ocilocal.ErrNotFound
}

// A ggcrLayer is a layer of a manifest, as it is stored.
type ggcrLayer struct {
	*ggcrManifest
	layer v1.Descriptor
}

func (l *ggcrLayer) Digest() (v1.Hash, error)            { return l.layer.Digest, nil }
func (l *ggcrLayer) Size() (int64, error)                { return l.layer.Size, nil }
func (l *ggcrLayer) MediaType() (types.MediaType, error) { return l.layer.MediaType, nil }
func (l *ggcrLayer) Compressed() (io.ReadCloser, error) {
	return l.repo.Fetch(l.ctx, ggcrDescriptor(l.layer))
}

// A ggcrIndex is an image index of a repository.
type ggcrIndex struct{ ggcrManifest }

func (x *ggcrIndex) Digest() (v1.Hash, error) { return partial.Digest(x) }
func (x *ggcrIndex) Size() (int64, error)     { return x.desc.Size, nil }
func (x *ggcrIndex) IndexManifest() (*v1.IndexManifest, error) {
	b, err := x.RawManifest()
	return parsed(b, err)
}

func parsed(b []byte, err error) (*v1.IndexManifest, error) {
	if err != nil {
		return nil, err
	}
	return v1.ParseIndexManifest(bytes.NewReader(b))
}

func (x *ggcrIndex) Image(h v1.Hash) (v1.Image, error) {
	d, err := x.repo.Resolve(x.ctx, h.String())
	if err != nil {
		return nil, err
	}
	return partial.CompressedToImage(&ggcrManifest{x.ctx, x.repo, d})
}

func (x *ggcrIndex) ImageIndex(h v1.Hash) (v1.ImageIndex, error) {
	d, err := x.repo.Resolve(x.ctx, h.String())
	if err != nil {
		return nil, err
	}
	return &ggcrIndex{ggcrManifest{x.ctx, x.repo, d}}, nil
}

func ggcrDescriptor(d v1.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: string(d.MediaType), Digest: digest.Digest(d.Digest.String()), Size: d.Size}
}

// putImage puts an image of go-containerregistry, its blobs first, and returns its descriptor.
func putImage(ctx context.Context, repo *ocilocal.Repository, image v1.Image, opts *ocilocal.PutManifestOptions) (ocispec.Descriptor, error) {
	layers, err := image.Layers()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := partial.ConfigLayer(image)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, l := range append(layers, config) {
		h, err := l.Digest()
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		rc, err := l.Compressed()
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		_, err = repo.PutBlob(ctx, rc, digest.Digest(h.String()), -1)
		rc.Close()
		if err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	return putRaw(ctx, repo, image, opts)
}

func putRaw(ctx context.Context, repo *ocilocal.Repository, m interface {
	partial.WithRawManifest
	MediaType() (types.MediaType, error)
}, opts *ocilocal.PutManifestOptions) (ocispec.Descriptor, error) {
	raw, err := m.RawManifest()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	mediaType, err := m.MediaType()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	u, err := repo.PutManifest(ctx, string(mediaType), raw, opts)
	return u.Descriptor, err
}

// TestGGCRAdapter puts images of go-containerregistry into a repository and reads them back as such,
// with equal digests.
func TestGGCRAdapter(t *testing.T) {
	ctx := t.Context()
	repo := view(t, "localhost/org/app")
	index := v1.ImageIndex(empty.Index)
	for range 2 {
		made, err := random.Image(1000, 3)
		if err != nil {
			t.Fatal(err)
		}
		desc, err := putImage(ctx, repo, made, nil)
		if err != nil {
			t.Fatal(err)
		}
		image, err := partial.CompressedToImage(&ggcrManifest{ctx, repo, desc})
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(image); err != nil {
			t.Error(err)
		}
		h, err := made.Digest()
		if err != nil || h.String() != desc.Digest.String() {
			t.Errorf("%s, %v, want %s", h, err, desc.Digest)
		}
		again, err := putImage(ctx, view(t, "localhost/other"), image, nil)
		if err != nil || again.Digest != desc.Digest {
			t.Errorf("a round trip: %s, %v, want %s", again.Digest, err, desc.Digest)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image})
	}
	desc, err := putRaw(ctx, repo, index, &ocilocal.PutManifestOptions{Tag: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(&ggcrIndex{ggcrManifest{ctx, repo, desc}}); err != nil {
		t.Error(err)
	}
}
