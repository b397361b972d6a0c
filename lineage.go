package ocilocal

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Parent returns the artifact that a's subject names, and nil without an error
// if a has no subject: then it is the first of its line. Either may be of
// either manifest form. The parent's Reference is zero.
//
// Errors: [*MissingSubjectError], which matches [ErrNotFound], if the registry
// doesn't have the subject; [ErrSizeMismatch] or [ErrInvalidManifest] if a's
// description of its subject contradicts what the registry has under that
// digest; and those of [LocalArtifact.Manifest] for a's own manifest.
func (a *LocalArtifact) Parent(ctx context.Context) (*LocalArtifact, error) {
	p, err := a.parent(ctx)
	return p, opError("find parent of", a.ref.String(), a.desc.Digest, err)
}

func (a *LocalArtifact) parent(ctx context.Context) (*LocalArtifact, error) {
	m, err := a.manifest(ctx)
	if err != nil || m.doc.Subject == nil {
		return nil, err
	}
	subject := *m.doc.Subject
	end, err := a.registry.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	desc, ok, err := a.registry.index.resolveDigest(subject.Digest)
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, &MissingSubjectError{Artifact: a.desc.Digest, Subject: cloneDescriptor(subject)}
	case desc.Size != subject.Size:
		return nil, fmt.Errorf("subject %s: %w: has %d bytes, its descriptor says %d", subject.Digest, ErrSizeMismatch, desc.Size, subject.Size)
	case desc.MediaType != subject.MediaType:
		return nil, fmt.Errorf("subject %s: %w: is a %s, its descriptor says %q", subject.Digest, ErrInvalidManifest, desc.MediaType, clip(subject.MediaType))
	}
	return a.registry.newArtifact(Reference{}, desc, nil), nil
}

// History yields a, its parent, its parent's parent and so on, until one has
// no subject. A chain of digests can't close, but for broken hashes; what
// comes a second time all the same is an [ErrInvalidManifest], and more than
// [MaxClosure] generations are [ErrTooLarge]. An error is yielded once, at the end, with a
// nil artifact; for a parent that isn't in the registry it is a
// [*MissingSubjectError]. Errors are those of [LocalArtifact.Parent]. ctx governs the iteration.
func (a *LocalArtifact) History(ctx context.Context) iter.Seq2[*LocalArtifact, error] {
	return func(yield func(*LocalArtifact, error) bool) {
		seen := map[digest.Digest]bool{}
		for at := a; at != nil; {
			if !yield(at, nil) {
				return
			}
			seen[at.desc.Digest] = true
			next, err := at.parent(ctx)
			switch {
			case err != nil || next == nil:
			case seen[next.desc.Digest]:
				err = fmt.Errorf("%w: the chain of subjects comes back to %s", ErrInvalidManifest, next.desc.Digest)
			case len(seen) >= MaxClosure:
				err = fmt.Errorf("%w: more than %d generations", ErrTooLarge, MaxClosure)
			}
			if err != nil {
				yield(nil, opError("follow history of", a.ref.String(), at.desc.Digest, err))
				return
			}
			at = next
		}
	}
}

// A Diff tells what changed from one artifact to another.
type Diff struct {
	// Kept are the layers that both have, the same bytes under the same media
	// type, in the order of the second. From and To differ for one that moved.
	Kept []KeptLayer
	// Removed are the first's layers that the second hasn't, in their order.
	Removed []PlacedLayer
	// Added are the second's layers that the first hasn't, in their order.
	Added []PlacedLayer
	// Annotations are the manifests' annotations that differ, sorted by key.
	Annotations []AnnotationChange
}

// A PlacedLayer is a layer and its place among its manifest's layers, from 0.
type PlacedLayer struct {
	Position   int
	Descriptor ocispec.Descriptor
}

// A KeptLayer is one layer in both artifacts. The descriptors may differ in
// their annotations.
type KeptLayer struct {
	From, To PlacedLayer
}

// An AnnotationChange is an annotation that was added (not Had), removed (not
// Has), or given another value.
type AnnotationChange struct {
	Key      string
	Had, Has bool
	Old, New string
}

