package ocilocal

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// manifestSpec is what a manifest is built from. Maps and slices may be nil.
type manifestSpec struct {
	artifactType string
	config       *ocispec.Descriptor // image manifests only; nil stands for emptyJSON
	layers       []ocispec.Descriptor
	annotations  map[string]string
	subject      *ocispec.Descriptor
}

// emptyJSON is the descriptor of the blob "{}". It takes the place of a config or layer that an
// image manifest must have and the artifact has not (image-spec manifest.md, "Guidance for an Empty
// Descriptor"). The builder stores that blob too.
var emptyJSON = ocispec.Descriptor{
	MediaType: ocispec.MediaTypeEmptyJSON,
	Digest:    ocispec.DescriptorEmptyJSON.Digest,
	Size:      2,
}

// buildManifest writes the canonical document of spec: equal input gives equal bytes, and so one
// digest. A change of these bytes would give every artifact that is built again another digest, so
// the form is fixed for ever. Descriptors are written whole except for data, which repeats the
// content. The document is parsed like a foreign one, so a Builder can't make a manifest that this
// package would refuse.
//
// Errors: [ErrInvalidArgument] for a config in an artifact manifest, a missing
// artifact type, an unknown format or invalid UTF-8, and those of [ParseManifest],
// which the document has passed when it is returned.
func buildManifest(f ManifestFormat, spec manifestSpec) (*Manifest, error) {
	if f == FormatDefault {
		f = FormatImageManifest
	}
	mediaType, list := MediaTypeArtifactManifest, "blobs"
	switch f {
	case FormatArtifactManifest:
		if spec.config != nil {
			return nil, fmt.Errorf("%w: an artifact manifest has no config: build as image manifest, or without it", ErrInvalidArgument)
		}
	case FormatImageManifest:
		mediaType, list = ocispec.MediaTypeImageManifest, "layers"
		if spec.config == nil {
			spec.config = &emptyJSON
		}
		if len(spec.layers) == 0 {
			spec.layers = []ocispec.Descriptor{emptyJSON}
		}
	default:
		return nil, fmt.Errorf("%w: unknown format %v", ErrInvalidArgument, f)
	}
	// manifest.md: with an empty config only artifactType says what the artifact is.
	if spec.artifactType == "" && (spec.config == nil || spec.config.MediaType == ocispec.MediaTypeEmptyJSON) {
		return nil, fmt.Errorf("%w: artifact type is empty", ErrInvalidArgument)
	}
	return spec.document(mediaType, list)
}

// buildIndex writes the canonical image index of spec, whose layers are its manifests. Errors are
// those of [ParseManifest], and [ErrInvalidArgument] for invalid UTF-8.
func buildIndex(spec manifestSpec) (*Manifest, error) {
	return spec.document(ocispec.MediaTypeImageIndex, "manifests")
}

// document writes the document of a media type. The field with the name in list has the layers.
func (s *manifestSpec) document(mediaType, list string) (*Manifest, error) {
	var w canonicalWriter
	w.raw("{")
	w.annotations(s.annotations)
	w.field("artifactType", s.artifactType)
	if s.config != nil {
		w.key("config")
		w.descriptor(s.config)
	}
	w.descriptors(list, s.layers)
	w.field("mediaType", mediaType)
	if mediaType != MediaTypeArtifactManifest {
		w.key("schemaVersion")
		w.int(2)
	}
	if s.subject != nil {
		w.key("subject")
		w.descriptor(s.subject)
	}
	w.raw("}")
	if w.err != nil {
		return nil, w.err
	}
	return parseManifest(mediaType, w.buf)
}

// A canonicalWriter writes JSON with one spelling for each document:
//   - keys are sorted bytewise, by the caller or, in maps, by [canonicalWriter.texts]
//   - it writes no white space, and all numbers are integers
//   - strings are escaped as Rust's serde_json does it, so that the same manifest built with either
//     OMMX SDK has the same digest. encoding/json would also escape <, >, &, U+2028 and U+2029
type canonicalWriter struct {
	buf []byte
	err error // the first string that can't be written
}

