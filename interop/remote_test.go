package interop_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// remote is our client for a server.
func (s *server) remote(t *testing.T) *ocilocal.Remote {
	r := &ocilocal.Remote{Client: s.client(), PlainHTTP: s.isPlain, Warn: func(host, text string) { t.Logf("%s warns: %s", host, text) }}
	if s.auth {
		r.Credentials = ocilocal.StaticCredential(s.host, ocilocal.Credential{Username: user, Password: password})
	}
	t.Cleanup(r.CloseIdleConnections)
	return r
}

// isPlain is asked since loopback is spoken to without TLS otherwise.
func (s *server) isPlain(string) bool { return !s.tls }

// pushTo sends what r has under name to a server, under the same path.
func (s *server) pushTo(t *testing.T, r *ocilocal.LocalRegistry, remote *ocilocal.Remote, name, to string) (ocilocal.Reference, *ocilocal.PushResult) {
	t.Helper()
	as := reference(t, s.host+"/"+to)
	pushed, err := r.Push(t.Context(), reference(t, name), &ocilocal.PushOptions{Remote: remote, As: as})
	if err != nil {
		t.Fatal(err)
	}
	return as, pushed
}

// What we push, each tool finds under the same digest and copies; what each
// tool pushes, we pull with the digest that the tool says.
func TestPushAndPull(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		b := newBox(t)
		b.login(s)
		r, remote := newRegistry(t), s.remote(t)
		want := buildImage(t, r, imageName).Digest()
		_, pushed := s.pushTo(t, r, remote, imageName, "ours/image:v1")
		if pushed.BlobsSent != 2 || pushed.Descriptor.Digest != want {
			t.Errorf("%+v", pushed)
		}
		b.run("regctl", "image", "copy", "ocidir://"+exportLayout(t, r, imageName)+":v1", "ocidir://ours:v1")
		for _, c := range clients {
			wantEqual(t, c.tool+"'s digest of ours", c.digest(b, s, "ours/image", "v1"), want.String())
			layout := b.path("by-" + c.tool)
			c.pull(b, s, layout, "ours/image", "v1")
			back, result := importLayout(t, layout, byDigest)
			wantImported(t, back, result, "", want.String())

			c.push(b, s, b.path("ours"), "theirs/"+c.tool, "v1")
			here := newRegistry(t)
			ref := reference(t, s.host+"/theirs/"+c.tool+":v1")
			got, err := here.Pull(t.Context(), ref, &ocilocal.PullOptions{Remote: remote})
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "what "+c.tool+" pushed", got.Artifact.Digest().String(), c.digest(b, s, "theirs/"+c.tool, "v1"))
			hasWhole(t, here, got.Artifact.Digest())
		}
		b.run("crane", "validate", "--remote", s.host+"/ours/image:v1")
	})
}

func TestPushAgainMountAndLook(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		r, remote := newRegistry(t), s.remote(t)
		large := bytes.Repeat([]byte("some large layer "), 1<<20)
		b, err := r.NewBuilder(reference(t, s.host+"/one/large:v1"), &ocilocal.BuilderOptions{ArtifactType: artifactType, Format: ocilocal.FormatImageManifest})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Cancel()
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", large, nil); err != nil {
			t.Fatal(err)
		}
		a := build(t, b)
		name := a.Reference().String()
		s.pushTo(t, r, remote, name, "one/large:v1")
		if _, again := s.pushTo(t, r, remote, name, "one/large:v1"); again.BlobsSent != 0 || again.BlobsPresent != 2 {
			t.Errorf("again: %+v", again)
		}
		// A chunked upload, where the registry hasn't the blob yet, and a mount where it has.
		_, mounted := s.pushTo(t, r, remote, name, "two/large:v1")
		if mounted.BlobsSent != 0 {
			t.Errorf("elsewhere: %+v", mounted)
		}
		chunked, err := r.Push(t.Context(), chunkedArtifact(t, r, large).Reference(), &ocilocal.PushOptions{
			Remote: remote, As: reference(t, s.host+"/three/large:v1"), ChunkSize: 5 << 20})
		if err != nil || chunked.BlobsSent == 0 {
			t.Errorf("in chunks: %+v, %v", chunked, err)
		}
		s.pullCut(t, reference(t, s.host+"/three/large:v1"), int64(len("chunked ")+len(large)+len("{}")))

		desc, err := remote.Resolve(t.Context(), a.Reference())
		if err != nil || desc.Digest != a.Digest() || desc.Size != a.Descriptor().Size {
			t.Errorf("%+v, %v", desc, err)
		}
		for _, tag := range []string{"a", "b", "c"} {
			s.pushTo(t, r, remote, name, "one/large:"+tag)
		}
		var tags []string
		for tag, err := range remote.Tags(t.Context(), a.Reference()) {
			if err != nil {
				t.Fatal(err)
			}
			tags = append(tags, tag)
		}
		slices.Sort(tags) // docker-registry 2.8 lists them in any order
		wantEqual(t, "tags", strings.Join(tags, " "), "a b c v1")
		for _, missing := range []string{"one/large:none", "none/at-all:v1"} {
			if s.name == "olareg" && missing == "none/at-all:v1" {
				continue // it then fails to close
			}
			if _, err := remote.Resolve(t.Context(), reference(t, s.host+"/"+missing)); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("%s: %v", missing, err)
			}
		}
		// By digest: the specification obliges no registry to delete tags alone.
		pinned, err := a.Reference().WithDigest(a.Digest())
		if err != nil {
			t.Fatal(err)
		}
		err = remote.Delete(t.Context(), pinned)
		if errors.Is(err, errors.ErrUnsupported) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if desc, err := remote.Resolve(t.Context(), pinned); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("deleted: %+v, %v", desc, err)
		}
	})
}

