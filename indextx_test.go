package ocilocal_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestForeignLog puts another registry's write-ahead log beside an index. The two indexes are
// alike, so the pages of the log fit and SQLite itself finds nothing wrong.
func TestForeignLog(t *testing.T) {
	const moved = "example.com/log:v1"
	var roots [2]string
	for i := range roots {
		roots[i] = filepath.Join(t.TempDir(), "root")
		r := mustOpen(t, roots[i])
		if _, err := publishLabelled(r, moved, fmt.Sprint("label", i), ocilocal.KeepExisting, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
	}
	dontWatch(roots[0])
	r := mustOpen(t, roots[1])
	if _, err := publishLabelled(r, moved, "moved", ocilocal.Replace, []byte("moved")); err != nil {
		t.Fatal(err)
	}
	// SQLite's locks are on the index and on -shm: this file may be read while it is open.
	log, err := os.ReadFile(filepath.Join(roots[1], "index.sqlite3-wal"))
	if err != nil || len(log) == 0 {
		t.Fatal(len(log), err)
	}
	mustClose(t, r)
	name := filepath.Join(roots[0], "index.sqlite3")
	index, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{len(log), len(log) / 2, 20} {
		for what, open := range openers {
			write(t, name, string(index))
			write(t, name+"-wal", string(log[:n]))
			r, err := open(t.Context(), roots[0], nil)
			if err == nil {
				if label, err := readLabelled(r, moved); label != "label0" {
					t.Errorf("%s with %d bytes of another registry's log reads %q, %v", what, n, label, err)
				}
				mustClose(t, r)
			} else if !errors.Is(err, ocilocal.ErrForeignIndex) {
				t.Errorf("%s with %d bytes of another registry's log: %v, want ErrForeignIndex", what, n, err)
			}
			os.Remove(name + "-shm")
		}
	}
}
