// A registry for tests of the client: it does as the distribution spec says, and tests override
// single answers.

package ocilocal_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A server is a registry in memory (distribution-spec 1.1). Its fields are set before it is used.
type server struct {
	*httptest.Server
	host string // 127.0.0.1:port

	// override may answer a request itself, and then returns true.
	override func(w http.ResponseWriter, r *http.Request) bool
	// user and password are required, by basic authentication or, with token, by the token server at /token.
	user, password string
	token          bool
	noReferrers    bool
	noMount        bool
	sparse         bool  // takes manifests that name what it does not have
	noArtifacts    bool  // refuses artifact manifests
	minChunk       int64 // OCI-Chunk-Min-Length
	maxPut         int64 // larger bodies are 413
	pageSize       int

	mu        sync.Mutex
	log       []string                     // method and path with query
	headers   []http.Header                // of each of log
	sent      int64                        // bytes of blobs
	blobs     map[string][]byte            // repository@digest
	manifests map[string]map[string]stored // repository → digest or tag
	uploads   map[string]*bytes.Buffer
	began     int // uploads
	tokens    int // handed out
}

type stored struct {
	mediaType string
	body      []byte
	digest    digest.Digest
}

func newServer(t testing.TB) *server {
	t.Helper()
	s := serve()
	t.Cleanup(s.Close)
	return s
}

func serve() *server {
	s := &server{blobs: map[string][]byte{}, manifests: map[string]map[string]stored{}, uploads: map[string]*bytes.Buffer{}, pageSize: 100}
	s.Server = httptest.NewServer(s)
	s.host = strings.TrimPrefix(s.URL, "http://")
	return s
}

// ref returns a reference to something on the server.
func (s *server) ref(rest string) ocilocal.Reference {
	return ocilocal.MustParseReference(s.host + "/" + rest)
}

// requests returns the requests so far that contain a text.
func (s *server) requests(text string) (found []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.log {
		if strings.Contains(l, text) {
			found = append(found, l)
		}
	}
	return found
}

func (s *server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log, s.headers, s.sent = nil, nil, 0
}

// behave ends what override does; the field itself may only be set before the first request.
func (s *server) behave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.override = nil
}

func (s *server) served() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.log = append(s.log, r.Method+" "+r.URL.RequestURI())
	s.headers = append(s.headers, r.Header.Clone())
	override := s.override
	s.mu.Unlock()
	if override != nil && override(w, r) {
		return
	}
	if r.URL.Path == "/token" {
		s.serveToken(w, r)
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		http.NotFound(w, r)
		return
	}
	if !s.authorized(w, r) {
		return
	}
	for _, kind := range []string{"/manifests/", "/blobs/uploads/", "/blobs/", "/referrers/", "/tags/list"} {
		if repo, reference, ok := strings.Cut(rest, kind); ok {
			switch kind {
			case "/manifests/":
				s.manifest(w, r, repo, reference)
			case "/blobs/uploads/":
				s.upload(w, r, repo, reference)
			case "/blobs/":
				s.blob(w, r, repo, reference)
			case "/referrers/":
				s.referrers(w, r, repo, reference)
			case "/tags/list":
				s.tags(w, r, repo)
			}
			return
		}
	}
	http.NotFound(w, r)
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"what the server says"}]}`, code)
}

func (s *server) authorized(w http.ResponseWriter, r *http.Request) bool {
	if s.user == "" {
		return true
	}
	if s.token {
		if got, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer token-for-"); ok {
			rest := strings.TrimPrefix(r.URL.Path, "/v2/")
			if strings.Contains(got, "repository:"+rest[:strings.IndexByte(rest, '/')]) {
				return true
			}
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test registry"`, s.URL))
	} else {
		if user, password, ok := r.BasicAuth(); ok && user == s.user && password == s.password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test registry"`)
	}
	fail(w, 401, "UNAUTHORIZED")
	return false
}

func (s *server) serveToken(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	r.ParseForm()
	if (user != s.user || password != s.password) && r.PostForm.Get("refresh_token") != s.password {
		fail(w, 401, "UNAUTHORIZED")
		return
	}
	s.mu.Lock()
	s.tokens++
	s.mu.Unlock()
	json.NewEncoder(w).Encode(map[string]any{"token": "token-for-" + strings.ReplaceAll(strings.Join(r.Form["scope"], "+"), " ", "+"), "expires_in": 300})
}

