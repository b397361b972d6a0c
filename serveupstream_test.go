package ocilocal_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A servedMirror is a registry that is served as a mirror of an origin.
type servedMirror struct {
	*served // the mirror
	r       *ocilocal.LocalRegistry
	opts    *ocilocal.HandlerOptions // of the mirror
	origin  *served

	mu   sync.Mutex
	log  []string // the requests that the origin has had
	hook func(w http.ResponseWriter, r *http.Request) (done bool)
}

// newMirror serves an empty mirror of an empty origin. Nil options are those of a mirror that asks
// for each tag once.
func newMirror(t *testing.T, opts *ocilocal.Options, upstream *ocilocal.Upstream) *servedMirror {
	t.Helper()
	m := &servedMirror{r: openTemp(t, opts)}
	handler := openTemp(t, nil).Handler(nil)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		m.log = append(m.log, r.Method+" "+r.URL.Path)
		hook := m.hook
		m.mu.Unlock()
		if hook == nil || !hook(w, r) {
			handler.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	m.origin = &served{server, strings.TrimPrefix(server.URL, "http://"), t}
	if upstream == nil {
		upstream = &ocilocal.Upstream{Revalidate: time.Hour}
	}
	upstream.Host = m.origin.host
	if upstream.Remote == nil {
		upstream.Remote = &ocilocal.Remote{Retry: quick}
		t.Cleanup(upstream.Remote.CloseIdleConnections)
	}
	m.opts = &ocilocal.HandlerOptions{Upstream: upstream}
	m.served = serveAt(t, m.r, m.opts)
	return m
}

// newMirrorOf serves a mirror of the image org/app:v1. It has the manifest already, and no layer.
func newMirrorOf(t *testing.T, layers ...string) *servedMirror {
	t.Helper()
	m := newMirror(t, nil, nil)
	m.origin.pushImage("org/app", "v1", layers...)
	m.want(200, "GET", appManifests+"v1", "")
	return m
}

// requests returns the requests to the origin that contain a text, and forgets all.
func (m *servedMirror) requests(text string) (found []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.log {
		if strings.Contains(l, text) {
			found = append(found, l)
		}
	}
	m.log = nil
	return found
}

// wantRequests checks the requests to the origin since the last look, whatever their order.
func (m *servedMirror) wantRequests(want ...string) {
	m.t.Helper()
	got := m.requests("")
	rest := map[string]int{}
	for _, l := range want {
		rest[l]++
	}
	for _, l := range got {
		rest[l]--
	}
	for _, n := range rest {
		if n != 0 {
			m.t.Errorf("the origin was asked %v, want %v", got, want)
			return
		}
	}
}

// intercept has the origin ask a function first, which returns true if it has answered.
func (m *servedMirror) intercept(hook func(w http.ResponseWriter, r *http.Request) (done bool)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = hook
}

// down makes the origin fail.
func (m *servedMirror) down() {
	m.intercept(func(w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "down", http.StatusServiceUnavailable)
		return true
	})
}

const appBlobs, appManifests = "/v2/org/app/blobs/", "/v2/org/app/manifests/"

func blobAt(text string) string     { return appBlobs + string(digestOfText(text)) }
func manifestAt(text string) string { return appManifests + string(digestOfText(text)) }

