package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// defaultChunk is the size of chunks when the registry wants some and doesn't say how large.
const defaultChunk = 16 << 20

// leastChunk is the size from which on a body that a registry finds too large is tried in smaller pieces.
const leastChunk = 64 << 10

// An uploadSession is where the next request of an upload goes
// (distribution-spec, "Pushing Blobs"). The address is the server's: it is used as it is.
type uploadSession struct {
	url *url.URL
	// least is the size that chunks other than the last must have; 0 if the registry doesn't want chunks.
	least int64
}

// nextSession reads where an upload goes on.
func nextSession(c *remoteCall, res *http.Response) (*uploadSession, error) {
	u, err := redirected(res.Request.URL, "Location", res.Header.Get("Location"))
	if err != nil {
		return nil, answerProblem(c, res, err)
	}
	s := &uploadSession{url: u}
	if n, err := parseDecimal(res.Header.Get("OCI-Chunk-Min-Length")); err == nil {
		s.least = n
	}
	return s, nil
}

// hasBlob reports whether the repository has a blob.
func (p *remoteRepo) hasBlob(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	res, err := p.do(ctx, &remoteCall{
		method: http.MethodHead, url: p.url("blobs", string(desc.Digest)), actions: []string{"pull", "push"},
		ok: []int{http.StatusOK, http.StatusNotFound, http.StatusMethodNotAllowed},
	})
	if err != nil {
		return false, err
	}
	res.Body.Close()
	return res.StatusCode == http.StatusOK, nil
}

// mount asks the registry to take a blob from another repository. Any answer but
// success means that it has to be uploaded, maybe in the session that the answer opens.
func (p *remoteRepo) mount(ctx context.Context, desc ocispec.Descriptor, from string) (done bool, s *uploadSession, err error) {
	u := p.uploads()
	u.RawQuery = url.Values{"mount": {string(desc.Digest)}, "from": {from}}.Encode()
	c := &remoteCall{method: http.MethodPost, url: u, actions: []string{"pull", "push"}, from: from,
		ok: []int{http.StatusCreated, http.StatusAccepted}}
	res, err := p.do(ctx, c)
	if err != nil {
		if ctx.Err() != nil {
			return false, nil, ctx.Err()
		}
		return false, nil, nil
	}
	res.Body.Close()
	if res.StatusCode == http.StatusAccepted {
		s, err = nextSession(c, res)
		return false, s, err
	}
	d, err := headerDigest(res.Header)
	if err == nil && d != "" && d != desc.Digest {
		err = fmt.Errorf("%w: the registry says it mounted %s, not %s", ErrDigestMismatch, d, desc.Digest)
	}
	if err != nil {
		return false, nil, answerProblem(c, res, err)
	}
	return true, nil, nil
}

// uploads is where uploads begin. The specification's path ends with a '/'.
func (p *remoteRepo) uploads() *url.URL {
	u := p.url("blobs", "uploads")
	u.Path += "/"
	return u
}

// An upload is the sending of one blob.
type upload struct {
	repo  *remoteRepo
	desc  ocispec.Descriptor
	store *blobStore
	chunk int64 // wanted size of chunks; 0 for one request
	count meter

	most  int64 // size of the largest body of the last attempt
	least int64 // that the registry wants its chunks to have
}

// run uploads the blob, in a session that may be open already. Each attempt has a session of its own.
func (u *upload) run(ctx context.Context, s *uploadSession) error {
	for attempt := 1; ; attempt++ {
		err := u.try(ctx, s)
		if err == nil {
			return nil
		}
		s = nil
		if e, ok := errors.AsType[*RemoteError](err); ok {
			if e.Status == http.StatusRequestEntityTooLarge && u.shrink(e.Method) {
				attempt = 0
				continue
			}
			if e.Status < 500 && e.has("BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID") {
				e.again, e.givenUp = true, false // the session is gone, not the registry
			}
		}
		if err := u.repo.remote.again(ctx, attempt, err); err != nil {
			return err
		}
		// All may have arrived, and only the answer was lost.
		if has, err := u.repo.hasBlob(ctx, u.desc); has || err != nil {
			return err
		}
	}
}