func (s *server) manifest(w http.ResponseWriter, r *http.Request, repo, reference string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, ok := s.manifests[repo][reference]
	switch r.Method {
	case http.MethodPut:
		s.putManifest(w, r, repo, reference)
		return
	case http.MethodDelete:
		delete(s.manifests[repo], reference)
		w.WriteHeader(202)
		return
	}
	if !ok {
		fail(w, 404, "MANIFEST_UNKNOWN")
		return
	}
	w.Header().Set("Content-Type", m.mediaType)
	w.Header().Set("Docker-Content-Digest", string(m.digest))
	w.Header().Set("Content-Length", strconv.Itoa(len(m.body)))
	w.Header().Set("ETag", `"`+string(m.digest)+`"`)
	if r.Method == http.MethodGet {
		w.Write(m.body)
	}
}

// putManifest is called with mu held.
func (s *server) putManifest(w http.ResponseWriter, r *http.Request, repo, reference string) {
	body, _ := io.ReadAll(r.Body)
	m, err := ocilocal.ParseManifest(r.Header.Get("Content-Type"), body)
	if err != nil || s.noArtifacts && m.MediaType() == ocilocal.MediaTypeArtifactManifest {
		fail(w, 400, "MANIFEST_INVALID")
		return
	}
	if match := r.Header.Get("If-Match"); match != "" && match != `"`+string(s.manifests[repo][reference].digest)+`"` {
		fail(w, 412, "DENIED")
		return
	}
	var needs []ocispec.Descriptor
	if c, ok := m.Config(); ok {
		needs = append(needs, c)
	}
	for _, d := range append(needs, m.Layers()...) {
		if _, ok := s.blobs[repo+"@"+string(d.Digest)]; !ok && !s.sparse {
			fail(w, 404, "MANIFEST_BLOB_UNKNOWN")
			return
		}
	}
	for _, d := range m.Manifests() {
		_, blob := s.blobs[repo+"@"+string(d.Digest)]
		if _, ok := s.manifests[repo][string(d.Digest)]; !ok && !blob && !s.sparse {
			fail(w, 404, "MANIFEST_BLOB_UNKNOWN")
			return
		}
	}
	if s.manifests[repo] == nil {
		s.manifests[repo] = map[string]stored{}
	}
	sm := stored{m.MediaType(), body, m.Digest()}
	s.manifests[repo][string(m.Digest())] = sm
	s.manifests[repo][reference] = sm
	if subject, ok := m.Subject(); ok && !s.noReferrers {
		w.Header().Set("OCI-Subject", string(subject.Digest))
	}
	w.Header().Set("Docker-Content-Digest", string(m.Digest()))
	w.WriteHeader(201)
}

func (s *server) blob(w http.ResponseWriter, r *http.Request, repo, reference string) {
	s.mu.Lock()
	b, ok := s.blobs[repo+"@"+reference]
	s.mu.Unlock()
	if !ok {
		fail(w, 404, "BLOB_UNKNOWN")
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	status := 200
	if text := r.Header.Get("Range"); text != "" {
		var first, last int
		// As go-containerregistry's registry does it: a range has both ends.
		if _, err := fmt.Sscanf(text, "bytes=%d-%d", &first, &last); err != nil || first > last || last >= len(b) {
			fail(w, 416, "BLOB_UNKNOWN")
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(b)))
		b, status = b[first:last+1], 206
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		n, _ := w.Write(b)
		s.mu.Lock()
		s.sent += int64(n)
		s.mu.Unlock()
	}
}

