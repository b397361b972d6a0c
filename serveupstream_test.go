package ocilocal_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// TestServeUpstream: a miss is pulled once for all callers, tags follow the upstream, and what is
// here is served without it.
func TestServeUpstream(t *testing.T) {
	t.Parallel()
	far := openTemp(t, nil)
	var blobs, requests atomic.Int64
	h := far.Handler(nil)
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.Method == "GET" && strings.Contains(r.URL.Path, "/blobs/") {
			blobs.Add(1)
		}
		h.ServeHTTP(w, r)
	}))
	defer upstream.Close()
	origin := &served{upstream, strings.TrimPrefix(upstream.URL, "http://"), t}
	first := origin.pushImage("org/app", "v1", "one", "two")
	text := imageOf("one", "two")

	near := openTemp(t, nil)
	serving := func(revalidate time.Duration) *served {
		return serveAt(t, near, &ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{Host: origin.host, Revalidate: revalidate}})
	}
	lazy, eager := serving(time.Hour), serving(-1)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			if a, err := lazy.try("GET", "/v2/org/app/manifests/v1", nil); err != nil || a.status != 200 || a.body != text {
				t.Errorf("%v, %v", a, err)
			}
		})
	}
	callers.Wait()
	if blobs.Load() != 3 {
		t.Errorf("%d blobs were asked for", blobs.Load())
	}
	for _, blob := range []string{"one", "two", "{}"} {
		if a := lazy.want(200, "GET", "/v2/org/app/blobs/"+string(digestOfText(blob)), ""); a.body != blob {
			t.Error(a.body)
		}
	}
	lazy.want(404, "GET", "/v2/org/app/manifests/v2", "")
	lazy.want(404, "GET", "/v2/org/app/manifests/"+string(digestOfText("x")), "")

	// By digest, and as a tag that moves.
	second := origin.pushImage("org/app", "v1", "three")
	lazy.want(200, "HEAD", "/v2/org/app/manifests/"+string(second), "")
	if a := lazy.want(200, "HEAD", "/v2/org/app/manifests/v1", ""); a.header.Get("Docker-Content-Digest") != string(first) {
		t.Error(a.header)
	}
	if a := eager.want(200, "HEAD", "/v2/org/app/manifests/v1", ""); a.header.Get("Docker-Content-Digest") != string(second) {
		t.Error(a.header)
	}
	before := requests.Load()
	lazy.want(200, "GET", "/v2/org/app/manifests/v1", "")
	if requests.Load() != before {
		t.Error("the upstream was asked for a tag again")
	}

	// Without the upstream: what is here is served, and a miss is not taken for an absence.
	upstream.Close()
	eager.want(200, "GET", "/v2/org/app/manifests/v1", "")
	eager.want(200, "GET", "/v2/org/app/manifests/"+string(first), "")
	if a := eager.want(502, "GET", "/v2/org/app/manifests/v3", ""); strings.Contains(a.body, "127.0.0.1") {
		t.Error(a.body)
	}
}

// TestServeMirror: with ?ns= as containerd sends it, one handler is a mirror of several registries.
func TestServeMirror(t *testing.T) {
	t.Parallel()
	origin := serveAt(t, openTemp(t, nil), nil)
	origin.pushImage("org/app", "v1", "one")
	near := openTemp(t, nil)
	s := serveAt(t, near, &ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{}, Name: func(r *http.Request, repository string) (string, error) {
		host := r.URL.Query().Get("ns")
		if host != origin.host {
			return "", fmt.Errorf("no mirror of %q", host)
		}
		return host + "/" + repository, nil
	}})
	a := s.want(200, "GET", "/v2/org/app/manifests/v1?ns="+origin.host, "")
	if !json.Valid([]byte(a.body)) {
		t.Error(a.body)
	}
	s.want(404, "GET", "/v2/org/app/manifests/v1?ns=elsewhere.example", "")
	if _, err := near.Resolve(t.Context(), ocilocal.MustParseReference(origin.host+"/org/app:v1")); err != nil {
		t.Error(err)
	}
}
