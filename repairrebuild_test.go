package ocilocal_test

import (
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestRebuildIncomplete loses the index and some blobs. Rebuild reports the artifacts that need
// these blobs, and collections delete nothing. Repair with a source of the blobs restores the
// artifacts.
func TestRebuildIncomplete(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	dontWatch(r.Root())
	manifest, config := image("layer")
	index := imageIndex(imageType, manifest)
	archive := filepath.Join(t.TempDir(), "a.tar")
	write(t, archive, string(archiveOf(t, "application/vnd.oci.image.index.v1+json", index, manifest, config, "layer")))
	if _, err := r.ImportArchiveFile(ctx, archive, nil); err != nil {
		t.Fatal(err)
	}
	before := blobNames(t, r)
	mustClose(t, r)
	for _, name := range []string{filepath.Join(r.Root(), "index.sqlite3"), blobFile(r, digest.FromString(manifest)), blobFile(r, digest.FromString("layer"))} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time there is an index
		report, err := ocilocal.Rebuild(ctx, r.Root(), nil)
		if err != nil || len(report.Recorded) != 0 || len(report.Left) != 2 || report.Left[1].Digest != digest.FromString(manifest) {
			t.Errorf("%v, %+v", err, report)
		}
		r = mustOpen(t, r.Root())
		if _, err := r.GC(ctx, atOnce); !errors.Is(err, ocilocal.ErrUnsafe) {
			t.Error(err)
		}
		mustClose(t, r)
	}
	report, err := ocilocal.Rebuild(ctx, r.Root(), &ocilocal.RepairOptions{Sources: []string{archive}})
	if err != nil || len(report.Healed) != 2 || len(report.Recorded) != 2 || len(report.Recovered) != 1 || len(report.Left) != 0 {
		t.Errorf("%v, %+v", err, report)
	}
	r = mustOpen(t, r.Root())
	defer mustClose(t, r)
	collect(t, r, atOnce)
	if !slices.Equal(before, blobNames(t, r)) {
		t.Error("not all is there")
	}
	if got := problems(t, r, nil, nil); len(got) != 0 {
		t.Errorf("found %q", got)
	}
}

// TestRebuildWithoutID: a root that has lost its file id keeps its refs if its index can be
// recognised. Otherwise the index is not touched until somebody renames it.
func TestRebuildWithoutID(t *testing.T) {
	for name, damage := range map[string]func(b []byte) []byte{"sound": nil, "damaged": func(b []byte) []byte {
		copy(b, "no SQLite format") // where its name is
		return b
	}} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			r := mustOpen(t, root)
			a, _ := oneLayer(t, r, keptRef, []byte("body"))
			mustClose(t, r)
			if err := os.Remove(filepath.Join(root, "id")); err != nil {
				t.Fatal(err)
			}
			index := filepath.Join(root, "index.sqlite3")
			if damage != nil {
				rewrite(t, index, damage)
				before := tree(t, root)
				if _, err := ocilocal.Rebuild(t.Context(), root, nil); !errors.Is(err, ocilocal.ErrForeignIndex) || !strings.Contains(err.Error(), "index.sqlite3.broken") {
					t.Error(err)
				}
				if !maps.Equal(tree(t, root), before) {
					t.Error("the root is another")
				}
				if err := os.Rename(index, index+".broken"); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := ocilocal.Rebuild(t.Context(), root, nil); err != nil {
				t.Fatal(err)
			}
			r = mustOpen(t, root)
			defer mustClose(t, r)
			if damage != nil { // its refs can't be read
				if _, err := r.ResolveDigest(t.Context(), a.Digest()); err != nil {
					t.Error(err)
				}
				return
			}
			if d, err := r.Resolve(t.Context(), a.Reference()); err != nil || d.Digest != a.Digest() {
				t.Errorf("%v, %v", d, err)
			}
		})
	}
}

// TestRebuildForeignIndex: the index of another program is left where it is, also where that
// program has directories and a file with the names of a registry, and also if it is damaged.
func TestRebuildForeignIndex(t *testing.T) {
	for name, id := range map[string]string{"no id": "", "prose": "thesis notes\n", "number": "42\n"} {
		for _, length := range []int64{-1, 0, 10, 100, 1000, 5000} {
			t.Run(fmt.Sprintf("%s, %d", name, length), func(t *testing.T) {
				root := t.TempDir()
				if err := os.MkdirAll(filepath.Join(root, "blobs", "sha256"), 0o755); err != nil {
					t.Fatal(err)
				}
				if id != "" {
					write(t, filepath.Join(root, "id"), id)
				}
				index := filepath.Join(root, "index.sqlite3")
				db, err := sql.Open("sqlite", index)
				if err == nil {
					_, err = db.Exec("CREATE TABLE notes (text TEXT); INSERT INTO notes VALUES ('thesis')")
				}
				if err == nil {
					err = db.Close()
				}
				if err == nil && length >= 0 {
					err = os.Truncate(index, length)
				}
				if err != nil {
					t.Fatal(err)
				}
				before := tree(t, root)
				if _, err := ocilocal.Rebuild(t.Context(), root, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
					t.Error(err)
				}
				if !maps.Equal(tree(t, root), before) {
					t.Error("the directory is another")
				}
			})
		}
	}
}

