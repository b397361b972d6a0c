package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A collection at grace 0 against one other call. Each test stops one of the two at some operation,
// runs the other as far as it gets, and checks the root.

// inBoth is the layer of every artifact that publishing makes.
var inBoth = digest.FromString("in both")

// withOrphan opens a root twice. It has keptRef, labelled "kept", and garbage: the manifest and the
// layer of an artifact labelled "dead".
func withOrphan(t *testing.T) (root string, a, b *ocilocal.LocalRegistry, kept, dead digest.Digest) {
	t.Helper()
	root, a, b = twoHandles(t)
	publish := func(ref, label string) digest.Digest {
		u, err := publishLabelled(a, ref, label, ocilocal.KeepExisting, []byte("in both"), []byte(label))
		if err != nil {
			t.Fatal(err)
		}
		return u.Descriptor.Digest
	}
	kept, dead = publish(keptRef, "kept"), publish(movedRef, "dead")
	if _, err := a.Remove(t.Context(), ocilocal.MustParseReference(movedRef)); err != nil {
		t.Fatal(err)
	}
	return root, a, b, kept, dead
}

// collecting is a collection that finds a number of manifests and blobs to delete, some of which
// come into use before it deletes them.
func collecting(r *ocilocal.LocalRegistry, manifests, blobs, revived int) func() error {
	return collectingBy(r, atOnce, manifests, blobs, revived)
}

// collectingBy is collecting with options.
func collectingBy(r *ocilocal.LocalRegistry, opts *ocilocal.GCOptions, manifests, blobs, revived int) func() error {
	return func() error {
		report, err := r.GC(context.Background(), opts)
		if err == nil && (report.Deleted.Manifests != manifests || report.Deleted.Blobs != blobs || report.Revived != revived || len(report.Missing) > 0) {
			err = fmt.Errorf("the collection did %+v, want %d manifests and %d blobs deleted, %d revived", report, manifests, blobs, revived)
		}
		return err
	}
}

// marked is the operation at which a collector has read the index and blobs/, and reads the
// manifests that stay. It has not asked for the lock.
func marked(kept digest.Digest) string { return "open blobs/sha256/" + kept.Encoded() }

// locked starts a call that waits for the write lock of another handle.
func locked(t *testing.T, r *ocilocal.LocalRegistry, call func() error) (done chan error) {
	t.Helper()
	done = make(chan error, 1)
	go func() { done <- call() }()
	for !ocilocal.IndexLeading(r) {
		select {
		case err := <-done:
			t.Fatalf("the call didn't wait for the lock: %v", err)
		default:
			runtime.Gosched()
		}
	}
	return done
}

func checkOutcomes(t *testing.T, calls ...chan error) {
	t.Helper()
	for _, done := range calls {
		if err := outcome(t, done); err != nil {
			t.Error(err)
		}
	}
}

// closeAndCheck ends both handles, after a collection that must find nothing more.
func closeAndCheck(t *testing.T, root string, a, b *ocilocal.LocalRegistry, want model) {
	t.Helper()
	mustClose(t, b)
	if err := collecting(a, 0, 0, 0)(); err != nil {
		t.Error(err)
	}
	mustClose(t, a)
	checkCollected(t, root, want)
}

// TestScheduleCollectDuringCommit: a publish commits blobs that were garbage when the collector read
// the index.
func TestScheduleCollectDuringCommit(t *testing.T) {
	root, a, b, _, _ := withOrphan(t)
	held := stopAt(a, inTransaction)
	publish := held.start(t, publishing(a, newRef, "dead", ocilocal.KeepExisting))
	collect := locked(t, b, collecting(b, 0, 0, 2))
	close(held.let)
	checkOutcomes(t, publish, collect)
	closeAndCheck(t, root, a, b, model{keptRef: {"kept"}, newRef: {"dead"}})
}

