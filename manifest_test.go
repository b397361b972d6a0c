package ocilocal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	manSHA = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" // of nothing
	manOCI = `"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"`
	manArt = `"mediaType":"application/vnd.oci.artifact.manifest.v1+json","artifactType":"a/b"`
	manIdx = `"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json"`
)

// manDesc returns a descriptor of dgst, with the size as it is to be written and more fields.
func manDesc(dgst, size, more string) string {
	return fmt.Sprintf(`{"mediaType":"a/b","digest":%q,"size":%s%s}`, dgst, size, more)
}

// manLayer returns an image manifest with one layer.
func manLayer(dgst, size, more string) string {
	return `{` + manOCI + `,"config":` + manDesc(manHex("c"), "2", "") + `,"layers":[` + manDesc(dgst, size, more) + `]}`
}

func manHex(c string) string { return "sha256:" + strings.Repeat(c, 64) }

// manPadded returns a valid image manifest of n bytes.
func manPadded(n int) string {
	head := strings.TrimSuffix(manLayer(manSHA, "0", ""), "}") + `,"annotations":{"a":"`
	return head + strings.Repeat("x", n-len(head)-3) + `"}}`
}

// manGood returns documents that are accepted, each with the media type that is given and the one
// that results. It is a function so that worker processes do not make the large ones.
func manGood() []manGoodCase {
	return []manGoodCase{
		{"image", "", manLayer(manSHA, "0", ""), ocispec.MediaTypeImageManifest},
		{"image, type given", ocispec.MediaTypeImageManifest, manLayer(manSHA, "0", ""), ocispec.MediaTypeImageManifest},
		{"image by structure", "", `{"schemaVersion":2,"config":` + manDesc(manSHA, "0", "") + `,"layers":[]}`, ocispec.MediaTypeImageManifest},
		{"docker", ocilocal.MediaTypeDockerManifest, `{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":` + manDesc(manSHA, "0", "") + `,"layers":[]}`, ocilocal.MediaTypeDockerManifest},
		{"null layers", "", `{` + manOCI + `,"config":` + manDesc(manSHA, "0", "") + `,"layers":null}`, ocispec.MediaTypeImageManifest},
		{"no layers", "", `{` + manOCI + `,"config":` + manDesc(manSHA, "0", "") + `}`, ocispec.MediaTypeImageManifest},
		{"null manifests", "", `{"schemaVersion":2,"manifests":null}`, ocispec.MediaTypeImageIndex},
		{"docker list", "", `{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json","manifests":[` + manDesc(manSHA, "9", `,"platform":{"architecture":"x","os":"y","features":["z"]}`) + `]}`, ocilocal.MediaTypeDockerManifestList},
		{"index", "", `{` + manIdx + `,"manifests":[],"subject":` + manDesc(manSHA, "5", "") + `}`, ocispec.MediaTypeImageIndex},
		{"index by structure", "", `{"schemaVersion":2,"manifests":[]}`, ocispec.MediaTypeImageIndex},
		{"artifact", "", `{` + manArt + `,"blobs":[` + manDesc(manSHA, "0", "") + `]}`, ocilocal.MediaTypeArtifactManifest},
		{"artifact without blobs", "", `{` + manArt + `}`, ocilocal.MediaTypeArtifactManifest},
		{"white space", "", " {\n\t\"schemaVersion\" : 2 , \"manifests\" : [ ] }\r\n", ocispec.MediaTypeImageIndex},
		{"unknown fields", "", `{"schemaVersion":2,"manifests":[],"x":{"a":1,"A":[null,1.5]}}`, ocispec.MediaTypeImageIndex},
		{"sha384", "", manLayer("sha384:"+strings.Repeat("3a", 48), "1", ""), ocispec.MediaTypeImageManifest},
		{"sha512", "", manLayer("sha512:"+strings.Repeat("5b", 64), "1", ""), ocispec.MediaTypeImageManifest},
		{"largest size", "", manLayer(manSHA, "9007199254740991", ""), ocispec.MediaTypeImageManifest},
		{"one digest, two types", "", manLayer(manHex("c"), "2", `,"artifactType":"x/y"`), ocispec.MediaTypeImageManifest},
		{"data", "", manLayer(string(ocispec.DescriptorEmptyJSON.Digest), "2", `,"data":"e30="`), ocispec.MediaTypeImageManifest},
		{"empty data", "", manLayer(manSHA, "0", `,"data":""`), ocispec.MediaTypeImageManifest},
		{"annotations in two cases", "", manLayer(manSHA, "0", `,"annotations":{"a":"1","A":"2"}`), ocispec.MediaTypeImageManifest},
		{"null where optional", "", manLayer(manSHA, "0", `,"annotations":null,"urls":null,"data":null,"platform":null`), ocispec.MediaTypeImageManifest},
		{"4 MiB - 1", "", manPadded(4<<20 - 1), ocispec.MediaTypeImageManifest},
		{"4 MiB", "", manPadded(4 << 20), ocispec.MediaTypeImageManifest},
	}
}

type manGoodCase struct{ name, as, in, want string }