// TestServeUpstream has many clients ask for an image at a time. Each manifest and blob is fetched
// once, when it is asked for. Without the upstream, what is here is served.
func TestServeUpstream(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	first := m.origin.pushImage("org/app", "v1", "one", "two")
	text := imageOf("one", "two")
	m.requests("")
	together := func(path, want string) {
		t.Helper()
		var callers sync.WaitGroup
		for range 8 {
			callers.Go(func() {
				if a, err := m.try("GET", path, nil); err != nil || a.status != 200 || a.body != want {
					t.Errorf("%s: %v, %v", path, a, err)
				}
			})
		}
		callers.Wait()
		m.wantRequests("GET " + path)
	}
	together(appManifests+"v1", text)
	for _, blob := range []string{"one", "two", "{}"} {
		together(blobAt(blob), blob)
	}
	if a := m.want(200, "GET", appManifests+string(first), ""); a.body != text {
		t.Error(a)
	}
	m.wantRequests()
	m.want(404, "GET", appManifests+"v2", "")
	m.want(404, "GET", manifestAt("x"), "")
	checkSound(t, m.r)

	m.down()
	m.want(200, "GET", appManifests+"v1", "")
	m.want(200, "GET", appManifests+string(first), "")
	m.want(200, "GET", blobAt("one"), "")
	for _, path := range []string{appManifests + "v3", manifestAt("y"), "/v2/org/other/manifests/v1"} {
		if a := m.want(502, "GET", path, ""); strings.Contains(a.body, "127.0.0.1") {
			t.Error(a.body)
		}
	}
}

// TestServeUpstreamPlatforms pulls one platform of an image index through a mirror, which fetches
// nothing else. The mirror stays sound, and no collection takes anything from it.
func TestServeUpstreamPlatforms(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	for _, layer := range []string{"amd", "arm", "old"} {
		m.origin.pushImage("org/app", "", layer)
	}
	amd, arm, old := imageOf("amd"), imageOf("arm"), imageOf("old")
	nested := imageIndexOf(desc(imageType, old))
	index := imageIndexOf(with(desc(imageType, amd), `"platform":{"os":"linux","architecture":"amd64"}`),
		with(desc(imageType, arm), `"platform":{"os":"linux","architecture":"arm64"}`), desc(ocispec.MediaTypeImageIndex, nested))
	m.origin.want(201, "PUT", manifestAt(nested), nested, "Content-Type", ocispec.MediaTypeImageIndex)
	m.origin.want(201, "PUT", appManifests+"v1", index, "Content-Type", ocispec.MediaTypeImageIndex)
	m.requests("")
	pull := func(architecture string) {
		t.Helper()
		r := openRemote(t, nil)
		ref := ocilocal.MustParseReference(m.host + "/org/app:v1")
		if _, err := r.Pull(t.Context(), ref, &ocilocal.PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: architecture}}); err != nil {
			t.Fatal(err)
		}
		checkSound(t, m.r)
		collect(t, m.r, atOnce)
	}
	pull("arm64")
	m.wantRequests("GET "+appManifests+"v1", "GET "+manifestAt(arm), "GET "+blobAt("arm"), "GET "+blobAt("{}"))
	pull("arm64")
	m.wantRequests()
	pull("amd64")
	m.wantRequests("GET "+manifestAt(amd), "GET "+blobAt("amd"))
	m.want(200, "GET", manifestAt(nested), "")
	m.want(200, "GET", manifestAt(old), "")
	collect(t, m.r, atOnce)
	m.wantRequests("GET "+manifestAt(nested), "GET "+manifestAt(old))

	// It is absent for the registry, too, until somebody asks for it.
	ctx := t.Context()
	local := ocilocal.MustParseReference("localhost/org/app:v1")
	if _, err := m.r.OpenBlob(ctx, ocispec.Descriptor{Digest: digestOfText("old"), Size: 3}); !errors.Is(err, ocilocal.ErrAbsent) {
		t.Errorf("OpenBlob: %v", err)
	}
	other := ocilocal.MustParseReference("localhost/org/copy:v1")
	if _, err := m.r.Tag(ctx, digestOfText(old), other, nil); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("Tag: %v", err)
	}
	if _, err := openTemp(t, nil).ImportRegistry(ctx, m.r, local, nil); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("ImportRegistry: %v", err)
	}
	if err := m.r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{local}, nil); !errors.Is(err, ocilocal.ErrAbsent) {
		t.Errorf("ExportArchive: %v", err)
	}
	far := serveAt(t, openTemp(t, nil), nil)
	if _, err := m.r.Push(ctx, local, &ocilocal.PushOptions{As: ocilocal.MustParseReference(far.host + "/org/app:v1")}); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("Push: %v", err)
	}
	target := t.TempDir()
	if report, err := m.r.Backup(ctx, target, nil); err != nil || len(report.Failed) > 0 {
		t.Errorf("Backup: %+v, %v", report, err)
	}
	m.requests("")
	from := ocilocal.MustParseReference(m.origin.host + "/org/app:v1")
	got, err := m.r.Pull(ctx, from, &ocilocal.PullOptions{As: local, Remote: m.opts.Upstream.Remote})
	if err != nil || len(got.Absent) > 0 {
		t.Errorf("Pull: %+v, %v", got, err)
	}
	if got := m.requests("/blobs/"); len(got) != 1 {
		t.Errorf("the pull asked for %v", got)
	}
	if _, err := m.r.Tag(ctx, digestOfText(old), other, nil); err != nil {
		t.Error(err)
	}
	checkSound(t, m.r)
}

