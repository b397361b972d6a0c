package ocilocal

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A ConvertSubject says what the subject of a converted artifact is.
type ConvertSubject int

const (
	// SubjectInherited is the subject of the source, or none if that has none.
	SubjectInherited ConvertSubject = iota
	// SubjectSource is the source itself: then its bytes stay as long as the new artifact does.
	SubjectSource
	// SubjectNone is none.
	SubjectNone
)

// ConvertOptions govern a conversion. Nil is the zero value.
type ConvertOptions struct {
	// Subject is what the new artifact refers to. Zero is [SubjectInherited].
	Subject ConvertSubject
	// PublishOptions say what happens if the new ref exists.
	PublishOptions
}

// A ConvertResult tells what a conversion did.
type ConvertResult struct {
	// Artifact is the new artifact; nil after a conflict.
	Artifact *LocalArtifact
	// Update tells what became of the new ref.
	Update RefUpdate
	// Source is the manifest that was converted.
	Source ocispec.Descriptor
	// DroppedConfig is the config of the source that the new artifact has no
	// place for. It is zero if there was none, or the empty one.
	DroppedConfig ocispec.Descriptor
}

// Convert writes what src names anew in the other manifest form and publishes
// it as dst: an image manifest (OCI's or Docker's) as artifact manifest, an
// artifact manifest as image manifest. The source and its refs stay as they are.
//
// The new artifact has the source's artifact type (for an image manifest without one, its
// config's media type), annotations, and layers: the same descriptors but for
// their data fields, in the same order, and so the same blobs, which are verified on the way.
// An image manifest gets the empty config {}; an artifact manifest can't have
// one, so a config that says something is dropped, as the result tells. The empty layer
// by which an image manifest says that it has none becomes none, and the
// reverse. Fields that neither form knows are left out. The bytes are canonical: converting
// the same source again gives the same digest, and what a [Builder] has made without a config
// has its own digest again when it was converted there and back.
//
// src must be in the registry: nothing is fetched. One with a digest is found by that
// digest, as [LocalRegistry.Resolve] does. ctx governs the call.
//
// Errors: [ErrNotFound] for src; [ErrUnsupportedMediaType] for an image index, of which only
// the manifests can be converted, one by one; [ErrInvalidArgument] if dst is
// src; [ErrInvalidManifest] for a source that is damaged; [ErrIncomplete] for a layer that is missing, together with [ErrDigestMismatch] or
// [ErrSizeMismatch] for one that is damaged; [*ConflictError] together with the
// result; [ErrDigestMismatch] if dst names another digest than that of the result;
// [ErrInvalidReference] for a zero src or dst, [ErrArtifactType], [ErrTooLarge],
// [ErrReadOnly], [ErrBusy], ctx's, and the file system's.
func (r *LocalRegistry) Convert(ctx context.Context, src, dst Reference, opts *ConvertOptions) (*ConvertResult, error) {
	result, err := r.convert(ctx, src, dst, opts)
	return result, opError("convert", src.String(), "", err)
}

func (r *LocalRegistry) convert(ctx context.Context, src, dst Reference, opts *ConvertOptions) (*ConvertResult, error) {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	var o ConvertOptions
	if opts != nil {
		o = *opts
	}
	if dst.IsZero() {
		return nil, fmt.Errorf("%w: what to convert to is empty", ErrInvalidReference)
	}
	name, reference := src.key()
	if n, r := dst.key(); n == name && r == reference {
		return nil, fmt.Errorf("%w: %s can't be converted in its place: choose another reference (Tag can move this one afterwards)", ErrInvalidArgument, src)
	}
	desc, err := r.lookUp(src)
	if err != nil {
		return nil, err
	}
	m, err := r.readVerified(ctx, desc)
	if err != nil {
		return nil, err
	}
	format, spec, err := converted(m, o.Subject)
	if err != nil {
		return nil, err
	}
	to, err := buildManifest(format, spec)
	if err != nil {
		return nil, err
	}
	st := r.blobs.newStage()
	defer func() { r.logDiscard(st.discard()) }()
	if err := r.stageConverted(ctx, st, to); err != nil {
		return nil, err
	}
	updates, err := r.publish(ctx, st, []publication{onlyManifest(dst, to, o.PublishOptions)})
	if err != nil {
		return nil, err
	}
	result := &ConvertResult{Update: updates[0], Source: desc}
	if c := m.doc.Config; c != nil && (c.Digest != emptyJSON.Digest || c.MediaType != emptyJSON.MediaType) {
		result.DroppedConfig = cloneDescriptor(*c)
	}
	if err := updates[0].conflict(o.Expected); err != nil {
		return result, err
	}
	result.Artifact = r.newArtifact(dst, to.Descriptor(), to)
	return result, nil
}

// converted says what m is in the other form.
func converted(m *Manifest, subject ConvertSubject) (ManifestFormat, manifestSpec, error) {
	spec := manifestSpec{artifactType: m.ArtifactType(), layers: m.realLayers(), annotations: m.doc.Annotations}
	switch subject {
	case SubjectInherited:
		spec.subject = m.doc.Subject
	case SubjectSource:
		spec.subject = &ocispec.Descriptor{MediaType: m.MediaType(), Digest: m.Digest(), Size: m.Size()}
	case SubjectNone:
	default:
		return 0, spec, fmt.Errorf("%w: unknown ConvertSubject %d", ErrInvalidArgument, subject)
	}
	switch m.form {
	case formImage:
		return FormatArtifactManifest, spec, nil
	case formArtifact:
		return FormatImageManifest, spec, nil
	}
	return 0, spec, fmt.Errorf("%w: %s is an image index; the manifests that it lists can be converted, one by one", ErrUnsupportedMediaType, m.Digest())
}

// stageConverted stages a new manifest and what it needs, all of which the
// registry should have but for the empty blob.
func (r *LocalRegistry) stageConverted(ctx context.Context, st *stage, m *Manifest) error {
	for _, c := range m.children() {
		if c.Digest == emptyJSON.Digest {
			if _, err := st.putBytes(ctx, []byte("{}"), digest.SHA256); err != nil {
				return err
			}
			continue
		}
		err := st.take(ctx, c.Digest, c.Size)
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch) {
			err = fmt.Errorf("%w: layer %s: %w", ErrIncomplete, c.Digest, err)
		}
		if err != nil {
			return err
		}
	}
	_, err := st.putBytes(ctx, m.raw, digest.SHA256)
	return err
}
