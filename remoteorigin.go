package ocilocal

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// origin returns the scheme, host and port of an address in one spelling. Credentials belong to an
// origin: they never go to another one.
func origin(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[strings.ToLower(u.Scheme)]
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	return strings.ToLower(u.Scheme) + "://" + net.JoinHostPort(host, port)
}

// sameOrigin reports whether two addresses have the same origin.
func sameOrigin(a, b *url.URL) bool { return origin(a) == origin(b) }

// redirected returns the address to which a server sends a request for base, if it is safe to go
// there at all: an http or https address without user information, and no step from https to http.
// header names the field of the answer, and text is its value.
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

// publicURL prints an address without its query and user information, which may be secret.
func publicURL(u *url.URL) string {
	return printable((&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String())
}
