package ocilocal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A victim is a good artifact on a server that is about to become hostile.
type victim struct {
	*server
	small, large       []byte
	smallAt, largeAt   string // ends of the paths of their blobs
	manifest           stored
	asked              map[string]int // requests by path
	allRequests, tries atomic.Int64
}

func newVictim(t *testing.T) *victim {
	v := &victim{server: newServer(t), small: noise(1, 1000), large: noise(2, 3<<20), asked: map[string]int{}}
	d := v.put(t, "org/model", "v1", v.small, v.large)
	v.manifest = v.at("org/model", string(d))
	v.smallAt, v.largeAt = "/blobs/"+string(digest.FromBytes(v.small)), "/blobs/"+string(digest.FromBytes(v.large))
	return v
}

// again returns a victim with the same artifact, on another server.
func (v *victim) again(t *testing.T) *victim {
	s := newServer(t)
	s.origin = v.server
	return &victim{server: s, small: v.small, large: v.large, smallAt: v.smallAt, largeAt: v.largeAt, manifest: v.manifest, asked: map[string]int{}}
}

// on makes requests whose path ends with end have their own answer. HEAD is refused, so that
// the client asks by GET.
func (v *victim) on(end string, answer http.HandlerFunc) {
	v.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead {
			status(405, "Connection", "close")(w, r)
			return true
		}
		v.allRequests.Add(1)
		if !strings.HasSuffix(r.URL.Path, end) {
			return false
		}
		v.tries.Add(1)
		answer(w, r)
		return true
	})
}

// status answers with a status and pairs of header fields and values.
func status(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, `{"errors":[{"code":"ODD","message":"\u001b[31mred \u202e and not to be seen"}]}`)
	}
}

func body(b []byte, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		if w.Header().Get("Transfer-Encoding") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		} else {
			w.Header().Del("Transfer-Encoding")
			w.(http.Flusher).Flush() // from here on it is chunked
		}
		w.Write(b)
	}
}

// endless writes until the client stops reading.
func endless(header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		for block := noise(3, 64<<10); ; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}
}

