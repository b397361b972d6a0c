package ocilocal

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// A Credential is what a user has to show to one registry. Its methods print no secret.
// The zero Credential means anonymous.
type Credential struct {
	Username string
	Password string
	// IdentityToken, an OAuth2 refresh token, is exchanged for tokens instead of a password.
	IdentityToken string
	// RegistryToken is shown to the registry as it is, as a bearer token.
	RegistryToken string
	// Source says where it is from, or, in an anonymous one, where nothing was
	// found, for messages: "Docker's config.json (/home/u/.docker/config.json)".
	Source string
}

func (c Credential) anonymous() bool {
	return c.Username == "" && c.Password == "" && c.IdentityToken == "" && c.RegistryToken == ""
}

// String says whose credential it is and where it is from.
func (c Credential) String() string {
	who := "anonymous"
	if !c.anonymous() {
		who = "credential"
	}
	if c.Username != "" {
		who += " of " + printable(c.Username)
	}
	if c.Source == "" {
		return who
	}
	return who + " (" + c.Source + ")"
}

// GoString is String.
func (c Credential) GoString() string { return c.String() }

// MarshalJSON writes String, so that logging a credential doesn't disclose it. It returns no error.
func (c Credential) MarshalJSON() ([]byte, error) { return json.Marshal(c.String()) }

// secrets are the texts that must not be seen in any message.
func (c *Credential) secrets() []string {
	if c == nil {
		return nil
	}
	s := []string{c.Password, c.IdentityToken, c.RegistryToken}
	if c.Password != "" {
		s = append(s, basic(c))
	}
	return s
}

func basic(c *Credential) string {
	return base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password))
}

// A CredentialFunc looks up the credential for a repository of a registry, such as
// "docker.io" and "library/alpine". Finding none is no error: it returns an anonymous
// Credential whose Source says where it looked. Errors must not hold secrets.
type CredentialFunc func(ctx context.Context, host, repository string) (Credential, error)

// credential asks r.Credentials once.
func (p *remoteRepo) credential(ctx context.Context) (*Credential, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked {
		return p.cred, p.credErr
	}
	p.cred = &Credential{}
	if p.remote.Credentials != nil {
		c, err := p.remote.Credentials(ctx, p.host.name, p.name)
		switch {
		case err != nil:
			p.credErr = fmt.Errorf("%w: credentials for %s: %w", ErrUnauthorized, p.host.name, err)
		case strings.Contains(c.Username, ":") || strings.ContainsAny(c.RegistryToken, "\r\n\x00"):
			p.credErr = fmt.Errorf("%w: credentials for %s (%s): a user name with a ':', or a token of more than one line", ErrInvalidArgument, p.host.name, c.Source)
		}
		p.cred = &c
	}
	p.asked = ctx.Err() == nil
	return p.cred, p.credErr
}

// authorized sends c, with what the registry is known to want, and answers a
// challenge of the registry itself.
func (p *remoteRepo) authorized(ctx context.Context, c *remoteCall) (*http.Response, error) {
	var auth authorization
	var err error
	if sameOrigin(c.url, p.host.base) {
		if ch, ok := p.host.challenge(p.name); ok {
			if auth, err = p.answer(ctx, c, ch, ""); err != nil {
				p.host.forget(p.name) // the registry may want something else by now
				return nil, err
			}
		}
	}
	for tries := 1; ; tries++ {
		p.show(auth)
		res, crossed, err := p.follow(ctx, c, auth.header)
		if err != nil {
			return nil, err
		}
		if res.StatusCode != http.StatusUnauthorized {
			return res, nil
		}
		refused := p.answerError(c, res)
		ch, ok := chooseChallenge(parseChallenges(res.Header.Values("WWW-Authenticate")))
		switch {
		case crossed:
			refused.Err = fmt.Errorf("%w: %s asks for credentials, which it doesn't get, since it is not the registry", refused.Err, printable(res.Request.URL.Host))
			return nil, refused
		case !ok:
			refused.Err = fmt.Errorf("%w: the registry names no way to log in that this program knows", refused.Err)
			return nil, refused
		case tries > 2 || auth.fresh && (tries > 1 || auth.fits(ch)):
			return nil, p.denied(ctx, refused, auth)
		}
		p.host.remember(p.name, ch)
		again, err := p.answer(ctx, c, ch, auth.header)
		if err != nil {
			return nil, err
		}
		if again.header == "" || again.header == auth.header {
			return nil, p.denied(ctx, refused, auth)
		}
		auth = again
	}
}

