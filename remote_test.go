package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestHelperHangs: a credential helper that does not answer ends with its time limit, or earlier
// with the context of the call.
func TestHelperHangs(t *testing.T) {
	const soon = 9 * time.Second // the library itself ends a helper after 10
	if ranAlone(t) {
		return
	}
	if runtime.GOOS == "windows" {
		t.Skip("helpers are shell scripts here")
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	// helper makes a helper that reads a new FIFO.
	helper := func(name, script string) (fifo string) {
		fifo = filepath.Join(dir, name+".fifo")
		if out, err := exec.Command("mkfifo", fifo).CombinedOutput(); err != nil {
			t.Fatalf("%s, %v", out, err)
		}
		program := filepath.Join(dir, "docker-credential-"+name)
		write(t, program, "#!/bin/sh\n"+strings.ReplaceAll(script, "FIFO", `"`+fifo+`"`)+"\n")
		if err := os.Chmod(program, 0o700); err != nil {
			t.Fatal(err)
		}
		return fifo
	}
	for name, script := range map[string]string{
		"hangs":  `exec cat FIFO`,
		"parent": `cat FIFO; exit 1`,
		"deaf":   `trap "" TERM INT HUP PIPE; cat FIFO >/dev/null; while :; do read x; done`,
	} {
		fifo := helper(name, script)
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			file := filepath.Join(t.TempDir(), "config.json")
			write(t, file, `{"credsStore":"`+name+`"}`)
			ended := make(chan error, 1)
			go func() {
				_, err := ocilocal.FileCredentials(file)(ctx, "r.test", "org/model")
				ended <- err
			}()
			w, err := os.OpenFile(fifo, os.O_WRONLY, 0) // returns when the helper reads
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			began := time.Now()
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) || time.Since(began) > soon {
				t.Errorf("%v after %v", err, time.Since(began))
			}
		})
	}
	t.Run("limit", func(t *testing.T) {
		fifo := helper("limit", `exec cat FIFO`)
		w := make(chan *os.File, 1)
		go func() {
			f, _ := os.OpenFile(fifo, os.O_WRONLY, 0) // returns when somebody reads
			w <- f
		}()
		began := time.Now()
		c, err := ocilocal.AskHelper(t.Context(), "limit", "r.test", 200*time.Millisecond)
		if err == nil || time.Since(began) > soon || !strings.Contains(err.Error(), "no answer after 200ms") || c != (ocilocal.Credential{}) {
			t.Errorf("%v, %v", c, err)
		}
		// The helper may have ended before it read its input.
		r, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := <-w
		defer f.Close()
		r.Close()
		if _, err := f.Write([]byte("x")); err == nil {
			t.Error("the helper still reads")
		}
	})
	t.Run("name", func(t *testing.T) {
		_, err := ocilocal.AskHelper(t.Context(), strings.Repeat("x", 101), "r.test", time.Second)
		mustFail(t, err, ocilocal.ErrInvalidArgument)
	})
}

// TestHTTP2Reset: a blob whose HTTP/2 stream is reset is resumed, on the same connection.
func TestHTTP2Reset(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	large := noise(1, 5<<20)
	s.put(t, "org/model", "v1", large)
	var mu sync.Mutex
	var ranges []string
	resetUploads := 1
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.ProtoMajor != 2 {
			t.Errorf("%s %s by %s", r.Method, r.URL, r.Proto)
		}
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.Method == "GET" && strings.HasSuffix(r.URL.Path, string(digest.FromBytes(large))):
			if ranges = append(ranges, r.Header.Get("Range")); len(ranges) <= 2 {
				s.plain(&cutWriter{ResponseWriter: w, left: 2 << 20}, r)
				panic(http.ErrAbortHandler)
			}
		case r.Method == "PUT" && strings.Contains(r.URL.Path, "/uploads/") && r.ContentLength > 1<<20 && resetUploads > 0:
			resetUploads--
			io.CopyN(io.Discard, r.Body, 1<<20)
			panic(http.ErrAbortHandler)
		}
		return false
	})
	remote := in.remote("", ocilocal.Credential{})
	r := openRemote(t, remote)
	got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
	if err != nil || got.BytesReceived != int64(len(large)+2) {
		t.Errorf("%+v, %v", got, err)
	}
	if text := strings.Join(ranges, " "); text != " bytes=2097152-5242879 bytes=4194304-5242879" {
		t.Errorf("ranges %q", text)
	}
	if sent, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{As: s.ref("org/other:v1")}); err != nil || sent.BlobsSent+sent.BlobsMounted != 2 {
		t.Errorf("%+v, %v", sent, err)
	}
	s.noMount = true
	if sent, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{As: s.ref("org/third:v1")}); err != nil || sent.BlobsSent != 2 || resetUploads != 0 {
		t.Errorf("%+v, %v", sent, err)
	}
	if n := in.sites[registrySite].dials; n != 1 {
		t.Errorf("%d connections", n)
	}
	if found := problems(t, r, nil, nil); len(found) > 0 {
		t.Errorf("%q", found)
	}
}

