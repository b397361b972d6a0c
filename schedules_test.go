package ocilocal_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["locked"] = lockedWorker }

// inTransaction is the first file operation of a publish after it got the write lock.
const inTransaction = "stat index.sqlite3"

// allSettled is its last file operation before it asks for that lock.
const allSettled = "fsyncdir blobs/sha256"

// A stop holds a handle at its first operation of a name until the test releases it.
type stop struct {
	reached, let chan struct{}
	once         sync.Once
}

func stopAt(r *ocilocal.LocalRegistry, at string) *stop {
	s := &stop{reached: make(chan struct{}), let: make(chan struct{})}
	ocilocal.SetFault(r, func(op, name string) error {
		if strings.HasPrefix(op+" "+name, at) {
			s.once.Do(func() {
				close(s.reached)
				<-s.let
			})
		}
		return nil
	})
	return s
}

// start runs a call in the background and waits until it is at the stop.
func (s *stop) start(t *testing.T, call func() error) (done chan error) {
	t.Helper()
	done = make(chan error, 1)
	go func() { done <- call() }()
	select {
	case <-s.reached:
	case err := <-done:
		t.Fatalf("the call doesn't come to where it shall stop: %v", err)
	case <-time.After(soon):
		t.Fatal("the call hangs before it is where it shall stop")
	}
	return done
}

// twoHandles opens one root twice, as two processes would.
func twoHandles(t *testing.T) (root string, a, b *ocilocal.LocalRegistry) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "root")
	return root, mustOpen(t, root), mustOpen(t, root)
}

func publishing(r *ocilocal.LocalRegistry, ref, label string, policy ocilocal.Policy) func() error {
	return func() error {
		_, err := publishLabelled(r, ref, label, policy, []byte("in both"), []byte(label))
		return err
	}
}

// TestScheduleKeepExisting: two publishers offer different digests for a new ref, with all blobs in
// place. The first to commit wins.
func TestScheduleKeepExisting(t *testing.T) {
	root, a, b := twoHandles(t)
	held := stopAt(a, allSettled)
	done := held.start(t, publishing(a, newRef, "a", ocilocal.KeepExisting))
	if err := publishing(b, newRef, "b", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	close(held.let)
	err := outcome(t, done)
	if c, ok := errors.AsType[*ocilocal.ConflictError](err); !ok || c.Existing == "" || c.Existing == c.Incoming {
		t.Errorf("the second to commit: %v", err)
	}
	mustClose(t, a)
	mustClose(t, b)
	checkStore(t, root, model{newRef: {"b"}})
}

// TestScheduleStaleExpected: a compare-and-swap compares in the transaction, not before.
func TestScheduleStaleExpected(t *testing.T) {
	root, a, b := twoHandles(t)
	first, err := publishLabelled(a, newRef, "first", ocilocal.KeepExisting, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	held := stopAt(a, allSettled)
	done := held.start(t, func() error {
		o := &ocilocal.BuilderOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace, Expected: first.Descriptor.Digest}}
		_, err := build(t, a, newRef, o, "stale")
		return err
	})
	moved, err := publishLabelled(b, newRef, "moved", ocilocal.Replace, []byte("y"))
	if err != nil {
		t.Fatal(err)
	}
	close(held.let)
	c, ok := errors.AsType[*ocilocal.ConflictError](outcome(t, done))
	if !ok || c.Existing != moved.Descriptor.Digest || c.Expected != first.Descriptor.Digest {
		t.Errorf("%+v", c)
	}
	mustClose(t, a)
	mustClose(t, b)
	checkStore(t, root, model{newRef: {"moved"}})
}

