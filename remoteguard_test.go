package ocilocal_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestPrivateTargets: a registry can't make a client send requests to an address that only the
// client can reach, with any kind of request and any form of the address.
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
				direct := s.overrideNow()
				s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
					sends := map[string]string{"GET": "/blobs/sha256", "HEAD": "/manifests/v1"}[method]
					switch {
					case sends != "" && r.Method == method && r.Host == "registry.test" && strings.Contains(r.URL.Path, sends):
						w.Header().Set("Location", c.target+r.URL.Path)
						w.WriteHeader(307)
						return true
					case sends == "" && r.Method == "POST":
						w = locationOf{w, c.target}
						s.plain(w, r)
						return true
					case method == "upload status" && r.Method == "PATCH" && r.Host != "registry.test":
						w.WriteHeader(500)
						return true
					}
					return direct != nil && direct(w, r)
				})
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

// TestAllowAddress: AllowAddress allows addresses for the registry that it is asked about. It gets
// the address, and not a name.
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
		sends := s.overrideNow()
		s.wantToken(c.token)
		asks := s.overrideNow()
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool { return asks(w, r) || sends(w, r) })
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

// TestHostileRealmForOtherTransport: connections of a transport of another type can't be checked.
// So the name is looked up before a request.
func TestHostileRealmForOtherTransport(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.wantToken("https://localhost/token")
	server := in.tokenSite("https://localhost", "127.0.0.1", nil)
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	remote.Client.Transport = roundTripFunc(remote.Client.Transport.RoundTrip)
	_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
	mustFail(t, err, ocilocal.ErrProtocol)
	if len(server.asked()) > 0 {
		t.Errorf("%q", server.asked())
	}
	for _, realm := range []string{"https://１２７.0.0.1/token", "https://127。0。0。1/token", "https://loc\u00adalhost/token"} {
		s.wantToken(realm)
		if _, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); err == nil || len(server.asked()) > 0 {
			t.Errorf("%s: %v, %q", realm, err, server.asked())
		}
		mustFail(t, err, ocilocal.ErrProtocol)
	}
}

// TestHostileRealmForOlderDial: the older forms of a transport's dial functions are guarded like
// the newer ones.
func TestHostileRealmForOlderDial(t *testing.T) {
	for name, change := range map[string]func(*internet, *http.Transport){
		"Dial": func(in *internet, tr *http.Transport) {
			tr.DialContext = nil
			//lint:ignore SA1019 which is to be tested
			tr.Dial = func(network, address string) (net.Conn, error) {
				return in.dial(context.Background(), network, address)
			}
		},
		"DialTLS": func(in *internet, tr *http.Transport) {
			tr.ForceAttemptHTTP2 = false
			//lint:ignore SA1019 which is to be tested
			tr.DialTLS = func(network, address string) (net.Conn, error) {
				conn, err := in.dial(context.Background(), network, address)
				if err != nil {
					return nil, err
				}
				host, _, _ := net.SplitHostPort(address)
				return tls.Client(conn, &tls.Config{RootCAs: in.roots, ServerName: host}), nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			s.put(t, "org/model", "v1", noise(1, 10))
			fetch := func(realm string) error {
				s.wantToken(realm)
				remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
				change(in, remote.Client.Transport.(*http.Transport))
				_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
				return err
			}
			special, public := in.tokenSite("https://meta.test", "169.254.169.254", nil), in.tokenSite("https://auth.test", "203.0.113.2", nil)
			mustFail(t, fetch("https://meta.test/token"), ocilocal.ErrProtocol)
			if len(special.asked()) > 0 {
				t.Errorf("%q", special.asked())
			}
			if err := fetch("https://auth.test/token"); err != nil || len(public.asked()) != 1 {
				t.Errorf("%v, %q", err, public.asked())
			}
		})
	}
}
