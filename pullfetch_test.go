package ocilocal_test

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// failing makes the server refuse one blob.
func (s *server) failing(blob []byte) {
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.HasSuffix(q.URL.Path, string(digest.FromBytes(blob))) {
			return false
		}
		status(404)(w, q)
		return true
	})
}

// rewriteReadOnly is rewrite for a file that is read-only, and stays so.
func rewriteReadOnly(t *testing.T, name string, change func(b []byte) []byte) {
	t.Helper()
	if fi, err := os.Stat(name); err != nil || fi.Mode()&0o222 != 0 {
		t.Fatal(fi, err)
	}
	rewrite(t, name, change)
	if err := os.Chmod(name, 0o444); err != nil {
		t.Fatal(err)
	}
}

// TestPullKeepsWhole: the large blobs that a failed pull received, whole ones too, are not fetched
// again. The next pull hashes them before they count.
func TestPullKeepsWhole(t *testing.T) {
	const size = 2 << 20
	for name, c := range map[string]struct {
		damage func(b []byte) []byte
		want   int64 // bytes of large blobs that the next pull fetches
	}{
		"as it was": {func(b []byte) []byte { return b }, 0},
		"damaged":   {flipBit, size},
		"cut":       {func(b []byte) []byte { return b[:1000] }, size},
		"too long":  {func(b []byte) []byte { return append(b, 0) }, size},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			last := noise(3, 100)
			s.put(t, "org/model", "v1", noise(1, size), noise(2, size), last)
			s.failing(last)
			root := filepath.Join(t.TempDir(), "root")
			remote := &ocilocal.Remote{}
			defer remote.CloseIdleConnections()
			r, err := ocilocal.Open(t.Context(), root, &ocilocal.Options{Remote: remote})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Workers: 1}); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Fatal(err)
			}
			checkUnpublished(t, r)
			left := filesBelow(t, r, "tmp/partial")
			if len(left) != 2 {
				t.Fatalf("%q", left)
			}
			mustClose(t, r)
			rewriteReadOnly(t, left[0], c.damage)

			if r, err = ocilocal.Open(t.Context(), root, &ocilocal.Options{Remote: remote}); err != nil {
				t.Fatal(err)
			}
			s.behave()
			s.forget()
			got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
			if want := c.want + 2 + int64(len(last)); err != nil || got.BytesReceived != want || s.served() != want || got.BlobsWritten != 5 {
				t.Errorf("%+v, %v; %d bytes were served, want %d", got, err, s.served(), want)
			}
			if found := problems(t, r, nil, nil); len(found) > 0 {
				t.Errorf("%q", found)
			}
			mustClose(t, r)
		})
	}
}

// TestPullSparesTheStore: the file that is kept of a blob may be the same file as in the store. A
// pull that finds it damaged does not write to it.
func TestPullSparesTheStore(t *testing.T) {
	s := newServer(t)
	large, last := noise(1, 2<<20), noise(2, 100)
	s.put(t, "org/model", "v1", large, last)
	s.failing(last)
	r := openRemote(t, nil)
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Workers: 1}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Fatal(err)
	}
	left := filesBelow(t, r, "tmp/partial")
	if len(left) != 1 {
		t.Fatalf("%q", left)
	}
	in := blobFile(r, digest.FromBytes(large))
	if err := errors.Join(os.MkdirAll(filepath.Dir(in), 0o700), os.Link(left[0], in)); err != nil {
		t.Fatal(err)
	}
	rewriteReadOnly(t, in, flipBit)
	before, err := os.Open(in)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	s.behave()
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	if fi, err := before.Stat(); err != nil || fi.Size() != int64(len(large)) {
		t.Errorf("%v, %v", fi, err)
	}
	if found := problems(t, r, nil, nil); len(found) > 0 {
		t.Errorf("%q", found)
	}
}

