package ocilocal

import (
	"context"
	"fmt"
	"io"
	"maps"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BuilderOptions are the options of a [Builder]. Nil is the zero value.
type BuilderOptions struct {
	// ArtifactType is the type of the artifact, such as "application/vnd.example.model". It may be
	// empty only for an image manifest with a config: the config's media type is the type then.
	ArtifactType string
	// Format is the form of the manifest. Zero means the registry's [Options.Format].
	Format ManifestFormat
	// PublishOptions say what happens if the ref exists.
	PublishOptions
}

// A Builder makes one new artifact. Layers stream to disk as they are added, and nothing is visible
// until Build publishes all of it at once. It is safe for concurrent use. Layers are in the order
// in which their calls returned.
//
// The bytes of layers lie in a stage below tmp/, each under its own file, until Build or Cancel. A
// killed process leaves them there, and the next writing process removes them.
type Builder struct {
	registry *LocalRegistry
	ref      Reference
	opts     BuilderOptions
	stage    *stage
	draft    draft
}

// NewBuilder starts an artifact that will be published as ref. The caller ends it with Build or
// Cancel. A deferred Cancel does nothing after Build has succeeded.
//
// Errors:
//   - [ErrInvalidReference]: ref is zero, or has a digest, which is not known before the build
//   - [ErrInvalidArgument]: the artifact type is not a media type
//   - [ErrReadOnly], [ErrClosed]
func (r *LocalRegistry) NewBuilder(ref Reference, opts *BuilderOptions) (_ *Builder, err error) {
	defer addOp(&err, "start build of", ref.String(), "")
	if err := ref.checkGiven(); err != nil {
		return nil, err
	}
	return r.newBuilder(ref, opts)
}

// newBuilder is NewBuilder that also accepts the zero Reference, for an artifact that gets no ref.
func (r *LocalRegistry) newBuilder(ref Reference, opts *BuilderOptions) (*Builder, error) {
	end, err := r.beginWrite(context.Background())
	if err != nil {
		return nil, err
	}
	defer end()
	b := &Builder{registry: r, ref: ref}
	if opts != nil {
		b.opts = *opts
	}
	if b.opts.Format == FormatDefault {
		b.opts.Format = r.opts.Format
	}
	if err := b.draft.start(ref, b.opts.ArtifactType); err != nil {
		return nil, err
	}
	b.stage = r.blobs.newStage()
	return b, nil
}

// NewOMMXBuilder is NewBuilder for the OMMX project. Its artifact type is [ArtifactTypeOMMX]
// unless opts have another, such as [ArtifactTypeOMMXExperiment]. The OMMX SDKs read only image
// manifests, so leave [BuilderOptions.Format] and [Options.Format] at their default for them.
func (r *LocalRegistry) NewOMMXBuilder(ref Reference, opts *BuilderOptions) (*Builder, error) {
	var o BuilderOptions
	if opts != nil {
		o = *opts
	}
	if o.ArtifactType == "" {
		o.ArtifactType = ArtifactTypeOMMX
	}
	return r.NewBuilder(ref, &o)
}

// NewGitHubBuilder is NewBuilder for the reference that [GitHubReference] makes:
// ghcr.io/org/repo/name:tag. It sets the annotation org.opencontainers.image.source to the address
// of the GitHub repository, by which GitHub links the package to it.
func (r *LocalRegistry) NewGitHubBuilder(org, repo, name, tag string, opts *BuilderOptions) (_ *Builder, err error) {
	defer addOp(&err, "start build of", org+"/"+repo+"/"+name, "")
	ref, err := GitHubReference(org, repo, name, tag)
	if err != nil {
		return nil, err
	}
	b, err := r.NewBuilder(ref, opts)
	if err != nil {
		return nil, err
	}
	return b, b.SetAnnotation(ocispec.AnnotationSource, "https://github.com/"+org+"/"+repo)
}

// AddLayer copies src to its end into a new layer and returns the layer's descriptor. annotations
// may be nil. Memory does not grow with the layer. After an error the builder is unchanged.
//
// Errors:
//   - [ErrClosed] after Build or Cancel
//   - [ErrInvalidArgument]: the media type is not of the form type/subtype (RFC 6838), or an
//     annotation is not UTF-8
//   - any error from ctx, src or the file system
func (b *Builder) AddLayer(ctx context.Context, mediaType string, src io.Reader, annotations map[string]string) (ocispec.Descriptor, error) {
	return b.addLayer(ctx, mediaType, annotations, func() (digest.Digest, int64, error) {
		return b.stage.put(ctx, src, digest.SHA256, "", -1)
	})
}

// AddLayerBytes is AddLayer for bytes in memory.
func (b *Builder) AddLayerBytes(ctx context.Context, mediaType string, data []byte, annotations map[string]string) (ocispec.Descriptor, error) {
	return b.addLayer(ctx, mediaType, annotations, func() (digest.Digest, int64, error) {
		d, err := b.stage.putBytes(ctx, data, digest.SHA256)
		return d, int64(len(data)), err
	})
}

// AddLayerFile is AddLayer for a regular file. Unless annotations have another, the layer gets the
// annotation org.opencontainers.image.title with the file's base name. AddLayerFile returns
// [ErrInvalidArgument] for the registry's own index, and for a path that is not a regular file.
func (b *Builder) AddLayerFile(ctx context.Context, mediaType, path string, annotations map[string]string) (ocispec.Descriptor, error) {
	withTitle := map[string]string{ocispec.AnnotationTitle: filepath.Base(path)}
	maps.Copy(withTitle, annotations)
	return b.addLayer(ctx, mediaType, withTitle, func() (digest.Digest, int64, error) {
		f, err := b.registry.openOther(path)
		if err != nil {
			return "", 0, err
		}
		defer f.Close()
		return b.stage.put(ctx, f, digest.SHA256, "", -1)
	})
}

// AddExistingLayer adds a layer that the registry already has, such as one of another artifact. The
// layer gets the media type and annotations of desc. Its bytes are verified and not copied. They
// stay until Build or Cancel, even if the blob is collected meanwhile.
//
// Errors:
//   - [ErrNotFound]: the registry does not have the blob
//   - [ErrDigestMismatch], [ErrSizeMismatch]: the blob is damaged
//   - [ErrInvalidArgument]: a manifest cannot have such a descriptor
//   - [ErrClosed], and any error from ctx or the file system
func (b *Builder) AddExistingLayer(ctx context.Context, desc ocispec.Descriptor) (err error) {
	defer addOp(&err, "add layer to", b.ref.String(), desc.Digest)
	if err := checkPlaceable(&desc); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidArgument, err)
	}
	desc = cloneDescriptor(desc)
	desc.Data = nil // builders never write data
	_, err = b.putBlob(ctx, "", func() (digest.Digest, int64, error) {
		return desc.Digest, desc.Size, b.stage.take(ctx, desc.Digest, desc.Size)
	}, func(spec *manifestSpec, _ ocispec.Descriptor) { spec.layers = append(spec.layers, desc) })
	return err
}