// TestServeUpstreamTags: a tag follows the upstream once the limit has passed, and stays as it is if
// the upstream fails or has it no more.
func TestServeUpstreamTags(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	eager := serveAt(t, m.r, &ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{Host: m.origin.host, Remote: m.opts.Upstream.Remote, Revalidate: -1}})
	at := func(s *served, want string) {
		t.Helper()
		if a := s.want(200, "GET", appManifests+"v1", ""); a.body != want {
			t.Errorf("got %s, want %s", a.body, want)
		}
	}
	m.origin.pushImage("org/app", "v1", "one")
	m.requests("")
	at(m.served, imageOf("one"))
	m.wantRequests("GET " + appManifests + "v1")
	at(m.served, imageOf("one"))
	m.wantRequests()
	at(eager, imageOf("one"))
	m.wantRequests("HEAD " + appManifests + "v1")
	m.origin.pushImage("org/app", "v1", "two")
	m.requests("")
	at(m.served, imageOf("one"))
	m.wantRequests()
	at(eager, imageOf("two"))
	m.wantRequests("HEAD "+appManifests+"v1", "GET "+manifestAt(imageOf("two")))
	at(m.served, imageOf("two"))

	// A client may be in the middle of what the tag has left.
	m.want(200, "GET", manifestAt(imageOf("one")), "")
	m.want(200, "GET", blobAt("one"), "")
	m.wantRequests("GET " + blobAt("one"))

	// The tag is deleted, then the upstream is down.
	m.origin.want(202, "DELETE", appManifests+"v1", "")
	at(eager, imageOf("two"))
	m.down()
	at(eager, imageOf("two"))
	m.want(200, "HEAD", appManifests+"v1", "")
	m.want(502, "GET", blobAt("two"), "")
	checkSound(t, m.r)
}

