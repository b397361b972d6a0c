package ocilocal_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// aLargeBlob is so large that its transfers can be followed and resumed.
func aLargeBlob(seed byte) string { return string(noise(seed, 3<<20)) }

// breakOff has the origin send the first n bytes of a blob, and then do more, which may be nil. Then
// the connection breaks off.
func (m *servedMirror) breakOff(text string, n int, more func()) {
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != "GET" || !strings.HasSuffix(r.URL.Path, string(digestOfText(text))) {
			return false
		}
		from := 0
		if s := r.Header.Get("Range"); s != "" {
			var last int
			fmt.Sscanf(s, "bytes=%d-%d", &from, &last)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, last, len(text)))
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(text)-from))
		if from > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		io.WriteString(w, text[from:max(from, n)])
		http.NewResponseController(w).Flush()
		if more != nil {
			more()
		}
		panic(http.ErrAbortHandler)
	})
}

// get begins a GET, with header fields in pairs.
func (s *served) get(ctx context.Context, path string, fields ...string) *http.Response {
	s.t.Helper()
	req, err := http.NewRequestWithContext(ctx, "GET", s.URL+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	res, err := s.Client().Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { res.Body.Close() })
	return res
}

// readSome reads n bytes of a blob and compares them.
func readSome(t *testing.T, res *http.Response, n int, want string) {
	t.Helper()
	got := make([]byte, n)
	if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != want[:n] {
		t.Fatalf("read %d bytes: %v", n, err)
	}
}

// TestServeFollow: clients get the first bytes of a large blob while the origin has not sent the
// others. One that comes later gets them, too, and one that leaves ends nothing. The origin is asked
// once.
func TestServeFollow(t *testing.T) {
	t.Parallel()
	layer := aLargeBlob(1)
	m := newMirrorOf(t, layer)
	m.requests("")
	half, read := len(layer)/2, make(chan struct{})
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
		io.WriteString(w, layer[:half])
		http.NewResponseController(w).Flush()
		<-read
		io.WriteString(w, layer[half:])
		return true
	})
	gone, leave := context.WithCancel(t.Context())
	first, second := m.get(t.Context(), blobAt(layer)), m.get(gone, blobAt(layer))
	readSome(t, first, half, layer)
	readSome(t, second, half, layer)
	leave()
	io.Copy(io.Discard, second.Body)
	var late sync.WaitGroup
	for range 4 {
		late.Go(func() {
			if a, err := m.try("GET", blobAt(layer), nil); err != nil || a.status != 200 || a.body != layer {
				t.Errorf("a later client: %d, %d bytes, %v", a.status, len(a.body), err)
			}
		})
	}
	late.Go(func() {
		a, err := m.try("GET", blobAt(layer), nil, "Range", "bytes=1-3")
		if err != nil || a.status != 206 || a.body != layer[1:4] {
			t.Errorf("a range: %d, %q, %v", a.status, a.body, err)
		}
	})
	close(read)
	if rest, err := io.ReadAll(first.Body); err != nil || string(rest) != layer[half:] {
		t.Errorf("the rest has %d bytes, %v", len(rest), err)
	}
	late.Wait()
	m.wantRequests("GET " + blobAt(layer))
	checkSound(t, m.r)
	collect(t, m.r, atOnce)
	m.want(200, "GET", blobAt(layer), "")
	m.wantRequests()
}

// TestServeFetchResumed: if the last client of a blob leaves, its transfer ends. The next one
// continues it, also by another handle of the root, and after the origin has broken off.
func TestServeFetchResumed(t *testing.T) {
	t.Parallel()
	layer := aLargeBlob(2)
	m := newMirrorOf(t, layer)
	left := make(chan struct{})
	m.breakOff(layer, 1<<20, func() { <-left })
	ctx, leave := context.WithCancel(t.Context())
	readSome(t, m.get(ctx, blobAt(layer)), 1<<20, layer)
	leave()
	close(left)

	m.breakOff(layer, 2<<20, nil)
	res := m.get(t.Context(), blobAt(layer))
	if got, err := io.ReadAll(res.Body); err == nil || !strings.HasPrefix(layer, string(got)) || len(got) == len(layer) {
		t.Errorf("from an origin that breaks off: %d, %d bytes, %v", res.StatusCode, len(got), err)
	}

	other := openAgain(t, m.r)
	defer other.Close()
	var from atomic.Value
	m.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		from.Store(r.Header.Get("Range"))
		return false
	})
	if a := serveAt(t, other, m.opts).want(200, "GET", blobAt(layer), ""); a.body != layer {
		t.Errorf("%d bytes", len(a.body))
	}
	if want := fmt.Sprintf("bytes=%d-%d", 2<<20, len(layer)-1); from.Load() != want {
		t.Errorf("the origin was asked for %q, want %q", from.Load(), want)
	}
	checkSound(t, m.r)
}

