package ocilocal

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// A RemoteError says what became of a request to a registry or its token
// server. It matches the sentinel that fits: [ErrNotFound], [ErrUnauthorized], [ErrDenied],
// [ErrRateLimited], [ErrUnsupportedManifest], [ErrTooLarge], [ErrProtocol],
// [ErrTransport], or [errors.ErrUnsupported] for what the registry doesn't offer.
type RemoteError struct {
	Method string
	URL    string // without query and user information, which may be secret
	Status int    // 0 if no answer came
	// Codes are what the registry said in the body, at most ten.
	Codes []RemoteCode
	// TokenServer is set if this was a request for a token, not one to the registry.
	TokenServer bool
	// RetryAfter is how long the registry wants to be left alone; 0 if it didn't say.
	RetryAfter time.Duration
	// Err is the cause. It matches a sentinel. It and the errors that it wraps are as clean as
	// their text: of net/http's errors, only sentinels and system error numbers are kept.
	Err error

	final bool // trying again can't help
	again bool // trying again will help, whatever the status says
	// givenUp is set when the retry policy has refused it: it is not asked again by
	// whoever needed the token, or is at a larger step of which this was a part.
	givenUp bool
}

// A RemoteCode is one error in a registry's answer (distribution-spec, "Error Codes").
type RemoteCode struct{ Code, Message string }

func (e *RemoteError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: ", e.Method, e.URL)
	switch {
	case e.Status == 0:
	case e.TokenServer:
		fmt.Fprintf(&b, "token server answered %d: ", e.Status)
	default:
		fmt.Fprintf(&b, "registry answered %d: ", e.Status)
	}
	b.WriteString(e.Err.Error())
	for _, c := range e.Codes {
		fmt.Fprintf(&b, " (%s: %s)", c.Code, c.Message)
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *RemoteError) Unwrap() error { return e.Err }

// Temporary reports whether the same request may succeed later: no complete
// answer came, or its status was 408, 429 or above 499, but for 501 and 505.
func (e *RemoteError) Temporary() bool {
	switch {
	case e.again:
		return true
	case e.final:
		return false
	case e.Status == 0, e.Status == http.StatusRequestTimeout, e.Status == http.StatusTooManyRequests:
		return true
	}
	return e.Status >= 500 && e.Status != http.StatusNotImplemented && e.Status != http.StatusHTTPVersionNotSupported
}

// has reports whether the registry named one of the codes.
func (e *RemoteError) has(codes ...string) bool {
	return slices.ContainsFunc(e.Codes, func(c RemoteCode) bool { return slices.Contains(codes, c.Code) })
}

// kind returns the sentinel for an answer.
func (e *RemoteError) kind() error {
	switch s := e.Status; {
	case s == http.StatusUnauthorized:
		return ErrUnauthorized
	case s == http.StatusForbidden:
		return ErrDenied
	case s == http.StatusNotFound:
		return ErrNotFound
	case s == http.StatusRequestEntityTooLarge:
		return ErrTooLarge
	case s == http.StatusTooManyRequests:
		return ErrRateLimited
	case s == http.StatusMethodNotAllowed, s == http.StatusNotImplemented:
		return errors.ErrUnsupported
	case s == http.StatusRequestTimeout, s >= 500:
		return ErrTransport
	case s < 400:
		return ErrProtocol
	case e.has("UNAUTHORIZED"):
		return ErrUnauthorized
	case e.has("DENIED"):
		return ErrDenied
	case e.has("TOOMANYREQUESTS"):
		return ErrRateLimited
	case e.has("MANIFEST_UNKNOWN", "MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "BLOB_UPLOAD_UNKNOWN"):
		return ErrNotFound
	case e.has("UNSUPPORTED"):
		return errors.ErrUnsupported
	}
	return ErrProtocol
}

// answerError makes an error of an answer that is none of those that were asked for, and closes its
// body. Only the registry and its token server are quoted: another host may be one that only this
// machine can reach, and its text would tell others about it.
func (p *remoteRepo) answerError(c *remoteCall, res *http.Response) *RemoteError {
	defer res.Body.Close()
	e := &RemoteError{
		Method:     res.Request.Method,
		URL:        publicURL(res.Request.URL),
		Status:     res.StatusCode,
		RetryAfter: parseRetryAfter(res.Header.Get("Retry-After"), time.Now()),
	}
	if c.token || sameOrigin(res.Request.URL, p.host.base) {
		body, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody)) // the part that arrives is worth showing
		e.Codes = parseErrorBody(body, p.secrets())
	}
	e.Err = e.kind()
	return e
}

// answerProblem adds the facts of an answer to err, which says what is wrong with its content.
func answerProblem(c *remoteCall, res *http.Response, err error) error {
	if !sameOrigin(res.Request.URL, c.repo.host.base) {
		err = unquoted(err)
	}
	e := &RemoteError{Method: c.method, URL: publicURL(res.Request.URL), Status: res.StatusCode, final: true, Err: err}
	return c.repo.conceal(e)
}

// parseErrorBody reads distribution-spec's form of errors; any other body gives none.
func parseErrorBody(body []byte, secrets []string) []RemoteCode {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil {
		return nil
	}
	var codes []RemoteCode
	for _, e := range doc.Errors[:min(len(doc.Errors), 10)] {
		codes = append(codes, RemoteCode{serverText(e.Code, secrets), serverText(e.Message, secrets)})
	}
	return codes
}

// serverText makes text of a server fit for messages: short, printable,
// and without the secrets that were sent to it.
func serverText(s string, secrets []string) string {
	plain := strings.Map(func(c rune) rune {
		if c < 0x20 || c > 0x7e {
			return '?'
		}
		return c
	}, hide(s, secrets))
	return clip(hide(plain, secrets)) // again: a secret may have a '?'
}

