package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// mirrored returns a client of a registry with mirrors.
func mirrored(t testing.TB, s *server, mirrors ...ocilocal.Mirror) *ocilocal.Remote {
	t.Helper()
	remote := &ocilocal.Remote{Retry: quick, Mirrors: map[string][]ocilocal.Mirror{s.host: mirrors}}
	t.Cleanup(remote.CloseIdleConnections)
	return remote
}

// sentTo reports whether a request to s had a header whose value contains a text.
func (s *server) sentTo(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.headers, func(h http.Header) bool { return strings.Contains(fmt.Sprint(h), text) })
}

// TestMirror: a pull asks the registry where the tag points, and the mirror for the content. Each
// gets its own credential.
func TestMirror(t *testing.T) {
	s, m := newServer(t), newServer(t)
	s.user, s.password = "me", "for-the-registry"
	m.user, m.password = "other", "for-the-mirror"
	large := noise(1, 3<<20)
	want := s.put(t, "org/model", "v1", large, noise(2, 100))
	m.put(t, "cache/org/model", "", large, noise(2, 100))
	remote := mirrored(t, s, ocilocal.Mirror{Location: m.host + "/cache"})
	var asked []string
	remote.Credentials = func(_ context.Context, host, repository string) (ocilocal.Credential, error) {
		asked = append(asked, host+"/"+repository)
		if host == m.host {
			return ocilocal.Credential{Username: m.user, Password: m.password}, nil
		}
		return ocilocal.Credential{Username: s.user, Password: s.password}, nil
	}
	r := openRemote(t, remote)
	got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
	if err != nil || got.Artifact.Digest() != want || got.Artifact.Reference() != s.ref("org/model:v1") {
		t.Fatalf("%+v, %v", got, err)
	}
	if n := len(s.requests("")); n != 2 || len(s.requests("HEAD")) != n { // one of them is challenged
		t.Errorf("%q", s.requests(""))
	}
	if m.served() != int64(len(large)+102) || len(m.requests("/manifests/v1")) > 0 || len(m.requests("ns="+strings.Replace(s.host, ":", "%3A", 1))) != len(m.requests("")) {
		t.Errorf("%d bytes, %q", m.served(), m.requests(""))
	}
	basic := func(user, password string) string {
		req := http.Request{Header: http.Header{}}
		req.SetBasicAuth(user, password)
		return req.Header.Get("Authorization")
	}
	if m.sentTo(basic(s.user, s.password)) || s.sentTo(basic(m.user, m.password)) || !m.sentTo(basic(m.user, m.password)) {
		t.Error("a credential went to the other host, or not to its own")
	}
	if slices.Sort(asked); !slices.Equal(slices.Compact(asked), slices.Sorted(slices.Values([]string{s.host + "/org/model", m.host + "/cache/org/model"}))) {
		t.Errorf("credentials were asked for %q", asked)
	}
	if found := problems(t, r, nil, nil); len(found) > 0 {
		t.Errorf("%q", found)
	}
}