// TestScheduleCloseDuringPut: Close waits for a layer that is coming in. Any other call meanwhile
// fails at once, also one from that layer's reader.
func TestScheduleCloseDuringPut(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	if _, err := publishLabelled(r, keptRef, "kept", ocilocal.KeepExisting, []byte("x")); err != nil {
		t.Fatal(err)
	}
	b, err := r.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	reading, closing := make(chan struct{}), make(chan error, 1)
	added := make(chan error, 1)
	go func() {
		once := sync.OnceFunc(func() { close(reading) })
		_, err := b.AddLayer(context.Background(), "text/plain", readerFunc(func(p []byte) (int, error) {
			once()
			for { // until Close has begun
				if _, err := r.Exists(context.Background(), ocilocal.MustParseReference(keptRef)); err != nil {
					return 0, err
				}
			}
		}), nil)
		added <- err
	}()
	<-reading
	go func() { closing <- r.Close() }()
	if err := outcome(t, added); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("AddLayer: %v", err)
	}
	if err := outcome(t, closing); err != nil {
		t.Error(err)
	}
	if err := r.Close(); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	if _, err := b.Build(t.Context()); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("Build: %v", err)
	}
	if err := b.Cancel(); err != nil {
		t.Error(err)
	}
	checkStore(t, root, model{keptRef: {"kept"}})
}

// TestScheduleCloseDuringPublish: Close waits for a publish, which succeeds.
func TestScheduleCloseDuringPublish(t *testing.T) {
	t.Parallel()
	for range 20 {
		root := filepath.Join(t.TempDir(), "root")
		r := mustOpen(t, root)
		held := stopAt(r, allSettled)
		done := held.start(t, publishing(r, newRef, "a", ocilocal.KeepExisting))
		closing := make(chan error, 1)
		go func() { closing <- r.Close() }()
		for {
			if _, err := r.Exists(t.Context(), ocilocal.MustParseReference(newRef)); errors.Is(err, ocilocal.ErrClosed) {
				break
			}
		}
		close(held.let)
		if err := outcome(t, done); err != nil {
			t.Errorf("the publish under way: %v", err)
		}
		if err := outcome(t, closing); err != nil {
			t.Error(err)
		}
		checkStore(t, root, model{newRef: {"a"}})
	}
}