// longError answers with 404 and a text that is too long to be read to its end.
func longError(w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(404)
	io.WriteString(w, `{"errors":[{"code":"LONG","message":"`)
	block := bytes.Repeat([]byte("x"), 64<<10)
	for range 1 << 10 {
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}

// TestPullHostile: a server lies, breaks off or floods in every way. The pull fails with the right
// error and leaves nothing visible. When the server behaves again, the pull succeeds.
func TestPullHostile(t *testing.T) {
	if ranAlone(t) {
		return
	}
	const image = ocispec.MediaTypeImageManifest
	type row struct {
		set  func(v *victim)
		want error
		// tries, if not 0, is how many requests there may be of the kind that set concerns.
		tries int64
	}
	on := func(end string, h http.HandlerFunc) func(*victim) { return func(v *victim) { v.on(end, h) } }
	manifest := func(answer func(v *victim) http.HandlerFunc) func(*victim) {
		return func(v *victim) { v.on("/manifests/v1", answer(v)) }
	}
	small := func(answer func(v *victim) http.HandlerFunc) func(*victim) {
		return func(v *victim) { v.on(v.smallAt, answer(v)) }
	}
	large := func(answer func(v *victim) http.HandlerFunc) func(*victim) {
		return func(v *victim) { v.on(v.largeAt, answer(v)) }
	}
	rows := map[string]row{
		"manifest without end":           {on("/manifests/v1", endless("Content-Type", image)), ocilocal.ErrTooLarge, 1},
		"manifest of 4 MiB and a byte":   {on("/manifests/v1", body(make([]byte, ocilocal.MaxManifestSize+1), "Content-Type", image)), ocilocal.ErrTooLarge, 1},
		"manifest is no JSON":            {on("/manifests/v1", body([]byte("hello"), "Content-Type", image)), ocilocal.ErrInvalidManifest, 1},
		"manifest is empty":              {on("/manifests/v1", body(nil, "Content-Type", image)), ocilocal.ErrInvalidManifest, 1},
		"manifest as HTML":               {on("/manifests/v1", body([]byte("<html>"), "Content-Type", "text/html; charset=utf-8")), ocilocal.ErrUnsupportedMediaType, 1},
		"manifest's Content-Type is bad": {on("/manifests/v1", body([]byte("{}"), "Content-Type", "a/b/c;;")), ocilocal.ErrProtocol, 1},
		"manifest's digest header is bad": {manifest(func(v *victim) http.HandlerFunc {
			return body(v.manifest.body, "Content-Type", image, "Docker-Content-Digest", "sha256:../../etc")
		}), ocilocal.ErrProtocol, 1},
		"manifest's digest header lies": {manifest(func(v *victim) http.HandlerFunc {
			return body(v.manifest.body, "Content-Type", image, "Docker-Content-Digest", string(digest.FromString("other")))
		}), ocilocal.ErrDigestMismatch, 1},
		"manifest's Content-Type lies": {manifest(func(v *victim) http.HandlerFunc {
			return body(v.manifest.body, "Content-Type", ocispec.MediaTypeImageIndex)
		}), ocilocal.ErrInvalidManifest, 1},
		"child's Content-Type isn't its descriptor's": {func(v *victim) {
			doc := strings.Replace(string(v.manifest.body), `"mediaType":"`+image+`",`, "", 1) // the document does not state its type
			child := v.putRaw("org/model", "", image, []byte(doc))
			v.plant("org/model", "v1", ocispec.MediaTypeImageIndex, fmt.Appendf(nil,
				`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`, ocispec.MediaTypeImageIndex, image, child, len(doc)))
			v.on("/manifests/"+string(child), body([]byte(doc), "Content-Type", ocilocal.MediaTypeDockerManifest))
		}, ocilocal.ErrInvalidManifest, 1},
		"manifest in gzip": {manifest(func(v *victim) http.HandlerFunc {
			return body(gzipped(v.manifest.body), "Content-Type", image, "Content-Encoding", "gzip")
		}), ocilocal.ErrProtocol, 1},
		"manifest not found":               {on("/manifests/v1", status(404)), ocilocal.ErrNotFound, 1},
		"error of 64 MiB":                  {on("/manifests/v1", longError), ocilocal.ErrNotFound, 1},
		"denied":                           {on("/manifests/v1", status(403)), ocilocal.ErrDenied, 1},
		"unauthorized without a challenge": {on("/manifests/v1", status(401)), ocilocal.ErrUnauthorized, 1},
		"unauthorized in an unknown way":   {on("/manifests/v1", status(401, "WWW-Authenticate", `Negotiate abc`)), ocilocal.ErrUnauthorized, 1},
		"method not allowed":               {on("/manifests/v1", status(405)), errors.ErrUnsupported, 1},
		"teapot":                           {on("/manifests/v1", status(418)), ocilocal.ErrRejected, 1},
		"no content":                       {on("/manifests/v1", status(204)), ocilocal.ErrProtocol, 1},
		"redirect to nowhere":              {on("/manifests/v1", status(302)), ocilocal.ErrProtocol, 1},
		"redirect to a file":               {on("/manifests/v1", status(307, "Location", "file:///etc/passwd")), ocilocal.ErrProtocol, 1},
		"redirect to ftp":                  {on("/manifests/v1", status(307, "Location", "ftp://example.com/x")), ocilocal.ErrProtocol, 1},
		"redirect with user information":   {on("/manifests/v1", status(307, "Location", "http://u:not%20to%20be%20seen@127.0.0.1/x")), ocilocal.ErrProtocol, 1},
		"redirect to itself":               {on("/manifests/v1", status(307, "Location", "/v2/org/model/manifests/v1")), ocilocal.ErrProtocol, 6},
		"server fails for ever":            {on("/manifests/v1", status(500)), ocilocal.ErrTransport, 6},
		"not implemented":                  {on("/manifests/v1", status(501)), errors.ErrUnsupported, 1},
		"too many requests for ever":       {on("/manifests/v1", status(429)), ocilocal.ErrRateLimited, 6},
		"retry after an age":               {on("/manifests/v1", status(429, "Retry-After", "1000000000")), ocilocal.ErrRateLimited, 1},
		"retry after more than can be":     {on("/manifests/v1", status(503, "Retry-After", "99999999999999999999999")), ocilocal.ErrTransport, 1},
		"retry after a date far away":      {on("/manifests/v1", status(429, "Retry-After", "Fri, 31 Dec 9999 23:59:59 GMT")), ocilocal.ErrRateLimited, 1},
		"retry after a negative time":      {on("/manifests/v1", status(429, "Retry-After", "-5")), ocilocal.ErrRateLimited, 6},
		"connection closed at once": {on("/manifests/v1", func(http.ResponseWriter, *http.Request) {
			panic(http.ErrAbortHandler)
		}), ocilocal.ErrTransport, 6},
		"a flood of headers": {on("/manifests/v1", func(w http.ResponseWriter, _ *http.Request) {
			for i := range 10_000 {
				w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 100))
			}
		}), ocilocal.ErrTransport, 6},
		"blob not found":             {small(func(*victim) http.HandlerFunc { return status(404) }), ocilocal.ErrNotFound, 1},
		"blob has other bytes":       {small(func(v *victim) http.HandlerFunc { return body(noise(9, len(v.small))) }), ocilocal.ErrDigestMismatch, 1},
		"blob is shorter":            {small(func(v *victim) http.HandlerFunc { return body(v.small[:900]) }), ocilocal.ErrSizeMismatch, 1},
		"blob is longer":             {small(func(v *victim) http.HandlerFunc { return body(append(v.small[:1000:1000], 1)) }), ocilocal.ErrSizeMismatch, 1},
		"blob is shorter, in chunks": {small(func(v *victim) http.HandlerFunc { return body(v.small[:900], "Transfer-Encoding", "chunked") }), ocilocal.ErrTransport, 6},
		"blob is longer, in chunks": {small(func(v *victim) http.HandlerFunc {
			return body(append(v.small[:1000:1000], 1), "Transfer-Encoding", "chunked")
		}), ocilocal.ErrSizeMismatch, 1},
		"blob without end":              {small(func(*victim) http.HandlerFunc { return endless() }), ocilocal.ErrSizeMismatch, 1},
		"large blob has other bytes":    {large(func(v *victim) http.HandlerFunc { return body(noise(9, len(v.large))) }), ocilocal.ErrDigestMismatch, 1},
		"large blob is longer":          {large(func(v *victim) http.HandlerFunc { return body(append(v.large, 1), "Transfer-Encoding", "chunked") }), ocilocal.ErrSizeMismatch, 1},
		"large blob is shorter":         {large(func(v *victim) http.HandlerFunc { return body(v.large[:100], "Transfer-Encoding", "chunked") }), ocilocal.ErrTransport, 6},
		"large blob without end":        {large(func(*victim) http.HandlerFunc { return endless() }), ocilocal.ErrSizeMismatch, 1},
		"large blob is empty":           {large(func(*victim) http.HandlerFunc { return body(nil, "Transfer-Encoding", "chunked") }), ocilocal.ErrTransport, 6},
		"blob in gzip":                  {small(func(v *victim) http.HandlerFunc { return body(gzipped(v.small), "Content-Encoding", "gzip") }), ocilocal.ErrProtocol, 1},
		"part of a blob, not asked for": {small(func(*victim) http.HandlerFunc { return status(206, "Content-Range", "bytes 0-999/1000") }), ocilocal.ErrProtocol, 1},
		"blob redirected without end":   {small(func(*victim) http.HandlerFunc { return status(302, "Location", "?again") }), ocilocal.ErrProtocol, 6},
		"blob's Content-Length lies":    {small(func(v *victim) http.HandlerFunc { return cutAt(v.small, 500) }), ocilocal.ErrTransport, 6},
		"large blob: always cut at 0":   {large(func(v *victim) http.HandlerFunc { return cutAt(v.large, 0) }), ocilocal.ErrTransport, 6},
		"large blob: Range is ignored":  {large(func(v *victim) http.HandlerFunc { return cutAt(v.large, 2<<20) }), ocilocal.ErrTransport, 0},
		"large blob: other Range": {large(func(v *victim) http.HandlerFunc {
			return cutThen(v.large, status(206, "Content-Range", "bytes 0-10/3145728"))
		}), ocilocal.ErrProtocol, 2},
		"large blob: Range of other": {large(func(v *victim) http.HandlerFunc {
			return cutThen(v.large, status(206, "Content-Range", "bytes 1048576-9/9"))
		}), ocilocal.ErrProtocol, 2},
		"large blob: no Content-Range":    {large(func(v *victim) http.HandlerFunc { return cutThen(v.large, status(206)) }), ocilocal.ErrProtocol, 2},
		"large blob: content changes":     {large(func(v *victim) http.HandlerFunc { return cutThen(v.large, rest(noise(9, len(v.large)))) }), ocilocal.ErrDigestMismatch, 0},
		"large blob: no Range there ever": {large(func(v *victim) http.HandlerFunc { return cutThen(v.large, status(416)) }), ocilocal.ErrRejected, 0},
	}
	good := newVictim(t)
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			v := good.again(t)
			row.set(v)
			r := openRemote(t, &ocilocal.Remote{StallTimeout: 5 * time.Second})
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil)
			runtime.ReadMemStats(&after)
			if !errors.Is(err, row.want) {
				t.Errorf("%v, want %v", err, row.want)
			}
			if _, ok := errors.AsType[*ocilocal.RemoteError](err); !ok {
				t.Errorf("%T has no RemoteError", err)
			}
			if n := v.tries.Load(); row.tries > 0 && n != row.tries {
				t.Errorf("%d requests, want %d", n, row.tries)
			}
			if n := v.allRequests.Load(); n > 40 {
				t.Errorf("%d requests in all", n)
			}
			checkRemoteMessage(t, err)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 48<<20 {
				t.Errorf("%d bytes were allocated", grown)
			}
			checkUnpublished(t, r)
			// When the server behaves again, the pull succeeds.
			v.behave()
			if _, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if found := problems(t, r, nil, nil); len(found) > 0 {
				t.Errorf("%q", found)
			}
			mustClose(t, r)
		})
	}
}

