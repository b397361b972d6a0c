package ocilocal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// likeEncodingJSON returns a document as encoding/json writes it: keys sorted, no white space. It
// escapes two characters that the canonical form leaves as they are.
func likeEncodingJSON(t *testing.T, doc []byte) []byte {
	t.Helper()
	var v any
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q is not JSON: %v", doc, err)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		t.Fatal(err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// FuzzCanonical reads canonical documents with encoding/json. They have the content that they were
// built from, in the spelling of encoding/json, and the order in which annotations are set does not
// matter.
func FuzzCanonical(f *testing.F) {
	f.Add("key", "value", "other", "<>&\u2028", "application/vnd.example", "a/b", int64(3), true)
	f.Add("", "\x00\b\t\n\v\f\r\x1f\x7f", "\"\\/", "\U0001f600\ufffd", "a/b", "text/plain; charset=utf-8", int64(0), false)
	f.Add("a", "\xff", "A", "", "", "", int64(1)<<53+1, true)
	f.Add("org.opencontainers.image.title", "ä", "ﬀ", "\ue000", "a/b", "a/b", int64(-1), false)
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2, artifactType, mediaType string, size int64, image bool) {
		annotations := map[string]string{key1: value1, key2: value2}
		text, err := ocilocal.CanonicalAnnotations(annotations)
		valid := true
		for k, v := range annotations {
			valid = valid && utf8.ValidString(k) && utf8.ValidString(v)
		}
		if (err == nil) != valid || err != nil && !errors.Is(err, ocilocal.ErrInvalidArgument) {
			t.Fatalf("%q: valid UTF-8 is %v, the error %v", annotations, valid, err)
		}
		if err != nil {
			return
		}
		var back map[string]string
		if err := json.Unmarshal([]byte(text), &back); err != nil || !maps.Equal(back, annotations) {
			t.Fatalf("%q says %q, %v; want %q", text, back, err, annotations)
		}
		checkSpelling(t, []byte(text))

		layer := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(value1), Size: size, Annotations: annotations,
			URLs: []string{value2}, Platform: &ocispec.Platform{Architecture: key1, OS: key2, OSFeatures: []string{value1}, Variant: value2}}
		subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(key1), Size: 7}
		format := ocilocal.FormatArtifactManifest
		if image {
			format = ocilocal.FormatImageManifest
		}
		spec := ocilocal.ManifestSpec{ArtifactType: artifactType, Layers: []ocispec.Descriptor{layer}, Annotations: annotations, Subject: &subject}
		m, err := ocilocal.BuildManifest(format, spec)
		if err != nil {
			return // TestBuildManifestRefuses has the rules
		}
		checkSpelling(t, m.Bytes())
		spec.Annotations = map[string]string{key2: value2}
		spec.Annotations[key1] = value1
		if again, err := ocilocal.BuildManifest(format, spec); key1 != key2 && (err != nil || !bytes.Equal(again.Bytes(), m.Bytes())) {
			t.Fatalf("%q, then %v, %v", m.Bytes(), again, err)
		}
		var doc struct {
			ArtifactType  string
			Layers, Blobs []ocispec.Descriptor
			Annotations   map[string]string
			Subject       ocispec.Descriptor
		}
		if err := json.Unmarshal(m.Bytes(), &doc); err != nil {
			t.Fatal(err)
		}
		got := append(doc.Layers, doc.Blobs...)
		if len(got) != 1 || !reflect.DeepEqual(withoutEmpty(got[0]), withoutEmpty(layer)) || doc.ArtifactType != artifactType ||
			!maps.Equal(doc.Annotations, annotations) || !reflect.DeepEqual(doc.Subject, subject) {
			t.Fatalf("%s says %+v", m.Bytes(), doc)
		}
	})
}

// withoutEmpty drops a platform without content: the canonical form does not write it.
func withoutEmpty(d ocispec.Descriptor) ocispec.Descriptor {
	if d.Platform != nil && reflect.DeepEqual(*d.Platform, ocispec.Platform{}) {
		d.Platform = nil
	}
	return d
}

func checkSpelling(t *testing.T, doc []byte) {
	t.Helper()
	if want := likeEncodingJSON(t, doc); !strings.ContainsAny(string(doc), "\u2028\u2029") && !bytes.Equal(want, doc) {
		t.Fatalf("%s\nis spelled by encoding/json\n%s", doc, want)
	}
}
