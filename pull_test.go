package ocilocal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// quick is a retry policy without waits.
func quick(attempt int, err error) (time.Duration, bool) {
	_, again := ocilocal.DefaultRetry(attempt, err)
	return 0, again
}

func openRemote(t testing.TB, r *ocilocal.Remote) *ocilocal.LocalRegistry {
	if r == nil {
		r = &ocilocal.Remote{}
	}
	if r.Retry == nil {
		r.Retry = quick
	}
	t.Cleanup(r.CloseIdleConnections)
	return openTemp(t, &ocilocal.Options{Remote: r})
}

// TestPull pulls an artifact, finds it unchanged, and pulls it again after its tag has moved.
func TestPull(t *testing.T) {
	s := newServer(t)
	small, large := noise(1, 100), noise(2, 3<<20)
	want := s.put(t, "org/model", "v1", small, large)
	r := openRemote(t, nil)
	got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Artifact.Digest() != want || got.Update.Outcome != ocilocal.Inserted || got.BlobsWritten != 4 || got.BytesReceived != int64(2+len(small)+len(large)) {
		t.Errorf("%+v", got)
	}
	layers, err := got.Artifact.Layers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := got.Artifact.ReadLayer(t.Context(), layers[1]); err != nil || !bytes.Equal(b, large) {
		t.Error(err)
	}
	// One request finds out that the tag has not moved.
	s.forget()
	if got, err = r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || got.Update.Outcome != ocilocal.Unchanged || len(s.requests("")) != 1 {
		t.Errorf("%+v, %v, %q", got, err, s.requests(""))
	}
	// The tag has moved. Content that is here is not fetched.
	s.forget()
	moved := s.put(t, "org/model", "v1", noise(3, 10), large)
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrConflict) || len(s.requests("")) != 1 {
		t.Errorf("moved tag: %v, %q", err, s.requests(""))
	}
	if here, err := r.Resolve(t.Context(), s.ref("org/model:v1")); err != nil || here.Digest != want {
		t.Errorf("the ref is at %v, %v", here, err)
	}
	o := &ocilocal.PullOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}
	if got, err = r.Pull(t.Context(), s.ref("org/model:v1"), o); err != nil || got.Artifact.Digest() != moved || got.Update.Outcome != ocilocal.Replaced || s.served() > 20 {
		t.Errorf("%+v, %v, %d bytes", got, err, s.served())
	}
	mustClose(t, r)
}

// cutAfter makes the server break off blobs after so many bytes, as long as times is positive.
func (s *server) cutAfter(n int64, times int) {
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		large := r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && s.blobSize("org/model", digest.Digest(path.Base(r.URL.Path))) > n
		s.mu.Lock()
		cut := large && times > 0
		if cut {
			times--
		}
		s.mu.Unlock()
		if !cut {
			return false
		}
		s.plain(&cutWriter{ResponseWriter: w, left: n}, r)
		panic(http.ErrAbortHandler)
	})
}

type cutWriter struct {
	http.ResponseWriter
	left int64
}

func (c *cutWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p[:min(int64(len(p)), c.left)])
	c.ResponseWriter.(http.Flusher).Flush()
	if c.left -= int64(n); n < len(p) && err == nil {
		err = io.ErrShortWrite
	}
	return n, err
}

// TestPullResumes: an interrupted blob is resumed where it stopped, in the same pull and in the
// next one.
func TestPullResumes(t *testing.T) {
	const size = 8 << 20
	never := func(int, error) (time.Duration, bool) { return 0, false }
	for name, c := range map[string]struct {
		retry ocilocal.RetryFunc
		pulls int
	}{"within a pull": {quick, 1}, "in the next pull": {never, 2}} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.put(t, "org/model", "v1", noise(1, size))
			s.cutAfter(5<<20, 1)
			r := openRemote(t, &ocilocal.Remote{Retry: c.retry})
			var err error
			for n := 1; n <= c.pulls; n++ {
				if _, err = r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil && (n == c.pulls || !errors.Is(err, ocilocal.ErrTransport)) {
					t.Fatal(err)
				}
			}
			layer := digest.FromBytes(noise(1, size))
			if n := len(s.requests("/blobs/" + string(layer))); n != 2 {
				t.Errorf("%d requests for the layer", n)
			}
			// Each pull also fetches the empty config.
			if got := s.served(); got != int64(size+2*c.pulls) {
				t.Errorf("%d bytes were served", got)
			}
			mustClose(t, r)
		})
	}
}

