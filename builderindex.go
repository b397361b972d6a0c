package ocilocal

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// IndexBuilderOptions are the options of an [IndexBuilder]. Nil is the zero value.
type IndexBuilderOptions struct {
	// ArtifactType, if not empty, is the type of the image index.
	ArtifactType string
	// PublishOptions say what happens if the ref exists.
	PublishOptions
}

// An IndexBuilder makes an image index: a list of manifests that the registry has, such as one
// image for each platform. Nothing is visible until Build publishes it. It is safe for concurrent
// use. Manifests are in the order in which the calls that added them returned.
//
// Unlike a [Builder] it has no stage before Build: the manifests are published already, and stay
// where they are.
type IndexBuilder struct {
	registry *LocalRegistry
	ref      Reference
	opts     IndexBuilderOptions
	draft    draft
}

// NewIndexBuilder starts an image index that will be published as ref. The caller ends it with
// Build or Cancel. A deferred Cancel does nothing after Build has succeeded.
//
// Errors:
//   - [ErrInvalidReference]: ref is zero, or has a digest, which is not known before the build
//   - [ErrInvalidArgument]: the artifact type is not a media type
//   - [ErrReadOnly], [ErrClosed]
func (r *LocalRegistry) NewIndexBuilder(ref Reference, opts *IndexBuilderOptions) (_ *IndexBuilder, err error) {
	defer addOp(&err, "start build of index", ref.String(), "")
	end, err := r.beginWrite(context.Background())
	if err != nil {
		return nil, err
	}
	defer end()
	if err := ref.checkGiven(); err != nil {
		return nil, err
	}
	b := &IndexBuilder{registry: r, ref: ref}
	if opts != nil {
		b.opts = *opts
	}
	if err := b.draft.start(ref, b.opts.ArtifactType); err != nil {
		return nil, err
	}
	return b, nil
}

// AddManifest adds a manifest, or an image index, that the registry has, and returns its
// descriptor. desc needs only a Digest. Its Platform, Annotations, ArtifactType and URLs are
// written unchanged. MediaType and Size come from the registry. A manifest without a ref may be
// collected before Build.
//
// Errors:
//   - [ErrNotFound]: the registry does not have the manifest
//   - [ErrInvalidArgument]: desc contradicts the manifest, or an image index cannot have it
//   - [ErrInvalidDigest], [ErrClosed] after Build or Cancel
func (b *IndexBuilder) AddManifest(ctx context.Context, desc ocispec.Descriptor) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "add manifest to index", b.ref.String(), desc.Digest)
	end, err := b.registry.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	own, err := b.registry.resolveDigest(desc.Digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if desc.MediaType != "" && desc.MediaType != own.MediaType || desc.Size != 0 && desc.Size != own.Size {
		return ocispec.Descriptor{}, fmt.Errorf("%w: the manifest is of type %s and has %d bytes", ErrInvalidArgument, printable(own.MediaType), own.Size)
	}
	desc = cloneDescriptor(desc)
	desc.MediaType, desc.Size, desc.Data = own.MediaType, own.Size, nil
	if _, err := buildIndex(manifestSpec{layers: []ocispec.Descriptor{desc}}); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%w: %w", ErrInvalidArgument, err)
	}
	err = b.draft.change(func(spec *manifestSpec) { spec.layers = append(spec.layers, desc) })
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return cloneDescriptor(desc), nil
}

// SetAnnotation sets an annotation of the index. Errors are those of [Builder.SetAnnotation].
func (b *IndexBuilder) SetAnnotation(key, value string) (err error) {
	defer addOp(&err, "annotate index", b.ref.String(), "")
	return b.draft.setAnnotation(key, value)
}

// SetSubject makes the index refer to another manifest, which need not be in the registry. Errors
// are those of [Builder.SetSubject].
func (b *IndexBuilder) SetSubject(desc ocispec.Descriptor) (err error) {
	defer addOp(&err, "set subject of index", b.ref.String(), desc.Digest)
	return b.draft.setSubject(desc)
}

// Build makes the index and publishes it in one step. When it returns nil, the index is durable and
// visible, and the builder is closed. Otherwise nothing is published, and the builder is unchanged.
// Equal input gives equal bytes and so an equal digest. The order in which annotations were set
// does not matter.
//
// Errors:
//   - [*ConflictError]
//   - [ErrIncomplete]: a manifest, or content that it needs, has been collected since
//   - [ErrTooLarge]: a limit is exceeded, such as [MaxIndexNesting]
//   - [ErrClosed], [ErrBusy], [ErrNoSpace], and any error from ctx or the file system
func (b *IndexBuilder) Build(ctx context.Context) (_ *LocalArtifact, err error) {
	defer addOp(&err, "build index", b.ref.String(), "")
	r := b.registry
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	b.draft.mu.Lock()
	defer b.draft.mu.Unlock()
	if b.draft.done {
		return nil, ErrClosed
	}
	m, err := buildIndex(b.draft.spec)
	if err != nil {
		return nil, err
	}
	if err := r.checkMembers(ctx, m, nil); err != nil {
		return nil, err
	}
	st := r.blobs.newStage()
	defer func() { r.logDiscard(st.discard()) }()
	if _, err := st.putBytes(ctx, m.raw, digest.SHA256); err != nil {
		return nil, err
	}
	p := onlyManifest(b.ref, m, b.opts.PublishOptions)
	p.also = func(tx *indexTx, _ digest.Digest) error { return r.checkMemberRows(ctx, tx, m, nil) }
	if err := b.draft.publish(ctx, r, st, p); err != nil {
		return nil, err
	}
	return r.newArtifact(b.ref, m.Descriptor(), m), nil
}

// Update returns the outcome of Build for the ref, also after a conflict. It is zero before Build.
func (b *IndexBuilder) Update() RefUpdate {
	return b.draft.outcome()
}

// Cancel closes the builder. After Build has succeeded, or a second time, it does nothing.
func (b *IndexBuilder) Cancel() {
	b.draft.mu.Lock()
	defer b.draft.mu.Unlock()
	b.draft.done = true
}

// checkMembers checks the manifests below an image index whose members are published, except those
// in absent. Each is read and verified, and they must not be nested too deep. It is called before the
// transaction, because it reads files.
func (r *LocalRegistry) checkMembers(ctx context.Context, m *Manifest, absent map[digest.Digest]bool) error {
	c := r.newClosure()
	for i, d := range m.children() {
		if m.childRole(i) != roleManifest || absent[d.Digest] {
			continue
		}
		if _, err := c.down(ctx, d, 1, MaxClosure); err != nil {
			return incomplete(err)
		}
	}
	return nil
}

// checkMemberRows checks, in the transaction that publishes an image index, that the manifests
// below it are still recorded and whole. A collection may have begun to delete them since
// checkMembers. publish checks only the manifests that it writes itself, and not those that are
// published already. Those in absent need not be, whether m names them or a manifest below it does.
func (r *LocalRegistry) checkMemberRows(ctx context.Context, tx *indexTx, m *Manifest, absent map[digest.Digest]bool) error {
	var members []ocispec.Descriptor
	for i, d := range m.children() {
		if m.childRole(i) != roleManifest || absent[d.Digest] {
			continue
		}
		desc, ok, err := tx.manifest(d.Digest)
		if err == nil && !ok {
			err = fmt.Errorf("%w: manifest %s: %w", ErrIncomplete, d.Digest, ErrNotFound)
		}
		if err != nil {
			return err
		}
		members = append(members, desc)
	}
	return r.checkClosure(ctx, tx, absent, members...)
}
