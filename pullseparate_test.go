package ocilocal_test

import (
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestPullHeaderNamesSecret: a registry names the digest of content that is here in a header, and
// has no such manifest. The pull must not give that content a name of the registry.
func TestPullHeaderNamesSecret(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	secret, err := build(t, r, "internal.example/secret:v1", nil, "the secret")
	if err != nil {
		t.Fatal(err)
	}
	m, err := secret.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method != http.MethodHead {
			return false
		}
		w.Header().Set("Content-Type", m.MediaType())
		w.Header().Set("Docker-Content-Digest", string(m.Digest()))
		w.Header().Set("Content-Length", strconv.FormatInt(m.Size(), 10))
		return true
	})
	for _, o := range []ocilocal.PullOptions{
		{},
		{As: ocilocal.MustParseReference("other.example/a:v1")},
	} {
		_, err := r.Pull(t.Context(), s.ref("org/model:v1"), &o)
		mustFail(t, err, ocilocal.ErrNotFound)
	}
	for ref, err := range r.Refs(t.Context(), nil) {
		if err != nil || ref.Reference != secret.Reference() {
			t.Errorf("%v, %v", ref, err)
		}
	}
}

// TestPullSeparateRegistries: with SeparateRegistries, a manifest that names the digest of a secret
// does not get the secret: the registry must send the bytes. Bytes that the same registry has sent
// before are used.
func TestPullSeparateRegistries(t *testing.T) {
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	r := openTemp(t, &ocilocal.Options{Remote: remote, SeparateRegistries: true})
	secret, large := []byte("the secret"), noise(1, 2<<20)
	if _, err := build(t, r, "internal.example/secret:v1", nil, string(secret)); err != nil {
		t.Fatal(err)
	}
	a, b := newServer(t), newServer(t)
	a.put(t, "org/model", "v1", secret)
	a.plantBlob("org/model", digest.FromBytes(secret), nil) // it is lost
	_, err := r.Pull(t.Context(), a.ref("org/model:v1"), nil)
	mustFail(t, err, ocilocal.ErrNotFound)
	// The same by a digest that is here.
	own, err := r.Load(t.Context(), ocilocal.MustParseReference("internal.example/secret:v1"))
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := a.ref("org/model").WithDigest(own.Digest())
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Pull(t.Context(), pinned, nil)
	mustFail(t, err, ocilocal.ErrNotFound)

	// The same artifact from two registries is received from both.
	for _, s := range []*server{a, b} {
		s.put(t, "org/model", "v2", large)
		s.forget()
		got, err := r.Pull(t.Context(), s.ref("org/model:v2"), nil)
		if want := int64(len(large) + 2); err != nil || s.served() != want {
			t.Fatalf("%+v, %v: %d bytes were served, want %d", got, err, s.served(), want)
		}
	}
	// From the same registry it is received once, even as a member of an image index.
	child := a.put(t, "org/model", "", large)
	size := len(a.at("org/model", string(child)).body)
	a.putRaw("org/model", "multi", ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"mediaType":"`+ocispec.MediaTypeImageIndex+
		`","manifests":[{"mediaType":"`+ocispec.MediaTypeImageManifest+`","digest":"`+string(child)+`","size":`+strconv.Itoa(size)+`}]}`))
	a.put(t, "org/other", "v1", noise(2, 10), large)
	for _, ref := range []string{"org/model:multi", "org/other:v1"} {
		a.forget()
		if got, err := r.Pull(t.Context(), a.ref(ref), nil); err != nil || a.served() > 10 {
			t.Errorf("%s: %+v, %v: %d bytes were served", ref, got, err, a.served())
		}
	}
	// The bytes of an interrupted pull from another registry do not count.
	a.put(t, "org/model", "v3", noise(3, 4<<20))
	b.put(t, "org/model", "v3", noise(3, 4<<20))
	a.cutAfter(2<<20, 1)
	once := &ocilocal.Remote{Retry: func(int, error) (time.Duration, bool) { return 0, false }}
	defer once.CloseIdleConnections()
	_, err = r.Pull(t.Context(), a.ref("org/model:v3"), &ocilocal.PullOptions{Remote: once})
	mustFail(t, err, ocilocal.ErrTransport)
	b.forget()
	if got, err := r.Pull(t.Context(), b.ref("org/model:v3"), nil); err != nil || b.served() != 4<<20 {
		t.Errorf("%+v, %v: %d bytes were served", got, err, b.served())
	}
	if found := problems(t, r, nil, nil); len(found) > 0 {
		t.Errorf("%q", found)
	}
}

// TestPullMaxBytes: MaxBytes bounds the bytes that a pull adds. Content that is here already does
// not count.
func TestPullMaxBytes(t *testing.T) {
	s := newServer(t)
	d := s.put(t, "org/model", "v1", noise(1, 1000), noise(2, 2<<20))
	manifest := int64(len(s.at("org/model", string(d)).body))
	total := manifest + 2 + 1000 + 2<<20
	r := openRemote(t, nil)
	for _, limit := range []int64{1, manifest, total - 1} {
		s.forget()
		_, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{MaxBytes: limit})
		mustFail(t, err, ocilocal.ErrTooLarge)
		if s.served() > limit {
			t.Errorf("%d bytes were served, at most %d are wanted", s.served(), limit)
		}
		checkUnpublished(t, r)
	}
	for _, limit := range []int64{total, 1} {
		if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{MaxBytes: limit}); err != nil {
			t.Error(err)
		}
	}
}