// manBad returns documents that are refused, each with the sentinels that the error matches and the
// place or reason in its text.
func manBad() []manBadCase {
	invalid, unsupported, large := ocilocal.ErrInvalidManifest, ocilocal.ErrUnsupportedMediaType, ocilocal.ErrTooLarge
	descr := manDesc(manSHA, "0", "")
	list := `[` + descr + `]`
	image := `{` + manOCI + `,"config":` + descr + `,"layers":` + list
	cases := []manBadCase{
		// Forms.
		{"empty", "", ``, []error{invalid}, "unexpected end"},
		{"nothing known", "", `{}`, []error{invalid}, "neither mediaType nor structure"},
		{"manifests and layers", "", `{"schemaVersion":2,"manifests":[],"layers":` + list + `}`, []error{invalid}, "ambiguous: layers"},
		{"manifests and config", "", `{"schemaVersion":2,"manifests":[],"config":` + descr + `}`, []error{invalid}, "ambiguous: config"},
		{"manifests and blobs", "", `{"schemaVersion":2,"manifests":[],"blobs":[]}`, []error{invalid}, "ambiguous: blobs"},
		{"manifests in an image manifest", "", image + `,"manifests":[]}`, []error{invalid}, "ambiguous: manifests"},
		{"null manifests in an image manifest", "", image + `,"manifests":null}`, []error{invalid}, "ambiguous: manifests"},
		{"blobs in an image manifest", "", image + `,"blobs":[]}`, []error{invalid}, "ambiguous: blobs"},
		{"layers in an index", "", `{` + manIdx + `,"manifests":[],"layers":[]}`, []error{invalid}, "ambiguous: layers"},
		{"config in an artifact manifest", "", `{` + manArt + `,"config":` + descr + `}`, []error{invalid}, "ambiguous: config"},
		{"layers in an artifact manifest", "", `{` + manArt + `,"layers":[]}`, []error{invalid}, "ambiguous: layers"},
		{"manifests in an artifact manifest", "", `{` + manArt + `,"manifests":[]}`, []error{invalid}, "ambiguous: manifests"},
		{"blobs without mediaType", "", `{"artifactType":"a/b","blobs":[]}`, []error{invalid}, "neither mediaType"},
		{"artifact manifest without mediaType", ocilocal.MediaTypeArtifactManifest, `{"artifactType":"a/b","blobs":[]}`, []error{invalid}, "mediaType: missing"},
		{"docker, type given only", ocilocal.MediaTypeDockerManifest, `{"schemaVersion":2,"config":` + descr + `,"layers":[]}`, []error{invalid}, "mediaType: missing"},
		{"docker list, type given only", ocilocal.MediaTypeDockerManifestList, `{"schemaVersion":2,"manifests":[]}`, []error{invalid}, "mediaType: missing"},
		{"artifact manifest without type", "", `{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","blobs":[]}`, []error{invalid}, "artifactType"},
		{"type contradicts", ocispec.MediaTypeImageIndex, manLayer(manSHA, "0", ""), []error{invalid}, "was given as"},
		{"type contradicts, docker", ocilocal.MediaTypeDockerManifest, manLayer(manSHA, "0", ""), []error{invalid}, "was given as"},
		{"type contradicts the structure", ocispec.MediaTypeImageIndex, `{"schemaVersion":2,"config":` + descr + `,"layers":[]}`, []error{invalid}, "ambiguous: config"},
		{"unsupported type given", "application/vnd.docker.distribution.manifest.v1+json", `{}`, []error{unsupported}, "v1+json"},
		{"parameter in the type given", ocispec.MediaTypeImageManifest + "; charset=utf-8", manLayer(manSHA, "0", ""), []error{unsupported}, "charset"},
		{"unsupported type of its own", "", `{"mediaType":"text/\u001b[31mred","manifests":[]}`, []error{unsupported}, `\x1b[31m`},
		{"config is no descriptor", "", `{"schemaVersion":2,"config":{},"layers":[]}`, []error{invalid}, "config.mediaType: missing"},
		{"no config", "", `{` + manOCI + `,"layers":[]}`, []error{invalid}, "config: missing"},
		{"null config", "", `{` + manOCI + `,"config":null,"layers":[]}`, []error{invalid}, "config: missing"},
		{"no manifests", "", `{` + manIdx + `}`, []error{invalid}, "manifests: missing"},
		{"schemaVersion 1", "", `{"schemaVersion":1,"manifests":[]}`, []error{invalid}, "schemaVersion"},
		{"schemaVersion missing", "", `{"manifests":[]}`, []error{invalid}, "schemaVersion"},
		{"schemaVersion null", "", `{"schemaVersion":null,"manifests":[]}`, []error{invalid}, "schemaVersion"},
		{"schemaVersion text", "", `{"schemaVersion":"2","manifests":[]}`, []error{invalid}, "schemaVersion"},
		{"artifactType with escape", "", image + `,"artifactType":"a\u001b"}`, []error{invalid}, "artifactType"},

		// JSON.
		{"duplicate key", "", `{"schemaVersion":2,"manifests":[],"manifests":[]}`, []error{invalid}, "duplicate key"},
		{"duplicate key by escape", "", `{"schemaVersion":2,"manifests":[],"manifest\u0073":[]}`, []error{invalid}, "duplicate key"},
		{"duplicate key in a descriptor", "", manLayer(manSHA, "0", `,"size":1`), []error{invalid}, `layers[0]: duplicate key size`},
		{"duplicate annotation", "", manLayer(manSHA, "0", `,"annotations":{"a":"1","a":"1"}`), []error{invalid}, "layers[0].annotations"},
		{"MEDIATYPE", "", image + `,"MEDIATYPE":"application/vnd.oci.image.index.v1+json"}`, []error{invalid}, "another case"},
		{"Digest in a descriptor", "", manLayer(manSHA, "0", `,"Digest":"x"`), []error{invalid}, "layers[0]"},
		{"invalid UTF-8", "", image + ",\"x\":\"\xff\"}", []error{invalid}, "UTF-8"},
		{"BOM", "", "\xef\xbb\xbf" + image + "}", []error{invalid}, "byte order mark"},
		{"trailing text", "", image + "} x", []error{invalid}, "after top-level value"},
		{"trailing document", "", image + "}{}", []error{invalid}, "after top-level value"},
		{"trailing NUL", "", image + "}\x00", []error{invalid}, "after top-level value"},
		{"truncated", "", image, []error{invalid}, "unexpected end"},
		{"depth 65", "", image + `,"x":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`, []error{invalid}, "nested"},
		{"depth 100,000", "", image + `,"x":` + strings.Repeat("[", 1e5) + strings.Repeat("]", 1e5) + `}`, []error{invalid}, "depth"},
		{"depth 100,000 unclosed", "", strings.Repeat("[", 1e5), []error{invalid}, "depth"},
		{"annotation not text", "", image + `,"annotations":{"a":1}}`, []error{invalid}, "annotations.a"},
		{"annotation null", "", image + `,"annotations":{"a":null}}`, []error{invalid}, "annotations.a"},
		{"layer annotation not text", "", manLayer(manSHA, "0", `,"annotations":{"a":{}}`), []error{invalid}, "layers[0].annotations.a"},

		// Limits.
		{"4 MiB + 1", "", manPadded(4<<20 + 1), []error{large}, "4194305"},
		{"100,000 layers", "", `{` + manOCI + `,"config":` + descr + `,"layers":[` + strings.Repeat(descr+",", 99_999) + descr + `]}`, []error{large}, "bytes"},

		// Descriptors.
		{"layer null", "", `{` + manOCI + `,"config":` + descr + `,"layers":[null]}`, []error{invalid}, "layers[0]"},
		{"no size", "", `{` + manOCI + `,"config":` + descr + `,"layers":[{"mediaType":"a/b","digest":"` + manSHA + `"}]}`, []error{invalid}, "layers[0].size: missing"},
		{"empty mediaType", "", strings.Replace(manLayer(manSHA, "0", ""), `"layers":[{"mediaType":"a/b"`, `"layers":[{"mediaType":""`, 1), []error{invalid}, "layers[0].mediaType"},
		{"mediaType of 256", "", strings.Replace(manLayer(manSHA, "0", ""), `"layers":[{"mediaType":"a/b"`, `"layers":[{"mediaType":"`+strings.Repeat("a", 256)+`"`, 1), []error{invalid}, "layers[0].mediaType"},
		{"mediaType with newline", "", strings.Replace(manLayer(manSHA, "0", ""), `"layers":[{"mediaType":"a/b"`, `"layers":[{"mediaType":"a\nb"`, 1), []error{invalid}, "layers[0].mediaType"},
		{"descriptor's artifactType", "", manLayer(manSHA, "0", `,"artifactType":"é"`), []error{invalid}, "layers[0].artifactType"},
		{"two sizes, config and layer", "", manLayer(manHex("c"), "3", ""), []error{invalid}, "layers[0].size"},
		{"two sizes, layer and subject", "", strings.TrimSuffix(manLayer(manSHA, "3", ""), "}") + `,"subject":` + descr + `}`, []error{invalid}, "size"},
		{"two sizes in an index", "", `{` + manIdx + `,"manifests":[` + descr + `,` + manDesc(manSHA, "7", "") + `]}`, []error{invalid}, "manifests[1].size"},
		{"data is no base64", "", manLayer(manSHA, "0", `,"data":"!"`), []error{invalid}, "base64"},
		{"data is an array", "", manLayer(manSHA, "0", `,"data":[]`), []error{invalid}, "data: not a string"},
		{"data of other size", "", manLayer(manSHA, "0", `,"data":"e30="`), []error{invalid, ocilocal.ErrSizeMismatch}, "layers[0].data"},
		{"data of other content", "", manLayer(string(ocispec.DescriptorEmptyJSON.Digest), "2", `,"data":"e30K"`), []error{invalid, ocilocal.ErrSizeMismatch}, "layers[0].data"},
		{"data of other digest", "", manLayer(string(ocispec.DescriptorEmptyJSON.Digest), "2", `,"data":"e3s="`), []error{invalid, ocilocal.ErrDigestMismatch}, "layers[0].data"},
		{"bad subject", "", image + `,"subject":` + manDesc("x", "0", "") + `}`, []error{invalid, ocilocal.ErrInvalidDigest}, "subject.digest"},
		{"bad blob", "", `{` + manArt + `,"blobs":[` + descr + `,` + manDesc("x", "0", "") + `]}`, []error{invalid, ocilocal.ErrInvalidDigest}, "blobs[1].digest"},
	}
	for _, size := range []string{"-1", "9007199254740992", "9007199254740993", "4611686018427387904", "9223372036854775807", "9223372036854775808", "1e30", "1.5", "1.0", "1e0", `"1"`, "true", "[]", "null"} {
		cases = append(cases, manBadCase{"size " + size, "", manLayer(manSHA, size, ""), []error{invalid}, "layers[0].size"})
	}
	for _, d := range []string{
		"", ":", "sha256", "sha256:", strings.ToUpper(manSHA), "sha256:" + strings.Repeat("A", 64), manSHA[:len(manSHA)-1], manSHA + "0",
		"sha256:../../x", "sha256:" + strings.Repeat("../", 21) + "x", "sha256:\x00" + strings.Repeat("a", 63), "sha256:%2e%2e" + strings.Repeat("a", 58),
		"sha1:" + strings.Repeat("a", 40), "md5:" + strings.Repeat("a", 32), "blake3:" + strings.Repeat("a", 64), "sha256:" + manSHA, "sha256::" + strings.Repeat("a", 63),
		"sha512:" + strings.Repeat("a", 64), " " + manSHA, strings.Repeat("a", 100_000),
	} {
		q, _ := json.Marshal(d)
		in := strings.Replace(manLayer(manSHA, "0", ""), `"`+manSHA+`"`, string(q), 1)
		cases = append(cases, manBadCase{fmt.Sprintf("digest %.60q", d), "", in, []error{invalid, ocilocal.ErrInvalidDigest}, "layers[0].digest"})
	}
	return cases
}

