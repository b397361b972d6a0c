package ocilocal

import (
	"encoding/json"
	"fmt"
	"maps"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An entryFacts is what an entry of an index.json says besides its name and what its manifest says
// too. An import keeps it with the ref, or with the manifest if that gets no ref, and an export
// writes it again. The rest of an entry is not kept: urls, data, and fields that image-spec does
// not have.
//
// Names are not facts: the ref says what the entry is called here. Of the two annotations that can
// be names, these are kept:
//
//   - io.containerd.image.name if it is the name that the ref has;
//   - both in an entry without a ref, if they name other content, such as the image index to which
//     one platform belongs. Read again, they name nothing again.
type entryFacts struct {
	Annotations map[string]string `json:"annotations"`
	Platform    *ocispec.Platform `json:"platform"`
}

// factsOf returns the facts of an entry that is called ref here. With ignored, its names are not
// kept.
func factsOf(e ocispec.Descriptor, ref Reference, ignored bool) entryFacts {
	f := entryFacts{Annotations: maps.Clone(e.Annotations), Platform: e.Platform}
	if ref.IsZero() && !ignored && entryClaim(e).from != "" {
		return f
	}
	delete(f.Annotations, ocispec.AnnotationRefName)
	if c, full := fullName(e.Annotations[annotationImageName], e.Digest); ignored || !full || ref.IsZero() || c.ref != ref {
		delete(f.Annotations, annotationImageName)
	}
	return f
}

// text returns the facts as the index keeps them: canonical JSON, "" for none.
func (f entryFacts) text() (string, error) {
	var w canonicalWriter
	w.raw("{")
	w.annotations(f.Annotations)
	w.platform(f.Platform)
	w.raw("}")
	if len(w.buf) == len("{}") {
		return "", w.err
	}
	return string(w.buf), w.err
}

// parseFacts is the inverse of text.
func parseFacts(text string) (f entryFacts, err error) {
	if text == "" {
		return f, nil
	}
	if err = json.Unmarshal([]byte(text), &f); err != nil {
		err = fmt.Errorf("%w: what is kept of an entry of index.json: %w", ErrCorruptIndex, err)
	}
	return f, err
}
