package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

const (
	keptRef  = "example.com/fault/kept:v1"
	movedRef = "example.com/fault/moved:v1"
)

// faulted is one run of an operation whose n-th file operation fails.
type faulted struct {
	n     int64
	errno error
	count atomic.Int64
	op    atomic.Value // what failed
}

func (f *faulted) fault(op, name string) error {
	if f.count.Add(1) != f.n {
		return nil
	}
	f.op.Store(op)
	return f.errno
}

func (f *faulted) hit() bool { return f.count.Load() >= f.n }

// TestFaultAtEveryOperation fails each file operation of a publish in turn,
// until there are no more, on a new handle each time, so that the operations
// of a first write are among them. Each failure must be typed, leave the ref
// as it was, and be over with its cause.
func TestFaultAtEveryOperation(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC, syscall.EACCES, syscall.EMFILE} {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			root := filepath.Join(t.TempDir(), "root")
			want := model{keptRef: {"kept"}, movedRef: {"before"}}
			r := mustOpen(t, root)
			for ref, labels := range want {
				if _, err := publishLabelled(r, ref, labels[0], ocilocal.KeepExisting, []byte("shared"), []byte(ref)); err != nil {
					t.Fatal(err)
				}
			}
			mustClose(t, r)
			ops := map[string]bool{}
			before := "before"
			for n := int64(1); ; n++ {
				if n > 200 {
					t.Fatal("publish takes more than 200 file operations")
				}
				r := mustOpen(t, root)
				f := &faulted{n: n, errno: errno}
				ocilocal.SetFault(r, f.fault)
				newRef, label := fmt.Sprintf("example.com/fault/new:r%d", n), fmt.Sprint("attempt", n)
				publish := func(ref string) error {
					_, err := publishLabelled(r, ref, label, ocilocal.Replace, []byte("shared"), []byte(label), []byte(ref+label))
					return err
				}
				err := publish(newRef)
				if !f.hit() {
					if err != nil {
						t.Fatalf("publish without a fault: %v", err)
					}
					want[newRef] = []string{label}
					mustClose(t, r)
					break
				}
				op, _ := f.op.Load().(string)
				ops[op] = true
				checkFault(t, err, errno, op, n)
				if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(newRef)); ok || err != nil {
					t.Errorf("operation %d (%s) failed, and the ref exists: %v, %v", n, op, ok, err)
				}

				// The same while a ref is moved: it stays where it was. The other
				// publish has made the session, so the operations are fewer here.
				f = &faulted{n: n, errno: errno}
				ocilocal.SetFault(r, f.fault)
				if err := publish(movedRef); f.hit() {
					op, _ := f.op.Load().(string)
					checkFault(t, err, errno, op, n)
				} else if err != nil {
					t.Fatalf("publish without a fault: %v", err)
				} else {
					before = label
				}
				for ref, label := range map[string]string{keptRef: "kept", movedRef: before} {
					if got, err := readLabelled(r, ref); got != label || err != nil {
						t.Errorf("after a fault at %d (%s): %s reads %q, %v; want %q", n, op, ref, got, err, label)
					}
				}

				// The cause is gone, and the same calls succeed, on the same handle.
				ocilocal.SetFault(r, nil)
				for _, ref := range []string{newRef, movedRef} {
					if err := publish(ref); err != nil {
						t.Fatalf("after a fault at %d (%s): %v", n, op, err)
					}
				}
				before = label
				want[newRef], want[movedRef] = []string{label}, []string{label}
				mustClose(t, r)
			}
			for _, op := range []string{"mkdir", "create", "write", "fsync", "link", "fsyncdir"} {
				if !ops[op] {
					t.Errorf("no %s was failed: the seam or this test misses it (seen: %v)", op, ops)
				}
			}
			checkStore(t, root, want)
		})
	}
}

func checkFault(t *testing.T, err error, errno syscall.Errno, op string, n int64) {
	t.Helper()
	if err == nil {
		t.Fatalf("operation %d (%s) failed, the publish did not", n, op)
	}
	if _, ok := errors.AsType[*ocilocal.Error](err); !ok || !errors.Is(err, errno) {
		t.Errorf("operation %d (%s): error %T %v is not typed, or not %v", n, op, err, err, errno)
	}
}

// TestFailedFsyncIsFinal: once an fsync has failed, nobody knows what is on the
// disk, and a second fsync would say that all is well. So a builder whose
// Build failed at one never publishes those files; a new builder, which writes
// the bytes again, does.
func TestFailedFsyncIsFinal(t *testing.T) {
	ctx := context.Background()
	for _, layers := range []int{1, 3} {
		t.Run(fmt.Sprint(layers), func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			r := mustOpen(t, root)
			parsed := ocilocal.MustParseReference(movedRef)
			fill := func(b *ocilocal.Builder) {
				for i := range layers {
					if _, err := b.AddLayer(ctx, "application/octet-stream", strings.NewReader(fmt.Sprint("layer ", i)), nil); err != nil {
						t.Fatal(err)
					}
				}
				if err := b.SetAnnotation(labelKey, "durable"); err != nil {
					t.Fatal(err)
				}
			}
			b, err := r.NewBuilder(parsed, &ocilocal.BuilderOptions{ArtifactType: testType})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			fill(b)
			var failed atomic.Bool
			ocilocal.SetFault(r, func(op, _ string) error {
				if op == "fsync" && !failed.Swap(true) {
					return syscall.EIO
				}
				return nil
			})
			if _, err := b.Build(ctx); !errors.Is(err, syscall.EIO) {
				t.Fatalf("fsync failed, Build returns %v", err)
			}
			// The seam counts what the second Build syncs of the files whose fsync failed.
			var synced atomic.Int64
			ocilocal.SetFault(r, func(op, _ string) error {
				if op == "fsync" {
					synced.Add(1)
				}
				return nil
			})
			if _, err := b.Build(ctx); err == nil && synced.Load() < int64(layers)+1 {
				t.Errorf("after a failed fsync a second Build succeeded with %d fsyncs of %d files", synced.Load(), layers+1)
			} else if err != nil && !errors.Is(err, syscall.EIO) {
				t.Errorf("second Build: %v, want the first one's EIO", err)
			} else if err == nil {
				t.Skip("the builder wrote and synced everything again")
			}
			if err := b.Cancel(); err != nil {
				t.Error(err)
			}
			ocilocal.SetFault(r, nil)
			b, err = r.NewBuilder(parsed, &ocilocal.BuilderOptions{ArtifactType: testType})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			fill(b)
			if _, err := b.Build(ctx); err != nil {
				t.Fatal(err)
			}
			mustClose(t, r)
			checkStore(t, root, model{movedRef: {"durable"}})
		})
	}
}
