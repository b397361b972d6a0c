package ocilocal_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// rootWithRef makes a registry with one ref, and closes it.
func rootWithRef(t *testing.T, root string) {
	t.Helper()
	r := mustOpen(t, root)
	if _, err := publishLabelled(r, keptRef, "kept", ocilocal.KeepExisting, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	dontWatch(root)
}

// loseAppID damages an index so that it is not recognised, and can still be read.
func loseAppID(t *testing.T, root string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(root, "index.sqlite3"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte{0}, 68)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestRebuildPaths rebuilds an index by each form of its root's path. The refs of the old index are
// kept.
func TestRebuildPaths(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Join(dir, "a"))
	if err := os.Symlink("root", "link"); err != nil {
		t.Fatal(err)
	}
	rootWithRef(t, filepath.Join(dir, "a", "root"))
	for _, path := range []string{"root", "./root", "../a/root", "root/", "b/../root", "link", filepath.Join(dir, "a", "root")} {
		loseAppID(t, "root")
		if _, err := ocilocal.Rebuild(t.Context(), path, nil); err != nil {
			t.Errorf("%q: %v", path, err)
		}
		r := mustOpen(t, "root")
		if label, err := readLabelled(r, keptRef); label != "kept" {
			t.Errorf("%q: the ref reads %q, %v", path, label, err)
		}
		mustClose(t, r)
	}
}

// TestSalvageKeeps rebuilds an index of which everything can still be read. The new index has the
// same holds, with their times, and the same entries of an index.json.
func TestSalvageKeeps(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	held := pushImage(t, repository(t, r, "localhost/app"), "", "held")
	m, _ := imageRows(t, "{}", "layer")
	pushImage(t, repository(t, r, "localhost/other"), "v1", "layer")
	if err := ocilocal.PublishAbsent(t.Context(), r, ref(keptRef), m, `{"platform":{"os":"linux"}}`); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	dontWatch(root)
	execIndex(t, root, "INSERT INTO unnamed SELECT id, 7, '{\"annotations\":{}}' FROM manifests WHERE id = "+sqlID(held.Digest))
	_, before := indexSays(t, root)
	loseAppID(t, root)
	report, err := ocilocal.Rebuild(t.Context(), root, nil)
	if err != nil || len(report.Recovered) != 2 || len(report.Left) != 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	_, after := indexSays(t, root)
	holds, entries := 0, 0
	for _, text := range before {
		switch {
		case strings.HasPrefix(text, "hold "), strings.HasPrefix(text, "unnamed "):
			if holds++; !slices.Contains(after, text) {
				t.Errorf("lost: %s", text)
			}
		case strings.HasPrefix(text, "ref ") && strings.HasSuffix(text, "}"):
			entries++
			if !slices.ContainsFunc(after, func(s string) bool {
				return strings.HasPrefix(s, "ref ") && strings.HasSuffix(s, `{"platform":{"os":"linux"}}`)
			}) {
				t.Errorf("lost its entry: %s", text)
			}
		}
	}
	if holds < 3 || entries != 1 {
		t.Errorf("%d holds and %d entries in %q", holds, entries, before)
	}
	r = mustOpen(t, root)
	defer mustClose(t, r)
	if ok, err := repository(t, r, "localhost/app").Exists(t.Context(), held); !ok || err != nil {
		t.Errorf("what the repository held: %v, %v", ok, err)
	}
}

// TestSalvageFails: an index that was set aside can't be opened, and may have refs. Rebuild reports
// that. When it runs again and can open the index, it keeps the refs.
func TestSalvageFails(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	rootWithRef(t, root)
	loseAppID(t, root)
	aside := filepath.Join(root, "index.sqlite3.broken")
	if err := os.Mkdir(aside+"-wal", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(root, "index.sqlite3"), aside); err != nil { // a rebuild was killed here
		t.Fatal(err)
	}
	for range 2 {
		if _, err := ocilocal.Rebuild(t.Context(), root, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
			t.Fatalf("%v, want ErrForeignIndex", err)
		}
	}
	if err := os.Remove(aside + "-wal"); err != nil {
		t.Fatal(err)
	}
	if _, err := ocilocal.Rebuild(t.Context(), root, nil); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, root)
	if label, err := readLabelled(r, keptRef); label != "kept" {
		t.Errorf("the ref reads %q, %v", label, err)
	}
	mustClose(t, r)
}

// hostileRefs are objects in the place of the table refs. Each decides what a query of it finds, or
// never lets it end. DIGEST stands for the name of the column with the manifest.
var hostileRefs = map[string]string{
	"endless view": `CREATE VIEW refs AS WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)
		SELECT 'x.test/a' AS name, 'v' || x AS reference, 'sha256:' AS DIGEST, '' AS updated_at FROM n`,
	"endless view without rows": `CREATE VIEW refs AS WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)
		SELECT 'x.test/a' AS name, 'v' || x AS reference, 'sha256:' AS DIGEST, '' AS updated_at FROM n WHERE x < 0`,
	"virtual table":    `CREATE VIRTUAL TABLE refs USING fts5(name, reference, DIGEST, updated_at)`,
	"generated column": `CREATE TABLE refs (name TEXT, reference TEXT, DIGEST TEXT AS (name || hex(zeroblob(1000000))), updated_at TEXT)`,
	"other columns":    `CREATE TABLE refs (name TEXT, reference TEXT, other TEXT)`,
	"nothing":          `CREATE TABLE other (DIGEST TEXT)`,
}

// TestRebuildHostileIndex rebuilds from indexes in which refs is not a plain table. None of them is
// read.
func TestRebuildHostileIndex(t *testing.T) {
	t.Parallel()
	for what, text := range hostileRefs {
		root := filepath.Join(t.TempDir(), "root")
		rootWithRef(t, root)
		name := filepath.Join(root, "index.sqlite3")
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		execIndex(t, root, strings.ReplaceAll(text, "DIGEST", "manifest")+"; PRAGMA user_version = 1")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		report, err := ocilocal.Rebuild(ctx, root, nil)
		cancel()
		if err != nil || len(report.Recovered) != 1 {
			t.Errorf("%s: %+v, %v", what, report, err)
		}
	}
}
