package ocilocal_test

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// pushed builds what a test pushes.
func pushed(t testing.TB, r *ocilocal.LocalRegistry, ref ocilocal.Reference, o *ocilocal.BuilderOptions, subject *ocispec.Descriptor, layers ...[]byte) *ocilocal.LocalArtifact {
	t.Helper()
	if o == nil {
		o = &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest}
	}
	return built(t, r, ref, *o, subject, func(b *ocilocal.Builder) error {
		for _, l := range layers {
			if _, err := b.AddLayerBytes(t.Context(), "application/x-layer", l, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// built builds an artifact of the tests' type, if the options name none. fill adds to it.
func built(t testing.TB, r *ocilocal.LocalRegistry, ref ocilocal.Reference, o ocilocal.BuilderOptions, subject *ocispec.Descriptor, fill func(b *ocilocal.Builder) error) *ocilocal.LocalArtifact {
	t.Helper()
	o.ArtifactType = cmp.Or(o.ArtifactType, testType)
	b, err := r.NewBuilder(ref, &o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if subject != nil {
		if err := b.SetSubject(*subject); err != nil {
			t.Fatal(err)
		}
	}
	if err := fill(b); err != nil {
		t.Fatal(err)
	}
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestPush pushes an artifact, pushes it again and under another name, and pulls it back.
func TestPush(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]*server{
		"whole":                {},
		"chunks wanted":        {minChunk: 1 << 20},
		"large bodies refused": {maxPut: 17 << 20},
		"basic":                {user: "me", password: "not to be seen"},
		"token":                {user: "me", password: "not to be seen", token: true},
	} {
		t.Run(name, func(t *testing.T) {
			server := newServer(t)
			server.minChunk, server.maxPut, server.user, server.password, server.token = s.minChunk, s.maxPut, s.user, s.password, s.token
			remote := &ocilocal.Remote{Credentials: ocilocal.StaticCredential(server.host, ocilocal.Credential{Username: s.user, Password: s.password})}
			r := openRemote(t, remote)
			ref := server.ref("org/model:v1")
			large := noise(9, 18<<20)
			a := pushed(t, r, ref, nil, nil, noise(1, 100), large)
			got, err := r.Push(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got.BlobsSent != 3 || got.BytesSent < int64(len(large)) || got.Descriptor.Digest != a.Digest() {
				t.Errorf("%+v", got)
			}
			if d := digest.FromBytes(large); server.blobSize("org/model", d) != int64(len(large)) {
				t.Error("the layer is not there")
			}
			chunks := len(server.requests("PATCH"))
			if wantChunks := s.minChunk > 0 || s.maxPut > 0; wantChunks != (chunks == 2) || !wantChunks && chunks > 0 {
				t.Errorf("%d chunks", chunks)
			}
			// Pushed again, nothing is sent.
			server.forget()
			if got, err = r.Push(t.Context(), ref, nil); err != nil || got.BlobsSent != 0 || got.BlobsPresent != 3 || len(server.requests("PUT")) != 0 {
				t.Errorf("%+v, %v, %q", got, err, server.requests("PUT"))
			}
			// Under another name in the same registry, nothing is sent either.
			other := server.ref("org/other:v1")
			if got, err = r.Push(t.Context(), ref, &ocilocal.PushOptions{As: other}); err != nil || got.BlobsSent != 0 || got.BlobsMounted != 3 || got.Reference != other {
				t.Errorf("%+v, %v", got, err)
			}
			// Pull it back.
			r2 := openRemote(t, &ocilocal.Remote{Credentials: remote.Credentials})
			back, err := r2.Pull(t.Context(), other, nil)
			if err != nil || back.Artifact.Digest() != a.Digest() {
				t.Errorf("%+v, %v", back, err)
			}
			for _, l := range server.requests("") {
				if strings.Contains(l, "seen") {
					t.Error("secret in an address:", l)
				}
			}
		})
	}
}

// TestPushReferrers pushes an artifact with a subject to registries with and without the referrers
// API.
func TestPushReferrers(t *testing.T) {
	for _, api := range []int{200, 404, 405} { // what its referrers API answers
		s := newServer(t)
		s.noReferrers = api != 200
		s.pageSize = 1
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			if api != 405 || !strings.Contains(r.URL.Path, "/referrers/") {
				return false
			}
			fail(w, 405, "UNSUPPORTED")
			return true
		})
		remote := &ocilocal.Remote{}
		r := openRemote(t, remote)
		subject := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
		desc := *descOf(subject)
		var want []digest.Digest
		for i, name := range []string{"org/model:a", "org/model:b"} {
			a := pushed(t, r, s.ref(name), &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest, ArtifactType: testType + name[len(name)-1:]}, &desc, noise(byte(i+2), 10))
			want = append(want, a.Digest())
		}
		for _, name := range []string{"org/model:v1", "org/model:a", "org/model:b", "org/model:b"} {
			if _, err := r.Push(t.Context(), s.ref(name), nil); err != nil {
				t.Fatal(err)
			}
		}
		list := func(artifactType string) (got []digest.Digest) {
			for d, err := range remote.Referrers(t.Context(), s.ref("org/model:v1"), artifactType) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, d.Digest)
			}
			slices.Sort(got)
			return got
		}
		if got := list(testType + "b"); !slices.Equal(got, want[1:]) {
			t.Errorf("%d: %v", api, got)
		}
		slices.Sort(want)
		if got := list(""); !slices.Equal(got, want) {
			t.Errorf("%d: %v, want %v", api, got, want)
		}
	}
}

// TestDeleteReferrer: a deleted manifest is removed from the list of referrers. The others stay in
// it.
func TestDeleteReferrer(t *testing.T) {
	for _, api := range []bool{true, false} {
		s := newServer(t)
		s.noReferrers = !api
		remote := &ocilocal.Remote{}
		r := openRemote(t, remote)
		subject := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
		var all []*ocilocal.LocalArtifact
		for i, tag := range []string{"a", "b"} {
			a := pushed(t, r, s.ref("org/model:"+tag), nil, descOf(subject), noise(byte(i+2), 10))
			if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
				t.Fatal(err)
			}
			all = append(all, a)
		}
		of := s.ref("org/model@" + string(subject.Digest()))
		for left := len(all); left > 0; left-- {
			a := all[left-1]
			// Deleting a tag does not delete the manifest.
			if err := remote.Delete(t.Context(), a.Reference()); err != nil {
				t.Fatal(err)
			}
			for _, want := range []int{left, left - 1} {
				n := 0
				for d, err := range remote.Referrers(t.Context(), of, "") {
					if n++; err != nil || !slices.ContainsFunc(all[:want], func(a *ocilocal.LocalArtifact) bool { return a.Digest() == d.Digest }) {
						t.Errorf("api %v: %v, %v", api, d, err)
					}
				}
				if n != want {
					t.Errorf("api %v: %d referrers, want %d", api, n, want)
				}
				if want == left {
					if err := remote.Delete(t.Context(), s.ref("org/model@"+string(a.Digest()))); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		// With the referrers API, no list is kept.
		if n := len(s.requests("PUT /v2/org/model/manifests/sha256-")); api != (n == 0) {
			t.Errorf("api %v: %d lists written", api, n)
		}
	}
}

// TestRemoteLists lists tags and referrers in pages.
func TestRemoteLists(t *testing.T) {
	s := newServer(t)
	s.pageSize = 2
	want := s.put(t, "org/model", "v1", noise(1, 10))
	for _, tag := range []string{"v2", "v3", "v4", "v5"} {
		s.put(t, "org/model", tag, noise(1, 10))
	}
	r := &ocilocal.Remote{}
	defer r.CloseIdleConnections()
	var tags []string
	for tag, err := range r.Tags(t.Context(), s.ref("org/model")) {
		if err != nil {
			t.Fatal(err)
		}
		tags = append(tags, tag)
	}
	if strings.Join(tags, " ") != "v1 v2 v3 v4 v5" || len(s.requests("tags/list")) != 3 {
		t.Errorf("%q by %q", tags, s.requests("tags"))
	}
	if d, err := r.Resolve(t.Context(), s.ref("org/model:v1")); err != nil || d.Digest != want || d.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("%v, %v", d, err)
	}
	if m, err := r.Manifest(t.Context(), s.ref("org/model:v1")); err != nil || m.Digest() != want || len(m.Layers()) != 1 {
		t.Error(err)
	}
	if err := r.Delete(t.Context(), s.ref("org/model:v1")); err != nil {
		t.Error(err)
	}
	if _, err := r.Resolve(t.Context(), s.ref("org/model:v1")); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
}

// TestRemoteDelete: registries refuse deletions in different ways. Some delete nothing, and some no
// tags.
func TestRemoteDelete(t *testing.T) {
	for code, want := range map[int]error{
		200: nil, 202: nil, 204: nil, 400: errors.ErrUnsupported, 403: ocilocal.ErrDenied, 404: ocilocal.ErrNotFound, 405: errors.ErrUnsupported,
	} {
		v := newVictim(t)
		v.onMethod("DELETE", "/manifests/v1", status(code))
		remote := &ocilocal.Remote{Retry: quick}
		defer remote.CloseIdleConnections()
		if err := remote.Delete(t.Context(), v.ref("org/model:v1")); !errors.Is(err, want) || v.tries.Load() != 1 {
			t.Errorf("%d: %v", code, err)
		}
	}
}

func descOf(a *ocilocal.LocalArtifact) *ocispec.Descriptor {
	d := a.Descriptor()
	return &ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// TestPushExpected: Push overwrites a remote tag, unless the tag is not at the expected digest.
func TestPushExpected(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	ref := s.ref("org/model:v1")
	there := s.put(t, "org/model", "v1", noise(9, 10))
	a := pushed(t, r, ref, nil, nil, noise(1, 10))
	for _, tag := range []string{"v1", "absent"} {
		_, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{As: s.ref("org/model:" + tag), Expected: a.Digest()})
		e, ok := errors.AsType[*ocilocal.ConflictError](err)
		if !ok || e.Incoming != a.Digest() || e.Expected != a.Digest() || tag == "v1" && e.Existing != there || tag == "absent" && e.Existing != "" {
			t.Errorf("%s: %v", tag, err)
		}
	}
	if got := s.at("org/model", "v1").digest; got != there {
		t.Errorf("the tag is at %s", got)
	}
	if _, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{Expected: there}); err != nil {
		t.Error(err)
	}
	if got := s.at("org/model", "v1").digest; got != a.Digest() {
		t.Errorf("the tag is at %s", got)
	}
}

// TestReferrersTravel: referrers are pushed and pulled with their artifact, recursively and by
// type.
func TestReferrersTravel(t *testing.T) {
	for _, noReferrers := range []bool{false, true} {
		s := newServer(t)
		s.noReferrers = noReferrers
		r := openRemote(t, nil)
		subject, signatures := withSignatures(t, r, s, 2)
		second := pushed(t, r, s.ref("org/model:second"), nil, descOf(signatures[0]), noise(50, 10))
		other := pushed(t, r, s.ref("org/model:other"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.other", Format: ocilocal.FormatImageManifest}, descOf(subject), noise(51, 10))
		if got, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true, ReferrerTypes: []string{testType}}); err != nil || len(got.Referrers) != 3 {
			t.Fatalf("%+v, %v", got, err)
		}
		if s.at("org/model", string(other.Digest())).digest != "" {
			t.Error("a referrer of another type was pushed")
		}
		if got, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true}); err != nil || len(got.Referrers) != 4 {
			t.Errorf("%+v, %v", got, err)
		}
		there := openRemote(t, nil)
		for range 2 { // the second time, everything is here
			got, err := there.Pull(t.Context(), subject.Reference(), &ocilocal.PullOptions{Referrers: true})
			if err != nil || len(got.Referrers) != 4 {
				t.Fatalf("%+v, %v", got, err)
			}
		}
		for _, d := range []digest.Digest{signatures[0].Digest(), signatures[1].Digest(), second.Digest(), other.Digest()} {
			if _, err := there.LoadDigest(t.Context(), d); err != nil {
				t.Error(err)
			}
		}
		some := openRemote(t, nil)
		if got, err := some.Pull(t.Context(), subject.Reference(), &ocilocal.PullOptions{Referrers: true, ReferrerTypes: []string{"application/vnd.example.other"}}); err != nil || len(got.Referrers) != 1 {
			t.Errorf("%+v, %v", got, err)
		}
	}
}

