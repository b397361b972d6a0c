package ocilocal_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A served is a registry that is being served.
type served struct {
	*httptest.Server
	host string
	t    testing.TB
}

// serveAt serves a registry on loopback until the test ends.
func serveAt(t testing.TB, r *ocilocal.LocalRegistry, opts *ocilocal.HandlerOptions) *served {
	t.Helper()
	s := httptest.NewServer(r.Handler(opts))
	t.Cleanup(s.Close)
	return &served{s, strings.TrimPrefix(s.URL, "http://"), t}
}

// An received is a response whose body was read.
type received struct {
	status int
	header http.Header
	body   string
}

// code is the first code of an error body.
func (a received) code() string {
	var doc struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal([]byte(a.body), &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	return doc.Errors[0].Code
}

// do makes a request. Header fields are pairs.
func (s *served) do(method, path, body string, fields ...string) received {
	s.t.Helper()
	a, err := s.try(method, path, strings.NewReader(body), fields...)
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// try is do for a request that may fail.
func (s *served) try(method, path string, body io.Reader, fields ...string) (received, error) {
	if !strings.Contains(path, "://") {
		path = s.URL + path
	}
	req, err := http.NewRequestWithContext(s.t.Context(), method, path, body)
	if err != nil {
		return received{}, err
	}
	for i := 0; i < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	res, err := s.Client().Do(req)
	if err != nil {
		return received{}, err
	}
	got, err := io.ReadAll(res.Body)
	res.Body.Close()
	return received{res.StatusCode, res.Header, string(got)}, err
}

// want makes a request and checks its status.
func (s *served) want(status int, method, path, body string, fields ...string) received {
	s.t.Helper()
	a := s.do(method, path, body, fields...)
	if a.status != status {
		s.t.Fatalf("%s %s: %d %s, want %d", method, path, a.status, a.body, status)
	}
	return a
}

func digestOfText(text string) digest.Digest { return digest.FromString(text) }

// pushBlob puts a blob in one request and returns its digest.
func (s *served) pushBlob(repository, text string) digest.Digest {
	s.t.Helper()
	d := digestOfText(text)
	s.want(201, "POST", "/v2/"+repository+"/blobs/uploads/?digest="+string(d), text)
	return d
}

// imageOf is an image manifest with the config {} and layers of these texts.
func imageOf(texts ...string) string {
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.DescriptorEmptyJSON, ArtifactType: "application/vnd.example.test"}
	m.SchemaVersion = 2
	m.Config.Data = nil
	for _, text := range texts {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: "text/plain", Digest: digestOfText(text), Size: int64(len(text))})
	}
	raw, _ := json.Marshal(m)
	return string(raw)
}

// pushImage puts an image with its blobs and returns its digest.
func (s *served) pushImage(repository, reference string, texts ...string) digest.Digest {
	s.t.Helper()
	for _, text := range append(texts, "{}") {
		s.pushBlob(repository, text)
	}
	raw := imageOf(texts...)
	if reference == "" {
		reference = string(digestOfText(raw))
	}
	s.want(201, "PUT", "/v2/"+repository+"/manifests/"+reference, raw, "Content-Type", ocispec.MediaTypeImageManifest)
	return digestOfText(raw)
}

