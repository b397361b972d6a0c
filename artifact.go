package ocilocal

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A LocalArtifact is an immutable view of one artifact in a registry. It stays the same when its
// reference is moved. Copies share the manifest once it is read. It is safe for concurrent use, and
// needs its registry open.
type LocalArtifact struct {
	registry *LocalRegistry
	ref      Reference
	desc     ocispec.Descriptor
	shared   *sharedManifest
}

// A sharedManifest is the manifest of an artifact and of its copies. Once it was read it stays.
type sharedManifest struct {
	mu       sync.Mutex
	manifest *Manifest // guarded by mu; nil until a read succeeded
}

// newArtifact returns the view of a manifest, whose row or bytes the caller has seen. m may be nil:
// then the manifest is read when it is needed.
func (r *LocalRegistry) newArtifact(ref Reference, desc ocispec.Descriptor, m *Manifest) *LocalArtifact {
	return &LocalArtifact{registry: r, ref: ref, desc: desc, shared: &sharedManifest{manifest: m}}
}

// Reference returns the reference that the artifact was loaded by; zero if by digest.
func (a *LocalArtifact) Reference() Reference { return a.ref }

// Descriptor returns the manifest's media type, digest, size and artifact type.
func (a *LocalArtifact) Descriptor() ocispec.Descriptor { return a.desc }

// Digest returns the manifest's digest, the artifact's identity.
func (a *LocalArtifact) Digest() digest.Digest { return a.desc.Digest }

// MediaType returns the manifest's media type.
func (a *LocalArtifact) MediaType() string { return a.desc.MediaType }

// ArtifactType returns the artifact's type: see [Manifest.ArtifactType].
func (a *LocalArtifact) ArtifactType() string { return a.desc.ArtifactType }

// Manifest reads and verifies the manifest, once: later calls, of copies of a too, return the same.
// After a failed read, the next call reads again.
//
// Errors: [ErrNotFound] if it was removed and collected, [ErrDigestMismatch], [ErrSizeMismatch],
// [ErrInvalidManifest], and any error from ctx or the file system.
func (a *LocalArtifact) Manifest(ctx context.Context) (*Manifest, error) {
	m, err := a.manifest(ctx)
	return m, opError("read manifest", a.ref.String(), a.desc.Digest, err)
}

// manifest is Manifest, without an operation in its error: the caller adds its own. The lock makes
// concurrent calls wait for one read instead of each reading the blob. A call that waits does not
// look at its context; a manifest is small.
func (a *LocalArtifact) manifest(ctx context.Context) (*Manifest, error) {
	a.shared.mu.Lock()
	defer a.shared.mu.Unlock()
	if a.shared.manifest != nil {
		return a.shared.manifest, nil
	}
	end, err := a.registry.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	m, err := a.registry.readVerified(ctx, a.desc)
	if err == nil {
		a.shared.manifest = m
	}
	return m, err
}

// readVerified reads, verifies and parses a manifest of the store. A size of −1 is unknown. The
// media type of desc says how to read a document that does not name its own.
func (r *LocalRegistry) readVerified(ctx context.Context, desc ocispec.Descriptor) (*Manifest, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, size, err := r.blobs.openFile(desc.Digest, desc.Size)
	if err != nil {
		return nil, err
	}
	if size > MaxManifestSize {
		f.Close()
		return nil, tooLargeManifest(int(size))
	}
	raw, err := r.blobs.readAll(f, desc.Digest, size)
	if err != nil {
		return nil, err
	}
	return verifiedManifest(raw, desc)
}

// looksLikeManifest reports whether a blob's first character is a brace, so that most blobs need
// not be read whole. An unreadable file is not a manifest. The error is a processCondition.
func (r *LocalRegistry) looksLikeManifest(d digest.Digest) (bool, error) {
	f, _, err := r.blobs.openFile(d, -1)
	if processCondition(err) {
		return false, err
	}
	if err != nil {
		return false, nil
	}
	defer f.Close()
	var head [64]byte
	n, _ := f.Read(head[:])
	return strings.HasPrefix(strings.TrimSpace(string(head[:n])), "{"), nil
}

