package ocilocal

import (
	"context"
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
	"strconv"
	"strings"
	"time"
)

// A RemoteError describes a failed request to a registry or its token server. It matches the
// sentinel that fits: [ErrNotFound], [ErrUnauthorized], [ErrDenied], [ErrRateLimited],
// [ErrUnsupportedManifest], [ErrTooLarge], [ErrRejected], [ErrProtocol], [ErrTransport], or
// [errors.ErrUnsupported] for an operation that the registry does not offer.
//
// Only the registry itself can say that something does not exist. A 404 of a token server, or of
// another host to which the registry leads, is [ErrTransport].
type RemoteError struct {
	Method string
	URL    string // without query and user information, which may be secret
	Status int    // 0 if no answer came
	// Codes are the errors in the answer's body, at most ten. Their texts are bounded and cleaned.
	// Answers of hosts other than the registry and its token server are not quoted.
	Codes []RemoteCode
	// TokenServer is set if the request was one for a token.
	TokenServer bool
	// RetryAfter is how long the server asks the client to wait. It is 0 if the server does not
	// say.
	RetryAfter time.Duration
	// Err is the cause. It matches a sentinel. Neither its text nor the errors that it wraps quote
	// net/http's errors: only sentinels and system error numbers are kept.
	Err error

	// The retry state. The paragraph in remoteretry.go says who sets and reads it.
	final   bool
	again   bool
	givenUp bool
}

// A RemoteCode is one error in an answer. In the form of distribution-spec, "Error Codes", both
// fields are set. Other forms may have only a code (JSON) or only a message (plain text, HTML).
type RemoteCode struct{ Code, Message string }

func (c RemoteCode) String() string {
	if c.Code == "" || c.Message == "" {
		return c.Code + c.Message
	}
	return c.Code + ": " + c.Message
}

// Error names the request, who answered and with which status, the cause, and the registry's codes.
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
		fmt.Fprintf(&b, " (%s)", c)
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *RemoteError) Unwrap() error { return e.Err }

// Temporary reports whether the same request may succeed later: no complete answer came, or its
// status was 408, 429 or above 499, except 501 and 505.
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

// kind returns the sentinel for an answer. own says that the registry itself has answered. The
// status decides where it is clear. The codes decide for the statuses that registries use in
// different ways, such as 400. ErrNotFound needs own: another server can't know what the registry
// has.
func (e *RemoteError) kind(own bool) error {
	switch s := e.Status; {
	case s == http.StatusUnauthorized:
		return ErrUnauthorized
	case s == http.StatusForbidden:
		return ErrDenied
	case s == http.StatusNotFound && own:
		return ErrNotFound
	case s == http.StatusNotFound:
		return ErrTransport
	case s == http.StatusRequestEntityTooLarge:
		return ErrTooLarge
	case s == http.StatusTooManyRequests:
		return ErrRateLimited
	case s == http.StatusMethodNotAllowed, s == http.StatusNotImplemented:
		return errors.ErrUnsupported
	case s == http.StatusProxyAuthRequired:
		return errProxyLogin
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
	case own && e.has("MANIFEST_UNKNOWN", "MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "BLOB_UPLOAD_UNKNOWN"):
		return ErrNotFound
	case e.has("UNSUPPORTED"):
		return errors.ErrUnsupported
	}
	return ErrRejected
}

// The causes of answers that come from a proxy and not from the registry.
var (
	errProxyLogin   = fmt.Errorf("%w: the proxy wants credentials", ErrTransport)
	errProxyRefuses = fmt.Errorf("%w: the proxy refuses to connect to the registry", ErrTransport)
)

// proxyError returns the error for a proxy's answer to CONNECT, and nil for success. A 4xx is
// final: the proxy does not allow the connection. Another status may be repeated.
func proxyError(status int) error {
	switch {
	case status == http.StatusOK:
		return nil
	case status == http.StatusProxyAuthRequired:
		return errProxyLogin
	case status >= 400 && status < 500:
		return fmt.Errorf("%w, with status %d", errProxyRefuses, status)
	}
	return fmt.Errorf("proxy answers %d when it is to connect to the registry", status)
}

// answerError makes an error of an answer with an unwanted status, and closes its body. Only the
// registry and its token server are quoted. Another host may be one that only this machine can
// reach, and its text would disclose something about it.
func (p *remoteRepo) answerError(c *remoteCall, res *http.Response) *RemoteError {
	defer res.Body.Close()
	e := &RemoteError{
		Method:     res.Request.Method,
		URL:        publicURL(res.Request.URL),
		Status:     res.StatusCode,
		RetryAfter: parseRetryAfter(res.Header.Get("Retry-After"), time.Now()),
	}
	own := sameOrigin(res.Request.URL, p.host.base) && !c.token
	if own || c.token {
		body, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody)) // a part of it is better than nothing
		e.Codes = parseErrorBody(body, p.secrets())
	}
	e.Err = e.kind(own)
	if own && e.Status == http.StatusBadRequest && p.host.base.Scheme == "http" && !e.hasCode() {
		e.Err = fmt.Errorf("%w (%s)", e.Err, hintTLS)
	}
	return e
}

// hintTLS is added to the answers of servers that expect TLS and get a plain request.
const hintTLS = "it was asked without TLS: see Remote.PlainHTTP"

// hasCode reports whether an answer has the form of distribution-spec's errors.
func (e *RemoteError) hasCode() bool {
	return slices.ContainsFunc(e.Codes, func(c RemoteCode) bool { return c.Code != "" })
}

