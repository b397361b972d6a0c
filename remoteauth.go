package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
)

// How a request is authorized. The paths to look for are where a secret is sent:
//
//	try ─▶ authorized ─▶ follow ──▶ exchange            Authorization only to the registry's origin
//	          │  ▲          │
//	          │  └ 401 ─────┘ parseChallenges, chooseChallenge
//	          ▼
//	       answer ─┬─ basic                              user and password, to the registry
//	               └─ bearer ─▶ token ─▶ fetchToken      user and password, to the realm, if
//	                            (cache)     │            checkRealm accepts it
//	                                        └▶ askTokenServer, with redirects inside its origin
//
// A challenge is remembered for its repository. So later requests carry the answer at once, and a
// call of many blobs is refused only once.

// credential returns the credential of the call. It asks [Remote.Credentials] once. If that fails,
// the call goes on without a credential, which may be enough, and [remoteRepo.blame] adds the
// failure to a later refusal. The only error is the one of ctx.
func (p *remoteRepo) credential(ctx context.Context) (*Credential, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked {
		return p.cred, nil
	}
	p.cred = &Credential{}
	if p.remote.Credentials != nil {
		c, err := p.remote.Credentials(ctx, p.host.name, p.name)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err == nil && (strings.Contains(c.Username, ":") || strings.ContainsAny(c.RegistryToken, "\r\n\x00")) {
			err = fmt.Errorf("%w: %s: a user name with a ':', or a token of more than one line", ErrInvalidArgument, c.Source)
		}
		if err != nil {
			p.credErr = err
			c = Credential{Source: c.Source}
		}
		p.cred = &c
	}
	p.asked = true
	return p.cred, nil
}

// blame adds the failure of the credential source to an error with which the registry or its token
// server has refused a request.
func (p *remoteRepo) blame(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, ok := errors.AsType[*RemoteError](err)
	if p.credErr == nil || !ok || e.Status < 400 || e.Status > 499 {
		return err
	}
	return fmt.Errorf("%w (credentials for %s: %w)", err, p.host.name, p.credErr)
}