// pullCut pulls over a connection that breaks off in the middle of the layer: the rest of it is asked for.
func (s *server) pullCut(t *testing.T, ref ocilocal.Reference, size int64) {
	t.Helper()
	remote := s.remote(t)
	next := remote.Client.Transport
	var ranges []int // what requests for a range were answered with
	remote.Client.Transport = roundTripFunc(func(r *http.Request) (*http.Response, error) {
		res, err := next.RoundTrip(r)
		switch {
		case err != nil:
		case r.Header.Get("Range") != "":
			ranges = append(ranges, res.StatusCode)
		case res.ContentLength > 1<<20:
			res.Body = &cutBody{res.Body, 1 << 20}
		}
		return res, err
	})
	here := newRegistry(t)
	got, err := here.Pull(t.Context(), ref, &ocilocal.PullOptions{Remote: remote, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	hasWhole(t, here, got.Artifact.Digest())
	if !slices.Equal(ranges, []int{http.StatusPartialContent}) || got.BytesReceived != size {
		t.Errorf("ranges were answered with %d; %d bytes came, of %d", ranges, got.BytesReceived, size)
	}
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A cutBody breaks off after left bytes.
type cutBody struct {
	io.ReadCloser
	left int
}

func (b *cutBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// An identity token is exchanged for tokens by POST, and does what a password does.
func TestIdentityToken(t *testing.T) {
	s := servers["docker-registry with tokens"](t)
	remote := s.remote(t)
	remote.Credentials = ocilocal.StaticCredential(s.host, ocilocal.Credential{IdentityToken: identityToken})
	r := newRegistry(t)
	want := buildImage(t, r, imageName).Digest()
	ref, _ := s.pushTo(t, r, remote, imageName, "ours/image:v1")
	got, err := newRegistry(t).Pull(t.Context(), ref, &ocilocal.PullOptions{Remote: remote})
	if err != nil || got.Artifact.Digest() != want {
		t.Errorf("%+v, %v", got, err)
	}
	s.tokens.mu.Lock()
	defer s.tokens.mu.Unlock()
	if len(s.tokens.requests) == 0 {
		t.Error("no token was asked for")
	}
	for _, r := range s.tokens.requests {
		if r.method != http.MethodPost || !r.granted || len(r.scopes) == 0 {
			t.Errorf("%+v", r)
		}
	}
}

// chunkedArtifact has a large layer that nothing else has.
func chunkedArtifact(t *testing.T, r *ocilocal.LocalRegistry, large []byte) *ocilocal.LocalArtifact {
	t.Helper()
	b, err := r.NewBuilder(reference(t, "ghcr.io/example/tools/chunked:v1"), &ocilocal.BuilderOptions{ArtifactType: artifactType, Format: ocilocal.FormatImageManifest})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if _, err := b.AddLayerBytes(t.Context(), "text/plain", append([]byte("chunked "), large...), nil); err != nil {
		t.Fatal(err)
	}
	return build(t, b)
}

// An image index goes there and back whole, and one of its platforms alone.
func TestPushAndPullIndex(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		b := newBox(t)
		b.login(s)
		remote := s.remote(t)
		dir := umociImages(b)
		want := multiPlatform(b)
		name := "ghcr.io/example/multi:v1"
		opts := as(t, name)
		opts.Select, opts.Rename = "multi", true
		r, result := importLayout(t, dir, opts)
		wantImported(t, r, result, name, want)
		ref, _ := s.pushTo(t, r, remote, name, "ours/multi:v1")
		wantEqual(t, "skopeo's digest", clients[2].digest(b, s, "ours/multi", "v1"), want)

		here := newRegistry(t)
		got, err := here.Pull(t.Context(), ref, &ocilocal.PullOptions{Remote: remote})
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "the index", got.Artifact.Digest().String(), want)
		hasWhole(t, here, got.Artifact.Digest())
		one, err := newRegistry(t).Pull(t.Context(), ref, &ocilocal.PullOptions{Remote: remote, Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}})
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "one platform", one.Artifact.Digest().String(), b.run("regctl", "image", "digest", "ocidir://theirs:arm64"))
	})
}

