package ocilocal

import (
	"encoding/json"
	"fmt"
	"maps"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationImageName is the annotation in which containerd, and so `docker save`, writes the full
// name of an entry. They write only the tag to org.opencontainers.image.ref.name.
const annotationImageName = "io.containerd.image.name"

// entryFacts are the platform and the annotations of an entry of an index.json, without its names.
// They stand only there, and not in the manifest. An import keeps them with the ref, or with the
// manifest if that gets no ref, and an export writes them again. The rest of an entry is not kept:
// urls, data, and fields that image-spec does not have.
//
// Names are not facts, because the ref has the name of the entry. Two annotations can be names.
// They are kept in these cases only:
//
//   - io.containerd.image.name, if the ref has the same name;
//   - both, in an entry without a ref, if they name other content. An example is the name of an
//     image index at the entry of one platform. A later import of the export then reads them as
//     names of other content again.
type entryFacts struct {
	Annotations map[string]string `json:"annotations"`
	Platform    *ocispec.Platform `json:"platform"`
}

// text returns the facts in the form in which the index keeps them: canonical JSON, and "" if there
// are none. Canonical text makes equal facts equal strings, so publish can compare them.
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

// parseFacts is the inverse of text. Only this package writes the text, so bad text is
// [ErrCorruptIndex].
func parseFacts(text string) (f entryFacts, err error) {
	if text == "" {
		return f, nil
	}
	if err = json.Unmarshal([]byte(text), &f); err != nil {
		err = fmt.Errorf("%w: stored facts of an index.json entry: %w", ErrCorruptIndex, err)
	}
	return f, err
}

// withoutNames returns the text of facts without the two annotations that can be names.
func withoutNames(text string) (string, error) {
	f, err := parseFacts(text)
	if err != nil || f.Annotations == nil {
		return text, err
	}
	f.Annotations = maps.Clone(f.Annotations)
	delete(f.Annotations, ocispec.AnnotationRefName)
	delete(f.Annotations, annotationImageName)
	return f.text()
}
