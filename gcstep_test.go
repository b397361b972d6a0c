package ocilocal_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A lookCtx runs a function each time its error is looked at, which a collection does
// before and after it takes the index's lock.
type lookCtx struct {
	context.Context
	look func()
	mu   sync.Mutex // manifests are read by several goroutines
}

func (c *lookCtx) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	return c.Context.Err()
}

// Done is nil: for a context that may end, database/sql starts goroutines, which look at it at any
// moment, and after the call too.
func (c *lookCtx) Done() <-chan struct{} { return nil }

// TestGCForeignEntry: an orphan's file was replaced by an entry that this package has not made. A
// collection deletes the orphan's rows, and the entry stays.
func TestGCForeignEntry(t *testing.T) {
	for name, plant := range map[string]func(path string) error{
		"link":      func(path string) error { return os.Symlink("thesis.tex", path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o755) },
		"full directory": func(path string) error {
			return errors.Join(os.Mkdir(path, 0o755), os.WriteFile(filepath.Join(path, "thesis.tex"), nil, 0o644))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			gone := published(t, r, "example.com/gone:v1", "gone", nil)
			layers, err := gone.Layers(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Remove(t.Context(), gone.Reference()); err != nil {
				t.Fatal(err)
			}
			for _, d := range []digest.Digest{gone.Digest(), layers[0].Digest} {
				if err := os.Remove(blobFile(r, d)); err != nil {
					t.Fatal(err)
				}
				if err := plant(blobFile(r, d)); err != nil {
					t.Skip(err)
				}
			}
			collect(t, r, atOnce)
			for _, d := range []digest.Digest{gone.Digest(), layers[0].Digest} {
				if _, err := os.Lstat(blobFile(r, d)); err != nil {
					t.Error(err)
				}
			}
			if report := collect(t, r, atOnce); report.Deleted != (ocilocal.Count{}) {
				t.Errorf("again: %+v", report)
			}
		})
	}
}

// TestGCUnreconciledMeanwhile marks the index as not reconciled at any moment of a collection.
// Nothing is deleted after that.
func TestGCUnreconciledMeanwhile(t *testing.T) {
	t.Parallel()
	unsafe := 0
	for n := 1; ; n++ {
		r := openTemp(t, nil)
		published(t, r, "example.com/kept:v1", "kept", nil)
		gone := published(t, r, "example.com/gone:v1", "gone", nil)
		if _, err := r.Remove(t.Context(), gone.Reference()); err != nil {
			t.Fatal(err)
		}
		db, err := sql.Open("sqlite", filepath.Join(r.Root(), "index.sqlite3"))
		if err != nil {
			t.Fatal(err)
		}
		deleted := false
		var looks atomic.Int64
		var marked atomic.Bool
		ctx := &lookCtx{Context: t.Context(), look: func() {
			if looks.Add(1) == int64(n) {
				_, err := db.Exec("INSERT INTO meta VALUES ('unreconciled', '1')") // fails while the collector has the lock
				marked.Store(err == nil)
			}
		}}
		ocilocal.SetFault(r, func(op, name string) error {
			if op == "remove" && strings.HasPrefix(name, "blobs/") && marked.Load() { // by one goroutine
				deleted = true
			}
			return nil
		})
		_, err = r.GC(ctx, atOnce)
		ocilocal.SetFault(r, nil)
		if deleted {
			t.Errorf("marked at look %d: something was deleted after that", n)
		}
		switch {
		case marked.Load() && errors.Is(err, ocilocal.ErrUnsafe):
			unsafe++
		case err != nil:
			t.Error(err)
		}
		if err := errors.Join(db.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
		if looks.Load() < int64(n) {
			break
		}
	}
	if unsafe < 5 {
		t.Errorf("%d collections refused", unsafe)
	}
}

// TestGCRaces runs a step of another call when the collector is about to delete a file: once before
// it has the lock, and once with it.
func TestGCRaces(t *testing.T) {
	// Marked dead, then tagged again before anything is deleted.
	ctx := t.Context()
	r := openTemp(t, artifactForm)
	a := published(t, r, "example.com/a:1", "one", nil)
	if _, err := r.Remove(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	once := false
	ocilocal.SetFault(r, func(op, name string) error {
		// The collector reads blobs/ before it takes the lock for the first time.
		if op == "readdir" && name == "blobs/sha256" && !once {
			once = true
			if _, err := r.Tag(ctx, a.Digest(), a.Reference(), nil); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	report := collect(t, r, atOnce)
	ocilocal.SetFault(r, nil)
	if !once || report.Revived != 2 || report.Deleted != (ocilocal.Count{}) {
		t.Errorf("%v %+v", once, report)
	}
	if _, err := r.Load(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	// A publish that has found its blobs in the store, and then loses them to a
	// collector before its transaction.
	if _, err := r.Remove(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	other := openAgain(t, r)
	once = false
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "fsyncdir" && name == "blobs/sha256" && !once {
			once = true
			if report := collect(t, other, atOnce); report.Deleted.Manifests != 1 || report.Deleted.Blobs != 1 {
				t.Errorf("%+v", report)
			}
		}
		return nil
	})
	again := published(t, r, "example.com/a:2", "one", nil)
	ocilocal.SetFault(r, nil)
	if !once || again.Digest() != a.Digest() {
		t.Fatal("the collector did not run in between")
	}
	mustClose(t, other)
	checkArtifact(t, again, "one")
	mustClose(t, r)
	checkStore(t, r.Root(), model{"example.com/a:2": {""}})
}

// TestGCSubjectRevived sets a ref to a referrer of an orphan, after the mark and before the
// deletion. The orphan stays.
func TestGCSubjectRevived(t *testing.T) {
	r := openTemp(t, nil)
	subject := published(t, r, "example.com/subject:v1", "subject", nil)
	if _, err := r.Remove(t.Context(), subject.Reference()); err != nil {
		t.Fatal(err)
	}
	once := false
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "readdir" && name == "blobs" && !once { // between the reading of the index and the deletion
			once = true
			published(t, r, "example.com/signature:v1", "signature", subject)
		}
		return nil
	})
	if report := collect(t, r, atOnce); report.Revived < 2 || report.Deleted != (ocilocal.Count{}) {
		t.Errorf("%+v", report)
	}
	ocilocal.SetFault(r, nil)
	again, err := r.LoadDigest(t.Context(), subject.Digest())
	if err != nil {
		t.Fatal(err)
	}
	checkArtifact(t, again, "subject")
}

// TestCollectorLetsWritersIn: another handle that writes gets its turn between the steps of a
// collection. In the bubble time passes only while everybody waits, so how long a write waits does
// not depend on the machine.
func TestCollectorLetsWritersIn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := openTemp(t, nil)
		a := published(t, r, "example.com/x:v1", "x", nil)
		orphans := scaled(200, 1000, 5000)
		if err := ocilocal.IndexWrite(t.Context(), r, func(exec func(string) error) error {
			var errs []error
			for i := range orphans {
				text := fmt.Sprint("orphan ", i)
				d := digest.FromString(text)
				errs = append(errs, os.WriteFile(blobFile(r, d), []byte(text), 0o444),
					exec(fmt.Sprintf("INSERT INTO content (digest, size, kind, created) VALUES (%s, %d, 2, 0)", sqlDigest(d), len(text))))
			}
			return errors.Join(errs...)
		}); err != nil {
			t.Fatal(err)
		}
		other := openAgain(t, r)
		var deleted atomic.Int64
		ocilocal.SetFault(r, func(op, _ string) error {
			if op == "remove" {
				deleted.Add(1)
			}
			return nil
		})
		var longest, writes, between int64 // longest: most that was deleted while one write waited
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(3 * time.Millisecond):
				}
				before := deleted.Load()
				if _, err := other.Tag(t.Context(), a.Digest(), ocilocal.MustParseReference(fmt.Sprintf("example.com/x:t%d", writes)), nil); err != nil {
					t.Error(err)
					return
				}
				after := deleted.Load()
				longest = max(longest, after-before)
				if writes++; after > 0 && after < int64(orphans) {
					between++
				}
			}
		})
		opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace}
		ocilocal.StepByOne(opts) // the time of a step does not pass here
		report := collect(t, r, opts)
		close(done)
		wg.Wait()
		if report.Deleted.Blobs != orphans {
			t.Errorf("%+v", report)
		}
		if longest > 5 || between < int64(orphans)/5 {
			t.Errorf("one write waited for %d of %d deletions, %d writes came between them", longest, orphans, between)
		}
		t.Logf("%d writes, %d between deletions, one waited for %d", writes, between, longest)
		mustClose(t, other)
	})
}

