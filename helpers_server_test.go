// A registry for tests of the client: LocalRegistry.Handler on a registry of the test, behind a
// layer for what an honest registry does not do.

package ocilocal_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A server is a registry that tests can spoil. It keeps a log of the requests, may answer some of
// them wrongly, and passes the others to LocalRegistry.Handler. The registry behind it is opened
// when something is stored or asked for: many tests answer all requests themselves.
//
// The fields before mu are set before the first request.
type server struct {
	*httptest.Server
	t    testing.TB
	host string // 127.0.0.1:port

	// origin is the server whose registry this one serves. Nil means a separate registry. Tests
	// that spoil the same content in many ways share a registry, because each costs some time.
	origin *server

	// user and password are required, by basic authentication or, with token, by the token server at /token.
	user, password string
	token          bool
	noReferrers    bool
	noMount        bool
	sparse         bool  // takes manifests that name what it does not have
	noArtifacts    bool  // refuses artifact manifests
	minChunk       int64 // OCI-Chunk-Min-Length
	maxPut         int64 // larger bodies are 413
	pageSize       int   // of lists; 0 is the handler's choice

	mu sync.Mutex
	// override may answer a request itself, and then returns true: see overrideBy.
	override func(w http.ResponseWriter, r *http.Request) bool
	log      []string      // method and path with query
	headers  []http.Header // of each of log
	sent     int64         // bytes of blobs
	tokens   int           // handed out
	planted  map[string]stored

	conditional sync.Mutex // is held from the check of If-Match until the manifest is stored
	open        sync.Once
	registry    *ocilocal.LocalRegistry // see local
	honest      http.Handler            // see handler
	serves      sync.Once
}

// A stored is a manifest or a blob on a server.
type stored struct {
	mediaType string
	body      []byte
	digest    digest.Digest
}

func newServer(t testing.TB) *server {
	t.Helper()
	s := unservedServer(t)
	s.Server = httptest.NewServer(s)
	s.host = strings.TrimPrefix(s.URL, "http://")
	t.Cleanup(s.Close)
	return s
}