// Diff compares a with other by their layers and their manifests' annotations.
// Layers are the same when digest and media type are; of equal ones, the first
// goes with the first. The two may be of different manifest forms: the empty
// layer that an image manifest without layers must have counts as none, and
// configs, which only one form has, aren't compared.
//
// Errors: those of [LocalArtifact.Manifest]; [ErrInvalidArgument] if other is nil.
func (a *LocalArtifact) Diff(ctx context.Context, other *LocalArtifact) (*Diff, error) {
	if other == nil {
		return nil, opError("compare", a.ref.String(), a.desc.Digest, fmt.Errorf("%w: nothing to compare with", ErrInvalidArgument))
	}
	from, err := a.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	to, err := other.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	d := &Diff{Annotations: diffAnnotations(from.doc.Annotations, to.doc.Annotations)}
	d.layers(from.realLayers(), to.realLayers())
	return d, nil
}

// realLayers returns the layers without the one that stands for none.
func (m *Manifest) realLayers() []ocispec.Descriptor {
	if m.form == formImage && len(m.layers) == 1 &&
		m.layers[0].MediaType == emptyJSON.MediaType && m.layers[0].Digest == emptyJSON.Digest {
		return nil
	}
	return m.layers
}

func (d *Diff) layers(from, to []ocispec.Descriptor) {
	type identity struct {
		digest    digest.Digest
		mediaType string
	}
	free := map[identity][]int{} // places in from that nothing in to has taken
	for i, l := range from {
		id := identity{l.Digest, l.MediaType}
		free[id] = append(free[id], i)
	}
	for i, l := range to {
		id := identity{l.Digest, l.MediaType}
		placed := PlacedLayer{i, cloneDescriptor(l)}
		if left := free[id]; len(left) > 0 {
			d.Kept = append(d.Kept, KeptLayer{From: PlacedLayer{left[0], cloneDescriptor(from[left[0]])}, To: placed})
			free[id] = left[1:]
		} else {
			d.Added = append(d.Added, placed)
		}
	}
	rest := slices.Concat(slices.Collect(maps.Values(free))...)
	slices.Sort(rest)
	for _, i := range rest {
		d.Removed = append(d.Removed, PlacedLayer{i, cloneDescriptor(from[i])})
	}
}

func diffAnnotations(from, to map[string]string) (changes []AnnotationChange) {
	keys := maps.Clone(from)
	if keys == nil {
		keys = map[string]string{}
	}
	maps.Copy(keys, to)
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		c := AnnotationChange{Key: k}
		c.Old, c.Had = from[k]
		c.New, c.Has = to[k]
		if c.Had != c.Has || c.Old != c.New {
			changes = append(changes, c)
		}
	}
	return changes
}

// ReferrersOptions choose referrers. Nil and the zero value choose all.
type ReferrersOptions struct {
	// ArtifactType, if not empty, is the one artifact type to list.
	ArtifactType string
	// After, if not empty, starts the listing behind it, whether or not it
	// exists: the last digest of a page begins the next.
	After digest.Digest
	// Limit, if positive, ends the listing after that many.
	Limit int
}

// Referrers lists the manifests whose subject is that digest, in the order of
// their own digests, from the index only. The subject itself need not be in the
// registry. Descriptors are those of distribution-spec's referrers API: media
// type, digest, size, the artifact type (for an image manifest without one, its
// config's media type) and the manifest's annotations. A referrer that no ref
// points at is listed until it is collected.
//
// It reads in pages, as [LocalRegistry.Refs] does. An error ([ErrInvalidDigest], ctx's,
// [ErrCorruptIndex], [ErrIndexIO]) is yielded once, at the end.
func (r *LocalRegistry) Referrers(ctx context.Context, subject digest.Digest, opts *ReferrersOptions) iter.Seq2[ocispec.Descriptor, error] {
	var o ReferrersOptions
	if opts != nil {
		o = *opts
	}
	return inPages(o.Limit, referrersPage, func(last *ocispec.Descriptor, n int) ([]ocispec.Descriptor, error) {
		from := o.After
		if last != nil {
			from = last.Digest
		}
		page, err := r.referrers(ctx, subject, o.ArtifactType, from, n)
		return page, opError("list referrers of", "", subject, err)
	})
}

// referrersPage is small because each row comes with all of a manifest's annotations.
const referrersPage = 32

func (r *LocalRegistry) referrers(ctx context.Context, subject digest.Digest, artifactType string, after digest.Digest, n int) ([]ocispec.Descriptor, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := checkDigest(subject); err != nil {
		return nil, err
	}
	return r.index.referrers(subject, artifactType, after, n)
}
