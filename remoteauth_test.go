package ocilocal_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
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

var handedOut atomic.Int64 // so that no two tokens are equal

// handOut returns a handler that gives a token to those who know the password, and is otherwise hostile.
func handOut(answer string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		_, password, _ := r.BasicAuth()
		if password != secretPassword && r.PostForm.Get("refresh_token") != secretRefresh {
			w.WriteHeader(401)
			return
		}
		if answer == "" {
			answer = `{"token":"%s%d"}`
		}
		fmt.Fprintf(w, answer, secretToken, handedOut.Add(1))
	}
}

// wantToken makes a registry want a token of realm.
func (s *server) wantToken(realm string) {
	s.override = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.Header.Get("Authorization"), "Bearer "+secretToken) || !strings.HasPrefix(r.URL.Path, "/v2/") {
			return false
		}
		w.Header()["Www-Authenticate"] = []string{fmt.Sprintf(`Bearer realm="%s",service="s"`, realm)}
		w.WriteHeader(401)
		return true
	}
}

// TestHostileRealms: where registries may send credentials to get tokens.
func TestHostileRealms(t *testing.T) {
	const public, private = "203.0.113.1", "10.0.0.5"
	for _, c := range []struct {
		registry, ip string // "https://registry.test" if empty
		realm        string
		token        string // the origin of a token server, if there is one
		at           string // its address
		want         error
	}{
		// It may be anywhere on the Internet, or beside the registry.
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

		// Not what isn't https.
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

		// Not at an address that isn't for all.
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

		// Nor under a name that leads there.
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
			s.put(t, "org/model", "v1", noise(1, 10))
			s.wantToken(c.realm)
			over := s.override
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/token" {
					handOut("")(w, r)
					return true
				}
				return over(w, r)
			}
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

// A Client of another make can't be watched while it connects: the name is looked up before.
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

// The older forms of a transport's dial functions are watched like the newer ones.
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

// A credential that can't answer the registry's challenge was not refused: nothing was shown.
func TestIdentityTokenForBasic(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.user, s.password = "me", secretPassword
	s.put(t, "org/model", "v1", noise(1, 10))
	remote := in.remote(s.host, ocilocal.Credential{IdentityToken: secretRefresh})
	_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
	mustFail(t, err, ocilocal.ErrUnauthorized)
	if errors.Is(err, ocilocal.ErrDenied) || !strings.Contains(err.Error(), "registry.test wants a user name and a password") || !strings.Contains(err.Error(), "StaticCredential") {
		t.Error(err)
	}
	in.noSecretSeen()
}

