package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

const registrySite = "registry.test:443"

// redirects is a handler that sends requests on, from site to site.
type redirects map[string]string

func (m redirects) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if to, ok := m[r.URL.Path]; ok {
		w.Header()["Location"] = []string{to}
		w.WriteHeader(307)
		return
	}
	http.NotFound(w, r)
}

// sendOn makes a registry answer requests for a blob of 100 bytes with a redirect.
func (s *server) sendOn(to string) {
	s.override = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") || len(s.blobs["org/model@"+path.Base(r.URL.Path)]) != 100 || !s.authorized(w, r) {
			return false
		}
		if to != "" {
			w.Header()["Location"] = []string{to}
		}
		w.WriteHeader(302)
		return true
	}
}

// TestHostileRedirects: where a registry sends a request for a blob, and with what it arrives there.
func TestHostileRedirects(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		registry string // "https://registry.test" if empty
		to       string
		more     redirects // by path, of all sites
		want     error     // nil: the blob comes
		at       string    // the site that has the blob
		unasked  []string  // sites that must not even be asked
		secret   bool      // at may be shown the credential
		requests int       // that at gets, if not 0
	}{
		"another host":             {to: "https://cdn.test/blob?sig=abc", at: "cdn.test:443"},
		"another port":             {to: "https://registry.test:8443/blob", at: "registry.test:8443"},
		"a sub-domain":             {to: "https://cdn.registry.test/blob", at: "cdn.registry.test:443"},
		"a look-alike":             {to: "https://registry.test.evil.test/blob", at: "registry.test.evil.test:443"},
		"without a scheme":         {to: "//cdn.test/blob", at: "cdn.test:443"},
		"http to https":            {registry: "http://plain.test", to: "https://plain.test/blob", at: "plain.test:443"},
		"https to http":            {to: "http://plain.test/blob", want: ocilocal.ErrProtocol, unasked: []string{"plain.test:80"}},
		"https to http, later":     {to: "https://cdn.test/on", more: redirects{"/on": "http://plain.test/blob"}, want: ocilocal.ErrProtocol, unasked: []string{"plain.test:80"}},
		"its default port":         {to: "https://registry.test:443/blob", at: registrySite, secret: true},
		"its name in capitals":     {to: "https://REGISTRY.Test/blob", at: registrySite, secret: true},
		"relative":                 {to: "/blob", at: registrySite, secret: true},
		"there and back":           {to: "https://cdn.test/back", more: redirects{"/back": "https://registry.test/blob"}, at: registrySite},
		"there and back to log in": {to: "https://cdn.test/back", more: redirects{"/back": "https://registry.test/v2/org/model/blobs/x"}, want: ocilocal.ErrUnauthorized},
		"who wants basic":          {to: "https://cdn.test/basic", want: ocilocal.ErrUnauthorized},
		"who wants a token":        {to: "https://cdn.test/bearer", want: ocilocal.ErrUnauthorized, unasked: []string{"auth.test:443"}},
		"five times":               {to: "https://cdn.test/1", more: hops(5), at: "cdn.test:443"},
		"six times":                {to: "https://cdn.test/1", more: hops(6), want: ocilocal.ErrProtocol},
		"round and round":          {to: "https://cdn.test/1", more: redirects{"/1": "https://cdn.test/1"}, want: ocilocal.ErrProtocol, at: "cdn.test:443", requests: 5},
		"to itself":                {registry: "http://plain.test", to: "?", want: ocilocal.ErrProtocol, at: "plain.test:80"},
		"user information":         {to: "https://me:you@cdn.test/blob", want: ocilocal.ErrProtocol, unasked: []string{"cdn.test:443"}},
		"a file":                   {to: "file:///etc/passwd", want: ocilocal.ErrProtocol},
		"ftp":                      {to: "ftp://cdn.test/blob", want: ocilocal.ErrProtocol},
		"no host":                  {to: "https:///blob", want: ocilocal.ErrProtocol},
		"opaque":                   {to: "https:blob", want: ocilocal.ErrProtocol},
		"nowhere":                  {to: "", want: ocilocal.ErrProtocol},
		"no address":               {to: "https://cdn.test/%zz?sig=hush", want: ocilocal.ErrProtocol},
		"no address, long":         {to: "https://cdn.test/%zz" + strings.Repeat("x", 100<<10), want: ocilocal.ErrProtocol},
		"bad port":                 {to: "https://cdn.test:99999/blob", want: ocilocal.ErrTransport},
		"unknown host":             {to: "https://x\u202ey.test/blob", want: ocilocal.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			if c.registry == "" {
				c.registry = "https://registry.test"
			}
			_, host, _ := strings.Cut(c.registry, "://")
			blob := noise(1, 100)
			target := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/blob":
					w.Write(blob)
				case "/basic":
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(401)
				case "/bearer":
					w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.test/token",service="cdn"`)
					w.WriteHeader(401)
				default:
					c.more.ServeHTTP(w, r)
				}
			})
			s := in.registry(c.registry, "203.0.113.1")
			s.user, s.password = "me", secretPassword
			s.put(t, "org/model", "v1", blob)
			s.sendOn(c.to)
			over := s.override
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/blob" {
					target(w, r)
					return true
				}
				return over(w, r)
			}
			for _, origin := range []string{"https://cdn.test", "https://registry.test:8443", "https://cdn.registry.test", "https://registry.test.evil.test",
				"https://plain.test", "https://auth.test", "http://plain.test"} {
				if origin != c.registry {
					in.site(origin, "203.0.113.2", target)
				}
			}
			remote := in.remote(host, ocilocal.Credential{Username: "me", Password: secretPassword})
			r := openRemote(t, remote)
			got, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
			in.quiet(err)
			if c.want == nil {
				if err != nil || got.Update.Outcome != ocilocal.Inserted {
					t.Fatal(err)
				}
			} else {
				mustFail(t, err, c.want)
				nothingIn(t, r)
			}
			may := []string{hostPort(s.base(t))}
			if at := in.sites[c.at]; at != nil {
				asked := at.asked()
				if c.requests > 0 && len(asked) != c.requests {
					t.Errorf("%d requests to %s", len(asked), c.at)
				}
				i := slices.IndexFunc(asked, func(r string) bool { return strings.HasPrefix(r, "GET /blob") })
				if c.want == nil && (i < 0 || (secretIn(asked[i]) != "") != c.secret) {
					t.Errorf("%s was asked %q", c.at, asked)
				}
			}
			in.noSecretSeen(may...)
			for _, u := range c.unasked {
				if n := len(in.sites[u].asked()); n > 0 {
					t.Errorf("%s was asked %d times", u, n)
				}
			}
		})
	}
}