// Referrers that oras attaches are listed by us, and those that we push by oras and regctl.
func TestReferrersBothWays(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		b := newBox(t)
		b.login(s)
		r, remote := newRegistry(t), s.remote(t)
		subject := buildArtifact(t, r, artifactName, ocilocal.FormatImageManifest, nil).Descriptor()
		ref, _ := s.pushTo(t, r, remote, artifactName, "ours/artifact:v1")
		note := "ghcr.io/example/tools/artifact:note"
		ours := buildArtifact(t, r, note, ocilocal.FormatImageManifest, &subject).Digest()
		s.pushTo(t, r, remote, note, "ours/artifact:note")
		b.write("note.txt", "a note")
		s.oras(b, "--plain-http", "attach", ref.String(), "--artifact-type", "application/vnd.example.note", "note.txt:text/plain")

		var all []string
		for d, err := range remote.Referrers(t.Context(), ref, "") {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, d.Digest.String())
		}
		if len(all) != 2 || !slices.Contains(all, ours.String()) {
			t.Errorf("we list %v, want %s and another", all, ours)
		}
		byOras := s.oras(b, "--plain-http", "discover", "--format", "go-template={{range .referrers}}{{println .digest}}{{end}}", ref.String())
		byRegctl := s.regctl(b, "artifact", "list", "--format", "{{range .Descriptors}}{{println .Digest}}{{end}}", ref.String())
		for _, got := range []string{byOras, byRegctl} {
			if lines(got) != lines(strings.Join(all, "\n")) {
				t.Errorf("we list %v, a tool\n%s", all, got)
			}
		}
		for d, err := range remote.Referrers(t.Context(), ref, "application/vnd.example.note") {
			if err != nil || d.Digest == ours {
				t.Errorf("%v, %v", d, err)
			}
		}
	})
}

