package ocilocal_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// referrersOf returns the referrers that a registry lists.
func referrersOf(t testing.TB, ref ocilocal.Reference) (list []digest.Digest, last error) {
	t.Helper()
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	for d, err := range remote.Referrers(t.Context(), ref, "") {
		if err != nil {
			return list, err
		}
		list = append(list, d.Digest)
	}
	return list, nil
}

// withSignatures publishes an artifact with n referrers, in r and on s.
func withSignatures(t testing.TB, r *ocilocal.LocalRegistry, s *server, n int) (subject *ocilocal.LocalArtifact, signatures []*ocilocal.LocalArtifact) {
	t.Helper()
	subject = pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
	for i := range n {
		signatures = append(signatures, pushed(t, r, s.ref(fmt.Sprint("org/model:sig", i)), nil, descOf(subject), noise(byte(100+i), 10)))
	}
	return subject, signatures
}

// TestReferrersAPIDecision: a registry without a referrers API answers in many ways. Push,
// Referrers and Delete decide alike for all of them.
func TestReferrersAPIDecision(t *testing.T) {
	t.Parallel()
	login := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(w, "<html>log in</html>")
	}))
	defer login.Close()
	lost := httptest.NewServer(http.NotFoundHandler())
	defer lost.Close()
	index := func(text string) http.HandlerFunc {
		return body([]byte(text), "Content-Type", ocispec.MediaTypeImageIndex)
	}
	for name, answer := range map[string]http.HandlerFunc{
		"400": status(400), "401": status(401), "403": status(403), "404": status(404), "404 of a proxy": http.NotFound,
		"405": status(405), "406": status(406), "501": status(501), "204": status(204),
		"HTML":               body([]byte("<html></html>"), "Content-Type", "text/html"),
		"a page to log in":   status(307, "Location", login.URL+"/in"),
		"303 to such a page": status(303, "Location", login.URL+"/in"),
		"redirect to 404":    status(302, "Location", lost.URL+"/in"),
		"redirect to file":   status(302, "Location", "file:///etc/passwd"),
		"null":               index(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":null}`),
		"nothing":            index(``),
		"an empty object":    body([]byte(`{}`), "Content-Type", "application/json"),
		"another type":       body([]byte(`{"schemaVersion":2,"manifests":[]}`), "Content-Type", ocispec.MediaTypeImageManifest),
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.noReferrers = true
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/referrers/") {
					answer(w, r)
					return true
				}
				return false
			})
			r := openRemote(t, nil)
			subject, signatures := withSignatures(t, r, s, 2)
			for _, a := range append(signatures, subject) {
				if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != 2 {
				t.Errorf("%q, %v", got, err)
			}
			gone, err := s.ref("org/model").WithDigest(signatures[0].Digest())
			if err != nil {
				t.Fatal(err)
			}
			remote := &ocilocal.Remote{Retry: quick}
			defer remote.CloseIdleConnections()
			if err := remote.Delete(t.Context(), gone); err != nil {
				t.Error(err)
			}
			if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != 1 || got[0] != signatures[1].Digest() {
				t.Errorf("after deletion: %q, %v", got, err)
			}
		})
	}
}

// TestReferrersStrayAbsence: no 404 of a server that can't know makes Push replace an existing
// list, or makes Referrers return nothing.
func TestReferrersStrayAbsence(t *testing.T) {
	for name, stray := range map[string]func(s *server) http.HandlerFunc{
		"a proxy's 404": func(*server) http.HandlerFunc { return http.NotFound },
		"404 of a redirect's target": func(s *server) http.HandlerFunc {
			lost := httptest.NewServer(http.HandlerFunc(status(404)))
			t.Cleanup(lost.Close)
			return status(307, "Location", lost.URL+"/x")
		},
		"404 of the token server": func(s *server) http.HandlerFunc {
			return status(401, "WWW-Authenticate", `Bearer realm="`+s.URL+`/lost",service="x"`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.noReferrers = true
			r := openRemote(t, nil)
			subject, signatures := withSignatures(t, r, s, 3)
			for _, a := range append(signatures[:2:2], subject) {
				if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
					t.Fatal(err)
				}
			}
			tag := "/manifests/sha256-" + subject.Digest().Encoded()
			var strays atomic.Int64
			answer := stray(s)
			s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
				if q.Method == "GET" && strings.HasSuffix(q.URL.Path, tag) && strays.Add(1) == 1 {
					answer(w, q)
					return true
				}
				return false
			})
			listed, err := referrersOf(t, subject.Reference())
			if err == nil && len(listed) != 2 || errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("listed %q, %v", listed, err)
			}
			strays.Store(0)
			_, err = r.Push(t.Context(), signatures[2].Reference(), nil)
			s.behave()
			want := 3
			if err != nil {
				want = 2 // and the caller knows
			}
			if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != want {
				t.Errorf("%d referrers, want %d: %v", len(got), want, err)
			}
		})
	}
}