// denied explains a 401 that nothing more can be done about.
func (p *remoteRepo) denied(ctx context.Context, refused *RemoteError, auth authorization) error {
	cred, err := p.credential(ctx)
	if err != nil {
		return err
	}
	switch {
	case !cred.anonymous() && auth.header == "":
		refused.Err = fmt.Errorf("%w: %s wants a user name and a password, and the %s has neither", ErrUnauthorized, p.host.name, cred)
	case !cred.anonymous():
		refused.Err = fmt.Errorf("%w: %s refuses the %s", ErrDenied, p.host.name, cred)
		if auth.bearer && !auth.fresh || auth.basic {
			refused.Err = fmt.Errorf("%w: %s refuses the %s", ErrUnauthorized, p.host.name, cred)
		}
	case cred.Source == "":
		refused.Err = fmt.Errorf("%w: %s wants credentials, and none were given (Remote.Credentials)", ErrUnauthorized, p.host.name)
	default:
		refused.Err = fmt.Errorf("%w: %s wants credentials, and none were found in %s", ErrUnauthorized, p.host.name, cred.Source)
	}
	refused.final = true
	return refused
}

// show notes what the registry is about to be shown.
func (p *remoteRepo) show(auth authorization) {
	if _, token, _ := strings.Cut(auth.header, " "); token != "" {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !slices.Contains(p.shown, token) {
			p.shown = append(p.shown, token)
		}
	}
}

// secrets are what the registry was shown. It may say it again, and no message may.
func (p *remoteRepo) secrets() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return spellings(append(p.cred.secrets(), p.shown...))
}

// conceal cleans the text of an error that something remote has caused.
func (p *remoteRepo) conceal(err error) error {
	if e, ok := errors.AsType[*RemoteError](err); ok {
		e.clean(p.secrets())
	}
	return err
}

func (h *remoteHost) challenge(repository string) (challenge, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, ok := h.challenges[repository]
	return c, ok
}

func (h *remoteHost) remember(repository string, c challenge) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.challenges) >= maxRemembered {
		clear(h.challenges)
	}
	h.challenges[repository] = c
}

func (h *remoteHost) forget(repository string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.challenges, repository)
}

// authorization is an answer to a challenge.
type authorization struct {
	header        string
	bearer, basic bool
	fresh         bool   // the token was got for this very request
	realm, scope  string // of the token
}

// fits reports whether a token was got from where, and for what, the challenge says.
func (a authorization) fits(c challenge) bool {
	want := scope{}
	want.add(c.params["scope"])
	for resource, actions := range want {
		for _, action := range actions {
			if !slices.Contains(strings.Fields(a.scope), resource+":"+action) {
				return false
			}
		}
	}
	return a.realm == c.params["realm"]
}

// answer makes the Authorization for c that a challenge asks for; rejected is
// the one that the registry didn't take. An empty header means that there is none.
func (p *remoteRepo) answer(ctx context.Context, c *remoteCall, ch challenge, rejected string) (authorization, error) {
	cred, err := p.credential(ctx)
	if err != nil {
		return authorization{}, err
	}
	switch {
	case ch.scheme == "basic" && cred.Password == "" && cred.Username == "":
		return authorization{}, nil
	case ch.scheme == "basic":
		return authorization{header: "Basic " + basic(cred), basic: true}, nil
	case cred.RegistryToken != "":
		return authorization{header: "Bearer " + cred.RegistryToken, bearer: true}, nil
	}
	want := scope{}
	want.add("repository:" + p.name + ":" + strings.Join(c.actions, ","))
	if c.from != "" {
		want.add("repository:" + c.from + ":pull")
	}
	want.add(ch.params["scope"])
	scopes := want.list()
	key := tokenKey{
		origin: origin(p.host.base), realm: ch.params["realm"], service: ch.params["service"],
		scope: strings.Join(scopes, " "), user: cred.identity(),
	}
	token, fresh, err := p.remote.token(ctx, key, strings.TrimPrefix(rejected, "Bearer "), func() (tokenAnswer, error) {
		return p.fetchToken(ctx, ch, scopes, cred)
	})
	if err != nil {
		return authorization{}, err
	}
	var flat []string
	for resource, actions := range want {
		for _, a := range actions {
			flat = append(flat, resource+":"+a)
		}
	}
	return authorization{header: "Bearer " + token, bearer: true, fresh: fresh, realm: key.realm, scope: strings.Join(flat, " ")}, nil
}

// tokenKey says what a token is good for. A token is never used for another.
type tokenKey struct{ origin, realm, service, scope, user string }

