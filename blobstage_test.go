package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestFailedFsyncIsFinal: after a failed fsync it is not known which bytes are on the disk, and a
// second fsync would report success. So a builder whose Build failed there never publishes those
// files. A new builder writes the bytes again, and succeeds.
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
			// The seam counts whether the second Build syncs the files whose fsync failed.
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

// manyLayers is a layout of one artifact with n layers.
func manyLayers(t *testing.T, ref ocilocal.Reference, n int) (dir string) {
	t.Helper()
	var layers [][]byte
	for i := range n {
		layers = append(layers, fmt.Append(nil, "layer ", i))
	}
	r := openTemp(t, nil)
	pushed(t, r, ref, nil, nil, layers...)
	dir = filepath.Join(t.TempDir(), "layout")
	if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref}, nil); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestFailedFsyncOfAnyBatch: files are synced 64 at a time while the next are written. If any fsync
// of any batch fails, the import fails. The next import succeeds.
func TestFailedFsyncOfAnyBatch(t *testing.T) {
	t.Parallel()
	const layers = 150
	ref := ocilocal.MustParseReference(movedRef)
	dir := manyLayers(t, ref, layers)
	for _, at := range []int64{1, 64, 65, 128, 129, layers + 2} {
		r := openTemp(t, nil)
		var synced atomic.Int64
		ocilocal.SetFault(r, func(op, _ string) error {
			if op == "fsync" && synced.Add(1) == at {
				return syscall.EIO
			}
			return nil
		})
		if _, err := r.ImportLayout(t.Context(), dir, nil); !errors.Is(err, syscall.EIO) {
			t.Errorf("fsync %d failed, the import returns %v", at, err)
		}
		ocilocal.SetFault(r, nil)
		checkNothingVisible(t, r)
		if _, err := r.ImportLayout(t.Context(), dir, nil); err != nil {
			t.Errorf("after the failure: %v", err)
		}
		checkSound(t, r)
	}
}

