package ocilocal_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// onMethod is like on, for one method.
func (v *victim) onMethod(method, part string, answer http.HandlerFunc) {
	v.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		v.allRequests.Add(1)
		if r.Method != method || !strings.Contains(r.URL.Path, part) {
			return false
		}
		v.tries.Add(1)
		answer(w, r)
		return true
	})
}

// TestPushHostile: a registry lies or fails in every step of a push. Push returns nil only if it
// has everything.
func TestPushHostile(t *testing.T) {
	t.Parallel()
	const uploads = "/blobs/uploads/"
	other := string(digest.FromString("other"))
	for name, row := range map[string]struct {
		method, part string
		answer       http.HandlerFunc
		want         error
		tries        int64 // at most; 0 for any
	}{
		"upload without Location":               {"POST", uploads, status(202), ocilocal.ErrProtocol, 3},
		"upload at a file":                      {"POST", uploads, status(202, "Location", "file:///etc/passwd"), ocilocal.ErrProtocol, 3},
		"upload with user information":          {"POST", uploads, status(202, "Location", "http://u:not%20to%20be%20seen@127.0.0.1/"), ocilocal.ErrProtocol, 3},
		"upload at no address":                  {"POST", uploads, status(202, "Location", "http://[::1"), ocilocal.ErrProtocol, 3},
		"upload refused":                        {"POST", uploads, status(403), ocilocal.ErrDenied, 3},
		"upload answered with 200":              {"POST", uploads, status(200), ocilocal.ErrProtocol, 3},
		"POST redirected":                       {"POST", uploads, status(302, "Location", "/elsewhere"), ocilocal.ErrProtocol, 3},
		"bytes refused":                         {"PUT", uploads, status(400), ocilocal.ErrRejected, 6},
		"bytes always too many":                 {"PUT", uploads, status(413), ocilocal.ErrTooLarge, 8},
		"bytes taken as others":                 {"PUT", uploads, status(201, "Docker-Content-Digest", other), ocilocal.ErrDigestMismatch, 6},
		"PUT redirected to another host":        {"PUT", uploads, status(307, "Location", "http://127.0.0.1:1/x"), ocilocal.ErrProtocol, 6},
		"upload never known":                    {"PUT", uploads, func(w http.ResponseWriter, _ *http.Request) { fail(w, 404, "BLOB_UPLOAD_UNKNOWN") }, ocilocal.ErrNotFound, 20},
		"upload fails for ever":                 {"PUT", uploads, status(502), ocilocal.ErrTransport, 20},
		"connection closed while bytes go":      {"PUT", uploads, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ocilocal.ErrTransport, 20},
		"manifest refused":                      {"PUT", "/manifests/", status(400), ocilocal.ErrRejected, 1},
		"manifest too large for the registry":   {"PUT", "/manifests/", status(413), ocilocal.ErrTooLarge, 1},
		"manifest taken as another":             {"PUT", "/manifests/", status(201, "Docker-Content-Digest", other), ocilocal.ErrDigestMismatch, 1},
		"manifest's answer has a bad digest":    {"PUT", "/manifests/", status(201, "Docker-Content-Digest", "sha256:x"), ocilocal.ErrProtocol, 1},
		"manifest's answer redirects elsewhere": {"PUT", "/manifests/", status(307, "Location", "http://127.0.0.1:1/x"), ocilocal.ErrProtocol, 1},
	} {
		t.Run(name, func(t *testing.T) {
			v := &victim{server: newServer(t)}
			v.onMethod(row.method, row.part, row.answer)
			r := openRemote(t, nil)
			ref := v.ref("org/model:v1")
			a := pushed(t, r, ref, nil, nil, noise(1, 1000), noise(2, 100_000))
			_, err := r.Push(t.Context(), ref, nil)
			if e, ok := errors.AsType[*ocilocal.RemoteError](err); !errors.Is(err, row.want) || !ok || e.Method == "" {
				t.Errorf("%v, want %v", err, row.want)
			}
			checkRemoteMessage(t, err)
			if n := v.tries.Load(); row.tries > 0 && (n == 0 || n > row.tries) {
				t.Errorf("%d requests, at most %d", n, row.tries)
			}
			if v.at("org/model", "v1").digest != "" || v.at("org/model", string(a.Digest())).digest != "" {
				t.Error("the manifest is there")
			}
			v.behave()
			if _, err := r.Push(t.Context(), ref, nil); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestPushHostileChunks: a registry states wrong offsets of an upload in chunks. The blob arrives,
// or the push fails.
func TestPushHostileChunks(t *testing.T) {
	type answer func(v *victim, w http.ResponseWriter, r *http.Request, n int64) (done bool)
	// says answers the nth chunk with a Range.
	says := func(text func(n int64) string) answer {
		return func(_ *victim, w http.ResponseWriter, r *http.Request, n int64) bool {
			status(202, "Location", r.URL.String(), "Range", text(n))(w, r)
			return true
		}
	}
	always := func(text string) answer { return says(func(int64) string { return text }) }
	for name, row := range map[string]struct {
		answer answer
		want   error
	}{
		"Range goes backward for ever": {always("0-0"), ocilocal.ErrRejected},
		"Range beyond what was sent":   {always("0-99999999999"), ocilocal.ErrRejected},
		"one byte of each chunk":       {says(func(n int64) string { return fmt.Sprintf("0-%d", n-1) }), ocilocal.ErrRejected},
		"Range is nonsense":            {always("5-"), ocilocal.ErrRejected},
		"to and fro":                   {says(func(n int64) string { return fmt.Sprintf("0-%d", 100_000*(1+n%2)-1) }), ocilocal.ErrRejected},
		"no Location": {func(_ *victim, w http.ResponseWriter, r *http.Request, _ int64) bool {
			status(202, "Range", "0-99999")(w, r)
			return true
		}, ocilocal.ErrRejected},
		"half a chunk is lost once": {func(v *victim, w http.ResponseWriter, r *http.Request, n int64) bool {
			if n != 2 {
				return false
			}
			halfChunk(r)
			return false
		}, nil},
		"a chunk arrives and its answer doesn't": {func(v *victim, w http.ResponseWriter, r *http.Request, n int64) bool {
			if n != 2 {
				return false
			}
			v.plain(&cutWriter{ResponseWriter: w}, r)
			panic(http.ErrAbortHandler)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			v := &victim{server: newServer(t)}
			v.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				return r.Method == "PATCH" && row.answer(v, w, r, v.tries.Add(1))
			})
			r := openRemote(t, nil)
			ref := v.ref("org/model:v1")
			pushed(t, r, ref, nil, nil, noise(2, 450_000))
			_, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{ChunkSize: 100_000})
			if !errors.Is(err, row.want) {
				t.Errorf("%v, want %v", err, row.want)
			}
			if v.tries.Load() > 200 {
				t.Errorf("%d chunks", v.tries.Load())
			}
			if row.want == nil {
				if _, err := openRemote(t, nil).Pull(t.Context(), ref, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestPushDamaged: a damaged blob never arrives whole, and the error says which side failed.
func TestPushDamaged(t *testing.T) {
	for _, chunk := range []int64{0, 10_000} {
		s := newServer(t)
		r := openRemote(t, nil)
		ref := s.ref("org/model:v1")
		pushed(t, r, ref, nil, nil, noise(1, 100_000))
		d := digest.FromBytes(noise(1, 100_000))
		rewrite(t, blobFile(r, d), func(b []byte) []byte { b[50_000] ^= 1; return b })
		_, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{ChunkSize: chunk})
		if _, remote := errors.AsType[*ocilocal.RemoteError](err); !errors.Is(err, ocilocal.ErrDigestMismatch) || remote {
			t.Errorf("%v", err)
		}
		large := func(name string) bool {
			return !strings.Contains(name, "index.sqlite3") && fileSize(t, name) >= 100_000
		}
		if kept := filesBelow(t, s.local(), ""); s.at("org/model", "v1").digest != "" || slices.ContainsFunc(kept, large) {
			t.Errorf("there is %q", kept)
		}
	}
}

// TestPushReferrersTagTaken: a referrers tag that is not a list of referrers is not changed.
func TestPushReferrersTagTaken(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
	if _, err := r.Push(t.Context(), subject.Reference(), nil); err != nil {
		t.Fatal(err)
	}
	tag := "sha256-" + subject.Digest().Encoded()
	taken := s.put(t, "org/model", tag, noise(3, 10))
	pushed(t, r, s.ref("org/model:sig"), nil, descOf(subject), noise(2, 10))
	_, err := r.Push(t.Context(), s.ref("org/model:sig"), nil)
	if err == nil || !strings.Contains(err.Error(), "is pushed, but not listed") {
		t.Error(err)
	}
	if s.at("org/model", tag).digest != taken {
		t.Error("the tag was overwritten")
	}
}

// TestPushReferrersRace: another client adds a referrer at the same moment. Neither is lost.
func TestPushReferrersRace(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
	if _, err := r.Push(t.Context(), subject.Reference(), nil); err != nil {
		t.Fatal(err)
	}
	pushed(t, r, s.ref("org/model:a"), nil, descOf(subject), noise(2, 10))
	if _, err := r.Push(t.Context(), s.ref("org/model:a"), nil); err != nil {
		t.Fatal(err)
	}
	// Client c writes between the read and the write of client b.
	for i, name := range []string{"b", "c"} {
		pushed(t, r, s.ref("org/model:"+name), nil, descOf(subject), noise(byte(3+i), 10))
	}
	tag := "/manifests/sha256-" + subject.Digest().Encoded()
	var interposed atomic.Bool
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method == "PUT" && strings.HasSuffix(q.URL.Path, tag) && !interposed.Swap(true) {
			if _, err := openRemote(t, nil).Push(t.Context(), s.ref("org/model:c"), nil); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Error(err)
			}
			other := &ocilocal.Remote{Retry: quick}
			defer other.CloseIdleConnections()
			if _, err := r.Push(t.Context(), s.ref("org/model:c"), &ocilocal.PushOptions{Remote: other}); err != nil {
				t.Error(err)
			}
		}
		return false
	})
	if _, err := r.Push(t.Context(), s.ref("org/model:b"), nil); err != nil {
		t.Fatal(err)
	}
	s.behave()
	remote := &ocilocal.Remote{}
	defer remote.CloseIdleConnections()
	n := 0
	for _, err := range remote.Referrers(t.Context(), subject.Reference(), "") {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != 3 {
		t.Errorf("%d referrers", n)
	}
}

// TestRemoteListsHostile: lists whose pages go in circles, never end, or lead elsewhere.
func TestRemoteListsHostile(t *testing.T) {
	page := func(h http.Header, w http.ResponseWriter, body string) {
		for k, v := range h {
			w.Header()[k] = v
		}
		io.WriteString(w, body)
	}
	n := 0
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   error
		tags   int
	}{
		"to itself": {func(w http.ResponseWriter, r *http.Request) {
			page(http.Header{"Link": {`<` + r.URL.RequestURI() + `>; rel="next"`}}, w, `{"tags":["a"]}`)
		}, ocilocal.ErrProtocol, 1},
		"for ever": {func(w http.ResponseWriter, r *http.Request) {
			n++
			page(http.Header{"Link": {fmt.Sprintf(`<?n=%d>; rel="next"`, n)}}, w, `{"tags":["a"]}`)
		}, ocilocal.ErrProtocol, 1000},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			page(http.Header{"Link": {`<http://127.0.0.1:1/v2/x>; rel="next"`}}, w, `{"tags":["a"]}`)
		}, ocilocal.ErrProtocol, 1},
		"huge":      {endless("Content-Type", "application/json"), ocilocal.ErrTooLarge, 0},
		"no JSON":   {body([]byte("tags")), ocilocal.ErrProtocol, 0},
		"bad names": {body([]byte(`{"tags":["good","../bad","","bad tag","bad\nline"]}`)), nil, 1},
		"none":      {body([]byte(`{"name":"org/model","tags":null}`)), nil, 0},
	} {
		v := &victim{server: newServer(t)}
		v.onMethod("GET", "/tags/list", c.answer)
		remote := &ocilocal.Remote{Retry: quick}
		defer remote.CloseIdleConnections()
		var last error
		got := 0
		for _, err := range remote.Tags(t.Context(), v.ref("org/model")) {
			if last = err; err == nil {
				got++
			}
		}
		if !errors.Is(last, c.want) || got != c.tags {
			t.Errorf("%s: %d tags, %v", name, got, last)
		}
		checkRemoteMessage(t, last)
	}
	// Lists of referrers that are not an image index.
	v := newVictim(t)
	v.on("/referrers/"+string(v.manifest.digest), body(v.manifest.body, "Content-Type", ocispec.MediaTypeImageManifest))
	remote := &ocilocal.Remote{}
	defer remote.CloseIdleConnections()
	for d, err := range remote.Referrers(t.Context(), v.ref("org/model:v1"), "") {
		if !errors.Is(err, ocilocal.ErrProtocol) {
			t.Errorf("%v, %v", d, err)
		}
	}
}
