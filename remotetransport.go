package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
)

// A request goes down through these functions. Each has one task:
//
//	do, doSmall   repeat it, as the retry policy says
//	try           one of the host's slots; secrets are hidden in its errors
//	authorized    answers challenges
//	follow        follows redirects; decides whether the authorization goes along
//	exchange      one HTTP request, under a stall watch
//	strictTransport, then net/http

// A remoteCall is one request to a repository, with everything that is needed to repeat it.
type remoteCall struct {
	method string
	url    *url.URL
	header http.Header
	// body opens the request's body for each attempt. Nil means that there is none.
	body func() (io.ReadCloser, error)
	size int64
	// actions are what the token must allow: "pull", "push", "delete".
	actions []string
	// from, if not empty, is another repository that the token must allow to pull from.
	from string
	// ok are the statuses that answer the request. Others are a [*RemoteError].
	ok []int
	// once is set for a request that must not be repeated as it is.
	once bool
	// token is set for a request to a token server.
	token bool

	repo *remoteRepo // whose secrets no message may hold
}

// A strictTransport refuses answers that [http.Client] mishandles: a switch to another protocol,
// whose reader no context ends, and a malformed Location, which the client would quote in full.
type strictTransport struct{ next http.RoundTripper }

func (s strictTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := s.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	switch {
	case res.StatusCode == http.StatusSwitchingProtocols:
		err = fmt.Errorf("%w: registry switches to another protocol", ErrProtocol)
	case res.StatusCode >= 300 && res.StatusCode <= 399:
		if _, bad := req.URL.Parse(res.Header.Get("Location")); bad != nil { // its text quotes the Location, so drop it
			err = fmt.Errorf("%w: Location is not an address", ErrProtocol)
		}
	}
	if err != nil {
		res.Body.Close()
		return nil, err
	}
	return res, nil
}

func (s strictTransport) CloseIdleConnections() {
	(&http.Client{Transport: s.next}).CloseIdleConnections()
}

// do sends c as often as the retry policy says, and returns an answer with one of the statuses
// c.ok. The caller must close its body, which holds one of the host's slots until then: a caller
// that keeps bodies open and makes more requests can wait for itself.
func (p *remoteRepo) do(ctx context.Context, c *remoteCall) (*http.Response, error) {
	for attempt := 1; ; attempt++ {
		res, err := p.try(ctx, c)
		if err == nil || c.once {
			return res, err
		}
		if err := p.again(ctx, attempt, err); err != nil {
			return nil, err
		}
	}
}

// doSmall is do for an answer of at most limit bytes. It reads and closes the body. A body that
// breaks off is asked for again.
func (p *remoteRepo) doSmall(ctx context.Context, c *remoteCall, limit int64) ([]byte, *http.Response, error) {
	for attempt := 1; ; attempt++ {
		res, err := p.try(ctx, c)
		var b []byte
		if err == nil {
			b, err = readSmallBody(ctx, c.method, c.url, res, limit)
			err = p.conceal(err)
		}
		if err == nil || c.once {
			return b, res, err
		}
		if err := p.again(ctx, attempt, err); err != nil {
			return nil, nil, err
		}
	}
}

// readSmallBody reads and closes a body of at most limit bytes. A longer one is an [ErrTooLarge],
// found out before more than limit bytes are in memory.
func readSmallBody(ctx context.Context, method string, u *url.URL, res *http.Response, limit int64) ([]byte, error) {
	defer res.Body.Close()
	tooLarge := func() error {
		return &RemoteError{Method: method, URL: publicURL(u), Status: res.StatusCode, final: true,
			Err: fmt.Errorf("%w: answer has more than %d bytes", ErrTooLarge, limit)}
	}
	if res.ContentLength > limit {
		return nil, tooLarge()
	}
	b, err := readBounded(res.Body, limit)
	switch {
	case errors.Is(err, ErrTooLarge):
		return nil, tooLarge()
	case err != nil:
		return nil, bodyError(ctx, method, u, err)
	}
	return b, nil
}