// spellings returns secrets in the ways in which an answer may hold them, the longest first.
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

func hide(s string, secrets []string) string {
	for _, secret := range secrets {
		s = strings.ReplaceAll(s, secret, "[secret]")
	}
	return s
}

// hideCut hides what is left of secrets in texts that [clip] and the like have cut off.
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

// A cleanError takes the place of an error whose text quotes a peer, as that of net/http does:
// lines of headers, names in certificates. It keeps nothing of that error but a text that is fit
// for messages, and the causes that say nothing of a peer.
type cleanError struct {
	text    string
	causes  []error
	timeout bool
}

func (e *cleanError) Error() string   { return e.text }
func (e *cleanError) Unwrap() []error { return e.causes }
func (e *cleanError) Timeout() bool   { return e.timeout }

// cleaned returns err with a text that is fit for messages, and without a chain that says more.
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

// unquoted returns an error that says of err only what its causes with fixed texts say.
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

// fixedCauses returns the causes of err whose texts are the same whoever caused them: sentinels, and
// the numbers of the system.
func fixedCauses(err error) []error {
	var list []error
	for _, fixed := range fixedErrors {
		if errors.Is(err, fixed) {
			list = append(list, fixed)
		}
	}
	if number, ok := errors.AsType[syscall.Errno](err); ok {
		list = append(list, number)
	}
	return list
}

// fixedErrors are the sentinels that requests fail with.
var fixedErrors = []error{
	ErrNotFound, ErrUnauthorized, ErrDenied, ErrRateLimited, ErrUnsupportedManifest, ErrTooLarge, ErrProtocol, ErrTransport,
	ErrDigestMismatch, ErrSizeMismatch, ErrInvalidManifest, ErrInvalidReference, ErrInvalidDigest, ErrInvalidArgument,
	ErrUnsupportedMediaType, ErrArtifactType, ErrIncomplete, ErrConflict, ErrExists, ErrClosed, ErrReadOnly, ErrNoSpace,
	errors.ErrUnsupported, errStalled, errRefusedAddress, errNoHost, errAuthority, errHostName, errCertificate,
	context.Canceled, context.DeadlineExceeded, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed,
	http.ErrSchemeMismatch,
}

// clean makes all that e says fit for messages.
func (e *RemoteError) clean(secrets []string) {
	e.URL = hideCut(hide(e.URL, secrets), secrets)
	for i, c := range e.Codes {
		e.Codes[i] = RemoteCode{hideCut(hide(c.Code, secrets), secrets), hideCut(hide(c.Message, secrets), secrets)}
	}
	e.Err = cleaned(e.Err, secrets)
}

// maxServerWait bounds what a Retry-After can say, so that no sum overflows.
const maxServerWait = 365 * 24 * time.Hour

// parseRetryAfter reads seconds or a date (RFC 9110, section 10.2.3). What is neither, or past, is 0.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 63); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(n, uint64(maxServerWait/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(s); err == nil {
		return min(max(at.Sub(now), 0), maxServerWait)
	}
	return 0
}

// Timeout reports whether no answer came in time.
func (e *RemoteError) Timeout() bool { return errors.Is(e.Err, errStalled) || timedOut(e.Err) }

// transportError makes an error of a request that got no answer.
func transportError(method string, u *url.URL, err error) *RemoteError {
	if wrapped, ok := errors.AsType[*url.Error](err); ok { // it prints the whole address
		err = wrapped.Err
	}
	e := &RemoteError{Method: method, URL: publicURL(u), Err: fmt.Errorf("%w: %w", ErrTransport, err)}
	reason := connectReason(err)
	e.final = reason != nil || errors.Is(err, http.ErrSchemeMismatch)
	if errors.Is(err, ErrProtocol) {
		e.Err, e.final = err, true
	}
	clean := cleanedError(e.Err, nil)
	if reason != nil {
		clean.causes = append(clean.causes, reason)
	}
	e.Err = clean
	return e
}

// The reasons for which a connection can't be made that last. Their texts quote nobody.
var (
	errNoHost      = errors.New("no such host")
	errAuthority   = errors.New("certificate is signed by an unknown authority")
	errHostName    = errors.New("certificate is for another host")
	errCertificate = errors.New("certificate is not valid")
)

// connectReason returns the reason that err has, nil for any other.
func connectReason(err error) error {
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return errNoHost
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok {
		return nil
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return errAuthority
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return errHostName
	}
	return errCertificate
}

// protocolError is an [ErrProtocol] with the facts of an answer.
func protocolError(method string, u *url.URL, status int, format string, args ...any) *RemoteError {
	return &RemoteError{Method: method, URL: publicURL(u), Status: status, final: true,
		Err: fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)}
}

// RetryFunc decides whether a request that has failed attempt times with err
// (a [*RemoteError] mostly) is sent again, and after how long. It is not asked when the
// call's context has ended.
type RetryFunc func(attempt int, err error) (wait time.Duration, again bool)

// maxRetryWait is how long DefaultRetry waits at most.
const maxRetryWait = time.Minute

// DefaultRetry tries [RemoteError.Temporary] errors again, up to five times. It waits as
// long as the registry asks, and gives up if that is more than a minute;
// otherwise a random time of up to 0.4 seconds, doubled with each attempt.
func DefaultRetry(attempt int, err error) (wait time.Duration, again bool) {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || !e.Temporary() || attempt > maxRetries || e.RetryAfter > maxRetryWait {
		return 0, false
	}
	if e.RetryAfter > 0 {
		// Not all who were turned away come back at the same moment.
		return e.RetryAfter + rand.N(time.Second), true
	}
	most := 400 * time.Millisecond << (attempt - 1)
	return most/8 + rand.N(most), true
}
