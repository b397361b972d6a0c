package ocilocal

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// origin is what a credential belongs to: scheme, host and port, in one spelling.
func origin(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[strings.ToLower(u.Scheme)]
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	return strings.ToLower(u.Scheme) + "://" + net.JoinHostPort(host, port)
}

func sameOrigin(a, b *url.URL) bool { return origin(a) == origin(b) }

// redirected returns the address that an answer names for what was asked of
// base, if going there is safe at all. The text is the server's.
func redirected(base *url.URL, header, text string) (*url.URL, error) {
	if text == "" {
		return nil, fmt.Errorf("%w: answer without %s", ErrProtocol, header)
	}
	u, err := base.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is not an address", ErrProtocol, header) // err would quote its query
	}
	switch {
	case u.User != nil:
		return nil, fmt.Errorf("%w: %s has user information in it", ErrProtocol, header)
	case u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Opaque != "":
		return nil, fmt.Errorf("%w: %s leads to %s, not to http or https", ErrProtocol, header, printable(u.Scheme))
	case base.Scheme == "https" && u.Scheme != "https":
		return nil, fmt.Errorf("%w: %s leads from https to http", ErrProtocol, header)
	}
	u.Fragment, u.RawFragment = "", ""
	return u, nil
}

// publicURL prints an address without what may be secret in it.
func publicURL(u *url.URL) string {
	return printable((&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String())
}
