package ocilocal_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestHostileLayoutFiles puts a named pipe, a socket or a device in the place of each file of a
// layout. The import fails, and does not wait for it.
func TestHostileLayoutFiles(t *testing.T) {
	manifest, config := image("layer")
	l := blobEntry("layer")
	for kind, mode := range map[string]uint32{"fifo": syscall.S_IFIFO, "socket": syscall.S_IFSOCK, "device": syscall.S_IFCHR} {
		for _, at := range []string{"oci-layout", "index.json", l.name} {
			t.Run(kind+" "+filepath.Base(at), func(t *testing.T) {
				r := openTemp(t, nil)
				dir := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), l, layoutIndex(manifest, "example.com/a:v1"))
				name := filepath.Join(dir, filepath.FromSlash(at))
				const devZero = 1<<8 | 5
				if err := errors.Join(os.Remove(name), syscall.Mknod(name, mode|0o644, devZero)); err != nil {
					if kind == "device" && os.Getuid() != 0 {
						t.Skip(err)
					}
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() {
					_, err := r.ImportLayout(t.Context(), dir, nil)
					done <- err
				}()
				if err := outcome(t, done); !errors.Is(err, ocilocal.ErrInvalidLayout) {
					t.Errorf("%v, want ErrInvalidLayout", err)
				}
				checkNothingVisible(t, r)
			})
		}
	}
}

// TestFIFODirectories gives a named pipe to each call that takes a directory or an archive. Every
// call fails, and none waits for a writer of the pipe.
func TestFIFODirectories(t *testing.T) {
	ctx := t.Context()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	r := openTemp(t, &ocilocal.Options{LegacyRoot: fifo})
	refs := []ocilocal.Reference{published(t, r, "example.com/a:v1", "one", nil).Reference()}
	for name, call := range map[string]func() error{
		"import layout":  func() error { _, err := r.ImportLayout(ctx, fifo, nil); return err },
		"inspect layout": func() error { _, err := ocilocal.InspectLayout(ctx, fifo); return err },
		"import archive": func() error { _, err := r.ImportArchiveFile(ctx, fifo, nil); return err },
		"load path":      func() error { _, err := r.LoadPath(ctx, fifo, nil); return err },
		"load":           func() error { _, err := r.Load(ctx, ref("example.com/b:v1")); return err },
		"import legacy":  func() error { _, err := r.ImportLegacy(ctx, fifo, nil); return err },
		"import OMMX":    func() error { _, err := r.ImportOMMX(ctx, fifo, nil); return err },
		"export layout":  func() error { return r.ExportLayout(ctx, fifo, refs, nil) },
		"export archive": func() error { return r.ExportArchiveFile(ctx, filepath.Join(fifo, "x.tar"), refs, nil) },
	} {
		done := make(chan error, 1)
		go func() { done <- call() }()
		if err := outcome(t, done); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestOwnIndexAsSource gives the registry's index to each call that reads a file. The call must
// refuse it before it opens it, because closing it would drop SQLite's locks.
func TestOwnIndexAsSource(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "one", nil)
	index := filepath.Join(r.Root(), "index.sqlite3")
	linked := filepath.Join(t.TempDir(), "linked.tar")
	if err := os.Symlink(index, linked); err != nil {
		t.Fatal(err)
	}
	before := posixLocks(t, index)
	if before == 0 {
		t.Fatal("SQLite holds no lock")
	}
	for _, name := range []string{index, index + "-wal", index + "-shm", linked} {
		b, err := r.NewBuilder(ref("example.com/b:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
		if err != nil {
			t.Fatal(err)
		}
		_, importErr := r.ImportArchiveFile(ctx, name, nil)
		_, loadErr := r.LoadPath(ctx, name, nil)
		_, layerErr := b.AddLayerFile(ctx, "text/plain", name, nil)
		for _, err := range []error{importErr, loadErr, layerErr, b.Cancel()} {
			if err != nil && !errors.Is(err, ocilocal.ErrInvalidArgument) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if importErr == nil || loadErr == nil || layerErr == nil {
			t.Errorf("%s was read: %v, %v, %v", name, importErr, loadErr, layerErr)
		}
	}
	if after := posixLocks(t, index); after != before {
		t.Errorf("SQLite had %d locks and has %d", before, after)
	}
}

// posixLocks counts the locks that processes hold on a file.
func posixLocks(t *testing.T, name string) (n int) {
	t.Helper()
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Skip(err)
	}
	inode := fmt.Sprintf(":%d ", fi.Sys().(*syscall.Stat_t).Ino)
	for line := range strings.Lines(string(locks)) {
		if strings.Contains(line, "POSIX") && strings.Contains(line, inode) {
			n++
		}
	}
	return n
}
