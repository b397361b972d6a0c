package ocilocal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestCheckJSON has documents that break the rules for any JSON. The error names the place.
func TestCheckJSON(t *testing.T) {
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	manyKeys := func(last string) string {
		var b strings.Builder
		for i := range 1000 {
			fmt.Fprintf(&b, `"k%d":0,`, i)
		}
		return `{"x":{` + b.String() + last + `}}`
	}
	for _, c := range []struct{ in, want string }{ // want "" = accepted
		{`{}`, ""},
		{" \t\r\n{ } \n", ""},
		{`{"x":[0,-0,-1.5e+3,1E9,true,false,null,"",{},[]]}`, ""},
		{`{ "x" : [ 0 , { "a" : 1 , "A" : 2 } , 1 ] , "y" : -1 }`, ""},
		{`{"x":"\u00e9\ud83d\ude00\"\\\/\b\f\n\r\t","é😀":1}`, ""},
		{`{"x":` + deep(MaxJSONDepth-1) + `}`, ""},
		{`{"annotations":{"a":"","A":"","":"x"}}`, ""},
		{`{"subject":null,"mediaType":null,"layers":null,"annotations":null}`, ""},
		{manyKeys(`"k1000":1`), ""},
		{`{"schemaVersion":9007199254740991}`, ""},

		{``, "unexpected end"},
		{`{`, "unexpected end"},
		{`{}{}`, "after top-level value"},
		{"{}\x00", "after top-level value"},
		{`{"a":1,}`, "invalid character"},
		{`{"a":01}`, "invalid character"},
		{`{'a':1}`, "invalid character"},
		{`{"a":NaN}`, "invalid character"},
		{"{\"a\":\"\x01\"}", "invalid character"},
		{`{"a":"\x41"}`, "invalid character"},
		{"\xef\xbb\xbf{}", "byte order mark"},
		{"{\"a\":\"\xff\"}", "not valid UTF-8"},
		{"{\"\xed\xa0\x80\":0}", "not valid UTF-8"},
		{`[]`, "not an object"},
		{`null`, "not an object"},
		{`"x"`, "not an object"},
		{`{"x":` + deep(MaxJSONDepth) + `}`, "…[0][0]"},
		{`{"x":` + deep(100_000) + `}`, "max depth"},
		{`{"x":1,"x":1}`, `duplicate key x`},
		{`{"x":1,"\u0078":1}`, `duplicate key x`},
		{`{"a":[{"b":{"c":1,"d":2,"c":3}}]}`, `a[0].b: duplicate key c`},
		{manyKeys(`"k500":1`), `duplicate key k500`},
		{`{"annotations":{"a":"1","a":"1"}}`, `annotations: duplicate key a`},
		{`{"MEDIATYPE":"x"}`, `key MEDIATYPE is mediaType in another case`},
		{`{"mediatYpe":null}`, "in another case"},
		{`{"\u004dediaType":"x"}`, "in another case"},
		{`{"manife\u017fts":[]}`, "in another case"}, // U+017F folds to s
		{`{"x":"\ud800"}`, "unpaired surrogate"},
		{`{"x":"\udc00\ud800"}`, "unpaired surrogate"},
		{`{"x":"\ud800\u0041"}`, "unpaired surrogate"},
		{`{"\uD800":1}`, "unpaired surrogate"},
		{`{"mediaType":1}`, "mediaType: not a string"},
		{`{"schemaVersion":"2"}`, "schemaVersion: not an integer"},
		{`{"schemaVersion":2.0}`, "schemaVersion: not an integer"},
		{`{"schemaVersion":9007199254740992}`, "schemaVersion: not an integer"},
		{`{"annotations":{"a b":null}}`, `annotations["a b"]: not a string`},
		{`{"annotations":{"a":1}}`, "annotations.a: not a string"},
		{`{"annotations":[]}`, "annotations: not an object"},
		{`{"layers":[null]}`, "layers[0]: not an object"},
		{`{"layers":[{}]}`, "layers[0].mediaType: missing"},
		{`{"layers":[{"mediaType":"a","digest":"b","size":null}]}`, "layers[0].size: missing"},
		{`{"blobs":[{"Digest":""}]}`, `blobs[0]: key Digest is digest`},
		{`{"manifests":[{"platform":{"OS":"x"}}]}`, `manifests[0].platform: key OS is os`},
		{`{"subject":{"urls":[1]}}`, "subject.urls[0]: not a string"},
	} {
		_, err := checkJSON([]byte(c.in), jsonManifest)
		name := c.in
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && err == nil:
			t.Errorf("%s: accepted, want %q", name, c.want)
		case c.want != "" && !strings.Contains(err.Error(), c.want):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		case err != nil && len(err.Error()) > 600:
			t.Errorf("%s: message of %d bytes", name, len(err.Error()))
		}
	}
}