// TestServeFetchProcesses: of two handles of a root, as of two processes, one fetches a large blob, and
// the clients of both get its bytes as they arrive.
func TestServeFetchProcesses(t *testing.T) {
	t.Parallel()
	layer := aLargeBlob(3)
	m := newMirrorOf(t, layer)
	other := openAgain(t, m.r)
	t.Cleanup(func() { other.Close() })
	m.requests("")
	half, read := len(layer)/2, make(chan struct{})
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
		io.WriteString(w, layer[:half])
		http.NewResponseController(w).Flush()
		<-read
		io.WriteString(w, layer[half:])
		return true
	})
	var clients []*http.Response
	for _, s := range []*served{m.served, serveAt(t, other, m.opts)} {
		for range 2 {
			res := s.get(t.Context(), blobAt(layer))
			readSome(t, res, half, layer)
			clients = append(clients, res)
		}
	}
	close(read)
	for i, res := range clients {
		if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != layer[half:] {
			t.Errorf("client %d: %d bytes more, %v", i, len(rest), err)
		}
	}
	m.wantRequests("GET " + blobAt(layer))
	checkSound(t, m.r)
}

// TestServeFetchLies: whatever an origin does, no client gets a whole blob of other bytes, nothing of
// them stays, and the next client gets the right ones.
func TestServeFetchLies(t *testing.T) {
	t.Parallel()
	status := func(n int, code string) func(w http.ResponseWriter, text string) {
		return func(w http.ResponseWriter, _ string) {
			w.WriteHeader(n)
			fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"secret of %s"}]}`, code, "10.0.0.1")
		}
	}
	for name, lie := range map[string]struct {
		answer func(w http.ResponseWriter, text string)
		status int // to the client, before it gets any bytes
	}{
		"other bytes": {answer: func(w http.ResponseWriter, text string) {
			w.Write(bytes.ToUpper(noise(9, len(text))))
		}},
		"another last byte": {answer: func(w http.ResponseWriter, text string) {
			io.WriteString(w, text[:len(text)-1]+"\x00")
		}},
		"too long":     {answer: func(w http.ResponseWriter, text string) { io.WriteString(w, text+"!") }},
		"too short":    {answer: func(w http.ResponseWriter, text string) { io.WriteString(w, text[:len(text)-1]) }},
		"empty":        {answer: func(http.ResponseWriter, string) {}},
		"absent":       {answer: status(404, "BLOB_UNKNOWN"), status: 404},
		"unauthorized": {answer: status(401, "UNAUTHORIZED"), status: 502},
		"denied":       {answer: status(403, "DENIED"), status: 502},
		"too many":     {answer: status(429, "TOOMANYREQUESTS"), status: 502},
		"failing":      {answer: status(500, "UNKNOWN"), status: 502},
		"a login page": {answer: func(w http.ResponseWriter, _ string) { io.WriteString(w, "<html>log in</html>") }},
		"breaking off": {answer: func(http.ResponseWriter, string) { panic(http.ErrAbortHandler) }, status: 502},
		"half an answer": {answer: func(w http.ResponseWriter, text string) {
			io.WriteString(w, text[:len(text)/2])
			panic(http.ErrAbortHandler)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMirror(t, nil, nil)
			for _, layer := range []string{aLargeBlob(4), "small"} {
				m.origin.pushImage("org/app", "v1", layer)
				m.want(200, "GET", manifestAt(imageOf(layer)), "")
				m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
					lies := r.Method == "GET" && r.URL.Path == blobAt(layer)
					if lies {
						lie.answer(w, layer)
					}
					return lies
				})
				for _, ranges := range []string{"", "bytes=1-"} {
					fields := []string{}
					if ranges != "" {
						fields = append(fields, "Range", ranges)
					}
					a, err := m.try("GET", blobAt(layer), nil, fields...)
					if err == nil && a.status < 300 || lie.status != 0 && (err != nil || a.status != lie.status) || strings.Contains(a.body, layer) {
						t.Errorf("%s: %d, %d bytes, %v", ranges, a.status, len(a.body), err)
					}
					if strings.Contains(a.body, "10.0.0.1") || strings.Contains(a.body, m.origin.host) {
						t.Errorf("%s: %s", ranges, a.body)
					}
				}
				m.want(200, "HEAD", blobAt(layer), "")
				checkSound(t, m.r)
				m.intercept(nil)
				if a := m.want(200, "GET", blobAt(layer), ""); a.body != layer {
					t.Errorf("the truth has %d bytes", len(a.body))
				}
				checkSound(t, m.r)
			}
		})
	}
}

// TestServeFetchSizes: a manifest that states another size of a blob than it has breaks only itself.
func TestServeFetchSizes(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	layer := aLargeBlob(5)
	m.origin.pushImage("org/app", "v1", layer)
	lie := strings.Replace(imageOf(layer), fmt.Sprint(len(layer)), fmt.Sprint(len(layer)-1), 1)
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/manifests/lie") {
			return false
		}
		w.Header().Set("Content-Type", imageType)
		io.WriteString(w, lie)
		return true
	})
	m.want(200, "GET", appManifests+"lie", "")
	if a, err := m.try("GET", blobAt(layer), nil); err == nil && a.status == 200 {
		t.Errorf("%d bytes of the wrong size", len(a.body))
	}
	m.want(200, "GET", appManifests+"v1", "")
	if a := m.want(200, "GET", blobAt(layer), ""); a.body != layer {
		t.Errorf("%d bytes", len(a.body))
	}
}

// TestServeFetchAbsent asks for what is not here in other ways than GET.
func TestServeFetchAbsent(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, &ocilocal.Upstream{MaxBytes: 1000})
	large := strings.Repeat("l", 1001)
	m.origin.pushImage("org/app", "v1", "one", "two", large)
	m.origin.pushBlob("org/app", "unnamed")
	m.want(200, "GET", appManifests+"v1", "")
	m.requests("")
	if a := m.want(200, "HEAD", blobAt("one"), ""); a.header.Get("Content-Length") != "3" || a.header.Get("Docker-Content-Digest") != string(digestOfText("one")) {
		t.Error(a.header)
	}
	m.want(304, "GET", blobAt("one"), "", "If-None-Match", `"`+string(digestOfText("one"))+`"`)
	m.want(404, "GET", blobAt("unnamed"), "")
	m.want(404, "HEAD", blobAt("unnamed"), "")
	m.want(404, "GET", strings.Replace(blobAt("one"), "org/app", "org/other", 1), "")
	m.want(502, "GET", blobAt(large), "")
	m.wantRequests()
	m.want(416, "GET", blobAt("one"), "", "Range", "bytes=3-")
	if a := m.want(206, "GET", blobAt("one"), "", "Range", "bytes=1-1"); a.body != "n" {
		t.Error(a.body)
	}
	m.wantRequests("GET " + blobAt("one"))

	// HEAD has said that a blob is here. So a push may rely on it.
	for _, text := range []string{"two", "{}"} {
		m.want(200, "HEAD", blobAt(text), "")
	}
	pushed := imageOf("two")
	m.want(201, "PUT", "/v2/org/app/manifests/pushed", pushed, "Content-Type", imageType)
	m.wantRequests("GET "+blobAt("two"), "GET "+blobAt("{}"))
	m.want(400, "PUT", "/v2/org/app/manifests/pushed", imageOf("three"), "Content-Type", imageType)
	m.want(502, "PUT", "/v2/org/app/manifests/pushed", imageOf(large), "Content-Type", imageType)
	checkSound(t, m.r)

	// A foreign layer is fetched if the origin has it.
	const foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
	image := strings.Replace(imageOf("far"), "text/plain", foreign, 1)
	m.origin.want(201, "PUT", appManifests+"foreign", image, "Content-Type", imageType)
	m.want(200, "GET", appManifests+"foreign", "")
	m.want(404, "GET", blobAt("far"), "")
	m.origin.pushBlob("org/app", "far")
	if a := m.want(200, "GET", blobAt("far"), ""); a.body != "far" {
		t.Error(a.body)
	}
	checkSound(t, m.r)
}

// TestServeFetchLost: content that was lost is fetched again.
func TestServeFetchLost(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one")
	m.want(200, "GET", blobAt("one"), "")
	if err := os.Remove(blobFile(m.r, digestOfText("one"))); err != nil {
		t.Fatal(err)
	}
	if a := m.want(200, "GET", blobAt("one"), ""); a.body != "one" {
		t.Error(a.body)
	}
	checkSound(t, m.r)
}

// TestServeFetchCollected has collections with no grace run beside clients of a mirror. Every client
// gets what it asks for, and what refs lead to stays.
func TestServeFetchCollected(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	ctx, stop := context.WithCancel(t.Context())
	var collector sync.WaitGroup
	collector.Go(func() {
		for ctx.Err() == nil {
			if _, err := m.r.GC(ctx, atOnce); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			for n := range 10 {
				layer := fmt.Sprintf("layer %d of %d", n, i)
				m.origin.pushImage("org/app", fmt.Sprintf("v%d-%d", i, n), layer)
				m.want(200, "GET", fmt.Sprintf("%sv%d-%d", appManifests, i, n), "")
				for _, text := range []string{layer, "{}"} {
					if a := m.want(200, "GET", blobAt(text), ""); a.body != text {
						t.Errorf("%q", a.body)
					}
				}
			}
		})
	}
	clients.Wait()
	stop()
	collector.Wait()
	checkSound(t, m.r)
	for i := range 4 {
		m.want(200, "GET", blobAt(fmt.Sprintf("layer 9 of %d", i)), "")
	}
}

// TestServeFollowLies follows a blob whose bytes turn out to be wrong when the client has nearly all
// of them. The answer breaks off before the last one.
func TestServeFollowLies(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	layer, lie := aLargeBlob(6), aLargeBlob(7)
	m.origin.pushImage("org/app", "v1", layer)
	m.want(200, "GET", appManifests+"v1", "")
	read := make(chan struct{})
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		io.WriteString(w, lie) // chunked: its end is still to come
		http.NewResponseController(w).Flush()
		<-read
		return true
	})
	res := m.get(t.Context(), blobAt(layer))
	most := len(lie) - 256<<10
	readSome(t, res, most, lie)
	rest := make([]byte, 256<<10)
	n, _ := res.Body.Read(rest)
	close(read)
	more, err := io.ReadAll(res.Body)
	if n += most + len(more); err == nil || n >= len(lie) {
		t.Errorf("got %d bytes of %d, %v", n, len(lie), err)
	}
	m.intercept(nil)
	if a := m.want(200, "GET", blobAt(layer), ""); a.body != layer {
		t.Errorf("%d bytes", len(a.body))
	}
	checkSound(t, m.r)
}

// TestServePutPartial pushes image indexes to a mirror that has their members in part. HEAD says that
// a member is here, so the client does not push it, and the mirror fetches what it needs.
func TestServePutPartial(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	for _, layer := range []string{"amd", "arm", "gone"} {
		m.origin.pushImage("org/app", "", layer)
	}
	const foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
	amd, arm, gone := imageOf("amd"), imageOf("arm"), imageOf("gone")
	old := strings.Replace(imageOf("old"), "text/plain", foreign, 1)
	index := imageIndexOf(desc(imageType, amd), desc(imageType, arm), desc(imageType, old))
	m.origin.want(201, "PUT", manifestAt(old), old, "Content-Type", imageType)
	m.origin.want(201, "PUT", appManifests+"v1", index, "Content-Type", indexType)
	m.want(200, "GET", appManifests+"v1", "")
	m.requests("")

	// The same index under another tag: members that nobody asked for stay absent.
	m.want(201, "PUT", appManifests+"v2", index, "Content-Type", indexType)
	m.wantRequests()
	m.want(200, "HEAD", manifestAt(amd), "")
	m.want(200, "HEAD", manifestAt(old), "")
	m.want(201, "PUT", appManifests+"v3", index, "Content-Type", indexType)
	m.wantRequests("GET "+manifestAt(amd), "GET "+manifestAt(old), "GET "+blobAt("{}"), "GET "+blobAt("amd"), "GET "+blobAt("old"))

	// A new index: the client has asked for one member, and not for another.
	both := imageIndexOf(with(desc(imageType, amd), `"annotations":{"a":"b"}`), desc(imageType, arm), desc(imageType, old))
	m.want(201, "PUT", manifestAt(both), both, "Content-Type", indexType)
	m.wantRequests("GET "+manifestAt(arm), "GET "+blobAt("arm"), "GET "+blobAt("old"))
	checkSound(t, m.r)
	collect(t, m.r, atOnce)

	// What the upstream lacks, and what it does not say while it is down.
	a := m.want(400, "PUT", appManifests+"v4", imageIndexOf(desc(imageType, imageOf("none"))), "Content-Type", indexType)
	if a.code() != "MANIFEST_BLOB_UNKNOWN" {
		t.Error(a.body)
	}
	m.want(200, "HEAD", manifestAt(gone), "")
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		lost := r.URL.Path == blobAt("gone")
		if lost {
			w.WriteHeader(404)
			io.WriteString(w, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`)
		}
		return lost
	})
	for _, raw := range []string{gone, imageIndexOf(desc(imageType, gone))} {
		if a := m.want(400, "PUT", appManifests+"v4", raw); a.code() != "MANIFEST_BLOB_UNKNOWN" {
			t.Error(a.body)
		}
	}
	m.down()
	m.want(502, "PUT", appManifests+"v4", imageIndexOf(desc(imageType, gone)), "Content-Type", indexType)
	m.want(502, "PUT", appManifests+"v4", imageIndexOf(desc(imageType, imageOf("unknown"))), "Content-Type", indexType)
	for _, raw := range []string{both, amd, arm, old} {
		m.want(200, "GET", manifestAt(raw), "")
	}
	for _, text := range []string{"amd", "arm", "{}"} {
		m.want(200, "GET", blobAt(text), "")
	}
	checkSound(t, m.r)
}

