// Package benchmarks does the same work on ocilocal, oras-go's content/oci and
// go-containerregistry's layout.
//
// One run of everything, with a table of ratios and targets:
//
//	go run ./cmd/compare
//
// Single measures, for profiles:
//
//	go test -bench . -benchmem [-long]
//
// The work is one artifact: a layer of [SmallSize] bytes that no other artifact
// has, a manifest that names it, and a tag. The peers get the cheapest calls
// that their interfaces have for it. They never fsync; ocilocal always does.
package benchmarks

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/ocilocal/ocilocal"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
)

const (
	// SmallSize is the size of a small artifact's layer.
	SmallSize = 4 << 10
	// PerPrefix is how many consecutive artifacts have names with the same [Prefix].
	PerPrefix = 1000

	artifactType = "application/vnd.example.bench"
	layerType    = "application/vnd.example.bench.data"
)

// Prefix is what the name of artifact i begins with.
func Prefix(i int) string { return fmt.Sprintf("registry.example.com/bench/p%03d/", i/PerPrefix) }

// Name is the reference of artifact i.
func Name(i int) string { return fmt.Sprintf("%smodel:v%06d", Prefix(i), i) }

// SmallLayer is the layer of artifact i: bytes that no other i has.
func SmallLayer(i int) []byte {
	b := make([]byte, SmallSize)
	for j := range SmallSize / 8 {
		binary.LittleEndian.PutUint64(b[8*j:], uint64(i)*0x9e3779b97f4a7c15+uint64(j)*0xd1b54a32d192ed03)
	}
	return b
}

// A Store is one of the compared libraries, open on a directory.
type Store interface {
	// Publish stores artifact i and tags it.
	Publish(ctx context.Context, i int) error
	// Fill publishes the artifacts from..to-1 in the fastest way that leaves
	// the directory as if each had been published.
	Fill(ctx context.Context, from, to int) error
	// Resolve looks up the descriptor of artifact i.
	Resolve(ctx context.Context, i int) error
	// Manifest looks up artifact i, and reads, verifies and parses its manifest.
	Manifest(ctx context.Context, i int) error
	// List goes through all refs and counts them.
	List(ctx context.Context) (int, error)
	// Put stores a blob that is a layer of an artifact.
	Put(ctx context.Context, d digest.Digest, size int64, src io.Reader) error
	// Get reads that blob to its end, verified.
	Get(ctx context.Context, d digest.Digest, size int64) error
	Close() error
}

// A Library opens stores.
type Library struct {
	Name    string
	Durable bool
	Open    func(ctx context.Context, dir string) (Store, error)
}

// Ocilocal, Oras and GGCR are the compared libraries.
var (
	Ocilocal = Library{"ocilocal", true, openOcilocal}
	Oras     = Library{"oras-go", false, openOras}
	GGCR     = Library{"ggcr", false, openGGCR}
)

// peerArtifact is what the peers store as artifact i.
func peerArtifact(i int) (layer, manifest []byte, desc ocispec.Descriptor, err error) {
	layer = SmallLayer(i)
	manifest, err = json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: artifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{{MediaType: layerType, Digest: digest.FromBytes(layer), Size: SmallSize}},
	})
	desc = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
		Digest: digest.FromBytes(manifest), Size: int64(len(manifest)),
	}
	return layer, manifest, desc, err
}

// drain reads to the end through a buffer of io.Copy's usual size.
func drain(src io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{src})
}

type ocilocalStore struct {
	*ocilocal.LocalRegistry
}

func openOcilocal(ctx context.Context, dir string) (Store, error) {
	r, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		return nil, err
	}
	return &ocilocalStore{r}, nil
}

func (s *ocilocalStore) Publish(ctx context.Context, i int) error {
	ref, err := ocilocal.ParseReference(Name(i))
	if err != nil {
		return err
	}
	b, err := s.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: artifactType})
	if err != nil {
		return err
	}
	defer b.Cancel()
	if _, err := b.AddLayerBytes(ctx, layerType, SmallLayer(i), nil); err != nil {
		return err
	}
	_, err = b.Build(ctx)
	return err
}

func (s *ocilocalStore) Fill(ctx context.Context, from, to int) error {
	return InParallel(8, from, to, func(i int) error { return s.Publish(ctx, i) })
}

func (s *ocilocalStore) load(ctx context.Context, i int) (*ocilocal.LocalArtifact, error) {
	ref, err := ocilocal.ParseReference(Name(i))
	if err != nil {
		return nil, err
	}
	return s.LocalRegistry.Load(ctx, ref)
}

