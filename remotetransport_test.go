package ocilocal_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

const registrySite = "registry.test:443"

// TestHostileRedirectedBodies: a request with a body, or a deletion, is never sent on to another
// host, with any status of the redirect and with or without a credential.
func TestHostileRedirectedBodies(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"POST", "PATCH", "PUT", "DELETE"} {
		for _, code := range []int{301, 302, 303, 307, 308} {
			t.Run(fmt.Sprint(method, " ", code), func(t *testing.T) {
				in := newInternet(t)
				s := in.registry("https://registry.test", "203.0.113.1")
				s.user, s.password = "me", secretPassword
				evil := in.site("https://evil.test", "203.0.113.2", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					w.WriteHeader(201)
				}))
				s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method != method || r.Header.Get("Authorization") == "" {
						return false
					}
					w.Header().Set("Location", "https://evil.test/x")
					w.WriteHeader(code)
					return true
				})
				remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
				var err error
				if method == "DELETE" {
					err = remote.Delete(t.Context(), s.ref("org/model:v1"))
				} else {
					r := openRemote(t, remote)
					pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 300_000))
					_, err = r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: 100_000})
				}
				in.quiet(err)
				in.noSecretSeen(registrySite)
				mustFail(t, err, ocilocal.ErrProtocol)
				if n := len(evil.asked()); n > 0 {
					t.Errorf("evil.test was asked %d times", n)
				}
			})
		}
	}
}

// TestRedirectTargetKeepsConnections: the blobs of a pull that are stored at another host share
// connections there.
func TestRedirectTargetKeepsConnections(t *testing.T) {
	in := newInternet(t)
	blobs := map[string][]byte{}
	cdn := in.site("https://cdn.test", "203.0.113.2", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(blobs[r.URL.Path]) }))
	s := in.registry("https://registry.test", "203.0.113.1")
	var layers [][]byte
	for i := range 20 {
		layers = append(layers, noise(byte(i), 100))
		blobs["/"+string(digest.FromBytes(layers[i]))] = layers[i]
	}
	s.put(t, "org/model", "v1", layers...)
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if _, d, ok := strings.Cut(r.URL.Path, "/blobs/"); ok && blobs["/"+d] != nil {
			http.Redirect(w, r, "https://cdn.test/"+d, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	if _, err := openRemote(t, in.remote("", ocilocal.Credential{})).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	if len(cdn.asked()) != 20 || cdn.dials > 4 {
		t.Errorf("%d requests over %d connections", len(cdn.asked()), cdn.dials)
	}
}

// TestBadRangesKeepNoSlots: a bad answer to a request for a part of a blob frees its slot.
func TestBadRangesKeepNoSlots(t *testing.T) {
	t.Parallel()
	const slots = 2
	for name, bad := range map[string]http.HandlerFunc{
		"Content-Range": bare(206, "Content-Range", "bytes 1-2/3"),
		"no range":      bare(206),
		"Content-Length": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "7")
			w.Write([]byte("7 bytes"))
		},
		"Content-Encoding": gzipAnswer("x"),
		"status":           bare(418),
		"redirect":         bare(302, "Location", "ftp://x"),
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			blob := noise(1, 1_200_000)
			s.put(t, "org/model", "v1", blob)
			var whole atomic.Bool
			var bads atomic.Int32
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, string(digest.FromBytes(blob))) || whole.Load() {
					return false
				}
				if r.Header.Get("Range") == "" && bads.Load() == 0 && strings.Contains("Content-Range no range", name) {
					w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
					w.Write(blob[:1_100_000]) // and breaks off, so that the rest is asked for
					return true
				}
				bads.Add(1)
				bad(w, r)
				return true
			})
			remote := in.remote("", ocilocal.Credential{})
			remote.MaxPerHost = slots
			r := openRemote(t, remote)
			for range slots + 2 {
				_, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
				in.quiet(err)
				if err == nil {
					t.Fatal("a bad answer was taken")
				}
			}
			if bads.Load() <= slots {
				t.Fatalf("only %d bad answers", bads.Load())
			}
			whole.Store(true)
			if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestCodingsOfPlainBytes: a Content-Encoding that does not change the bytes is accepted.