// answerProblem adds the facts of an answer to err, which says what is wrong with its content. The
// result is final: the same request would get the same content.
func answerProblem(c *remoteCall, res *http.Response, err error) error {
	err = coded(codingOf(res), err)
	if !sameOrigin(res.Request.URL, c.repo.host.base) {
		err = unquoted(err)
	}
	e := &RemoteError{Method: c.method, URL: publicURL(res.Request.URL), Status: res.StatusCode, final: true, Err: err}
	return c.repo.conceal(e)
}

// maxCodes is how many errors of one answer are kept.
const maxCodes = 10

// parseErrorBody returns the errors in the body of an answer: in distribution-spec's form, in
// another form of JSON, or else the text of the body.
func parseErrorBody(body []byte, secrets []string) []RemoteCode {
	var doc any
	if json.Unmarshal(body, &doc) != nil {
		// JSON that was cut off at the limit helps no reader.
		if text := bodyText(string(body)); text != "" && (len(body) < maxErrorBody || text[0] != '{') {
			return []RemoteCode{{Message: serverText(text, secrets)}}
		}
		return nil
	}
	var codes []RemoteCode
	for _, e := range errorsIn(doc) {
		c := RemoteCode{serverText(jsonText(e, "code", "status"), secrets), serverText(jsonText(e, "message", "error_description", "details", "detail", "description", "title", "reason", ""), secrets)}
		if c != (RemoteCode{}) && len(codes) < maxCodes {
			codes = append(codes, c)
		}
	}
	return codes
}

// errorsIn returns the values in a JSON document that stand for one error each.
func errorsIn(doc any) []any {
	fields, ok := doc.(map[string]any)
	if !ok {
		return nil
	}
	for name, v := range fields {
		switch list, isList := v.([]any); {
		case strings.EqualFold(name, "errors") && isList:
			return list
		case strings.EqualFold(name, "errors") && v != nil:
			return []any{v}
		}
	}
	if inner, ok := fields["error"].(map[string]any); ok {
		return []any{inner}
	}
	if code, ok := fields["error"].(string); ok { // OAuth 2.0 (RFC 6749, section 5.2)
		fields["code"] = code
	}
	return []any{fields}
}

// jsonText returns the first of the named fields of v that is text or a number. The case of letters
// does not matter. If v is text itself, it is the field "".
func jsonText(v any, names ...string) string {
	fields, ok := v.(map[string]any)
	if !ok {
		fields = map[string]any{"": v}
	}
	for _, name := range names {
		for key, v := range fields {
			if !strings.EqualFold(key, name) {
				continue
			}
			switch v := v.(type) {
			case string:
				if v != "" {
					return v
				}
			case float64:
				return strconv.FormatFloat(v, 'f', -1, 64)
			}
		}
	}
	return ""
}

// bodyText returns the text of a body that is not JSON. Of HTML and XML, it returns the text
// between the tags.
func bodyText(body string) string {
	if text := strings.TrimSpace(body); !strings.HasPrefix(text, "<") {
		return text
	}
	var b strings.Builder
	for body != "" {
		text, tag, _ := strings.Cut(body, "<")
		b.WriteString(text + " ")
		for _, name := range []string{"style", "script"} {
			if len(tag) >= len(name) && strings.EqualFold(tag[:len(name)], name) {
				_, tag, _ = strings.Cut(tag, "</")
			}
		}
		_, body, _ = strings.Cut(tag, ">")
	}
	return strings.Join(strings.Fields(b.String()), " ")
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
	e.final = reason != nil
	switch {
	case errors.Is(err, ErrProtocol), errors.Is(err, errProxyLogin), errors.Is(err, errProxyRefuses):
		e.Err, e.final = err, true
	case errors.Is(err, http.ErrSchemeMismatch):
		e.Err, e.final = fmt.Errorf("%w (it speaks no TLS: see Remote.PlainHTTP)", e.Err), true
	case u.Scheme == "http" && !ofNetwork(err):
		e.Err = fmt.Errorf("%w (%s)", e.Err, hintTLS)
	}
	clean := cleanedError(e.Err, nil)
	if reason != nil {
		clean.causes = append(clean.causes, reason)
	}
	e.Err = clean
	return e
}

// ofNetwork reports whether err is about the connection. Any other error is about bytes that are
// not HTTP, which a server sends that expects TLS.
func ofNetwork(err error) bool {
	_, op := errors.AsType[*net.OpError](err)
	return op || timedOut(err) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errStalled) ||
		errors.Is(err, context.Canceled) || errors.Is(err, net.ErrClosed)
}

// The reasons for which a connection can't be made that last. Their texts quote nobody.
var (
	errNoHost      = errors.New("no such host")
	errAuthority   = errors.New("certificate is signed by an unknown authority")
	errHostName    = errors.New("certificate is for another host")
	errCertificate = errors.New("certificate is not valid")
	errAlert       = errors.New("server ends TLS")
)

// connectReason returns the lasting reason for which a connection could not be made, and nil if err
// has none.
func connectReason(err error) error {
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return errNoHost
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" { // crypto/tls says so of an alert
		return errAlert
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

// protocolError returns an [ErrProtocol] with the facts of an answer.
func protocolError(method string, u *url.URL, status int, format string, args ...any) *RemoteError {
	return &RemoteError{Method: method, URL: publicURL(u), Status: status, final: true,
		Err: fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)}
}
