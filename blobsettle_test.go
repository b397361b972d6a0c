package ocilocal_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestSharedSync: calls that come during an fsync wait for the next one, which they share with its
// error. The one under way may have begun before they did.
func TestSharedSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := errors.New("failed")
		began, end := make(chan int), make(chan error)
		n := 0
		sync := ocilocal.SharedSync(func() error {
			n++
			began <- n
			return <-end
		})
		results := make(chan error, 8)
		call := func() { results <- sync() }
		go call()
		<-began
		for range 3 {
			go call()
		}
		synctest.Wait()
		if len(results) > 0 {
			t.Fatal("a call came back during an fsync that began before it")
		}
		end <- nil
		if err := <-results; err != nil {
			t.Fatal(err)
		}
		<-began
		go call() // too late for the second
		synctest.Wait()
		end <- failed
		for range 3 {
			if err := <-results; err != failed {
				t.Fatal(err)
			}
		}
		if <-began != 3 {
			t.Fatal(n)
		}
		end <- nil
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	})
}

// TestPutBackDurably: a collector deletes a blob right before the commit, and the publish restores
// it from its staged file. That file was not synced before, because the store had the blob.
func TestPutBackDurably(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a directory isn't synced there")
	}
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	if _, err := publishLabelled(r, newRef, "held", ocilocal.KeepExisting, []byte("body")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Remove(t.Context(), ocilocal.MustParseReference(newRef)); err != nil {
		t.Fatal(err)
	}
	b := heldBuilder(t, r, "body")
	rec := &record{}
	ocilocal.SetFault(r, func(op, name string) error {
		if op+" "+name == inTransaction {
			rec.ops = nil
			return os.Remove(blobFile(r, digest.FromString("body")))
		}
		return rec.fault(op, name)
	})
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	var done []string
	for _, op := range rec.ops {
		verb, name, _ := strings.Cut(op, " ")
		if verb == "fsync" || verb == "link" || verb == "fsyncdir" {
			dir, _, _ := strings.Cut(name, "/")
			done = append(done, verb+" "+dir)
		}
	}
	if want := []string{"fsync tmp", "link blobs", "fsyncdir blobs"}; !slices.Equal(done, want) {
		t.Errorf("in the transaction: %q, want %q", done, want)
	}
	mustClose(t, r)
	checkStore(t, root, model{newRef: {"held"}})
}

// TestFailedDirectorySync: a publish names its blobs, fails to make the names durable, and returns
// an error. The next publish finds the blobs, and syncs files and directory again before it relies
// on them.
func TestFailedDirectorySync(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a directory isn't synced there")
	}
	root := filepath.Join(t.TempDir(), "root")
	a, b := mustOpen(t, root), mustOpen(t, root)
	ocilocal.SetFault(a, func(op, name string) error {
		if op+" "+name == allSettled {
			return syscall.EIO
		}
		return nil
	})
	if _, err := publishLabelled(a, newRef, "label", ocilocal.KeepExisting, []byte("layer")); err == nil {
		t.Fatal("a publish whose names may not be durable succeeds")
	}
	blobs := filesBelow(t, a, "blobs")
	if len(blobs) != 3 {
		t.Fatalf("this test is about names that stay behind: %q", blobs)
	}
	rec := &record{}
	ocilocal.SetFault(b, rec.fault)
	if _, err := publishLabelled(b, newRef, "label", ocilocal.KeepExisting, []byte("layer")); err != nil {
		t.Fatal(err)
	}
	commit := slices.Index(rec.ops, inTransaction)
	for _, name := range blobs {
		name, _ = filepath.Rel(root, name)
		if at := rec.last("fsync "+filepath.ToSlash(name), commit); at < 0 || rec.last(allSettled, commit) < at {
			t.Errorf("%s isn't synced again before the commit: %q", name, rec.ops)
		}
	}
	mustClose(t, a)
	mustClose(t, b)
	checkStore(t, root, model{newRef: {"label"}})
}
