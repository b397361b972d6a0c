package ocilocal_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestRemoteCopy copies an artifact from one registry to another, and within one, without storing
// it.
func TestRemoteCopy(t *testing.T) {
	a, b := newServer(t), newServer(t)
	large := noise(1, 3<<20)
	child := a.put(t, "org/model", "v1", large, noise(2, 100), nil)
	index := a.putRaw("org/model", "multi", ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, child, len(a.at("org/model", string(child)).body)))
	remote := &ocilocal.Remote{Retry: quick, MaxPerHost: 1}
	defer remote.CloseIdleConnections()
	other := &ocilocal.Remote{Retry: quick}
	defer other.CloseIdleConnections()
	if d, err := remote.Copy(t.Context(), a.ref("org/model:multi"), b.ref("team/copy:v1"), other); err != nil || d.Digest != index {
		t.Fatal(d, err)
	}
	if got, err := openRemote(t, nil).Pull(t.Context(), b.ref("team/copy:v1"), nil); err != nil || got.Artifact.Digest() != index {
		t.Errorf("%+v, %v", got, err)
	}
	// Within one registry, with and without mounts.
	for _, noMount := range []bool{false, true} {
		a.noMount = noMount
		to := a.ref(fmt.Sprint("team/copy", noMount, ":v1"))
		to = ocilocal.MustParseReference(strings.ToLower(to.String()))
		a.forget()
		if _, err := remote.Copy(t.Context(), a.ref("org/model:v1"), to, nil); err != nil {
			t.Error(err)
		}
		if d, err := other.Resolve(t.Context(), to); err != nil || d.Digest != child {
			t.Error(d, err)
		}
		if !noMount && a.served() > 0 {
			t.Errorf("%d bytes were served although blobs can be mounted", a.served())
		}
	}
	// Bytes that do not have the digest do not arrive.
	a.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != "GET" || !strings.HasSuffix(r.URL.Path, string(digest.FromBytes(large))) {
			return false
		}
		w.Write(noise(9, len(large)))
		return true
	})
	_, err := remote.Copy(t.Context(), a.ref("org/model:v1"), b.ref("team/bad:v1"), other)
	mustFail(t, err, ocilocal.ErrDigestMismatch)
	if _, err := other.Resolve(t.Context(), b.ref("team/bad:v1")); err == nil {
		t.Error("it arrived")
	}
}

// TestRemoteCopySendsCredentials: a copy within one registry sends credentials with the first
// request if SendCredentials says so.
func TestRemoteCopySendsCredentials(t *testing.T) {
	s := newServer(t)
	want := s.put(t, "org/model", "v1", noise(1, 100))
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if user, _, _ := r.BasicAuth(); user != "me" {
			fail(w, 404, "NAME_UNKNOWN") // it hides what it has
			return true
		}
		return false
	})
	remote := &ocilocal.Remote{Retry: quick, SendCredentials: func(string) bool { return true },
		Credentials: ocilocal.StaticCredential(s.host, ocilocal.Credential{Username: "me", Password: "x"})}
	defer remote.CloseIdleConnections()
	if d, err := remote.Copy(t.Context(), s.ref("org/model:v1"), s.ref("org/model:v2"), nil); err != nil || d.Digest != want {
		t.Error(d, err)
	}
}

// TestRemoteCopyRepeats: Copy repeats temporary failures. It does not take them for a sign that the
// blob is too large.
func TestRemoteCopyRepeats(t *testing.T) {
	a, b := newServer(t), newServer(t)
	want := a.put(t, "org/model", "v1", noise(1, 1<<20))
	var failures atomic.Int64
	b.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == "PUT" && strings.Contains(r.URL.Path, "/blobs/uploads/") && r.ContentLength > 1<<16 && failures.Add(1) <= 3 {
			io.Copy(io.Discard, r.Body)
			w.WriteHeader(502)
			return true
		}
		return false
	})
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	if d, err := remote.Copy(t.Context(), a.ref("org/model:v1"), b.ref("org/model:v1"), remote); err != nil || d.Digest != want {
		t.Error(d, err)
	}
	b.maxPut = 1 << 19 // a limit that is stated counts at once
	a.put(t, "org/model", "v2", noise(2, 1<<20))
	_, err := remote.Copy(t.Context(), a.ref("org/model:v2"), b.ref("org/model:v2"), remote)
	mustFail(t, err, ocilocal.ErrTooLarge)
}

// TestRemoteCopyOrder: an image index and its member need the same blob. The blob is at the
// destination before the member is put.
func TestRemoteCopyOrder(t *testing.T) {
	a, b := newServer(t), newServer(t)
	large := noise(1, 8<<20)
	member := a.put(t, "org/model", "", large)
	index := a.putRaw("org/model", "multi", ocispec.MediaTypeImageIndex, fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":"application/x-layer","digest":%q,"size":%d},{"mediaType":%q,"digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageIndex, digest.FromBytes(large), len(large),
		ocispec.MediaTypeImageManifest, member, len(a.at("org/model", string(member)).body)))
	var early atomic.Bool
	a.overrideBy(func(_ http.ResponseWriter, q *http.Request) bool {
		if strings.HasSuffix(q.URL.Path, string(member)) { // its turn has come
			if b.blobSize("org/model", digest.FromBytes(large)) < 0 {
				early.Store(true)
			}
		}
		return false
	})
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	d, err := remote.Copy(t.Context(), a.ref("org/model:multi"), b.ref("org/model:multi"), remote)
	if err != nil || d.Digest != index || early.Load() {
		t.Errorf("%v, %v, a manifest before its blob: %t", d, err, early.Load())
	}
}