// hops is a chain of redirects of which the first comes from the registry.
func hops(n int) redirects {
	m := redirects{}
	for i := 1; i < n; i++ {
		m[fmt.Sprint("/", i)] = fmt.Sprint("https://cdn.test/", i+1)
	}
	m[fmt.Sprint("/", n-1)] = "https://cdn.test/blob"
	return m
}

// TestHostileRedirectedBodies: what has a body, or deletes, is never sent on to another
// host, with a credential or without, whatever the redirect is called.
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
				s.override = func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method != method || r.Header.Get("Authorization") == "" {
						return false
					}
					w.Header().Set("Location", "https://evil.test/x")
					w.WriteHeader(code)
					return true
				}
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

// TestPrivateTargets: a registry can't make a client send requests to an address that only the
// client can reach, whatever the request is and in whatever form the address is named.
func TestPrivateTargets(t *testing.T) {
	t.Parallel()
	const public, metadata = "203.0.113.1", "169.254.169.254"
	for name, c := range map[string]struct {
		ip     string // of the registry
		target string // origin that the registry names
		at     string // where that is
		want   error
	}{
		"another public address":      {public, "https://cdn.test", "198.51.100.7", nil},
		"a neighbour":                 {"10.0.0.5", "https://cdn.test", "192.168.1.9", nil},
		"shared address space":        {"100.64.0.5", "https://cdn.test", "100.64.0.6", nil},
		"a proxy's invented address":  {"198.18.0.5", "https://cdn.test", "198.18.0.6", nil},
		"loopback from loopback":      {"127.0.0.1", "https://localhost:5001", "127.0.0.1", nil},
		"private":                     {public, "https://inside.test", "10.0.0.7", ocilocal.ErrProtocol},
		"unique local":                {public, "https://inside.test", "fd00::7", ocilocal.ErrProtocol},
		"loopback":                    {public, "https://localhost", "127.0.0.1", ocilocal.ErrProtocol},
		"loopback from private":       {"10.0.0.5", "https://localhost", "127.0.0.1", ocilocal.ErrProtocol},
		"metadata service":            {public, "https://meta.test", metadata, ocilocal.ErrProtocol},
		"metadata service, inside":    {"10.0.0.5", "https://meta.test", metadata, ocilocal.ErrProtocol},
		"mapped into IPv6":            {public, "https://inside.test", "::ffff:10.0.0.1", ocilocal.ErrProtocol},
		"address":                     {public, "https://" + metadata, metadata, ocilocal.ErrProtocol},
		"address with a dot":          {public, "https://" + metadata + ".", metadata, ocilocal.ErrProtocol},
		"address as one number":       {public, "https://2852039166", metadata, ocilocal.ErrProtocol},
		"address in hexadecimal":      {public, "https://0xa9fea9fe", metadata, ocilocal.ErrProtocol},
		"address in other digits":     {public, "https://１６９.254.169.254", metadata, ocilocal.ErrProtocol},
		"shared from a public one":    {public, "https://cdn.test", "100.64.0.6", ocilocal.ErrProtocol},
		"invented from a public one":  {public, "https://cdn.test", "198.18.0.6", ocilocal.ErrProtocol},
		"reserved from a private one": {"10.0.0.5", "https://cdn.test", "240.0.0.6", ocilocal.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			methods := []string{"GET"}
			if name == "private" || name == "a neighbour" { // the others differ only in the address
				methods = []string{"GET", "HEAD", "PUT", "PATCH", "upload status", "DELETE"}
			}
			for _, method := range methods {
				in := newInternet(t)
				s := in.registry("https://registry.test", c.ip)
				blob := noise(1, 30_000)
				s.put(t, "org/model", "v1", blob)
				u, err := url.Parse(c.target)
				if err != nil {
					t.Fatal(err)
				}
				target := in.site(c.target, c.at, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					s.ServeHTTP(w, r)
				}))
				direct := s.override
				s.override = func(w http.ResponseWriter, r *http.Request) bool {
					sends := map[string]string{"GET": "/blobs/sha256", "HEAD": "/manifests/v1"}[method]
					switch {
					case sends != "" && r.Method == method && r.Host == "registry.test" && strings.Contains(r.URL.Path, sends):
						w.Header().Set("Location", c.target+r.URL.Path)
						w.WriteHeader(307)
						return true
					case sends == "" && r.Method == "POST":
						w = locationOf{w, c.target}
						s.upload(w, r, "org/model", "")
						return true
					case method == "upload status" && r.Method == "PATCH" && r.Host != "registry.test":
						w.WriteHeader(500)
						return true
					}
					return direct != nil && direct(w, r)
				}
				remote := in.remote("", ocilocal.Credential{})
				r := openRemote(t, remote)
				switch method {
				case "GET":
					_, err = r.Pull(t.Context(), s.ref("org/model:v1"), nil)
				case "HEAD":
					_, err = remote.Resolve(t.Context(), s.ref("org/model:v1"))
				default:
					pushed(t, r, s.ref("org/model:v2"), nil, nil, noise(2, 30_000))
					o := &ocilocal.PushOptions{}
					if method != "PUT" {
						o.ChunkSize = 10_000
					}
					_, err = r.Push(t.Context(), s.ref("org/model:v2"), o)
				}
				in.quiet(err)
				asked := target.asked()
				if c.want == nil {
					if err != nil && method != "upload status" && method != "DELETE" || len(asked) == 0 {
						t.Errorf("%s: %v, %d requests", method, err, len(asked))
					}
				} else {
					mustFail(t, err, c.want)
					if len(asked) > 0 {
						t.Errorf("%s: %s was asked: %q", method, u.Host, asked)
					}
				}
				for _, text := range asked {
					if strings.HasPrefix(text, "DELETE") {
						t.Errorf("%s: another host was asked to delete: %q", method, text)
					}
				}
			}
		})
	}
}