// TestCloseWhileWalking closes the registry from within its own iterators.
func TestCloseWhileWalking(t *testing.T) {
	for name, walk := range map[string]func(r *ocilocal.LocalRegistry) (closed, last error){
		"Blobs": func(r *ocilocal.LocalRegistry) (closed, last error) {
			for _, last = range r.Blobs(context.Background()) {
				if last == nil {
					closed = errors.Join(closed, r.Close())
				}
			}
			return closed, last
		},
		"Refs": func(r *ocilocal.LocalRegistry) (closed, last error) {
			for _, last = range r.Refs(context.Background(), nil) {
				if last == nil {
					closed = errors.Join(closed, r.Close())
				}
			}
			return closed, ocilocal.ErrClosed // one page: the end comes without another look
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			if _, err := build(t, r, newRef, nil, "x"); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() {
				closed, last := walk(r)
				if closed != nil {
					done <- closed
				} else if !errors.Is(last, ocilocal.ErrClosed) {
					done <- fmt.Errorf("the walk goes on after Close: %w", last)
				}
				close(done)
			}()
			if err := outcome(t, done); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestScheduleOpenDuringLastClose opens a root while its last handle removes its session in tmp/.
func TestScheduleOpenDuringLastClose(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	a := mustOpen(t, root)
	if err := publishing(a, keptRef, "a", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	held := stopAt(a, "remove tmp/")
	done := held.start(t, a.Close)
	b := mustOpen(t, root)
	if err := publishing(b, newRef, "b", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	close(held.let)
	if err := outcome(t, done); err != nil {
		t.Error(err)
	}
	if err := publishing(b, movedRef, "b", ocilocal.KeepExisting)(); err != nil {
		t.Error(err)
	}
	mustClose(t, b)
	checkStore(t, root, model{keptRef: {"a"}, newRef: {"b"}, movedRef: {"b"}})
}

// TestScheduleImportsShareBlobs: two imports read the same archive. One is cancelled after its blobs
// have their names, and the other succeeds.
func TestScheduleImportsShareBlobs(t *testing.T) {
	root, a, b := twoHandles(t)
	held := stopAt(a, allSettled)
	ctx, cancel := context.WithCancel(t.Context())
	done := held.start(t, func() error {
		_, err := a.ImportArchive(ctx, bytes.NewReader(faultArchive()), nil)
		return err
	})
	result, err := b.ImportArchive(t.Context(), bytes.NewReader(faultArchive()), nil)
	if err != nil || result.BlobsReused != 4 {
		t.Fatalf("%+v, %v", result, err)
	}
	cancel()
	close(held.let)
	if err := outcome(t, done); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled import: %v", err)
	}
	mustClose(t, a)
	mustClose(t, b)
	checkStore(t, root, model{newRef: {"imported"}})
}

// lockedWorker publishes, says "locked" once it has the index's write lock, and keeps the lock.
func lockedWorker(in *bufio.Scanner, args []string) error {
	var armed atomic.Bool
	r, err := ocilocal.OpenFaulty(context.Background(), args[0], func(op, name string) error {
		if armed.Load() && op+" "+name == inTransaction {
			say("locked")
			in.Scan()
		}
		return nil
	})
	if err != nil {
		return err
	}
	armed.Store(true)
	return publishing(r, newRef, "held", ocilocal.KeepExisting)()
}

// TestScheduleHolderKilled: a process waits for the write lock that another one holds. Once the
// holder is killed, the waiter continues, and the holder's change is not visible.
func TestScheduleHolderKilled(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	w := startWorker(t, "locked", root)
	w.expect("locked")
	done := make(chan error, 1)
	go func() { done <- publishing(r, keptRef, "next", ocilocal.KeepExisting)() }()
	for !ocilocal.IndexLeading(r) {
		select {
		case err := <-done:
			t.Fatalf("the publish didn't wait for the lock: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	w.kill()
	if err := outcome(t, done); err != nil { // BusyTimeout is longer than that waits
		t.Error(err)
	}
	if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(newRef)); ok || err != nil {
		t.Errorf("what the killed process had begun is there: %v, %v", ok, err)
	}
	mustClose(t, r)
	r = mustOpen(t, root) // sweeps
	if err := publishing(r, keptRef, "next", ocilocal.KeepExisting)(); err != nil {
		t.Error(err)
	}
	mustClose(t, r)
	checkStore(t, root, model{keptRef: {"next"}})
}

// TestScheduleClockSkew: locks show which files are in use, whatever the clock says.
func TestScheduleClockSkew(t *testing.T) {
	root, a, b := twoHandles(t)
	builder, err := a.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	defer builder.Cancel()
	if err := builder.SetAnnotation(labelKey, "old"); err != nil {
		t.Fatal(err)
	}
	if _, err := builder.AddLayerBytes(t.Context(), "text/plain", []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	live := tmpEntries(t, root)
	dead := filepath.Join(root, "tmp", rand.Text())
	if err := os.Mkdir(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(live, liveFiles(t, root)...) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(root, "tmp", name)
		}
		if err := os.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
	future := time.Now().AddDate(30, 0, 0)
	if err := os.Chtimes(dead, future, future); err != nil {
		t.Fatal(err)
	}
	if err := publishing(b, keptRef, "b", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	if now := tmpEntries(t, root); slices.Contains(now, filepath.Base(dead)) || !slices.Contains(now, live[0]) {
		t.Errorf("tmp/ has %q; %q is live", now, live)
	}
	if _, err := builder.Build(t.Context()); err != nil {
		t.Error(err)
	}
	mustClose(t, a)
	mustClose(t, b)
	checkStore(t, root, model{keptRef: {"b"}, newRef: {"old"}})
}

// TestFirstWritesAtOnce: the first writes of a handle on a new root, all at once.
func TestFirstWritesAtOnce(t *testing.T) {
	for round := range scaled(3, 10, 100) {
		root := filepath.Join(t.TempDir(), "root")
		r := mustOpen(t, root)
		done := make(chan error, 8)
		want := model{}
		for i := range cap(done) {
			ref := fmt.Sprintf("example.com/first/write:r%d", i)
			want[ref] = []string{"w"}
			go func() {
				_, err := publishLabelled(r, ref, "w", ocilocal.KeepExisting, []byte(ref), []byte("shared"))
				done <- err
			}()
		}
		for range cap(done) {
			if err := outcome(t, done); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
		mustClose(t, r)
		checkStore(t, root, want)
	}
}

// The stage, between the names of blobs and their rows.

// heldBuilder is a builder whose one layer is body.
func heldBuilder(t *testing.T, r *ocilocal.LocalRegistry, body string) *ocilocal.Builder {
	t.Helper()
	b, err := r.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Cancel() })
	if err := b.SetAnnotation(labelKey, "held"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddLayer(t.Context(), "text/plain", strings.NewReader(body), nil); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestHealThenRetry: a publish has replaced a damaged blob, so it has no file in tmp/ for it any
// more, and then its transaction fails. The same builder can try again.
func TestHealThenRetry(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	if _, err := publishLabelled(r, keptRef, "kept", ocilocal.KeepExisting, []byte("body")); err != nil {
		t.Fatal(err)
	}
	rewrite(t, blobFile(r, digest.FromString("body")), flipBit)
	b := heldBuilder(t, r, "body")
	failing := true
	ocilocal.SetFault(r, func(op, name string) error {
		if failing && op+" "+name == inTransaction {
			return syscall.EIO
		}
		return nil
	})
	for range 2 {
		if _, err := b.Build(t.Context()); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
	}
	failing = false
	if _, err := b.Build(t.Context()); err != nil {
		t.Error(err)
	}
	mustClose(t, r)
	checkStore(t, root, model{keptRef: {"kept"}, newRef: {"held"}})
}

// TestCollectedWithoutLinks: without hard links, a publisher cannot restore a blob that a collector
// deletes before the commit. The publish fails, nothing is visible, and a new builder succeeds.
func TestCollectedWithoutLinks(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	blob := blobFile(r, digest.FromString("body"))
	b := heldBuilder(t, r, "body")
	ocilocal.SetFault(r, func(op, name string) error {
		if op+" "+name == inTransaction {
			os.Remove(blob)
		}
		return noLinks(op, name)
	})
	for range 2 {
		if _, err := b.Build(t.Context()); !errors.Is(err, ocilocal.ErrIncomplete) {
			t.Errorf("Build: %v, want %v", err, ocilocal.ErrIncomplete)
		}
	}
	if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(newRef)); ok || err != nil {
		t.Error(ok, err)
	}
	if err := b.Cancel(); err != nil {
		t.Error(err)
	}
	ocilocal.SetFault(r, noLinks)
	if _, err := heldBuilder(t, r, "body").Build(t.Context()); err != nil {
		t.Error(err)
	}
	mustClose(t, r)
	checkStore(t, root, model{newRef: {"held"}})
}

// TestLinkedAgainByAnother: two publishers restore the same collected blob at once.
func TestLinkedAgainByAnother(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	blob := blobFile(r, digest.FromString("body"))
	b := heldBuilder(t, r, "body")
	links := 0
	ocilocal.SetFault(r, func(op, name string) error {
		switch {
		case op+" "+name == inTransaction:
			return os.Remove(blob)
		case op == "link" && strings.HasSuffix(blob, filepath.FromSlash(name)):
			if links++; links == 2 {
				return errors.Join(os.WriteFile(blob, []byte("body"), 0o444), os.Chmod(blob, 0o444))
			}
		}
		return nil
	})
	if _, err := b.Build(t.Context()); err != nil || links != 2 {
		t.Errorf("%d links, %v", links, err)
	}
	mustClose(t, r)
	checkStore(t, root, model{newRef: {"held"}})
}

// TestUnreadableBlobReplaced: something unreadable has the name of a blob. A publish of that blob
// replaces it.
func TestUnreadableBlobReplaced(t *testing.T) {
	r := openTemp(t, nil)
	a, layer := oneLayer(t, r, keptRef, []byte("body"))
	blob := blobFile(r, layer.Digest)
	if err := errors.Join(os.Remove(blob), os.Symlink("elsewhere", blob)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadLayer(t.Context(), layer); err == nil {
		t.Error("a symbolic link was read")
	}
	b, err := r.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte("body"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := a.ReadLayer(t.Context(), ocispec.Descriptor{Digest: layer.Digest}); err != nil || string(got) != "body" {
		t.Errorf("%q, %v", got, err)
	}
}