// TestCollectorStepsEnd: when deletion is slow, a step of a collection deletes only as much as fits
// into its time. Each step begins with a look at the root.
func TestCollectorStepsEnd(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	const orphans = 15
	for i := range orphans {
		write(t, blobFile(r, digest.FromString(fmt.Sprint("orphan ", i))), fmt.Sprint("orphan ", i))
	}
	var steps []int // how many files each deletes
	ocilocal.SetFault(r, func(op, name string) error {
		switch {
		case op == "stat" && name == r.Root():
			steps = append(steps, 0)
		case op == "remove" && strings.HasPrefix(name, "blobs/"):
			steps[len(steps)-1]++
			for start := time.Now(); time.Since(start) < 5*time.Millisecond; { // a fourth of a step's time
			}
		}
		return nil
	})
	report := collect(t, r, atOnce)
	ocilocal.SetFault(r, nil)
	if report.Deleted.Blobs != orphans || slices.Max(steps) > 4 {
		t.Errorf("%+v; steps delete %v", report.Deleted, steps)
	}
	t.Logf("steps delete %v", steps)
}

// TestCollectLarge: while the index is locked, a collection only renames a large file. It frees the
// space after that.
func TestCollectLarge(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	name := blobFile(r, digest.FromString("large"))
	write(t, name, "")
	if err := errors.Join(os.Chmod(name, 0o644), os.Truncate(name, 64<<20)); err != nil {
		t.Fatal(err)
	}
	var ops []string
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "rename" || op == "remove" {
			ops = append(ops, op)
		}
		return nil
	})
	report := collect(t, r, atOnce)
	if report.Deleted != (ocilocal.Count{Blobs: 1, Bytes: 64 << 20}) || len(ops) < 2 || ops[0] != "rename" || ops[1] != "remove" {
		t.Errorf("%+v, %q", report.Deleted, ops)
	}
	if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	ocilocal.SetFault(r, nil)
	checkNoTmp(t, r)
}
