package ocilocal_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A gate holds back the answers for one blob until it is opened. asked gets one element for each
// manifest that was asked for.
type gate struct {
	open  chan struct{}
	asked chan struct{}
}

// openAfter opens the gate when so many manifests were asked for.
func (g *gate) openAfter(n int) {
	for range n {
		<-g.asked
	}
	close(g.open)
}

// holdBack makes a gate for the blob with these bytes.
func (s *server) holdBack(blob []byte) *gate {
	g := &gate{open: make(chan struct{}), asked: make(chan struct{}, 1000)}
	s.overrideBy(func(_ http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, string(digest.FromBytes(blob))):
			<-g.open
		case r.Method == "GET" && strings.Contains(r.URL.Path, "/manifests/"):
			g.asked <- struct{}{}
		}
		return false
	})
	return g
}

// TestPullShared: many calls for the same artifact, under one name or many, receive its blobs once.
func TestPullShared(t *testing.T) {
	const calls = 16
	for _, handles := range []int{1, 2} {
		t.Run(fmt.Sprint(handles, " handles"), func(t *testing.T) {
			s := newServer(t)
			large := noise(1, 4<<20)
			want := s.put(t, "org/model", "v1", large, noise(2, 100))
			g := s.holdBack(large)
			root := t.TempDir()
			remote := &ocilocal.Remote{Retry: quick}
			defer remote.CloseIdleConnections()
			var rs []*ocilocal.LocalRegistry
			for range handles {
				r, err := ocilocal.Open(t.Context(), root, &ocilocal.Options{Remote: remote})
				if err != nil {
					t.Fatal(err)
				}
				rs = append(rs, r)
			}
			var wg sync.WaitGroup
			results := make([]*ocilocal.PullResult, calls)
			for i := range calls {
				wg.Go(func() {
					o := &ocilocal.PullOptions{}
					if i%2 == 1 {
						o.As = ocilocal.MustParseReference(fmt.Sprint("example.com/own:v", i))
					}
					var err error
					if results[i], err = rs[i%handles].Pull(t.Context(), s.ref("org/model:v1"), o); err != nil || results[i].Artifact.Digest() != want {
						t.Errorf("%d: %+v, %v", i, results[i], err)
					}
				})
			}
			g.openAfter(calls)
			wg.Wait()
			received, shared := int64(0), 0
			for _, got := range results {
				if got != nil {
					received += got.BytesReceived
					if got.Shared {
						shared++
					}
				}
			}
			if most := int64(len(large)) + int64(handles)*102; s.served() > most || received != s.served() || shared < calls-2*handles {
				t.Errorf("%d bytes were served and %d received, at most %d are wanted; %d calls shared", s.served(), received, most, shared)
			}
			if found := problems(t, rs[0], nil, nil); len(found) > 0 {
				t.Errorf("%q", found)
			}
			for _, r := range rs {
				mustClose(t, r)
			}
		})
	}
}

// TestPullSharedStores: sixteen calls pull an artifact of 32 MiB. They receive little more than
// that, and at no time have more on the disk.
func TestPullSharedStores(t *testing.T) {
	const calls = 16
	s := newServer(t)
	size := scaled(4, 32, 32) << 20
	large := noise(1, size)
	s.put(t, "org/model", "v1", large)
	g := s.holdBack(large)
	r := openRemote(t, nil)
	peak := peakSize(t, r.Root())
	var wg sync.WaitGroup
	for i := range calls {
		wg.Go(func() {
			o := &ocilocal.PullOptions{As: ocilocal.MustParseReference(fmt.Sprint("example.com/own:v", i))}
			if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), o); err != nil {
				t.Error(err)
			}
		})
	}
	g.openAfter(calls)
	wg.Wait()
	if n := s.served(); n > int64(size)*11/10 {
		t.Errorf("%d bytes were received for %d", n, size)
	}
	if n := peak(); n > int64(size)*11/10 {
		t.Errorf("%d bytes were stored for %d", n, size)
	}
}