// AllowAddress opens addresses for the registry that it names, by their address.
func TestAllowAddress(t *testing.T) {
	in := newInternet(t)
	blob := noise(1, 100)
	in.site("https://inside.test", "10.0.0.7", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(blob) }))
	in.tokenSite("https://auth.test", "100.64.0.7", nil)
	for _, c := range []struct {
		origin, token string
		want          error
	}{
		{"https://registry.test", "https://auth.test/token", nil},
		{"https://second.test", "https://auth.test/token", ocilocal.ErrProtocol},
	} {
		s := in.registry(c.origin, "203.0.113.1")
		s.put(t, "org/model", "v1", blob)
		s.sendOn("https://inside.test/blob")
		sends := s.override
		s.wantToken(c.token)
		asks := s.override
		s.override = func(w http.ResponseWriter, r *http.Request) bool { return asks(w, r) || sends(w, r) }
		remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
		remote.AllowAddress = func(registry string, addr netip.Addr) bool {
			return registry == "registry.test" && (addr == netip.MustParseAddr("10.0.0.7") || addr == netip.MustParseAddr("100.64.0.7"))
		}
		_, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil)
		if c.want == nil && err != nil {
			t.Error(err)
		} else if c.want != nil {
			mustFail(t, err, c.want)
			if !strings.Contains(err.Error(), "Remote.AllowAddress") {
				t.Errorf("the message does not name the option: %v", err)
			}
		}
	}
	in.noSecretSeen(registrySite, "second.test:443", "auth.test:443")
}

