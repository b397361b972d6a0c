package ocilocal_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestMigratedWhileOpen: a program that has an index open does not write to it after a newer
// program has migrated it.
func TestMigratedWhileOpen(t *testing.T) {
	r := openTemp(t, nil)
	if _, err := build(t, r, "example.com/a:v1", nil, "x"); err != nil {
		t.Fatal(err)
	}
	alterIndex(t, filepath.Join(r.Root(), "index.sqlite3"), "PRAGMA user_version = 99")
	for range 2 {
		if _, err := build(t, r, "example.com/a:v2", nil, "y"); !errors.Is(err, ocilocal.ErrNewerSchema) {
			t.Errorf("build: %v", err)
		}
	}
	alterIndex(t, filepath.Join(r.Root(), "index.sqlite3"), "PRAGMA user_version = 2")
	if _, err := build(t, r, "example.com/a:v2", nil, "y"); err != nil {
		t.Error(err)
	}
}

// TestReadAfterMigration: if a newer program has changed the tables, a read by an older one that
// has the index open fails with a SchemaError. It does not report damage.
func TestReadAfterMigration(t *testing.T) {
	r := openTemp(t, nil)
	dontWatch(r.Root())
	published(t, r, "example.com/a:v1", "layer", nil)
	alterIndex(t, filepath.Join(r.Root(), "index.sqlite3"), "ALTER TABLE refs RENAME COLUMN size TO bytes", "ALTER TABLE content RENAME TO blobs", "PRAGMA user_version = 3")
	_, err := r.Resolve(t.Context(), ref("example.com/a:v1"))
	_, statsErr := r.Stats(t.Context())
	for _, err := range []error{err, statsErr, last(r.Refs(t.Context(), nil)), last(r.Verify(t.Context(), nil))} {
		if !errors.Is(err, ocilocal.ErrNewerSchema) || errors.Is(err, ocilocal.ErrCorruptIndex) {
			t.Errorf("%v, want ErrNewerSchema", err)
		}
	}
}

// TestMigration: a newer program migrates an index, wholly or not at all. Older programs refuse it
// from then on.
func TestMigration(t *testing.T) {
	ctx := t.Context()
	const table = "CREATE TABLE extra (a TEXT NOT NULL) STRICT"
	root := t.TempDir()
	old := mustOpen(t, root)
	a := published(t, old, "example.com/a:v1", "layer", nil)
	const known = 2 // schema version of this program
	version := func(want int) {
		t.Helper()
		if writer, _, err := ocilocal.IndexPragma(old, "user_version"); want > known {
			if e, ok := errors.AsType[*ocilocal.SchemaError](err); !ok || e.Found != want || e.Supported != known {
				t.Errorf("an older program writes to version %d: %v", want, err)
			}
		} else if err != nil || writer != fmt.Sprint(want) {
			t.Errorf("version is %s, %v", writer, err)
		}
	}
	if _, err := ocilocal.OpenReadOnly(ctx, root, ocilocal.NewerSchema(table)); !errors.Is(err, ocilocal.ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	if _, err := ocilocal.Open(ctx, root, ocilocal.NewerSchema(table, "CREATE TABLE refs (a)")); !errors.Is(err, ocilocal.ErrCorruptIndex) {
		t.Errorf("a migration that fails: %v", err)
	}
	version(known)
	if _, err := ocilocal.Open(ctx, root, ocilocal.NewerSchema(table, "CREATE TABLE extra (a)")); err == nil {
		t.Error("a migration that fails in its second statement succeeds")
	}
	version(known)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			r, err := ocilocal.Open(ctx, root, ocilocal.NewerSchema(table))
			if err != nil {
				t.Error(err)
				return
			}
			defer mustClose(t, r)
			if got, err := r.Load(ctx, a.Reference()); err != nil || got.Digest() != a.Digest() {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	version(known + 1)
	mustClose(t, old)
	if _, err := ocilocal.Open(ctx, root, nil); !errors.Is(err, ocilocal.ErrNewerSchema) {
		t.Errorf("an older program opens it: %v", err)
	}
	r, err := ocilocal.Open(ctx, root, ocilocal.NewerSchema(table))
	if err != nil {
		t.Fatal(err)
	}
	published(t, r, "example.com/a:v2", "more", nil)
	mustClose(t, r)
	fresh := filepath.Join(t.TempDir(), "fresh")
	for range 2 {
		r, err := ocilocal.Open(ctx, fresh, ocilocal.NewerSchema(table))
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
	}
}