// An inFlight is a transport that counts the requests whose answers aren't closed.
type inFlight struct {
	next      http.RoundTripper
	now, most atomic.Int64
}

func (f *inFlight) RoundTrip(r *http.Request) (*http.Response, error) {
	for n := f.now.Add(1); ; {
		if m := f.most.Load(); n <= m || f.most.CompareAndSwap(m, n) {
			break
		}
	}
	res, err := f.next.RoundTrip(r)
	if err != nil {
		f.now.Add(-1)
		return nil, err
	}
	res.Body = &flightBody{res.Body, sync.OnceFunc(func() { f.now.Add(-1) })}
	return res, nil
}

type flightBody struct {
	io.ReadCloser
	landed func()
}

func (b *flightBody) Close() error {
	defer b.landed()
	return b.ReadCloser.Close()
}

// TestMaxPerHost: no more requests to a host run at a time than MaxPerHost says. With a limit of
// one, every pull and push still ends: no request needs a second one to end.
func TestMaxPerHost(t *testing.T) {
	t.Parallel()
	for _, most := range []int{1, 3} {
		for _, referrersAPI := range []bool{true, false} {
			t.Run(fmt.Sprint(most, referrersAPI), func(t *testing.T) {
				s := newServer(t)
				s.user, s.password, s.token = "me", secretPassword, true
				s.noReferrers = !referrersAPI
				s.minChunk = 16 << 20
				var layers [][]byte
				for i := range 20 {
					layers = append(layers, noise(byte(i), 1000*(i+1)))
				}
				layers = append(layers, noise(100, 3<<20), noise(101, 3<<20), noise(102, 17<<20))
				var cuts atomic.Int64
				s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method == "GET" && strings.Contains(r.URL.Path, "/blobs/sha256:") && r.Header.Get("Authorization") != "" && cuts.Add(1)%5 == 0 {
						w.Header().Set("Content-Length", fmt.Sprint(s.blobSize("org/model", digest.Digest(path.Base(r.URL.Path)))))
						w.(http.Flusher).Flush()
						panic(http.ErrAbortHandler)
					}
					return false
				})
				flight := &inFlight{next: &http.Transport{DisableCompression: true}}
				remote := &ocilocal.Remote{
					Client: &http.Client{Transport: flight}, MaxPerHost: most,
					Credentials: ocilocal.StaticCredential(s.host, ocilocal.Credential{Username: "me", Password: secretPassword}),
				}
				from, to := openRemote(t, remote), openRemote(t, remote)
				ref := s.ref("org/model:v1")
				a := pushed(t, from, ref, nil, nil, layers...)
				pushed(t, from, s.ref("org/model:v2"), nil, descOf(a), noise(50, 10))
				for _, p := range []ocilocal.PushOptions{{Workers: 8}, {Workers: 8, As: s.ref("org/other:v1")}} {
					if _, err := from.Push(t.Context(), ref, &p); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := from.Push(t.Context(), s.ref("org/model:v2"), &ocilocal.PushOptions{Workers: 8}); err != nil {
					t.Fatal(err)
				}
				got, err := to.Pull(t.Context(), ref, &ocilocal.PullOptions{Workers: 8})
				if err != nil || got.Artifact.Digest() != a.Digest() {
					t.Fatal(err)
				}
				for d, err := range remote.Referrers(t.Context(), ref, "") {
					// The body of a loop over a list may make requests.
					if err == nil {
						_, err = remote.Manifest(t.Context(), s.ref("org/model@"+string(d.Digest)))
					}
					if err != nil {
						t.Error(err)
					}
				}
				for tag, err := range remote.Tags(t.Context(), ref) {
					if err == nil {
						_, err = remote.Resolve(t.Context(), s.ref("org/model:"+tag))
					}
					if err != nil {
						t.Error(err)
					}
				}
				if n := flight.most.Load(); n != int64(most) || flight.now.Load() != 0 {
					t.Errorf("%d requests at a time, %d open", n, flight.now.Load())
				}
			})
		}
	}
}