// shrink makes the next attempt's bodies smaller. It reports false if that can't help.
func (u *upload) shrink(refused string) bool {
	n := u.most / 4
	if u.most == u.desc.Size {
		n = min(defaultChunk, (u.most+1)/2)
	} else if refused != http.MethodPatch { // it was the end of the upload, which has no body
		return false
	}
	if u.most <= leastChunk || n < u.least {
		return false
	}
	u.chunk = n
	return true
}

func (u *upload) try(ctx context.Context, s *uploadSession) (err error) {
	if s == nil {
		if s, err = u.open(ctx); err != nil {
			return err
		}
	}
	chunk := u.chunk
	if s.least > 0 {
		chunk = max(s.least, cmp.Or(chunk, defaultChunk))
	}
	u.most, u.least = u.desc.Size, s.least
	if chunk > 0 && chunk < u.desc.Size {
		u.most = chunk
		err = u.chunks(ctx, s, chunk)
	} else {
		err = u.close(ctx, s, func() (io.ReadCloser, error) { return u.whole(ctx) }, u.desc.Size)
	}
	if err != nil {
		u.abandon(ctx, s)
	}
	return err
}

// open begins a session.
func (u *upload) open(ctx context.Context) (*uploadSession, error) {
	c := &remoteCall{method: http.MethodPost, url: u.repo.uploads(), actions: []string{"pull", "push"}, ok: []int{http.StatusAccepted}}
	res, err := u.repo.do(ctx, c)
	if err != nil {
		return nil, err
	}
	res.Body.Close()
	return nextSession(c, res)
}

// whole opens the blob. It is verified while it is sent: of bad bytes, the last isn't.
func (u *upload) whole(ctx context.Context) (io.ReadCloser, error) {
	v, err := u.store.open(ctx, u.desc.Digest, u.desc.Size)
	if err != nil {
		return nil, incomplete(err)
	}
	return &sentCounter{v, u.count(0)}, nil
}