// readManifest reads a manifest from a verifying reader, which it closes.
func readManifest(src *verifier, desc ocispec.Descriptor) (*Manifest, error) {
	defer src.Close()
	if src.size > MaxManifestSize {
		return nil, tooLargeManifest(int(src.size))
	}
	raw, err := io.ReadAll(src)
	if err != nil {
		return nil, err
	}
	return verifiedManifest(raw, desc)
}

// verifiedManifest parses the bytes of a manifest that were compared with its digest.
func verifiedManifest(raw []byte, desc ocispec.Descriptor) (*Manifest, error) {
	m, err := parseManifest(desc.MediaType, raw)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	m.digest = desc.Digest // verified; the descriptor chose the algorithm
	return m, nil
}

// Layers returns the manifest's layers in their order (an artifact manifest's
// blobs), as a copy. Errors are those of [LocalArtifact.Manifest].
func (a *LocalArtifact) Layers(ctx context.Context) ([]ocispec.Descriptor, error) {
	m, err := a.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	return m.Layers(), nil
}

// LayersByMediaType returns the layers of one media type, in their order.
// Errors are those of [LocalArtifact.Manifest].
func (a *LocalArtifact) LayersByMediaType(ctx context.Context, mediaType string) ([]ocispec.Descriptor, error) {
	m, err := a.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	return m.LayersByMediaType(mediaType), nil
}

// LayersByAnnotation returns the layers that have an annotation with that value, in their order.
// Errors are those of [LocalArtifact.Manifest].
func (a *LocalArtifact) LayersByAnnotation(ctx context.Context, key, value string) ([]ocispec.Descriptor, error) {
	m, err := a.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	return m.LayersByAnnotation(key, value), nil
}

// Annotations returns a copy of the manifest's annotations. Errors are those of
// [LocalArtifact.Manifest].
func (a *LocalArtifact) Annotations(ctx context.Context) (map[string]string, error) {
	m, err := a.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	return m.Annotations(), nil
}

// Subject returns the descriptor of the manifest that this one refers to, and
// false if there is none (image-spec manifest.md, "subject").
// Errors are those of [LocalArtifact.Manifest].
func (a *LocalArtifact) Subject(ctx context.Context) (ocispec.Descriptor, bool, error) {
	m, err := a.Manifest(ctx)
	if err != nil {
		return ocispec.Descriptor{}, false, err
	}
	d, ok := m.Subject()
	return d, ok, nil
}

// Config returns the config's descriptor, and false for an artifact manifest, which has none.
// Errors are those of [LocalArtifact.Manifest].
func (a *LocalArtifact) Config(ctx context.Context) (ocispec.Descriptor, bool, error) {
	m, err := a.Manifest(ctx)
	if err != nil {
		return ocispec.Descriptor{}, false, err
	}
	d, ok := m.Config()
	return d, ok, nil
}

// OpenLayer opens a layer, or the config, by its descriptor, as
// [LocalRegistry.OpenBlob] does. It fails with [ErrNotFound] for a descriptor
// whose digest the manifest doesn't name.
func (a *LocalArtifact) OpenLayer(ctx context.Context, desc ocispec.Descriptor) (_ io.ReadCloser, err error) {
	defer addOp(&err, "open layer", a.ref.String(), desc.Digest)
	own, err := a.own(ctx, desc)
	if err != nil {
		return nil, err
	}
	return a.registry.OpenBlob(ctx, own)
}

// own returns the descriptor in the manifest that has the digest of desc. Its size is verified with
// the manifest; that of desc comes from the caller. A digest that the manifest does not name is
// refused: otherwise the artifact would be a way to any blob of the registry.
func (a *LocalArtifact) own(ctx context.Context, desc ocispec.Descriptor) (ocispec.Descriptor, error) {
	m, err := a.manifest(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, c := range m.children() {
		if c.Digest == desc.Digest {
			return c, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("the artifact has no such layer: %w", ErrNotFound)
}

// ReadLayer returns all bytes of a layer, verified. It is for layers that fit into memory. Errors
// are those of [LocalArtifact.OpenLayer] and of its reader.
func (a *LocalArtifact) ReadLayer(ctx context.Context, desc ocispec.Descriptor) (_ []byte, err error) {
	defer addOp(&err, "read layer", a.ref.String(), desc.Digest)
	src, err := a.OpenLayer(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	b, err := io.ReadAll(src)
	if err != nil {
		return nil, err
	}
	return b, nil
}
