package ocilocal_test

import (
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/ocilocal/ocilocal"
)

// TestParallel calls with each item once, by no more goroutines than it is told.
func TestParallel(t *testing.T) {
	var running, most, sum atomic.Int64
	ocilocal.Parallel(3, 100, func(i int) {
		n := running.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		sum.Add(int64(i))
		running.Add(-1)
	})
	if sum.Load() != 4950 || most.Load() > 3 || running.Load() != 0 {
		t.Errorf("sum %d, at most %d at once, %d left", sum.Load(), most.Load(), running.Load())
	}
}

// TestTasksFirstError: the first error ends the other tasks by their context, and is the one that
// is returned. The caller's context goes before it.
func TestTasksFirstError(t *testing.T) {
	first := errors.New("first")
	ctx, cancel := context.WithCancel(t.Context())
	err := ocilocal.RunTasks(ctx, 2, func(ctx context.Context) error { return first }, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	if err != first {
		t.Errorf("%v, want %v", err, first)
	}
	cancel()
	if err := ocilocal.RunTasks(ctx, 2, func(context.Context) error { return first }); err != context.Canceled {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

func TestReadBounded(t *testing.T) {
	for n, want := range map[int64]error{9: ocilocal.ErrTooLarge, 10: nil, 11: nil} {
		b, err := ocilocal.ReadBounded(iotest.OneByteReader(strings.NewReader("ten bytes.")), n)
		if !errors.Is(err, want) || err == nil && string(b) != "ten bytes." {
			t.Errorf("%d: %q, %v", n, b, err)
		}
	}
	broken := io.MultiReader(strings.NewReader("part"), iotest.ErrReader(io.ErrUnexpectedEOF))
	if _, err := ocilocal.ReadBounded(broken, 10); err != io.ErrUnexpectedEOF {
		t.Errorf("%v, want %v", err, io.ErrUnexpectedEOF)
	}
}

// A panic of a task is one of the goroutine that waits, and a task that ends its goroutine is an error.
func TestTasksPanic(t *testing.T) {
	cause := errors.New("cause")
	raised := func() (v any) {
		defer func() { v = recover() }()
		return ocilocal.RunTasks(t.Context(), 2, func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		}, func(context.Context) error { panic(cause) })
	}
	err, ok := raised().(error)
	if !ok || !errors.Is(err, cause) || !strings.Contains(err.Error(), "TestTasksPanic") {
		t.Error(err)
	}
	err = ocilocal.RunTasks(t.Context(), 1, func(context.Context) error { runtime.Goexit(); return nil })
	if err == nil || !strings.Contains(err.Error(), "Goexit") {
		t.Error(err)
	}
}