// close sends what is left, and says what all of it is.
func (u *upload) close(ctx context.Context, s *uploadSession, body func() (io.ReadCloser, error), size int64) error {
	to := *s.url
	// The address may have a query, which is kept as it is.
	to.RawQuery = strings.TrimPrefix(to.RawQuery+"&digest="+url.QueryEscape(string(u.desc.Digest)), "&")
	c := &remoteCall{
		method: http.MethodPut, url: &to, header: http.Header{"Content-Type": {"application/octet-stream"}},
		body: body, size: size, actions: []string{"pull", "push"}, ok: []int{http.StatusCreated}, once: true,
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
	if err != nil {
		return answerProblem(c, res, err)
	}
	return nil
}

// chunks sends the blob piece by piece, each where the answer to the one before says.
func (u *upload) chunks(ctx context.Context, s *uploadSession, size int64) error {
	// A piece can't be verified by itself.
	if err := u.store.verify(ctx, u.desc.Digest, u.desc.Size); err != nil {
		return incomplete(err)
	}
	f, _, err := u.store.openFile(u.desc.Digest, u.desc.Size)
	if err != nil {
		return incomplete(err)
	}
	defer f.Close()
	// Less may arrive than was sent, and pieces may be lost. But who takes a byte of each piece, or goes
	// to and fro, must not be followed for ever: pieces must advance by half their size on average.
	left := 2*(u.desc.Size/size+1) + 2*maxRetries
	for at := int64(0); at < u.desc.Size; left-- {
		if left == 0 {
			return protocolError(http.MethodPatch, s.url, http.StatusAccepted, "upload doesn't advance: it is at byte %d after twice the requests that it takes", at)
		}
		n := min(size, u.desc.Size-at)
		next, end, err := u.sendChunk(ctx, s, f, at, n)
		if err != nil {
			return err
		}
		if end > at+n {
			return protocolError(http.MethodPatch, s.url, http.StatusAccepted, "upload is at byte %d, after %d were sent", end, at+n)
		}
		*s, at = *next, end
	}
	return u.close(ctx, s, nil, 0)
}

// sendChunk sends n bytes from at on. It returns where the upload goes on, and with which byte.
func (u *upload) sendChunk(ctx context.Context, s *uploadSession, f io.ReaderAt, at, n int64) (*uploadSession, int64, error) {
	c := &remoteCall{
		method: http.MethodPatch, url: s.url,
		header: http.Header{
			"Content-Type":  {"application/octet-stream"},
			"Content-Range": {fmt.Sprintf("%d-%d", at, at+n-1)}, // without "bytes", unlike HTTP's
		},
		body: func() (io.ReadCloser, error) {
			return &sentCounter{io.NopCloser(&ctxReader{ctx, io.NewSectionReader(f, at, n)}), u.count(at)}, nil
		},
		size: n, actions: []string{"pull", "push"}, once: true,
		ok: []int{http.StatusAccepted, http.StatusRequestedRangeNotSatisfiable},
	}
	for attempt := 1; ; attempt++ {
		res, err := u.repo.do(ctx, c)
		if err == nil && res.StatusCode == http.StatusAccepted {
			res.Body.Close()
			return chunkAnswer(c, res, at+n)
		}
		if err == nil {
			res.Body.Close()
			return u.where(ctx, s)
		}
		if err := u.repo.remote.again(ctx, attempt, err); err != nil {
			return nil, 0, err
		}
		// It isn't known how much arrived.
		next, end, err := u.where(ctx, s)
		if err == nil && end != at {
			return next, end, nil
		}
		if e, ok := errors.AsType[*RemoteError](err); ok && e.Temporary() {
			return nil, 0, err // after as many attempts as there may be
		}
		if err == nil { // maybe elsewhere
			*s = *next
			c.url = s.url
		}
	}
}

// where asks how far an upload is.
func (u *upload) where(ctx context.Context, s *uploadSession) (*uploadSession, int64, error) {
	c := &remoteCall{method: http.MethodGet, url: s.url, actions: []string{"pull", "push"}, ok: []int{http.StatusNoContent, http.StatusOK}}
	res, err := u.repo.do(ctx, c)
	if err != nil {
		return nil, 0, err
	}
	res.Body.Close()
	if res.Header.Get("Location") == "" {
		res.Header.Set("Location", s.url.String())
	}
	return chunkAnswer(c, res, 0)
}

// chunkAnswer reads the Location and Range of an answer. Without a Range, the upload is at sure.
func chunkAnswer(c *remoteCall, res *http.Response, sure int64) (*uploadSession, int64, error) {
	s, err := nextSession(c, res)
	if err != nil {
		return nil, 0, err
	}
	text := res.Header.Get("Range")
	if text == "" {
		return s, sure, nil
	}
	first, last, ok := strings.Cut(strings.TrimPrefix(text, "bytes="), "-")
	end, err := parseDecimal(last)
	if !ok || first != "0" || err != nil || end == math.MaxInt64 {
		return nil, 0, answerProblem(c, res, fmt.Errorf("%w: Range %q of an upload", ErrProtocol, clip(text)))
	}
	if end == 0 && sure != 1 { // registries say "0-0" before the first byte, too
		return s, 0, nil
	}
	return s, end + 1, nil
}

// abandon tells the registry that an upload won't go on. That it can't be told doesn't matter: it finds out.
// Who has ended the call doesn't wait long for it.
func (u *upload) abandon(ctx context.Context, s *uploadSession) {
	own, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, cancel) })()
	res, err := u.repo.do(own, &remoteCall{
		method: http.MethodDelete, url: s.url, actions: []string{"pull", "push"}, once: true,
		ok: []int{http.StatusNoContent, http.StatusAccepted, http.StatusOK, http.StatusNotFound, http.StatusMethodNotAllowed},
	})
	if err == nil {
		res.Body.Close()
	}
}

// A sentCounter is the body of a request.
type sentCounter struct {
	io.ReadCloser
	count func(n int)
}

func (b *sentCounter) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.count(n)
	return n, err
}

func bytesBody(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}