type manBadCase struct {
	name, as, in string
	is           []error
	says         string
}

// TestParseManifestGood parses documents that are accepted, and compares the media types.
func TestParseManifestGood(t *testing.T) {
	for _, c := range manGood() {
		m, err := ocilocal.ParseManifest(c.as, []byte(c.in))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if m.MediaType() != c.want {
			t.Errorf("%s: media type %s, want %s", c.name, m.MediaType(), c.want)
		}
		if string(m.Bytes()) != c.in || m.Digest() != digest.FromString(c.in) || m.Size() != int64(len(c.in)) {
			t.Errorf("%s: not the bytes that went in", c.name)
		}
	}
}

// TestParseManifestBad parses documents that must be refused, each for one reason.
func TestParseManifestBad(t *testing.T) {
	for _, c := range manBad() {
		m, err := ocilocal.ParseManifest(c.as, []byte(c.in))
		if err == nil || m != nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		for _, is := range c.is {
			if !errors.Is(err, is) {
				t.Errorf("%s: %v, want it to be: %v", c.name, err, is)
			}
		}
		if !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want it to say: %s", c.name, err, c.says)
		}
		if len(err.Error()) > 700 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
			t.Errorf("%s: message unfit for a terminal: %.900q", c.name, err.Error())
		}
	}
}