// addLayer is the body of the methods that add a layer. put brings its bytes into the stage. Media
// type and annotations are checked before that, so that a mistake does not cost a copy. The
// annotations are cloned for the builder and for the result, because the caller may change its own
// map.
func (b *Builder) addLayer(ctx context.Context, mediaType string, annotations map[string]string, put func() (digest.Digest, int64, error)) (desc ocispec.Descriptor, err error) {
	defer addOp(&err, "add layer to", b.ref.String(), "")
	err = checkTypeName("media type", mediaType)
	if _, bad := canonicalAnnotations(annotations); err == nil && bad != nil {
		err = fmt.Errorf("annotation: %w", bad)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err = b.putBlob(ctx, mediaType, put, func(spec *manifestSpec, d ocispec.Descriptor) {
		d.Annotations = maps.Clone(annotations)
		spec.layers = append(spec.layers, d)
	})
	if err == nil {
		desc.Annotations = maps.Clone(annotations)
	}
	return desc, err
}

// putBlob runs put, and then changes the draft by record. The draft is not locked during put, so
// several layers can be copied at once. Build or Cancel may end the builder meanwhile: the draft is
// checked before put, to save the copy, and again after it. A blob that came too late is in no
// manifest; discard removes it.
func (b *Builder) putBlob(ctx context.Context, mediaType string, put func() (digest.Digest, int64, error), record func(*manifestSpec, ocispec.Descriptor)) (ocispec.Descriptor, error) {
	end, err := b.registry.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	if b.draft.isDone() {
		return ocispec.Descriptor{}, ErrClosed
	}
	d, size, err := put()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: size}
	if err := b.draft.change(func(spec *manifestSpec) { record(spec, desc) }); err != nil {
		return ocispec.Descriptor{}, err
	}
	return desc, nil
}