// The blobs of a pull that are at another host share connections there.
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
	s.override = func(w http.ResponseWriter, r *http.Request) bool {
		if _, d, ok := strings.Cut(r.URL.Path, "/blobs/"); ok && blobs["/"+d] != nil {
			http.Redirect(w, r, "https://cdn.test/"+d, http.StatusTemporaryRedirect)
			return true
		}
		return false
	}
	if _, err := openRemote(t, in.remote("", ocilocal.Credential{})).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
		t.Fatal(err)
	}
	if len(cdn.asked()) != 20 || cdn.dials > 4 {
		t.Errorf("%d requests over %d connections", len(cdn.asked()), cdn.dials)
	}
}

// The text of a host that the registry only leads to is not shown: it may be one that only this
// machine can reach. That of the registry is.
func TestOtherHostsAreNotQuoted(t *testing.T) {
	const told = "inner-service-4711"
	for name, h := range map[string]http.HandlerFunc{
		"status":   func(w http.ResponseWriter, _ *http.Request) { fail(w, 403, told) },
		"coding":   bare(200, "Content-Encoding", told),
		"range":    bare(206, "Content-Range", "bytes "+told),
		"location": bare(302, "Location", told+"://x"),
		"no HTTP": func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, "220 "+told+" ready\r\n")
			conn.Close()
		},
		"bad header": func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n"+told+"\r\n\r\n")
			conn.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("http://plain.test", "203.0.113.1")
			s.put(t, "org/model", "v1", noise(1, 100))
			in.site("http://other.test", "203.0.113.2", h)
			s.sendOn("http://other.test/blob")
			_, err := openRemote(t, in.remote("", ocilocal.Credential{})).Pull(t.Context(), s.ref("org/model:v1"), nil)
			if err == nil {
				t.Fatal("no error")
			}
			for _, text := range errorTexts(err) {
				if strings.Contains(text, told) {
					t.Errorf("quoted: %s", text)
				}
			}
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				h(w, r)
				return true
			}
			_, err = in.remote("", ocilocal.Credential{}).Manifest(t.Context(), s.ref("org/model:v1"))
			if name != "range" && (err == nil || !strings.Contains(err.Error(), told)) {
				t.Errorf("the registry is not quoted: %v", err)
			}
		})
	}
}

