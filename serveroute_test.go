package ocilocal_test

import (
	"strings"
	"testing"
)

// TestServeRoutes asks for good, bad and hostile paths. None is a panic or a 500. A closed registry
// answers 503.
func TestServeRoutes(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	d := string(digestOfText("x"))
	for path, status := range map[string]int{
		"/": 404, "/v1/": 404, "/v2": 200, "/v2/": 200, "/v2/x": 404, "/v2/manifests/v1": 400, "/v2//manifests/v1": 400,
		"/v2/UPPER/manifests/v1": 400, "/v2/a/../b/manifests/v1": 400, "/v2/a%2Fb/manifests/v1": 404, "/v2/a%00/manifests/v1": 400,
		"/v2/a/blobs/" + d: 404, "/v2/a/blobs/x": 400, "/v2/a/blobs/": 400, "/v2/a/blobs/uploads": 405, "/v2/a/blobs/uploads/": 405,
		"/v2/a/blobs/uploads/../../x": 404, "/v2/a/uploads/x": 404, "/v2/blobs/blobs/" + d: 404, "/v2/a/blobs/uploads/blobs/" + d: 404,
		"/v2/a/tags/list": 404, "/v2/a/tags/": 404, "/v2/a/manifests/" + strings.Repeat("a", 129): 404,
		"/v2/" + strings.Repeat("a", 255) + "/tags/list": 400, "/v2/" + strings.Repeat("a/", 5000) + "manifests/v1": 404,
	} {
		if a := s.do("GET", path, ""); a.status != status {
			t.Errorf("%s: %d %s, want %d", path, a.status, a.body, status)
		}
	}
	for _, method := range []string{"POST", "PATCH", "OPTIONS", "TRACE", "BREW"} {
		if a := s.want(405, method, "/v2/a/manifests/v1", ""); a.header.Get("Allow") == "" {
			t.Error(a)
		}
	}
	mustClose(t, r)
	s.want(503, "GET", "/v2/", "")
	s.want(503, "GET", "/v2/a/manifests/v1", "")
	s.want(503, "POST", "/v2/a/blobs/uploads/", "")
}
