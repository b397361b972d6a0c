package ocilocal

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

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