// TestMirrorFails: a mirror that fails in any way costs one request, because the registry has the
// content.
func TestMirrorFails(t *testing.T) {
	other := newServer(t)
	other.overrideBy(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, "<html>log in</html>")
		return true
	})
	large, small := noise(1, 3<<20), noise(2, 100)
	wrong := func(n int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Write(noise(9, n)) }
	}
	origin := newServer(t)
	want := origin.put(t, "org/model", "v1", large, small)
	for name, c := range map[string]struct {
		manifest, large, small http.HandlerFunc // nil: as it should
	}{
		"404":                {status(404), nil, nil},
		"404 of blobs":       {nil, status(404), status(404)},
		"404 of a proxy":     {http.NotFound, http.NotFound, http.NotFound},
		"401":                {status(401), nil, nil},
		"401 with challenge": {status(401, "WWW-Authenticate", "Basic realm=x"), nil, nil},
		"403":                {nil, status(403), status(403)},
		"429":                {status(429, "Retry-After", "1000"), nil, nil},
		"500":                {nil, status(500), status(500)},
		"200 in HTML":        {body([]byte("<html></html>"), "Content-Type", "text/html"), nil, nil},
		"a page to log in":   {status(302, "Location", other.URL), status(302, "Location", other.URL), status(302, "Location", other.URL)},
		"another manifest":   {body([]byte(`{"schemaVersion":2,"manifests":[]}`), "Content-Type", ocispec.MediaTypeImageIndex), nil, nil},
		"other bytes":        {nil, wrong(len(large)), wrong(len(small))},
		"more bytes":         {nil, wrong(len(large) + 1), wrong(len(small) + 1)},
		"broken off": {nil, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(large)))
			w.Write(large[:2<<20])
			panic(http.ErrAbortHandler)
		}, nil},
		"broken off, with other bytes": {nil, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(large)))
			w.Write(noise(9, 2<<20))
			panic(http.ErrAbortHandler)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, m := newServer(t), newServer(t)
			s.origin, m.origin = origin, origin
			m.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
				for end, answer := range map[digest.Digest]http.HandlerFunc{want: c.manifest, digest.FromBytes(large): c.large, digest.FromBytes(small): c.small} {
					if strings.HasSuffix(q.URL.Path, string(end)) && answer != nil {
						answer(w, q)
						return true
					}
				}
				return false
			})
			r := openRemote(t, mirrored(t, s, ocilocal.Mirror{Location: m.host}))
			got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
			if err != nil || got.Artifact.Digest() != want {
				t.Fatalf("%+v, %v", got, err)
			}
			if len(m.requests("")) == 0 {
				t.Error("the mirror was not asked")
			}
			if name == "broken off" && s.served() >= int64(len(large)) {
				t.Errorf("the registry served %d bytes again that the mirror had sent", s.served())
			}
			if found := problems(t, r, nil, nil); len(found) > 0 {
				t.Errorf("%q", found)
			}
		})
	}
}

// TestMirrorRests: an unreachable mirror is asked once, and not for each blob.
func TestMirrorRests(t *testing.T) {
	s, m := newServer(t), newServer(t)
	s.put(t, "org/model", "v1", noise(1, 2<<20), noise(2, 100), noise(3, 100))
	m.overrideBy(func(w http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) })
	remote := mirrored(t, s, ocilocal.Mirror{Location: m.host}, ocilocal.Mirror{Location: s.host})
	for range 2 {
		if _, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(m.requests("")); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
}

