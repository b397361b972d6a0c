package ocilocal_test

import (
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

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
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") || s.blobSize("org/model", digest.Digest(path.Base(r.URL.Path))) != 100 || !s.authorized(w, r) {
			return false
		}
		if to != "" {
			w.Header()["Location"] = []string{to}
		}
		w.WriteHeader(302)
		return true
	})
}

// TestHostileRedirects: a registry redirects a request for a blob. The test checks which hosts are
// asked, and what they see.
func TestHostileRedirects(t *testing.T) {
	t.Parallel()
	blob := noise(1, 100)
	origin := newServer(t)
	origin.put(t, "org/model", "v1", blob)
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
		"there and back to log in": {to: "https://cdn.test/back", more: redirects{"/back": "https://registry.test/v2/org/model/blobs/" + string(digest.FromString("x"))}, want: ocilocal.ErrUnauthorized},
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
			s.origin = origin
			s.sendOn(c.to)
			over := s.overrideNow()
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/blob" {
					target(w, r)
					return true
				}
				return over(w, r)
			})
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

// hops returns a chain of redirects. The first comes from the registry.
func hops(n int) redirects {
	m := redirects{}
	for i := 1; i < n; i++ {
		m[fmt.Sprint("/", i)] = fmt.Sprint("https://cdn.test/", i+1)
	}
	m[fmt.Sprint("/", n-1)] = "https://cdn.test/blob"
	return m
}
