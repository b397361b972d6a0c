package ocilocal

import (
	"errors"
	"io"
	"math"
	"net/http"
	"time"
)

// A client that sends or takes bytes very slowly, or none at all, would keep a connection, an open
// file and perhaps an upload for as long as it likes. A deadline for the whole request would end
// large blobs on slow networks. So each request must make some progress: the deadline of the
// connection moves on whenever minProgress bytes have passed.
//
//	body read         read deadline    begins with the request, moves on in Read, ends at EOF
//	answer written    write deadline   begins in send, moves on in Write and sendFile, ends in send
//
// A connection has one deadline of each kind, which the server and the next request on it use as
// well. So both are removed when they have done their work.
const minProgress = 4 << 10

// takeTimes is how many times StallTimeout a client has to make room for a part of the answer. A
// write waits for room in the socket's buffer, and not for the client. Linux lets it go on when a
// third of the buffer is free, and the buffer of a fast network grows to 4 MiB. A client that copies
// to a slow network may need minutes for that much, although it never pauses.
const takeTimes = 10

// A stall moves one deadline of a connection. A connection without deadlines, as in a test, has no
// limit: the error of set is dropped. One goroutine uses a stall at a time.
type stall struct {
	set     func(time.Time) error
	timeout time.Duration
	passed  int // bytes since the deadline was moved
}

// begin sets the deadline for the next bytes.
func (s *stall) begin() {
	if s.timeout > 0 {
		_ = s.set(time.Now().Add(s.timeout))
	}
}

func (s *stall) progress(n int) {
	if s.passed += n; s.passed >= minProgress {
		s.passed = 0
		s.begin()
	}
}

// end removes the deadline, which would also end the wait for the next request.
func (s *stall) end() {
	if s.timeout > 0 {
		_ = s.set(time.Time{})
	}
}

// serveBody is the body of a request. It marks the errors of its source as badBody, to tell them
// from errors of the disk to which the bytes are copied: the first are answered with a 4xx, the
// others with a 5xx.
type serveBody struct {
	src   io.Reader
	stall stall
	limit int64 // how many bytes more may come
}

// body returns the body of the request. After limit bytes it fails with [ErrTooLarge].
func (x *exchange) body(limit int64) *serveBody {
	b := &serveBody{src: x.r.Body, limit: limit}
	b.stall = stall{set: http.NewResponseController(x.w).SetReadDeadline, timeout: x.opts.StallTimeout}
	b.stall.begin()
	return b
}

func (b *serveBody) Read(p []byte) (int, error) {
	n, err := b.src.Read(p)
	if err == io.EOF {
		// After the body the server reads on in the background, to notice that the client goes
		// away. If the deadline passed then, it would cancel the request while the answer is
		// worked out.
		b.stall.end()
	} else {
		b.stall.progress(n)
	}
	if b.limit -= int64(n); b.limit < 0 {
		return 0, serveErrorf(http.StatusRequestEntityTooLarge, codeSizeInvalid, "body is too large")
	}
	if err != nil && err != io.EOF {
		err = &badBody{err}
	}
	return n, err
}

// A badBody says that the body of a request could not be read to its end.
type badBody struct{ err error }

func (e *badBody) Error() string { return "read body: " + e.err.Error() }
func (e *badBody) Unwrap() error { return e.err }

// sendChunk is how many bytes are written before the deadline moves on.
const sendChunk = 256 << 10

// serveWriter is the body of an answer.
type serveWriter struct {
	w     http.ResponseWriter
	stall stall
}

// send calls write with the body of the answer. It flushes the answer while the deadline holds:
// net/http would do that after the handler, without a deadline.
func (x *exchange) send(write func(*serveWriter) error) error {
	control := http.NewResponseController(x.w)
	// Before it writes the server may read the rest of the request, until the read deadline. That
	// is a small part of this time.
	timeout := takeTimes * min(x.opts.StallTimeout, math.MaxInt64/takeTimes)
	w := &serveWriter{w: x.w, stall: stall{set: control.SetWriteDeadline, timeout: timeout}}
	w.stall.begin()
	defer w.stall.end()
	err := write(w)
	if err == nil {
		err = control.Flush() // within the deadline
	}
	if errors.Is(err, http.ErrNotSupported) {
		err = nil
	}
	return err
}

func (w *serveWriter) Write(p []byte) (written int, err error) {
	for {
		n, err := w.w.Write(p[:min(len(p), sendChunk)])
		written += n
		w.stall.progress(n)
		if p = p[n:]; err != nil || len(p) == 0 {
			return written, err
		}
	}
}

// sendFile writes n bytes of a file. The kernel copies them (sendfile) where it can. Over HTTP/2 and
// through a wrapped ResponseWriter it cannot, and one buffer serves the whole answer.
func (w *serveWriter) sendFile(f io.Reader, n int64) error {
	var buf []byte
	if _, ok := w.w.(io.ReaderFrom); !ok {
		buf = make([]byte, min(n, 32<<10))
	}
	for n > 0 {
		m, err := io.CopyBuffer(w.w, io.LimitReader(f, min(n, sendChunk)), buf)
		if err == nil && m == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		w.stall.progress(int(m))
		n -= m
	}
	return nil
}
