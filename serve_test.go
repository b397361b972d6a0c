package ocilocal_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestServeRemote pushes to the handler and pulls from it with this package's own client.
func TestServeRemote(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	here := openTemp(t, nil)
	ref := ocilocal.MustParseReference(s.host + "/org/app:v1")
	built, err := build(t, here, ref.String(), nil, "one", "two", strings.Repeat("three", 100_000))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := here.Push(t.Context(), ref, nil); err != nil {
		t.Fatal(err)
	}
	local, err := r.Resolve(t.Context(), ocilocal.MustParseReference("localhost/org/app:v1"))
	if err != nil || local.Digest != built.Digest() {
		t.Fatalf("%v, %v", local, err)
	}
	collect(t, r, atOnce)
	there := openTemp(t, nil)
	pulled, err := there.Pull(t.Context(), ref, nil)
	if err != nil || pulled.Artifact.Digest() != built.Digest() {
		t.Fatalf("%v, %v", pulled, err)
	}
}

// TestServeAccess: Authorize gets repository and action of each request, and nothing happens before
// it agrees. The text of its error is not sent. ReadOnly refuses pushes and deletions.
func TestServeAccess(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	open := serveAt(t, r, nil)
	d := string(open.pushImage("org/app", "v1", "layer"))
	var asked string
	var verdict error
	s := serveAt(t, r, &ocilocal.HandlerOptions{Authorize: func(_ *http.Request, repository string, action ocilocal.Action) error {
		asked = action.String() + " " + repository
		return verdict
	}})
	for _, test := range []struct{ method, path, asked string }{
		{"GET", "/v2/", "ping "},
		{"GET", "/v2/_catalog", "catalog "},
		{"GET", "/v2/org/app/tags/list", "pull org/app"},
		{"GET", "/v2/org/app/manifests/v1", "pull org/app"},
		{"HEAD", "/v2/org/app/blobs/" + d, "pull org/app"},
		{"GET", "/v2/org/app/referrers/" + d, "pull org/app"},
		{"PUT", "/v2/org/app/manifests/v2", "push org/app"},
		{"POST", "/v2/org/app/blobs/uploads/", "push org/app"},
		{"GET", "/v2/org/app/blobs/uploads/x", "push org/app"},
		{"DELETE", "/v2/org/app/manifests/v1", "delete org/app"},
		{"DELETE", "/v2/org/app/blobs/" + d, "delete org/app"},
	} {
		asked, verdict = "", &ocilocal.ChallengeError{Challenge: `Basic realm="x"`}
		a := s.want(401, test.method, test.path, "")
		if asked != test.asked || a.header.Get("WWW-Authenticate") != `Basic realm="x"` || test.method != "HEAD" && a.code() != "UNAUTHORIZED" {
			t.Errorf("%s %s: asked for %q, answered %v", test.method, test.path, asked, a)
		}
		verdict = errors.New("the password is tiger")
		if a := s.want(403, test.method, test.path, ""); strings.Contains(a.body, "tiger") || test.method != "HEAD" && a.code() != "DENIED" {
			t.Errorf("%s %s: %v", test.method, test.path, a)
		}
	}
	open.want(200, "GET", "/v2/org/app/manifests/v1", "")

	readOnly := serveAt(t, r, &ocilocal.HandlerOptions{ReadOnly: true})
	readOnly.want(200, "GET", "/v2/org/app/manifests/v1", "")
	for _, request := range []string{"PUT manifests/v1", "DELETE manifests/v1", "POST blobs/uploads/", "DELETE blobs/" + d} {
		method, path, _ := strings.Cut(request, " ")
		if a := readOnly.want(405, method, "/v2/org/app/"+path, "{}"); a.code() != "UNSUPPORTED" {
			t.Error(a)
		}
	}
	// A 405 lists the methods that would do.
	for path, want := range map[string][2]string{
		"manifests/v1":   {"GET, HEAD", "DELETE, GET, HEAD, PUT"},
		"blobs/" + d:     {"GET, HEAD", "DELETE, GET, HEAD"},
		"blobs/uploads/": {"", "POST"},
		"tags/list":      {"GET, HEAD", "GET, HEAD"},
	} {
		for i, s := range []*served{readOnly, open} {
			if got := s.want(405, "PATCH", "/v2/org/app/"+path, "").header["Allow"]; len(got) != 1 || got[0] != want[i] {
				t.Errorf("%s: Allow: %q, want %q", path, got, want[i])
			}
		}
	}
	if got := readOnly.want(405, "PUT", "/v2/org/app/manifests/v1", "{}").header.Get("Allow"); got != "GET, HEAD" {
		t.Error(got)
	}
}