// withoutFile removes the file of a blob or manifest. Its rows stay, as after a killed collector.
func withoutFile(t testing.TB, r *ocilocal.LocalRegistry, d digest.Digest) {
	t.Helper()
	if err := os.Remove(blobFile(r, d)); err != nil {
		t.Fatal(err)
	}
}

// TestPushReferrersSkipped: a referrer that lacks content is skipped, and the others are pushed.
func TestPushReferrersSkipped(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	subject, signatures := withSignatures(t, r, s, 3)
	withoutFile(t, r, digest.FromBytes(noise(100, 10))) // the layer of the first
	withoutFile(t, r, signatures[1].Digest())
	got, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true})
	if err != nil || len(got.Referrers) != 1 || got.Referrers[0].Digest != signatures[2].Digest() || len(got.Skipped) != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	if all, err := referrersOf(t, subject.Reference()); err != nil || len(all) != 1 {
		t.Errorf("%q, %v", all, err)
	}
	// The artifact itself must be whole.
	withoutFile(t, r, digest.FromBytes(noise(1, 10)))
	_, err = r.Push(t.Context(), subject.Reference(), nil)
	mustFail(t, err, ocilocal.ErrIncomplete)
}

// TestPushReadOnlyLogin: a user that may only read can push an artifact with a subject if the
// registry has it and lists it as a referrer.
func TestPushReadOnlyLogin(t *testing.T) {
	for _, noReferrers := range []bool{false, true} {
		t.Run(fmt.Sprint(noReferrers), func(t *testing.T) {
			s := newServer(t)
			s.noReferrers = noReferrers
			r := openRemote(t, nil)
			subject, signatures := withSignatures(t, r, s, 2)
			for _, a := range append(signatures, subject) {
				if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
					t.Fatal(err)
				}
			}
			s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
				if q.Method == "GET" || q.Method == "HEAD" {
					return false
				}
				fail(w, 403, "DENIED")
				return true
			})
			for _, a := range append(signatures, subject) {
				if _, err := r.Push(t.Context(), a.Reference(), &ocilocal.PushOptions{Referrers: true}); err != nil {
					t.Error(err)
				}
			}
			// If the registry does not list it, this user can't add it to the list.
			s.mu.Lock()
			s.noReferrers = true
			s.mu.Unlock()
			s.plant("org/model", "sha256-"+subject.Digest().Encoded(), "", nil)
			_, err := r.Push(t.Context(), signatures[0].Reference(), nil)
			mustFail(t, err, ocilocal.ErrDenied)
		})
	}
}
