package ocilocal

import (
	"maps"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// factsOf returns the facts of an entry that gets the name ref here. If ignored is set, neither of
// its names is kept (ImportOptions.IgnoreNames).
func factsOf(e ocispec.Descriptor, ref Reference, ignored bool) entryFacts {
	f := entryFacts{Annotations: maps.Clone(e.Annotations), Platform: e.Platform}
	if ref.IsZero() && !ignored && entryClaim(e).isOther(e.Digest) {
		return f
	}
	delete(f.Annotations, ocispec.AnnotationRefName)
	if c, full := fullName(e.Annotations[annotationImageName], e.Digest); ignored || !full || ref.IsZero() || c.ref != ref {
		delete(f.Annotations, annotationImageName)
	}
	return f
}