// bodyError is transportError for a body that broke off. If the caller has ended the call, it
// returns the error of ctx.
func bodyError(ctx context.Context, method string, u *url.URL, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return transportError(method, u, err)
}

// try sends c once, and answers challenges. It takes one of the host's slots. The body of the
// answer holds the slot until it is closed; without an answer try frees it.
func (p *remoteRepo) try(ctx context.Context, c *remoteCall) (*http.Response, error) {
	select { // a free slot, or the end of the call
	case p.host.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	release, answered := sync.OnceFunc(func() { <-p.host.slots }), false
	defer func() {
		if !answered { // even if a function of the caller panics
			release()
		}
	}()
	c.repo = p
	res, err := p.authorized(ctx, c)
	if err == nil {
		err = p.judge(c, res)
	}
	if err != nil {
		return nil, p.blame(p.conceal(err))
	}
	answered = true
	res.Body = &slotBody{ReadCloser: res.Body, release: release}
	return res, nil
}

// judge decides whether res answers c. If it does not, judge closes its body and returns the error.
func (p *remoteRepo) judge(c *remoteCall, res *http.Response) error {
	if sameOrigin(res.Request.URL, p.host.base) {
		p.remote.warn(p.host.name, res.Header, p.secrets())
	}
	if !slices.Contains(c.ok, res.StatusCode) {
		return p.answerError(c, res)
	}
	if c.method == http.MethodHead && codingOf(res) != "" {
		res.ContentLength = -1 // it may be the length of the coded form
	}
	return nil
}

// codingOf returns the Content-Encoding of an answer, and "" for one that does not change bytes.
//
// A request asks for no coding. Registries name one nevertheless. Object stores repeat what a
// client said when it stored the bytes: "aws-chunked", or "gzip" for a layer that is a gzip file.
// The digest decides about the bytes, so a coding alone is not an error. If the bytes are wrong,
// the error names the coding.
func codingOf(res *http.Response) string {
	var codings []string
	for coding := range strings.SplitSeq(strings.Join(res.Header.Values("Content-Encoding"), ","), ",") {
		switch coding = strings.ToLower(strings.TrimSpace(coding)); coding {
		case "", "identity", "aws-chunked", "binary", "none", "utf-8":
		default:
			codings = append(codings, coding)
		}
	}
	return strings.Join(codings, ", ")
}

// coded explains an error about bytes that had a coding.
func coded(coding string, err error) error {
	if coding == "" {
		return err
	}
	return fmt.Errorf("%w: unexpected Content-Encoding %s: %w", ErrProtocol, printable(coding), err)
}

// A slotBody is the body of an answer. It frees the host's slot when it is closed.
type slotBody struct {
	io.ReadCloser
	release func()
}

func (b *slotBody) Close() error {
	defer b.release()
	return b.ReadCloser.Close()
}

// follow sends c with an authorization, and follows redirects. crossed says that the answer, or a
// step before it, is not of the registry's own origin.
//
// This is where a redirect decides about a credential. The authorization goes only to the
// registry's origin: scheme, host and port. Once a redirect has left it, the authorization is not
// sent again, even if a later redirect leads back: the host in between has chosen that address,
// and could have chosen one that discloses the credential. Requests that write are only
// redirected within the origin, by the statuses that keep the method (307 and 308).
func (p *remoteRepo) follow(ctx context.Context, c *remoteCall, authorization string) (res *http.Response, crossed bool, err error) {
	u := c.url
	for hops := 0; ; hops++ {
		crossed = crossed || !sameOrigin(u, p.host.base)
		header := p.remote.header(c.header)
		if authorization != "" && !crossed {
			header.Set("Authorization", authorization)
		}
		if err := p.checkTarget(ctx, c, u); err != nil {
			return nil, crossed, err
		}
		if res, err = p.exchange(ctx, c, u, header); err != nil {
			return nil, crossed, err
		}
		switch res.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return res, crossed, nil
		}
		res.Body.Close()
		next, err := redirected(u, "Location", res.Header.Get("Location"))
		switch {
		case err != nil:
			c.repo = p
			return nil, crossed, answerProblem(c, res, err)
		case hops >= maxRedirects:
			return nil, crossed, protocolError(c.method, u, res.StatusCode, "more than %d redirects", maxRedirects)
		case c.method != http.MethodGet && c.method != http.MethodHead && (res.StatusCode < 307 || !sameOrigin(u, next)):
			return nil, crossed, protocolError(c.method, u, res.StatusCode, "%s is redirected elsewhere", c.method)
		}
		u = next
	}
}