// TestPullDistrustsPartial: the bytes that an earlier pull left are hashed before they count.
func TestPullDistrustsPartial(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 4<<20))
	s.cutAfter(3<<20, 1)
	r := openRemote(t, &ocilocal.Remote{Retry: func(int, error) (time.Duration, bool) { return 0, false }})
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrTransport) {
		t.Fatal(err)
	}
	left := filesBelow(t, r, "tmp/partial")
	if len(left) != 1 {
		t.Fatalf("%q", left)
	}
	rewrite(t, left[0], func(b []byte) []byte { b[1000]++; return b })
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
}

// TestPullMakesWhole: an artifact that is here in part is completed. Only its missing blobs are
// fetched.
func TestPullMakesWhole(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 100), noise(2, 3<<20))
	r := openRemote(t, nil)
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	for _, load := range []bool{false, true} {
		if err := os.Remove(blobFile(r, digest.FromBytes(noise(1, 100)))); err != nil {
			t.Fatal(err)
		}
		s.forget()
		var err error
		if load {
			_, err = r.LoadWith(t.Context(), s.ref("org/model:v1"), nil)
		} else {
			_, err = r.Pull(t.Context(), s.ref("org/model:v1"), nil)
		}
		if err != nil || s.served() != 100 {
			t.Errorf("%v: %v, %d bytes", load, err, s.served())
		}
		if found := problems(t, r, nil, nil); len(found) > 0 {
			t.Errorf("%q", found)
		}
	}
}

// TestPullAs: a ref that is named As here is not taken for the artifact of that name in the remote
// registry.
func TestPullAs(t *testing.T) {
	s := newServer(t)
	want := s.put(t, "org/model", "v1", noise(1, 10))
	r := openRemote(t, nil)
	as := ocilocal.MustParseReference("example.com/own:v1")
	own, err := build(t, r, as.String(), nil, "made here")
	if err != nil {
		t.Fatal(err)
	}
	o := &ocilocal.PullOptions{As: as}
	got, err := r.Pull(t.Context(), s.ref("org/model:v1"), o)
	if !errors.Is(err, ocilocal.ErrConflict) || got == nil || got.Artifact != nil || got.Update.Existing != own.Digest() || got.Update.Descriptor.Digest != want {
		t.Fatalf("over another artifact: %+v, %v", got, err)
	}
	o.Policy = ocilocal.Replace
	if got, err = r.Pull(t.Context(), s.ref("org/model:v1"), o); err != nil || got.Update.Outcome != ocilocal.Replaced || got.Artifact.Digest() != want || got.Artifact.Reference() != as {
		t.Fatalf("%+v, %v", got, err)
	}
	// Only As is here. One request finds out whether it is still the same.
	s.forget()
	if got, err = r.Pull(t.Context(), s.ref("org/model:v1"), o); err != nil || got.Update.Outcome != ocilocal.Unchanged || len(s.requests("")) != 1 {
		t.Errorf("again: %+v, %v, %q", got, err, s.requests(""))
	}
	// Content that is here under its own name gets another name without being fetched again.
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	s.forget()
	o.As = ocilocal.MustParseReference("example.com/other:v1")
	for _, outcome := range []ocilocal.Outcome{ocilocal.Inserted, ocilocal.Unchanged} {
		if got, err = r.Pull(t.Context(), s.ref("org/model:v1"), o); err != nil || got.Update.Outcome != outcome || got.Artifact.Digest() != want || len(s.requests("/blobs/")) != 0 {
			t.Errorf("%v: %+v, %v, %q", outcome, got, err, s.requests(""))
		}
	}
}