// sep writes the comma that the next key or element needs.
func (w *canonicalWriter) sep() {
	if n := len(w.buf); n > 0 && w.buf[n-1] != '{' && w.buf[n-1] != '[' {
		w.buf = append(w.buf, ',')
	}
}

func (w *canonicalWriter) raw(s string) { w.buf = append(w.buf, s...) }

func (w *canonicalWriter) key(name string) {
	w.sep()
	w.text(name)
	w.raw(":")
}

func (w *canonicalWriter) int(n int64) { w.buf = strconv.AppendInt(w.buf, n, 10) }

// text writes a string: '"', '\\' and the characters below 0x20 are escaped, nothing else.
func (w *canonicalWriter) text(s string) {
	if !utf8.ValidString(s) && w.err == nil {
		w.err = fmt.Errorf("%w: text %s is not valid UTF-8", ErrInvalidArgument, printable(s))
	}
	b := append(w.buf, '"')
	for _, c := range []byte(s) {
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c >= 0x20:
			b = append(b, c)
		case c >= '\b' && c <= '\r' && c != '\v':
			b = append(b, '\\', "btn_fr"[c-'\b'])
		default:
			b = append(b, '\\', 'u', '0', '0', '0'+c>>4, "0123456789abcdef"[c&15])
		}
	}
	w.buf = append(b, '"')
}

// field writes a string field unless it is empty.
func (w *canonicalWriter) field(name, value string) {
	if value != "" {
		w.key(name)
		w.text(value)
	}
}

// texts writes a map with its keys in bytewise order.
func (w *canonicalWriter) texts(m map[string]string) {
	w.raw("{")
	for _, k := range slices.Sorted(maps.Keys(m)) {
		w.key(k)
		w.text(m[k])
	}
	w.raw("}")
}

// list writes a field with an array of strings unless it is empty.
func (w *canonicalWriter) list(name string, values []string) {
	if len(values) > 0 {
		w.key(name)
		w.raw("[")
		for _, v := range values {
			w.sep()
			w.text(v)
		}
		w.raw("]")
	}
}

// canonicalAnnotations writes annotations, which may be nil, as a canonical JSON object. The index
// stores this text, and Verify compares it with the document's. Invalid UTF-8 is
// [ErrInvalidArgument], because JSON can't represent it.
func canonicalAnnotations(annotations map[string]string) (string, error) {
	var w canonicalWriter
	w.texts(annotations)
	return string(w.buf), w.err
}

// annotations writes the annotations of a document or descriptor, if it has any.
func (w *canonicalWriter) annotations(m map[string]string) {
	if len(m) > 0 {
		w.key("annotations")
		w.texts(m)
	}
}

func (w *canonicalWriter) descriptors(name string, ds []ocispec.Descriptor) {
	w.key(name)
	w.raw("[")
	for i := range ds {
		w.sep()
		w.descriptor(&ds[i])
	}
	w.raw("]")
}

func (w *canonicalWriter) descriptor(d *ocispec.Descriptor) {
	w.raw("{")
	w.annotations(d.Annotations)
	w.field("artifactType", d.ArtifactType)
	w.field("digest", string(d.Digest))
	w.field("mediaType", d.MediaType)
	w.platform(d.Platform)
	w.key("size")
	w.int(d.Size)
	w.list("urls", d.URLs)
	w.raw("}")
}

// platform writes the platform of a descriptor, if it has one.
func (w *canonicalWriter) platform(p *ocispec.Platform) {
	if p == nil {
		return
	}
	w.key("platform")
	w.raw("{")
	w.field("architecture", p.Architecture)
	w.field("os", p.OS)
	w.list("os.features", p.OSFeatures)
	w.field("os.version", p.OSVersion)
	w.field("variant", p.Variant)
	w.raw("}")
}