// A registry that has moved to another token server, or to none, is asked anew what it wants once the old one has failed.
func TestTokenServerMoves(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.put(t, "org/model", "v1", noise(1, 10))
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	remote.Retry = noRetry
	for i, name := range []string{"first", "second"} {
		server := in.tokenSite("https://"+name+".test", "203.0.113.2", nil)
		s.wantToken("https://" + name + ".test/token")
		// Another token is needed to delete, and the first token server doesn't answer any more.
		err := remote.Delete(t.Context(), s.ref("org/model:gone"))
		if want := i > 0; errors.Is(err, ocilocal.ErrTransport) != want {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		server.Close()
		delete(in.sites, name+".test:443")
		if i == 0 {
			remote.Credentials = ocilocal.StaticCredential(s.host, ocilocal.Credential{IdentityToken: secretRefresh}) // so that no old token fits
		}
	}
}

// TestTokenScopes: a token is asked for all that the request needs, of the service that
// the registry names, by either form of the token protocol.
func TestTokenScopes(t *testing.T) {
	for name, cred := range map[string]ocilocal.Credential{
		"GET":  {Username: "me", Password: secretPassword},
		"POST": {IdentityToken: secretRefresh},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			s.wantToken("https://auth.test/token")
			var asked []string
			in.tokenSite("https://auth.test", "203.0.113.2", func(w http.ResponseWriter, r *http.Request) {
				r.ParseForm()
				asked = append(asked, r.Method+" "+r.Form.Get("service")+" "+strings.Join(r.Form["scope"], " "))
				handOut("")(w, r)
			})
			remote := in.remote(s.host, cred)
			r := openRemote(t, remote)
			pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
			o := &ocilocal.PushOptions{As: s.ref("org/other:v1"), Workers: 1}
			if _, err := r.Push(t.Context(), s.ref("org/model:v1"), o); err != nil {
				t.Fatal(err)
			}
			if err := remote.Delete(t.Context(), o.As); err != nil {
				t.Fatal(err)
			}
			want := []string{
				name + " s repository:org/other:pull,push",
				name + " s repository:org/model:pull repository:org/other:pull,push", // to mount
				name + " s repository:org/other:delete",
			}
			if !slices.Equal(asked, want) {
				t.Errorf("%q, want %q", asked, want)
			}
		})
	}
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestHostileTokenServers: what token servers answer.
func TestHostileTokenServers(t *testing.T) {
	endless := func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"token":"`)
		for chunk := strings.Repeat("x", 64<<10); ; {
			if _, err := io.WriteString(w, chunk); err != nil {
				return
			}
		}
	}
	says := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }
	}
	answers := func(status int, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header()[header[i]] = []string{header[i+1]}
			}
			w.WriteHeader(status)
			_, password, _ := r.BasicAuth()
			r.ParseForm()
			fmt.Fprintf(w, `{"errors":[{"code":"\u001b[31mX","message":%q}]}`, r.Header.Get("Authorization")+" "+password+" "+r.Form.Get("refresh_token")+" "+r.Form.Encode())
		}
	}
	for name, c := range map[string]struct {
		token http.HandlerFunc
		cred  ocilocal.Credential
		want  error
		most  int // requests to the token server
	}{
		"endless":                {token: endless, want: ocilocal.ErrTooLarge, most: 1},
		"too long a token":       {token: says(`{"token":"` + strings.Repeat("x", 64<<10+1) + `"}`), want: ocilocal.ErrProtocol, most: 1},
		"no token":               {token: says(`{}`), want: ocilocal.ErrProtocol, most: 1},
		"a number":               {token: says(`{"token":7}`), want: ocilocal.ErrProtocol, most: 1},
		"no JSON":                {token: says(`hush`), want: ocilocal.ErrProtocol, most: 1},
		"half JSON":              {token: says(`{"token":"hush`), want: ocilocal.ErrProtocol, most: 1},
		"a token of two lines":   {token: says(`{"token":"hush\r\nX-Injected: 1"}`), want: ocilocal.ErrProtocol, most: 1},
		"a token with a space":   {token: says(`{"token":"hush hush"}`), want: ocilocal.ErrProtocol, most: 1},
		"a token with NUL":       {token: says(`{"token":"hush\u0000"}`), want: ocilocal.ErrProtocol, most: 1},
		"not ASCII":              {token: says(`{"token":"hüsh"}`), want: ocilocal.ErrProtocol, most: 1},
		"refuses":                {token: answers(401), want: ocilocal.ErrUnauthorized, most: 1},
		"forbids":                {token: answers(403), want: ocilocal.ErrUnauthorized, most: 1},
		"a bad request":          {token: answers(400), want: ocilocal.ErrUnauthorized, most: 1},
		"absent":                 {token: answers(404), want: ocilocal.ErrTransport, most: 1},
		"fails":                  {token: answers(500), want: ocilocal.ErrTransport, most: 6},
		"is overrun":             {token: answers(429), want: ocilocal.ErrRateLimited, most: 6},
		"is overrun for long":    {token: answers(429, "Retry-After", "1000000000"), want: ocilocal.ErrRateLimited, most: 1},
		"teapot":                 {token: answers(299), want: ocilocal.ErrProtocol, most: 1},
		"redirects elsewhere":    {token: answers(302, "Location", "https://evil.test/token"), want: ocilocal.ErrProtocol, most: 1},
		"redirects to http":      {token: answers(302, "Location", "http://auth.test/token"), want: ocilocal.ErrProtocol, most: 1},
		"redirects to a port":    {token: answers(307, "Location", "https://auth.test:8443/token"), want: ocilocal.ErrProtocol, most: 1},
		"redirects to metadata":  {token: answers(302, "Location", "https://169.254.169.254/token"), want: ocilocal.ErrProtocol, most: 1},
		"redirects nowhere":      {token: answers(302), want: ocilocal.ErrProtocol, most: 1},
		"redirects badly":        {token: answers(302, "Location", "%zz\u202e"), want: ocilocal.ErrProtocol, most: 1},
		"redirects for ever":     {token: answers(302, "Location", "/token"), want: ocilocal.ErrProtocol, most: 6},
		"redirects the POST":     {token: answers(307, "Location", "/token"), cred: ocilocal.Credential{IdentityToken: secretRefresh}, want: ocilocal.ErrProtocol, most: 1},
		"refuses the POST":       {token: answers(401), cred: ocilocal.Credential{IdentityToken: secretRefresh}, want: ocilocal.ErrUnauthorized, most: 1},
		"switches the protocol":  {token: answers(101, "Connection", "Upgrade", "Upgrade", "x"), want: ocilocal.ErrProtocol, most: 1},
		"codes what it says":     {token: gzipAnswer(`{"token":"hush"}`), want: ocilocal.ErrProtocol, most: 1},
		"a token for another":    {token: handOut(`{"token":"wrong-%s%d"}`), want: ocilocal.ErrDenied, most: 2},
		"tokens that have ended": {token: handOut(`{"token":"wrong-%s%d","expires_in":1e-300}`), want: ocilocal.ErrDenied, most: 2},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			s.put(t, "org/model", "v1", noise(1, 10))
			s.wantToken("https://auth.test/token")
			server := in.tokenSite("https://auth.test", "203.0.113.2", c.token)
			for _, origin := range []string{"https://evil.test", "http://auth.test", "https://auth.test:8443", "https://169.254.169.254"} {
				in.tokenSite(origin, "203.0.113.3", nil)
			}
			if c.cred == (ocilocal.Credential{}) {
				c.cred = ocilocal.Credential{Username: "me", Password: secretPassword}
			}
			r := openRemote(t, in.remote(s.host, c.cred))
			if n := allocated(func() {
				_, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
				in.quiet(err)
				mustFail(t, err, c.want)
			}); n > 32<<20 {
				t.Errorf("%d bytes were allocated", n)
			}
			if n := len(server.asked()); n == 0 || n > c.most {
				t.Errorf("token server was asked %d times", n)
			}
			in.noSecretSeen(registrySite, "auth.test:443")
			nothingIn(t, r)
		})
	}
}