// TestPullLeftoversAge: the age of an interrupted pull's files counts from their last write.
func TestPullLeftoversAge(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 4<<20))
	s.cutAfter(3<<20, 1)
	r := openRemote(t, &ocilocal.Remote{Retry: noRetry})
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrTransport) {
		t.Fatal(err)
	}
	left := filesBelow(t, r, "tmp/partial")
	if len(left) != 1 {
		t.Fatalf("%q", left)
	}
	age := func(name string, d time.Duration) {
		if err := os.Chtimes(name, time.Now().Add(-d), time.Now().Add(-d)); err != nil {
			t.Fatal(err)
		}
	}
	age(filepath.Dir(left[0]), 48*time.Hour)
	for _, c := range []struct {
		data time.Duration
		want int
	}{{time.Hour, 1}, {48 * time.Hour, 0}} {
		age(left[0], c.data)
		if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: 24 * time.Hour}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(left[0]); (err == nil) != (c.want == 1) {
			t.Errorf("written to %v ago: %v", c.data, err)
		}
	}
}

// TestPullRefusedEarly: a pull that is certain to be refused fetches no blob.
func TestPullRefusedEarly(t *testing.T) {
	s := newServer(t)
	first := s.put(t, "org/model", "v1", noise(1, 10))
	remote := &ocilocal.Remote{}
	r := openRemote(t, remote)
	if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	second := s.put(t, "org/model", "v1", noise(2, 2<<20))
	s.forget()
	for _, o := range []ocilocal.PublishOptions{{}, {Expected: digest.FromString("other")}} {
		got, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{PublishOptions: o})
		e, ok := errors.AsType[*ocilocal.ConflictError](err)
		if !ok || e.Existing != first || e.Incoming != second || e.Expected != o.Expected || got.Update.Outcome != ocilocal.Conflicted {
			t.Errorf("%+v, %v", got, err)
		}
	}
	picky := openTemp(t, &ocilocal.Options{Remote: remote, ArtifactTypes: []string{"application/vnd.example.none"}})
	if _, err := picky.Pull(t.Context(), s.ref("org/model:v1"), nil); !errors.Is(err, ocilocal.ErrArtifactType) {
		t.Error(err)
	}
	if blobs := s.requests("/blobs/"); len(blobs) > 0 {
		t.Errorf("%q", blobs)
	}
}

