package ocilocal_test

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestUnlockedBesideCopies: the lock of a directory ends with its release, although copies of its
// descriptor are open. A process that another goroutine starts has such copies between fork and
// exec, and so has a helper for credentials.
func TestUnlockedBesideCopies(t *testing.T) {
	r := openTemp(t, nil)
	lock := func() (release func() error) {
		t.Helper()
		release, held, err := ocilocal.TryLockDir(r, "blobs")
		if err != nil || !held {
			t.Fatalf("locked %v, %v", held, err)
		}
		return release
	}
	release := lock()
	if _, held, err := ocilocal.TryLockDir(r, "blobs"); held || err != nil {
		t.Errorf("it is not locked: %v, %v", held, err)
	}
	copies := 0
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if to, err := os.Readlink(name); err != nil || to != filepath.Join(r.Root(), "blobs") {
			continue
		}
		fd, err := strconv.Atoi(filepath.Base(name))
		if err != nil {
			t.Fatal(err)
		}
		if fd, err = syscall.Dup(fd); err != nil {
			t.Fatal(err)
		}
		copies++
		defer syscall.Close(fd)
	}
	if copies == 0 {
		t.Fatal("no descriptor was copied")
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if err := lock()(); err != nil {
		t.Error(err)
	}
}
