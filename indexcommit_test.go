package ocilocal_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// soon is how long the tests of this file wait for an event that must come quickly.
const soon = 20 * time.Second

// lockIndex takes the index's write lock as another process would, until release.
func lockIndex(t *testing.T, root string) (release func()) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(root, "index.sqlite3")+"?_txlock=immediate&_pragma=busy_timeout(10000)")
	if err != nil {
		t.Fatal(err)
	}
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		tx.Rollback()
		db.Close()
	})
	t.Cleanup(release)
	return release
}

// outcome waits for the error of a call, and fails the test if that takes too long.
func outcome(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(soon):
		t.Fatal("the call doesn't return")
		return nil
	}
}

// A batch is a leader and the calls that share its transaction.
type batch struct {
	t       *testing.T
	r       *ocilocal.LocalRegistry
	release chan struct{}
	leader  chan error
}

// newBatch keeps the transaction busy, so that the calls that are added wait together.
func newBatch(t *testing.T, r *ocilocal.LocalRegistry) *batch {
	b := &batch{t: t, r: r, release: make(chan struct{}), leader: make(chan error, 1)}
	inside := make(chan struct{})
	go func() {
		b.leader <- ocilocal.IndexWrite(context.Background(), r, func(func(string) error) error {
			close(inside)
			<-b.release
			return nil
		})
	}()
	<-inside
	return b
}

// add queues a call after those that were added before.
func (b *batch) add(ctx context.Context, fn func(exec func(string) error) error) (done chan error) {
	b.t.Helper()
	done = make(chan error, 1)
	queued := ocilocal.IndexQueue(b.r)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("panic: %v", p)
			}
		}()
		done <- ocilocal.IndexWrite(ctx, b.r, fn)
	}()
	for ocilocal.IndexQueue(b.r) == queued {
		runtime.Gosched()
	}
	return done
}

// run lets the batch commit.
func (b *batch) run() {
	b.t.Helper()
	close(b.release)
	if err := outcome(b.t, b.leader); err != nil {
		b.t.Fatal(err)
	}
}

func put(key string) func(func(string) error) error {
	return func(exec func(string) error) error {
		return exec(fmt.Sprintf("INSERT INTO meta (key, value) VALUES ('test %s', '')", key))
	}
}

// keys returns the keys that the calls have written and committed.
func keys(t *testing.T, r *ocilocal.LocalRegistry) string {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(r.Root(), "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var all string
	err = db.QueryRow("SELECT coalesce(group_concat(substr(key, 6), ' '), '') FROM (SELECT key FROM meta WHERE key LIKE 'test %' ORDER BY key)").Scan(&all)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestSharedCommit lets calls share a transaction in which one of them fails, panics or ends it.
// Each call gets its own outcome, and the next call works.
func TestSharedCommit(t *testing.T) {
	errOwn := errors.New("own error")
	for name, c := range map[string]struct {
		second func(exec func(string) error) error
		others error  // of the first and third call
		want   string // what is in the index at the end
	}{
		"error of its own": {func(exec func(string) error) error {
			return errors.Join(put("second")(exec), errOwn)
		}, nil, "first last third"},
		"SQL error": {func(exec func(string) error) error {
			return exec("INSERT INTO meta (key, value) VALUES ('x', NULL)")
		}, nil, "first last third"},
		"rolled back by SQLite": {func(exec func(string) error) error {
			return errors.Join(exec("ROLLBACK"), errOwn)
		}, errOwn, "last"},
		"rolled back unnoticed": {func(exec func(string) error) error {
			return exec("ROLLBACK")
		}, ocilocal.ErrIndexIO, "last"},
		"COMMIT fails": {func(exec func(string) error) error {
			return errors.Join(exec("PRAGMA defer_foreign_keys = ON"),
				exec("INSERT INTO refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved) VALUES ('a', 'b', 1000, x'', 0, 1000, 1000, 0, 0)"))
		}, ocilocal.ErrIndexIO, "last"},
		"panic": {func(func(string) error) error { panic("second") }, errors.ErrUnsupported, "last"},
		"exit":  {func(func(string) error) error { runtime.Goexit(); return nil }, errors.ErrUnsupported, "last"},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			b := newBatch(t, r)
			first := b.add(t.Context(), put("first")) // leads the batch
			second := b.add(t.Context(), c.second)
			third := b.add(t.Context(), put("third"))
			b.run()
			if err := outcome(t, second); err == nil {
				t.Error("the call that went wrong returns nil")
			}
			thirdErr := outcome(t, third)
			if name != "exit" { // that one ends the leader's goroutine
				if err := outcome(t, first); (err == nil) != (thirdErr == nil) {
					t.Errorf("first: %v, third: %v", err, thirdErr)
				}
			}
			switch {
			case c.others == nil && thirdErr != nil, c.others != nil && thirdErr == nil,
				c.others != nil && c.others != errors.ErrUnsupported && !errors.Is(thirdErr, c.others):
				t.Errorf("third: %v, want %v", thirdErr, c.others)
			case c.others == errors.ErrUnsupported && !strings.Contains(thirdErr.Error(), "panic"):
				t.Errorf("third: %v, want a word of the panic", thirdErr)
			}
			last := make(chan error, 1)
			go func() { last <- ocilocal.IndexWrite(t.Context(), r, put("last")) }()
			if err := outcome(t, last); err != nil {
				t.Errorf("the next call: %v", err)
			}
			if got := keys(t, r); got != c.want {
				t.Errorf("the index has %q, want %q", got, c.want)
			}
		})
	}
}