// TestDecodeStrict decodes a document, and refuses one that encoding/json would accept.
func TestDecodeStrict(t *testing.T) {
	var layout ocispec.ImageLayout
	if _, err := decodeStrict([]byte(`{"imageLayoutVersion":"1.0.0","more":{}}`), jsonLayout, &layout); err != nil || layout.Version != "1.0.0" {
		t.Errorf("got %q, %v", layout.Version, err)
	}
	for _, in := range []string{`{}`, `{"imageLayoutVersion":null}`, `{"imageLayoutVersion":1}`, `{"imagelayoutversion":"1.0.0"}`} {
		if _, err := decodeStrict([]byte(in), jsonLayout, &layout); err == nil {
			t.Errorf("%s: accepted", in)
		}
	}
	present, err := checkJSON([]byte(`{"layers":null,"x":1}`), jsonManifest)
	if err != nil || present != jsonManifest.bit("layers") {
		t.Errorf("present = %b, %v", present, err)
	}
}

// TestCheckJSONBounds: a large document costs a bounded multiple of its size, whatever its content.
func TestCheckJSONBounds(t *testing.T) {
	const size = MaxManifestSize / 8 // enough to show the multiple, and quick under the race detector
	fill := func(item func(i int) string, open, end string) []byte {
		var b bytes.Buffer
		b.WriteString(open)
		for i := 0; b.Len() < size; i++ {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(item(i))
		}
		b.WriteString(end)
		return b.Bytes()
	}
	for name, raw := range map[string][]byte{
		"keys":         fill(func(i int) string { return fmt.Sprintf(`"%x":0`, i) }, `{`, `}`),
		"escaped keys": fill(func(i int) string { return fmt.Sprintf(`"\n%x":0`, i) }, `{`, `}`),
		"annotations":  fill(func(i int) string { return fmt.Sprintf(`"%x":""`, i) }, `{"annotations":{`, `}}`),
		"empty layers": fill(func(int) string { return `{}` }, `{"layers":[`, `]}`),
		"urls":         fill(func(int) string { return `""` }, `{"subject":{"mediaType":"a","digest":"b","size":0,"urls":[`, `]}}`),
		"objects":      fill(func(int) string { return `{}` }, `{"x":[`, `]}`),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = decodeStrict(raw, jsonManifest, new(manifestDoc))
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > 40*size {
			t.Errorf("%s: %d bytes allocated for %d", name, got, len(raw))
		}
	}
}

// FuzzCheckJSON compares the scanner with encoding/json. It never accepts a document that
// encoding/json refuses. If only the scanner refuses a document, its error names the rule.
func FuzzCheckJSON(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":[1,{"b":"\ud83d\ude00"}]}`, `{"a":"\ud800"}`, `{"layers":[{"mediaType":"a"}]}`, `[[1.5e9,-0]]`, `"\\\""`, "{\"\xff\":1}"} {
		f.Add([]byte(s))
	}
	reasons := []string{"byte order mark", "UTF-8", "duplicate key", "in another case", "not a", "missing", "nested", "surrogate"}
	f.Fuzz(func(t *testing.T, raw []byte) {
		_, free := checkJSON(raw, nil)
		_, typed := checkJSON(raw, jsonManifest)
		if free != nil && typed == nil {
			t.Fatalf("accepted as manifest, but not as any JSON: %v", free)
		}
		if free == nil {
			var v any
			if err := json.Unmarshal(raw, &v); err != nil {
				t.Fatal(err)
			}
		}
		for _, err := range []error{free, typed} {
			if err != nil && json.Valid(raw) && !slices.ContainsFunc(reasons, func(r string) bool { return strings.Contains(err.Error(), r) }) {
				t.Fatalf("refused for no known reason: %v", err)
			}
		}
	})
}

func BenchmarkCheckJSON(b *testing.B) {
	var layers []string
	for i := range 4 {
		layers = append(layers, fmt.Sprintf(`{"annotations":{"org.ommx.v1.instance.title":"knapsack","org.ommx.v1.instance.created":"now"},"digest":"sha256:%064d","mediaType":"application/org.ommx.v1.instance","size":4096}`, i))
	}
	raw := []byte(`{"artifactType":"a/b","blobs":[` + strings.Join(layers, ",") + `],"mediaType":"` + MediaTypeArtifactManifest + `"}`)
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := checkJSON(raw, jsonManifest); err != nil {
			b.Fatal(err)
		}
	}
}