// TestManifestAccessors: the methods return the content of the document. A change of a returned
// value does not change the manifest.
func TestManifestAccessors(t *testing.T) {
	const index = `{"schemaVersion":2,"artifactType":"t/i","manifests":[{"mediaType":"m/1","digest":"` + manSHA + `","size":0,` +
		`"urls":["u"],"data":"","platform":{"architecture":"a","os":"o","os.version":"v","os.features":["f"],"variant":"w"}}]}`
	image := `{` + manOCI + `,"artifactType":"t/a","config":{"mediaType":"c/1","digest":"` + manHex("c") + `","size":3},"layers":[` +
		`{"mediaType":"l/1","digest":"` + manHex("1") + `","size":1,"annotations":{"k":"v"}},` +
		`{"mediaType":"l/2","digest":"` + manHex("2") + `","size":2,"annotations":{"k":""}},` +
		`{"mediaType":"l/1","digest":"` + manHex("3") + `","size":3}],` +
		`"subject":{"mediaType":"s/1","digest":"` + manHex("5") + `","size":5,"annotations":{"s":"t"}},"annotations":{"x":"y"}}`
	raw := []byte(image)
	m, err := ocilocal.ParseManifest("", raw)
	if err != nil {
		t.Fatal(err)
	}
	clear(raw)
	clear(m.Bytes())
	for range 2 { // the second round reads what the first has tried to alter
		if string(m.Bytes()) != image {
			t.Fatal("bytes altered")
		}
		config, ok := m.Config()
		if !ok || config.MediaType != "c/1" || config.Size != 3 || m.IsIndex() || m.Manifests() != nil {
			t.Errorf("config = %v, %v", config, ok)
		}
		subject, ok := m.Subject()
		if !ok || subject.Size != 5 || subject.Annotations["s"] != "t" {
			t.Errorf("subject = %v, %v", subject, ok)
		}
		subject.Annotations["s"] = ""
		layers := m.Layers()
		if len(layers) != 3 || layers[1].Digest.String() != manHex("2") || layers[0].Annotations["k"] != "v" {
			t.Errorf("layers = %v", layers)
		}
		layers[0].Annotations["k"] = ""
		clear(layers)
		if ls := m.LayersByMediaType("l/1"); len(ls) != 2 || ls[1].Size != 3 {
			t.Errorf("l/1 = %v", ls)
		} else {
			ls[0].Annotations["k"] = "z"
		}
		if ls := m.LayersByAnnotation("k", ""); len(ls) != 1 || ls[0].Size != 2 {
			t.Errorf("k= : %v", ls)
		}
		if ls := m.LayersByMediaType("l/3"); ls != nil {
			t.Errorf("l/3 = %v", ls)
		}
		if a := m.Annotations(); !maps.Equal(a, map[string]string{"x": "y"}) {
			t.Errorf("annotations = %v", a)
		} else {
			a["x"] = ""
		}
	}
	if d := m.Descriptor(); d.MediaType != ocispec.MediaTypeImageManifest || d.Digest != digest.FromString(image) || d.Size != int64(len(image)) || d.ArtifactType != "t/a" {
		t.Errorf("descriptor = %v", d)
	}
	if got, want := ocilocal.ManifestChildren(m), []string{"config " + manHex("c"), "layer " + manHex("1"), "layer " + manHex("2"), "layer " + manHex("3")}; !slices.Equal(got, want) {
		t.Errorf("children = %q", got)
	}

	m, err = ocilocal.ParseManifest("", []byte(index))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		ds := m.Manifests()
		if len(ds) != 1 || ds[0].URLs[0] != "u" || ds[0].Data == nil || ds[0].Platform.OSFeatures[0] != "f" || ds[0].Platform.OSVersion != "v" {
			t.Fatalf("manifests = %v", ds)
		}
		ds[0].URLs[0], ds[0].Platform.OSFeatures[0], ds[0].Platform.OSVersion = "", "", ""
	}
	if _, ok := m.Config(); ok || !m.IsIndex() || m.Layers() != nil || m.ArtifactType() != "t/i" {
		t.Error("index looks like an image manifest")
	}
	if _, ok := m.Subject(); ok {
		t.Error("subject out of nowhere")
	}
	if got := ocilocal.ManifestChildren(m); !slices.Equal(got, []string{"layer " + manSHA}) { // a member of unknown type
		t.Errorf("children = %q", got)
	}
	m, err = ocilocal.ParseManifest("", []byte(`{`+manArt+`,"blobs":[`+manDesc(manSHA, "0", "")+`]}`))
	if err != nil {
		t.Fatal(err)
	}
	if got := ocilocal.ManifestChildren(m); !slices.Equal(got, []string{"layer " + manSHA}) || len(m.Layers()) != 1 {
		t.Errorf("children = %q", got)
	}
	for in, want := range map[string]string{ // image-spec manifest.md, "Guidelines for Artifact Usage"
		manLayer(manSHA, "0", ""):            "a/b",
		`{"schemaVersion":2,"manifests":[]}`: "",
		`{` + manArt + `}`:                   "a/b",
	} {
		m, err := ocilocal.ParseManifest("", []byte(in))
		if err != nil || m.ArtifactType() != want {
			t.Errorf("artifact type of %s: %v, want %q", in, err, want)
		}
	}
}