// TestEndIsPrompt: when the context of a call ends, the call ends soon, in every state in which it
// may wait.
func TestEndIsPrompt(t *testing.T) {
	const soon = 4500 * time.Millisecond // the end of an upload gives up after 5 s by itself
	hang := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) // the end of a connection is only seen after that
		<-r.Context().Done()
	}
	for name, c := range map[string]struct {
		hangs func(r *http.Request) bool
		push  bool
		fails bool // bytes are refused
	}{
		"a manifest":                   {hangs: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }},
		"a blob":                       {hangs: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }},
		"a look for a blob":            {push: true, hangs: func(r *http.Request) bool { return r.Method == "HEAD" }},
		"a new upload":                 {push: true, hangs: func(r *http.Request) bool { return r.Method == "POST" }},
		"an upload":                    {push: true, hangs: func(r *http.Request) bool { return r.Method == "PUT" }},
		"an upload and its end":        {push: true, hangs: func(r *http.Request) bool { return r.Method == "PUT" || r.Method == "DELETE" }},
		"the end of a failed upload":   {push: true, fails: true, hangs: func(r *http.Request) bool { return r.Method == "DELETE" }},
		"a manifest that is to be put": {push: true, hangs: func(r *http.Request) bool { return r.Method == "PUT" && strings.Contains(r.URL.Path, "/manifests/") }},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.put(t, "org/model", "v1", noise(1, 100), noise(2, 3<<20))
			arrived := make(chan struct{}, 1000)
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if c.fails && r.Method == "PUT" {
					status(500)(w, r)
					return true
				}
				if !c.hangs(r) {
					return false
				}
				arrived <- struct{}{}
				hang(w, r)
				return true
			})
			r := openRemote(t, &ocilocal.Remote{MaxPerHost: 1})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ref := s.ref("org/model:v1")
			if c.push {
				ref = s.ref("org/mine:v1")
				pushed(t, r, ref, nil, nil, noise(3, 100), noise(4, 100))
			}
			ended := make(chan error, 1)
			go func() {
				var err error
				if c.push {
					_, err = r.Push(ctx, ref, nil)
				} else {
					_, err = r.Pull(ctx, ref, nil)
				}
				ended <- err
			}()
			<-arrived
			// Another call waits for the only slot, and ends as soon.
			other, leave := context.WithCancel(t.Context())
			waits := make(chan error, 1)
			go func() {
				_, err := r.Pull(other, s.ref("org/model:v9"), nil)
				waits <- err
			}()
			began := time.Now()
			leave()
			if err := <-waits; !errors.Is(err, context.Canceled) || time.Since(began) > soon {
				t.Errorf("who waits: %v after %v", err, time.Since(began))
			}
			began = time.Now()
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) || time.Since(began) > soon {
				t.Errorf("%v after %v", err, time.Since(began))
			}
		})
	}
}

// TestPlainHTTP: without Remote.PlainHTTP, only loopback hosts are asked without TLS.
func TestPlainHTTP(t *testing.T) {
	for host, want := range map[string]string{
		"localhost": "http://localhost", "localhost:5000": "http://localhost:5000", "127.0.0.1:5000": "http://127.0.0.1:5000", "127.8.9.1:5000": "http://127.8.9.1:5000",
		"[::1]:5000": "http://[::1]:5000", "[2001:db8::1]:5000": "https://[2001:db8::1]:5000", "10.0.0.1": "https://10.0.0.1", "192.0.2.1:5000": "https://192.0.2.1:5000",
		"localhost.test": "https://localhost.test", "127.0.0.1.test": "https://127.0.0.1.test", "docker.io": "https://registry-1.docker.io",
	} {
		asked := ""
		remote := &ocilocal.Remote{Retry: quick, Client: &http.Client{Transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
			asked = r.URL.Scheme + "://" + r.URL.Host
			return &http.Response{StatusCode: 404, Body: http.NoBody, Request: r}, nil
		})}}
		_, err := remote.Resolve(t.Context(), ocilocal.MustParseReference(host+"/org/model:v1"))
		mustFail(t, err, ocilocal.ErrNotFound)
		if asked != want {
			t.Errorf("%s: %s, want %s", host, asked, want)
		}
	}
}