func (s *ocilocalStore) Resolve(ctx context.Context, i int) error {
	ref, err := ocilocal.ParseReference(Name(i))
	if err != nil {
		return err
	}
	_, err = s.LocalRegistry.Resolve(ctx, ref)
	return err
}

func (s *ocilocalStore) Manifest(ctx context.Context, i int) error {
	a, err := s.load(ctx, i)
	if err != nil {
		return err
	}
	_, err = a.Manifest(ctx)
	return err
}

func (s *ocilocalStore) List(ctx context.Context) (int, error) {
	return s.count(ctx, nil)
}

// Page lists the first 100 refs with artifact i's prefix.
func (s *ocilocalStore) Page(ctx context.Context, i int) (int, error) {
	return s.count(ctx, &ocilocal.ListOptions{Prefix: Prefix(i), Limit: 100})
}

func (s *ocilocalStore) count(ctx context.Context, opts *ocilocal.ListOptions) (n int, err error) {
	for _, err := range s.Refs(ctx, opts) {
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// Put publishes too: only an artifact's layers get into the store. Its size
// and digest come out of it, rather than having to be known before.
func (s *ocilocalStore) Put(ctx context.Context, d digest.Digest, _ int64, src io.Reader) error {
	b, err := s.NewBuilder(ocilocal.MustParseReference("registry.example.com/bench/large:"+d.Encoded()[:16]),
		&ocilocal.BuilderOptions{ArtifactType: artifactType})
	if err != nil {
		return err
	}
	defer b.Cancel()
	desc, err := b.AddLayer(ctx, layerType, src, nil)
	if err != nil {
		return err
	}
	if desc.Digest != d {
		return fmt.Errorf("stored %s, want %s", desc.Digest, d)
	}
	_, err = b.Build(ctx)
	return err
}

func (s *ocilocalStore) Get(ctx context.Context, d digest.Digest, size int64) error {
	r, err := s.OpenBlob(ctx, ocispec.Descriptor{Digest: d, Size: size})
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = drain(r)
	return err
}

type orasStore struct {
	*oci.Store
}

func openOras(ctx context.Context, dir string) (Store, error) {
	s, err := oci.NewWithContext(ctx, dir)
	if err != nil {
		return nil, err
	}
	return &orasStore{s}, nil
}

func (s *orasStore) Close() error { return nil }

func (s *orasStore) Publish(ctx context.Context, i int) error {
	layer, manifest, desc, err := peerArtifact(i)
	if err != nil {
		return err
	}
	if i == 0 {
		if err := s.Push(ctx, ocispec.DescriptorEmptyJSON, bytes.NewReader([]byte("{}"))); err != nil {
			return err
		}
	}
	layerDesc := ocispec.Descriptor{MediaType: layerType, Digest: digest.FromBytes(layer), Size: SmallSize}
	if err := s.Push(ctx, layerDesc, bytes.NewReader(layer)); err != nil {
		return err
	}
	if err := s.Push(ctx, desc, bytes.NewReader(manifest)); err != nil {
		return err
	}
	return s.Tag(ctx, desc, Name(i))
}

func (s *orasStore) Fill(ctx context.Context, from, to int) error {
	s.AutoSaveIndex = false
	defer func() { s.AutoSaveIndex = true }()
	for i := from; i < to; i++ {
		if err := s.Publish(ctx, i); err != nil {
			return err
		}
	}
	return s.SaveIndex()
}

func (s *orasStore) Resolve(ctx context.Context, i int) error {
	_, err := s.Store.Resolve(ctx, Name(i))
	return err
}

func (s *orasStore) Manifest(ctx context.Context, i int) error {
	desc, err := s.Store.Resolve(ctx, Name(i))
	if err != nil {
		return err
	}
	raw, err := content.FetchAll(ctx, s, desc)
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	return json.Unmarshal(raw, &m)
}

func (s *orasStore) List(ctx context.Context) (n int, err error) {
	err = s.Tags(ctx, "", func(tags []string) error {
		n += len(tags)
		return nil
	})
	return n, err
}

func (s *orasStore) Put(ctx context.Context, d digest.Digest, size int64, src io.Reader) error {
	return s.Push(ctx, ocispec.Descriptor{MediaType: layerType, Digest: d, Size: size}, src)
}

func (s *orasStore) Get(ctx context.Context, d digest.Digest, size int64) error {
	desc := ocispec.Descriptor{MediaType: layerType, Digest: d, Size: size}
	r, err := s.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer r.Close()
	v := content.NewVerifyReader(r, desc)
	if _, err := drain(v); err != nil {
		return err
	}
	return v.Verify()
}

type ggcrStore struct {
	layout.Path
}

func openGGCR(_ context.Context, dir string) (Store, error) {
	p, err := layout.FromPath(dir)
	if errors.Is(err, os.ErrNotExist) {
		p, err = layout.Write(dir, empty.Index)
	}
	if err != nil {
		return nil, err
	}
	return &ggcrStore{p}, nil
}

func (s *ggcrStore) Close() error { return nil }

func ggcrHash(d digest.Digest) ggcr.Hash {
	return ggcr.Hash{Algorithm: string(d.Algorithm()), Hex: d.Encoded()}
}

// blobs writes artifact i without naming it.
func (s *ggcrStore) blobs(i int) (ggcr.Descriptor, error) {
	layer, manifest, desc, err := peerArtifact(i)
	if err != nil {
		return ggcr.Descriptor{}, err
	}
	if i == 0 {
		empty := ocispec.DescriptorEmptyJSON
		if err := s.WriteBlob(ggcrHash(empty.Digest), io.NopCloser(bytes.NewReader(empty.Data))); err != nil {
			return ggcr.Descriptor{}, err
		}
	}
	if err := s.WriteBlob(ggcrHash(digest.FromBytes(layer)), io.NopCloser(bytes.NewReader(layer))); err != nil {
		return ggcr.Descriptor{}, err
	}
	return ggcr.Descriptor{
		MediaType: types.OCIManifestSchema1, Size: desc.Size, Digest: ggcrHash(desc.Digest),
		Annotations: map[string]string{ocispec.AnnotationRefName: Name(i)},
	}, s.WriteBlob(ggcrHash(desc.Digest), io.NopCloser(bytes.NewReader(manifest)))
}

func (s *ggcrStore) Publish(_ context.Context, i int) error {
	desc, err := s.blobs(i)
	if err != nil {
		return err
	}
	return s.AppendDescriptor(desc)
}

func (s *ggcrStore) index() (*ggcr.IndexManifest, error) {
	x, err := s.ImageIndex()
	if err != nil {
		return nil, err
	}
	return x.IndexManifest()
}

func (s *ggcrStore) Fill(_ context.Context, from, to int) error {
	x, err := s.index()
	if err != nil {
		return err
	}
	x = x.DeepCopy()
	for i := from; i < to; i++ {
		desc, err := s.blobs(i)
		if err != nil {
			return err
		}
		x.Manifests = append(x.Manifests, desc)
	}
	b, err := json.MarshalIndent(x, "", "   ")
	if err != nil {
		return err
	}
	return s.WriteFile("index.json", b, 0o644)
}

func (s *ggcrStore) find(i int) (ggcr.Hash, error) {
	x, err := s.index()
	if err != nil {
		return ggcr.Hash{}, err
	}
	for _, d := range x.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] == Name(i) {
			return d.Digest, nil
		}
	}
	return ggcr.Hash{}, fmt.Errorf("%s: not found", Name(i))
}