// spoil writes other bytes into the file of a blob, which may have several names.
func spoil(t *testing.T, r *ocilocal.LocalRegistry, d digest.Digest, text string) {
	t.Helper()
	file := blobFile(r, d)
	if err := errors.Join(os.Chmod(file, 0o600), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// TestServeRemote pushes and pulls by this package's own client.
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

// TestServeBlob reads a blob whole, in parts, and not at all.
func TestServeBlob(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	text := strings.Repeat("0123456789", 50_000)
	d := s.pushBlob("org/app", text)
	path := "/v2/org/app/blobs/" + string(d)
	tag := `"` + string(d) + `"`
	for _, test := range []struct {
		name, method string
		fields       []string
		status       int
		body, part   string
	}{
		{"whole", "GET", nil, 200, text, ""},
		{"head", "HEAD", nil, 200, "", ""},
		{"known", "GET", []string{"If-None-Match", `"x", W/` + tag}, 304, "", ""},
		{"unknown", "GET", []string{"If-None-Match", `"x"`}, 200, text, ""},
		{"first", "GET", []string{"Range", "bytes=0-9"}, 206, text[:10], "bytes 0-9/500000"},
		{"last", "GET", []string{"Range", "bytes=-3"}, 206, "789", "bytes 499997-499999/500000"},
		{"rest", "GET", []string{"Range", "bytes=499995-"}, 206, "56789", "bytes 499995-499999/500000"},
		{"beyond", "GET", []string{"Range", "bytes=499999-99999999999999999999"}, 206, "9", "bytes 499999-499999/500000"},
		{"same", "GET", []string{"Range", "bytes=1-1", "If-Range", tag}, 206, "1", "bytes 1-1/500000"},
		{"changed", "GET", []string{"Range", "bytes=1-1", "If-Range", `"x"`}, 200, text, ""},
		{"several", "GET", []string{"Range", "bytes=0-1,3-4"}, 200, text, ""},
		{"unit", "GET", []string{"Range", "items=0-1"}, 200, text, ""},
		{"nonsense", "GET", []string{"Range", "bytes=a-b"}, 200, text, ""},
		{"outside", "GET", []string{"Range", "bytes=500000-"}, 416, "", "bytes */500000"},
		{"none", "GET", []string{"Range", "bytes=-0"}, 416, "", "bytes */500000"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := s.want(test.status, test.method, path, "", test.fields...)
			if a.status != 416 && a.body != test.body {
				t.Errorf("got %d bytes, want %d", len(a.body), len(test.body))
			}
			if got := a.header.Get("Content-Range"); got != test.part {
				t.Errorf("Content-Range %q, want %q", got, test.part)
			}
			if a.status < 400 && a.header.Get("ETag") != tag {
				t.Errorf("ETag %q", a.header.Get("ETag"))
			}
			if test.method == "HEAD" && a.header.Get("Content-Length") != "500000" {
				t.Errorf("Content-Length %q", a.header.Get("Content-Length"))
			}
		})
	}
	if a := s.want(404, "GET", "/v2/org/other/blobs/"+string(d), ""); a.code() != "BLOB_UNKNOWN" {
		t.Error(a.body)
	}
}

// TestServeDamaged: nobody gets all bytes of a damaged blob, nor a part of one.
func TestServeDamaged(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := mustOpen(t, root)
	s := serveAt(t, r, nil)
	text := strings.Repeat("x", 2<<20)
	m := s.pushImage("org/app", "v1", "small", text)
	for _, bad := range []string{text[:len(text)-1] + "y", text[1:], text + "x"} {
		spoil(t, r, digestOfText(text), bad)
		again := mustOpen(t, root) // this handle has verified nothing
		s := serveAt(t, again, nil)
		path := "/v2/org/app/blobs/" + string(digestOfText(text))
		a, err := s.try("GET", path, nil)
		if err == nil && a.status == 200 || len(a.body) >= len(bad) {
			t.Errorf("got %d bytes of the damaged blob, %v", len(a.body), err)
		}
		if a := s.want(500, "GET", path, "", "Range", "bytes=0-9"); a.code() != "UNKNOWN" {
			t.Error(a.body)
		}
	}
	spoil(t, r, digestOfText("small"), "SMALL")
	again := serveAt(t, mustOpen(t, root), nil)
	again.want(500, "GET", "/v2/org/app/blobs/"+string(digestOfText("small")), "")
	spoil(t, r, m, strings.Replace(imageOf("small", text), "plain", "PLAIN", 1))
	again.want(500, "GET", "/v2/org/app/manifests/v1", "")
}

// TestServeUploads sends a blob in parts, to two handles of the root in turns.
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

// TestServeMount mounts from another repository, from any, and from none.
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
	// Who has restricted access does not give blobs away for their digests.
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

// TestServeManifests puts, reads and deletes manifests and tags.
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
	for name, test := range map[string]struct {
		reference, body, mediaType string
		status                     int
		code                       string
	}{
		"digest":    {string(digestOfText("x")), raw, "", 400, "DIGEST_INVALID"},
		"malformed": {"v1", "{", "", 400, "MANIFEST_INVALID"},
		"type":      {"v1", raw, ocispec.MediaTypeImageIndex, 400, "MANIFEST_INVALID"},
		"unknown":   {"v1", raw, "text/plain", 400, "MANIFEST_INVALID"},
		"header":    {"v1", raw, "a b c", 400, "MANIFEST_INVALID"},
		"size":      {"v1", raw + strings.Repeat(" ", ocilocal.MaxManifestSize), "", 413, "SIZE_INVALID"},
		"tag":       {"-v1", raw, "", 404, "MANIFEST_UNKNOWN"},
		"algorithm": {"md5:00", raw, "", 400, "DIGEST_INVALID"},
	} {
		if a := s.want(test.status, "PUT", "/v2/org/app/manifests/"+test.reference, test.body, "Content-Type", test.mediaType); a.code() != test.code {
			t.Errorf("%s: %s", name, a.body)
		}
	}
	// A tag moves. What it pointed at stays.
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

// TestServeLists pages through tags, repositories and referrers.
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
	// all follows the links and returns what the pages list.
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

// TestServeAccess: the hook sees what is asked for, and nothing happens before it agrees.
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
}

// TestServeNames maps repositories to local names.
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

	// Below a prefix, links have it.
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

// TestServeLimits bounds blobs and uploads.
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

	// Uploads that are old make place, here and in a collection.
	s = serveAt(t, r, &ocilocal.HandlerOptions{MaxUploads: 2, UploadAge: 1})
	at = s.want(202, "POST", uploads, "").header.Get("Location")
	collect(t, r, atOnce)
	s.want(204, "GET", at, "")
	if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Held: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	s.want(404, "GET", at, "")
}

// TestServeRoutes: no path is a panic, and none outside the API does anything.
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
