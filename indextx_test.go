package ocilocal_test

import (
	"database/sql"
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

// TestStamp: a transaction that changes rows counts itself, however many rows it changes. One that
// changes none writes nothing.
func TestStamp(t *testing.T) {
	r := openTemp(t, nil)
	db, err := sql.Open("sqlite", filepath.Join(r.Root(), "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	want := 0
	for i, rows := range []int{0, 1, 0, 2, 1, 1, 0, 0, 3, 0, 1} {
		err := ocilocal.IndexWrite(t.Context(), r, func(exec func(string) error) error {
			for n := range rows {
				if err := put(fmt.Sprint(i, n))(exec); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if rows > 0 {
			want++
		}
		var got int
		if err := db.QueryRow("SELECT coalesce(max(value), 0) FROM meta WHERE key = 'commits'").Scan(&got); err != nil || got != want {
			t.Fatalf("after transaction %d with %d rows: %d commits counted, want %d (%v)", i, rows, got, want, err)
		}
	}
}