// A registry either takes an artifact manifest or gets the error that says what to do.
func TestPushArtifactManifest(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		r, remote := newRegistry(t), s.remote(t)
		want := buildArtifact(t, r, artifactName, ocilocal.FormatArtifactManifest, nil).Digest()
		ref := reference(t, s.host+"/ours/artifact:v1")
		_, err := r.Push(t.Context(), reference(t, artifactName), &ocilocal.PushOptions{Remote: remote, As: ref})
		if !s.artifactManifests {
			if !errors.Is(err, ocilocal.ErrUnsupportedManifest) {
				t.Error(err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := newRegistry(t).Pull(t.Context(), ref, &ocilocal.PullOptions{Remote: remote})
		if err != nil || got.Artifact.Digest() != want {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// Wrong credentials are told from none, and neither is shown.
func TestCredentialsRefused(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		if !s.auth {
			return
		}
		ref := reference(t, s.host+"/some/thing:v1")
		for what, c := range map[string]*ocilocal.Credential{"none": nil, "wrong": {Username: user, Password: "not to be seen"}} {
			remote := &ocilocal.Remote{Client: s.client(), PlainHTTP: s.isPlain}
			defer remote.CloseIdleConnections()
			if c != nil {
				remote.Credentials = ocilocal.StaticCredential(s.host, *c)
			}
			_, err := remote.Resolve(t.Context(), ref)
			if !errors.Is(err, ocilocal.ErrUnauthorized) || strings.Contains(err.Error(), "not to be seen") {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

// What we push, the SDK loads; what the SDK pushes, we load, each without an archive in between.
func TestOMMXPushAndPull(t *testing.T) {
	for _, sdk := range []string{"ommx2", "ommx3"} {
		t.Run(sdk, func(t *testing.T) {
			b := newBox(t)
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			instance := ommx(b, sdk, "make", b.path("theirs.ommx"))
			s := servers["distribution 3"](t)
			s.host = strings.Replace(s.host, "127.0.0.1", "localhost", 1)
			r, remote := newRegistry(t), s.remote(t)
			a, err := r.LoadPath(t.Context(), b.path("theirs.ommx"), nil)
			if err != nil {
				t.Fatal(err)
			}
			ref, _ := s.pushTo(t, r, remote, a.Reference().String(), "ours/demo:v1")
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			wantEqual(t, "what the SDK pulls", ommx(b, sdk, "load", ref.String()), instance)

			if _, err := r.Tag(t.Context(), a.Digest(), reference(t, s.host+"/theirs/demo:v1"), nil); err != nil {
				t.Fatal(err)
			}
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			ommx(b, sdk, "push", export(t, r, s.host+"/theirs/demo:v1"))
			got, err := newRegistry(t).Pull(t.Context(), reference(t, s.host+"/theirs/demo:v1"), &ocilocal.PullOptions{Remote: remote})
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "the digest of what the SDK pushes", got.Artifact.Digest().String(), a.Digest().String())
			_, _, content := onlyLayer(t, got.Artifact)
			_, _, want := onlyLayer(t, a)
			if digest.FromBytes(content) != digest.FromBytes(want) {
				t.Error("another instance came back")
			}
		})
	}
}

// Tags, copies and referrers that travel, and each server as the mirror of one that has no blobs to give.
func TestTagCopyAndMirror(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		r, remote := newRegistry(t), s.remote(t)
		buildImage(t, r, imageName)
		image, err := r.Resolve(t.Context(), reference(t, imageName))
		if err != nil {
			t.Fatal(err)
		}
		b, err := r.NewReferrerBuilder(image, &ocilocal.BuilderOptions{ArtifactType: artifactType, Format: ocilocal.FormatImageManifest})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Cancel()
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte("signature"), nil); err != nil {
			t.Fatal(err)
		}
		signature := build(t, b)
		as := reference(t, s.host+"/one/image:v1")
		opts := &ocilocal.PushOptions{Remote: remote, As: as, Tags: []string{"v2"}, Referrers: true}
		for range 2 {
			if got, err := r.Push(t.Context(), reference(t, imageName), opts); err != nil || len(got.Referrers) != 1 {
				t.Fatalf("%+v, %v", got, err)
			}
		}
		if _, err := remote.Tag(t.Context(), as, "v3"); err != nil {
			t.Error(err)
		}
		for _, tag := range []string{"v2", "v3"} {
			if d, err := remote.Resolve(t.Context(), reference(t, s.host+"/one/image:"+tag)); err != nil || d.Digest != image.Digest {
				t.Errorf("%s: %v, %v", tag, d, err)
			}
		}
		copied := reference(t, s.host+"/two/image:v1")
		if d, err := remote.Copy(t.Context(), as, copied, nil); err != nil || d.Digest != image.Digest {
			t.Error(d, err)
		}
		here := newRegistry(t)
		if got, err := here.Pull(t.Context(), as, &ocilocal.PullOptions{Remote: remote, Referrers: true}); err != nil || len(got.Referrers) != 1 || got.Referrers[0].Digest != signature.Digest() {
			t.Errorf("%+v, %v", got, err)
		}

		// The registry has manifests only. So the blobs can only be the mirror's.
		origin := reference(t, "origin.test/image:v1")
		base := s.client().Transport.(*http.Transport)
		t.Cleanup(base.CloseIdleConnections)
		proxy := &http.Client{Transport: roundTripper(func(q *http.Request) (*http.Response, error) {
			if q.URL.Host != "origin.test" {
				return base.RoundTrip(q)
			}
			if strings.Contains(q.URL.Path, "/blobs/") {
				return nil, errors.New("the registry itself was asked for a blob")
			}
			to := q.Clone(q.Context())
			to.URL.Scheme, to.URL.Host = "http", s.host
			to.Host = s.host
			if s.tls {
				to.URL.Scheme = "https"
			}
			to.URL.Path = strings.Replace(q.URL.Path, "/v2/image/", "/v2/one/image/", 1)
			return base.RoundTrip(to)
		})}
		through := s.remote(t)
		through.Client = proxy
		credential := ocilocal.Credential{Username: user, Password: password}
		if s.auth {
			through.Credentials = ocilocal.FirstCredential(ocilocal.StaticCredential(s.host, credential), ocilocal.StaticCredential("origin.test", credential))
			through.AllowAddress = func(string, netip.Addr) bool { return true }
		}
		through.Mirrors = map[string][]ocilocal.Mirror{"origin.test": {{Location: s.host + "/one"}}}
		last := newRegistry(t)
		if got, err := last.Pull(t.Context(), origin, &ocilocal.PullOptions{Remote: through}); err != nil || got.Artifact.Digest() != image.Digest {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(q *http.Request) (*http.Response, error) { return f(q) }
