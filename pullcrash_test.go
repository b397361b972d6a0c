package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// pullWorker pulls each reference that it is sent: "REF" → "pulled OUTCOME DIGEST".
func pullWorker(in *bufio.Scanner, args []string) error {
	r, err := ocilocal.Open(context.Background(), args[0], nil)
	if err != nil {
		return err
	}
	say("ready")
	for in.Scan() {
		got, err := r.Pull(context.Background(), ocilocal.MustParseReference(in.Text()), nil)
		if err != nil {
			return err
		}
		say("pulled", got.Update.Outcome, got.Artifact.Digest())
	}
	return r.Close()
}

// TestPullProcesses: several processes pull the same artifact at once. All get it without an error,
// and each large blob is received and stored once.
func TestPullProcesses(t *testing.T) {
	t.Parallel()
	for i := range scaled(3, 6, 50) {
		processes := []int{2, 2, 4}[i%3]
		size := []int{3 << 20, 3 << 20, scaled(5, 32, 32) << 20}[i%3]
		s := newServer(t)
		want := s.put(t, "org/model", "v1", noise(1, 100), noise(2, size), noise(3, 2<<20))
		// No process gets the manifest before all have asked for it.
		var all sync.WaitGroup
		all.Add(processes)
		s.overrideBy(func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/manifests/") && r.Method == "GET" {
				all.Done()
				all.Wait()
			}
			return false
		})
		root := filepath.Join(t.TempDir(), "root")
		var ws []*worker
		for range processes {
			ws = append(ws, startWorker(t, "pull", root))
		}
		for _, w := range ws {
			w.expect("ready")
		}
		for _, w := range ws {
			w.send(s.ref("org/model:v1").String())
		}
		peak := peakSize(t, root)
		outcomes := map[string]int{}
		for _, w := range ws {
			got := w.expect("pulled")
			outcomes[got[0]]++
			if got[1] != want.String() {
				t.Errorf("pulled %q", got)
			}
			w.finish()
		}
		if outcomes["inserted"] != 1 || outcomes["unchanged"] != processes-1 {
			t.Errorf("%v", outcomes)
		}
		// Large blobs are sent once: the others use the bytes of the first process.
		whole := int64(size + 2<<20)
		if n := s.served(); n < whole || n > whole+int64(processes)*102 {
			t.Errorf("%d bytes were served", n)
		}
		if n := peak(); n > whole*11/10+1<<20 {
			t.Errorf("%d bytes were stored at a time, of %d", n, whole)
		}
		r := mustOpen(t, root)
		if found := problems(t, r, nil, nil); len(found) > 0 {
			t.Errorf("%q", found)
		}
		mustClose(t, r)
	}
}

// TestPullKilled kills a pull in the middle of its blobs. The next pull resumes there.
func TestPullKilled(t *testing.T) {
	t.Parallel()
	const layer, layers = 6 << 20, 3
	for range scaled(4, 10, 100) {
		s := newServer(t)
		var blobs [][]byte
		for i := range layers {
			blobs = append(blobs, noise(byte(i), layer))
		}
		want := s.put(t, "org/model", "v1", blobs...)
		// The server sends a number of bytes in all, and then waits until its client is gone.
		most := int64(1<<20 + rand.IntN(layer*layers-(2<<20)))
		var sent, served atomic.Int64 // to the first pull, and to the one after it
		stopped := make(chan struct{})
		var once sync.Once
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			if r.UserAgent() == "second" { // a late request of the first one does not count
				s.plain(&meteredWriter{ResponseWriter: w, left: func(n int64) int64 { served.Add(n); return n }}, r)
				return true
			}
			s.plain(&meteredWriter{ResponseWriter: w, left: func(n int64) int64 {
				over := sent.Add(n) - most
				if over < 0 {
					return n
				}
				once.Do(func() { close(stopped) })
				return max(n-over, 0)
			}, gone: r.Context().Done()}, r)
			return true
		})
		root := filepath.Join(t.TempDir(), "root")
		w := startWorker(t, "pull", root)
		w.expect("ready")
		w.send(s.ref("org/model:v1").String())
		<-stopped
		w.kill()
		s.CloseClientConnections()

		r := mustOpen(t, root)
		for ref, err := range r.Refs(t.Context(), nil) {
			t.Errorf("%v is visible, %v", ref, err)
		}
		kept := int64(0)
		for _, name := range filesBelow(t, r, "tmp/partial") {
			kept += fileSize(t, name)
		}
		remote := &ocilocal.Remote{UserAgent: "second"}
		got, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Remote: remote})
		remote.CloseIdleConnections()
		if err != nil || got.Artifact.Digest() != want {
			t.Fatalf("%+v, %v", got, err)
		}
		// Complete blobs that were not published yet are kept as well.
		if n := served.Load(); n != layer*layers+2-kept || got.BytesReceived != n {
			t.Errorf("%d bytes served, %d received, %d were there", n, got.BytesReceived, kept)
		}
		if found := problems(t, r, nil, nil); len(found) > 0 {
			t.Errorf("%q", found)
		}
		mustClose(t, r)
	}
}

// A meteredWriter writes what left allows, and then waits until its client is gone.
type meteredWriter struct {
	http.ResponseWriter
	left func(n int64) int64
	gone <-chan struct{}
}

func (m *meteredWriter) Write(p []byte) (int, error) {
	for written := 0; written < len(p); {
		n := min(len(p)-written, 32<<10)
		allowed := int(m.left(int64(n)))
		if _, err := m.ResponseWriter.Write(p[written : written+allowed]); err != nil {
			return written, err
		}
		if written += allowed; allowed < n {
			m.ResponseWriter.(http.Flusher).Flush()
			<-m.gone
			panic(http.ErrAbortHandler)
		}
	}
	return len(p), nil
}

// TestPullCancelled: a pull whose context ends returns that error and leaves nothing visible.
func TestPullCancelled(t *testing.T) {
	for _, where := range []string{"/manifests/", "/blobs/"} {
		s := newServer(t)
		s.put(t, "org/model", "v1", noise(1, 100), noise(2, 3<<20))
		ctx, cancel := context.WithCancel(t.Context())
		// The end of the connection would not do: this may be a HEAD, after whose answer the client can
		// send the next request before it notices the end of ctx. The server then reads no further.
		left := make(chan struct{})
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, where) {
				if r.Method == "HEAD" { // a GET has a body that does not come
					w.Header().Set("Content-Length", "5")
				}
				w.(http.Flusher).Flush()
				cancel()
				<-left
				return true
			}
			return false
		})
		r := openRemote(t, nil)
		if _, err := r.Pull(ctx, s.ref("org/model:v1"), nil); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", where, err)
		}
		close(left)
		checkUnpublished(t, r)
		mustClose(t, r)
	}
}

func fileSize(t *testing.T, name string) int64 {
	t.Helper()
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}
