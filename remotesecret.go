package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode"
)

// How secrets are kept out of messages.
//
// The problem: a registry can repeat the passwords and tokens that it was sent, in a body, a header
// or a malformed line that net/http quotes. Some of these texts are cut to a length, and a cut can
// leave a part of a secret that no search for the whole would find. And an error is more than its
// text: errors.Unwrap, %+v and errors.As lead to the errors that it wraps.
//
// The rule has three parts, because no single place sees all texts:
//
//   - Text of a server is cleaned where it is read (serverText), before it is cut. That finds whole
//     secrets, in every spelling that an answer is likely to use (spellings).
//   - An error is cleaned where it leaves a request (conceal, clean). By then all secrets that this
//     call has sent are known. Texts that were cut are searched for beginnings of secrets (hideCut).
//   - A cleaned error keeps no error that it was made from. It keeps a text and those causes whose
//     own texts are the same whoever has caused them (fixedCauses).
//
// It is safe because errors of net/http get into this package in two places only: exchange, and the
// reading of a body. Both end in transportError. Secrets of fewer than four bytes are not hidden:
// they are part of ordinary words, and leaving holes in those would give them away.

// serverText makes text of a server fit for messages: short, printable, and without the secrets
// that the server was sent.
func serverText(s string, secrets []string) string {
	plain := strings.Map(func(c rune) rune {
		if c < 0x20 || c > 0x7e {
			return '?'
		}
		return c
	}, hide(s, secrets))
	return boundText(hide(plain, secrets)) // once more, since a secret may have a '?'
}

// spellings returns secrets in all spellings in which an answer may hold them, the longest first.
func spellings(secrets []string) []string {
	var all []string
	for _, s := range secrets {
		// Shorter ones can't be told from other text: cutting them out would give them away.
		if len(s) >= 4 {
			quoted := strconv.Quote(s)
			all = append(all, s, url.QueryEscape(s), url.PathEscape(s), quoted[1:len(quoted)-1])
		}
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Or(len(b)-len(a), strings.Compare(a, b)) })
	return slices.Compact(all)
}

// hide replaces secrets in a text. The longest come first, so a secret that contains another one is
// replaced whole.
func hide(s string, secrets []string) string {
	for _, secret := range secrets {
		s = strings.ReplaceAll(s, secret, "[secret]")
	}
	return s
}

// hideCut hides beginnings of secrets that stand before an ellipsis, where a text was cut off.
func hideCut(s string, secrets []string) string {
	const most = 300 // that they leave
	var b strings.Builder
	for {
		before, after, cut := strings.Cut(s, "…")
		if !cut {
			return b.String() + s
		}
		for _, secret := range secrets {
			n := min(len(secret)-1, len(before), most)
			for n >= 4 && !strings.HasSuffix(before, secret[:n]) {
				n--
			}
			if n >= 4 {
				before = before[:len(before)-n] + "[secret]"
			}
		}
		b.WriteString(before + "…")
		s = after
	}
}

// A cleanError replaces an error whose text quotes a server, such as lines of headers or names in
// certificates. It keeps a clean text, and the causes whose texts do not depend on a server.
type cleanError struct {
	text    string
	causes  []error
	timeout bool
}

func (e *cleanError) Error() string   { return e.text }
func (e *cleanError) Unwrap() []error { return e.causes }
func (e *cleanError) Timeout() bool   { return e.timeout }

// cleaned returns err with a text that is fit for messages, and without the errors that err wraps.
func cleaned(err error, secrets []string) error { return cleanedError(err, secrets) }

func cleanedError(err error, secrets []string) *cleanError {
	const longest = 2000
	text := strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, hide(err.Error(), secrets))
	text = hide(text, secrets)
	if len(text) > longest {
		text = strings.ToValidUTF8(text[:longest], "") + "…"
	}
	return &cleanError{text: hideCut(text, secrets), causes: fixedCauses(err), timeout: timedOut(err)}
}

// unquoted returns an error whose text consists of the fixed texts of err's causes.
func unquoted(err error) error {
	e := &cleanError{causes: fixedCauses(err), timeout: timedOut(err)}
	var texts []string
	for _, cause := range e.causes {
		texts = append(texts, cause.Error())
	}
	if e.text = strings.Join(texts, ": "); e.text == "" {
		e.text = "no answer that HTTP allows"
	}
	return e
}

// timedOut reports whether an error of the net package, or of the context, was about time.
func timedOut(err error) bool {
	t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err)
	return ok && t.Timeout()
}

// fixedCauses returns the causes of err whose texts do not depend on the peer: sentinels, and
// system error numbers.
func fixedCauses(err error) []error {
	var list []error
	for _, fixed := range fixedErrors {
		if errors.Is(err, fixed) {
			list = append(list, fixed)
		}
	}
	if refused, ok := errors.AsType[*refusedAddress](err); ok {
		list = append(list, refused)
	}
	if number, ok := errors.AsType[syscall.Errno](err); ok {
		list = append(list, number)
	}
	return list
}

// fixedErrors are the sentinels that requests fail with.
var fixedErrors = []error{
	ErrNotFound, ErrUnauthorized, ErrDenied, ErrRateLimited, ErrUnsupportedManifest, ErrTooLarge, ErrRejected, ErrProtocol, ErrTransport,
	ErrDigestMismatch, ErrSizeMismatch, ErrInvalidManifest, ErrInvalidReference, ErrInvalidDigest, ErrInvalidArgument,
	ErrUnsupportedMediaType, ErrArtifactType, ErrIncomplete, ErrConflict, ErrExists, ErrClosed, ErrReadOnly, ErrNoSpace,
	errors.ErrUnsupported, errStalled, errNoHost, errAuthority, errHostName, errCertificate, errAlert,
	context.Canceled, context.DeadlineExceeded, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed,
	http.ErrSchemeMismatch,
}

// clean makes all texts of e fit for messages.
func (e *RemoteError) clean(secrets []string) {
	e.URL = hideCut(hide(e.URL, secrets), secrets)
	for i, c := range e.Codes {
		e.Codes[i] = RemoteCode{hideCut(hide(c.Code, secrets), secrets), hideCut(hide(c.Message, secrets), secrets)}
	}
	e.Err = cleaned(e.Err, secrets)
}

// secrets returns the texts of a credential that no message may contain.
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

// show records the authorization that the registry is about to see.
func (p *remoteRepo) show(auth authorization) {
	if _, token, _ := strings.Cut(auth.header, " "); token != "" {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !slices.Contains(p.shown, token) {
			p.shown = append(p.shown, token)
		}
	}
}

// secrets returns everything secret that the registry was sent in this call, in all spellings. The
// registry may repeat it, and no message may contain it.
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
