package ocilocal

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A ConvertSubject chooses the subject of a converted artifact.
type ConvertSubject int

const (
	// SubjectInherited is the source's subject, or none if the source has none.
	SubjectInherited ConvertSubject = iota
	// SubjectSource is the source itself. Its bytes then stay as long as the new artifact does.
	SubjectSource
	// SubjectNone is no subject.
	SubjectNone
)

// ConvertOptions govern a conversion. Nil is the zero value.
type ConvertOptions struct {
	// Subject is the subject of the new artifact. Zero is [SubjectInherited].
	Subject ConvertSubject
	// PublishOptions say what happens if the new ref exists.
	PublishOptions
}

// A ConvertResult is the outcome of a conversion.
type ConvertResult struct {
	// Artifact is the new artifact; nil after a conflict.
	Artifact *LocalArtifact
	// Update is what happened to the new ref.
	Update RefUpdate
	// Source is the manifest that was converted.
	Source ocispec.Descriptor
	// DroppedConfig is the source's config if the new artifact has no place for it. It is zero if
	// there was no config, or the empty one.
	DroppedConfig ocispec.Descriptor
}

// Convert writes the artifact src in the other manifest form and publishes it as dst. An image
// manifest, OCI's or Docker's, becomes an artifact manifest. An artifact manifest becomes an image
// manifest. The source and its refs stay as they are. src must be in the registry: nothing is
// fetched. A src with a digest is found by the digest, as [LocalRegistry.Resolve] does. ctx governs
// the call.
//
// The new artifact has the source's artifact type (for an image manifest without one, its config's
// media type), its annotations, and its layers in their order. The layers' descriptors are the same
// except for their data fields, so the blobs are the same, and they are verified. An image manifest
// gets the empty config {}. An artifact manifest cannot have a config: one that is not empty is
// dropped, and [ConvertResult.DroppedConfig] says so. The empty layer by which an image manifest
// says that it has none becomes no layer, and the reverse. Unknown fields are left out.
//
// The bytes are canonical. Converting the same source again gives the same digest. An artifact that
// a [Builder] made without a config, converted there and back, has its first digest again.
//
// Errors:
//   - [ErrNotFound] if src is not in the registry
//   - [ErrUnsupportedMediaType] if src is an image index: convert the manifests in it one by one
//   - [ErrInvalidArgument] if dst is src
//   - [ErrInvalidReference] if src or dst is zero
//   - [ErrInvalidManifest] for a damaged source
//   - [ErrIncomplete] for a missing layer, together with [ErrDigestMismatch] or [ErrSizeMismatch]
//     for a damaged one
//   - [*ConflictError] together with the result
//   - [ErrDigestMismatch] if dst names another digest than the result's
//   - [ErrArtifactType], [ErrTooLarge], [ErrReadOnly], [ErrBusy]
//   - any error from ctx or the file system
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
		return nil, fmt.Errorf("%w: destination reference is empty", ErrInvalidReference)
	}
	name, reference := src.key()
	if n, r := dst.key(); n == name && r == reference {
		return nil, fmt.Errorf("%w: cannot convert %s to itself: choose another reference (Tag can move this one afterwards)", ErrInvalidArgument, src)
	}
	desc, err := r.resolve(src)
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
	p := onlyManifest(dst, to, o.PublishOptions)
	if p.entry, err = r.platformOf(src, desc.Digest); err != nil {
		return nil, err
	}
	updates, err := r.publish(ctx, st, []publication{p})
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

// platformOf returns the facts of a manifest that are those of its converted form too: the platform.
// Annotations of an entry may speak of the manifest itself, as a signature does.
func (r *LocalRegistry) platformOf(ref Reference, d digest.Digest) (entry string, err error) {
	f, err := r.knownFacts(ref, d)
	if err != nil {
		return "", err
	}
	return entryFacts{Platform: f.Platform}.text()
}

// converted returns the other form, and m's fields for it.
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
	return 0, spec, fmt.Errorf("%w: %s is an image index (convert its manifests one by one)", ErrUnsupportedMediaType, m.Digest())
}

// stageConverted stages a new manifest and its needs. The registry should have them all, except
// perhaps the empty blob.
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