// peakSize adds up the files of blobs/ and tmp/ again and again until peak is called, which returns
// the largest sum.
func peakSize(t testing.TB, root string) (peak func() int64) {
	largest, stop, done := int64(0), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for last := false; !last; {
			select {
			case <-stop:
				last = true
			case <-time.After(time.Millisecond):
			}
			sum := int64(0)
			var counted []fs.FileInfo
			for _, dir := range []string{"blobs", "tmp"} {
				filepath.WalkDir(filepath.Join(root, dir), func(_ string, e fs.DirEntry, err error) error {
					if err == nil && e.Type().IsRegular() {
						fi, err := e.Info()
						if err != nil || slices.ContainsFunc(counted, func(other fs.FileInfo) bool { return os.SameFile(fi, other) }) {
							return nil // it is gone, or another name of a file
						}
						counted = append(counted, fi)
						sum += fi.Size()
					}
					return nil
				})
			}
			largest = max(largest, sum)
		}
	}()
	return func() int64 {
		close(stop)
		<-done
		return largest
	}
}

// TestPullSharedCancelled: a call whose context ends leaves, and the others get the artifact. The
// last one to leave ends the transfer.
func TestPullSharedCancelled(t *testing.T) {
	s := newServer(t)
	large := noise(1, 2<<20)
	s.put(t, "org/model", "v1", large)
	g := s.holdBack(large)
	r := openRemote(t, nil)
	first, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := r.Pull(first, s.ref("org/model:v1"), &ocilocal.PullOptions{As: ocilocal.MustParseReference("example.com/first:v1")})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-g.asked
	wg.Go(func() {
		if got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || got.Update.Outcome != ocilocal.Inserted {
			t.Errorf("%+v, %v", got, err)
		}
	})
	<-g.asked
	cancel()
	close(g.open)
	wg.Wait()
	if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference("example.com/first:v1")); ok || err != nil {
		t.Errorf("the call that left has its ref: %v", err)
	}

	s.put(t, "org/model", "v2", noise(2, 2<<20))
	g = s.holdBack(noise(2, 2<<20))
	alone, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		if _, err := r.Pull(alone, s.ref("org/model:v2"), nil); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-g.asked
	cancel()
	wg.Wait()
	close(g.open)
	mustClose(t, r)
}

// TestPullSharedConflict: among calls that share a transfer, each call's policy decides about its
// own ref.
func TestPullSharedConflict(t *testing.T) {
	s := newServer(t)
	large := noise(1, 2<<20)
	want := s.put(t, "org/model", "v1", large)
	g := s.holdBack(large)
	r := openRemote(t, nil)
	taken := ocilocal.MustParseReference("example.com/taken:v1")
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{As: taken})
		if !errors.Is(err, ocilocal.ErrConflict) {
			t.Error(err)
		}
	})
	<-g.asked
	wg.Go(func() {
		if got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || got.Artifact.Digest() != want {
			t.Errorf("%+v, %v", got, err)
		}
	})
	<-g.asked
	if _, err := build(t, r, taken.String(), nil, "somebody was faster"); err != nil {
		t.Fatal(err)
	}
	close(g.open)
	wg.Wait()
	mustClose(t, r)
}

// TestPullVerify: Verify finds damaged bytes here, and fetches them again.
func TestPullVerify(t *testing.T) {
	s := newServer(t)
	large := noise(1, 2<<20)
	s.put(t, "org/model", "v1", large, noise(2, 100))
	r := openRemote(t, nil)
	ref := s.ref("org/model:v1")
	if _, err := r.Pull(t.Context(), ref, nil); err != nil {
		t.Fatal(err)
	}
	pinned, err := ref.WithDigest(mustResolve(t, r, ref).Digest)
	if err != nil {
		t.Fatal(err)
	}
	for name, again := range map[string]func() error{
		"pull":           func() error { _, err := r.Pull(t.Context(), ref, &ocilocal.PullOptions{Verify: true}); return err },
		"pull by digest": func() error { _, err := r.Pull(t.Context(), pinned, &ocilocal.PullOptions{Verify: true}); return err },
		"load": func() error {
			_, err := r.LoadWith(t.Context(), ref, &ocilocal.PullOptions{Verify: true})
			return err
		},
	} {
		rewriteReadOnly(t, blobFile(r, digest.FromBytes(large)), flipBit)
		s.forget()
		if err := again(); err != nil || s.served() != int64(len(large)) {
			t.Errorf("%s: %v, %d bytes were served", name, err, s.served())
		}
		if found := problems(t, r, nil, nil); len(found) > 0 {
			t.Errorf("%s: %q", name, found)
		}
		// If nothing is damaged, nothing is received.
		s.forget()
		if err := again(); err != nil || s.served() != 0 {
			t.Errorf("%s: %v, %d bytes were served", name, err, s.served())
		}
	}
	mustClose(t, r)
}