// A bad answer to a request for a part of a blob gives its slot back.
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
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
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
			}
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

// A coding that does not change the bytes is no reason to refuse them.
func TestCodingsOfPlainBytes(t *testing.T) {
	for _, coding := range []string{"aws-chunked", "identity", "Identity", "gzip", "aws-chunked,gzip", "binary", "utf-8", "br"} {
		s := newServer(t)
		s.put(t, "org/model", "v1", gzipped(noise(1, 1000)))
		s.override = func(w http.ResponseWriter, r *http.Request) bool {
			w.Header()["Content-Encoding"] = []string{coding}
			return false
		}
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

// A silentConn stops to bring anything once it is dead, and is not closed.
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

// A connection whose peer is silently gone costs one stall: the next attempt has a new connection.
func TestSilentConnections(t *testing.T) {
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
		remote.StallTimeout = 300 * time.Millisecond
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

// Requests go through a proxy, and CONNECT leads to a TLS registry. The refusal of a proxy is not one of the registry,
// and is not repeated.
func TestProxies(t *testing.T) {
	plain := newServer(t)
	secure := serve()
	secure.Server.Close()
	secure.Server = httptest.NewTLSServer(secure)
	defer secure.Close()
	const plainHost, secureHost = "plain.test", "secure.test"
	want := plain.put(t, "org/model", "v1", noise(1, 100))
	secure.put(t, "org/model", "v1", noise(1, 100))
	refusal := 0
	var asked atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
	defer proxy.Close()
	client := func() *ocilocal.Remote {
		transport := ocilocal.OwnTransport()
		transport.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse(proxy.URL) }
		transport.TLSClientConfig = secure.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
		transport.TLSClientConfig.ServerName = "example.com" // as the test certificate has it
		remote := &ocilocal.Remote{Retry: quick, Client: &http.Client{Transport: transport}, PlainHTTP: func(host string) bool { return host == plainHost }}
		t.Cleanup(remote.CloseIdleConnections)
		return remote
	}
	for _, host := range []string{plainHost, secureHost} {
		before := asked.Load()
		got, err := openRemote(t, client()).Pull(t.Context(), ocilocal.MustParseReference(host+"/org/model:v1"), nil)
		if err != nil || got.Artifact.Digest() != want || asked.Load() == before {
			t.Errorf("%s: %+v, %v, %d requests through the proxy", host, got, err, asked.Load()-before)
		}
	}
	for _, c := range []struct {
		status   int
		text     string
		requests int64
	}{{407, "the proxy wants credentials", 1}, {403, "the proxy refuses", 1}, {503, "proxy answers 503", 6}} {
		refusal = c.status
		asked.Store(0)
		_, err := client().Manifest(t.Context(), ocilocal.MustParseReference(secureHost+"/org/model:v1"))
		mustFail(t, err, ocilocal.ErrTransport)
		if errors.Is(err, ocilocal.ErrDenied) || !strings.Contains(err.Error(), c.text) || asked.Load() != c.requests {
			t.Errorf("%d: %d requests, %v", c.status, asked.Load(), err)
		}
	}
	refusal = 407
	_, err := client().Manifest(t.Context(), ocilocal.MustParseReference(plainHost+"/org/model:v1"))
	mustFail(t, err, ocilocal.ErrTransport)
}