// TestBuildManifestBytes has the exact bytes of built manifests. The artifact form is that of
// OMMX's first native builder. A change of these bytes changes the digest of every artifact that
// is built.
func TestBuildManifestBytes(t *testing.T) {
	layer := ocispec.Descriptor{MediaType: ocilocal.MediaTypeOMMXInstance, Digest: digest.Digest(manHex("1")), Size: 42,
		Annotations: map[string]string{"org.ommx.v1.instance.title": "a<b>&\u2028\"é\x7f\x01"}}
	plain := ocispec.Descriptor{MediaType: "application/json", Digest: digest.Digest(manHex("2")), Size: 0, Data: []byte{}, Annotations: map[string]string{}}
	platform := ocispec.Descriptor{MediaType: "a/b", Digest: digest.Digest(manHex("3")), Size: 1, ArtifactType: "c/d", URLs: []string{"u", "v"},
		Platform: &ocispec.Platform{Architecture: "amd64", OS: "linux", OSVersion: "1", OSFeatures: []string{"f"}, Variant: "w"}}
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(manHex("5")), Size: 7}
	for _, c := range []struct {
		name   string
		format ocilocal.ManifestFormat
		spec   ocilocal.ManifestSpec
		want   string
	}{
		{"artifact, least", ocilocal.FormatArtifactManifest, ocilocal.ManifestSpec{ArtifactType: "a/b"},
			`{"artifactType":"a/b","blobs":[],"mediaType":"application/vnd.oci.artifact.manifest.v1+json"}`},
		{"artifact, most", ocilocal.FormatArtifactManifest, ocilocal.ManifestSpec{ArtifactType: ocilocal.ArtifactTypeOMMX,
			Layers: []ocispec.Descriptor{layer, plain}, Annotations: map[string]string{"b": "2", "a": "1", "B": "3"}, Subject: &subject},
			`{"annotations":{"B":"3","a":"1","b":"2"},"artifactType":"application/org.ommx.v1.artifact","blobs":[` +
				`{"annotations":{"org.ommx.v1.instance.title":"a<b>&` + "\u2028" + `\"é` + "\x7f" + `\u0001"},` +
				`"digest":"sha256:1111111111111111111111111111111111111111111111111111111111111111","mediaType":"application/org.ommx.v1.instance","size":42},` +
				`{"digest":"sha256:2222222222222222222222222222222222222222222222222222222222222222","mediaType":"application/json","size":0}],` +
				`"mediaType":"application/vnd.oci.artifact.manifest.v1+json",` +
				`"subject":{"digest":"sha256:5555555555555555555555555555555555555555555555555555555555555555","mediaType":"application/vnd.oci.image.manifest.v1+json","size":7}}`},
		{"image, least", ocilocal.FormatDefault, ocilocal.ManifestSpec{ArtifactType: "a/b"},
			`{"artifactType":"a/b",` +
				`"config":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","mediaType":"application/vnd.oci.empty.v1+json","size":2},` +
				`"layers":[{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","mediaType":"application/vnd.oci.empty.v1+json","size":2}],` +
				`"mediaType":"application/vnd.oci.image.manifest.v1+json","schemaVersion":2}`},
		{"image, most", ocilocal.FormatImageManifest, ocilocal.ManifestSpec{ArtifactType: "a/b", Config: &plain,
			Layers: []ocispec.Descriptor{platform}, Annotations: map[string]string{"": ""}, Subject: &subject},
			`{"annotations":{"":""},"artifactType":"a/b",` +
				`"config":{"digest":"sha256:2222222222222222222222222222222222222222222222222222222222222222","mediaType":"application/json","size":0},` +
				`"layers":[{"artifactType":"c/d","digest":"sha256:3333333333333333333333333333333333333333333333333333333333333333","mediaType":"a/b",` +
				`"platform":{"architecture":"amd64","os":"linux","os.features":["f"],"os.version":"1","variant":"w"},"size":1,"urls":["u","v"]}],` +
				`"mediaType":"application/vnd.oci.image.manifest.v1+json","schemaVersion":2,` +
				`"subject":{"digest":"sha256:5555555555555555555555555555555555555555555555555555555555555555","mediaType":"application/vnd.oci.image.manifest.v1+json","size":7}}`},
		{"image with config and no artifact type", ocilocal.FormatImageManifest, ocilocal.ManifestSpec{Config: &plain, Layers: []ocispec.Descriptor{plain}},
			`{"config":{"digest":"sha256:2222222222222222222222222222222222222222222222222222222222222222","mediaType":"application/json","size":0},` +
				`"layers":[{"digest":"sha256:2222222222222222222222222222222222222222222222222222222222222222","mediaType":"application/json","size":0}],` +
				`"mediaType":"application/vnd.oci.image.manifest.v1+json","schemaVersion":2}`},
	} {
		m, err := ocilocal.BuildManifest(c.format, c.spec)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := string(m.Bytes()); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
		if again, err := ocilocal.ParseManifest("", m.Bytes()); err != nil || again.Digest() != m.Digest() || again.MediaType() != m.MediaType() {
			t.Errorf("%s: does not parse back: %v", c.name, err)
		}
	}
}

