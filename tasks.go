package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"runtime/debug"
	"sync"
)

// diskWorkers is how many files are copied side by side.
const diskWorkers = 4

// tasks run functions side by side, a few at a time. The first error ends the others by their
// context. One goroutine starts them, and waits. A panic of a task is one of wait.
type tasks struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	caller context.Context
	limit  chan struct{}
	wg     sync.WaitGroup
}

func newTasks(ctx context.Context, limit int) *tasks {
	t := &tasks{caller: ctx, limit: make(chan struct{}, limit)}
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	return t
}

// start runs fn as soon as fewer than the limit are running. It returns an error, and runs
// nothing, once a task has failed or the context has ended.
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
		settle(fn, func(err error) {
			if err != nil {
				t.cancel(err)
			}
		})
	})
	return nil
}

// wait returns when no task is running. Its error is the caller's context's, or else the
// first: that of a task, or err, which says why the caller started no more.
func (t *tasks) wait(err error) error {
	if err != nil {
		t.cancel(err)
	}
	t.wg.Wait()
	first := context.Cause(t.ctx)
	t.cancel(nil)
	raise(first)
	if t.caller.Err() != nil {
		return t.caller.Err()
	}
	return first
}

// settle calls fn, and then done once with the error, however fn ends: a panic becomes a
// [*panicError], and runtime.Goexit becomes errGoexit. Functions of callers, such as a
// [CredentialFunc], may do either on a goroutine that the caller doesn't know, while others wait
// for what it does.
func settle(fn func() error, done func(error)) {
	err := errGoexit
	defer func() {
		switch v := recover().(type) {
		case nil:
		case *panicError: // of a task of this one
			err = v
		default:
			err = &panicError{value: v, stack: debug.Stack()}
		}
		done(err)
	}()
	err = fn()
}

// errGoexit is the error of a function that has ended its goroutine. Tests do that by FailNow.
var errGoexit = errors.New("function has ended its goroutine by runtime.Goexit")

// A panicError is a panic on its way from one goroutine to those that wait for it, which raise it
// again.
type panicError struct {
	value any
	stack []byte // where it happened
}

func (e *panicError) Error() string { return fmt.Sprintf("%v\n\n%s", e.value, e.stack) }

// Unwrap returns the value of the panic if that is an error.
func (e *panicError) Unwrap() error {
	err, _ := e.value.(error)
	return err
}

// raise panics if err is a panic of another goroutine.
func raise(err error) {
	if e, ok := err.(*panicError); ok {
		panic(e)
	}
}

// parallel calls do with each item, in so many goroutines at once, and returns when all calls have
// returned. Unlike [tasks] it goes on after an error, so do keeps its own.
func parallel[K, V any](workers int, items iter.Seq2[K, V], do func(K, V)) {
	type item struct {
		k K
		v V
	}
	work := make(chan item)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range work {
				do(i.k, i.v)
			}
		})
	}
	for k, v := range items {
		work <- item{k, v}
	}
	close(work)
	wg.Wait()
}

// readBounded returns all that src has, and [ErrTooLarge] if that is more than limit bytes.
func readBounded(src io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(src, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, limit)
	}
	return b, err
}
