//go:build unix

package ocilocal_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// TestExportLayoutForeignLock locks the target directory, as any user who may read it can. The
// export does not wait for that lock. Two exports still wait for each other.
func TestExportLayoutForeignLock(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	dir := t.TempDir()
	refs := []ocilocal.Reference{ref("example.com/a:v1")}
	hold := func(name string) *os.File {
		f, err := os.Open(name)
		if err == nil {
			err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	hold(dir)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // not reached unless the export waits
	defer cancel()
	if err := r.ExportLayout(ctx, dir, refs, nil); err != nil {
		t.Errorf("beside a lock of the directory: %v", err)
	}
	lock := filepath.Join(dir, ".ocilocal-tmp")
	if _, err := os.Lstat(lock); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock is left: %v", err)
	}
	if err := os.Mkdir(lock, 0o700); err != nil {
		t.Fatal(err)
	}
	other := hold(lock)
	ctx, cancel = context.WithCancel(t.Context())
	tries := 0
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "open" && name == ".ocilocal-tmp" {
			if tries++; tries == 2 { // it has waited once
				cancel()
			}
		}
		return nil
	})
	if err := r.ExportLayout(ctx, dir, refs, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("beside another export: %v", err)
	}
	ocilocal.SetFault(r, nil)
	other.Close()
	if err := r.ExportLayout(t.Context(), dir, refs, nil); err != nil {
		t.Errorf("after another export: %v", err)
	}
}

// TestExportLayoutLockIsLink puts a link and a file where the lock is made. Neither is followed or
// removed.
func TestExportLayoutLockIsLink(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	for name, put := range map[string]func(at string) error{
		"link": func(at string) error { return os.Symlink("blobs", at) },
		"file": func(at string) error { return os.WriteFile(at, nil, 0o600) },
		"fifo": func(at string) error { return syscall.Mkfifo(at, 0o600) },
	} {
		dir := t.TempDir()
		at := filepath.Join(dir, ".ocilocal-tmp")
		if err := put(at); err != nil {
			t.Fatal(err)
		}
		if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref("example.com/a:v1")}, nil); !errors.Is(err, ocilocal.ErrInvalidLayout) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Lstat(at); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