// TestImpatientLeader: while another process has the lock, a call that leads returns when its
// context ends. The calls of its batch go on waiting.
func TestImpatientLeader(t *testing.T) {
	r := openTemp(t, nil)
	unlock := lockIndex(t, r.Root())
	begin := func(ctx context.Context, key string) (cancel func(), done chan error) {
		ctx, cancel = context.WithCancel(ctx)
		done = make(chan error, 1)
		go func() { done <- ocilocal.IndexWrite(ctx, r, put(key)) }()
		return cancel, done
	}
	taken := func(n int) {
		for deadline := time.Now().Add(soon); ocilocal.IndexQueue(r) != n; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatalf("%d calls are queued, want %d", ocilocal.IndexQueue(r), n)
			}
		}
	}
	cancelFirst, first := begin(t.Context(), "first")
	for !ocilocal.IndexLeading(r) {
		runtime.Gosched()
	}
	taken(0) // it waits for the lock, by itself
	cancelSecond, second := begin(t.Context(), "second")
	taken(1)
	cancelThird, third := begin(t.Context(), "third")
	defer cancelThird()
	taken(2)
	cancelFourth, fourth := begin(t.Context(), "fourth")
	taken(3)
	cancelFirst()
	if err := outcome(t, first); !errors.Is(err, context.Canceled) {
		t.Errorf("first: %v", err)
	}
	taken(0) // the second waits, for all three
	cancelFourth()
	if err := outcome(t, fourth); !errors.Is(err, context.Canceled) {
		t.Errorf("fourth: %v", err)
	}
	cancelSecond()
	if err := outcome(t, second); !errors.Is(err, context.Canceled) {
		t.Errorf("second: %v", err)
	}
	select {
	case err := <-third:
		t.Errorf("the call that is patient ends with %v", err)
	default:
	}
	unlock()
	if err := outcome(t, third); err != nil {
		t.Error(err)
	}
	if got := keys(t, r); got != "third" {
		t.Errorf("the index has %q", got)
	}
}

// TestWithdrawnLeader ends the context of a call at the moment at which it gets the lead. It must
// either commit the queue or hand the lead on: otherwise the calls after it would wait for ever.
func TestWithdrawnLeader(t *testing.T) {
	r := openTemp(t, nil)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 50 { // both are ready, so each call picks one of them by chance
		if err := ocilocal.IndexWrite(ended, r, put("ended")); !errors.Is(err, context.Canceled) {
			t.Fatalf("%v, want %v", err, context.Canceled)
		}
	}
	done := make(chan error, 1)
	go func() { done <- ocilocal.IndexWrite(t.Context(), r, put("next")) }()
	if err := outcome(t, done); err != nil {
		t.Error(err)
	}
	// The same for a call that gets the lead from the one before.
	for range 50 {
		b := newBatch(t, r)
		ctx, cancel := context.WithCancel(t.Context())
		waiting := b.add(ctx, put("waiting"))
		go cancel()
		b.run()
		outcome(t, waiting) // whether it was in time does not matter
		cancel()
		go func() {
			done <- ocilocal.IndexWrite(t.Context(), r, func(exec func(string) error) error { return exec("DELETE FROM meta WHERE key LIKE 'test %'") })
		}()
		if err := outcome(t, done); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBusyTimeout: while another process has the lock, each call fails with ErrBusy after
// BusyTimeout, counted from its own beginning. Reading goes on.
func TestBusyTimeout(t *testing.T) {
	r := openTemp(t, &ocilocal.Options{BusyTimeout: 250 * time.Millisecond})
	if _, err := build(t, r, "example.com/a:v1", nil, "x"); err != nil {
		t.Fatal(err)
	}
	unlock := lockIndex(t, r.Root())
	var wg sync.WaitGroup
	start := time.Now()
	for i := range 4 {
		wg.Go(func() {
			_, err := r.Remove(t.Context(), ocilocal.MustParseReference(fmt.Sprint("example.com/a:r", i)))
			if !errors.Is(err, ocilocal.ErrBusy) {
				t.Errorf("%v, want %v", err, ocilocal.ErrBusy)
			}
		})
	}
	if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); !ok || err != nil {
		t.Error(ok, err)
	}
	wg.Wait()
	if waited := time.Since(start); waited < 250*time.Millisecond || waited > soon/2 {
		t.Errorf("waited %v", waited)
	}
	unlock()
	if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); err != nil {
		t.Error(err)
	}
}