// TestMirrorTags: only a mirror with Tags is asked where a tag points. If it does not know, the
// registry is asked.
func TestMirrorTags(t *testing.T) {
	s, m := newServer(t), newServer(t)
	fresh := s.put(t, "org/model", "v1", noise(1, 100))
	old := m.put(t, "org/model", "v1", noise(2, 100))
	for _, tags := range []bool{false, true} {
		remote := mirrored(t, s, ocilocal.Mirror{Location: m.host, Tags: tags})
		want := fresh
		if tags {
			want = old
		}
		if d, err := remote.Resolve(t.Context(), s.ref("org/model:v1")); err != nil || d.Digest != want {
			t.Error(tags, d, err)
		}
		if d, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); err != nil || d.Digest() != want {
			t.Error(tags, d, err)
		}
		if got, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || got.Artifact.Digest() != want {
			t.Errorf("%v: %+v, %v", tags, got, err)
		}
	}
	s.put(t, "org/model", "v2", noise(3, 100))
	remote := mirrored(t, s, ocilocal.Mirror{Location: m.host, Tags: true})
	if _, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v2"), nil); err != nil {
		t.Error(err)
	}
	// If the registry is down, such a mirror is enough.
	s.overrideBy(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	if got, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || got.Artifact.Digest() != old {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestMirrorAbsence: only the registry can say that something is absent. The error also names the
// mirrors that failed.
func TestMirrorAbsence(t *testing.T) {
	s, m := newServer(t), newServer(t)
	remote := mirrored(t, s, ocilocal.Mirror{Location: m.host, Tags: true})
	_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
	mustFail(t, err, ocilocal.ErrNotFound)
	s.overrideBy(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(500)
		return true
	})
	for name, ask := range map[string]func() error{
		"resolve":  func() error { _, err := remote.Resolve(t.Context(), s.ref("org/model:v1")); return err },
		"manifest": func() error { _, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); return err },
		"pull": func() error {
			_, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil)
			return err
		},
	} {
		err := ask()
		if errors.Is(err, ocilocal.ErrNotFound) || !errors.Is(err, ocilocal.ErrTransport) || !strings.Contains(err.Error(), "mirror "+m.host) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// By digest, the mirror has content that the registry has lost.
	s.behave()
	d := m.put(t, "org/model", "", noise(1, 100))
	ref, err := s.ref("org/model").WithDigest(d)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := openRemote(t, remote).Pull(t.Context(), ref, nil); err != nil || got.Artifact.Digest() != d {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestMirrorOnlyRead: a mirror is never written to. Calls that write or list do not ask it.
func TestMirrorOnlyRead(t *testing.T) {
	s, m := newServer(t), newServer(t)
	remote := mirrored(t, s, ocilocal.Mirror{Location: m.host, Tags: true})
	r := openRemote(t, remote)
	subject, _ := withSignatures(t, r, s, 1)
	m.put(t, "org/model", "v1", noise(1, 10))
	for range 2 {
		if _, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true, Tags: []string{"v2"}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range remote.Referrers(t.Context(), subject.Reference(), "") {
		if err != nil {
			t.Error(err)
		}
	}
	for _, err := range remote.Tags(t.Context(), subject.Reference()) {
		if err != nil {
			t.Error(err)
		}
	}
	if _, err := remote.Tag(t.Context(), subject.Reference(), "v3"); err != nil {
		t.Error(err)
	}
	if _, err := remote.Copy(t.Context(), subject.Reference(), s.ref("org/copy:v1"), nil); err != nil {
		t.Error(err)
	}
	if err := remote.Delete(t.Context(), s.ref("org/model:v3")); err != nil {
		t.Error(err)
	}
	if got := m.requests(""); len(got) > 0 {
		t.Errorf("the mirror was asked: %q", got)
	}
}

// TestMirrorCancelled: the end of the call's context does not count as a failure of a mirror.
func TestMirrorCancelled(t *testing.T) {
	s, m := newServer(t), newServer(t)
	s.put(t, "org/model", "v1", noise(1, 100))
	m.put(t, "org/model", "", noise(1, 100))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m.overrideBy(func(_ http.ResponseWriter, q *http.Request) bool {
		cancel()
		<-q.Context().Done()
		return true
	})
	remote := mirrored(t, s, ocilocal.Mirror{Location: m.host})
	if _, err := openRemote(t, remote).Pull(ctx, s.ref("org/model:v1"), nil); !errors.Is(err, context.Canceled) || len(s.requests("")) != 1 {
		t.Errorf("%v, %q", err, s.requests(""))
	}
	m.behave()
	if _, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || m.served() != 102 {
		t.Errorf("%v, the mirror served %d bytes", err, m.served())
	}
}

// TestMirrorLocations has good and bad values of Mirror.Location.
func TestMirrorLocations(t *testing.T) {
	s := newServer(t)
	for _, location := range []string{"", "https://mirror.example.com", "mirror", "mirror/hub", "mirror.example.com/", "mirror.example.com/Hub", "mirror.example.com/a:b", "user@mirror.example.com"} {
		_, err := mirrored(t, s, ocilocal.Mirror{Location: location}).Resolve(t.Context(), s.ref("org/model:v1"))
		mustFail(t, err, ocilocal.ErrInvalidArgument)
	}
	if n := len(s.requests("")); n > 0 {
		t.Errorf("%d requests", n)
	}
}