// TestBuildManifestRefuses builds manifests that image-spec does not allow.
func TestBuildManifestRefuses(t *testing.T) {
	good := ocispec.Descriptor{MediaType: "a/b", Digest: manSHA}
	negative, wrong, untyped := good, good, good
	negative.Size, wrong.Digest, untyped.MediaType = -1, "sha256:x", ""
	for name, c := range map[string]struct {
		format ocilocal.ManifestFormat
		spec   ocilocal.ManifestSpec
		want   error
	}{
		"config in artifact manifest": {ocilocal.FormatArtifactManifest, ocilocal.ManifestSpec{ArtifactType: "a/b", Config: &good}, ocilocal.ErrInvalidArgument},
		"no type":                     {ocilocal.FormatArtifactManifest, ocilocal.ManifestSpec{}, ocilocal.ErrInvalidArgument},
		"no type and no config":       {ocilocal.FormatImageManifest, ocilocal.ManifestSpec{}, ocilocal.ErrInvalidArgument},
		"no type and empty config":    {ocilocal.FormatImageManifest, ocilocal.ManifestSpec{Config: &ocilocal.EmptyJSON}, ocilocal.ErrInvalidArgument},
		"unknown format":              {7, ocilocal.ManifestSpec{ArtifactType: "a/b"}, ocilocal.ErrInvalidArgument},
		"invalid UTF-8 in a value":    {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Annotations: map[string]string{"a": "\xff"}}, ocilocal.ErrInvalidArgument},
		"invalid UTF-8 in a key":      {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Annotations: map[string]string{"\xff": ""}}, ocilocal.ErrInvalidArgument},
		"negative size":               {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Layers: []ocispec.Descriptor{negative}}, ocilocal.ErrInvalidManifest},
		"bad digest":                  {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Layers: []ocispec.Descriptor{wrong}}, ocilocal.ErrInvalidDigest},
		"layer without media type":    {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Layers: []ocispec.Descriptor{untyped}}, ocilocal.ErrInvalidManifest},
		"bad subject":                 {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Subject: &wrong}, ocilocal.ErrInvalidDigest},
		"bad artifact type":           {0, ocilocal.ManifestSpec{ArtifactType: "a\n"}, ocilocal.ErrInvalidManifest},
		"too large":                   {0, ocilocal.ManifestSpec{ArtifactType: "a/b", Annotations: map[string]string{"a": strings.Repeat("x", 4<<20)}}, ocilocal.ErrTooLarge},
	} {
		if m, err := ocilocal.BuildManifest(c.format, c.spec); m != nil || !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	for f, want := range map[ocilocal.ManifestFormat]string{ocilocal.FormatDefault: "default", ocilocal.FormatArtifactManifest: "artifact manifest",
		ocilocal.FormatImageManifest: "image manifest", 9: "ManifestFormat(9)"} {
		if f.String() != want {
			t.Errorf("format %d is %q", int(f), f)
		}
	}
}