// TestPullPlatformHere: a pull for one platform returns neither an artifact for another one nor the
// whole index.
func TestPullPlatformHere(t *testing.T) {
	const amd64, arm64 = `{"os":"linux","architecture":"amd64"}`, `{"os":"linux","architecture":"arm64"}`
	want := &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	for name, c := range map[string]struct {
		before   *ocispec.Platform // what was pulled before
		policy   ocilocal.Policy
		outcome  ocilocal.Outcome
		requests int // of the second pull; −1 for any
	}{
		"the index":            {nil, ocilocal.Replace, ocilocal.Replaced, 2},
		"the index is kept":    {nil, ocilocal.KeepExisting, ocilocal.Conflicted, 1},
		"another":              {&ocispec.Platform{Architecture: "amd64"}, ocilocal.Replace, ocilocal.Replaced, -1},
		"another one is kept":  {&ocispec.Platform{Architecture: "amd64"}, ocilocal.KeepExisting, ocilocal.Conflicted, 1},
		"this one":             {want, ocilocal.KeepExisting, ocilocal.Unchanged, 1},
		"nothing":              {&ocispec.Platform{Architecture: "none"}, ocilocal.KeepExisting, ocilocal.Inserted, -1},
		"it doesn't say which": {&ocispec.Platform{Architecture: "s390x"}, ocilocal.KeepExisting, ocilocal.Conflicted, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			image := func(config, arch string) string {
				s.putBlob("org/multi", []byte(config))
				doc := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":` + desc(ocispec.MediaTypeImageConfig, config) + `,"layers":[]}`
				s.putRaw("org/multi", arch, ocispec.MediaTypeImageManifest, []byte(doc))
				return strings.TrimSuffix(desc(ocispec.MediaTypeImageManifest, doc), "}") + `,"platform":{"os":"linux","architecture":"` + arch + `"}}`
			}
			doc := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[` +
				strings.Join([]string{image(amd64, "amd64"), image(arm64, "arm64"), image("{}", "s390x")}, ",") + `]}`
			s.putRaw("org/multi", "v1", ocispec.MediaTypeImageIndex, []byte(doc))
			r := openRemote(t, nil)
			if _, err := r.Pull(t.Context(), s.ref("org/multi:v1"), &ocilocal.PullOptions{Platform: c.before}); err != nil && !errors.Is(err, ocilocal.ErrNotFound) {
				t.Fatal(err)
			}
			s.forget()
			got, err := r.Pull(t.Context(), s.ref("org/multi:v1"), &ocilocal.PullOptions{Platform: want, PublishOptions: ocilocal.PublishOptions{Policy: c.policy}})
			if got == nil || got.Update.Outcome != c.outcome || got.Update.Descriptor.Digest != s.at("org/multi", "arm64").digest || errors.Is(err, ocilocal.ErrConflict) != (c.outcome == ocilocal.Conflicted) {
				t.Errorf("%+v, %v", got, err)
			}
			if n := len(s.requests("")); c.requests >= 0 && n != c.requests {
				t.Errorf("%q", s.requests(""))
			}
		})
	}
}

// TestPullKeepsNothingUnsynced: after a failed fsync of a large blob its bytes can't be trusted,
// and a second fsync could report success. So no file of the blob is kept, even if the pull failed
// for another reason first.
func TestPullKeepsNothingUnsynced(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		size    int
		failing bool
		want    error
	}{
		"at the end":     {2 << 20, false, syscall.EIO},
		"in between":     {65 << 20, false, syscall.EIO}, // so much is synced while the next blob comes in
		"and a blob 404": {65 << 20, true, ocilocal.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			large, last := noise(1, c.size), noise(2, 100)
			s.put(t, "org/model", "v1", large, last)
			if c.failing {
				s.failing(last)
			}
			r := openRemote(t, nil)
			var failed atomic.Bool
			ocilocal.SetFault(r, func(op, name string) error {
				if op == "fsync" && !failed.Swap(true) {
					return syscall.EIO
				}
				return nil
			})
			o := &ocilocal.PullOptions{Workers: 1}
			if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), o); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			ocilocal.SetFault(r, nil)
			if _, err := os.Lstat(filepath.Join(r.Root(), "tmp", "partial")); !errors.Is(err, fs.ErrNotExist) || !failed.Load() {
				t.Errorf("something is kept: %v", err)
			}
			checkUnpublished(t, r)
			s.behave()
			s.forget()
			got, err := r.Pull(t.Context(), s.ref("org/model:v1"), o)
			if want := int64(c.size) + 2 + int64(len(last)); err != nil || got.BytesReceived != want {
				t.Errorf("%+v, %v, want %d bytes", got, err, want)
			}
		})
	}
}

// TestPullNoSpace: a full disk is ErrNoSpace, at every file operation of a pull.
func TestPullNoSpace(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 100), noise(2, 2<<20))
	for _, at := range []struct{ op, name string }{
		{"mkdir", "tmp/partial"}, {"mkdir", "tmp/partial/"}, {"create", "tmp/partial/"}, {"write", "tmp/partial/"}, {"write", "tmp/"}, {"link", "tmp/"},
	} {
		r := openRemote(t, nil)
		hit := false
		ocilocal.SetFault(r, func(op, name string) error {
			if op == at.op && (name == at.name || strings.HasSuffix(at.name, "/") && strings.HasPrefix(name, at.name)) {
				hit = true
				return &fs.PathError{Op: op, Path: name, Err: syscall.ENOSPC}
			}
			return nil
		})
		_, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Workers: 1})
		if !hit || !errors.Is(err, ocilocal.ErrNoSpace) {
			t.Errorf("%s of %s, hit: %v: %v", at.op, at.name, hit, err)
		}
		ocilocal.SetFault(r, nil)
		checkUnpublished(t, r)
		if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
			t.Errorf("with space again: %v", err)
		}
	}
}
