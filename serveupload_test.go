package ocilocal_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestServeUploads sends a blob in chunks, by turns to two handles of the root. Wrong ranges,
// repositories and digests are refused, and leave the upload as it was.
func TestServeUploads(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	sites := []*served{serveAt(t, mustOpen(t, root), nil), serveAt(t, mustOpen(t, root), &ocilocal.HandlerOptions{MinChunk: 3})}
	text := "0123456789"
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		d := alg.FromString(text)
		a := sites[1].want(202, "POST", "/v2/org/app/blobs/uploads/", "")
		if a.header.Get("OCI-Chunk-Min-Length") != "3" {
			t.Error(a.header)
		}
		at := a.header.Get("Location")
		a = sites[0].want(202, "PATCH", at, text[:3], "Content-Range", "0-2")
		if got := a.header.Get("Range"); got != "0-2" {
			t.Errorf("Range %q", got)
		}
		sites[1].want(202, "PATCH", at, text[3:5], "Content-Range", "3-4")
		for _, wrong := range []string{"0-2", "4-6", "6-8"} {
			a := sites[0].want(416, "PATCH", at, text[5:8], "Content-Range", wrong)
			if a.code() != "BLOB_UPLOAD_INVALID" || a.header.Get("Range") != "0-4" || a.header.Get("Location") != at {
				t.Error(a)
			}
		}
		for _, wrong := range []string{"5-6", "5-9", "7-5", "5-", "-5", "bytes 5-7", "5-7/10", "0x5-7", "5-99999999999999999999"} {
			sites[0].want(400, "PATCH", at, text[5:8], "Content-Range", wrong)
		}
		sites[0].want(404, "PATCH", strings.Replace(at, "org/app", "org/other", 1), text[5:8])
		a = sites[1].want(204, "GET", at, "")
		if a.header.Get("Range") != "0-4" {
			t.Error(a)
		}
		// A body without a length, as docker sends it.
		if a, err := sites[0].try("PATCH", at, io.MultiReader(strings.NewReader(text[5:8]))); err != nil || a.status != 202 {
			t.Fatal(a, err)
		}
		sites[1].want(400, "PUT", at, text[8:])
		sites[1].want(400, "PUT", at+"?digest=sha256:abc", text[8:])
		a = sites[1].want(201, "PUT", at+"?digest="+string(d), text[8:], "Content-Range", "8-9")
		if a.header.Get("Docker-Content-Digest") != string(d) || a.header.Get("Location") != "/v2/org/app/blobs/"+string(d) {
			t.Error(a)
		}
		for _, s := range sites {
			if a := s.want(200, "GET", "/v2/org/app/blobs/"+string(d), ""); a.body != text {
				t.Errorf("%q", a.body)
			}
			s.want(404, "GET", at, "")
		}
	}
	at := sites[0].want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
	a := sites[0].want(400, "PUT", at+"?digest="+string(digestOfText("x")), "y")
	if a.code() != "DIGEST_INVALID" {
		t.Error(a)
	}
	sites[1].want(404, "GET", at, "")
	at = sites[0].want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
	sites[1].want(204, "DELETE", at, "")
	sites[0].want(404, "PATCH", at, "x")
}

// TestServeUploadHashes: the hash of an upload goes with the upload. If nobody continues as many
// uploads as there are hashes kept, those that come later have theirs all the same.
func TestServeUploadHashes(t *testing.T) {
	t.Parallel()
	h := openTemp(t, nil).Handler(&ocilocal.HandlerOptions{MaxUploads: 2 * ocilocal.MaxUploadHashes})
	ask := func(method, path, body string, want int) http.Header {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		if w.Code != want {
			t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
		}
		return w.Header()
	}
	begun := func() string {
		at := ask("POST", "/v2/org/app/blobs/uploads/", "", 202).Get("Location")
		ask("PATCH", at, "x", 202)
		return at
	}
	kept := func(want int) {
		t.Helper()
		if got := ocilocal.KeptHashes(h); got != want {
			t.Fatalf("%d hashes are kept, want %d", got, want)
		}
	}
	ask("DELETE", begun(), "", 204)
	ask("PUT", begun()+"?digest="+string(digestOfText("xy")), "y", 201)
	ask("PUT", begun()+"?digest="+string(digestOfText("xy")), "z", 400)
	kept(0)
	for range ocilocal.MaxUploadHashes {
		begun()
	}
	kept(ocilocal.MaxUploadHashes)
	at := begun()
	kept(ocilocal.MaxUploadHashes)
	ask("PUT", at+"?digest="+string(digestOfText("xy")), "y", 201)
	kept(ocilocal.MaxUploadHashes - 1)
}