// TestServeUpstreamFailing: while the upstream is down, not every request for a tag waits for it.
func TestServeUpstreamFailing(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one")
	again := serveAt(t, m.r, m.opts) // has not asked for the tag yet
	m.down()
	m.requests("")
	for i := range 3 {
		again.want(200, "GET", appManifests+"v1", "")
		if got := m.requests("HEAD"); len(got) > 0 != (i == 0) {
			t.Errorf("request %d: %v", i, got)
		}
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

// TestServeUpstreamNames maps names, and leaves out some.
func TestServeUpstreamNames(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	m.origin.pushImage("org/app", "v1", "one")
	s := serveAt(t, m.r, &ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{Remote: m.opts.Upstream.Remote, Name: func(name string) (string, error) {
		rest, ok := strings.CutPrefix(name, "localhost/mirror/")
		if !ok {
			return "", errors.New("not mirrored")
		}
		return m.origin.host + "/" + rest, nil
	}}})
	s.want(200, "GET", "/v2/mirror/org/app/manifests/v1", "")
	s.want(200, "GET", "/v2/mirror/org/app/blobs/"+string(digestOfText("one")), "")
	m.requests("")
	s.want(404, "GET", "/v2/org/app/manifests/v1", "")
	m.wantRequests()
}

// TestServeUpstreamReadOnly: a registry that cannot keep anything serves what it has.
func TestServeUpstreamReadOnly(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one", "two")
	m.want(200, "GET", blobAt("one"), "")
	r, err := ocilocal.OpenReadOnly(t.Context(), m.r.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	m.requests("")
	s := serveAt(t, r, m.opts)
	s.want(200, "GET", appManifests+"v1", "")
	s.want(200, "GET", blobAt("one"), "")
	s.want(404, "GET", blobAt("two"), "")
	s.want(404, "GET", appManifests+"v2", "")
	m.wantRequests()
}

// TestServeUpstreamSeparate: where registries are kept apart, a manifest comes with all its blobs.
func TestServeUpstreamSeparate(t *testing.T) {
	t.Parallel()
	m := newMirror(t, &ocilocal.Options{SeparateRegistries: true}, nil)
	m.origin.pushImage("org/app", "v1", "one")
	m.want(404, "GET", appManifests+"none", "")
	m.want(404, "GET", manifestAt("none"), "")
	m.want(404, "GET", "/v2/org/other/manifests/v1", "")
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool { // the manifest is there, and not all of it
		lost := r.URL.Path == blobAt("one")
		if lost {
			w.WriteHeader(404)
			io.WriteString(w, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`)
		}
		return lost
	})
	m.want(502, "GET", appManifests+"v1", "")
	m.intercept(nil)
	m.want(200, "GET", appManifests+"v1", "")
	m.down()
	m.want(200, "GET", blobAt("one"), "")
	m.want(404, "GET", blobAt("none"), "")
	checkSound(t, m.r)
}

// TestServeUpstreamSeparateBound: with registries kept apart, MaxBytes bounds all that one miss adds.
func TestServeUpstreamSeparateBound(t *testing.T) {
	t.Parallel()
	m := newMirror(t, &ocilocal.Options{SeparateRegistries: true}, &ocilocal.Upstream{MaxBytes: 1500})
	m.origin.pushImage("org/app", "two", strings.Repeat("x", 700), strings.Repeat("y", 700))
	m.origin.pushImage("org/app", "one", strings.Repeat("x", 700))
	m.want(502, "GET", appManifests+"two", "")
	if files := filesBelow(t, m.r, "blobs"); len(files) > 0 {
		t.Errorf("%q", files)
	}
	m.want(200, "GET", appManifests+"one", "")
	checkSound(t, m.r)
}

// TestServeUpstreamPushed: what is pushed to a mirror stays there. Under a tag that the upstream has, it
// is served until the tag is asked for again.
func TestServeUpstreamPushed(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one")
	m.pushImage("org/app", "v1", "pushed")
	m.pushImage("org/app", "own", "pushed")
	again := serveAt(t, m.r, m.opts) // has not asked for a tag yet
	for _, test := range []struct {
		s         *served
		tag, want string
	}{
		{m.served, "v1", imageOf("pushed")},
		{again, "v1", imageOf("one")},
		{again, "own", imageOf("pushed")},
	} {
		if a := test.s.want(200, "GET", appManifests+test.tag, ""); a.body != test.want {
			t.Errorf("%s: %s, want %s", test.tag, a.body, test.want)
		}
	}
	m.origin.want(404, "GET", appManifests+"own", "")
	again.want(200, "GET", manifestAt(imageOf("pushed")), "")
	checkSound(t, m.r)
}

// TestServeUpstreamAccess: the upstream asks for a token, and sends blobs from another host. The mirror
// gives its own credentials to the token server only, and those of its client to nobody.
func TestServeUpstreamAccess(t *testing.T) {
	t.Parallel()
	origin := newServer(t)
	origin.user, origin.password, origin.token = "me", secretPassword, true
	large := aLargeBlob(21)
	manifest := origin.put(t, "org/app", "v1", []byte("small"), []byte(large))
	store := newServer(t) // for blobs
	store.origin = origin
	var mu sync.Mutex
	var seen []http.Header
	store.overrideBy(func(_ http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		seen = append(seen, r.Header)
		mu.Unlock()
		return false
	})
	origin.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		found := r.Method == "GET" && strings.Contains(r.URL.Path, "/blobs/")
		if found && origin.authorized(w, r) {
			http.Redirect(w, r, store.URL+r.URL.Path+"?signature=hush", http.StatusTemporaryRedirect)
		}
		return found
	})
	r := openTemp(t, nil)
	remote := &ocilocal.Remote{Retry: quick}
	t.Cleanup(remote.CloseIdleConnections)
	opts := &ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{Host: origin.host, Remote: remote}}
	s := serveAt(t, r, opts)
	own := []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("client:hush"))}
	if a := s.want(502, "GET", appManifests+"v1", "", own...); a.header.Get("WWW-Authenticate") != "" || secretIn(a.body) != "" || strings.Contains(a.body, origin.host) {
		t.Error(a)
	}
	remote.Credentials = ocilocal.StaticCredential(origin.host, ocilocal.Credential{Username: origin.user, Password: origin.password})
	s.want(200, "GET", appManifests+"v1", "", own...)
	s.want(200, "GET", appManifests+string(manifest), "", own...)
	for _, text := range []string{"small", large} {
		if a := s.want(200, "GET", blobAt(text), "", own...); a.body != text {
			t.Errorf("%d bytes", len(a.body))
		}
	}
	if len(seen) != 2 {
		t.Errorf("%d requests to the store of blobs", len(seen))
	}
	for _, h := range seen {
		if len(h["Authorization"]) > 0 {
			t.Errorf("the store of blobs got %v", h)
		}
	}
	for _, h := range origin.headers {
		if strings.Contains(h.Get("Authorization"), own[1]) {
			t.Error("the upstream got the credential of the client")
		}
	}
	checkSound(t, r)
}

// TestServeUpstreamProxy: a 404 that does not have the form of a registry's may come from a proxy. So the
// upstream is asked a second time before a client gets a 404.
func TestServeUpstreamProxy(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	m.origin.pushImage("org/app", "v1", "one", aLargeBlob(22))
	asked := map[string]int{}
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		asked[r.URL.Path]++
		first := asked[r.URL.Path] == 1
		if first {
			http.Error(w, "<html>no backend</html>", http.StatusNotFound)
		}
		return first
	})
	for _, path := range []string{appManifests + "v1", blobAt("one"), blobAt(aLargeBlob(22)), manifestAt(imageOf("one", aLargeBlob(22)))} {
		m.want(200, "GET", path, "")
	}
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		http.NotFound(w, r)
		return true
	})
	m.requests("")
	m.want(404, "GET", appManifests+"v2", "")
	m.wantRequests("GET "+appManifests+"v2", "GET "+appManifests+"v2")
}

// TestServeUpstreamElsewhere: another repository has the manifest or has had it. That says nothing about
// this one, so the upstream is asked.
func TestServeUpstreamElsewhere(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	raw := imageOf("one")
	for _, repository := range []string{"org/app", "org/copy"} {
		m.origin.pushImage(repository, "v1", "one")
		m.want(200, "GET", "/v2/"+repository+"/manifests/"+string(digestOfText(raw)), "")
	}
	m.want(404, "GET", "/v2/org/other/manifests/"+string(digestOfText(raw)), "")
	other, err := m.r.Repository("localhost/org/other")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := other.Resolve(t.Context(), string(digestOfText(raw))); got.Digest != "" || got.Size != 0 || !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("%v, %v", got, err)
	}
	m.want(202, "DELETE", manifestAt(raw), "")
	m.want(200, "GET", manifestAt(raw), "")
	m.origin.want(202, "DELETE", manifestAt(raw), "")
	m.want(202, "DELETE", manifestAt(raw), "")
	m.want(404, "GET", manifestAt(raw), "")
	checkSound(t, m.r)
}

// TestServeUpstreamLies: whatever an upstream says of a manifest, no client gets other bytes than the
// digest says, nothing of a bad answer stays, and a tag that is here is served.
func TestServeUpstreamLies(t *testing.T) {
	t.Parallel()
	raw := imageOf("one")
	write := func(mediaType, body string, fields ...string) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", mediaType)
			for i := 0; i < len(fields); i += 2 {
				w.Header().Set(fields[i], fields[i+1])
			}
			io.WriteString(w, body)
		}
	}
	for name, lie := range map[string]func(w http.ResponseWriter){
		"another digest":             write(imageType, raw, "Docker-Content-Digest", string(digestOfText("x"))),
		"a bad digest":               write(imageType, raw, "Docker-Content-Digest", "sha256:../../x"),
		"another type":               write(indexType, raw),
		"a page":                     write("text/html", "<html>log in</html>"),
		"a page as a file":           write("application/json", "<html>log in</html>"),
		"nothing":                    write(imageType, ""),
		"null":                       write(imageType, "null"),
		"too short":                  write(imageType, raw, "Content-Length", "10000"),
		"too large":                  write(imageType, raw+strings.Repeat(" ", ocilocal.MaxManifestSize)),
		"cut off":                    write(imageType, raw[:len(raw)/2]),
		"two documents":              write(imageType, raw+raw),
		"a key twice":                write(imageType, strings.Replace(raw, `"config"`, `"config":{},"config"`, 1)),
		"a negative size":            write(imageType, strings.Replace(raw, `"size":3`, `"size":-3`, 1)),
		"a path as a digest":         write(imageType, strings.ReplaceAll(raw, string(digestOfText("one")), "sha256:../../../etc/passwd")),
		"both an image and an index": write(imageType, strings.Replace(raw, `"config"`, `"manifests":[],"config"`, 1)),
		"an old form":                write("application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"name":"org/app","tag":"v1","fsLayers":[]}`),
		"a coding":                   write(imageType, raw, "Content-Encoding", "br"),
		"a failure that is not one":  func(w http.ResponseWriter) { w.WriteHeader(206); io.WriteString(w, raw) },
		"a loop":                     func(w http.ResponseWriter) { w.Header().Set("Location", "?again"); w.WriteHeader(307) },
		"a file":                     func(w http.ResponseWriter) { w.Header().Set("Location", "file:///etc/passwd"); w.WriteHeader(307) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMirror(t, nil, &ocilocal.Upstream{Revalidate: -1})
			m.origin.pushImage("org/app", "v1", "one")
			m.origin.pushImage("org/app", "old", "old")
			m.want(200, "GET", appManifests+"old", "")
			m.origin.pushImage("org/app", "old", "one")
			lies := func(w http.ResponseWriter, r *http.Request) bool {
				found := strings.Contains(r.URL.Path, "/manifests/")
				if found {
					lie(w)
				}
				return found
			}
			m.intercept(lies)
			for _, path := range []string{appManifests + "v1", manifestAt(raw)} {
				a := m.do("GET", path, "")
				// A body by digest that has the right bytes is right, whatever else the upstream says.
				if a.status != 502 && !(a.status == 200 && a.body == raw && a.header.Get("Content-Type") == imageType) {
					t.Errorf("%s: %v", path, a)
				}
				if strings.Contains(a.body, m.origin.host) {
					t.Error(a.body)
				}
			}
			if a := m.want(200, "GET", appManifests+"old", ""); a.body != imageOf("old") && a.body != raw {
				t.Error(a.body)
			}
			checkSound(t, m.r)
			m.intercept(nil)
			for _, path := range []string{appManifests + "v1", manifestAt(raw), appManifests + "old"} {
				if a := m.want(200, "GET", path, ""); a.body != raw {
					t.Error(a.body)
				}
			}
			checkSound(t, m.r)
		})
	}
}