// TestBuildManifestOrder: the bytes do not depend on the order in which annotations are set.
func TestBuildManifestOrder(t *testing.T) {
	keys := []string{"a", "A", "aa", "b", "", "é", "e\u0301", "\U0001f600", "\uffff", "org.ommx.v1.x", "org.ommx.v1-x", "z\x00", "<", "\""}
	var first *ocilocal.Manifest
	for i := range 200 {
		rotated := slices.Concat(keys[i%len(keys):], keys[:i%len(keys)])
		if i%2 == 1 {
			slices.Reverse(rotated)
		}
		a := map[string]string{}
		for _, k := range rotated {
			a[k] = "v" + k
		}
		m, err := ocilocal.BuildManifest(ocilocal.ManifestFormat(1), ocilocal.ManifestSpec{ArtifactType: "a/b", Annotations: a,
			Layers: []ocispec.Descriptor{{MediaType: "a/b", Digest: manSHA, Annotations: maps.Clone(a)}}})
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = m
		}
		if !bytes.Equal(m.Bytes(), first.Bytes()) {
			t.Fatalf("round %d:\n%s\n%s", i, m.Bytes(), first.Bytes())
		}
		if !maps.Equal(m.Annotations(), a) {
			t.Fatal("annotations changed on the way")
		}
	}
}