// TestPullExpected: Expected is compared even if nothing has to be fetched.
func TestPullExpected(t *testing.T) {
	s := newServer(t)
	want := s.put(t, "org/model", "v1", noise(1, 10))
	r := openRemote(t, nil)
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	s.forget()
	for _, policy := range []ocilocal.Policy{ocilocal.KeepExisting, ocilocal.Replace} {
		o := &ocilocal.PullOptions{PublishOptions: ocilocal.PublishOptions{Policy: policy, Expected: digest.FromString("elsewhere")}}
		got, err := r.Pull(t.Context(), s.ref("org/model:v1"), o)
		if e, ok := errors.AsType[*ocilocal.ConflictError](err); !ok || e.Existing != want || got.Artifact != nil {
			t.Errorf("%+v, %v", got, err)
		}
		o.Expected = want
		if got, err := r.Pull(t.Context(), s.ref("org/model:v1"), o); err != nil || got.Update.Outcome != ocilocal.Unchanged {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if len(s.requests("GET")) != 0 {
		t.Errorf("%q", s.requests(""))
	}
}

// TestCloseEndsConnections: Close ends the connections of the client that Open made. It leaves
// those of a client that the caller gave.
func TestCloseEndsConnections(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 10))
	before := takeCensusOf("socket:") // the server may open its index once more meanwhile
	r, err := ocilocal.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	if left := before.leftBehind(); left != "" {
		t.Error(left)
	}
}

// TestPullForms: older and odd forms of content are pulled unchanged, from a registry at an IPv6
// address too. Docker's schema 1, which has no sizes, is refused.
func TestPullForms(t *testing.T) {
	s := newServer(t)
	config, layer := []byte(`{"architecture":"amd64","os":"linux"}`), noise(1, 500)
	for _, b := range [][]byte{config, layer, {}} {
		s.putBlob("org/model", b)
	}
	desc := func(mediaType string, b []byte) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, digest.FromBytes(b), len(b))
	}
	image := func(layers string) []byte {
		return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":%s}`,
			ocilocal.MediaTypeDockerManifest, desc("application/vnd.docker.container.image.v1+json", config), layers)
	}
	one := image("[" + desc("application/vnd.docker.image.rootfs.diff.tar.gzip", layer) + "]")
	list := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocilocal.MediaTypeDockerManifestList, desc(ocilocal.MediaTypeDockerManifest, one))
	want := map[string]digest.Digest{
		"docker": s.putRaw("org/model", "docker", ocilocal.MediaTypeDockerManifest, one),
		"list":   s.putRaw("org/model", "list", ocilocal.MediaTypeDockerManifestList, list),
		"null":   s.putRaw("org/model", "null", ocilocal.MediaTypeDockerManifest, image("null")),
		"empty":  s.putRaw("org/model", "empty", ocilocal.MediaTypeDockerManifest, image("["+desc("application/octet-stream", nil)+"]")),
	}
	first := []byte(`{"schemaVersion":1,"name":"org/model","tag":"x","fsLayers":[],"history":[]}`)
	s.plant("org/model", "first", "application/vnd.docker.distribution.manifest.v1+prettyjws", first)
	s.plant("org/model", "first-as-json", "application/json", first)
	r := openRemote(t, nil)
	for tag, d := range want {
		if got, err := r.Pull(t.Context(), s.ref("org/model:"+tag), nil); err != nil || got.Artifact.Digest() != d {
			t.Errorf("%s: %+v, %v", tag, got, err)
		}
	}
	// A layer without bytes can be exported.
	to := s.ref("org/copy:v1")
	if _, err := r.Push(t.Context(), s.ref("org/model:empty"), &ocilocal.PushOptions{As: to, ChunkSize: 10}); err != nil {
		t.Error(err)
	}
	if n := s.blobSize("org/copy", digest.FromBytes(nil)); n != 0 {
		t.Errorf("%d bytes", n)
	}
	_, err := r.Pull(t.Context(), s.ref("org/model:first"), nil)
	mustFail(t, err, ocilocal.ErrUnsupportedMediaType)
	_, err = r.Pull(t.Context(), s.ref("org/model:first-as-json"), nil)
	mustFail(t, err, ocilocal.ErrInvalidManifest)

	t.Run("IPv6", func(t *testing.T) {
		six, err := net.Listen("tcp6", "[::1]:0")
		if err != nil {
			t.Skip("no IPv6 here:", err)
		}
		other := httptest.NewUnstartedServer(s)
		other.Listener.Close()
		other.Listener = six
		other.Start()
		defer other.Close()
		ref := ocilocal.MustParseReference(six.Addr().String() + "/org/model:docker")
		if got, err := r.Pull(t.Context(), ref, nil); err != nil || got.Artifact.Digest() != want["docker"] {
			t.Errorf("%+v, %v", got, err)
		}
	})
}