// One Remote fetches one token for all who wait for it, and one for each
// user, scope and service.
func TestTokensAreShared(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	layers := [][]byte{}
	for i := range 16 {
		layers = append(layers, noise(byte(i), 10))
	}
	s.put(t, "org/model", "v1", layers...)
	s.put(t, "org/other", "v1", layers...)
	s.wantToken("https://auth.test/token")
	server := in.tokenSite("https://auth.test", "203.0.113.2", nil)
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	remote.MaxPerHost = 8
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(server.asked()); n != 1 {
		t.Errorf("%d tokens for 16 at once", n)
	}
	if _, err := openRemote(t, remote).Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil || len(server.asked()) != 1 {
		t.Errorf("%v, %d tokens", err, len(server.asked()))
	}
	if _, err := remote.Manifest(t.Context(), s.ref("org/other:v1")); err != nil || len(server.asked()) != 2 {
		t.Errorf("%v, %d tokens for two repositories", err, len(server.asked()))
	}
	remote.Credentials = ocilocal.StaticCredential(s.host, ocilocal.Credential{IdentityToken: secretRefresh})
	if _, err := remote.Manifest(t.Context(), s.ref("org/other:v1")); err != nil || len(server.asked()) != 3 {
		t.Errorf("%v, %d tokens for two users", err, len(server.asked()))
	}
	if text := fmt.Sprintf("%v %+v %#v", remote, remote, remote); secretIn(text) != "" {
		t.Errorf("printed: %s", text)
	}
	in.noSecretSeen(registrySite, "auth.test:443")
}