// TestFewUnsyncedFiles: however many blobs come in, only few files are open and wait for their
// fsync.
func TestFewUnsyncedFiles(t *testing.T) {
	t.Parallel()
	dir := manyLayers(t, ocilocal.MustParseReference(movedRef), 500)
	r := openTemp(t, nil)
	var mu sync.Mutex
	unsynced, most := 0, 0
	ocilocal.SetFault(r, func(op, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		switch op {
		case "create":
			unsynced++
		case "fsync":
			unsynced--
		}
		most = max(most, unsynced)
		return nil
	})
	if _, err := r.ImportLayout(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	// One batch that is being synced, one that is full, and the files that the workers write.
	if most > 2*64+8 || most < 64 {
		t.Errorf("%d files waited for their fsync at once", most)
	}
}

// TestHealUnreadable imports the same content over a blob that the disk can't read.
func TestHealUnreadable(t *testing.T) {
	r := openTemp(t, nil)
	a, layer := oneLayer(t, r, "example.com/a:v1", []byte("body"))
	var archive bytes.Buffer
	if err := r.ExportArchive(t.Context(), &archive, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	bad, err := os.Stat(blobFile(r, layer.Digest))
	if err != nil {
		t.Fatal(err)
	}
	ocilocal.SetFault(r, func(op, name string) error {
		if now, err := os.Stat(filepath.Join(r.Root(), name)); op == "open" && err == nil && os.SameFile(bad, now) {
			return syscall.EIO
		}
		return nil
	})
	if _, err := r.ImportArchive(t.Context(), &archive, nil); err != nil {
		t.Fatal(err)
	}
	if got, err := a.ReadLayer(t.Context(), layer); err != nil || string(got) != "body" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestHeal publishes the same content over damaged blobs, which are replaced.
func TestHeal(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	body := noise(4, 100_000)
	heal := map[string]func(r *ocilocal.LocalRegistry, archive []byte) error{
		"reader": func(r *ocilocal.LocalRegistry, _ []byte) error {
			_, err := build(t, r, "example.com/a:v1", nil, string(body))
			return err
		},
		"bytes": func(r *ocilocal.LocalRegistry, _ []byte) error {
			b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/a:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
			if err != nil {
				return err
			}
			if _, err := b.AddLayerBytes(ctx, "text/plain", body, nil); err != nil {
				return err
			}
			_, err = b.Build(ctx)
			return err
		},
		"import": func(r *ocilocal.LocalRegistry, archive []byte) error {
			_, err := r.ImportArchive(ctx, bytes.NewReader(archive), nil)
			return err
		},
	}
	for name, again := range heal {
		for _, c := range damages {
			t.Run(name+" "+c.name, func(t *testing.T) {
				r := openTemp(t, nil)
				a, layer := oneLayer(t, r, "example.com/a:v1", body)
				var archive bytes.Buffer
				if err := r.ExportArchive(ctx, &archive, []ocilocal.Reference{a.Reference()}, nil); err != nil {
					t.Fatal(err)
				}
				for _, d := range []digest.Digest{layer.Digest, a.Digest()} {
					if c.change != nil {
						rewrite(t, blobFile(r, d), c.change)
					} else if err := os.Remove(blobFile(r, d)); err != nil {
						t.Fatal(err)
					}
				}
				if err := again(r, archive.Bytes()); err != nil {
					t.Fatal(err)
				}
				got, err := r.Load(ctx, a.Reference())
				if err != nil {
					t.Fatal(err)
				}
				if b, err := got.ReadLayer(ctx, layer); err != nil || !bytes.Equal(b, body) {
					t.Fatalf("%d bytes, %v", len(b), err)
				}
				if left := filesBelow(t, r, "tmp"); len(left) > 0 {
					t.Errorf("left in tmp: %q", left)
				}
			})
		}
	}
}

// TestDedup publishes content that the store has partly. The blob that it has is not written again.
func TestDedup(t *testing.T) {
	r := openTemp(t, nil)
	body := noise(5, 50_000)
	_, layer := oneLayer(t, r, "example.com/a:v1", body)
	before, err := os.Stat(blobFile(r, layer.Digest))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := build(t, r, "example.com/b:v1", nil, string(body), "other", string(body)); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(blobFile(r, layer.Digest))
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the shared layer's file was written again: %v", err)
	}
	// Two manifests, two layers, and the config that both have.
	if files := filesBelow(t, r, "blobs"); len(files) != 5 {
		t.Errorf("blobs/ holds %q", files)
	}
	if left := filesBelow(t, r, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %q", left)
	}
}

// TestCollectedBeforeCommit deletes blobs where a garbage collector of another
// process could: after they got their names and before a row makes them reachable.
func TestCollectedBeforeCommit(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a directory isn't synced there, so the seam isn't reached")
	}
	for name, c := range map[string]struct {
		there bool // the layer is in the store already
		bytes bool // by AddLayerBytes, which finds that out at once
	}{"new": {}, "new bytes": {bytes: true}, "streamed again": {there: true}, "bytes again": {there: true, bytes: true}} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			r := openTemp(t, nil)
			body := noise(10, 70_000)
			if c.there {
				oneLayer(t, r, "example.com/old:v1", body)
				if _, err := r.Remove(ctx, ocilocal.MustParseReference("example.com/old:v1")); err != nil {
					t.Fatal(err)
				}
			}
			b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/a:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.other"})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			var layer ocispec.Descriptor
			if c.bytes {
				layer, err = b.AddLayerBytes(ctx, "text/plain", body, nil)
			} else {
				layer, err = b.AddLayer(ctx, "text/plain", bytes.NewReader(body), nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			deleted := 0
			ocilocal.SetFault(r, func(op, name string) error {
				if op != "fsyncdir" || name != "blobs/sha256" || deleted > 0 {
					return nil
				}
				for _, f := range filesBelow(t, r, "blobs") {
					if err := os.Remove(f); err != nil {
						return err
					}
					deleted++
				}
				return nil
			})
			a, err := b.Build(ctx)
			ocilocal.SetFault(r, nil)
			if err != nil || deleted < 2 {
				t.Fatalf("%v, with %d blobs deleted", err, deleted)
			}
			loaded, err := r.LoadDigest(ctx, a.Digest())
			if err != nil {
				t.Fatal(err)
			}
			if got, err := loaded.ReadLayer(ctx, layer); err != nil || !bytes.Equal(got, body) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if left := filesBelow(t, r, "tmp"); len(left) > 0 {
				t.Errorf("left in tmp: %q", left)
			}
		})
	}
}