// TestServePutMeanwhile pushes image indexes to a mirror. While that fetches a layer of one member
// for the push, another client fetches the manifest of a member that was absent, and none of its
// layers. The push does not depend on that member.
func TestServePutMeanwhile(t *testing.T) {
	t.Parallel()
	amd, arm, gone := imageOf("amd"), imageOf("arm"), imageOf("gone")
	flat := imageIndexOf(desc(imageType, arm), desc(imageType, amd))
	nested := imageIndexOf(desc(indexType, flat))
	mirror := func(t *testing.T, indexes ...string) (m *servedMirror, meanwhile func() (done func())) {
		m = newMirror(t, nil, nil)
		for _, layer := range []string{"amd", "arm"} {
			m.origin.pushImage("org/app", "", layer)
		}
		for _, index := range indexes {
			m.origin.want(201, "PUT", manifestAt(index), index, "Content-Type", indexType)
			m.want(200, "GET", manifestAt(index), "")
		}
		m.want(200, "GET", manifestAt(amd), "")
		return m, func() func() {
			var asked atomic.Bool
			m.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
				if r.Method == "GET" && r.URL.Path == blobAt("amd") {
					asked.Store(true)
					if a, err := m.try("GET", manifestAt(arm), nil); err != nil || a.status != 200 {
						t.Errorf("another client: %d %s, %v", a.status, a.body, err)
					}
				}
				return false
			})
			m.requests("")
			return func() {
				t.Helper()
				m.intercept(nil)
				if got := m.requests(blobAt("arm")); len(got) > 0 || !asked.Load() {
					t.Errorf("the origin was asked for amd: %t, and %v", asked.Load(), got)
				}
				m.want(200, "GET", blobAt("amd"), "")
				checkSound(t, m.r)
			}
		}
	}
	t.Run("an index that is here", func(t *testing.T) {
		m, meanwhile := mirror(t, flat)
		done := meanwhile()
		m.want(201, "PUT", appManifests+"v2", flat, "Content-Type", indexType)
		done()
		// The next push finds the member, and completes it.
		m.want(201, "PUT", appManifests+"v3", flat, "Content-Type", indexType)
		m.wantRequests("GET " + blobAt("arm"))
	})
	t.Run("below an index that is here", func(t *testing.T) {
		m, meanwhile := mirror(t, flat, nested)
		done := meanwhile()
		m.want(201, "PUT", appManifests+"v2", nested, "Content-Type", indexType)
		done()
	})
	t.Run("below a new index", func(t *testing.T) {
		m, meanwhile := mirror(t, flat)
		done := meanwhile()
		m.want(201, "PUT", appManifests+"v2", nested, "Content-Type", indexType)
		done()
	})
	t.Run("what a new index itself names must come", func(t *testing.T) {
		sparse := imageIndexOf(desc(imageType, amd), desc(imageType, gone), desc(imageType, arm))
		m, _ := mirror(t)
		m.origin.pushImage("org/app", "", "gone")
		m.origin.want(201, "PUT", manifestAt(sparse), sparse, "Content-Type", indexType)
		m.want(200, "GET", manifestAt(sparse), "")
		m.origin.want(202, "DELETE", manifestAt(sparse), "")
		m.origin.want(202, "DELETE", manifestAt(gone), "")
		a := m.want(400, "PUT", appManifests+"v2", imageIndexOf(desc(indexType, sparse), desc(imageType, gone)), "Content-Type", indexType)
		if a.code() != "MANIFEST_BLOB_UNKNOWN" {
			t.Error(a.body)
		}
		m.requests("")
		m.want(201, "PUT", appManifests+"v2", imageIndexOf(desc(indexType, sparse), desc(imageType, arm)), "Content-Type", indexType)
		m.wantRequests("GET "+manifestAt(arm), "GET "+blobAt("arm"))
		checkSound(t, m.r)
	})
}