func (s *server) upload(w http.ResponseWriter, r *http.Request, repo, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Method == http.MethodPost {
		q := r.URL.Query()
		if b, ok := s.blobs[q.Get("from")+"@"+q.Get("mount")]; ok && !s.noMount {
			s.blobs[repo+"@"+q.Get("mount")] = b
			w.WriteHeader(201)
			return
		}
		s.began++
		id = fmt.Sprint("upload", s.began)
		s.uploads[id] = &bytes.Buffer{}
		if s.minChunk > 0 {
			w.Header().Set("OCI-Chunk-Min-Length", fmt.Sprint(s.minChunk))
		}
		s.session(w, repo, id, 202)
		return
	}
	buf := s.uploads[id]
	if buf == nil || r.URL.Query().Get("state") != "of "+id {
		fail(w, 404, "BLOB_UPLOAD_UNKNOWN")
		return
	}
	if s.maxPut > 0 && r.ContentLength > s.maxPut {
		fail(w, 413, "SIZE_INVALID")
		return
	}
	switch r.Method {
	case http.MethodGet:
		s.session(w, repo, id, 204)
	case http.MethodPatch:
		if from, _, _ := strings.Cut(r.Header.Get("Content-Range"), "-"); from != fmt.Sprint(buf.Len()) {
			s.session(w, repo, id, 416)
			return
		}
		io.Copy(buf, r.Body)
		s.session(w, repo, id, 202)
	case http.MethodPut:
		io.Copy(buf, r.Body)
		d := digest.Digest(r.URL.Query().Get("digest"))
		if d.Algorithm().FromBytes(buf.Bytes()) != d {
			fail(w, 400, "DIGEST_INVALID")
			return
		}
		s.blobs[repo+"@"+string(d)] = buf.Bytes()
		delete(s.uploads, id)
		w.WriteHeader(201)
	case http.MethodDelete:
		delete(s.uploads, id)
		w.WriteHeader(204)
	}
}

func (s *server) session(w http.ResponseWriter, repo, id string, status int) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/"+id+"?state="+url.QueryEscape("of "+id))
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(s.uploads[id].Len()-1, 0)))
	w.WriteHeader(status)
}

func (s *server) referrers(w http.ResponseWriter, r *http.Request, repo, subject string) {
	if s.noReferrers {
		http.NotFound(w, r)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	doc := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	doc.SchemaVersion = 2
	for _, key := range slices.Sorted(maps.Keys(s.manifests[repo])) {
		sm := s.manifests[repo][key]
		m, _ := ocilocal.ParseManifest(sm.mediaType, sm.body)
		if got, ok := m.Subject(); ok && string(got.Digest) == subject && key == string(sm.digest) && key > r.URL.Query().Get("last") {
			if n := len(doc.Manifests); n == s.pageSize {
				w.Header().Set("Link", fmt.Sprintf(`<?last=%s>; rel="next"`, doc.Manifests[n-1].Digest))
				break
			}
			d := m.Descriptor()
			d.Annotations = m.Annotations()
			doc.Manifests = append(doc.Manifests, d)
		}
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(doc)
}

func (s *server) tags(w http.ResponseWriter, r *http.Request, repo string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var tags []string
	for _, key := range slices.Sorted(maps.Keys(s.manifests[repo])) {
		if !strings.Contains(key, ":") && key > r.URL.Query().Get("last") {
			tags = append(tags, key)
		}
	}
	if len(tags) > s.pageSize {
		tags = tags[:s.pageSize]
		w.Header().Set("Link", fmt.Sprintf(`</v2/%s/tags/list?last=%s>; rel="next"`, repo, tags[len(tags)-1]))
	}
	json.NewEncoder(w).Encode(map[string]any{"name": repo, "tags": tags})
}

// put stores an artifact with layers on the server, and returns the digest of its manifest.
func (s *server) put(t testing.TB, repo, tag string, layers ...[]byte) digest.Digest {
	t.Helper()
	doc := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: testType, Config: ocispec.DescriptorEmptyJSON}
	doc.SchemaVersion = 2
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[repo+"@"+string(doc.Config.Digest)] = []byte("{}")
	for _, l := range layers {
		d := digest.FromBytes(l)
		s.blobs[repo+"@"+string(d)] = l
		doc.Layers = append(doc.Layers, ocispec.Descriptor{MediaType: "application/x-layer", Digest: d, Size: int64(len(l))})
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return s.putRaw(repo, tag, doc.MediaType, raw)
}

// putRaw is called with mu held.
func (s *server) putRaw(repo, tag, mediaType string, raw []byte) digest.Digest {
	d := digest.FromBytes(raw)
	if s.manifests[repo] == nil {
		s.manifests[repo] = map[string]stored{}
	}
	m := stored{mediaType, raw, d}
	s.manifests[repo][string(d)] = m
	s.manifests[repo][cmp.Or(tag, string(d))] = m
	return d
}