// checkUnpublished fails if a pull has left more than a part of a blob.
func checkUnpublished(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	for ref, err := range r.Refs(t.Context(), nil) {
		t.Errorf("%v, %v", ref, err)
	}
	if left := filesBelow(t, r, "blobs"); len(left) > 0 {
		t.Errorf("%q", left)
	}
}

// checkRemoteMessage fails if an error can harm a terminal or discloses a secret.
func checkRemoteMessage(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	for _, text := range []string{err.Error(), fmt.Sprintf("%+v", err)} {
		if strings.Contains(text, "not%20to%20be") || len(text) > 2000 {
			t.Errorf("message %q", text)
		}
		for _, c := range text {
			if c < 0x20 || c > 0x7e {
				t.Errorf("message %q", text)
				break
			}
		}
	}
}

// cutAt promises all of b and closes the connection after n bytes.
func cutAt(b []byte, n int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		w.Write(b[:n])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

// cutThen cuts the first answer after a MiB, and gives then to those who ask for the rest.
func cutThen(b []byte, then http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") == "" {
			cutAt(b, 1<<20)(w, r)
		}
		then(w, r)
	}
}

// rest answers a Range rightly.
func rest(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}
}

// TestPullCutAnywhere: a blob that is cut off at any byte is resumed, or fetched from its beginning
// if the server has no ranges.
func TestPullCutAnywhere(t *testing.T) {
	t.Parallel()
	for _, percent := range []int{0, 1, 50, 99} {
		for _, ranges := range []bool{true, false} {
			v := newVictim(t)
			cut, want := len(v.large)*percent/100, 2+len(v.small)+len(v.large)
			answer := rest(v.large)
			if !ranges {
				answer = body(v.large)
				want += cut
			}
			var times atomic.Int64
			v.on(v.largeAt, func(w http.ResponseWriter, r *http.Request) {
				if times.Add(1) == 1 {
					cutAt(v.large, cut)(w, r)
				}
				answer(w, r)
			})
			r := openRemote(t, nil)
			got, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil)
			if err != nil || got.BytesReceived != int64(want) || times.Load() != 2 {
				t.Errorf("%d %%, ranges %v: %+v, %v", percent, ranges, got, err)
			}
		}
	}
}

