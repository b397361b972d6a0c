package ocilocal_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestServeLists pages through tags, repositories and referrers, in pages of several sizes. All
// pages together have each entry once.
func TestServeLists(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	s.want(404, "GET", "/v2/org/app/tags/list", "")
	var want []string
	for i := range 5 {
		want = append(want, fmt.Sprintf("v%d", i))
		s.pushImage("org/app", want[i], "layer")
		s.pushImage(fmt.Sprintf("org/app%d", i), "v1", "layer")
	}
	if _, err := build(t, r, "example.com/elsewhere:v1", nil, "layer"); err != nil {
		t.Fatal(err)
	}
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digestOfText(imageOf("layer")), Size: int64(len(imageOf("layer")))}
	for i := range 5 {
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.DescriptorEmptyJSON, Subject: &subject,
			ArtifactType: fmt.Sprintf("application/vnd.example.%d", i%2), Layers: []ocispec.Descriptor{}, Annotations: map[string]string{"n": fmt.Sprint(i)}}
		m.SchemaVersion, m.Config.Data = 2, nil
		raw, _ := json.Marshal(m)
		if a := s.want(201, "PUT", "/v2/org/app/manifests/"+string(digest.FromBytes(raw)), string(raw)); a.header.Get("OCI-Subject") != string(subject.Digest) {
			t.Error(a.header)
		}
	}
	// all follows the links and returns the entries of all pages, and the last page.
	all := func(path string, field string) (found []string, last received) {
		for pages := 0; path != ""; pages++ {
			last = s.want(200, "GET", path, "")
			var doc map[string]json.RawMessage
			if err := json.Unmarshal([]byte(last.body), &doc); err != nil {
				t.Fatal(err)
			}
			var names []string
			var descs []ocispec.Descriptor
			if json.Unmarshal(doc[field], &names) != nil {
				names = nil
				if err := json.Unmarshal(doc[field], &descs); err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range descs {
				names = append(names, d.ArtifactType+d.Annotations["n"])
			}
			found = append(found, names...)
			if pages > 10 {
				t.Fatalf("%s goes on for ever", path)
			}
			path, _, _ = strings.Cut(strings.TrimPrefix(last.header.Get("Link"), "<"), ">")
		}
		return found, last
	}
	for _, n := range []string{"", "?n=1", "?n=2", "?n=5", "?n=100000000000000000000", "?last=", "?n=3&last=&ns=x"} {
		if got, _ := all("/v2/org/app/tags/list"+n, "tags"); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("tags %s: %q", n, got)
		}
		if got, _ := all("/v2/_catalog"+n, "repositories"); strings.Join(got, " ") != "org/app org/app0 org/app1 org/app2 org/app3 org/app4" {
			t.Errorf("catalog %s: %q", n, got)
		}
		if got, _ := all("/v2/org/app/referrers/"+string(subject.Digest)+strings.Replace(n, "last=", "", 1), "manifests"); len(got) != 5 {
			t.Errorf("referrers %s: %q", n, got)
		}
	}
	if got, _ := all("/v2/org/app/tags/list?last=v2", "tags"); strings.Join(got, " ") != "v3 v4" {
		t.Errorf("%q", got)
	}
	if got, _ := all("/v2/org/app/tags/list?n=0", "tags"); len(got) != 0 {
		t.Errorf("%q", got)
	}
	got, a := all("/v2/org/app/referrers/"+string(subject.Digest)+"?n=1&artifactType=application/vnd.example.1", "manifests")
	if len(got) != 2 || a.header.Get("OCI-Filters-Applied") != "artifactType" || a.header.Get("Content-Type") != ocispec.MediaTypeImageIndex {
		t.Errorf("%q, %v", got, a)
	}
	if got, _ := all("/v2/other/referrers/"+string(subject.Digest), "manifests"); len(got) != 0 {
		t.Errorf("%q", got)
	}
	s.want(400, "GET", "/v2/org/app/tags/list?n=-1", "")
	s.want(400, "GET", "/v2/org/app/referrers/sha256:x", "")
	s.want(400, "GET", "/v2/_catalog?last=UPPER", "")
}
