package ocilocal_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ocilocal/ocilocal"
)

// A drip is a body of which a few bytes come at a time.
type drip struct {
	ctx   context.Context
	text  string
	each  int
	every time.Duration
	there int // of each, those that came and weren't read
}

func (d *drip) Read(p []byte) (int, error) {
	if d.there == 0 {
		select {
		case <-time.After(d.every):
			d.there = min(d.each, len(d.text))
		case <-d.ctx.Done():
			return 0, d.ctx.Err()
		}
	}
	n := copy(p, d.text[:d.there])
	d.there -= n
	if d.text = d.text[n:]; d.text == "" {
		return n, io.EOF
	}
	return n, nil
}

func (d *drip) Close() error { return nil }

// TestSlowDrip: a request whose bytes only trickle ends after the stall timeout. One that is only
// slow does not.
func TestSlowDrip(t *testing.T) {
	manifest := scriptManifest + strings.Repeat(" ", 60<<10)
	for name, c := range map[string]struct {
		each  int
		every time.Duration
		limit time.Duration // StallTimeout
		after time.Duration // it ends
		want  error
	}{
		"a byte each second":       {each: 1, every: time.Second, after: time.Minute, want: ocilocal.ErrTransport},
		"nothing":                  {each: 1, every: time.Hour, after: time.Minute, want: ocilocal.ErrTransport},
		"shorter timeout":          {each: 100, every: time.Second, limit: 5 * time.Second, after: 5 * time.Second, want: ocilocal.ErrTransport},
		"slow, but no trickle":     {each: 1024, every: 10 * time.Second, after: time.Duration(len(manifest)+1023) / 1024 * 10 * time.Second},
		"slow at a longer timeout": {each: 1024, every: time.Minute, limit: time.Hour, after: time.Duration(len(manifest)+1023) / 1024 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newScript(func(r *http.Request) (*http.Response, error) {
					return reply(r, 200, int64(len(manifest)), &drip{ctx: r.Context(), text: manifest, each: c.each, every: c.every}), nil
				})
				remote := s.remote()
				remote.StallTimeout = c.limit
				remote.Retry = func(int, error) (time.Duration, bool) { return 0, false }
				_, err := remote.Manifest(t.Context(), scriptRef)
				if !errors.Is(err, c.want) || c.want == nil && err != nil || time.Since(s.began) != c.after {
					t.Errorf("%v after %v, want %v after %v", err, time.Since(s.began), c.want, c.after)
				}
			})
		})
	}
}

// TestSlowDripEnds: the end of a call ends a trickling body at once, and a request without an
// answer as well.
func TestSlowDripEnds(t *testing.T) {
	for _, hangs := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := newScript(func(r *http.Request) (*http.Response, error) {
				if hangs {
					<-r.Context().Done()
					return nil, r.Context().Err()
				}
				return reply(r, 200, 1<<20, &drip{ctx: r.Context(), text: strings.Repeat("x", 1<<20), each: 1, every: time.Second}), nil
			})
			ctx, cancel := context.WithTimeout(t.Context(), 3500*time.Millisecond)
			defer cancel()
			if _, err := s.remote().Manifest(ctx, scriptRef); !errors.Is(err, context.DeadlineExceeded) || time.Since(s.began) != 3500*time.Millisecond {
				t.Errorf("%v after %v", err, time.Since(s.began))
			}
		})
	}
}

// A silentConn brings no more bytes once it is dead, and is not closed.
type silentConn struct {
	net.Conn
	dead   *atomic.Bool
	closed chan struct{}
	once   sync.Once
}

func (c *silentConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.dead.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *silentConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// TestSilentConnections: a connection whose peer has disappeared costs one stall. The next attempt
// uses a new connection.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{true, false} {
		in := newInternet(t)
		s := in.registry("https://registry.test", "203.0.113.1")
		s.put(t, "org/model", "v1", noise(1, 100))
		cdn := in.site("https://cdn.test", "203.0.113.2", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(noise(1, 100)) }))
		s.sendOn("https://cdn.test/blob")
		dead := new(atomic.Bool)
		remote := in.remote("", ocilocal.Credential{})
		transport := remote.Client.Transport.(*http.Transport)
		transport.ForceAttemptHTTP2 = http2
		transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := in.dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			in.mu.Lock()
			defer in.mu.Unlock()
			return &silentConn{Conn: conn, dead: dead, closed: make(chan struct{})}, nil
		}
		remote.StallTimeout = time.Second // a live connection answers sooner, on a busy machine too
		fetch := func() {
			r := openRemote(t, remote)
			if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
				t.Errorf("HTTP/2 %v: %v", http2, err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
		fetch()
		old := dead
		in.mu.Lock()
		dead = new(atomic.Bool) // of connections from now on
		in.failures = nil
		in.mu.Unlock()
		old.Store(true)
		fetch()
		if n := len(in.failures); n == 0 || n > 4 {
			t.Errorf("HTTP/2 %v: %d failures", http2, n)
		}
		if len(cdn.asked()) < 2 {
			t.Errorf("HTTP/2 %v: the blob came from elsewhere", http2)
		}
	}
}
