package ocilocal

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Diff is the difference between two artifacts.
type Diff struct {
	// Kept are the layers of both artifacts: the same bytes under the same media type, in the order
	// of the second. From and To differ for a layer that moved.
	Kept []KeptLayer
	// Removed are the layers of the first only, in their order.
	Removed []PlacedLayer
	// Added are the layers of the second only, in their order.
	Added []PlacedLayer
	// Annotations are the manifests' annotations that differ, sorted by key.
	Annotations []AnnotationChange
}

// A PlacedLayer is a layer and its place in its manifest, counted from 0.
type PlacedLayer struct {
	Position   int
	Descriptor ocispec.Descriptor
}

// A KeptLayer is one layer in both artifacts. The annotations of the descriptors may differ.
type KeptLayer struct {
	From, To PlacedLayer
}

// An AnnotationChange is an annotation that was added (Had is false), removed (Has is false), or
// changed.
type AnnotationChange struct {
	Key      string
	Had, Has bool
	Old, New string
}

// Diff compares a with other by their layers and their manifests' annotations. Two layers are the
// same if they have the same digest and media type. If a layer occurs several times, the first one
// of a is paired with the first one of other, and so on. The two artifacts may have different forms
// of manifest. The empty layer of an image manifest without layers is not counted as a layer.
// Configs are not compared, because only one form has them.
//
// Errors: [ErrInvalidArgument] if other is nil, and those of [LocalArtifact.Manifest].
func (a *LocalArtifact) Diff(ctx context.Context, other *LocalArtifact) (*Diff, error) {
	if other == nil {
		return nil, opError("compare", a.ref.String(), a.desc.Digest, fmt.Errorf("%w: the other artifact is nil", ErrInvalidArgument))
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

// realLayers returns the layers of a manifest. An image manifest without layers has one empty layer
// instead (image-spec manifest.md, "Guidelines for Artifact Usage"), which is left out.
func (m *Manifest) realLayers() []ocispec.Descriptor {
	if m.form == formImage && len(m.layers) == 1 &&
		m.layers[0].MediaType == emptyJSON.MediaType && m.layers[0].Digest == emptyJSON.Digest {
		return nil
	}
	return m.layers
}

// layers pairs the layers of the two artifacts. Each layer of the second takes the first free layer
// of the same identity from the first. The rest of the first were removed. It takes linear time,
// except for the sort of the rest.
func (d *Diff) layers(from, to []ocispec.Descriptor) {
	type identity struct {
		digest    digest.Digest
		mediaType string
	}
	free := map[identity][]int{} // positions in from that are not paired yet
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

// diffAnnotations returns the annotations that differ, sorted by key.
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
