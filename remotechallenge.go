package ocilocal

import (
	"slices"
	"strings"
)

// A WWW-Authenticate field has challenges and their parameters, both separated by commas:
//
//	Bearer realm="https://auth.example/token",service="registry", Basic realm="registry"
//	└─────────────────── challenge ────────────────────────────┘ └───── challenge ─────┘
//
// Only the '=' after a name tells a parameter from the next scheme. The reader is written by hand,
// because a wrong reading decides where a password goes.

// A challenge is one way to authenticate that a registry offers.
type challenge struct {
	scheme string            // lower-case: "basic", "bearer"
	params map[string]string // by lower-case name
}

// Limits on challenges. More or longer ones are not read: no honest registry sends them.
const (
	maxChallenges   = 8
	maxChallengeLen = 4 << 10 // bytes of one field
)

// parseChallenges reads WWW-Authenticate fields (RFC 9110, section 11.6.1). A part with two
// possible readings, such as a duplicate parameter, ends the reading of its field. Otherwise an
// attacker who controls a part of the field could choose the reading that counts.
func parseChallenges(fields []string) []challenge {
	var all []challenge
	for _, f := range fields[:min(len(fields), maxChallenges)] {
		if len(f) > maxChallengeLen {
			continue
		}
		s := challengeScanner{text: f}
		for len(all) < maxChallenges {
			c, ok := s.challenge()
			if !ok {
				break
			}
			all = append(all, c)
		}
	}
	return all
}

// chooseChallenge returns the challenge to answer: bearer if there is one, or else basic. With
// bearer the registry itself never sees the password.
func chooseChallenge(all []challenge) (challenge, bool) {
	for _, scheme := range []string{"bearer", "basic"} {
		if i := slices.IndexFunc(all, func(c challenge) bool { return c.scheme == scheme }); i >= 0 {
			return all[i], true
		}
	}
	return challenge{}, false
}

// A challengeScanner reads a field from left to right. text is the rest that was not read yet.
type challengeScanner struct {
	text string
	next string // the scheme of the next challenge, when it was read already
}

// challenge reads a scheme and its parameters. It reports false at the end and where the text can't
// be read. A name that is not followed by '=' is the scheme of the next challenge. It is kept in
// next.
func (s *challengeScanner) challenge() (c challenge, ok bool) {
	scheme := s.next
	s.next = ""
	if scheme == "" {
		s.skip(" \t,")
		if scheme = s.token(); scheme == "" {
			return c, false
		}
	}
	c = challenge{scheme: strings.ToLower(scheme), params: map[string]string{}}
	for {
		s.skip(" \t,")
		name := s.token()
		if name == "" {
			return c, s.text == ""
		}
		s.skip(" \t")
		if !strings.HasPrefix(s.text, "=") { // a new scheme
			s.next = name
			return c, true
		}
		s.text = s.text[1:]
		s.skip(" \t")
		value, ok := s.value()
		name = strings.ToLower(name)
		if _, twice := c.params[name]; !ok || twice {
			return c, false
		}
		c.params[name] = value
	}
}

// skip drops leading characters of a set.
func (s *challengeScanner) skip(chars string) { s.text = strings.TrimLeft(s.text, chars) }

// token reads a token (RFC 9110, section 5.6.2). It returns "" if the text begins with something
// else.
func (s *challengeScanner) token() string {
	n := 0
	for n < len(s.text) && isTokenChar(s.text[n]) {
		n++
	}
	t := s.text[:n]
	s.text = s.text[n:]
	return t
}

// isTokenChar reports whether c is a tchar of RFC 9110, section 5.6.2.
func isTokenChar(c byte) bool {
	return isLowerAlnum(c) || 'A' <= c && c <= 'Z' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// value reads a token or a quoted string. It reports false for a string without an end.
func (s *challengeScanner) value() (string, bool) {
	if !strings.HasPrefix(s.text, `"`) {
		t := s.token()
		return t, t != ""
	}
	var b strings.Builder
	for i := 1; i < len(s.text); i++ {
		switch c := s.text[i]; {
		case c == '"':
			s.text = s.text[i+1:]
			return b.String(), true
		case c == '\\' && i+1 < len(s.text):
			i++
			b.WriteByte(s.text[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", false // no closing quote
}