// identity tells credentials apart without holding one.
func (c *Credential) identity() string {
	h := sha256.New()
	for _, s := range []string{c.Username, c.Password, c.IdentityToken} {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	return string(h.Sum(nil))
}

// A tokenEntry is kept by pointer, so that printing a Remote doesn't print it.
type tokenEntry struct {
	lock    chan struct{} // one place: who has it, may look and fetch
	token   string
	expires time.Time
}

// token returns the token for key, fetching one if there is none, or if it is
// rejected, or expires soon. Callers with the same key wait for one fetch.
func (r *Remote) token(ctx context.Context, key tokenKey, rejected string, fetch func() (tokenAnswer, error)) (token string, fresh bool, err error) {
	r.mu.Lock()
	if r.cache == nil || len(r.cache) >= maxRemembered {
		r.cache = map[tokenKey]*tokenEntry{}
	}
	e := r.cache[key]
	if e == nil {
		e = &tokenEntry{lock: make(chan struct{}, 1)}
		r.cache[key] = e
	}
	r.mu.Unlock()
	select {
	case e.lock <- struct{}{}:
		defer func() { <-e.lock }()
	case <-ctx.Done():
		return "", false, ctx.Err()
	}
	if e.token != "" && e.token != rejected && time.Now().Before(e.expires) {
		return e.token, false, nil
	}
	e.token = ""
	a, err := fetch()
	if err != nil {
		return "", false, err
	}
	e.token, e.expires = a.token, time.Now().Add(a.lifetime)
	return e.token, true, nil
}

// tokenAnswer is a token server's answer.
type tokenAnswer struct {
	token    string
	lifetime time.Duration
}

// parseToken reads the body of a token server's answer.
func parseToken(body []byte) (a tokenAnswer, err error) {
	var doc struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
	}
	if json.Unmarshal(body, &doc) != nil { // whose error could quote the token
		return a, errors.New("is not JSON of the right form")
	}
	a.token = doc.Token
	if a.token == "" {
		a.token = doc.AccessToken
	}
	if a.token == "" || len(a.token) > maxTokenLen {
		return a, fmt.Errorf("has a token of %d bytes", len(a.token))
	}
	for _, c := range []byte(a.token) {
		if c <= 0x20 || c > 0x7e {
			return a, errors.New("has a token that can't be sent in a header")
		}
	}
	// A minute is what the protocol says when the server doesn't. Some go early, since clocks and wires differ.
	seconds := 60.0
	if doc.ExpiresIn > 0 {
		seconds = min(doc.ExpiresIn, 3600)
	}
	a.lifetime = time.Duration(seconds*0.9) * time.Second
	return a, nil
}

// fetchToken asks the token server that a challenge names.
func (p *remoteRepo) fetchToken(ctx context.Context, ch challenge, scopes []string, cred *Credential) (a tokenAnswer, err error) {
	realm, err := p.checkRealm(ctx, ch.params["realm"])
	if err != nil {
		return a, err
	}
	c := &remoteCall{method: http.MethodGet, url: realm, header: http.Header{}, token: true}
	q := url.Values{}
	if service := ch.params["service"]; service != "" {
		q.Set("service", service)
	}
	if cred.IdentityToken != "" {
		q.Set("grant_type", "refresh_token")
		q.Set("refresh_token", cred.IdentityToken)
		q.Set("client_id", "ocilocal")
		q.Set("scope", strings.Join(scopes, " "))
		form := q.Encode()
		c.method, c.size = http.MethodPost, int64(len(form))
		c.header.Set("Content-Type", "application/x-www-form-urlencoded")
		c.body = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(form)), nil }
	} else {
		q["scope"] = scopes
		u := *realm
		if u.RawQuery != "" {
			u.RawQuery += "&"
		}
		u.RawQuery += q.Encode()
		c.url = &u
		if cred.Username != "" || cred.Password != "" {
			c.header.Set("Authorization", "Basic "+basic(cred))
		}
	}
	for attempt := 1; ; attempt++ {
		a, err = p.askTokenServer(ctx, c)
		if err == nil {
			return a, nil
		}
		if e, ok := errors.AsType[*RemoteError](err); ok {
			e.TokenServer = true
			e.explainToken(p.host.name, cred)
			e.clean(p.secrets())
		}
		if err := p.remote.again(ctx, attempt, err); err != nil {
			return a, err
		}
	}
}

// explainToken says whose credentials a token server refused.
func (e *RemoteError) explainToken(host string, cred *Credential) {
	switch e.Status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
		e.final = true
		e.Err = fmt.Errorf("%w: the token server of %s refuses the %s", ErrUnauthorized, host, cred)
	}
}

// askTokenServer makes one request for a token, following redirects on the same origin only.
func (p *remoteRepo) askTokenServer(ctx context.Context, c *remoteCall) (a tokenAnswer, err error) {
	u := c.url
	for hops := 0; ; hops++ {
		res, err := p.exchange(ctx, c, u, p.remote.header(c.header))
		if err != nil {
			return a, err
		}
		switch {
		case res.StatusCode == http.StatusOK:
			body, err := readSmallBody(ctx, c.method, u, res, maxTokenBody)
			if err != nil {
				return a, err
			}
			if a, err = parseToken(body); err != nil {
				return a, protocolError(c.method, u, res.StatusCode, "token server's answer %w", err)
			}
			return a, nil
		case res.StatusCode < 300 || res.StatusCode > 399:
			return a, p.answerError(c, res)
		}
		res.Body.Close()
		next, err := redirected(u, "Location", res.Header.Get("Location"))
		if err != nil || !sameOrigin(u, next) || c.method != http.MethodGet || hops >= maxRedirects {
			return a, protocolError(c.method, u, res.StatusCode, "token server redirects elsewhere")
		}
		u = next
	}
}
