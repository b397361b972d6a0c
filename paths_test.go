package ocilocal_test

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A spelling is a way to name base/dir/sub/name, where base/dir is the working directory.
type spelling struct {
	name  string
	sub   string // the directory that holds the name, below base/dir
	spell func(base, name string) string
}

var spellings = []spelling{
	{"absolute", "", func(base, name string) string { return filepath.Join(base, "dir", name) }},
	{"relative", "", func(_, name string) string { return name }},
	{"dot", "", func(_, name string) string { return "./" + name }},
	{"parent", "", func(_, name string) string { return "../dir/" + name }},
	{"below", "a", func(_, name string) string { return "a/" + name }},
	{"slashes", "a", func(_, name string) string { return ".//a///" + name }},
	{"back and forth", "", func(_, name string) string { return "a/../" + name }},
	{"link", "a", func(_, name string) string { return "link/" + name }},
	{"link from outside", "", func(base, name string) string { return filepath.Join(base, "outside", name) }},
	{"parent of a link", "", func(base, name string) string { return base + "/deep/../dir/" + name }},
	{"not UTF-8", "\xff\xfe", func(_, name string) string { return "\xff\xfe/" + name }},
	{"odd characters", "a?b#c%41 d", func(_, name string) string { return "a?b#c%41 d/" + name }},
}

