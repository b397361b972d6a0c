package ocilocal

import (
	"context"
	"sync"
)

// diskWorkers is how many files are copied side by side.
const diskWorkers = 4

// tasks are functions that run side by side, a few at a time. The first error
// ends the others by their context.
type tasks struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	caller context.Context
	limit  chan struct{}
	wg     sync.WaitGroup
}

func newTasks(ctx context.Context, most int) *tasks {
	t := &tasks{caller: ctx, limit: make(chan struct{}, most)}
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	return t
}

// start runs fn, after waiting until fewer than the most are running. It
// returns an error when nothing more is to be started.
func (t *tasks) start(fn func() error) error {
	select {
	case t.limit <- struct{}{}:
	case <-t.ctx.Done():
		return context.Cause(t.ctx)
	}
	t.wg.Go(func() {
		defer func() { <-t.limit }()
		if t.ctx.Err() != nil {
			return
		}
		if err := fn(); err != nil {
			t.cancel(err)
		}
	})
	return nil
}

// wait returns when none is running any more. Its error is the first: that of a task, or else err.
func (t *tasks) wait(err error) error {
	if err != nil {
		t.cancel(err)
	}
	t.wg.Wait()
	first := context.Cause(t.ctx)
	t.cancel(nil)
	if t.caller.Err() != nil {
		return t.caller.Err()
	}
	return first
}
