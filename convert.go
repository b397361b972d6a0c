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
	// SubjectNone gives the new artifact no subject.
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
// manifest. The source and its refs do not change. src must be in the registry: nothing is
// fetched. A src with a digest is found by the digest, as [LocalRegistry.Resolve] does. ctx governs
// the call.
//
// The new artifact has these parts:
//   - the source's artifact type; for an image manifest without one, the media type of its config
//   - the source's annotations
//   - the source's layers, in their order. Their descriptors do not change, except that data is
//     left out. So the blobs are the same, and they are verified. The empty layer of an image
//     manifest without layers is not copied to an artifact manifest. It is added in the other
//     direction.
//   - a config, in an image manifest: the empty object {}. An artifact manifest has no config. If
//     the source has another one, it is dropped: see [ConvertResult.DroppedConfig].
//
// Unknown fields are left out.
//
// The bytes are canonical, so converting the same source again gives the same digest. If a
// [Builder] made an artifact without a config, converting it to the other form and back gives its
// first digest.
//
// Errors:
//   - [ErrNotFound]: src is not in the registry
//   - [ErrUnsupportedMediaType]: src is an image index: convert the manifests in it one by one
//   - [ErrInvalidArgument]: dst is src
//   - [ErrInvalidReference]: src or dst is zero
//   - [ErrInvalidManifest]: the source is damaged
//   - [ErrIncomplete]: a layer is missing. For a damaged layer, the error matches
//     [ErrDigestMismatch] or [ErrSizeMismatch] too
//   - [*ConflictError] together with the result
//   - [ErrDigestMismatch]: dst has another digest than the result
//   - [ErrArtifactType], [ErrTooLarge], [ErrReadOnly], [ErrBusy]
//   - any error from ctx or the file system
func (r *LocalRegistry) Convert(ctx context.Context, src, dst Reference, opts *ConvertOptions) (_ *ConvertResult, err error) {
	defer addOp(&err, "convert", src.String(), "")
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

// platformOf returns the facts of a manifest that are those of its converted form too: the
// platform. Annotations of an entry may speak of the manifest itself, as a signature does.
func (r *LocalRegistry) platformOf(ref Reference, d digest.Digest) (entry string, err error) {
	f, err := r.knownFacts(ref, d)
	if err != nil {
		return "", err
	}
	return entryFacts{Platform: f.Platform}.text()
}

// converted returns the form to convert to, and the fields of m for it. buildManifest adds the
// parts that only this form has: the empty config and the empty layer.
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

// stageConverted stages a new manifest and everything that it needs. The registry has the layers of
// a sound source. It may not have the empty blob, which an artifact manifest does not need. A
// missing or damaged layer is [ErrIncomplete], because the new artifact cannot be published without
// it.
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
