package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// The tests of this file run in a bubble, where time passes only while everybody waits.

// A script is a registry that needs no network: the answer to each request in turn, the last for all further ones.
type script struct {
	answers []func(*http.Request) (*http.Response, error)
	at      []time.Duration // when each request came
	began   time.Time
}

func newScript(answers ...func(*http.Request) (*http.Response, error)) *script {
	return &script{answers: answers, began: time.Now()}
}

func (s *script) RoundTrip(r *http.Request) (*http.Response, error) {
	s.at = append(s.at, time.Since(s.began))
	return s.answers[min(len(s.at), len(s.answers))-1](r)
}

func (s *script) remote() *ocilocal.Remote {
	return &ocilocal.Remote{Client: &http.Client{Transport: s}}
}

var scriptRef = ocilocal.MustParseReference("registry.test/org/model:v1")

const scriptManifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`

func answer(status int, body string, header ...string) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		return reply(r, status, int64(len(body)), io.NopCloser(strings.NewReader(body)), header...), nil
	}
}

func reply(r *http.Request, status int, size int64, body io.ReadCloser, header ...string) *http.Response {
	h := http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}
	for i := 0; i < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: h, ContentLength: size, Body: body, Request: r}
}

func refuse(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") }

// nobody is a registry that does not run.
func nobody(*http.Request) (*http.Response, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
}

// TestRetryWaits: how long who is turned away stays away.
func TestRetryWaits(t *testing.T) {
	good := answer(200, scriptManifest)
	type span struct{ least, most time.Duration } // before a request, after the one before
	const second = time.Second
	backoff := []span{{50 * time.Millisecond, second / 2}, {100 * time.Millisecond, second}, {200 * time.Millisecond, 2 * second}, {400 * time.Millisecond, 4 * second}, {800 * time.Millisecond, 8 * second}}
	for name, c := range map[string]struct {
		answers []func(*http.Request) (*http.Response, error)
		waits   []span
		want    error
	}{
		"seconds":                {[]func(*http.Request) (*http.Response, error){answer(429, "", "Retry-After", "7"), answer(503, "", "Retry-After", "60"), good}, []span{{7 * second, 8 * second}, {60 * second, 61 * second}}, nil},
		"a date":                 {[]func(*http.Request) (*http.Response, error){answer(429, "", "Retry-After", "Sat, 01 Jan 2000 00:00:20 GMT"), good}, []span{{20 * second, 21 * second}}, nil},
		"a date that is past":    {[]func(*http.Request) (*http.Response, error){answer(429, "", "Retry-After", "Fri, 31 Dec 1999 23:59:59 GMT"), good}, backoff[:1], nil},
		"no answer, then one":    {[]func(*http.Request) (*http.Response, error){refuse, refuse, good}, backoff[:2], nil},
		"a storm":                {[]func(*http.Request) (*http.Response, error){answer(429, "")}, backoff, ocilocal.ErrRateLimited},
		"a storm of long waits":  {[]func(*http.Request) (*http.Response, error){answer(429, "", "Retry-After", "61")}, nil, ocilocal.ErrRateLimited},
		"fails for ever":         {[]func(*http.Request) (*http.Response, error){answer(500, "")}, backoff, ocilocal.ErrTransport},
		"no connection for ever": {[]func(*http.Request) (*http.Response, error){refuse}, backoff, ocilocal.ErrTransport},
		"nobody listens":         {[]func(*http.Request) (*http.Response, error){nobody}, backoff[:2], ocilocal.ErrTransport},
		"refuses":                {[]func(*http.Request) (*http.Response, error){answer(403, "", "Retry-After", "7")}, nil, ocilocal.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newScript(c.answers...)
				_, err := s.remote().Manifest(t.Context(), scriptRef)
				if !errors.Is(err, c.want) || c.want == nil && err != nil {
					t.Errorf("%v, want %v", err, c.want)
				}
				if len(s.at) != len(c.waits)+1 {
					t.Fatalf("%d requests, want %d: %v", len(s.at), len(c.waits)+1, s.at)
				}
				for i, w := range c.waits {
					if d := s.at[i+1] - s.at[i]; d < w.least || d > w.most {
						t.Errorf("wait %d is %v, want %v to %v", i, d, w.least, w.most)
					}
				}
			})
		})
	}
}

// A call that ends while it waits to try again ends at once.
func TestRetryWaitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(answer(429, "", "Retry-After", "50"))
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := s.remote().Manifest(ctx, scriptRef); !errors.Is(err, context.DeadlineExceeded) || time.Since(s.began) != 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(s.began))
		}
	})
}

// A drip is a body of which some bytes come at a time.
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

// TestSlowDrip: a trickle is given up after the stall timeout, what is only slow isn't.
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

// The end of a call ends a drip at once, and so it ends who doesn't answer.
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

// tokens is a registry that wants a token, with its token server. Each token it gives is counted.
func tokens(expiresIn string, given *int) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		switch {
		case r.URL.Path == "/token":
			*given++
			return answer(200, fmt.Sprintf(`{"token":"t%d"%s}`, *given, expiresIn))(r)
		case r.Header.Get("Authorization") == fmt.Sprintf("Bearer t%d", *given):
			return answer(200, scriptManifest)(r)
		}
		return answer(401, "", "WWW-Authenticate", `Bearer realm="https://registry.test/token",service="s"`)(r)
	}
}

// A token is used until a tenth of its life is left: as long as its server says, but
// no longer than an hour, and a minute if it says nothing.
func TestTokenExpires(t *testing.T) {
	for says, life := range map[string]time.Duration{
		`,"expires_in":300`: 300 * time.Second, `,"expires_in":"300"`: 300 * time.Second, `,"expires_in":"soon"`: time.Minute, ``: time.Minute, `,"expires_in":0`: time.Minute, `,"expires_in":-1`: time.Minute,
		`,"expires_in":1e300`: time.Hour, `,"expires_in":86400`: time.Hour,
	} {
		synctest.Test(t, func(t *testing.T) {
			given := 0
			s := newScript(tokens(says, &given))
			remote := s.remote()
			for i, c := range []struct {
				wait  time.Duration
				given int
			}{{0, 1}, {life*9/10 - time.Second, 1}, {2 * time.Second, 2}, {life * 2, 3}} {
				time.Sleep(c.wait)
				if _, err := remote.Manifest(t.Context(), scriptRef); err != nil || given != c.given {
					t.Errorf("%q, call %d: %d tokens, want %d, %v", says, i, given, c.given, err)
				}
			}
		})
	}
}
