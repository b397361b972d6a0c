package ocilocal

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// maxLinkLen bounds the address of a page.
const maxLinkLen = 8 << 10

// nextPage returns the address in a Link of relation "next" (RFC 8288), and nil if there is none.
//
// Only the registry's own origin is asked for pages, since the request carries a credential. A
// registry behind a proxy may state an address with the scheme, host, port or prefix by which the
// proxy reaches it. If such an address ends with the path of the request, the list goes on at that
// path of the registry's own origin. Any other address elsewhere is an error.
func nextPage(at *url.URL, h http.Header) (*url.URL, error) {
	text, err := parseLink(h.Values("Link"))
	if err != nil || text == "" {
		return nil, err
	}
	text = strings.ReplaceAll(text, " ", "%20")
	u, err := at.Parse(text)
	if err == nil && u.User == nil && u.Host != "" && strings.HasSuffix(u.Path, at.Path) {
		own := *at
		own.RawQuery = u.RawQuery
		return &own, nil
	}
	if u, err = redirected(at, "Link", text); err != nil {
		return nil, err
	}
	if !sameOrigin(u, at) {
		return nil, fmt.Errorf("%w: Link leads to another host, %s", ErrProtocol, printable(u.Host))
	}
	return u, nil
}

// parseLink returns the target of the first link with relation "next". It returns "" if there is
// none, and for an empty target, which some registries send with the last page. An unreadable field
// is an error, because the list might go on.
func parseLink(fields []string) (string, error) {
	for _, f := range fields {
		s := challengeScanner{text: f}
		for s.skip(" \t,"); s.text != ""; s.skip(" \t,") {
			target, next, ok := s.link()
			switch {
			case !ok:
				return "", fmt.Errorf("%w: Link can't be read", ErrProtocol) // its text may have a secret query
			case next && len(target) > maxLinkLen:
				return "", fmt.Errorf("%w: Link has %d bytes", ErrProtocol, len(target))
			case next:
				return target, nil
			}
		}
	}
	return "", nil
}

// link reads one link with its parameters. Only the first "rel" counts. Some registries leave out
// the brackets around the target.
func (s *challengeScanner) link() (target string, next, ok bool) {
	if rest, bracket := strings.CutPrefix(s.text, "<"); bracket {
		if target, s.text, ok = strings.Cut(rest, ">"); !ok {
			return "", false, false
		}
	} else if strings.HasPrefix(s.text, "/") || strings.HasPrefix(s.text, "http") {
		target = strings.TrimSpace(s.until(";,"))
	} else {
		return "", false, false
	}
	related := false
	for s.skip(" \t;"); s.text != "" && s.text[0] != ','; s.skip(" \t;") {
		name, value := strings.TrimSpace(s.until("=;,")), ""
		if strings.HasPrefix(s.text, "=") {
			s.skip("= \t")
			if strings.HasPrefix(s.text, `"`) {
				if value, ok = s.value(); !ok {
					return "", false, false
				}
			}
			value += s.until(";,")
		}
		if strings.EqualFold(name, "rel") && !related {
			related, next = true, slices.Contains(strings.Fields(strings.ToLower(value)), "next")
		}
	}
	return target, next, true
}

// until reads up to one of some characters, or to the end.
func (s *challengeScanner) until(chars string) string {
	n := strings.IndexAny(s.text, chars)
	if n < 0 {
		n = len(s.text)
	}
	t := s.text[:n]
	s.text = s.text[n:]
	return t
}