// TestPullStalls: a request on whose connection no bytes move, or hardly any, ends.
func TestPullStalls(t *testing.T) {
	t.Parallel()
	for name, wait := range map[string]func(w http.ResponseWriter, r *http.Request){
		"no answer": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"no body": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
		"drip": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			for tick := time.NewTicker(time.Millisecond); ; {
				select {
				case <-r.Context().Done():
					return
				case <-tick.C:
					w.Write([]byte{1})
					w.(http.Flusher).Flush()
				}
			}
		},
	} {
		v := newVictim(t)
		v.on(v.largeAt, wait)
		var patient atomic.Bool // on a busy machine a good answer stalls as well
		r := openRemote(t, &ocilocal.Remote{
			StallTimeout: 200 * time.Millisecond,
			Retry:        func(int, error) (time.Duration, bool) { return 0, patient.Load() },
		})
		if _, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrTransport) || !strings.Contains(err.Error(), "stalls") {
			t.Errorf("%s: %v", name, err)
		}
		v.behave()
		patient.Store(true)
		if _, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil); err != nil {
			t.Errorf("%s, afterwards: %v", name, err)
		}
	}
}

// TestPullForeignURLs: foreign layers of an image have urls of their own hosts. No request goes
// there.
func TestPullForeignURLs(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("asked elsewhere for %s", r.URL)
	}))
	defer elsewhere.Close()
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 10))
	raw := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},
		"layers":[{"mediaType":"application/x-layer","digest":%q,"size":10,"urls":[%q]}]}`, ocispec.MediaTypeImageManifest,
		digest.FromString("{}"), digest.FromString("elsewhere."), elsewhere.URL+"/blob")
	s.plant("org/model", "v1", ocispec.MediaTypeImageManifest, []byte(raw))
	r := openRemote(t, nil)
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
}

// TestPullUnknownAlgorithm: a digest of an unknown algorithm can't be checked. Pulls do not rely on
// it.
func TestPullUnknownAlgorithm(t *testing.T) {
	v := newVictim(t)
	v.on("/manifests/v1", body(v.manifest.body, "Content-Type", ocispec.MediaTypeImageManifest, "Docker-Content-Digest", "blake9:"+strings.Repeat("a", 64)))
	r := openRemote(t, nil)
	if got, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil); err != nil || got.Artifact.Digest() != v.manifest.digest {
		t.Errorf("%+v, %v", got, err)
	}
}
