package ocilocal_test

import (
	"context"
	"errors"
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

// A script is a registry that needs no network. It has one answer for each request in turn, and the
// last one for all further requests.
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

// TestRetryWaits: the waits between attempts, for each way in which a registry turns a client away.
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

// TestRetryWaitEnds: a call whose context ends while it waits for the next attempt ends at once.
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
