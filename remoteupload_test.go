package ocilocal_test

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// multi puts an image index on the server, with a manifest for each architecture. The index has the
// tag v1, and the manifests have none.
func (s *server) multi(t testing.TB, repo string, architectures ...string) (index digest.Digest, manifests []digest.Digest) {
	t.Helper()
	var entries []string
	for i, arch := range architectures {
		d := s.put(t, repo, "", noise(byte(i+1), 10))
		manifests = append(manifests, d)
		entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"platform":{"os":"linux","architecture":%q}}`,
			ocispec.MediaTypeImageManifest, d, len(s.at(repo, string(d)).body), arch))
	}
	doc := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, strings.Join(entries, ","))
	return s.putRaw(repo, "v1", ocispec.MediaTypeImageIndex, []byte(doc)), manifests
}

// TestPushIndex: an image index is pushed after all its members, nested ones too. Pushing it again
// sends no manifest.
func TestPushIndex(t *testing.T) {
	s := newServer(t)
	inner, _ := s.multi(t, "org/multi", "amd64", "arm64")
	outer := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageIndex, inner, len(s.at("org/multi", string(inner)).body))
	want := s.putRaw("org/multi", "v1", ocispec.MediaTypeImageIndex, []byte(outer))
	r := openRemote(t, nil)
	if _, err := r.Pull(t.Context(), s.ref("org/multi:v1"), nil); err != nil {
		t.Fatal(err)
	}
	s.forget()
	for _, name := range []string{"org/multi", "org/copy", "org/copy"} {
		got, err := r.Push(t.Context(), s.ref("org/multi:v1"), &ocilocal.PushOptions{As: s.ref(name + ":v1")})
		if err != nil || got.Descriptor.Digest != want || s.at(name, "v1").digest != want {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if puts := s.requests("PUT /v2/org/copy/manifests/"); len(puts) != 4 || len(s.requests("PUT /v2/org/multi/")) > 0 {
		t.Errorf("%q", puts)
	}
}

// TestPushListsReferrerLater: a manifest is at the registry, but not listed as a referrer. The next
// push adds it to the list.
func TestPushListsReferrerLater(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
	sig := pushed(t, r, s.ref("org/model:sig"), nil, descOf(subject), noise(2, 10))
	var failed atomic.Bool
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method != "PUT" || !strings.HasSuffix(q.URL.Path, "/manifests/sha256-"+subject.Digest().Encoded()) || failed.Swap(true) {
			return false
		}
		status(403)(w, q)
		return true
	})
	if _, err := r.Push(t.Context(), sig.Reference(), nil); !errors.Is(err, ocilocal.ErrDenied) {
		t.Fatal(err)
	}
	remote := &ocilocal.Remote{}
	defer remote.CloseIdleConnections()
	// Pushed any number of times, under any number of names, it is listed once.
	for _, tag := range []string{"sig", "sig", "other"} {
		if _, err := r.Push(t.Context(), sig.Reference(), &ocilocal.PushOptions{As: s.ref("org/model:" + tag)}); err != nil {
			t.Fatal(err)
		}
		n := 0
		for d, err := range remote.Referrers(t.Context(), s.ref("org/model@"+string(subject.Digest())), "") {
			if n++; err != nil || d.Digest != sig.Digest() {
				t.Errorf("%v, %v", d, err)
			}
		}
		if n != 1 {
			t.Errorf("%s: %d referrers", tag, n)
		}
	}
}

// TestPushReferrersTag: the referrers tag of a long digest is cut as the specification says, and
// its list has the right form.
func TestPushReferrersTag(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.SHA512.FromString("x"), Size: 1}
	b, err := r.NewBuilder(s.ref("org/model:sig"), &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest, ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if err := errors.Join(b.SetSubject(subject), b.SetAnnotation("a", "b")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Push(t.Context(), s.ref("org/model:sig"), nil); err != nil {
		t.Fatal(err)
	}
	got := string(s.at("org/model", "sha512-"+subject.Digest.Encoded()[:64]).body)
	if !strings.Contains(got, `"annotations":{"a":"b"}`) || !strings.Contains(got, `"artifactType":"`+testType+`"`) {
		t.Errorf("%q", got)
	}
}

// TestPushGivesUp: a permanent failure is tried as often as the policy says. The number is not
// multiplied by the steps of an upload.
func TestPushGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		method string
		chunk  int64
		mount  bool
		want   int64
	}{
		"POST":  {"POST", 0, false, 6},
		"PUT":   {"PUT", 0, false, 6},
		"PATCH": {"PATCH", 100_000, false, 6},
		"GET":   {"PATCH or GET", 100_000, false, 7}, // how far it is can't be asked either
		"mount": {"POST", 0, true, 12},               // then without
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			var tries atomic.Int64
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(c.method, r.Method) || !strings.Contains(r.URL.Path, "/uploads/") {
					return false
				}
				tries.Add(1)
				status(503)(w, r)
				return true
			})
			r := openRemote(t, nil)
			a := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(2, 300_000))
			if c.mount {
				if _, err := r.Tag(t.Context(), a.Digest(), s.ref("org/else:v1"), nil); err != nil {
					t.Fatal(err)
				}
			}
			_, err := r.Push(t.Context(), a.Reference(), &ocilocal.PushOptions{ChunkSize: c.chunk, Workers: 1})
			if n := tries.Load(); !errors.Is(err, ocilocal.ErrTransport) || n != c.want {
				t.Errorf("%d requests, want %d: %v", n, c.want, err)
			}
		})
	}
}

// TestPushShrinks: a proxy in front of the registry limits the size of bodies. Chunks become small
// enough for it, whatever ChunkSize says.
func TestPushShrinks(t *testing.T) {
	t.Parallel()
	const size = 5 << 20
	for name, c := range map[string]struct {
		chunk, minChunk, maxPut int64
		want                    error
	}{
		"one request":              {0, 0, 1 << 20, nil},
		"one chunk":                {8 << 20, 0, 1 << 20, nil},
		"chunks":                   {2 << 20, 0, 1 << 20, nil},
		"the registry's own":       {0, 1 << 18, 1 << 20, nil},
		"less than it wants":       {0, 2 << 20, 1 << 20, ocilocal.ErrTooLarge},
		"nothing is small enough":  {0, 0, 1000, ocilocal.ErrTooLarge},
		"as the caller wants them": {1 << 20, 1 << 18, 1 << 20, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.minChunk, s.maxPut = c.minChunk, c.maxPut
			r := openRemote(t, nil)
			pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(9, size))
			if _, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: c.chunk}); !errors.Is(err, c.want) {
				t.Error(err)
			}
			if n := len(s.requests("POST")); n > 10 {
				t.Errorf("%d attempts", n)
			}
		})
	}
}

// TestPushAnswerLost: if a blob has arrived and only the answer was lost, the blob is not sent
// again.
func TestPushAnswerLost(t *testing.T) {
	s := newServer(t)
	var lost atomic.Bool
	s.overrideBy(func(_ http.ResponseWriter, q *http.Request) bool {
		if q.Method != "PUT" || q.ContentLength < 1<<20 || lost.Swap(true) {
			return false
		}
		s.plain(httptest.NewRecorder(), q)
		panic(http.ErrAbortHandler)
	})
	r := openRemote(t, nil)
	pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(9, 2<<20))
	if got, err := r.Push(t.Context(), s.ref("org/model:v1"), nil); err != nil || !lost.Load() || got.BytesSent != 2<<20+2 {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestPushUploadMoves: an upload goes on at the address that the registry named last, even in its
// answer to GET.
func TestPushUploadMoves(t *testing.T) {
	s := newServer(t)
	var failed, moved atomic.Bool
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.Contains(q.URL.Path, "/uploads/") || q.Method == "POST" {
			return false
		}
		switch {
		case q.Method == "PATCH" && !failed.Swap(true):
			status(503)(w, q)
			return true
		case q.Method == "GET":
			moved.Store(true)
			w.Header().Set("Location", q.URL.String()+"&moved=1")
			w.Header().Set("Range", "0-0")
			w.WriteHeader(204)
			return true
		case q.Method == "PATCH" && moved.Swap(false):
			if q.URL.Query().Get("moved") == "" {
				t.Errorf("PATCH to %s", q.URL)
			}
		}
		return false
	})
	r := openRemote(t, nil)
	pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(9, 300_000))
	if _, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: 100_000}); err != nil || !failed.Load() {
		t.Error(err)
	}
}

// halfChunk makes the server take half of a chunk.
func halfChunk(r *http.Request) {
	r.ContentLength /= 2
	r.Body = io.NopCloser(io.LimitReader(r.Body, r.ContentLength))
	var first, last int64
	fmt.Sscanf(r.Header.Get("Content-Range"), "%d-%d", &first, &last)
	r.Header.Set("Content-Range", fmt.Sprintf("%d-%d", first, first+r.ContentLength-1))
}

// rangeless removes Range from the answers to PATCH.
type rangeless struct{ http.ResponseWriter }

func (w rangeless) WriteHeader(code int) {
	if code == http.StatusAccepted {
		w.Header().Del("Range")
	}
	w.ResponseWriter.WriteHeader(code)
}

// TestPushOutOfRange: half a chunk is lost, and only the 416 to the next one shows it. The registry
// is then asked how far the upload is.
func TestPushOutOfRange(t *testing.T) {
	s := newServer(t)
	var chunks, asked atomic.Int64
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == "GET" && strings.Contains(r.URL.Path, "/uploads/") {
			asked.Add(1)
		}
		if r.Method != "PATCH" {
			return false
		}
		if chunks.Add(1) == 2 {
			halfChunk(r)
		}
		s.plain(rangeless{w}, r)
		return true
	})
	r := openRemote(t, nil)
	pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(2, 450_000))
	_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: 100_000})
	if err != nil || asked.Load() != 1 || len(s.requests("POST")) != 2 {
		t.Errorf("%v, asked %d times, %q", err, asked.Load(), s.requests("uploads"))
	}
	if _, err := openRemote(t, nil).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Error(err)
	}
}

// TestPushBodyClosedByTransport: a transport closes a body while it reads it, as net/http does when
// a stream of HTTP/2 is reset. The error blames the registry, and not the store.
func TestPushBodyClosedByTransport(t *testing.T) {
	s := newServer(t)
	next := &http.Transport{DisableCompression: true}
	defer next.CloseIdleConnections()
	failed := false
	remote := &ocilocal.Remote{Client: &http.Client{Transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
		if failed || r.Method != "PUT" || r.ContentLength < 1<<20 {
			return next.RoundTrip(r)
		}
		failed = true
		b := make([]byte, 100)
		r.Body.Read(b)
		r.Body.Close()
		r.Body.Read(b)
		return nil, errors.New("stream error: stream ID 1; REFUSED_STREAM")
	})}}
	r := openRemote(t, remote)
	pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(9, 2<<20))
	if _, err := r.Push(t.Context(), s.ref("org/model:v1"), nil); err != nil || !failed {
		t.Error(err)
	}
}

// answersAs makes the server answer requests of one kind with another status, or with changed
// headers.
func (s *server) answersAs(method, part string, change func(r *http.Request, rec *httptest.ResponseRecorder)) {
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != method || !strings.Contains(r.URL.Path, part) {
			return false
		}
		rec := httptest.NewRecorder()
		s.plain(rec, r)
		if rec.Code < 300 {
			change(r, rec)
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes())
		return true
	})
}

// pushAndCheck pushes an artifact with one layer, and pulls it into another registry.
func pushAndCheck(t *testing.T, s *server, layer []byte, chunk int64) {
	t.Helper()
	r := openRemote(t, nil)
	ref := s.ref("org/model:v1")
	pushed(t, r, ref, nil, nil, layer)
	if _, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{ChunkSize: chunk, Workers: 1}); err != nil {
		t.Error(err)
		return
	}
	s.behave()
	if _, err := openRemote(t, nil).Pull(t.Context(), ref, nil); err != nil {
		t.Errorf("pulled: %v", err)
	}
}

// TestPushStatuses: any 2xx is success, if the registry has the bytes.
func TestPushStatuses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		method string
		chunk  int64
	}{{"POST", 0}, {"PATCH", 1000}, {"PUT", 0}, {"PUT", 1000}} {
		for _, status := range []int{200, 201, 202, 204} {
			t.Run(fmt.Sprint(c.method, " ", status, " ", c.chunk), func(t *testing.T) {
				s := newServer(t)
				s.answersAs(c.method, "/blobs/uploads/", func(_ *http.Request, rec *httptest.ResponseRecorder) { rec.Code = status })
				pushAndCheck(t, s, noise(1, 3500), c.chunk)
			})
		}
	}
	// The same for a manifest. But the page of a proxy is not a success of the registry.
	for _, status := range []int{200, 202, 204} {
		s := newServer(t)
		s.answersAs("PUT", "/manifests/", func(_ *http.Request, rec *httptest.ResponseRecorder) {
			rec.Code = status
			rec.Header().Del("Docker-Content-Digest")
		})
		pushAndCheck(t, s, noise(1, 100), 0)
	}
	for _, part := range []string{"/manifests/", "/blobs/uploads/"} {
		s := newServer(t)
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != "PUT" || !strings.Contains(r.URL.Path, part) {
				return false
			}
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			io.WriteString(w, "<html>blocked</html>")
			return true
		})
		r := openRemote(t, nil)
		pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 100))
		if _, err := r.Push(t.Context(), s.ref("org/model:v1"), nil); err == nil {
			t.Errorf("a page was taken for the answer to PUT of %s", part)
		}
	}
}

// TestPushOddRanges: the Range in the answer to a chunk is a hint, in any form, right or wrong.
func TestPushOddRanges(t *testing.T) {
	t.Parallel()
	const size, chunk = 3500, 1000
	for name, form := range map[string]func(at, end int64) string{
		"none":            func(int64, int64) string { return "" },
		"HTTP's":          func(_, end int64) string { return fmt.Sprintf("bytes=0-%d", end-1) },
		"Content-Range's": func(_, end int64) string { return fmt.Sprintf("bytes 0-%d/%d", end-1, size) },
		"with its end":    func(_, end int64) string { return fmt.Sprintf("0-%d", end) },
		"of the chunk":    func(at, end int64) string { return fmt.Sprintf("%d-%d", at, end-1) },
		"its length":      func(at, end int64) string { return fmt.Sprintf("0-%d", end-at-1) },
		"always 0-0":      func(int64, int64) string { return "0-0" },
		"half":            func(at, end int64) string { return fmt.Sprintf("0-%d", (at+end)/2) },
		"far away":        func(int64, int64) string { return "0-99999999999" },
		"negative":        func(int64, int64) string { return "0--1" },
		"words":           func(int64, int64) string { return "all of it" },
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.answersAs("PATCH", "/blobs/uploads/", func(r *http.Request, rec *httptest.ResponseRecorder) {
				var at, last int64
				if _, err := fmt.Sscanf(r.Header.Get("Content-Range"), "%d-%d", &at, &last); err != nil {
					t.Error(err)
				}
				rec.Header().Set("Range", form(at, last+1))
			})
			pushAndCheck(t, s, noise(1, size), chunk)
		})
	}
}

// TestPushLimits: registries and proxies refuse large bodies in many ways. The blob is then sent in
// smaller pieces.
func TestPushLimits(t *testing.T) {
	t.Parallel()
	const limit = 200 << 10
	for name, refuse := range map[string]func(s *server, w http.ResponseWriter, r *http.Request){
		"413": func(_ *server, w http.ResponseWriter, r *http.Request) { status(413)(w, r) },
		"416": func(_ *server, w http.ResponseWriter, r *http.Request) {
			status(416, "Location", r.URL.String(), "Range", "0-0")(w, r)
		},
		"400": func(_ *server, w http.ResponseWriter, _ *http.Request) { fail(w, 400, "SIZE_INVALID") },
		"502": func(_ *server, w http.ResponseWriter, r *http.Request) { status(502)(w, r) },
		"cut": func(_ *server, _ http.ResponseWriter, r *http.Request) {
			io.CopyN(io.Discard, r.Body, 64<<10)
			panic(http.ErrAbortHandler)
		},
	} {
		for _, chunk := range []int64{0, 400 << 10} {
			t.Run(fmt.Sprint(name, " ", chunk), func(t *testing.T) {
				s := newServer(t)
				s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.URL.Path, "/blobs/uploads/") || r.ContentLength <= limit {
						return false
					}
					refuse(s, w, r)
					return true
				})
				pushAndCheck(t, s, noise(1, 1<<20), chunk)
			})
		}
	}
}

// TestPushDoubtfulHeads: an answer to HEAD counts only if its length is right. After any other
// answer the blob is sent.
func TestPushDoubtfulHeads(t *testing.T) {
	t.Parallel()
	layer := noise(1, 3000)
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
	}))
	defer page.Close()
	refusing := httptest.NewServer(http.HandlerFunc(status(403)))
	defer refusing.Close()
	for name, answer := range map[string]http.HandlerFunc{
		"400": status(400), "401": status(401), "403": status(403), "404": status(404), "405": status(405), "500": status(500),
		"length 0":          func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "0") },
		"half":              func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "1500") },
		"no length":         func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() },
		"redirect to login": status(302, "Location", page.URL+"/in"),
		"signed for GET":    status(302, "Location", refusing.URL+"/x"),
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != "HEAD" || !strings.HasSuffix(r.URL.Path, string(digest.FromBytes(layer))) {
					return false
				}
				answer(w, r)
				return true
			})
			pushAndCheck(t, s, layer, 0)
		})
	}
	// The registry keeps its damaged blob, so the push must fail.
	s := newServer(t)
	r := openRemote(t, nil)
	pushed(t, r, s.ref("org/model:v1"), nil, nil, layer)
	d := digest.FromBytes(layer)
	s.plantBlob("org/model", d, layer[:1500])
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == "PUT" && strings.Contains(r.URL.RawQuery, d.Encoded()) {
			status(201)(w, r)
			return true
		}
		return false
	})
	if _, err := r.Push(t.Context(), s.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrSizeMismatch) {
		t.Error(err)
	}
	// A cache says that the blob is there, and the registry, when it gets the manifest, that it
	// isn't.
	s = newServer(t)
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == "HEAD" && strings.HasSuffix(r.URL.Path, string(d)) {
			w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
			return true
		}
		return false
	})
	pushAndCheck(t, s, layer, 0)
}

// TestPushRangeOverflows: a registry says that an upload is at the largest offset that a number can
// have.
func TestPushRangeOverflows(t *testing.T) {
	for _, says := range []string{"0-9223372036854775807", "0-9223372036854775806", "0-18446744073709551615"} {
		v := &victim{server: newServer(t)}
		v.onMethod("PATCH", "/blobs/uploads/", func(w http.ResponseWriter, r *http.Request) {
			if c := r.Header.Get("Content-Range"); strings.HasPrefix(c, "-") || strings.Contains(c, "--") {
				t.Errorf("a chunk of bytes %s", c)
			}
			status(202, "Location", r.URL.String(), "Range", says)(w, r)
		})
		r := openRemote(t, nil)
		ref := v.ref("org/model:v1")
		pushed(t, r, ref, nil, nil, noise(2, 300_000))
		_, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{ChunkSize: 100_000})
		mustFail(t, err, ocilocal.ErrRejected)
		if n := v.tries.Load(); n > 3 {
			t.Errorf("%s: %d chunks of 3", says, n)
		}
	}
}

// TestUploadsElsewhere: the registry chooses the address of an upload. The credential does not go
// to another host.
func TestUploadsElsewhere(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first, later string // where the upload is opened, and goes on after a chunk
		want         error
		at           string // the site that gets bytes
	}{
		"another host":            {first: "https://uploads.test/u", at: "uploads.test:443"},
		"another port":            {first: "https://registry.test:8443/u", at: "registry.test:8443"},
		"another host, mid-way":   {first: "/v2/org/model/blobs/uploads/u", later: "https://uploads.test/u", at: "uploads.test:443"},
		"without a scheme":        {first: "//uploads.test/u", at: "uploads.test:443"},
		"its own name":            {first: "https://REGISTRY.test:443/u", at: registrySite},
		"no TLS, by a proxy":      {first: "http://registry.test/v2/org/model/blobs/uploads/u", at: registrySite},
		"a proxy's inside":        {first: "http://inside:5000/v2/org/model/blobs/uploads/u", at: registrySite},
		"no TLS":                  {first: "http://registry.test/u", want: ocilocal.ErrProtocol},
		"no TLS, mid-way":         {first: "https://uploads.test/u", later: "http://registry.test/u", want: ocilocal.ErrProtocol},
		"user information":        {first: "https://me:you@uploads.test/u", want: ocilocal.ErrProtocol},
		"who wants a credential":  {first: "https://uploads.test/login", want: ocilocal.ErrUnauthorized},
		"who redirects the bytes": {first: "https://uploads.test/back", want: ocilocal.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			// This upload keeps no state: any PUT succeeds.
			uploads := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				if r.Method == "DELETE" && r.Host != "registry.test" {
					t.Errorf("%s was asked to delete %s", r.Host, r.URL.Path)
				}
				switch {
				case r.URL.Path == "/login":
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(401)
				case r.URL.Path == "/back":
					w.Header().Set("Location", "https://registry.test/v2/u")
					w.WriteHeader(307)
				case r.Method == "PATCH":
					from, _, _ := strings.Cut(r.Header.Get("Content-Range"), "-")
					at, _ := strconv.Atoi(from)
					w.Header().Set("Location", cmp.Or(c.later, c.first))
					w.Header().Set("Range", fmt.Sprintf("0-%d", int64(at)+n-1))
					w.WriteHeader(202)
				case r.Method == "PUT":
					w.WriteHeader(201)
				default:
					w.WriteHeader(204)
				}
			})
			s := in.registry("https://registry.test", "203.0.113.1")
			s.user, s.password = "me", secretPassword
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case r.Method == "POST" && s.authorized(w, r):
					w.Header()["Location"] = []string{c.first}
					w.WriteHeader(202)
				case r.Method == "POST":
				case strings.HasSuffix(r.URL.Path, "/u"):
					uploads(w, r)
				case r.Method == "PUT" && r.Header.Get("Authorization") != "": // manifests, of blobs that aren't here
					w.WriteHeader(201)
				default:
					return false
				}
				return true
			})
			for _, origin := range []string{"https://uploads.test", "https://registry.test:8443", "http://registry.test"} {
				in.site(origin, "203.0.113.2", uploads)
			}
			remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
			r := openRemote(t, remote)
			pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 300_000))
			_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: 100_000})
			in.quiet(err)
			in.noSecretSeen(registrySite)
			if c.want != nil {
				mustFail(t, err, c.want)
			} else if err != nil {
				t.Fatal(err)
			}
			if at := in.sites[c.at]; at != nil && !slices.ContainsFunc(at.asked(), func(r string) bool { return strings.HasPrefix(r, "PATCH") || strings.HasPrefix(r, "PUT /u") }) {
				t.Errorf("%s got %q", c.at, at.asked())
			}
			if n := len(in.sites["registry.test:80"].asked()); n > 0 {
				t.Errorf("%d requests without TLS", n)
			}
		})
	}
}

// TestPushPartOfBlob: the registry answers a vague success and has only a part of the blob. The
// push fails.
func TestPushPartOfBlob(t *testing.T) {
	s := newServer(t)
	layer := noise(1, 1000)
	r := openRemote(t, nil)
	a := pushed(t, r, s.ref("org/model:v1"), nil, nil, layer)
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method != "PUT" || !strings.Contains(q.URL.Path, "/blobs/uploads/") || q.URL.Query().Get("digest") != string(digest.FromBytes(layer)) {
			return false
		}
		io.Copy(io.Discard, q.Body)
		s.plantBlob("org/model", digest.FromBytes(layer), layer[:500])
		w.WriteHeader(202)
		return true
	})
	if got, err := r.Push(t.Context(), a.Reference(), nil); !errors.Is(err, ocilocal.ErrSizeMismatch) {
		t.Errorf("%+v, %v", got, err)
	}
}