// TestReferrersFirst: two clients add the first referrers at the same moment. With conditional
// requests neither is lost. Without them, the client that was overwritten adds its own again.
func TestReferrersFirst(t *testing.T) {
	for name, honours := range map[string]bool{"conditions are honoured": true, "conditions are ignored": false} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.noReferrers = true
			r := openRemote(t, nil)
			subject, signatures := withSignatures(t, r, s, 2)
			if _, err := r.Push(t.Context(), subject.Reference(), nil); err != nil {
				t.Fatal(err)
			}
			tag := "/manifests/sha256-" + subject.Digest().Encoded()
			var conditions atomic.Int64
			var interposed atomic.Bool
			s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
				if q.Method != "PUT" || !strings.HasSuffix(q.URL.Path, tag) {
					return false
				}
				if q.Header.Get("If-None-Match") == "*" {
					conditions.Add(1)
				}
				if !interposed.Swap(true) { // between the reading and the writing, another client comes
					other := &ocilocal.Remote{Retry: quick}
					defer other.CloseIdleConnections()
					if _, err := r.Push(t.Context(), signatures[1].Reference(), &ocilocal.PushOptions{Remote: other}); err != nil {
						t.Error(err)
					}
					if !honours { // it comes in between again, and overwrites what comes now
						rec := httptest.NewRecorder()
						list := s.at("org/model", strings.TrimPrefix(tag, "/manifests/"))
						s.plain(rec, q)
						s.putRaw("org/model", strings.TrimPrefix(tag, "/manifests/"), list.mediaType, list.body)
						w.WriteHeader(201)
						return true
					}
				}
				exists := s.at("org/model", strings.TrimPrefix(tag, "/manifests/")).digest != ""
				if honours && exists && q.Header.Get("If-None-Match") == "*" {
					fail(w, 412, "DENIED")
					return true
				}
				return false
			})
			if _, err := r.Push(t.Context(), signatures[0].Reference(), nil); err != nil {
				t.Fatal(err)
			}
			if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != 2 || conditions.Load() < 2 {
				t.Errorf("%q, %v, %d conditions", got, err, conditions.Load())
			}
		})
	}
}

// TestReferrersStrayPageOfAPI: the page of a proxy in place of the referrers API's answer does not
// mean that there are no referrers.
func TestReferrersStrayPageOfAPI(t *testing.T) {
	for name, page := range map[string]http.HandlerFunc{
		"text": http.NotFound,
		"HTML": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(404)
			io.WriteString(w, "<html>not here</html>")
		},
		"JSON": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(404)
			io.WriteString(w, `{"error":"no route"}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			r := openRemote(t, nil)
			subject, signatures := withSignatures(t, r, s, 2)
			for _, a := range append(signatures, subject) {
				if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
					t.Fatal(err)
				}
			}
			var strays atomic.Int64
			s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
				if strings.Contains(q.URL.Path, "/referrers/") && strays.Add(1) == 1 {
					page(w, q)
					return true
				}
				return false
			})
			if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != 2 {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// A weak ETag never matches (RFC 9110, section 13.1.1), so it must not be sent as a condition.
func TestReferrersWeakETag(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject, signatures := withSignatures(t, r, s, 2)
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method == "PUT" && strings.HasPrefix(q.Header.Get("If-Match"), "W/") {
			w.WriteHeader(412)
			return true
		}
		if q.Method == "GET" && strings.Contains(q.URL.Path, "/manifests/sha256-") {
			m := s.at("org/model", path.Base(q.URL.Path))
			if m.digest == "" {
				return false
			}
			w.Header().Set("Content-Type", m.mediaType)
			w.Header().Set("ETag", `W/"`+string(m.digest)+`"`)
			w.Write(m.body)
			return true
		}
		return false
	})
	for _, a := range append(signatures, subject) {
		if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != 2 {
		t.Errorf("%q, %v", got, err)
	}
}

// TestReferrersOverwritten: a registry says that it took a list, and another client overwrites it
// at once. The lists are merged.
func TestReferrersOverwritten(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject, signatures := withSignatures(t, r, s, 2)
	tag := "sha256-" + subject.Digest().Encoded()
	var writes atomic.Int64
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method != "PUT" || !strings.HasSuffix(q.URL.Path, tag) {
			return false
		}
		b, _ := io.ReadAll(q.Body)
		s.plant("org/model", tag, ocispec.MediaTypeImageIndex, b)
		if writes.Add(1) == 1 {
			d := signatures[1].Descriptor()
			s.plant("org/model", tag, ocispec.MediaTypeImageIndex, fmt.Appendf(nil,
				`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
				ocispec.MediaTypeImageIndex, d.MediaType, d.Digest, d.Size))
		}
		w.WriteHeader(202)
		return true
	})
	if _, err := r.Push(t.Context(), signatures[0].Reference(), nil); err != nil {
		t.Fatal(err)
	}
	if got, err := referrersOf(t, s.ref("org/model@"+string(subject.Digest()))); err != nil || len(got) != 2 {
		t.Errorf("%q, %v", got, err)
	}
}