// TestServeUploadEnds: a request that comes while the last one of an upload is under way finds the
// upload gone, and adds nothing to the blob.
func TestServeUploadEnds(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	sites := []*served{serveAt(t, mustOpen(t, root), nil), serveAt(t, mustOpen(t, root), nil)}
	at := sites[0].want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
	d := digestOfText("text")
	body, end := io.Pipe()
	last := make(chan received, 1)
	go func() {
		a, err := sites[0].try("PUT", at+"?digest="+string(d), body)
		if err != nil {
			t.Error(err)
		}
		last <- a
	}()
	if _, err := io.WriteString(end, "te"); err != nil {
		t.Fatal(err)
	}
	// Once these bytes have arrived the upload is locked.
	for sites[1].want(204, "GET", at, "").header.Get("Range") != "0-1" {
	}
	late := make(chan received, 1)
	go func() {
		a, err := sites[1].try("PATCH", at, strings.NewReader("more"))
		if err != nil {
			t.Error(err)
		}
		late <- a
	}()
	if _, err := io.WriteString(end, "xt"); err != nil {
		t.Fatal(err)
	}
	end.Close()
	if a := <-last; a.status != 201 {
		t.Error(a)
	}
	if a := <-late; a.status != 404 {
		t.Error(a)
	}
	if a := sites[1].want(200, "GET", "/v2/org/app/blobs/"+string(d), ""); a.body != "text" {
		t.Errorf("%q", a.body)
	}
}

// TestServeMount mounts a blob from a named repository and from any. Where that is not possible or
// not allowed, the answer begins an upload.
func TestServeMount(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	d := string(s.pushBlob("org/one", "text"))
	uploads := "/v2/org/two/blobs/uploads/?mount=" + d
	if at := s.want(202, "POST", uploads+"&from=org/three", "").header.Get("Location"); !strings.HasPrefix(at, "/v2/org/two/blobs/uploads/") || strings.Contains(at, "?") {
		t.Error(at)
	}
	s.want(202, "POST", uploads+"&from=../..", "")
	s.want(404, "HEAD", "/v2/org/two/blobs/"+d, "")
	s.want(201, "POST", uploads+"&from=org/one", "")
	s.want(201, "POST", "/v2/org/four/blobs/uploads/?mount="+d, "")
	for _, name := range []string{"two", "four"} {
		if a := s.want(200, "GET", "/v2/org/"+name+"/blobs/"+d, ""); a.body != "text" {
			t.Error(a)
		}
	}
	// With Authorize, the digest alone does not give access to a blob.
	guarded := serveAt(t, r, &ocilocal.HandlerOptions{Authorize: func(r *http.Request, repository string, action ocilocal.Action) error {
		if repository == "org/one" {
			return errors.New("secret")
		}
		return nil
	}})
	guarded.want(202, "POST", "/v2/org/five/blobs/uploads/?mount="+d, "")
	guarded.want(202, "POST", "/v2/org/five/blobs/uploads/?mount="+d+"&from=org/one", "")
	guarded.want(201, "POST", "/v2/org/five/blobs/uploads/?mount="+d+"&from=org/two", "")
}