func mustResolve(t testing.TB, r *ocilocal.LocalRegistry, ref ocilocal.Reference) ocispec.Descriptor {
	t.Helper()
	d, err := r.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestPullSharedLeft: after a call has returned the error of its context, it gets no ref, even
// though the transfer goes on for others.
func TestPullSharedLeft(t *testing.T) {
	s := newServer(t)
	large := noise(1, 2<<20)
	s.put(t, "org/model", "v1", large)
	g := s.holdBack(large)
	r := openRemote(t, nil)
	left := ocilocal.MustParseReference("example.com/first:v1")
	db, err := sql.Open("sqlite", filepath.Join(r.Root(), "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	first, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	returned := make(chan struct{})
	wg.Go(func() {
		defer close(returned)
		_, err := r.Pull(first, s.ref("org/model:v1"), &ocilocal.PullOptions{As: left})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-g.asked
	wg.Go(func() {
		if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
			t.Error(err)
		}
	})
	<-g.asked
	if _, err := db.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	close(g.open)
	for { // until the blob has its name: then the transfer waits for the index
		if _, err := os.Stat(blobFile(r, digest.FromBytes(large))); err == nil {
			break
		}
	}
	cancel()
	<-returned
	if _, err := db.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if ok, err := r.Exists(t.Context(), left); ok || err != nil {
		t.Errorf("the call that left has its ref: %v", err)
	}
	mustClose(t, r)
}

// TestPullSharedPanic: if a function of the caller panics or ends its goroutine, each call that
// shares the transfer does the same, and no other call. The registry and the Remote can be used on.
func TestPullSharedPanic(t *testing.T) {
	for name, leave := range map[string]func(){"panic": func() { panic("the caller's own") }, "goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			large := noise(1, 2<<20)
			want := s.put(t, "org/model", "v1", large)
			g := s.holdBack(large)
			hold, asked := s.overrideNow(), make(chan struct{})
			s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
				hold(w, q)
				if user, _, _ := q.BasicAuth(); user == "me" || !strings.Contains(q.URL.Path, "/blobs/") {
					return false
				}
				w.Header().Set("WWW-Authenticate", "Basic realm=x") // so only the transfer asks for a credential
				fail(w, 401, "UNAUTHORIZED")
				return true
			})
			var bad atomic.Bool
			bad.Store(true)
			r := openRemote(t, &ocilocal.Remote{MaxPerHost: 1, Credentials: func(context.Context, string, string) (ocilocal.Credential, error) {
				if bad.Load() {
					<-asked
					leave()
				}
				return ocilocal.Credential{Username: "me", Password: "x"}, nil
			}})
			var wg sync.WaitGroup
			pull := func() {
				defer func() {
					v := recover()
					if got := fmt.Sprint(v); (v != nil) != (name == "panic") || v != nil && !strings.Contains(got, "the caller's own") {
						t.Errorf("%.100s", got)
					}
				}()
				_, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
				if err == nil || !strings.Contains(err.Error(), "Goexit") {
					t.Error(err)
				}
			}
			wg.Go(pull)
			close(g.open)
			<-g.asked
			close(asked)
			wg.Wait()
			bad.Store(false)
			if got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || got.Artifact.Digest() != want {
				t.Errorf("%+v, %v", got, err)
			}
			mustClose(t, r)
		})
	}
}