// TestServePutMemberAsLayer: the bytes of an absent member are here as the layer of another image. The
// member is as absent as any other: it stays so if its index is here, and a new index fetches it.
func TestServePutMemberAsLayer(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	member := imageOf("one")
	index := imageIndexOf(desc(imageType, member))
	m.origin.pushImage("org/app", "", "one")
	m.origin.want(201, "PUT", appManifests+"v1", index, "Content-Type", indexType)
	m.pushImage("org/other", "v1", member)
	m.want(200, "GET", appManifests+"v1", "")
	m.requests("")
	m.want(201, "PUT", appManifests+"v2", index, "Content-Type", indexType)
	m.wantRequests()
	checkSound(t, m.r)
	collect(t, m.r, atOnce)
	m.want(201, "PUT", appManifests+"v3", imageIndexOf(desc(imageType, member), desc(imageType, member)), "Content-Type", indexType)
	m.wantRequests("GET "+manifestAt(member), "GET "+blobAt("one"))
	checkSound(t, m.r)
	collect(t, m.r, atOnce)
}

// TestServeFollowRange: a range of a large blob begins while the blob arrives. Its last byte comes when
// the whole blob is there and right.
func TestServeFollowRange(t *testing.T) {
	t.Parallel()
	layer, lie := aLargeBlob(8), aLargeBlob(9)
	half, end := len(layer)/2, len(layer)
	for _, honest := range []bool{true, false} {
		m := newMirrorOf(t, layer)
		sent, read := layer, make(chan struct{})
		if !honest {
			sent = layer[:half] + lie[half:]
		}
		m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != "GET" || r.URL.Path != blobAt(layer) {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(end))
			io.WriteString(w, sent[:half])
			http.NewResponseController(w).Flush()
			<-read
			io.WriteString(w, sent[half:])
			return true
		})
		m.requests("")
		type client struct {
			res         *http.Response
			start, stop int
			got         int // bytes before the rest of the blob arrives
		}
		clients := map[string]*client{
			"bytes=0-0":      {start: 0, stop: 1},
			"bytes=10-99":    {start: 10, stop: 100, got: 89},
			"bytes=0-":       {start: 0, stop: end, got: half},
			"bytes=1000000-": {start: 1000000, stop: end, got: half - 1000000},
			"bytes=-1":       {start: end - 1, stop: end},
			"bytes=-2000000": {start: end - 2000000, stop: end, got: half - (end - 2000000)},
			fmt.Sprintf("bytes=%d-%d", half+5, half+9): {start: half + 5, stop: half + 10},
			fmt.Sprintf("bytes=%d-", half-1):           {start: half - 1, stop: end, got: 1},
		}
		for part, c := range clients {
			c.res = m.get(t.Context(), blobAt(layer), "Range", part)
			want := fmt.Sprintf("bytes %d-%d/%d", c.start, c.stop-1, end)
			if c.res.StatusCode != 206 || c.res.Header.Get("Content-Range") != want || c.res.ContentLength != int64(c.stop-c.start) {
				t.Errorf("%s: %s, %v, %d bytes", part, c.res.Status, c.res.Header, c.res.ContentLength)
			}
			readSome(t, c.res, c.got, layer[c.start:])
		}
		a := m.want(416, "GET", blobAt(layer), "", "Range", fmt.Sprintf("bytes=%d-", end))
		if a.header.Get("Content-Range") != fmt.Sprintf("bytes */%d", end) {
			t.Error(a.header)
		}
		if a := m.get(t.Context(), blobAt(layer), "Range", "bytes=0-0", "If-Range", `"other"`); a.StatusCode != 200 {
			t.Error(a.Status)
		}
		close(read)
		for part, c := range clients {
			rest, err := io.ReadAll(c.res.Body)
			if honest && (err != nil || string(rest) != layer[c.start+c.got:c.stop]) || !honest && (err == nil || c.got+len(rest) >= c.stop-c.start) {
				t.Errorf("honest %t, %s: %d bytes more, %v", honest, part, len(rest), err)
			}
		}
		m.wantRequests("GET " + blobAt(layer))
		checkSound(t, m.r)
	}
}