// TestServeLimits: a blob that is too large is a 413, with and without a length, whole and in
// chunks. An upload too many is a 429.
func TestServeLimits(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, &ocilocal.HandlerOptions{MaxBlobSize: 10, MaxUploads: 2})
	uploads := "/v2/org/app/blobs/uploads/"
	text := "0123456789a"
	s.want(201, "POST", uploads+"?digest="+string(digestOfText(text[:10])), text[:10])
	s.want(413, "POST", uploads+"?digest="+string(digestOfText(text)), text)
	if a, err := s.try("POST", uploads+"?digest="+string(digestOfText(text)), io.MultiReader(strings.NewReader(text))); err != nil || a.status != 413 {
		t.Error(a, err)
	}
	at := s.want(202, "POST", uploads, "").header.Get("Location")
	s.want(202, "PATCH", at, text[:9])
	s.want(413, "PATCH", at, text[9:])
	if a, err := s.try("PATCH", at, io.MultiReader(strings.NewReader(text))); err != nil || a.status != 413 {
		t.Error(a, err)
	}
	second := s.want(202, "POST", uploads, "").header.Get("Location")
	if a := s.want(429, "POST", uploads, ""); a.code() != "TOOMANYREQUESTS" || a.header.Get("Retry-After") == "" {
		t.Error(a)
	}
	s.want(204, "DELETE", second, "")
	s.want(202, "POST", uploads, "")
}

// TestServeMaxUploads: a handler does not count the uploads before each one, and still keeps the
// limit. Another handler of the root can add what it has left from its last count, and no more.
func TestServeMaxUploads(t *testing.T) {
	t.Parallel()
	const limit = 2*ocilocal.UncountedPart + 1
	uploads := "/v2/org/app/blobs/uploads/"
	r := openTemp(t, nil)
	opts := &ocilocal.HandlerOptions{MaxUploads: limit}
	other := serveAt(t, mustOpen(t, r.Root()), opts)
	other.want(202, "POST", uploads, "")
	s := serveAt(t, r, opts)
	var begun []string
	for range limit - 1 {
		begun = append(begun, s.want(202, "POST", uploads, "").header.Get("Location"))
	}
	s.want(429, "POST", uploads, "")
	for range limit / ocilocal.UncountedPart {
		other.want(202, "POST", uploads, "")
	}
	other.want(429, "POST", uploads, "")
	for _, at := range begun[:limit/ocilocal.UncountedPart+1] {
		s.want(429, "POST", uploads, "")
		s.want(204, "DELETE", at, "")
	}
	s.want(202, "POST", uploads, "")
	s.want(429, "POST", uploads, "")
}

// TestServeUploadNotHeld: the last request of an upload fails when its bytes are complete. The
// upload stays writable, so that the client can finish it. If a process ends before it has made a
// held blob read-only, the publish does.
func TestServeUploadNotHeld(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	failOnce := func(fails, dir string) {
		failed := false
		ocilocal.SetFault(r, func(op, name string) error {
			if op == fails && strings.HasPrefix(name, "tmp/"+dir) && !failed {
				failed = true
				return syscall.EIO
			}
			return nil
		})
	}
	manifest, config := image("layer")
	at := s.want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
	failOnce("rename", "held")
	s.want(500, "PUT", at+"?digest="+string(digestOfText("layer")), "layer")
	uploads, err := filepath.Glob(filepath.Join(r.Root(), "tmp/upload/*"))
	if err != nil || len(uploads) != 1 {
		t.Fatal(uploads, err)
	}
	if fi, err := os.Stat(uploads[0]); err != nil || fi.Mode()&0o200 == 0 {
		t.Errorf("%v, %v: want a file that is writable", fi.Mode(), err)
	}
	failOnce("chmod", "upload")
	s.want(201, "PUT", at+"?digest="+string(digestOfText("layer")), "")
	ocilocal.SetFault(r, nil)
	s.pushBlob("org/app", config)
	s.want(201, "PUT", "/v2/org/app/manifests/v1", manifest)
	if fi, err := os.Stat(blobFile(r, digestOfText("layer"))); err != nil || fi.Mode()&0o222 != 0 {
		t.Errorf("%v, %v: want a blob that is read-only", fi.Mode(), err)
	}
}
