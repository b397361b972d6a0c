package ocilocal

import (
	"context"
	"errors"
)

// Close waits for the calls in progress and closes the registry. It ends what a handler with an
// [Upstream] is fetching. Calls that begin meanwhile fail with [ErrClosed]. Do not call Close from
// within a call, for example in a reader that is being added as a layer: it would wait for ever. The
// bodies of loops over listings may call it. Open readers stay usable. The connections of
// [Options.Remote] stay open. A second Close returns [ErrClosed].
func (r *LocalRegistry) Close() (err error) {
	defer addOp(&err, "close", r.dir, "")
	r.mu.Lock()
	already := r.closed
	r.closed = true
	r.mu.Unlock()
	if already {
		return ErrClosed
	}
	close(r.closing)
	r.calls.Wait()
	if r.opts.Remote == nil {
		r.remote.CloseIdleConnections()
	}
	return errors.Join(r.index.close(), r.blobs.close(), r.root.Close())
}

// begin keeps the registry open until end is called. Every exported method calls it before it uses
// root, blobs or index, and calls end when it is done with them.
//
// Once Close has begun, begin fails with [ErrClosed], also within a call that Close waits for. So a
// call that has changed something must not begin a second one, or it could fail in its middle. The
// unexported bodies (resolve, tag and so on) are for calls that have begun. closed and calls change
// under one mutex: Add never races with Wait.
func (r *LocalRegistry) begin(ctx context.Context) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, ErrClosed
	}
	r.calls.Add(1)
	return r.calls.Done, nil
}

// beginWrite is begin for a call that changes the registry. It fails with [ErrReadOnly] if the
// registry is open read-only.
func (r *LocalRegistry) beginWrite(ctx context.Context) (end func(), err error) {
	if end, err = r.begin(ctx); err == nil && r.blobs.readOnly {
		end()
		return nil, ErrReadOnly
	}
	return end, err
}

// within runs fn while the registry is kept open. Listings and long calls use it for each of their
// steps, so that Close does not wait for all of them.
func (r *LocalRegistry) within(ctx context.Context, fn func() error) error {
	end, err := r.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	return fn()
}
