package ocilocal

import (
	"context"
	"errors"
)

// Close waits for the calls under way and closes the registry. Calls that come meanwhile fail with
// [ErrClosed]. Close waits for ever if a call under way runs it, for example in a reader that is
// being added as a layer. The bodies of loops over listings may call it. Open readers stay usable.
// The connections of a Remote that was given by Options stay open. A second Close returns
// [ErrClosed].
func (r *LocalRegistry) Close() (err error) {
	defer addOp(&err, "close", r.dir, "")
	r.mu.Lock()
	already := r.closed
	r.closed = true
	r.mu.Unlock()
	if already {
		return ErrClosed
	}
	r.calls.Wait()
	if r.opts.Remote == nil {
		r.remote.CloseIdleConnections()
	}
	return errors.Join(r.index.close(), r.blobs.close(), r.root.Close())
}

// begin keeps the registry open until end is called. Once Close has begun, it fails with
// [ErrClosed], also from within a call that Close waits for: a call must not begin a second one, or
// it would fail in its middle.
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

// beginWrite is begin of a call that changes the registry: one that is open read-only fails with
// [ErrReadOnly].
func (r *LocalRegistry) beginWrite(ctx context.Context) (end func(), err error) {
	if end, err = r.begin(ctx); err == nil && r.blobs.readOnly {
		end()
		return nil, ErrReadOnly
	}
	return end, err
}

// within runs fn, which is short, while the registry is kept open.
func (r *LocalRegistry) within(ctx context.Context, fn func() error) error {
	end, err := r.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	return fn()
}