// TestServeFetchClose: Close ends the fetches of a mirror, however slow the upstream is. Their clients get
// a 503, or an answer that breaks off. The bytes that have arrived are kept for the next handle.
func TestServeFetchClose(t *testing.T) {
	t.Parallel()
	layer := aLargeBlob(11)
	m := newMirrorOf(t, layer, "small")
	asked, closed := make(chan struct{}, 2), make(chan struct{})
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == blobAt(layer) {
			w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
			io.WriteString(w, layer[:2<<20])
		}
		http.NewResponseController(w).Flush()
		asked <- struct{}{}
		<-closed
		return true
	})
	res := m.get(t.Context(), blobAt(layer))
	readSome(t, res, 2<<20, layer)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		if a, err := m.try("GET", blobAt("small"), nil); err != nil || a.status != 503 {
			t.Errorf("a client that waits: %d %s, %v", a.status, a.body, err)
		}
	})
	<-asked
	<-asked
	if err := m.r.Close(); err != nil {
		t.Error(err)
	}
	waiting.Wait()
	if rest, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("%d bytes more", len(rest))
	}
	close(closed)
	m.want(503, "GET", blobAt(layer), "")
	m.intercept(nil)
	again := mustOpen(t, m.r.Root())
	defer mustClose(t, again)
	if a := serveAt(t, again, m.opts).want(200, "GET", blobAt(layer), ""); a.body != layer {
		t.Errorf("%d bytes", len(a.body))
	}
}