// authorized sends c and answers challenges.
//
// If the registry is known to want an authorization, c carries it at once. A challenge is a 401, or
// a 403 that says that the token allows too little. Only the registry's own challenge is answered:
// a host to which a redirect leads gets no credential, whatever it asks for. Each answer must
// differ from the one before, and their number is bounded. So a registry that refuses every token
// does not keep the call for ever.
func (p *remoteRepo) authorized(ctx context.Context, c *remoteCall) (*http.Response, error) {
	var auth authorization
	if sameOrigin(c.url, p.host.base) {
		if err := p.introduce(ctx); err != nil {
			return nil, err
		}
		if ch, ok := p.host.challenge(p.name); ok {
			var err error
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
		ch, ok := chooseChallenge(parseChallenges(res.Header.Values("WWW-Authenticate")))
		lacking := res.StatusCode == http.StatusForbidden && !crossed && tries <= 2 &&
			ok && ch.params["error"] == "insufficient_scope" && !auth.fits(ch)
		if res.StatusCode != http.StatusUnauthorized && !lacking {
			return res, nil
		}
		refused := p.answerError(c, res)
		wide := false
		if !ok && !crossed && auth.bearer {
			ch, ok = p.widened(c, auth)
			wide = ok
		}
		switch {
		case crossed:
			refused.Err = fmt.Errorf("%w: %s asks for credentials, which it doesn't get, since it is not the registry", refused.Err, printable(res.Request.URL.Host))
			return nil, refused
		case !ok:
			refused.Err = fmt.Errorf("%w: the registry names no way to log in that this program knows", refused.Err)
			return nil, refused
		case !lacking && !wide && (tries > 2 || auth.fresh && (tries > 1 || auth.fits(ch))):
			return nil, p.denied(ctx, refused, auth)
		}
		if !lacking && !wide {
			p.host.remember(p.name, ch)
		}
		next, err := p.answer(ctx, c, ch, auth.header)
		switch {
		case err != nil && lacking:
			return nil, refused // no better token is to be had
		case err != nil:
			return nil, err
		case lacking && (next.header == "" || next.header == auth.header):
			return nil, refused
		case next.header == "" || next.header == auth.header:
			return nil, p.denied(ctx, refused, auth)
		}
		auth = next
	}
}

// introduce finds out how the registry wants to see a credential, if [Remote.SendCredentials] says
// not to wait for a challenge. It asks the entry point /v2/, where even registries that hide
// everything else send one.
func (p *remoteRepo) introduce(ctx context.Context) error {
	if p.remote.SendCredentials == nil || !p.remote.SendCredentials(p.host.name) {
		return nil
	}
	if _, known := p.host.challenge(p.name); known {
		return nil
	}
	cred, err := p.credential(ctx)
	if err != nil || cred.anonymous() {
		return err
	}
	u := p.host.base.JoinPath("v2")
	u.Path += "/"
	res, crossed, err := p.follow(ctx, &remoteCall{method: http.MethodGet, url: u, repo: p}, "")
	if err != nil {
		return err
	}
	res.Body.Close()
	ch, ok := chooseChallenge(parseChallenges(res.Header.Values("WWW-Authenticate")))
	if crossed || !ok {
		ch = challenge{scheme: "basic"}
		if cred.RegistryToken != "" {
			ch.scheme = "bearer"
		}
	}
	p.host.remember(p.name, ch)
	return nil
}

// widened returns a challenge for a token that allows reading and writing. Some registries answer
// a token that allows too little with 401 and no challenge, and this takes its place. It reports
// false for requests that only read, and if the token had that scope already.
func (p *remoteRepo) widened(c *remoteCall, auth authorization) (challenge, bool) {
	ch, ok := p.host.challenge(p.name)
	if !ok || ch.scheme != "bearer" || c.method == http.MethodGet || c.method == http.MethodHead {
		return challenge{}, false
	}
	ch.params = maps.Clone(ch.params)
	ch.params["scope"] = "repository:" + p.name + ":pull,push"
	return ch, !auth.fits(ch)
}

// denied explains a 401 that no other credential or token can change. It tells a user what is
// missing: a credential at all, one that this registry accepts, or rights of it.
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

// challenge returns the last challenge for a repository. Later requests answer it without waiting
// for another one.
func (h *remoteHost) challenge(repository string) (challenge, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, ok := h.challenges[repository]
	return c, ok
}

// remember keeps the challenge of a repository. The number of them is bounded.
func (h *remoteHost) remember(repository string, c challenge) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.challenges) >= maxRemembered {
		clear(h.challenges)
	}
	h.challenges[repository] = c
}

// forget drops the challenge of a repository, after it could not be answered.
func (h *remoteHost) forget(repository string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.challenges, repository)
}

// An authorization is an answer to a challenge.
type authorization struct {
	header        string // "" for none
	bearer, basic bool
	fresh         bool   // the token was fetched for this very request
	realm, scope  string // of the token
}

// fits reports whether the token came from the realm of the challenge, for all of its scope. Such a
// token cannot be improved by asking again.
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

// answer makes the Authorization header for c that a challenge asks for. rejected is the header
// that the registry has refused, and empty if there was none. Without a suitable credential the
// result has an empty header.
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
	own := scope{}
	own.add("repository:" + p.name + ":" + strings.Join(c.actions, ","))
	want := scope{}
	want.add(strings.Join(own.list(), " "))
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
		a, err := p.fetchToken(ctx, ch, scopes, cred)
		if e, ok := errors.AsType[*RemoteError](err); ok && e.Status >= 400 && e.Status < 500 && e.Status != http.StatusTooManyRequests &&
			!slices.Equal(scopes, own.list()) {
			// The server may refuse what the challenge or a mount adds: a placeholder, another
			// repository.
			if a, again := p.fetchToken(ctx, ch, own.list(), cred); again == nil {
				return a, nil
			}
		}
		return a, err
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
