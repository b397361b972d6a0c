// What tests of the handler share: a registry that is being served, requests of it, and images to push.

package ocilocal_test

import (
	"encoding/json"
	"errors"
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

// A received is a response whose body was read.
type received struct {
	status int
	header http.Header
	body   string
}

// code returns the first error code of the body, or "" if it has none.
func (a received) code() string {
	var doc struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal([]byte(a.body), &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	return doc.Errors[0].Code
}

// do makes a request, with header fields in pairs of name and value. A failed connection ends the
// test.
func (s *served) do(method, path, body string, fields ...string) received {
	s.t.Helper()
	a, err := s.try(method, path, strings.NewReader(body), fields...)
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// try is do for a request that may fail. path may also be a whole URL.
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

// imageOf returns an image manifest with the config {} and layers of these texts.
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

// spoil writes other bytes into the file of a blob. It writes in place, so every link to the file
// has the new bytes.
func spoil(t *testing.T, r *ocilocal.LocalRegistry, d digest.Digest, text string) {
	t.Helper()
	file := blobFile(r, d)
	if err := errors.Join(os.Chmod(file, 0o600), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}
