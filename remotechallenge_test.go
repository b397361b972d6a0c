package ocilocal_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestHostileRealms has realms that registries name, and says which of them may get a credential.
func TestHostileRealms(t *testing.T) {
	const public, private = "203.0.113.1", "10.0.0.5"
	origin := newServer(t)
	origin.put(t, "org/model", "v1", noise(1, 10))
	for _, c := range []struct {
		registry, ip string // "https://registry.test" if empty
		realm        string
		token        string // the origin of a token server, if there is one
		at           string // its address
		want         error
	}{
		// A token server may be anywhere on the Internet, or next to the registry.
		{realm: "https://auth.other.test/token", token: "https://auth.other.test", at: "198.51.100.9"},
		{realm: "https://auth.other.test/token?a=b", token: "https://auth.other.test", at: "2001:db8::1"},
		{realm: "https://registry.test/token"},
		{realm: "https://REGISTRY.test:443/token"},
		{ip: private, realm: "https://auth.test/token", token: "https://auth.test", at: "10.0.0.6"},
		{ip: private, realm: "https://auth.test/token", token: "https://auth.test", at: public},
		{ip: "127.0.0.1", realm: "https://localhost:5001/token", token: "https://localhost:5001", at: "127.0.0.1"},
		{ip: "169.254.7.7", realm: "https://auth.test/token", token: "https://auth.test", at: "169.254.7.7"},
		{registry: "http://plain.test", realm: "http://auth.test/token", token: "http://auth.test", at: public},
		{registry: "http://plain.test", realm: "https://auth.test/token", token: "https://auth.test", at: public},

		// It must be https.
		{realm: "http://auth.test/token", token: "http://auth.test", at: public, want: ocilocal.ErrProtocol},
		{realm: "http://registry.test/token", token: "http://registry.test", at: public, want: ocilocal.ErrProtocol},
		{realm: "file:///etc/passwd", want: ocilocal.ErrProtocol},
		{realm: "", want: ocilocal.ErrProtocol},
		{realm: "/token", want: ocilocal.ErrProtocol},
		{realm: "auth.test", want: ocilocal.ErrProtocol},
		{realm: "https:///token", want: ocilocal.ErrProtocol},
		{realm: "https:auth.test", want: ocilocal.ErrProtocol},
		{realm: "https://auth.test/%zz?hush", want: ocilocal.ErrProtocol},
		{realm: "https://me:hush@auth.test/token", token: "https://auth.test", at: public, want: ocilocal.ErrProtocol},
		{realm: "https://auth\u202e.test/token", want: ocilocal.ErrProtocol},

		// Its address must be public.
		{realm: "https://169.254.169.254/token", token: "https://169.254.169.254", at: "169.254.169.254", want: ocilocal.ErrProtocol},
		{realm: "https://127.0.0.1:8080/token", token: "https://127.0.0.1:8080", at: "127.0.0.1", want: ocilocal.ErrProtocol},
		{realm: "https://[::1]/token", want: ocilocal.ErrProtocol},
		{realm: "https://10.0.0.1/token", want: ocilocal.ErrProtocol},
		{realm: "https://172.31.0.1/token", want: ocilocal.ErrProtocol},
		{realm: "https://192.168.1.1/token", want: ocilocal.ErrProtocol},
		{realm: "https://100.64.0.1/token", want: ocilocal.ErrProtocol},
		{realm: "https://0.0.0.0/token", want: ocilocal.ErrProtocol},
		{realm: "https://[::]/token", want: ocilocal.ErrProtocol},
		{realm: "https://[fd00::1]/token", want: ocilocal.ErrProtocol},
		{realm: "https://[fe80::1]/token", want: ocilocal.ErrProtocol},
		{realm: "https://[fe80::1%25eth0]/token", want: ocilocal.ErrProtocol},
		{realm: "https://[::ffff:169.254.169.254]/token", want: ocilocal.ErrProtocol},
		{realm: "https://[64:ff9b::a9fe:a9fe]/token", want: ocilocal.ErrProtocol},
		{realm: "https://[2002:a9fe:a9fe::]/token", want: ocilocal.ErrProtocol},
		{realm: "https://2852039166/token", want: ocilocal.ErrProtocol},
		{realm: "https://0xa9fea9fe/token", want: ocilocal.ErrProtocol},
		{realm: "https://0xa9.0xfe.0xa9.0xfe/token", want: ocilocal.ErrProtocol},
		{realm: "https://0251.0376.0251.0376/token", want: ocilocal.ErrProtocol},
		{realm: "https://127.1/token", want: ocilocal.ErrProtocol},
		{realm: "https://169.254.169.254./token", want: ocilocal.ErrProtocol},
		{realm: "https://１６９.254.169.254/token", token: "https://169.254.169.254", at: "169.254.169.254", want: ocilocal.ErrProtocol},
		{realm: "https://169。254。169。254/token", token: "https://169.254.169.254", at: "169.254.169.254", want: ocilocal.ErrProtocol},

		// Its name must not lead to such an address.
		{realm: "https://meta.test/token", token: "https://meta.test", at: "169.254.169.254", want: ocilocal.ErrProtocol},
		{realm: "https://inside.test/token", token: "https://inside.test", at: "192.168.0.9", want: ocilocal.ErrProtocol},
		{realm: "https://inside.test/token", token: "https://inside.test", at: "::ffff:10.0.0.1", want: ocilocal.ErrProtocol},
		{realm: "https://inside.test/token", token: "https://inside.test", at: "fd00::7", want: ocilocal.ErrProtocol},
		{realm: "https://localhost/token", token: "https://localhost", at: "127.0.0.1", want: ocilocal.ErrProtocol},
		{ip: private, realm: "https://meta.test/token", token: "https://meta.test", at: "169.254.169.254", want: ocilocal.ErrProtocol},
		{ip: private, realm: "https://localhost/token", token: "https://localhost", at: "127.0.0.1", want: ocilocal.ErrProtocol},
		{ip: "169.254.7.7", realm: "https://meta.test/token", token: "https://meta.test", at: "169.254.169.254", want: ocilocal.ErrProtocol},
		{registry: "http://plain.test", realm: "http://meta.test/token", token: "http://meta.test", at: "169.254.169.254", want: ocilocal.ErrProtocol},
	} {
		t.Run(strings.ReplaceAll(c.ip+" "+c.realm+" "+c.at, "/", "|"), func(t *testing.T) {
			in := newInternet(t)
			if c.registry == "" {
				c.registry = "https://registry.test"
			}
			if c.ip == "" {
				c.ip = public
			}
			s := in.registry(c.registry, c.ip)
			s.origin = origin
			s.wantToken(c.realm)
			over := s.overrideNow()
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/token" {
					handOut("")(w, r)
					return true
				}
				return over(w, r)
			})
			may := []string{hostPort(s.base(t))}
			var server *site
			if c.token != "" {
				server = in.tokenSite(c.token, c.at, nil)
				if u, err := url.Parse(c.token); err == nil && c.want == nil {
					may = append(may, hostPort(u))
				}
				if c.registry != "https://registry.test" {
					in.plain = append(in.plain, "auth.test", "meta.test")
				}
			}
			remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
			m, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
			in.quiet(err)
			in.noSecretSeen(may...)
			if c.want != nil {
				mustFail(t, err, c.want)
				if server != nil && len(server.asked()) > 0 {
					t.Errorf("it was asked: %q", server.asked())
				}
				if n := len(in.failures); n > 1 {
					t.Errorf("%d attempts", n)
				}
				return
			}
			if err != nil || len(m.Layers()) != 1 {
				t.Fatal(err)
			}
			if server == nil {
				return
			}
			for _, r := range server.asked() {
				if strings.Contains(r, secretToken) {
					t.Errorf("token server was shown a token: %s", r)
				}
			}
			for _, r := range in.sites[may[0]].asked() {
				if strings.Contains(r, "Basic") {
					t.Errorf("registry was shown the password: %s", r)
				}
			}
		})
	}
}