// TestServeNames maps repositories to local names, by Host and by Name. Links in answers keep ?ns=
// and the prefix at which the handler is mounted.
func TestServeNames(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	if _, err := build(t, r, "docker.io/library/alpine:3", nil, "layer"); err != nil {
		t.Fatal(err)
	}
	host := serveAt(t, r, &ocilocal.HandlerOptions{Host: "docker.io"})
	host.want(200, "GET", "/v2/library/alpine/manifests/3", "")
	if a := host.want(200, "GET", "/v2/_catalog", ""); !strings.Contains(a.body, `["library/alpine"]`) {
		t.Error(a.body)
	}
	// Another spelling of the host is the same host.
	for _, spelled := range []string{"index.docker.io", "DOCKER.io"} {
		host := serveAt(t, r, &ocilocal.HandlerOptions{Host: spelled})
		host.want(200, "GET", "/v2/library/alpine/manifests/3", "")
		for last, want := range map[string]string{"": `["library/alpine"]`, "alpine": `["library/alpine"]`, "library/alpine": `[]`} {
			if a := host.want(200, "GET", "/v2/_catalog?last="+last, ""); !strings.Contains(a.body, want) {
				t.Errorf("%s after %q: %s", spelled, last, a.body)
			}
		}
	}
	ns := serveAt(t, r, &ocilocal.HandlerOptions{Name: func(r *http.Request, repository string) (string, error) {
		switch host := r.URL.Query().Get("ns"); host {
		case "":
			return "", errors.New("no ns")
		default:
			return host + "/" + repository, nil
		}
	}})
	ns.want(200, "GET", "/v2/library/alpine/manifests/3?ns=docker.io", "")
	ns.want(404, "GET", "/v2/library/alpine/manifests/3?ns=ghcr.io", "")
	ns.want(400, "GET", "/v2/library/alpine/manifests/3?ns=a/../b", "")
	ns.want(404, "GET", "/v2/library/alpine/manifests/3", "")
	ns.want(404, "GET", "/v2/_catalog", "")
	at := ns.want(202, "POST", "/v2/org/app/blobs/uploads/?ns=ghcr.io", "").header.Get("Location")
	if a := ns.want(201, "PUT", at+"&digest="+string(digestOfText("x")), "x"); !strings.HasSuffix(a.header.Get("Location"), "?ns=ghcr.io") {
		t.Error(a.header)
	}

	// A handler that is mounted at a prefix has it in its links.
	mux := http.NewServeMux()
	mux.Handle("/registry/", http.StripPrefix("/registry", r.Handler(nil)))
	below := httptest.NewServer(mux)
	t.Cleanup(below.Close)
	s := &served{below, "", t}
	at = s.want(202, "POST", "/registry/v2/org/app/blobs/uploads/", "").header.Get("Location")
	if !strings.HasPrefix(at, "/registry/v2/") {
		t.Error(at)
	}
	s.want(201, "PUT", at+"?digest="+string(digestOfText("x")), "x")
}

// TestServeErrorsHideNames: clients do not know local names, which may say who else uses the server. So no
// error has them.
func TestServeErrorsHideNames(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, &ocilocal.HandlerOptions{Name: func(_ *http.Request, repository string) (string, error) {
		return "tenant.internal/" + repository, nil
	}})
	image := imageOf("layer")
	s.pushImage("org/app", "v1", "layer")
	index := imageIndexOf(desc(imageType, image))
	s.want(201, "PUT", appManifests+"v2", index, "Content-Type", indexType)
	wrongSize := strings.Replace(image, `"size":5`, `"size":6`, 1)
	tooDeep := index
	for range 2 * ocilocal.MaxIndexNesting {
		deeper := imageIndexOf(desc(indexType, tooDeep))
		if s.do("PUT", appManifests+"deep", deeper, "Content-Type", indexType).status != 201 {
			tooDeep = deeper
			break
		}
		tooDeep = deeper
	}
	for _, request := range []struct {
		method, path, body string
		status             int
	}{
		{"PUT", appManifests + "v3", imageOf("other"), 400},
		{"PUT", appManifests + "v3", wrongSize, 400},
		{"PUT", appManifests + "v3", imageIndexOf(desc(imageType, imageOf("other"))), 400},
		{"PUT", appManifests + "v3", tooDeep, 413},
		{"PUT", manifestAt("x"), image, 400},
		{"POST", "/v2/org/app/blobs/uploads/?digest=" + string(digestOfText("x")), "y", 400},
		{"DELETE", blobAt("layer"), "", 409},
		{"DELETE", manifestAt(image), "", 409},
		{"DELETE", appManifests + "v9", "", 404},
		{"GET", appManifests + "v9", "", 404},
		{"GET", blobAt("x"), "", 404},
		{"GET", "/v2/org/none/tags/list", "", 404},
	} {
		a := s.want(request.status, request.method, request.path, request.body)
		if strings.Contains(a.body, "tenant") || strings.Contains(a.body, r.Root()) {
			t.Errorf("%s %s: %s", request.method, request.path, a.body)
		}
	}
}

// TestServeHTTP2 pushes and pulls over HTTP/2, where the server can neither use sendfile nor close
// one connection for each answer. A damaged blob breaks off there as well.
func TestServeHTTP2(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	at := func() *served {
		server := httptest.NewUnstartedServer(mustOpen(t, root).Handler(nil))
		server.EnableHTTP2 = true
		server.StartTLS()
		t.Cleanup(server.Close)
		return &served{server, strings.TrimPrefix(server.URL, "https://"), t}
	}
	s := at()
	text := string(noise(7, 3<<20))
	m := s.pushImage("org/app", "v1", text)
	path := "/v2/org/app/blobs/" + string(digestOfText(text))
	for range 2 { // verified while it is sent, and sent as it is
		if a := s.want(200, "GET", path, ""); a.body != text {
			t.Errorf("%d bytes", len(a.body))
		}
	}
	if a := s.want(206, "GET", path, "", "Range", "bytes=1-2000000"); a.body != text[1:2000001] {
		t.Errorf("range: %d bytes", len(a.body))
	}
	if a := s.want(200, "GET", "/v2/org/app/manifests/v1", ""); a.header.Get("Docker-Content-Digest") != string(m) {
		t.Error(a.header)
	}
	if res, err := s.Client().Get(s.URL + "/v2/"); err != nil || res.ProtoMajor != 2 || res.Body.Close() != nil {
		t.Errorf("%v, %v", res, err)
	}
	r := mustOpen(t, root)
	spoil(t, r, digestOfText(text), text[:len(text)-1]+"~")
	fresh := at() // has verified nothing
	if a, err := fresh.try("GET", path, nil); err == nil || len(a.body) >= len(text) {
		t.Errorf("%d bytes of a damaged blob, %v", len(a.body), err)
	}
	fresh.want(200, "GET", "/v2/org/app/manifests/v1", "")
}