// checkTarget refuses to send c to an address that the registry has named, if the guard forbids
// that address. No other host is ever asked to delete.
func (p *remoteRepo) checkTarget(ctx context.Context, c *remoteCall, u *url.URL) error {
	if sameOrigin(u, p.host.base) {
		return nil
	}
	if c.method == http.MethodDelete {
		return protocolError(c.method, u, 0, "%s redirects a deletion to another host", p.host.name)
	}
	if err := p.checkHost(ctx, u); err != nil {
		return protocolError(c.method, u, 0, "%s leads elsewhere: %w", p.host.name, err)
	}
	return nil
}

// exchange sends c once to u, and returns the answer. A watch ends the request if it stalls, before
// or while the body is read. A request that leaves the registry's origin uses another client, whose
// connections are guarded (see remoteguard.go), and its errors do not quote the server.
//
// The error is a [*RemoteError], the error of ctx, or the failure of c's own body.
func (p *remoteRepo) exchange(ctx context.Context, c *remoteCall, u *url.URL, header http.Header) (*http.Response, error) {
	w := newWatch(ctx, p.remote.StallTimeout)
	client, traced := p.remote.httpClient(), w.ctx
	away := !sameOrigin(u, p.host.base)
	if away {
		client, traced = p.awayClient(traced, u)
	} else if !proxied(client, u) {
		traced = httptrace.WithClientTrace(traced, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
			p.host.reached(i.Conn.RemoteAddr().String())
		}})
	}
	req := (&http.Request{
		Method: c.method, URL: u, Host: u.Host, Header: header,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, ContentLength: c.size,
	}).WithContext(traced)
	var sent *sentBody
	if c.body != nil {
		src, err := c.body()
		if err != nil {
			w.end(nil)
			return nil, err
		}
		sent = &sentBody{src: src, watch: w}
		req.Body = sent
		if c.size == 0 {
			req.Body = http.NoBody
			src.Close()
		}
	}
	w.start(patience(c))
	res, err := client.Do(req)
	w.pause()
	if err != nil {
		w.end(nil)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if sent != nil && sent.failed() != nil { // the blob could not be read: the registry is not to blame
			return nil, sent.failed()
		}
		if stalled := w.stalled(); stalled != nil {
			p.renew(client)
			err = stalled
		}
		e := transportError(c.method, u, err)
		if away {
			e.Err = unquoted(e.Err)
		}
		return nil, e
	}
	res.Request = req // its URL is the address that was asked: answers are judged by its origin
	res.Body = &watchedBody{src: res.Body, watch: w, caller: ctx, quiet: away, renew: func() { p.renew(client) }}
	return res, nil
}

// A countedBody is the body of a request or an answer. It counts the bytes that are read, and keeps
// the error of src. By that a caller tells a network that failed from a disk that did.
type countedBody struct {
	src    io.ReadCloser
	count  func(int)
	n      int64
	err    error  // of src, except io.EOF
	coding string // the Content-Encoding of an answer
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.src.Read(p)
	b.n += int64(n)
	b.count(n)
	if err != nil && err != io.EOF {
		b.err = err
	}
	return n, err
}

func (b *countedBody) Close() error { return b.src.Close() }