func (s *ggcrStore) Resolve(_ context.Context, i int) error {
	_, err := s.find(i)
	return err
}

func (s *ggcrStore) Manifest(_ context.Context, i int) error {
	h, err := s.find(i)
	if err != nil {
		return err
	}
	raw, err := s.Bytes(h)
	if err != nil {
		return err
	}
	if digest.FromBytes(raw).Encoded() != h.Hex {
		return fmt.Errorf("manifest %s is damaged", h)
	}
	_, err = ggcr.ParseManifest(bytes.NewReader(raw))
	return err
}

func (s *ggcrStore) List(context.Context) (n int, err error) {
	x, err := s.index()
	if err != nil {
		return 0, err
	}
	for _, d := range x.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] != "" {
			n++
		}
	}
	return n, nil
}

func (s *ggcrStore) Put(_ context.Context, d digest.Digest, _ int64, src io.Reader) error {
	return s.WriteBlob(ggcrHash(d), io.NopCloser(src))
}

func (s *ggcrStore) Get(_ context.Context, d digest.Digest, _ int64) error {
	r, err := s.Blob(ggcrHash(d))
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := drain(io.TeeReader(r, h)); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, h); got != d {
		return fmt.Errorf("blob %s is damaged", d)
	}
	return nil
}

// InParallel calls fn with from..to-1 from n goroutines.
func InParallel(n, from, to int, fn func(i int) error) error {
	var next atomic.Int64
	next.Store(int64(from))
	errs := make([]error, n)
	var wg sync.WaitGroup
	for g := range n {
		wg.Go(func() {
			for {
				i := int(next.Add(1) - 1)
				if i >= to {
					return
				}
				if err := fn(i); err != nil {
					errs[g] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