// TestSchedulePublishMarked: an artifact that the collector has found dead is published before the
// collector deletes anything.
func TestSchedulePublishMarked(t *testing.T) {
	root, a, b, kept, _ := withOrphan(t)
	held := stopAt(a, marked(kept))
	collect := held.start(t, collecting(a, 0, 0, 2))
	if err := publishing(b, newRef, "dead", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	close(held.let)
	checkOutcomes(t, collect)
	closeAndCheck(t, root, a, b, model{keptRef: {"kept"}, newRef: {"dead"}})
}

// TestScheduleReuseBetweenUnlinks: the collector has deleted a manifest and is about to delete its
// layer. A publisher finds that layer in the store and relies on it.
func TestScheduleReuseBetweenUnlinks(t *testing.T) {
	for name, add := range map[string]func(b *ocilocal.Builder) error{
		"streamed": func(b *ocilocal.Builder) error {
			_, err := b.AddLayer(context.Background(), "text/plain", bytes.NewReader([]byte("dead")), nil)
			return err
		},
		"bytes": func(b *ocilocal.Builder) error {
			_, err := b.AddLayerBytes(context.Background(), "text/plain", []byte("dead"), nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			root, a, b, _, _ := withOrphan(t)
			held := stopAt(a, "remove blobs/sha256/"+digest.FromString("dead").Encoded())
			collect := held.start(t, collecting(a, 1, 1, 0))
			builder, err := b.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
			if err != nil {
				t.Fatal(err)
			}
			defer builder.Cancel()
			if err := errors.Join(builder.SetAnnotation(labelKey, "new"), add(builder)); err != nil {
				t.Fatal(err)
			}
			publish := locked(t, b, func() error { _, err := builder.Build(context.Background()); return err })
			close(held.let)
			checkOutcomes(t, collect, publish)
			closeAndCheck(t, root, a, b, model{keptRef: {"kept"}, newRef: {"new"}})
		})
	}
}

// TestScheduleTwoCollectors: one collector is stopped, before it asks for the lock or between two
// files, while another collects the same files.
func TestScheduleTwoCollectors(t *testing.T) {
	t.Run("marked", func(t *testing.T) {
		root, a, b, kept, _ := withOrphan(t)
		held := stopAt(a, marked(kept))
		first := held.start(t, collecting(a, 0, 0, 0))
		if err := collecting(b, 1, 1, 0)(); err != nil {
			t.Error(err)
		}
		close(held.let)
		checkOutcomes(t, first)
		closeAndCheck(t, root, a, b, model{keptRef: {"kept"}})
	})
	t.Run("between two files", func(t *testing.T) {
		root, a, b, _, _ := withOrphan(t)
		held := stopAt(a, "remove blobs/sha256/"+digest.FromString("dead").Encoded())
		first := held.start(t, collecting(a, 1, 1, 0))
		second := locked(t, b, func() error {
			report, err := b.GC(context.Background(), atOnce)
			if err == nil && (report.Deleted.Bytes > 0 || report.Revived > 0) {
				err = fmt.Errorf("what the first has deleted, the second counts again: %+v", report)
			}
			return err
		})
		close(held.let)
		checkOutcomes(t, first, second)
		closeAndCheck(t, root, a, b, model{keptRef: {"kept"}})
	})
}

// TestScheduleCollectAndReplace: after the mark and before the deletion, a ref moves from a live
// artifact to a dead one. The second stays. The next collection removes the first.
func TestScheduleCollectAndReplace(t *testing.T) {
	root, a, b, kept, dead := withOrphan(t)
	held := stopAt(a, marked(kept))
	collect := held.start(t, collecting(a, 0, 0, 2))
	u, err := publishLabelled(b, keptRef, "dead", ocilocal.Replace, []byte("in both"), []byte("dead"))
	if err != nil || u.Existing != kept || u.Descriptor.Digest != dead {
		t.Fatalf("%+v, %v", u, err)
	}
	close(held.let)
	checkOutcomes(t, collect)
	if err := collecting(b, 1, 1, 0)(); err != nil {
		t.Error(err)
	}
	closeAndCheck(t, root, a, b, model{keptRef: {"dead"}})
}

// TestScheduleReadCollected: a reader that is open when its blob is collected returns all bytes. A
// later one reports that the blob is not found, not that it is damaged.
func TestScheduleReadCollected(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("an open file can't be deleted there")
	}
	root, a, b := twoHandles(t)
	body := noise(40, 3<<20)
	artifact, layer := oneLayer(t, a, newRef, body)
	loaded, err := a.Load(t.Context(), artifact.Reference()) // its manifest is still to be read
	if err != nil {
		t.Fatal(err)
	}
	early, err := artifact.OpenLayer(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	got := make([]byte, 1<<20)
	if _, err := io.ReadFull(early, got); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Remove(t.Context(), artifact.Reference()); err != nil {
		t.Fatal(err)
	}
	if err := collecting(b, 1, 2, 0)(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(early)
	if err != nil || !bytes.Equal(append(got, rest...), body) {
		t.Errorf("a reader that was open has %d more bytes, %v", len(rest), err)
	}
	for what, read := range map[string]func() error{
		"layer":    func() error { _, err := artifact.ReadLayer(t.Context(), layer); return err },
		"manifest": func() error { _, err := loaded.Manifest(t.Context()); return err },
		"blob":     func() error { _, err := a.OpenBlob(t.Context(), layer); return err },
	} {
		if err := read(); !errors.Is(err, ocilocal.ErrNotFound) || errors.Is(err, ocilocal.ErrDigestMismatch) {
			t.Errorf("%s: %v, want %v", what, err, ocilocal.ErrNotFound)
		}
	}
	closeAndCheck(t, root, a, b, model{})
}

// withdrawing stops one handle at the layer that only the artifact under newRef has, while another
// handle removes and collects that artifact.
func withdrawing(t *testing.T, call func(r *ocilocal.LocalRegistry, ref ocilocal.Reference) error) error {
	t.Helper()
	root, a, b := twoHandles(t)
	if err := publishing(a, newRef, "gone", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	ref := ocilocal.MustParseReference(newRef)
	held := stopAt(a, "open blobs/sha256/"+digest.FromString("gone").Encoded())
	done := held.start(t, func() error { return call(a, ref) })
	if _, err := b.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if err := collecting(b, 1, 3, 0)(); err != nil {
		t.Error(err)
	}
	close(held.let)
	err := outcome(t, done)
	if !errors.Is(err, ocilocal.ErrNotFound) || errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Errorf("of what was collected meanwhile: %v, want %v", err, ocilocal.ErrNotFound)
	}
	closeAndCheck(t, root, a, b, model{})
	return err
}

// TestScheduleExportCollected: if its artifact is collected meanwhile, an export fails, and its
// target holds nothing that looks complete.
func TestScheduleExportCollected(t *testing.T) {
	target := filepath.Join(t.TempDir(), "target")
	withdrawing(t, func(r *ocilocal.LocalRegistry, ref ocilocal.Reference) error {
		return r.ExportArchiveFile(context.Background(), target, []ocilocal.Reference{ref}, nil)
	})
	if left := tree(t, filepath.Dir(target)); len(left) > 0 {
		t.Errorf("a failed export leaves %q", left)
	}
	withdrawing(t, func(r *ocilocal.LocalRegistry, ref ocilocal.Reference) error {
		return r.ExportLayout(context.Background(), target, []ocilocal.Reference{ref}, nil)
	})
	for _, name := range []string{"oci-layout", "index.json"} {
		if _, err := os.Lstat(filepath.Join(target, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a failed export leaves %s (%v)", name, err)
		}
	}
}

// TestSchedulePushCollected: if its artifact is collected meanwhile, a push fails, and the registry
// has no manifest. If its artifact stays, a push does not notice the collection.
func TestSchedulePushCollected(t *testing.T) {
	s := newServer(t)
	push := func(r *ocilocal.LocalRegistry, ref ocilocal.Reference, to string) error {
		_, err := r.Push(context.Background(), ref, &ocilocal.PushOptions{Remote: &ocilocal.Remote{Retry: noRetry}, As: s.ref(to)})
		return err
	}
	withdrawing(t, func(r *ocilocal.LocalRegistry, ref ocilocal.Reference) error { return push(r, ref, "gone:v1") })
	if puts := s.requests("PUT /v2/gone/manifests"); len(puts) > 0 {
		t.Errorf("the manifest of an artifact that lacks a layer was sent: %q", puts)
	}
	root, a, b, _, _ := withOrphan(t)
	held := stopAt(a, "open blobs/sha256/"+inBoth.Encoded())
	done := held.start(t, func() error { return push(a, ocilocal.MustParseReference(keptRef), "kept:v1") })
	if err := collecting(b, 1, 1, 0)(); err != nil {
		t.Error(err)
	}
	close(held.let)
	checkOutcomes(t, done)
	if puts := s.requests("PUT /v2/kept/manifests/v1"); len(puts) != 1 {
		t.Errorf("manifests sent: %q", puts)
	}
	closeAndCheck(t, root, a, b, model{keptRef: {"kept"}})
}

// TestCollectClockSkew: the clock was a year ahead, or behind, when content was written. A collection
// with a grace keeps content that seems to come from the future. Without a grace, age does not matter.
func TestCollectClockSkew(t *testing.T) {
	for _, years := range []int{-1, 1} {
		t.Run(fmt.Sprint(years), func(t *testing.T) {
			root, a, b, _, _ := withOrphan(t)
			skewed := time.Now().AddDate(years, 0, 0)
			for _, d := range blobNames(t, a) {
				age(t, a, d, skewed)
				if err := os.Chtimes(blobFile(a, d), skewed, skewed); err != nil {
					t.Fatal(err)
				}
			}
			want := [2]int{} // manifests and blobs
			if years < 0 {
				want = [2]int{1, 1}
			}
			report := collect(t, a, nil)
			if got := [2]int{report.Deleted.Manifests, report.Deleted.Blobs}; got != want {
				t.Errorf("a collection with the default grace deletes %v, want %v", got, want)
			}
			if err := collecting(b, 1-want[0], 1-want[1], 0)(); err != nil {
				t.Error(err)
			}
			closeAndCheck(t, root, a, b, model{keptRef: {"kept"}})
		})
	}
}

// TestScheduleDropReferrersBesideCollector: a collector that keeps no referrers has deleted the file of
// one, and not yet its row, when another collector that keeps referrers reads the index.
func TestScheduleDropReferrersBesideCollector(t *testing.T) {
	root, a, b := twoHandles(t)
	image := published(t, a, "example.com/image:v1", "image", nil)
	signature := published(t, a, "example.com/signature:v1", "signature", image)
	if _, err := a.Remove(t.Context(), signature.Reference()); err != nil {
		t.Fatal(err)
	}
	held := stopAt(a, "remove blobs/sha256/"+digest.FromString("signature").Encoded())
	first := held.start(t, collectingBy(a, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: true}, 1, 1, 0))
	second := locked(t, b, func() error {
		report, err := b.GC(context.Background(), atOnce)
		if err == nil && len(report.Missing) > 0 {
			err = fmt.Errorf("the referrer is missed: %+v", report)
		}
		return err
	})
	close(held.let)
	checkOutcomes(t, first, second)
	closeAndCheck(t, root, a, b, model{"example.com/image:v1": {""}})
}

// TestScheduleWrittenAgainWithoutLinks: without hard links, a publisher that has settled cannot restore
// a file that a collector deletes. So a collector keeps a dead file that was written again since.
func TestScheduleWrittenAgainWithoutLinks(t *testing.T) {
	root, a, b, kept, dead := withOrphan(t)
	publisher := mustOpen(t, root)
	held := stopAt(a, marked(kept))
	collect := held.start(t, collecting(a, 0, 0, 2))
	if err := collecting(b, 1, 1, 0)(); err != nil {
		t.Fatal(err)
	}
	settled := &stop{reached: make(chan struct{}), let: make(chan struct{})}
	ocilocal.SetFault(publisher, func(op, name string) error {
		if op+" "+name == allSettled {
			settled.once.Do(func() {
				close(settled.reached)
				<-settled.let
			})
		}
		return noLinks(op, name)
	})
	publish := settled.start(t, publishing(publisher, newRef, "dead", ocilocal.KeepExisting))
	for _, d := range []digest.Digest{dead, digest.FromString("dead")} { // a file's time may come from a coarse clock
		now := time.Now()
		if err := os.Chtimes(blobFile(a, d), now, now); err != nil {
			t.Fatal(err)
		}
	}
	close(held.let)
	checkOutcomes(t, collect)
	close(settled.let)
	checkOutcomes(t, publish)
	mustClose(t, publisher)
	closeAndCheck(t, root, a, b, model{keptRef: {"kept"}, newRef: {"dead"}})
}

// TestScheduleImportCollected: a collection deletes content that an import has found in the
// registry. It runs at each operation of the import on a blob, up to the transaction.
func TestScheduleImportCollected(t *testing.T) {
	t.Parallel()
	from := openTemp(t, nil)
	a, err := build(t, from, keptRef, nil, "one", "two")
	if err != nil {
		t.Fatal(err)
	}
	refs := []ocilocal.Reference{a.Reference()}
	var archive bytes.Buffer
	dir, file := filepath.Join(t.TempDir(), "layout"), filepath.Join(t.TempDir(), "a.tar")
	if err := errors.Join(from.ExportArchive(t.Context(), &archive, refs, nil), from.ExportLayout(t.Context(), dir, refs, nil),
		from.ExportArchiveFile(t.Context(), file, refs, nil)); err != nil {
		t.Fatal(err)
	}
	for source, load := range map[string]func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error){
		"stream": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportArchive(t.Context(), bytes.NewReader(archive.Bytes()), nil)
		},
		"file": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportPath(t.Context(), file, nil)
		},
		"layout": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportPath(t.Context(), dir, nil)
		},
		"registry": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportRegistry(t.Context(), from, refs[0], nil)
		},
	} {
		t.Run(source, func(t *testing.T) {
			_, r, beside := twoHandles(t)
			for at, reached := 0, true; reached; at++ {
				if _, err := load(r); err != nil {
					t.Fatal(err)
				}
				if _, err := r.Remove(t.Context(), refs[0]); err != nil {
					t.Fatal(err)
				}
				var mu sync.Mutex
				n, settled, committing, deleted := 0, false, false, 0
				ocilocal.SetFault(r, func(op, name string) error {
					mu.Lock()
					defer mu.Unlock()
					settled = settled || op+" "+name == "fsyncdir blobs/sha256"
					committing = settled && (committing || op+" "+name == inTransaction)
					if !strings.HasPrefix(name, "blobs/") || committing {
						return nil
					}
					if n++; n != at {
						return nil
					}
					report, err := beside.GC(context.Background(), atOnce)
					if err == nil {
						deleted = report.Deleted.Blobs
					}
					return err
				})
				got, err := load(r)
				ocilocal.SetFault(r, nil)
				if err != nil {
					t.Fatalf("collection at operation %d: %v", at, err)
				}
				if reached = at <= n; reached && at > 0 && deleted == 0 || n < 5 {
					t.Errorf("collection at operation %d of %d has deleted nothing", at, n)
				}
				if got.BlobsWritten+got.BlobsReused != 4 {
					t.Errorf("collection at operation %d: %d blobs written, %d reused", at, got.BlobsWritten, got.BlobsReused)
				}
				if found := problems(t, r, nil, nil); len(found) > 0 {
					t.Errorf("collection at operation %d: %q", at, found)
				}
			}
		})
	}
}