// TestWarnOnce: each warning of a registry is reported once, fit for a terminal. Warnings of other
// hosts are not.
func TestWarnOnce(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.user, s.password = "me", secretPassword
	s.put(t, "org/model", "v1", noise(1, 100))
	in.site("https://cdn.test", "203.0.113.2", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Warning", `299 - "this is not the registry"`)
		w.Write(noise(1, 100))
	}))
	s.sendOn("https://cdn.test/blob")
	sendOn := s.overrideNow()
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if sendOn(w, r) {
			return true
		}
		w.Header()["Warning"] = []string{`299 - "be warned"`, `299 - "` + r.Header.Get("Authorization") + ` \u009b` + "\u009b" + `"`, `199 - "not this"`, `299 other "nor this"`, `299 - "` + strings.Repeat("x", 1000), "299 - \"be warned\""}
		return false
	})
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	for range 3 {
		if _, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
			t.Fatal(err)
		}
	}
	in.quiet(nil)
	want := map[string]bool{}
	for _, w := range in.warnings {
		if want[w] {
			t.Errorf("twice: %q", w)
		}
		want[w] = true
		if !strings.HasPrefix(w, "registry.test ") || len(w) > 300 || strings.Contains(w, "this") {
			t.Errorf("%q", w)
		}
	}
	if !want["registry.test be warned"] || len(want) != 3 {
		t.Errorf("%q", in.warnings)
	}
}

// TestWarnOneAtATime: requests that run at the same time call Warn one after the other.
func TestWarnOneAtATime(t *testing.T) {
	s := newServer(t)
	const requests = 8
	var all sync.WaitGroup // nobody is answered before all have asked
	all.Add(requests)
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Warning", `299 - "`+r.URL.Path+`"`)
		all.Done()
		all.Wait()
		return false
	})
	var inside, calls atomic.Int64
	remote := &ocilocal.Remote{Warn: func(string, string) {
		if inside.Add(1) != 1 {
			t.Error("called by two at a time")
		}
		defer inside.Add(-1)
		for range 1000 { // time for others to come
			runtime.Gosched()
		}
		calls.Add(1)
	}}
	defer remote.CloseIdleConnections()
	var wg sync.WaitGroup
	for i := range requests {
		wg.Go(func() {
			if _, err := remote.Manifest(t.Context(), s.ref(fmt.Sprintf("org/model:v%d", i))); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if calls.Load() != requests {
		t.Errorf("%d calls", calls.Load())
	}
}

// TestLargeBlobsAreStreamed: the memory that a pull and a push take does not grow with the blob.
func TestLargeBlobsAreStreamed(t *testing.T) {
	s := newServer(t)
	s.noMount = true
	size := scaled(32, 64, 512) << 20
	s.put(t, "org/model", "v1", noise(1, size))
	r := openRemote(t, nil)
	ref := s.ref("org/model:v1")
	push := func(name string, chunk int64) error {
		got, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{As: s.ref(name), ChunkSize: chunk})
		if err == nil && got.BytesSent != int64(size)+2 {
			t.Errorf("%+v", got)
		}
		return err
	}
	for name, do := range map[string]func() error{
		"push":           func() error { return push("org/whole:v1", 0) },
		"push in chunks": func() error { return push("org/chunks:v1", int64(size/8)) },
		"pull": func() error {
			_, err := openRemote(t, nil).Pull(t.Context(), ref, nil)
			return err
		},
	} {
		if _, err := r.Pull(t.Context(), ref, nil); err != nil {
			t.Fatal(err)
		}
		if n := allocated(func() {
			if err := do(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}); n > 8<<20 && !raceDetector {
			t.Errorf("%s: %d bytes were allocated for a blob of %d", name, n, size)
		}
	}
}

// TestRenewTogether: requests that stall together retire their client once. Otherwise they would
// push other retired clients out of the list.
func TestRenewTogether(t *testing.T) {
	remote := &ocilocal.Remote{}
	if n := ocilocal.RenewRemote(remote, 16); n != 1 {
		t.Errorf("%d clients are retired", n)
	}
}
