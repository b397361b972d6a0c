package ocilocal

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// checkRealm returns the address of the token server that a registry names, if it may name it.
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
		return u, nil // it has what goes there anyway
	}
	if err := p.checkHost(ctx, u); err != nil {
		return nil, refuse("%w", err)
	}
	return u, nil
}