func TestCodingsOfPlainBytes(t *testing.T) {
	for _, coding := range []string{"aws-chunked", "identity", "Identity", "gzip", "aws-chunked,gzip", "binary", "utf-8", "br"} {
		s := newServer(t)
		s.put(t, "org/model", "v1", gzipped(noise(1, 1000)))
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header()["Content-Encoding"] = []string{coding}
			return false
		})
		remote := new(ocilocal.Remote)
		r := openRemote(t, remote)
		got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
		if err != nil {
			t.Fatalf("%q: %v", coding, err)
		}
		desc, err := remote.Resolve(t.Context(), s.ref("org/model:v1"))
		if err != nil || desc.Size != got.Artifact.Descriptor().Size {
			t.Errorf("%q: %v, %v", coding, desc, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// bare answers with a status and header fields, and no body.
func bare(status int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
	}
}

// A locationOf makes the Location of an answer absolute.
type locationOf struct {
	http.ResponseWriter
	origin string
}

func (l locationOf) WriteHeader(status int) {
	if to := l.Header().Get("Location"); strings.HasPrefix(to, "/") {
		l.Header().Set("Location", l.origin+to)
	}
	l.ResponseWriter.WriteHeader(status)
}

// TestProxies: requests go through a proxy, and CONNECT leads to a TLS registry. A refusal of the
// proxy is not an answer of the registry, and is not repeated.
func TestProxies(t *testing.T) {
	plain := newServer(t)
	secure := unservedServer(t)
	secure.Server = httptest.NewTLSServer(secure)
	defer secure.Close()
	const plainHost, secureHost = "plain.test", "secure.test"
	want := plain.put(t, "org/model", "v1", noise(1, 100))
	secure.put(t, "org/model", "v1", noise(1, 100))
	// proxy makes a proxy that refuses with a status, if that is not 0, and counts requests. Each
	// case has its own, because a transport may open connections that it doesn't wait for.
	proxy := func(refusal int) (client *ocilocal.Remote, asked *atomic.Int64) {
		asked = new(atomic.Int64)
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if refusal != 0 {
				w.Header().Set("Proxy-Authenticate", "Basic realm=proxy")
				w.WriteHeader(refusal)
				return
			}
			if r.Method != http.MethodConnect {
				plain.ServeHTTP(w, r)
				return
			}
			to, err := net.Dial("tcp", secure.Listener.Addr().String())
			if err != nil {
				w.WriteHeader(502)
				return
			}
			defer to.Close()
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
			go io.Copy(to, conn)
			io.Copy(conn, to)
		}))
		t.Cleanup(s.Close)
		transport := ocilocal.OwnTransport()
		transport.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse(s.URL) }
		transport.TLSClientConfig = secure.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
		transport.TLSClientConfig.ServerName = "example.com" // as the test certificate has it
		client = &ocilocal.Remote{Retry: quick, Client: &http.Client{Transport: transport}, PlainHTTP: func(host string) bool { return host == plainHost }}
		t.Cleanup(client.CloseIdleConnections)
		return client, asked
	}
	for _, host := range []string{plainHost, secureHost} {
		client, asked := proxy(0)
		got, err := openRemote(t, client).Pull(t.Context(), ocilocal.MustParseReference(host+"/org/model:v1"), nil)
		if err != nil || got.Artifact.Digest() != want || asked.Load() == 0 {
			t.Errorf("%s: %+v, %v, %d requests through the proxy", host, got, err, asked.Load())
		}
	}
	for _, c := range []struct {
		status   int
		text     string
		requests int64
	}{{407, "the proxy wants credentials", 1}, {403, "the proxy refuses", 1}, {503, "proxy answers 503", 6}} {
		client, asked := proxy(c.status)
		_, err := client.Manifest(t.Context(), ocilocal.MustParseReference(secureHost+"/org/model:v1"))
		mustFail(t, err, ocilocal.ErrTransport)
		if errors.Is(err, ocilocal.ErrDenied) || !strings.Contains(err.Error(), c.text) || asked.Load() != c.requests {
			t.Errorf("%d: %d requests, %v", c.status, asked.Load(), err)
		}
	}
	client, _ := proxy(407)
	_, err := client.Manifest(t.Context(), ocilocal.MustParseReference(plainHost+"/org/model:v1"))
	mustFail(t, err, ocilocal.ErrTransport)
}
