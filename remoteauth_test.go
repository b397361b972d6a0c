package ocilocal_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// tokenSite is a token server. Its handler may be replaced.
func (in *internet) tokenSite(origin, ip string, h http.HandlerFunc) *site {
	if h == nil {
		h = handOut("")
	}
	return in.site(origin, ip, h)
}

// wantToken makes a registry ask for a token of a realm.
func (s *server) wantToken(realm string) {
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.Header.Get("Authorization"), "Bearer "+secretToken) || !strings.HasPrefix(r.URL.Path, "/v2/") {
			return false
		}
		w.Header()["Www-Authenticate"] = []string{fmt.Sprintf(`Bearer realm="%s",service="s"`, realm)}
		w.WriteHeader(401)
		return true
	})
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestUnauthorizedForEver: if a registry answers every token with 401, a call fetches at most two
// tokens and is not repeated. With basic authentication it makes two requests.
func TestUnauthorizedForEver(t *testing.T) {
	in := newInternet(t)
	server := in.tokenSite("https://auth.test", "203.0.113.2", nil)
	for _, challenge := range []string{`Bearer realm="https://auth.test/token",service="%d"`, `Basic realm="%d"`, `Digest realm="%d"`, ``, "Bearer,Basic", `Bearer realm="`,
		`Bearer realm="https://auth.test/token",scope="repository:org/model:pull,x%d"`, `Bearer realm="https://auth.test/token?n=%d"`} {
		s := in.registry("https://registry.test", "203.0.113.1")
		var n atomic.Int64
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", strings.ReplaceAll(challenge, "%d", fmt.Sprint(n.Add(1))))
			w.WriteHeader(401)
			return true
		})
		remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
		for range 2 {
			before := len(server.asked())
			n.Store(0)
			_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
			in.quiet(err)
			if strings.Contains(challenge, "https") {
				mustFail(t, err, ocilocal.ErrDenied)
			} else if challenge == "Bearer,Basic" || challenge == `Bearer realm="` {
				if err == nil {
					t.Error("no error")
				}
			} else {
				mustFail(t, err, ocilocal.ErrUnauthorized)
			}
			if got := len(server.asked()) - before; n.Load() > 3 || got > 2 {
				t.Errorf("%s: %d requests, %d tokens", challenge, n.Load(), got)
			}
		}
		in.noSecretSeen(registrySite, "auth.test:443")
	}
}

// TestHostileTLS: a host that can't prove to be the registry gets no credential. Neither does a
// host without TLS in its place.
func TestHostileTLS(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	tls := in.sites[registrySite]
	plain := in.site("http://registry.test", "203.0.113.1", s)
	plain443 := in.site("http://other.test:443", "203.0.113.1", s)
	for name, ref := range map[string]string{"another's name": "registry.test/x:v1", "no TLS": "other.test:443/x:v1"} {
		t.Run(name, func(t *testing.T) {
			tls.TLS.Certificates[0] = certificate(t, "evil.test", "\x1b[31mred", strings.Repeat("long.", 1000)+"test")
			remote := in.remote("", ocilocal.Credential{})
			remote.PlainHTTP = nil
			remote.Credentials = ocilocal.StaticCredential(strings.Split(ref, "/")[0], ocilocal.Credential{RegistryToken: "hush"})
			_, err := remote.Manifest(t.Context(), ocilocal.MustParseReference(ref))
			in.quiet(err)
			mustFail(t, err, ocilocal.ErrTransport)
			if len(in.failures) != 1 || len(plain.asked())+len(plain443.asked()) > 0 {
				t.Errorf("%d attempts, %q", len(in.failures), plain.asked())
			}
			in.failures = nil
		})
	}
}

// TestSendCredentials: some registries hide from anonymous users and ask for a credential only at
// /v2/. If the user says so, such a registry gets it with the first request. No other host gets it.
func TestSendCredentials(t *testing.T) {
	for name, c := range map[string]struct {
		status    int    // for anonymous requests
		challenge string // at /v2/
	}{
		"hidden":       {404, `Basic realm="r"`},
		"forbidden":    {403, `Basic realm="r"`},
		"rate limited": {429, `Basic realm="r"`},
		"never asks":   {404, ""},
		"by token":     {403, `Bearer realm="https://auth.test/token",service="s"`},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			in.tokenSite("https://auth.test", "203.0.113.2", nil)
			cdn := in.site("https://cdn.test", "203.0.113.3", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(noise(1, 100)) }))
			s.put(t, "org/model", "v1", noise(1, 100))
			s.sendOn("https://cdn.test/blob")
			sends := s.overrideNow()
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				user, password, _ := r.BasicAuth()
				if user == "me" && password == secretPassword || strings.HasPrefix(r.Header.Get("Authorization"), "Bearer "+secretToken) {
					return sends(w, r)
				}
				if r.URL.Path == "/v2/" {
					if c.challenge != "" {
						w.Header().Set("WWW-Authenticate", c.challenge)
						w.WriteHeader(401)
					}
					return true
				}
				w.WriteHeader(c.status)
				return true
			})
			remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
			remote.Retry = noRetry
			if _, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); err == nil {
				t.Error("without the option there is no error")
			}
			remote = in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
			remote.SendCredentials = func(host string) bool { return host == "registry.test" }
			if _, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
				t.Error(err)
			}
			if len(cdn.asked()) == 0 {
				t.Error("the blob did not come from its place")
			}
			in.noSecretSeen(registrySite, "auth.test:443")
		})
	}
}