// newSpelled makes the directories that a spelling needs, enters base/dir, and returns the path of
// a name as it is spelled, and as it really is.
func newSpelled(t *testing.T, s spelling, name string) (base, spelled, real string) {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "dir")
	for _, d := range []string{filepath.Join(dir, "a"), filepath.Join(dir, s.sub), filepath.Join(base, "other", "deep")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// To the system, deep/.. is other, which has a link to dir.
	for link, to := range map[string]string{
		filepath.Join(dir, "link"): "a", filepath.Join(base, "outside"): "dir",
		filepath.Join(base, "deep"): "other/deep", filepath.Join(base, "other", "dir"): "../dir",
	} {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	return base, s.spell(base, name), filepath.Join(dir, s.sub, name)
}

// TestPaths calls every exported function that takes a path with paths in all spellings. What it
// makes or reads is where the system finds that path, and nothing appears beside it.
func TestPaths(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("names that Windows doesn't take")
	}
	const want = "example.com/a:v1"
	refs := []ocilocal.Reference{ref(want)}
	source := openTemp(t, nil)
	original, err := build(t, source, want, nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "a.tar")
	if err := source.ExportArchiveFile(t.Context(), archive, refs, nil); err != nil {
		t.Fatal(err)
	}
	// has checks that the registry in a directory has the artifact, and nothing else.
	has := func(t *testing.T, dir string, d digest.Digest) {
		t.Helper()
		r := mustOpen(t, dir)
		defer mustClose(t, r)
		if a, err := r.Load(t.Context(), ref(want)); err != nil || a.Digest() != d {
			t.Errorf("%s has %v, %v", dir, a, err)
		}
		if got, err := refsOf(r); err != nil || len(got) != 1 {
			t.Errorf("%s has %q, %v", dir, got, err)
		}
	}
	makeRoot := func(t *testing.T, dir string) {
		t.Helper()
		r := mustOpen(t, dir)
		if _, err := build(t, r, want, nil, "layer"); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
	}
	put := func(t *testing.T, name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	makeArchive := func(t *testing.T, name string) {
		t.Helper()
		b, err := os.ReadFile(archive)
		if err != nil {
			t.Fatal(err)
		}
		put(t, name, b)
	}
	makeLayout := func(t *testing.T, dir string) {
		t.Helper()
		if err := source.ExportLayout(t.Context(), dir, refs, nil); err != nil {
			t.Fatal(err)
		}
	}
	imported := func(f func(r *ocilocal.LocalRegistry, path string) error) func(*testing.T, string, string) {
		return func(t *testing.T, path, _ string) {
			r := openTemp(t, nil)
			if err := f(r, path); err != nil {
				t.Fatal(err)
			}
			if a, err := r.Load(t.Context(), ref(want)); err != nil || a.Digest() != original.Digest() {
				t.Errorf("%v, %v", a, err)
			}
		}
	}
	inspected := func(f func(path string) (*ocilocal.Inspection, error)) func(*testing.T, string, string) {
		return func(t *testing.T, path, _ string) {
			if in, err := f(path); err != nil || len(in.Entries) != 1 {
				t.Errorf("%+v, %v", in, err)
			}
		}
	}
	ctx := t.Context()
	for i, c := range []struct {
		name string
		make func(t *testing.T, real string) // nil: the path is free
		dir  bool                            // the path is a directory, so that it may end with a slash
		call func(t *testing.T, path, real string)
	}{
		{"Open", nil, true, func(t *testing.T, path, real string) {
			makeRoot(t, path)
			has(t, real, original.Digest())
			has(t, path, original.Digest())
		}},
		{"Root", nil, true, func(t *testing.T, path, real string) {
			r := mustOpen(t, path)
			if r.Root() != real {
				t.Errorf("%q, want %q", r.Root(), real)
			}
			mustClose(t, r)
		}},
		{"OpenReadOnly", makeRoot, true, func(t *testing.T, path, _ string) {
			r, err := ocilocal.OpenReadOnly(ctx, path, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, r)
			if ok, err := r.Exists(ctx, ref(want)); !ok || err != nil {
				t.Error(ok, err)
			}
		}},
		{"Rebuild of a damaged index", makeRoot, true, func(t *testing.T, path, real string) {
			rewrite(t, filepath.Join(real, "index.sqlite3"), func(b []byte) []byte { b[68] ^= 1; return b }) // another application id
			if report, err := ocilocal.Rebuild(ctx, path, nil); err != nil || len(report.Left) > 0 {
				t.Fatalf("%+v, %v", report, err)
			}
			if err := os.Remove(filepath.Join(real, "index.sqlite3.broken")); err != nil {
				t.Error(err)
			}
			has(t, real, original.Digest())
		}},
		{"Rebuild of a sound index", makeRoot, true, func(t *testing.T, path, real string) {
			if report, err := ocilocal.Rebuild(ctx, path, nil); err != nil || len(report.Left) > 0 {
				t.Fatalf("%+v, %v", report, err)
			}
			has(t, real, original.Digest())
		}},
		{"Backup", nil, true, func(t *testing.T, path, real string) {
			for range 2 {
				if report, err := source.Backup(ctx, path, nil); err != nil || report.Refs != 1 {
					t.Fatalf("%+v, %v", report, err)
				}
			}
			has(t, real, original.Digest())
		}},
		{"ExportArchiveFile", nil, false, func(t *testing.T, path, real string) {
			if err := source.ExportArchiveFile(ctx, path, refs, nil); err != nil {
				t.Fatal(err)
			}
			if err := source.ExportArchiveFile(ctx, path, refs, &ocilocal.ExportOptions{Overwrite: true}); err != nil {
				t.Fatal(err)
			}
			inspected(func(path string) (*ocilocal.Inspection, error) { return ocilocal.InspectPath(ctx, path) })(t, real, real)
		}},
		{"ExportLayout", nil, true, func(t *testing.T, path, real string) {
			for range 2 {
				if err := source.ExportLayout(ctx, path, refs, nil); err != nil {
					t.Fatal(err)
				}
			}
			inspected(func(path string) (*ocilocal.Inspection, error) { return ocilocal.InspectLayout(ctx, path) })(t, real, real)
		}},
		{"ImportLayout", makeLayout, true, imported(func(r *ocilocal.LocalRegistry, path string) error { return errOf(r.ImportLayout(ctx, path, nil)) })},
		{"ImportPath of a layout", makeLayout, true, imported(func(r *ocilocal.LocalRegistry, path string) error { return errOf(r.ImportPath(ctx, path, nil)) })},
		{"ImportPath of an archive", makeArchive, false, imported(func(r *ocilocal.LocalRegistry, path string) error { return errOf(r.ImportPath(ctx, path, nil)) })},
		{"ImportArchiveFile", makeArchive, false, imported(func(r *ocilocal.LocalRegistry, path string) error {
			return errOf(r.ImportArchiveFile(ctx, path, nil))
		})},
		{"LoadPath of a layout", makeLayout, true, imported(func(r *ocilocal.LocalRegistry, path string) error { return errOf(r.LoadPath(ctx, path, nil)) })},
		{"LoadPath of an archive", makeArchive, false, imported(func(r *ocilocal.LocalRegistry, path string) error { return errOf(r.LoadPath(ctx, path, nil)) })},
		{"InspectLayout", makeLayout, true, inspected(func(path string) (*ocilocal.Inspection, error) { return ocilocal.InspectLayout(ctx, path) })},
		{"InspectPath of a layout", makeLayout, true, inspected(func(path string) (*ocilocal.Inspection, error) { return ocilocal.InspectPath(ctx, path) })},
		{"InspectPath of an archive", makeArchive, false, inspected(func(path string) (*ocilocal.Inspection, error) { return ocilocal.InspectPath(ctx, path) })},
		{"AddLayerFile", func(t *testing.T, real string) { put(t, real, []byte("layer")) }, false, func(t *testing.T, path, _ string) {
			r := openTemp(t, nil)
			b, err := r.NewBuilder(ref(want), &ocilocal.BuilderOptions{ArtifactType: testType})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			if d, err := b.AddLayerFile(ctx, "text/plain", path, nil); err != nil || d.Digest != digest.FromString("layer") {
				t.Error(d, err)
			}
		}},
		{"RepairOptions.Sources", makeArchive, false, func(t *testing.T, path, _ string) {
			r := openTemp(t, nil)
			if _, err := build(t, r, want, nil, "layer"); err != nil {
				t.Fatal(err)
			}
			rewrite(t, blobFile(r, digest.FromString("layer")), flipBit)
			if report, err := r.Repair(ctx, &ocilocal.RepairOptions{Sources: []string{path}}); err != nil || len(report.Healed) != 1 {
				t.Errorf("%+v, %v", report, err)
			}
		}},
		{"ImportLegacy", func(t *testing.T, real string) {
			if err := os.Rename(legacyTree(t, map[string]string{"ghcr.io/org/app/__v1": ""}), real); err != nil {
				t.Fatal(err)
			}
		}, true, func(t *testing.T, path, _ string) {
			r := openTemp(t, nil)
			if report, err := r.ImportLegacy(ctx, path, nil); err != nil || report.Imported != 1 {
				t.Errorf("%+v, %v", report, err)
			}
		}},
		{"Options.LegacyRoot", func(t *testing.T, real string) {
			if err := os.Rename(legacyTree(t, map[string]string{"ghcr.io/org/app/__v1": ""}), real); err != nil {
				t.Fatal(err)
			}
		}, true, func(t *testing.T, path, _ string) {
			r := openTemp(t, &ocilocal.Options{LegacyRoot: path})
			if _, err := r.Load(ctx, ref("ghcr.io/org/app:v1")); err != nil {
				t.Error(err)
			}
		}},
		{"ImportOMMX", func(t *testing.T, real string) {
			o := newOMMXRoot(t, 1)
			o.add("ghcr.io/org/app", "v1", "one")
			if err := os.CopyFS(real, os.DirFS(o.dir)); err != nil {
				t.Fatal(err)
			}
		}, true, func(t *testing.T, path, _ string) {
			r := openTemp(t, nil)
			if report, err := r.ImportOMMX(ctx, path, nil); err != nil || report.Imported != 1 {
				t.Errorf("%+v, %v", report, err)
			}
		}},
		{"FileCredentials", func(t *testing.T, real string) {
			put(t, real, []byte(`{"auths":{"example.com":{"auth":"dTpw"}}}`))
		}, false, func(t *testing.T, path, _ string) {
			if c, err := ocilocal.FileCredentials(path)(ctx, "example.com", "a"); err != nil || c.Username != "u" {
				t.Error(c, err)
			}
		}},
	} {
		all := spellings
		if c.dir {
			for _, s := range []spelling{spellings[0], spellings[1], spellings[4], spellings[7]} {
				spell := s.spell
				s.name, s.spell = s.name+" with a slash", func(base, name string) string { return spell(base, name) + "/" }
				all = append(slices.Clone(all), s)
			}
		}
		if c.make != nil { // a link to it is another name of it
			all = append(slices.Clone(all), spelling{"a link to it", "", nil})
		}
		for j, s := range all {
			if (i+j)%scaled(7, 1, 1) != 0 { // each call and each spelling in every run, not all pairs
				continue
			}
			t.Run(c.name+"/"+s.name, func(t *testing.T) {
				asLink := s.spell == nil
				if asLink {
					s.spell = func(_, name string) string { return name }
				}
				base, path, real := newSpelled(t, s, "x")
				if c.make != nil {
					c.make(t, real)
				}
				if asLink {
					if err := os.Symlink("x", "y"); err != nil {
						t.Fatal(err)
					}
					path = "y"
				}
				before := namesBelow(t, base, real)
				c.call(t, path, real)
				if after := namesBelow(t, base, real); !maps.Equal(before, after) {
					t.Errorf("beside it there was %q, and now is %q", slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
				}
			})
		}
	}
}

// namesBelow returns the names in a directory, except for one and what is below that.
func namesBelow(t *testing.T, dir, except string) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case p != except:
			names[p] = true
		case e.IsDir():
			return fs.SkipDir
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.SkipDir) {
		t.Fatal(err)
	}
	return names
}
