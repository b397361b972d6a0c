package ocilocal_test

import (
	"fmt"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestServeManifests puts, reads and deletes manifests and tags. A blob can be deleted only when no
// manifest needs it any more.
func TestServeManifests(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	raw := imageOf("layer")
	d := string(digestOfText(raw))
	if a := s.want(400, "PUT", "/v2/org/app/manifests/v1", raw); a.code() != "MANIFEST_BLOB_UNKNOWN" {
		t.Error(a)
	}
	s.pushImage("org/app", "v1", "layer")
	s.pushImage("org/app", "", "layer")
	for _, reference := range []string{"v1", d} {
		for _, method := range []string{"GET", "HEAD"} {
			a := s.want(200, method, "/v2/org/app/manifests/"+reference, "")
			if a.header.Get("Docker-Content-Digest") != d || a.header.Get("Content-Type") != ocispec.MediaTypeImageManifest ||
				a.header.Get("Content-Length") != fmt.Sprint(len(raw)) || method == "GET" && a.body != raw {
				t.Errorf("%s %s: %v", method, reference, a)
			}
		}
		s.want(304, "GET", "/v2/org/app/manifests/"+reference, "", "If-None-Match", `"`+d+`"`)
	}
	// A tag moves. The manifest that it pointed at stays.
	other := string(s.pushImage("org/app", "v1", "other"))
	if a := s.want(200, "HEAD", "/v2/org/app/manifests/v1", ""); a.header.Get("Docker-Content-Digest") != other {
		t.Error(a)
	}
	s.want(202, "DELETE", "/v2/org/app/manifests/v1", "")
	s.want(404, "DELETE", "/v2/org/app/manifests/v1", "")
	s.want(200, "GET", "/v2/org/app/manifests/"+other, "")
	if a := s.want(200, "GET", "/v2/org/app/tags/list", ""); !strings.Contains(a.body, `"tags":[]`) {
		t.Error(a.body)
	}
	s.want(202, "DELETE", "/v2/org/app/manifests/"+other, "")
	s.want(404, "GET", "/v2/org/app/manifests/"+other, "")
	layer := "/v2/org/app/blobs/" + string(digestOfText("layer"))
	s.want(409, "DELETE", layer, "")
	s.want(202, "DELETE", "/v2/org/app/manifests/"+d, "")
	s.want(202, "DELETE", layer, "")
	s.want(404, "GET", layer, "")
}