// TestCanonicalAnnotations compares with the output of Rust's serde_json::to_string for a
// BTreeMap<String, String> that has the text as a value.
func TestCanonicalAnnotations(t *testing.T) {
	for in, want := range map[string]string{
		"":                         `""`,
		"plain":                    `"plain"`,
		`"`:                        `"\""`,
		`\`:                        `"\\"`,
		"/":                        `"/"`,
		"\b\f\n\r\t":               `"\b\f\n\r\t"`,
		"\x00\x01\x07\x0b":         `"\u0000\u0001\u0007\u000b"`,
		"\x0e\x0f\x10\x1a\x1f":     `"\u000e\u000f\u0010\u001a\u001f"`,
		"\x7f":                     "\"\x7f\"",
		"<>&'":                     `"<>&'"`,
		"\u0080\u2028\u2029":       "\"\u0080\u2028\u2029\"",
		"é日\U0001f600\ufeff\ufffd": "\"é日\U0001f600\ufeff\ufffd\"",
	} {
		got, err := ocilocal.CanonicalAnnotations(map[string]string{"k": in})
		if err != nil || got != `{"k":`+want+`}` {
			t.Errorf("%q: %s, %v; want %s", in, got, err, want)
		}
		got, err = ocilocal.CanonicalAnnotations(map[string]string{in: ""})
		if err != nil || got != `{`+want+`:""}` {
			t.Errorf("key %q: %s, %v", in, got, err)
		}
	}
	for _, a := range []map[string]string{nil, {}} {
		if got, err := ocilocal.CanonicalAnnotations(a); got != "{}" || err != nil {
			t.Errorf("%v: %s, %v", a, got, err)
		}
	}
	if _, err := ocilocal.CanonicalAnnotations(map[string]string{"a": "\xed\xa0\x80"}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("surrogate in UTF-8: %v", err)
	}
}

// FuzzManifest: an accepted document means the same to encoding/json, and can be written
// canonically.
func FuzzManifest(f *testing.F) {
	for _, c := range manGood() {
		if len(c.in) < 1<<16 {
			f.Add(c.as, []byte(c.in))
		}
	}
	for _, c := range manBad() {
		if len(c.in) < 1<<16 {
			f.Add(c.as, []byte(c.in))
		}
	}
	f.Fuzz(func(t *testing.T, as string, raw []byte) {
		before := bytes.Clone(raw)
		m, err := ocilocal.ParseManifest(as, raw)
		if !bytes.Equal(raw, before) {
			t.Fatal("input altered")
		}
		if err != nil {
			if m != nil || !errors.Is(err, ocilocal.ErrInvalidManifest) && !errors.Is(err, ocilocal.ErrUnsupportedMediaType) && !errors.Is(err, ocilocal.ErrTooLarge) {
				t.Fatalf("untyped: %v", err)
			}
			return
		}
		if !bytes.Equal(m.Bytes(), raw) || m.Digest() != digest.FromBytes(raw) || m.Size() != int64(len(raw)) {
			t.Fatal("bytes not preserved")
		}
		again, err := ocilocal.ParseManifest(m.MediaType(), raw)
		if err != nil || again.MediaType() != m.MediaType() || again.ArtifactType() != m.ArtifactType() {
			t.Fatalf("parsed by its own type: %v", err)
		}
		// A reader that knows only exact names must see the same document.
		var exact map[string]json.RawMessage
		if err := json.Unmarshal(raw, &exact); err != nil {
			t.Fatal(err)
		}
		var own string
		if exact["mediaType"] != nil && json.Unmarshal(exact["mediaType"], &own) == nil && own != "" && own != m.MediaType() {
			t.Fatalf("media type %q and %q", own, m.MediaType())
		}
		for name, want := range map[string]int{"manifests": len(m.Manifests()), "layers+blobs": len(m.Layers())} {
			n := 0
			for key := range strings.SplitSeq(name, "+") {
				var list []map[string]any
				if exact[key] != nil {
					if err := json.Unmarshal(exact[key], &list); err != nil {
						t.Fatal(err)
					}
				}
				for _, d := range list {
					if _, err := digest.Parse(fmt.Sprint(d["digest"])); err != nil {
						t.Fatal(err)
					}
				}
				n += len(list)
			}
			if n != want {
				t.Fatalf("%d %s, view has %d", n, name, want)
			}
		}
		for _, d := range slices.Concat(m.Layers(), m.Manifests()) {
			if d.Digest.Validate() != nil || d.Size < 0 || d.MediaType == "" {
				t.Fatalf("descriptor %v", d)
			}
		}
		// Every accepted document can be written canonically, in either form.
		if !m.IsIndex() && m.ArtifactType() != "" {
			spec := ocilocal.ManifestSpec{ArtifactType: m.ArtifactType(), Layers: m.Layers(), Annotations: m.Annotations()}
			for _, form := range []ocilocal.ManifestFormat{ocilocal.FormatArtifactManifest, ocilocal.FormatImageManifest} {
				b, err := ocilocal.BuildManifest(form, spec)
				if err != nil && !errors.Is(err, ocilocal.ErrInvalidManifest) { // the empty blob's digest may be there with another size
					t.Fatal(err)
				}
				if err == nil && (!maps.Equal(b.Annotations(), spec.Annotations) || len(spec.Layers) > 0 && len(b.Layers()) != len(spec.Layers)) {
					t.Fatal("rebuilt manifest differs")
				}
			}
		}
	})
}

// manKiB is a manifest of about 1 KiB, like that of an OMMX artifact.
func manKiB() []byte {
	spec := ocilocal.ManifestSpec{ArtifactType: ocilocal.ArtifactTypeOMMX, Annotations: map[string]string{"org.opencontainers.image.created": "2024-05-01T00:00:00Z"}}
	for i := range 3 {
		spec.Layers = append(spec.Layers, ocispec.Descriptor{MediaType: ocilocal.MediaTypeOMMXInstance, Digest: digest.Digest(manHex(fmt.Sprint(i))), Size: 4096,
			Annotations: map[string]string{"org.ommx.v1.instance.title": "knapsack", "org.ommx.v1.instance.created": "2024-05-01T00:00:00Z"}})
	}
	m, err := ocilocal.BuildManifest(ocilocal.FormatImageManifest, spec)
	if err != nil {
		panic(err)
	}
	return m.Bytes()
}

func BenchmarkParseManifest(b *testing.B) {
	raw := manKiB()
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ocilocal.ParseManifest(ocispec.MediaTypeImageManifest, raw); err != nil {
			b.Fatal(err)
		}
	}
}

func ExampleParseManifest() {
	m, err := ocilocal.ParseManifest("", []byte(`{
		"schemaVersion": 2,
		"mediaType": "application/vnd.oci.image.manifest.v1+json",
		"artifactType": "application/org.ommx.v1.artifact",
		"config": {"mediaType": "application/vnd.oci.empty.v1+json", "size": 2,
			"digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
		"layers": [{"mediaType": "application/org.ommx.v1.instance", "size": 0,
			"digest": "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]
	}`))
	if err != nil {
		panic(err)
	}
	fmt.Println(m.ArtifactType())
	for _, layer := range m.LayersByMediaType(ocilocal.MediaTypeOMMXInstance) {
		fmt.Println(layer.Size, layer.Digest)
	}

	_, err = ocilocal.ParseManifest("", []byte(`{"schemaVersion": 2, "manifests": [], "layers": []}`))
	fmt.Println(errors.Is(err, ocilocal.ErrInvalidManifest), err)
	// Output:
	// application/org.ommx.v1.artifact
	// 0 sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
	// true invalid manifest: ambiguous: layers in a document of type application/vnd.oci.image.index.v1+json
}
