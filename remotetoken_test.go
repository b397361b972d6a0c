package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ocilocal/ocilocal"
)

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

// TestTokenExpires: a token is used for nine tenths of its lifetime. That is the server's, but at
// most an hour, and a minute if the server does not say.
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

var handedOut atomic.Int64 // so that no two tokens are equal

// handOut returns a handler that gives a token only for the password, and is hostile in other ways.
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

// TestIdentityTokenForBasic: an identity token can't answer a basic challenge. The error says that,
// and not that the registry refused it.
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

// TestTokenServerMoves: if the token server fails, the registry is asked again. It may name another
// token server by then, or none.
func TestTokenServerMoves(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.put(t, "org/model", "v1", noise(1, 10))
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	remote.Retry = noRetry
	for i, name := range []string{"first", "second"} {
		server := in.tokenSite("https://"+name+".test", "203.0.113.2", nil)
		s.wantToken("https://" + name + ".test/token")
		// A deletion needs another token, and the first token server does not answer any more.
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

// TestTokenScopes: a token is requested for everything that the request needs and for the service
// that the registry names, in both forms of the token protocol.
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

// TestHostileTokenServers has bad answers of token servers.
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
	good := newServer(t)
	good.put(t, "org/model", "v1", noise(1, 10))
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
			s.origin = good
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

// TestTokensAreShared: a Remote fetches one token for all calls that wait for it, and separate ones
// for each user, scope and service.
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

// TestTokenLeniency: token servers that refuse a part of a scope, registries that want more than
// their challenge says, and answers with unusual spelling.
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
			var requests atomic.Int64
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				requests.Add(1)
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
			})
			if strings.HasPrefix(name, "insufficient") || c.status == 403 {
				first := s.overrideNow()
				s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
					if r.Header.Get("Authorization") == "" { // the first challenge says nothing of what is wanted
						w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.test/token",service="s"`)
						w.WriteHeader(401)
						return true
					}
					return first(w, r)
				})
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
			if n := len(server.asked()); n > 3 || requests.Load() > 4 {
				t.Errorf("%d tokens, %d requests", n, requests.Load())
			}
		})
	}
}

// TestTokensAreNotShared: two registries that name the same token server, service and scope do not
// get each other's token.
func TestTokensAreNotShared(t *testing.T) {
	in := newInternet(t)
	server := in.tokenSite("https://auth.other.test", "203.0.113.9", nil)
	remote := in.remote("", ocilocal.Credential{})
	remote.Credentials = func(context.Context, string, string) (ocilocal.Credential, error) {
		return ocilocal.Credential{Username: "me", Password: secretPassword}, nil
	}
	var hosts []string
	shown := map[string]map[string]bool{}
	for _, origin := range []string{"https://registry.test", "https://second.test", "https://registry.test:8443"} {
		s := in.registry(origin, "203.0.113.1")
		s.put(t, "org/model", "v1", noise(1, 10))
		s.wantToken("https://auth.other.test/token")
		hosts = append(hosts, s.host)
		for range 2 {
			if _, err := remote.Manifest(t.Context(), s.ref("org/model:v1")); err != nil {
				t.Fatal(err)
			}
		}
		shown[s.host] = map[string]bool{}
		for _, r := range in.sites[hostPort(s.base(t))].asked() {
			if _, rest, ok := strings.Cut(r, "Bearer "); ok {
				token, _, _ := strings.Cut(rest, "\r\n")
				shown[s.host][token] = true
			}
		}
	}
	if n := len(server.asked()); n != len(hosts) {
		t.Errorf("%d tokens for %d registries", n, len(hosts))
	}
	seen := map[string]string{}
	for _, host := range hosts {
		if len(shown[host]) != 1 {
			t.Errorf("%s saw %d tokens", host, len(shown[host]))
		}
		for token := range shown[host] {
			if seen[token] != "" {
				t.Errorf("%s and %s saw one token", host, seen[token])
			}
			seen[token] = host
		}
	}
}

// TestTokenFetchGivenUp: a call that fetches a token for others may end early. The next of them
// then fetches it. A call that waits may end as well, which does not affect the others.
func TestTokenFetchGivenUp(t *testing.T) {
	in := newInternet(t)
	s := in.registry("https://registry.test", "203.0.113.1")
	s.put(t, "org/model", "v1", noise(1, 10))
	s.wantToken("https://auth.test/token")
	asked := make(chan struct{}, 10)
	var hangs atomic.Bool
	hangs.Store(true)
	server := in.tokenSite("https://auth.test", "203.0.113.2", func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		if hangs.Load() {
			<-r.Context().Done()
			return
		}
		handOut("")(w, r)
	})
	remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	remote.Retry = nil
	fetch := func(ctx context.Context) <-chan error {
		ended := make(chan error, 1)
		go func() {
			_, err := remote.Manifest(ctx, s.ref("org/model:v1"))
			ended <- err
		}()
		return ended
	}
	first, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	leader := fetch(first)
	<-asked
	waiter, leave := context.WithCancel(t.Context())
	defer leave()
	left := fetch(waiter)
	others := []<-chan error{fetch(t.Context()), fetch(t.Context()), fetch(t.Context())}
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who waited: %v", err)
	}
	hangs.Store(false)
	giveUp()
	if err := <-leader; !errors.Is(err, context.Canceled) {
		t.Errorf("who fetched: %v", err)
	}
	for _, o := range others {
		if err := <-o; err != nil {
			t.Error(err)
		}
	}
	if n := len(server.asked()); n != 2 {
		t.Errorf("token server was asked %d times", n)
	}
}
