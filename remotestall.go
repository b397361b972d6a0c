package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// A watch ends a request that stalls.
//
// The problem: net/http has no timeout for a transfer that makes no progress. A timeout for the
// whole request would end large blobs on slow lines. A deadline for each read would accept a
// registry that sends one byte now and then, for ever.
//
// The rule: within the stall timeout, at least trickle bytes must move. The time runs only while
// this side waits for the registry. So start lets the time run, and pause stops it: a slow disk or
// a slow caller does not count. When trickle bytes have moved, the full time is available again.
// The wait for the answer to an upload may last longer by a factor, because the registry may have
// much to hash. Time that passes then counts less by the same factor.
//
// It is safe because the watch only cancels the context of its own request, with errStalled as the
// cause. So a stall differs from the end of the caller's context. It may be repeated, on new
// connections (renew). The body of a request and its answer can overlap, because the transport may
// still send while the answer is read. Both use one watch, under its mutex, and bytes of either
// keep it quiet.
type watch struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	limit  time.Duration

	mu     sync.Mutex // guards the fields below
	timer  *time.Timer
	left   time.Duration // the part of limit in which trickle bytes must move
	moved  int           // bytes since left was renewed
	factor time.Duration // how much slower the time passes
	since  time.Time     // when left was counted last; zero while paused
}

// trickle is how many bytes must move within the stall timeout.
const trickle = 4096

var errStalled = errors.New("connection stalls")

// newWatch returns a watch whose time does not run yet. ctx is the caller's. limit is the stall
// timeout, and a minute if it is not positive.
func newWatch(ctx context.Context, limit time.Duration) *watch {
	w := &watch{limit: cmp.Or(max(limit, 0), time.Minute), factor: 1}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.left = w.limit
	return w
}

// start lets the time run, factor times as long as usual.
func (w *watch) start(factor time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since, w.factor = time.Now(), factor
	if d := w.left * factor; w.timer == nil {
		w.timer = time.AfterFunc(d, func() { w.cancel(errStalled) })
	} else {
		w.timer.Reset(d)
	}
}

// pause stops the time.
func (w *watch) pause() { w.count(0, false) }

// count takes the time that has passed from the time that is left, and counts n bytes. Then the
// time runs on if running is set, and stops otherwise.
func (w *watch) count(n int, running bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if !w.since.IsZero() {
		w.left -= now.Sub(w.since) / w.factor
	}
	if w.moved += n; w.moved >= trickle {
		w.moved, w.left = 0, w.limit
	}
	w.left = max(w.left, time.Millisecond)
	w.since = time.Time{}
	if w.timer == nil {
		return
	}
	if running {
		w.since = now
		w.timer.Reset(w.left * w.factor)
	} else {
		w.timer.Stop()
	}
}

// stalled returns the error of a request that the watch has ended, and nil for any other request.
func (w *watch) stalled() error {
	if context.Cause(w.ctx) == errStalled {
		return fmt.Errorf("%w: less than %d bytes moved in %v", errStalled, trickle, w.limit)
	}
	return nil
}

// end stops the time and ends the request. A request must have an end, because its context holds
// resources.
func (w *watch) end(cause error) {
	w.pause()
	w.cancel(cause)
}

// A watchedBody is the body of an answer. The time runs during each Read.
type watchedBody struct {
	src    io.ReadCloser
	watch  *watch
	caller context.Context
	quiet  bool   // errors must not quote the server
	renew  func() // called after a stall
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.watch.start(1)
	n, err := b.src.Read(p)
	b.watch.count(n, false)
	if err != nil && err != io.EOF {
		if b.caller.Err() != nil {
			return n, b.caller.Err()
		}
		if stalled := b.watch.stalled(); stalled != nil {
			b.renew()
			return n, stalled
		}
		if b.quiet {
			err = unquoted(err)
		}
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.watch.end(nil) // first, so that Close does not wait for the rest of the body
	return b.src.Close()
}

// A sentBody is the body of a request. The time runs on between reads, because the transport
// sends then. The transport may close the body while it reads, and read after that. Such a
// failure does not count as one of src.
type sentBody struct {
	src   io.ReadCloser
	watch *watch

	mu     sync.Mutex // held while src is used; guards the fields below
	closed bool
	err    error // why src failed
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := b.src.Read(p)
	b.watch.count(n, true)
	if err != nil && err != io.EOF {
		b.err = err
	}
	return n, err
}

func (b *sentBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return b.src.Close()
}

// failed returns the error of src, and nil if src is not to blame.
func (b *sentBody) failed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// patience returns by which factor a registry has more time than usual to answer: after an upload
// it may have much to hash and to copy.
func patience(c *remoteCall) time.Duration {
	if c.body != nil {
		return 5
	}
	return 1
}