// TestRebuild loses or damages the whole index, and makes a new one from the blobs.
func TestRebuild(t *testing.T) {
	t.Parallel()
	index := func(r *ocilocal.LocalRegistry) string { return filepath.Join(r.Root(), "index.sqlite3") }
	for what, c := range map[string]struct {
		damage func(t *testing.T, r *ocilocal.LocalRegistry)
		named  bool // refs are salvaged
	}{
		"lost":        {func(t *testing.T, r *ocilocal.LocalRegistry) { os.Remove(index(r)) }, false},
		"header gone": {func(t *testing.T, r *ocilocal.LocalRegistry) { write(t, index(r), "no database") }, false},
		"empty":       {func(t *testing.T, r *ocilocal.LocalRegistry) { write(t, index(r), "") }, false},
		"trigger": {func(t *testing.T, r *ocilocal.LocalRegistry) {
			execIndex(t, r.Root(), "CREATE TRIGGER x AFTER INSERT ON refs BEGIN DELETE FROM refs; END")
		}, true},
		"table lost": {func(t *testing.T, r *ocilocal.LocalRegistry) { execIndex(t, r.Root(), "DROP TABLE members") }, true},
		"killed in a rebuild, with a new index": {func(t *testing.T, r *ocilocal.LocalRegistry) {
			name := index(r)
			if err := os.Rename(name, name+".broken"); err != nil {
				t.Fatal(err)
			}
			mustClose(t, mustOpen(t, r.Root()))
		}, true},
		"killed in a rebuild": {func(t *testing.T, r *ocilocal.LocalRegistry) {
			name := index(r)
			if err := errors.Join(os.Rename(name, name+".broken"), os.WriteFile(name+"-wal", nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, true},
		"all but the blobs": {func(t *testing.T, r *ocilocal.LocalRegistry) {
			for _, name := range []string{"index.sqlite3", "id", "tmp"} {
				if err := os.RemoveAll(filepath.Join(r.Root(), name)); err != nil {
					t.Fatal(err)
				}
			}
		}, false},
		"half the WAL": {func(t *testing.T, r *ocilocal.LocalRegistry) { write(t, index(r)+"-wal", strings.Repeat("torn", 1000)) }, true},
	} {
		t.Run(what, func(t *testing.T) {
			ctx := t.Context()
			r := openTemp(t, nil)
			a := published(t, r, "example.com/a:1", "one", nil)
			b := published(t, r, "example.com/b:1", "two", a)
			c2 := published(t, r, "example.com/c:1", "three", nil)
			before := blobNames(t, r)
			mustClose(t, r)
			dontWatch(r.Root())
			c.damage(t, r)
			report, err := ocilocal.Rebuild(ctx, r.Root(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(report.Left) != 0 {
				t.Errorf("left: %v", report.Left)
			}
			if r, err = ocilocal.Open(ctx, r.Root(), nil); err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, r)
			for _, x := range []*ocilocal.LocalArtifact{a, b, c2} {
				if _, err := r.LoadDigest(ctx, x.Digest()); err != nil {
					t.Error(err)
				}
				if desc, err := r.Resolve(ctx, x.Reference()); c.named && (err != nil || desc.Digest != x.Digest()) {
					t.Errorf("%s was not salvaged: %v", x.Reference(), err)
				}
			}
			if !c.named && (len(report.Recovered) != 2 || !strings.Contains(report.Recovered[0].Reference.String(), r.ID()+".ocilocal.local/recovered:sha256-")) {
				t.Errorf("recovered: %v", report.Recovered)
			}
			// A collection deletes no artifact with a ref, and none in the lineage of one.
			collect(t, r, atOnce)
			if !slices.Equal(before, blobNames(t, r)) {
				t.Error("a collection after the rebuild deleted something")
			}
			if got := problems(t, r, nil, nil); len(got) != 0 {
				t.Errorf("%q", got)
			}
		})
	}
	if _, err := ocilocal.Rebuild(t.Context(), t.TempDir(), nil); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	// A sound registry stays as it is.
	r := openTemp(t, nil)
	published(t, r, "example.com/a:1", "one", nil)
	mustClose(t, r)
	before := tree(t, filepath.Join(r.Root(), "blobs"))
	report, err := ocilocal.Rebuild(t.Context(), r.Root(), nil)
	if err != nil || len(report.Recovered)+len(report.Recorded)+len(report.Rewritten)+len(report.Quarantined) != 0 {
		t.Errorf("%v %+v", err, report)
	}
	if !maps.Equal(before, tree(t, filepath.Join(r.Root(), "blobs"))) {
		t.Error("blobs were changed")
	}
}