// A 401 that no token helps against costs two tokens at most, and no retries; of basic, two requests.
func TestUnauthorizedForEver(t *testing.T) {
	in := newInternet(t)
	server := in.tokenSite("https://auth.test", "203.0.113.2", nil)
	for _, challenge := range []string{`Bearer realm="https://auth.test/token",service="%d"`, `Basic realm="%d"`, `Digest realm="%d"`, ``, "Bearer,Basic", `Bearer realm="`,
		`Bearer realm="https://auth.test/token",scope="repository:org/model:pull,x%d"`, `Bearer realm="https://auth.test/token?n=%d"`} {
		s := in.registry("https://registry.test", "203.0.113.1")
		var n atomic.Int64
		s.override = func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", strings.ReplaceAll(challenge, "%d", fmt.Sprint(n.Add(1))))
			w.WriteHeader(401)
			return true
		}
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

// Who can't prove to be the registry gets nothing, nor does anybody without TLS instead.
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

// TestTokenLeniency: token servers that refuse a part of a scope, registries that want more than they
// have said, and answers that are spelt in other ways.
func TestTokenLeniency(t *testing.T) {
	type request = *http.Request
	scopes := func(r request) string { return strings.Join(r.URL.Query()["scope"], " ") }
	for name, c := range map[string]struct {
		challenge string                  // what the registry adds to its challenge
		status    int                     // of an answer to a request that shows too little, if not 401
		wants     string                  // what a token's scope must have
		refuses   func(scope string) bool // what the token server refuses
		answer    string                  // of the token server
		delete    bool                    // the request is a DELETE, not a GET
		want      error
	}{
		"expires_in as text":       {answer: `{"token":"%s","expires_in":"300"}`},
		"odd fields":               {answer: "\ufeff" + `{"token":null,"access_token":"%s","expires_in":"","issued_at":7}`},
		"placeholder scope":        {challenge: `,scope="repository:user/image:pull"`, refuses: func(s string) bool { return strings.Contains(s, "user/image") }},
		"more than is granted":     {challenge: `,scope="repository:org/model:pull,push"`, refuses: func(s string) bool { return strings.Contains(s, "push") }},
		"all is refused":           {challenge: `,scope="a:b:c"`, refuses: func(string) bool { return true }, want: ocilocal.ErrUnauthorized},
		"insufficient_scope":       {challenge: `,scope="repository:org/model:delete,push",error="insufficient_scope"`, status: 403, wants: "push", delete: true},
		"insufficient, for ever":   {challenge: `,scope="repository:org/model:delete,push",error="insufficient_scope"`, status: 403, wants: "never", delete: true, want: ocilocal.ErrDenied},
		"insufficient, not to get": {challenge: `,scope="repository:org/model:push",error="insufficient_scope"`, status: 403, wants: "push", refuses: func(s string) bool { return strings.Contains(s, "push") }, delete: true, want: ocilocal.ErrDenied},
		"403 of another kind":      {challenge: `,scope="repository:org/model:push"`, status: 403, wants: "push", delete: true, want: ocilocal.ErrDenied},
		"401 without a challenge":  {challenge: "-", wants: "push", delete: true},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			s.put(t, "org/model", "v1", noise(1, 10))
			server := in.tokenSite("https://auth.test", "203.0.113.2", func(w http.ResponseWriter, r *http.Request) {
				if c.refuses != nil && c.refuses(scopes(r)) {
					w.WriteHeader(403)
					return
				}
				if c.answer == "" {
					c.answer = `{"token":"%s"}`
				}
				fmt.Fprintf(w, c.answer, secretToken+strings.Map(func(c rune) rune {
					if c == ' ' {
						return '+'
					}
					return c
				}, scopes(r)))
			})
			requests := 0
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				requests++
				token := r.Header.Get("Authorization")
				if token != "" && strings.Contains(token, c.wants) {
					return false
				}
				status := 401
				if token != "" && c.status != 0 {
					status = c.status
				}
				if token == "" || c.challenge != "-" {
					w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.test/token",service="s"`+strings.TrimPrefix(c.challenge, "-"))
				}
				w.WriteHeader(status)
				return true
			}
			if strings.HasPrefix(name, "insufficient") || c.status == 403 {
				first := s.override
				s.override = func(w http.ResponseWriter, r *http.Request) bool {
					if r.Header.Get("Authorization") == "" { // the first challenge says nothing of what is wanted
						w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.test/token",service="s"`)
						w.WriteHeader(401)
						return true
					}
					return first(w, r)
				}
			}
			remote := in.remote("", ocilocal.Credential{})
			var err error
			if c.delete {
				err = remote.Delete(t.Context(), s.ref("org/model:v1"))
			} else {
				_, err = remote.Manifest(t.Context(), s.ref("org/model:v1"))
			}
			in.quiet(err)
			if c.want == nil && err != nil {
				t.Error(err)
			} else if c.want != nil {
				mustFail(t, err, c.want)
			}
			if n := len(server.asked()); n > 3 || requests > 4 {
				t.Errorf("%d tokens, %d requests", n, requests)
			}
		})
	}
}

// TestSendCredentials: a registry that hides from anonymous users, and asks only at its entry point, gets
// the credential with the first request, if the user says so, and nobody else does.
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
			sends := s.override
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
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
			}
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