// SetConfig sets the config blob. A second call replaces the first.
//
// Errors:
//   - [ErrInvalidArgument]: the builder makes an artifact manifest, which has no config
//   - those of [Builder.AddLayerBytes]
func (b *Builder) SetConfig(ctx context.Context, mediaType string, data []byte) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "set config of", b.ref.String(), "")
	if b.opts.Format == FormatArtifactManifest {
		return ocispec.Descriptor{}, fmt.Errorf("%w: an artifact manifest has no config, an image manifest does (see BuilderOptions.Format)", ErrInvalidArgument)
	}
	if err := checkTypeName("media type", mediaType); err != nil {
		return ocispec.Descriptor{}, err
	}
	return b.putBlob(ctx, mediaType, func() (digest.Digest, int64, error) {
		d, err := b.stage.putBytes(ctx, data, digest.SHA256)
		return d, int64(len(data)), err
	}, func(spec *manifestSpec, d ocispec.Descriptor) { spec.config = &d })
}

// SetAnnotation sets an annotation of the manifest. A second call with the same key replaces the
// value.
//
// Errors:
//   - [ErrInvalidArgument]: key or value is not valid UTF-8, or key is empty
//   - [ErrClosed] after Build or Cancel
func (b *Builder) SetAnnotation(key, value string) (err error) {
	defer addOp(&err, "annotate", b.ref.String(), "")
	return b.draft.setAnnotation(key, value)
}

// SetSubject makes the artifact refer to another manifest (image-spec manifest.md, "subject"). That
// manifest need not be in the registry.
//
// Errors: [ErrInvalidManifest] for a descriptor that a manifest cannot have, [ErrClosed].
func (b *Builder) SetSubject(desc ocispec.Descriptor) (err error) {
	defer addOp(&err, "set subject of", b.ref.String(), desc.Digest)
	return b.draft.setSubject(desc)
}

// Build makes the manifest and publishes the artifact in one step. When it returns nil, everything
// is durable and visible, and the builder is closed. Otherwise nothing is published, and the
// builder is unchanged: call Build again, or Cancel. In two cases every further Build fails:
//   - after a failed fsync: the kernel may have dropped bytes, and cannot sync them again
//   - with [ErrIncomplete], on a file system without hard links: a blob was collected before the
//     commit
//
// Equal input gives equal bytes and so an equal digest. The order in which annotations were set
// does not matter.
//
// Errors:
//   - [*ConflictError]
//   - [ErrInvalidManifest], [ErrInvalidArgument], [ErrTooLarge]: no manifest can be made of the
//     parts
//   - [ErrArtifactType]: see [Options.ArtifactTypes]
//   - [ErrIncomplete]: see above
//   - [ErrClosed] after Build or Cancel
//   - [ErrBusy], [ErrNoSpace], and any error from ctx or the file system
func (b *Builder) Build(ctx context.Context) (_ *LocalArtifact, err error) {
	defer addOp(&err, "build", b.ref.String(), "")
	end, err := b.registry.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	b.draft.mu.Lock()
	defer b.draft.mu.Unlock()
	if b.draft.done {
		return nil, ErrClosed
	}
	m, err := buildManifest(b.opts.Format, b.draft.spec)
	if err != nil {
		return nil, err
	}
	for _, c := range m.children() {
		if c.Digest != emptyJSON.Digest || b.stage.has(c.Digest) {
			continue
		}
		if _, err := b.stage.putBytes(ctx, []byte("{}"), digest.SHA256); err != nil {
			return nil, err
		}
	}
	if _, err := b.stage.putBytes(ctx, m.raw, digest.SHA256); err != nil {
		return nil, err
	}
	if err := b.draft.publish(ctx, b.registry, b.stage, onlyManifest(b.ref, m, b.opts.PublishOptions)); err != nil {
		return nil, err
	}
	b.registry.logDiscard(b.stage.discard())
	return b.registry.newArtifact(b.ref, m.Descriptor(), m), nil
}

// logDiscard logs an error of discarding a stage. The call has succeeded or failed for another
// reason by then, so the error is not returned. The files stay below tmp/ until the registry is
// closed.
func (r *LocalRegistry) logDiscard(err error) {
	if err != nil {
		r.opts.Logger.Warn("ocilocal: temporary files are left until this registry is closed", "error", err)
	}
}

// Update returns the outcome of Build for the ref, also after a conflict. It is zero before Build.
func (b *Builder) Update() RefUpdate {
	return b.draft.outcome()
}

// Cancel discards all layers and closes the builder. After Build has succeeded, or a second time,
// it does nothing. An error, from the file system, means that temporary files are left until the
// registry is closed.
func (b *Builder) Cancel() (err error) {
	defer addOp(&err, "cancel build of", b.ref.String(), "")
	b.draft.mu.Lock()
	defer b.draft.mu.Unlock()
	if b.draft.done {
		return nil
	}
	b.draft.done = true
	return b.stage.discard()
}
