package ocilocal_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func TestDefaultRoot(t *testing.T) {
	t.Setenv("OCILOCAL_ROOT", "/somewhere")
	if got, err := ocilocal.DefaultRoot(); got != "/somewhere" || err != nil {
		t.Error(got, err)
	}
	t.Setenv("OCILOCAL_ROOT", "")
	t.Setenv("HOME", filepath.FromSlash("/home/somebody"))
	switch runtime.GOOS {
	case "windows", "darwin":
		return
	}
	for xdg, want := range map[string]string{
		"/data":    "/data/ocilocal",
		"":         "/home/somebody/.local/share/ocilocal",
		"relative": "/home/somebody/.local/share/ocilocal", // the specification says to ignore it
	} {
		t.Setenv("XDG_DATA_HOME", xdg)
		if got, err := ocilocal.DefaultRoot(); got != want || err != nil {
			t.Errorf("XDG_DATA_HOME=%q: %q, %v, want %q", xdg, got, err, want)
		}
	}
	t.Setenv("XDG_DATA_HOME", "")
	t.Setenv("HOME", "")
	if got, err := ocilocal.DefaultRoot(); err == nil {
		t.Errorf("without a home: %q", got)
	}
}

// contents returns every file below root, by name, with its bytes.
func contents(t *testing.T, root string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		files[p] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// alterIndex runs statements on an index, as another program would.
func alterIndex(t *testing.T, name string, statements ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", name)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	mustClose(t, db)
}

// TestRefusedRootUntouched opens roots with an index of another program. Each is refused and does
// not change.
func TestRefusedRootUntouched(t *testing.T) {
	t.Parallel()
	sqlOn := func(statements ...string) func(*testing.T, string, string) {
		return func(t *testing.T, _, index string) { alterIndex(t, index, statements...) }
	}
	fresh := func(content string, statements ...string) func(*testing.T, string, string) {
		return func(t *testing.T, _, index string) {
			if err := os.Remove(index); err != nil {
				t.Fatal(err)
			}
			if len(statements) > 0 {
				alterIndex(t, index, statements...)
			} else if err := os.WriteFile(index, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	id := func(content string) func(*testing.T, string, string) {
		return func(t *testing.T, root, _ string) {
			name := filepath.Join(root, "id")
			err := os.Remove(name)
			if err == nil && content != "" {
				err = os.WriteFile(name, []byte(content), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, root, index string)
		want   error
	}{
		"foreign database": {fresh("", "CREATE TABLE t (a)", "INSERT INTO t VALUES (1)"), ocilocal.ErrForeignIndex},
		"foreign id":       {sqlOn("PRAGMA application_id = 7"), ocilocal.ErrForeignIndex},
		"newer":            {sqlOn("PRAGMA user_version = 999"), ocilocal.ErrNewerSchema},
		"version 0":        {sqlOn("PRAGMA user_version = 0"), ocilocal.ErrForeignIndex},
		"negative version": {sqlOn("PRAGMA user_version = -1"), ocilocal.ErrForeignIndex},
		"planted trigger":  {sqlOn("CREATE TRIGGER x AFTER INSERT ON refs BEGIN DELETE FROM refs; END"), ocilocal.ErrForeignIndex},
		"extra view":       {sqlOn("CREATE VIEW x AS SELECT * FROM refs"), ocilocal.ErrForeignIndex},
		"extra table":      {sqlOn("CREATE TABLE x (a)"), ocilocal.ErrForeignIndex},
		"expression index": {sqlOn("CREATE INDEX x ON refs (upper(name))"), ocilocal.ErrForeignIndex},
		"virtual table":    {sqlOn("CREATE VIRTUAL TABLE x USING fts5(a)"), ocilocal.ErrForeignIndex},
		"trigger with a name of SQLite's": {sqlOn("CREATE TRIGGER x AFTER INSERT ON refs BEGIN DELETE FROM refs; END",
			"PRAGMA writable_schema = ON", "UPDATE sqlite_schema SET name = 'sqlite_stat9', sql = replace(sql, 'TRIGGER x', 'TRIGGER sqlite_stat9') WHERE name = 'x'"), ocilocal.ErrForeignIndex},
		"table's name in other letters": {sqlOn("PRAGMA writable_schema = ON", "UPDATE sqlite_schema SET name = 'mAnifests' WHERE name = 'manifests'"), ocilocal.ErrCorruptIndex},
		"index of another table":        {sqlOn("PRAGMA writable_schema = ON", "UPDATE sqlite_schema SET tbl_name = 'Refs' WHERE name = 'refs_by_manifest'"), ocilocal.ErrCorruptIndex},
		"kind that is a blob":           {sqlOn("PRAGMA writable_schema = ON", "UPDATE sqlite_schema SET type = CAST(type AS BLOB) WHERE name = 'holds_by_content'"), ocilocal.ErrCorruptIndex},
		"lacks a table":                 {sqlOn("DROP TABLE refs"), ocilocal.ErrForeignIndex},
		"lacks an index":                {sqlOn("DROP INDEX members_by_content"), ocilocal.ErrForeignIndex},
		"text":                          {fresh(strings.Repeat("not a database\n", 1000)), ocilocal.ErrForeignIndex},
		"short text":                    {fresh("hello"), ocilocal.ErrForeignIndex},
		"empty":                         {fresh(""), ocilocal.ErrForeignIndex},
		"id missing":                    {id(""), ocilocal.ErrForeignIndex},
		"id of another":                 {id("abcdefgh234567\n"), ocilocal.ErrForeignIndex},
		"id is not an id":               {id("../../etc\n"), ocilocal.ErrForeignIndex},
		"id is several":                 {id("abc\ndef\n"), ocilocal.ErrForeignIndex},
		"id is far too big":             {id(strings.Repeat("a", 1<<16)), ocilocal.ErrForeignIndex},
		"id is a directory": {func(t *testing.T, root, _ string) {
			id := filepath.Join(root, "id")
			if err := errors.Join(os.Remove(id), os.Mkdir(id, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, ocilocal.ErrForeignIndex},
		"link": {func(t *testing.T, root, index string) {
			if err := errors.Join(os.Rename(index, filepath.Join(root, "blobs", "x")), os.Symlink("blobs/x", index)); err != nil {
				t.Skip(err)
			}
		}, ocilocal.ErrForeignIndex},
		"directory": {func(t *testing.T, _, index string) {
			if err := errors.Join(os.Remove(index), os.Mkdir(index, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, ocilocal.ErrForeignIndex},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			r := mustOpen(t, root)
			if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
				t.Fatal(err)
			}
			mustClose(t, r)
			c.change(t, root, filepath.Join(root, "index.sqlite3"))
			before := contents(t, root)
			for open, f := range map[string]func(context.Context, string, *ocilocal.Options) (*ocilocal.LocalRegistry, error){
				"Open": ocilocal.Open, "OpenReadOnly": ocilocal.OpenReadOnly,
			} {
				if r, err := f(t.Context(), root, nil); !errors.Is(err, c.want) || r != nil {
					t.Errorf("%s: %v, want %v", open, err, c.want)
				} else if e, ok := errors.AsType[*ocilocal.SchemaError](err); ok != (c.want == ocilocal.ErrNewerSchema) || ok && e.Found != 999 {
					t.Errorf("%s: schema error %v", open, e)
				}
				if after := contents(t, root); !maps.Equal(before, after) {
					t.Errorf("%s changed the root: files before %q, after %q", open, slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
				}
			}
		})
	}
}

func TestNetworkFS(t *testing.T) {
	if err := ocilocal.RefuseNetworkFS("nfs", false); !errors.Is(err, ocilocal.ErrNetworkFS) {
		t.Error(err)
	}
	if err := errors.Join(ocilocal.RefuseNetworkFS("nfs", true), ocilocal.RefuseNetworkFS("", false)); err != nil {
		t.Error(err)
	}
}

// killed returns a copy of the root as it is if all of its processes are killed now.
func killed(t *testing.T, root string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(root)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil { // CopyFS keeps no modes, and a sweep goes by them
			err = os.Chmod(filepath.Join(to, strings.TrimPrefix(name, root)), fi.Mode())
		}
		return err
	})
	if err := errors.Join(err, os.Remove(filepath.Join(to, "index.sqlite3-shm"))); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestLogWithoutIndex: the log of a lost index is not used for a new index. A collection could then
// find that nothing is needed.
func TestLogWithoutIndex(t *testing.T) {
	for _, lost := range []string{"-wal", "-journal"} {
		root := t.TempDir()
		r := mustOpen(t, root)
		var refs []ocilocal.Reference
		for i := range 5 {
			refs = append(refs, published(t, r, fmt.Sprintf("example.com/a:v%d", i), fmt.Sprint("layer ", i), nil).Reference())
		}
		if _, err := r.Remove(t.Context(), refs[0]); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
		r = mustOpen(t, root)
		collect(t, r, atOnce) // which puts the page of meta into the log
		dir := killed(t, root)
		mustClose(t, r)
		dontWatch(dir)
		index := filepath.Join(dir, "index.sqlite3")
		if err := os.Remove(index); err != nil {
			t.Fatal(err)
		}
		if lost != "-wal" {
			if err := os.Rename(index+"-wal", index+lost); err != nil {
				t.Fatal(err)
			}
		}
		before := contents(t, dir)
		if _, err := ocilocal.Open(t.Context(), dir, nil); !errors.Is(err, ocilocal.ErrCorruptIndex) {
			t.Errorf("%s: %v", lost, err)
		}
		if after := contents(t, dir); !maps.Equal(before, after) {
			t.Errorf("%s: the root was changed", lost)
		}
		report, err := ocilocal.Rebuild(t.Context(), dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(report.Recovered) != 4 {
			t.Errorf("%s: recovered %d of 4", lost, len(report.Recovered))
		}
		r = mustOpen(t, dir)
		blobs := blobNames(t, r)
		collect(t, r, atOnce)
		if after := blobNames(t, r); len(after) != 9 || !slices.Equal(blobs, after) {
			t.Errorf("%s: %d blobs are left of %d", lost, len(after), len(blobs))
		}
	}
}

// TestIndexDeleted: an index that is made new beside blobs is marked as not reconciled.
func TestIndexDeleted(t *testing.T) {
	root := t.TempDir()
	for i, want := range []string{"", "1"} {
		r := mustOpen(t, root)
		id := r.ID()
		if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
		db, err := sql.Open("sqlite", filepath.Join(root, "index.sqlite3"))
		if err != nil {
			t.Fatal(err)
		}
		var got string
		if err := db.QueryRow("SELECT coalesce(max(value), '') FROM meta WHERE key = 'unreconciled'").Scan(&got); err != nil || got != want {
			t.Errorf("round %d: unreconciled is %q, %v, want %q", i, got, err, want)
		}
		mustClose(t, db)
		if b, err := os.ReadFile(filepath.Join(root, "id")); err != nil || string(b) != id+"\n" {
			t.Errorf("id %q, %v, want %q", b, err, id)
		}
		if err := os.Remove(filepath.Join(root, "index.sqlite3")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOddRoots(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("names that Windows doesn't take")
	}
	for _, name := range []string{"with space", "a?b=c&mode=ro", "a#b", "100%", "%41%2f", "new\nline", "ünï→語", "-dash", "a;b'c\"d", `back\slash`, "file:x", "a/../b"} {
		parent := t.TempDir()
		root := parent + "/" + name
		r := mustOpen(t, root)
		if r.Root() != filepath.Clean(root) {
			t.Errorf("%q: root is %q", name, r.Root())
		}
		if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		mustClose(t, r)
		if _, err := os.Stat(filepath.Join(root, "index.sqlite3")); err != nil {
			t.Error(err)
		}
		if entries, err := os.ReadDir(parent); err != nil || len(entries) != 1 {
			t.Errorf("%q: beside the root: %v, %v", name, entries, err)
		}
		ro, err := ocilocal.OpenReadOnly(t.Context(), root, nil)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if ok, err := ro.Exists(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); !ok || err != nil {
			t.Errorf("%q: %t, %v", name, ok, err)
		}
		mustClose(t, ro)
	}
	if r, err := ocilocal.Open(t.Context(), "", nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Error(r, err)
	}
	if r, err := ocilocal.OpenReadOnly(t.Context(), filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error(r, err)
	}
}

func TestRelativeRoot(t *testing.T) {
	t.Chdir(t.TempDir())
	r := mustOpen(t, "some/root")
	t.Chdir(t.TempDir())
	if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
		t.Fatal(err)
	}
	if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); !ok || err != nil {
		t.Error(ok, err)
	}
	if entries, err := os.ReadDir("."); err != nil || len(entries) > 0 {
		t.Errorf("in the new directory: %v, %v", entries, err)
	}
	mustClose(t, r)
}

func TestTwoHandles(t *testing.T) {
	a := openTemp(t, nil)
	b := mustOpen(t, a.Root())
	if a.ID() != b.ID() || a.ID() == "" {
		t.Errorf("ids %q and %q", a.ID(), b.ID())
	}
	for i, r := range []*ocilocal.LocalRegistry{a, b} {
		ref := []string{"example.com/a:v1", "example.com/b:v1"}[i]
		if _, err := build(t, r, ref, nil, "layer"); err != nil {
			t.Fatal(err)
		}
		for _, s := range []*ocilocal.LocalRegistry{a, b} {
			if ok, err := s.Exists(t.Context(), ocilocal.MustParseReference(ref)); !ok || err != nil {
				t.Error(ok, err)
			}
		}
	}
	mustClose(t, a)
	if _, err := build(t, b, "example.com/c:v1", nil, "layer"); err != nil {
		t.Errorf("after the other handle's Close: %v", err)
	}
}

func TestArtifactTypesImport(t *testing.T) {
	const good, bad = "application/vnd.example.test", "application/vnd.example.bad"
	r := openTemp(t, &ocilocal.Options{ArtifactTypes: []string{good}})
	if _, err := build(t, r, "example.com/a:good", &ocilocal.BuilderOptions{ArtifactType: good}, "layer"); err != nil {
		t.Fatal(err)
	}
	before := filesBelow(t, r, "blobs")
	if _, err := build(t, r, "example.com/a:bad", &ocilocal.BuilderOptions{ArtifactType: bad}, "other"); !errors.Is(err, ocilocal.ErrArtifactType) {
		t.Errorf("build: %v", err)
	}
	from := openTemp(t, nil)
	a, err := build(t, from, "example.com/a:bad", &ocilocal.BuilderOptions{ArtifactType: bad}, "other")
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := from.ExportArchive(t.Context(), &archive, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ImportArchive(t.Context(), &archive, nil); !errors.Is(err, ocilocal.ErrArtifactType) {
		t.Errorf("import: %v", err)
	}
	if ok, err := r.Exists(t.Context(), a.Reference()); ok || err != nil {
		t.Error(ok, err)
	}
	if after := filesBelow(t, r, "blobs"); !slices.Equal(before, after) {
		t.Errorf("blobs before %q, after %q", before, after)
	}
}

// TestIndexReplaced puts another file in the index's place while it is open.
func TestIndexReplaced(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("an open file can't be replaced there")
	}
	for _, name := range []string{"replaced", "deleted"} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			dontWatch(r.Root())
			if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
				t.Fatal(err)
			}
			index := filepath.Join(r.Root(), "index.sqlite3")
			b, err := os.ReadFile(index)
			if err == nil && name == "replaced" {
				err = errors.Join(os.WriteFile(index+".new", b, 0o600), os.Rename(index+".new", index))
			} else if err == nil {
				err = os.Remove(index)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := build(t, r, "example.com/b:v1", nil, "other"); !errors.Is(err, ocilocal.ErrForeignIndex) {
				t.Errorf("build: %v", err)
			}
			if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); !errors.Is(err, ocilocal.ErrForeignIndex) {
				t.Errorf("remove: %v", err)
			}
		})
	}
}

// TestOpenWithoutDirectories: a copy of a root without its empty directories can be opened. A
// directory of another program with an index.sqlite3 does not change.
func TestOpenWithoutDirectories(t *testing.T) {
	dir := t.TempDir()
	r, err := ocilocal.Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	if err := errors.Join(os.RemoveAll(filepath.Join(dir, "tmp")), os.Remove(filepath.Join(dir, "blobs"))); err != nil {
		t.Fatal(err)
	}
	if r, err = ocilocal.Open(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, r)
	if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
		t.Error(err)
	}
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "index.sqlite3"), []byte("not ours"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ocilocal.Open(t.Context(), foreign, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
		t.Error(err)
	}
	if entries, err := os.ReadDir(foreign); len(entries) != 1 || err != nil {
		t.Error(entries, err)
	}
}

// TestTwoNamesOfOneRoot opens a root under two names, one of them a link. Each handle sees what the
// other one publishes, and a collection of one keeps content that the other is about to publish.
func TestTwoNamesOfOneRoot(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(r.Root(), link); err != nil {
		t.Skipf("no links here: %v", err)
	}
	other, err := ocilocal.Open(ctx, link, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ref := ocilocal.MustParseReference("example.com/two/names:v1")
	b, err := other.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	layer, err := b.AddLayerBytes(ctx, "text/plain", []byte("about to be published"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, by := range []*ocilocal.LocalRegistry{r, other} {
		if _, err := by.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Build(ctx); err != nil {
		t.Fatal(err)
	}
	a, err := r.Load(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := a.ReadLayer(ctx, layer); err != nil || string(got) != "about to be published" {
		t.Errorf("%q, %v", got, err)
	}
	checkSound(t, r)
}
