package ocilocal

import (
	"bytes"
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
	"strconv"
	"strings"
	"time"
)

// A scope says what a token allows (Docker's token protocol, which the distribution-spec leaves to
// registries): the actions for each resource, such as "repository:org/model".
type scope map[string][]string

// add adds scopes in their text form: "type:name:action,action", separated by spaces. The numbers
// of resources and actions are bounded, because a server may have sent the text.
func (s scope) add(text string) {
	for one := range strings.FieldsSeq(text) {
		i := strings.LastIndexByte(one, ':')
		if i <= 0 || len(s) >= 16 {
			continue
		}
		for a := range strings.SplitSeq(one[i+1:], ",") {
			if a != "" && !slices.Contains(s[one[:i]], a) && len(s[one[:i]]) < 16 {
				s[one[:i]] = append(s[one[:i]], a)
			}
		}
	}
}

// list returns the scopes as text. Equal scopes have equal lists.
func (s scope) list() []string {
	var all []string
	for resource, actions := range s {
		all = append(all, resource+":"+strings.Join(slices.Sorted(slices.Values(actions)), ","))
	}
	slices.Sort(all)
	return all
}

// A tokenKey says for which requests a token may be used. A token is never used for another key:
// not for another registry, another token server, a wider scope or another user.
type tokenKey struct{ origin, realm, service, scope, user string }

// identity returns a hash that differs for different credentials, so that keys of the cache hold no
// secret.
func (c *Credential) identity() string {
	h := sha256.New()
	for _, s := range []string{c.Username, c.Password, c.IdentityToken} {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	return string(h.Sum(nil))
}

// A tokenEntry is a cached token. It is kept by pointer, so that printing a Remote does not print
// the token.
type tokenEntry struct {
	lock    chan struct{} // one place; its holder may use the fields below
	token   string
	expires time.Time
}

// token returns the token for key. It fetches one if there is none, if the one in the cache is the
// rejected one, or if that expires soon. Calls with the same key wait for one fetch. fresh says
// that this call has fetched it.
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

// A tokenAnswer is the answer of a token server.
type tokenAnswer struct {
	token    string
	lifetime time.Duration
}

// parseToken reads the body of a token server's answer. It is lenient about the fields beside the
// token. Its errors quote nothing of the body.
func parseToken(body []byte) (a tokenAnswer, err error) {
	var doc struct {
		Token       any `json:"token"`
		AccessToken any `json:"access_token"`
		ExpiresIn   any `json:"expires_in"`
	}
	if json.Unmarshal(bytes.TrimPrefix(body, []byte("\ufeff")), &doc) != nil { // the error could quote the token
		return a, errors.New("is not JSON of the right form")
	}
	a.token, _ = doc.Token.(string)
	if a.token == "" {
		a.token, _ = doc.AccessToken.(string)
	}
	if a.token == "" || len(a.token) > maxTokenLen {
		return a, fmt.Errorf("has a token of %d bytes", len(a.token))
	}
	for _, c := range []byte(a.token) {
		if c <= 0x20 || c > 0x7e {
			return a, errors.New("has a token that can't be sent in a header")
		}
	}
	// The protocol says a minute if the server does not say. A tenth of the time is left for slow
	// clocks and slow networks.
	seconds := 60.0
	says, ok := doc.ExpiresIn.(float64)
	if text, isText := doc.ExpiresIn.(string); isText {
		says, err = strconv.ParseFloat(strings.TrimSpace(text), 64)
		ok = err == nil
	}
	if ok && says > 0 {
		seconds = min(says, 3600)
	}
	a.lifetime = time.Duration(seconds * 0.9 * float64(time.Second))
	return a, nil
}

// fetchToken asks the token server that a challenge names for a token of some scopes. With an
// identity token it posts a form, as OAuth2 demands. Otherwise it sends the user name and the
// password to the realm. In both cases checkRealm has accepted the realm before.
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
		if err := p.again(ctx, attempt, err); err != nil {
			return a, err
		}
	}
}

// explainToken says whose credential the token server of host has refused. Such a refusal is not
// repeated.
func (e *RemoteError) explainToken(host string, cred *Credential) {
	switch e.Status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
		e.final = true
		who := "the " + cred.String()
		if cred.anonymous() {
			who = "anonymous access"
		}
		e.Err = fmt.Errorf("%w: the token server of %s refuses %s", ErrUnauthorized, host, who)
	}
}

// askTokenServer makes one request for a token. It follows redirects within the token server's
// origin only, because the request may carry a credential.
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

// checkRealm returns the address of the token server that a registry names, if the registry may
// name it. The scheme must be https, or http if the registry itself is plain. The host must be one
// that the guard allows. It is the only check between a challenge and a password, so it returns the
// address that is used, and not a verdict about a text.
func (p *remoteRepo) checkRealm(ctx context.Context, realm string) (*url.URL, error) {
	refuse := func(format string, args ...any) error {
		return &RemoteError{Method: http.MethodGet, URL: publicURL(p.host.base), TokenServer: true, final: true,
			Err: fmt.Errorf("%w: token server that %s names is refused: "+format, append([]any{ErrProtocol, p.host.name}, args...)...)}
	}
	u, err := url.Parse(realm)
	if err != nil || realm == "" {
		return nil, refuse("its realm is not an address")
	}
	u.Fragment, u.RawFragment = "", ""
	switch {
	case u.User != nil:
		return nil, refuse("its realm has user information in it")
	case strings.TrimSuffix(u.Hostname(), ".") == "" || u.Opaque != "":
		return nil, refuse("its realm has no host")
	case u.Scheme == "https":
	case u.Scheme == "http" && p.host.base.Scheme == "http" && p.remote.plainHTTP(u.Host):
	default:
		return nil, refuse("%s is neither https, nor http where that is allowed", publicURL(u))
	}
	if sameOrigin(u, p.host.base) {
		return u, nil // the registry sees the credential in any case
	}
	if err := p.checkHost(ctx, u); err != nil {
		return nil, refuse("%w", err)
	}
	return u, nil
}

// basic returns the user name and the password in the form of basic authentication (RFC 7617).
func basic(c *Credential) string {
	return base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password))
}