// unservedServer returns a server that listens nowhere yet.
func unservedServer(t testing.TB) *server {
	s := &server{t: t}
	t.Cleanup(func() {
		if s.registry == nil {
			return
		}
		if err := s.registry.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// local returns the registry behind the server. Repository org/app of the server is localhost/org/app
// there.
func (s *server) local() *ocilocal.LocalRegistry {
	if s.origin != nil {
		return s.origin.local()
	}
	s.open.Do(func() {
		r, err := ocilocal.Open(context.Background(), s.t.TempDir(), nil)
		if err != nil {
			panic(err)
		}
		s.registry = r
	})
	return s.registry
}

func (s *server) repository(name string) *ocilocal.Repository {
	p, err := s.local().Repository("localhost/" + name)
	if err != nil {
		panic(err)
	}
	return p
}

func (s *server) handler() http.Handler {
	s.serves.Do(func() {
		s.honest = s.local().Handler(&ocilocal.HandlerOptions{MinChunk: s.minChunk, Authorize: s.authorize})
	})
	return s.honest
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

// overrideBy sets override. Requests may be under way: one that its client has given up can reach
// the server late.
func (s *server) overrideBy(answer func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.override = answer
}

// behave ends what override does.
func (s *server) behave() { s.overrideBy(nil) }

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
	if override == nil || !override(w, r) {
		s.plain(w, r)
	}
}

// overrideNow returns override.
func (s *server) overrideNow() func(w http.ResponseWriter, r *http.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.override
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"what the server says"}]}`, code)
}

// plain answers without override.
func (s *server) plain(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		s.serveToken(w, r)
		return
	}
	if s.authorize(r, "", 0) == nil {
		if s.deviates(w, r) {
			return
		}
		r = s.changed(r)
	}
	if r.Header.Get("If-Match") != "" {
		s.conditional.Lock()
		defer s.conditional.Unlock()
		if repo, tag, _ := strings.Cut(r.URL.Path, "/manifests/"); !s.matches(r, strings.TrimPrefix(repo, "/v2/"), tag) {
			fail(w, 412, "DENIED")
			return
		}
	}
	s.handler().ServeHTTP(&serverWriter{w, s, r}, r)
}

// matches says whether the condition of a PUT holds. The specification has no conditions, and the
// handler ignores them. Some registries do not.
func (s *server) matches(r *http.Request, repo, tag string) bool {
	return r.Header.Get("If-Match") == `"`+string(s.at(repo, tag).digest)+`"`
}

// deviates answers where the server is to do something else than the handler would.
func (s *server) deviates(w http.ResponseWriter, r *http.Request) bool {
	manifest, upload := strings.Contains(r.URL.Path, "/manifests/"), strings.Contains(r.URL.Path, "/blobs/uploads/")
	text := r.Header.Get("Range")
	switch {
	case s.noReferrers && strings.Contains(r.URL.Path, "/referrers/"):
		http.NotFound(w, r)
	case upload && path.Base(r.URL.Path) != "uploads" && r.URL.Query().Get("state") != "of upload":
		fail(w, 404, "BLOB_UPLOAD_UNKNOWN") // the query of the Location belongs to the address
	case upload && s.maxPut > 0 && r.ContentLength > s.maxPut:
		fail(w, 413, "SIZE_INVALID")
	case text != "" && (strings.HasSuffix(text, "-") || !strings.Contains(text, "-")):
		fail(w, 416, "BLOB_UNKNOWN") // as with go-containerregistry's registry, a range has both ends
	case manifest && r.Method == "PUT" && s.noArtifacts && r.Header.Get("Content-Type") == ocilocal.MediaTypeArtifactManifest:
		fail(w, 400, "MANIFEST_INVALID")
	case manifest && r.Method == "PUT" && s.sparse:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			s.t.Error(err)
		}
		repo, reference, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/")
		d := s.plant(repo, reference, r.Header.Get("Content-Type"), body)
		w.Header().Set("Docker-Content-Digest", string(d))
		w.WriteHeader(201)
	case manifest && r.Method == "DELETE":
		return s.deletes(w, r)
	case r.Method == "GET" || r.Method == "HEAD":
		return s.servePlanted(w, r)
	default:
		return false
	}
	return true
}

// deletes deletes a manifest that was planted. Without the referrers API, it deletes any manifest: the
// handler would keep one that a list of referrers names, and other registries do not look into lists.
func (s *server) deletes(w http.ResponseWriter, r *http.Request) bool {
	repo, reference, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/")
	s.mu.Lock()
	_, planted := s.planted[r.URL.Path]
	s.mu.Unlock()
	if !planted && !s.noReferrers || s.at(repo, reference).digest == "" {
		return false
	}
	s.plantAt(r.URL.Path, stored{})
	w.WriteHeader(202)
	return true
}

// changed returns the request that the handler gets.
func (s *server) changed(r *http.Request) *http.Request {
	q := r.URL.Query()
	switch {
	case r.Method == "POST":
		if s.noMount {
			q.Del("mount")
			q.Del("from")
		}
		q.Set("state", "of upload") // the handler keeps it in the Location
	case s.pageSize > 0 && (path.Base(r.URL.Path) == "list" || strings.Contains(r.URL.Path, "/referrers/")):
		q.Set("n", strconv.Itoa(s.pageSize))
	default:
		return r
	}
	changed, u := *r, *r.URL
	u.RawQuery = q.Encode()
	changed.URL = &u
	return &changed
}

// serverWriter is the answer of the handler.
type serverWriter struct {
	http.ResponseWriter
	s *server
	r *http.Request
}

func (w *serverWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *serverWriter) WriteHeader(code int) {
	if w.s.noReferrers {
		w.Header().Del("OCI-Subject")
	}
	if w.r.Method == "PUT" && code == 201 { // it has the manifest now, whatever was planted
		w.s.mu.Lock()
		delete(w.s.planted, w.r.URL.Path)
		delete(w.s.planted, path.Dir(w.r.URL.Path)+"/"+w.Header().Get("Docker-Content-Digest"))
		w.s.mu.Unlock()
	}
	w.ResponseWriter.WriteHeader(code)
}

// Write counts bytes before it sends them: a client that has them all may ask for the count at once.
func (w *serverWriter) Write(p []byte) (int, error) {
	w.count(len(p))
	n, err := w.ResponseWriter.Write(p)
	w.count(n - len(p))
	return n, err
}

func (w *serverWriter) count(n int) {
	if !strings.Contains(w.r.URL.Path, "/blobs/sha") {
		return
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.sent += int64(n)
}

// authorize is [ocilocal.HandlerOptions.Authorize].
func (s *server) authorize(r *http.Request, _ string, _ ocilocal.Action) error {
	if s.user == "" {
		return nil
	}
	if s.token {
		if got, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer token-for-"); ok {
			first, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
			if strings.Contains(got, "repository:"+first) {
				return nil
			}
		}
		return &ocilocal.ChallengeError{Challenge: fmt.Sprintf(`Bearer realm="%s/token",service="test registry"`, s.URL)}
	}
	if user, password, ok := r.BasicAuth(); ok && user == s.user && password == s.password {
		return nil
	}
	return &ocilocal.ChallengeError{Challenge: `Basic realm="test registry"`}
}

// authorized is for overrides. It answers a request that has no right with a challenge.
func (s *server) authorized(w http.ResponseWriter, r *http.Request) bool {
	err := s.authorize(r, "", 0)
	if challenge, ok := errors.AsType[*ocilocal.ChallengeError](err); ok {
		w.Header().Set("WWW-Authenticate", challenge.Challenge)
		fail(w, 401, "UNAUTHORIZED")
	}
	return err == nil
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

// plant makes the server have a manifest that no honest registry takes. With a nil body, the server
// has lost it.
func (s *server) plant(repo, reference, mediaType string, body []byte) digest.Digest {
	d := digest.FromBytes(body)
	if body == nil {
		d = ""
	}
	for _, r := range []string{reference, string(d)} {
		if r != "" {
			s.plantAt("/v2/"+repo+"/manifests/"+r, stored{mediaType, body, d})
		}
	}
	return d
}

// plantBlob makes the server have other bytes under a digest. With nil, it has lost the blob.
func (s *server) plantBlob(repo string, d digest.Digest, body []byte) {
	content := stored{"application/octet-stream", body, d}
	if body == nil {
		content.digest = ""
	}
	s.plantAt("/v2/"+repo+"/blobs/"+string(d), content)
}

func (s *server) plantAt(path string, content stored) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.planted == nil {
		s.planted = map[string]stored{}
	}
	s.planted[path] = content
}

// servePlanted answers a request for what was planted.
func (s *server) servePlanted(w http.ResponseWriter, r *http.Request) bool {
	s.mu.Lock()
	content, ok := s.planted[r.URL.Path]
	s.mu.Unlock()
	switch {
	case !ok:
		return false
	case content.digest == "" && strings.Contains(r.URL.Path, "/blobs/"):
		fail(w, 404, "BLOB_UNKNOWN")
	case content.digest == "":
		fail(w, 404, "MANIFEST_UNKNOWN")
	default:
		w.Header().Set("Content-Type", content.mediaType)
		w.Header().Set("Docker-Content-Digest", string(content.digest))
		w.Header().Set("ETag", `"`+string(content.digest)+`"`)
		http.ServeContent(&serverWriter{w, s, r}, r, "", time.Time{}, bytes.NewReader(content.body))
	}
	return true
}

// at returns the manifest that the server has under a tag or a digest, or nothing.
func (s *server) at(repo, reference string) stored {
	s.mu.Lock()
	content, ok := s.planted["/v2/"+repo+"/manifests/"+reference]
	s.mu.Unlock()
	if ok {
		return content
	}
	p := s.repository(repo)
	desc, err := p.Resolve(context.Background(), reference)
	if errors.Is(err, ocilocal.ErrNotFound) {
		return stored{}
	}
	var body []byte
	if err == nil {
		body, err = s.read(p, desc)
	}
	if err != nil {
		s.t.Error(err)
	}
	return stored{desc.MediaType, body, desc.Digest}
}

func (s *server) read(p *ocilocal.Repository, desc ocispec.Descriptor) ([]byte, error) {
	src, err := p.Fetch(context.Background(), desc)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	return io.ReadAll(src)
}

// blobSize returns the size of a blob in the server's registry, −1 if it is not there.
func (s *server) blobSize(repo string, d digest.Digest) int64 {
	desc, err := s.repository(repo).StatBlob(context.Background(), d)
	if err != nil {
		return -1
	}
	return desc.Size
}

// put stores an artifact with layers on the server, and returns the digest of its manifest.
func (s *server) put(t testing.TB, repo, tag string, layers ...[]byte) digest.Digest {
	t.Helper()
	doc := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: testType, Config: ocispec.DescriptorEmptyJSON}
	doc.SchemaVersion = 2
	s.putBlob(repo, []byte("{}"))
	for _, l := range layers {
		doc.Layers = append(doc.Layers, ocispec.Descriptor{MediaType: "application/x-layer", Digest: s.putBlob(repo, l), Size: int64(len(l))})
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return s.putRaw(repo, tag, doc.MediaType, raw)
}

func (s *server) putBlob(repo string, b []byte) digest.Digest {
	s.t.Helper()
	d, err := s.repository(repo).PutBlob(context.Background(), bytes.NewReader(b), digest.FromBytes(b), int64(len(b)))
	if err != nil {
		s.t.Error(err)
	}
	return d.Digest
}

// putRaw stores a manifest of which the server has all content.
func (s *server) putRaw(repo, tag, mediaType string, raw []byte) digest.Digest {
	s.t.Helper()
	opts := &ocilocal.PutManifestOptions{Tag: tag}
	if tag != "" {
		opts.Policy = ocilocal.Replace
	}
	u, err := s.repository(repo).PutManifest(context.Background(), mediaType, raw, opts)
	if err != nil {
		s.t.Error(err)
	}
	return u.Descriptor.Digest
}
