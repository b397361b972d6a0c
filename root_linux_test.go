package ocilocal_test

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestUnlockedBesideCopies: the lock of a directory or file ends with its release, although copies
// of its descriptor are open. A process that another goroutine starts has such copies between fork
// and exec, and so has a helper for credentials.
func TestUnlockedBesideCopies(t *testing.T) {
	for name, tryLock := range map[string]func(r *ocilocal.LocalRegistry, name string) (func() error, bool, error){
		"blobs": ocilocal.TryLockDir,
		"id":    ocilocal.TryLockFile,
	} {
		r := openTemp(t, nil)
		lock := func() (release func() error) {
			t.Helper()
			release, held, err := tryLock(r, name)
			if err != nil || !held {
				t.Fatalf("%s is locked %v, %v", name, held, err)
			}
			return release
		}
		release := lock()
		if _, held, err := tryLock(r, name); held || err != nil {
			t.Errorf("%s is not locked: %v, %v", name, held, err)
		}
		copies := 0
		fds, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range fds {
			if to, err := os.Readlink(at); err != nil || to != filepath.Join(r.Root(), name) {
				continue
			}
			fd, err := strconv.Atoi(filepath.Base(at))
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
}
