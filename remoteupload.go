package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A blob goes up in one request if it can, and otherwise in chunks (distribution-spec, "Pushing
// Blobs"):
//
//	POST  …/blobs/uploads/           opens a session; each answer says where the session goes on
//	PATCH <session>                  sends a chunk                          ┐ for each chunk
//	GET   <session>                  asks how far it is, after a failure    ┘
//	PUT   <session>?digest=<digest>  sends the rest, or all, and ends it
//
// The digest that ends an upload proves every byte before it. So what happens on the way may be
// taken leniently: a wrong guess costs requests, never bytes.
//
//   - Any 2xx is success. The Range in the answer to a chunk is a hint. It is followed if it says
//     that a part of the chunk arrived. If it contradicts what was sent, as it does with several
//     registries, the session is asked once how far it is; after that the chunk counts as arrived.
//   - A chunk whose answer was lost, or was 416, has arrived as far as the session says when asked.
//     The upload goes on there, be that forward or back.
//   - A body that is refused as too large goes in smaller ones: a whole blob in chunks, a chunk in
//     quarters. Proxies cut off a body that is too large for them, or answer 502. After the second
//     such failure a body counts as too large. 416 means too large where the session is as far as
//     it should be.
//   - A session may get lost. Then the blob starts over with a new one, as often as the retry
//     policy says.
//
// It ends, because chunks must advance by half their size on average, and pieces do not get smaller
// than leastChunk.

// defaultChunk is the size of chunks if the registry wants chunks and does not say how large.
const defaultChunk = 16 << 20

// leastChunk is the smallest size of pieces. A body of that size that a registry finds too large is
// not tried in smaller ones.
const leastChunk = 64 << 10

// An uploadSession is the address of the next request of an upload. The server has named it, and it
// is used unchanged.
type uploadSession struct {
	url *url.URL
	// least is the size that every chunk except the last must have. It is 0 if the registry does
	// not ask for chunks.
	least int64
}

// nextSession reads where an upload goes on. A registry behind a proxy may state an address without
// the TLS or the port of the proxy. No request goes there. If the path is one of an upload to the
// same repository, the upload goes on at the registry's own origin.
func nextSession(c *remoteCall, res *http.Response) (*uploadSession, error) {
	text := res.Header.Get("Location")
	base := c.repo.host.base
	u, err := base.Parse(text)
	if err == nil && u.User == nil && strings.HasPrefix(u.Path, c.repo.uploads().Path) {
		noTLS := base.Scheme == "https" && u.Scheme == "http"
		noPort := u.Scheme == base.Scheme && u.Hostname() == base.Hostname() && u.Port() == ""
		if noTLS || noPort {
			u.Scheme, u.Host = base.Scheme, base.Host
			text = u.String()
		}
	}
	u, err = redirected(res.Request.URL, "Location", text)
	if err != nil {
		return nil, answerProblem(c, res, err)
	}
	s := &uploadSession{url: u}
	if n, err := parseDecimal(res.Header.Get("OCI-Chunk-Min-Length")); err == nil {
		s.least = n
	}
	return s, nil
}

// goOn moves s to the address in the answer to a request. Without a Location, s keeps its address.
func (s *uploadSession) goOn(c *remoteCall, res *http.Response) error {
	if res.Header.Get("Location") == "" {
		return nil
	}
	next, err := nextSession(c, res)
	if err == nil {
		next.least = cmp.Or(next.least, s.least)
		*s = *next
	}
	return err
}

// presence is what is known about a blob in a registry.
type presence int

const (
	unknown  presence = iota // it may be absent
	doubtful                 // the registry says that it has the blob, with another length
	present                  // the registry says that it has the blob, with the right length
)

// hasBlob asks whether the repository has a blob. Only an answer with the right length says so.
// After any other answer the blob must be uploaded. For example, a store behind a registry may
// refuse HEAD for blobs that it has, or may have a blob that broke off. A login page is an answer
// of 200, too.
func (p *remoteRepo) hasBlob(ctx context.Context, desc ocispec.Descriptor) (presence, error) {
	c := &remoteCall{method: http.MethodHead, url: p.url("blobs", string(desc.Digest)), actions: []string{"pull", "push"}, ok: any2xx}
	res, err := p.do(ctx, c)
	if errors.Is(err, ErrDenied) || errors.Is(err, ErrUnauthorized) { // the credential may allow reading only
		c.actions = []string{"pull"}
		res, err = p.do(ctx, c)
	}
	if err != nil {
		if e, ok := errors.AsType[*RemoteError](err); !ok || e.Status == 0 || e.TokenServer || e.Status == http.StatusTooManyRequests {
			return unknown, err
		}
		return unknown, nil
	}
	res.Body.Close()
	given, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	switch {
	case res.ContentLength < 0 || given == "text/html":
		return unknown, nil
	case res.ContentLength != desc.Size:
		return doubtful, nil
	}
	return present, nil
}

// checkSize checks a blob that was uploaded although the registry seemed to have it with another
// length. A cache may answer HEAD, or the answer may have no length. Then the answer to GET counts.
func (p *remoteRepo) checkSize(ctx context.Context, desc ocispec.Descriptor) error {
	has, err := p.hasBlob(ctx, desc)
	if err != nil || has == present {
		return err
	}
	c := &remoteCall{method: http.MethodGet, url: p.url("blobs", string(desc.Digest)), actions: []string{"pull"}, ok: []int{http.StatusOK}}
	res, err := p.do(ctx, c)
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.ContentLength >= 0 && res.ContentLength != desc.Size {
		return answerProblem(c, res, fmt.Errorf("%w: registry has accepted blob %s, and has %d bytes of it, want %d", ErrSizeMismatch, desc.Digest, res.ContentLength, desc.Size))
	}
	return nil
}

// mount asks the registry to take a blob from another of its repositories. After any answer except
// success the blob must be uploaded, in the session s if the answer has opened one.
func (p *remoteRepo) mount(ctx context.Context, desc ocispec.Descriptor, from string) (done bool, s *uploadSession, err error) {
	u := p.uploads()
	u.RawQuery = url.Values{"mount": {string(desc.Digest)}, "from": {from}}.Encode()
	c := &remoteCall{method: http.MethodPost, url: u, actions: []string{"pull", "push"}, from: from, ok: any2xx}
	res, err := p.do(ctx, c)
	if err != nil {
		return false, nil, ctx.Err()
	}
	res.Body.Close()
	d, err := headerDigest(res.Header)
	if err == nil && d != "" && d != desc.Digest {
		err = fmt.Errorf("%w: the registry says it mounted %s, not %s", ErrDigestMismatch, d, desc.Digest)
	}
	if err != nil {
		return false, nil, answerProblem(c, res, err)
	}
	at := res.Header.Get("Location")
	switch {
	case res.StatusCode == http.StatusCreated && (d == desc.Digest || strings.HasSuffix(at, "/blobs/"+string(desc.Digest))):
		return true, nil, nil
	case at == "" && res.StatusCode != http.StatusAccepted:
		has, err := p.hasBlob(ctx, desc)
		return has == present, nil, err
	}
	s, err = nextSession(c, res)
	return false, s, err
}

// uploads returns the address where uploads begin. The path of the specification ends with a '/'.
func (p *remoteRepo) uploads() *url.URL {
	u := p.url("blobs", "uploads")
	u.Path += "/"
	return u
}

// An upload sends one blob.
type upload struct {
	repo  *remoteRepo
	desc  ocispec.Descriptor
	store *blobStore
	open  func(ctx context.Context) (io.ReadCloser, error) // if there is no store: the blob's verified bytes
	chunk int64                                            // wanted size of chunks; 0 for one request
	item  *meteredItem
	sent  func(n int) // is called with each number of bytes that are read; may be nil

	oddRange bool // asking a session after an odd Range didn't help
}

// run uploads the blob. s is a session that is open already, or nil. Each further attempt opens a
// session.
func (u *upload) run(ctx context.Context, s *uploadSession) error {
	for attempt := 1; ; attempt++ {
		err := u.try(ctx, s)
		if err == nil {
			return nil
		}
		s = nil
		if e, ok := errors.AsType[*RemoteError](err); ok && e.Status < 500 && e.has("BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID") {
			e.again, e.givenUp = true, false // the session is gone, not the registry
		}
		failures := attempt
		if u.store == nil { // it can't go in chunks, so a guess doesn't help
			failures = 1
		}
		if u.chunk == 0 && u.desc.Size > leastChunk && tooLarge(err, failures) {
			u.chunk, attempt = min(defaultChunk, (u.desc.Size+1)/2), 0
			continue
		}
		if err := u.repo.remote.again(ctx, attempt, err); err != nil {
			return err
		}
		// All may have arrived, and only the answer was lost.
		if has, err := u.repo.hasBlob(ctx, u.desc); has == present || err != nil {
			return err
		}
	}
}

// tooLarge reports whether a request failed because its body was too large. A failure that may have
// that reason counts from the second attempt on.
func tooLarge(err error, attempt int) bool {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || e.Method != http.MethodPut && e.Method != http.MethodPatch {
		return false
	}
	switch e.Status {
	case http.StatusRequestEntityTooLarge, http.StatusRequestedRangeNotSatisfiable:
		return true
	case http.StatusBadRequest:
		return e.has("SIZE_INVALID")
	case 0, http.StatusInternalServerError, http.StatusBadGateway, http.StatusGatewayTimeout:
		return attempt > 1 && !e.final
	}
	return false
}

// try makes one attempt to upload the blob.
func (u *upload) try(ctx context.Context, s *uploadSession) (err error) {
	if s == nil {
		if s, err = u.begin(ctx); err != nil {
			return err
		}
	}
	chunk := u.chunk
	if s.least > 0 {
		chunk = max(s.least, cmp.Or(chunk, defaultChunk))
	}
	if chunk > 0 && chunk < u.desc.Size {
		err = u.chunks(ctx, s, chunk)
	} else {
		u.chunk = 0 // run may then find the body too large, and choose chunks
		err = u.close(ctx, s, func() (io.ReadCloser, error) { return u.whole(ctx) }, u.desc.Size)
	}
	if err != nil {
		u.abandon(ctx, s)
	}
	return err
}

// begin opens a session.
func (u *upload) begin(ctx context.Context) (*uploadSession, error) {
	c := &remoteCall{method: http.MethodPost, url: u.repo.uploads(), actions: []string{"pull", "push"}, ok: any2xx}
	res, err := u.repo.do(ctx, c)
	if err != nil {
		return nil, err
	}
	res.Body.Close()
	return nextSession(c, res)
}

// whole opens the blob. It is verified while it is sent: the last byte of a damaged blob is not
// sent.
func (u *upload) whole(ctx context.Context) (io.ReadCloser, error) {
	if u.store == nil {
		src, err := u.open(ctx)
		if err != nil {
			return nil, err
		}
		return u.counted(src, 0), nil
	}
	v, err := u.store.open(ctx, u.desc.Digest, u.desc.Size)
	if err != nil {
		return nil, incomplete(err)
	}
	return u.counted(v, 0), nil
}

// counted counts the bytes of an attempt to send the blob, or a chunk of it, that begins at byte
// at.
func (u *upload) counted(src io.ReadCloser, at int64) *countedBody {
	report := u.item.from(at)
	return &countedBody{src: src, count: func(n int) {
		if u.sent != nil {
			u.sent(n)
		}
		report(n)
	}}
}

// close sends the rest of the blob, states its digest, and returns when the registry has the blob.
// A success that the registry does not state plainly is checked: the blob must be there with its
// length.
func (u *upload) close(ctx context.Context, s *uploadSession, body func() (io.ReadCloser, error), size int64) error {
	to := *s.url
	// The address may have a query, which is kept as it is.
	to.RawQuery = strings.TrimPrefix(to.RawQuery+"&digest="+url.QueryEscape(string(u.desc.Digest)), "&")
	c := &remoteCall{
		method: http.MethodPut, url: &to, header: http.Header{"Content-Type": {"application/octet-stream"}},
		body: body, size: size, actions: []string{"pull", "push"}, ok: any2xx, once: true,
	}
	res, err := u.repo.do(ctx, c)
	if err != nil {
		return err
	}
	res.Body.Close()
	d, err := headerDigest(res.Header)
	if err == nil && d != "" && d.Algorithm() == u.desc.Digest.Algorithm() && d != u.desc.Digest {
		err = fmt.Errorf("%w: the registry says it took %s, not %s", ErrDigestMismatch, d, u.desc.Digest)
	}
	if err == nil && !created(res, u.desc.Digest) {
		var has presence
		switch has, err = u.repo.hasBlob(ctx, u.desc); {
		case err == nil && has == doubtful:
			return u.repo.checkSize(ctx, u.desc)
		case err == nil && has == unknown:
			err = fmt.Errorf("%w: the registry answered success, and doesn't have blob %s", ErrProtocol, u.desc.Digest)
		}
	}
	if err != nil {
		return answerProblem(c, res, err)
	}
	return nil
}

// errSmaller is returned for a chunk that must be sent in smaller ones.
var errSmaller = errors.New("chunk is too large")

// chunks sends the blob in pieces. The blob is verified first, because a piece alone cannot be.
func (u *upload) chunks(ctx context.Context, s *uploadSession, size int64) error {
	if u.store == nil {
		return fmt.Errorf("%w: registry takes blob %s only in chunks, and a copy can't send chunks (pull and push instead)", ErrTooLarge, u.desc.Digest)
	}
	if err := u.store.verify(ctx, u.desc.Digest, u.desc.Size); err != nil {
		return incomplete(err)
	}
	f, _, err := u.store.openFile(u.desc.Digest, u.desc.Size)
	if err != nil {
		return incomplete(err)
	}
	defer f.Close()
	at := int64(0)
	// A registry that accepts one byte of each chunk, or moves an upload back and forth, must not
	// keep this loop going for ever.
	enough := func() int64 { return 2*((u.desc.Size-at)/size+1) + 2*maxRetries }
	for left := enough(); at < u.desc.Size; left-- {
		if left == 0 {
			return protocolError(http.MethodPatch, s.url, http.StatusAccepted, "upload is only at byte %d after twice the requests that it needs", at)
		}
		end, err := u.sendChunk(ctx, s, f, at, min(size, u.desc.Size-at))
		switch {
		case err == errSmaller:
			size = max(min(size, u.desc.Size-at)/4, leastChunk, s.least)
			u.chunk, left = size, enough() // for another attempt too
		case err != nil:
			return err
		default:
			at = end
		}
	}
	return u.close(ctx, s, nil, 0)
}

// sendChunk sends n bytes from byte at on. It returns the byte at which the upload goes on.
func (u *upload) sendChunk(ctx context.Context, s *uploadSession, f io.ReaderAt, at, n int64) (end int64, err error) {
	c := &remoteCall{
		method: http.MethodPatch, url: s.url,
		header: http.Header{
			"Content-Type":  {"application/octet-stream"},
			"Content-Range": {fmt.Sprintf("%d-%d", at, at+n-1)}, // without "bytes", unlike HTTP's
		},
		body: func() (io.ReadCloser, error) {
			return u.counted(io.NopCloser(&ctxReader{ctx, io.NewSectionReader(f, at, n)}), at), nil
		},
		size: n, actions: []string{"pull", "push"}, once: true, ok: any2xx,
	}
	smaller := n > max(leastChunk, s.least)
	for attempt := 1; ; attempt++ {
		res, err := u.repo.do(ctx, c)
		if err == nil {
			res.Body.Close()
			return u.arrived(ctx, c, s, res, at, n)
		}
		e, ok := errors.AsType[*RemoteError](err)
		outOfRange := ok && e.Status == http.StatusRequestedRangeNotSatisfiable
		if !outOfRange {
			if tooLarge(err, 1) && smaller {
				return at, errSmaller
			}
			if err := u.repo.remote.again(ctx, attempt, err); err != nil {
				return 0, err
			}
		}
		// It is not known how much arrived, so the session is asked.
		is, known, lost := u.where(ctx, s)
		c.url = s.url // it may have moved
		switch {
		case lost == nil && known && is != at && is <= u.desc.Size:
			return is, nil
		case outOfRange && lost != nil:
			return 0, lost
		case outOfRange && !smaller:
			return 0, err
		case outOfRange, smaller && tooLarge(err, attempt):
			return at, errSmaller
		case lost != nil && temporary(lost):
			return 0, lost // the policy has refused further attempts to ask
		}
	}
}

// temporary reports whether err is a [RemoteError.Temporary] one.
func temporary(err error) bool {
	e, ok := errors.AsType[*RemoteError](err)
	return ok && e.Temporary()
}

// arrived reads the answer to a chunk of n bytes from byte at on. It returns the byte at which the
// upload goes on.
func (u *upload) arrived(ctx context.Context, c *remoteCall, s *uploadSession, res *http.Response, at, n int64) (end int64, err error) {
	if err := s.goOn(c, res); err != nil {
		return 0, err
	}
	text := res.Header.Get("Range")
	end, ok := rangeEnd(text, at, n)
	if text == "" || u.oddRange {
		return at + n, nil
	}
	if ok {
		return end, nil
	}
	end, known, err := u.where(ctx, s)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err != nil || !known || end <= at || end > at+n {
		u.oddRange = true
		return at + n, nil
	}
	return end, nil
}

// where asks the session how far the upload is. known is false if the answer does not say.
func (u *upload) where(ctx context.Context, s *uploadSession) (end int64, known bool, err error) {
	c := &remoteCall{method: http.MethodGet, url: s.url, actions: []string{"pull", "push"}, ok: any2xx}
	res, err := u.repo.do(ctx, c)
	if err != nil {
		return 0, false, err
	}
	res.Body.Close()
	if err := s.goOn(c, res); err != nil {
		return 0, false, err
	}
	first, last, ok := parseRange(res.Header.Get("Range"))
	if !ok || first != 0 {
		return 0, false, nil
	}
	if last == 0 { // registries say "0-0" before the first byte, too
		return 0, true, nil
	}
	return last + 1, true, nil
}

// rangeEnd returns the byte after those that the Range in the answer to a chunk states. It reports
// false unless these are the chunk's n bytes from byte at on, or a part of them.
func rangeEnd(text string, at, n int64) (end int64, ok bool) {
	first, last, ok := parseRange(text)
	end = last + 1
	if !ok || first != 0 && first != at || end <= at || end > at+n {
		return 0, false
	}
	return end, last > 0 || n == 1
}

// parseRange reads "first-last", with or without the unit and the size that some registries add.
func parseRange(text string) (first, last int64, ok bool) {
	text, _, _ = strings.Cut(strings.TrimLeft(strings.TrimPrefix(text, "bytes"), "= "), "/")
	a, b, ok := strings.Cut(text, "-")
	first, err1 := parseDecimal(a)
	last, err2 := parseDecimal(b)
	return first, last, ok && err1 == nil && err2 == nil && first <= last && last < math.MaxInt64
}

// abandon cancels an upload at the registry, which can then free its space. A failure does not
// matter, because registries remove old uploads by themselves. A caller that has ended the call
// waits at most a second.
func (u *upload) abandon(ctx context.Context, s *uploadSession) {
	own, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, cancel) })()
	res, err := u.repo.do(own, &remoteCall{
		method: http.MethodDelete, url: s.url, actions: []string{"pull", "push"}, once: true,
		ok: append([]int{http.StatusNotFound, http.StatusMethodNotAllowed}, any2xx...),
	})
	if err == nil {
		res.Body.Close()
	}
}

// bytesBody returns the body of a request whose bytes are in memory. It can be opened for each
// attempt.
func bytesBody(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}
