package ocilocal

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
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
	own := sameOrigin(res.Request.URL, p.host.base)
	if c.token || own {
		body, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody)) // the part that arrives is worth showing
		e.Codes = parseErrorBody(body, p.secrets())
	}
	e.Err = e.kind()
	if e.Err == ErrNotFound && (c.token || !own) { // only the registry can know that
		e.Err = ErrTransport
	}
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