// TestServePutSlowUpstream: pushes of large manifests that wait for a slow upstream do not keep others
// waiting.
func TestServePutSlowUpstream(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one")
	note := `,"annotations":{"note":"` + strings.Repeat("x", 100_000)
	large := func(n int, layer string) string {
		return strings.TrimSuffix(imageOf(layer), "}") + fmt.Sprintf(`%s %d"}}`, note, n)
	}
	const waiting = 8
	asked, answer := make(chan struct{}, 1), make(chan struct{})
	m.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			asked <- struct{}{}
			<-answer
		}
		return false
	})
	var clients sync.WaitGroup
	for n := range waiting {
		clients.Go(func() {
			a, err := m.try("PUT", fmt.Sprintf("%sslow%d", appManifests, n), strings.NewReader(large(n, "one")))
			if err != nil || a.status != 201 {
				t.Errorf("%d: %d %s, %v", n, a.status, a.body, err)
			}
		})
	}
	<-asked
	for _, blob := range []string{"here", "{}"} {
		m.pushBlob("org/other", blob)
	}
	for n := range waiting {
		m.want(201, "PUT", fmt.Sprintf("/v2/org/other/manifests/v%d", n), large(n, "here"))
	}
	close(answer)
	clients.Wait()
	checkSound(t, m.r)
}
