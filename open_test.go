package ocilocal_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// alter runs statements on a root's index as a stranger would.
func alter(t *testing.T, root string, stmts ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(root, "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, s := range stmts {
		if _, err := db.Exec(s); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	ctx := context.Background()
	statement := func(stmts ...string) func(*testing.T, string) {
		return func(t *testing.T, root string) { alter(t, root, stmts...) }
	}
	content := func(name, text string) func(*testing.T, string) {
		return func(t *testing.T, root string) {
			if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		damage func(t *testing.T, root string)
		want   error
	}{
		"newer version":      {statement("PRAGMA user_version = 99"), ocilocal.ErrNewerSchema},
		"another program's":  {statement("PRAGMA application_id = 1"), ocilocal.ErrForeignIndex},
		"version 0":          {statement("PRAGMA user_version = 0"), ocilocal.ErrForeignIndex},
		"planted trigger":    {statement("CREATE TRIGGER evil AFTER INSERT ON refs BEGIN DELETE FROM refs; END"), ocilocal.ErrForeignIndex},
		"planted view":       {statement("CREATE VIEW evil AS SELECT 1"), ocilocal.ErrForeignIndex},
		"planted index":      {statement("CREATE INDEX evil ON refs (upper(name))"), ocilocal.ErrForeignIndex},
		"missing table":      {statement("DROP TABLE refs"), ocilocal.ErrForeignIndex},
		"text":               {content("index.sqlite3", strings.Repeat("no database ", 500)), ocilocal.ErrForeignIndex},
		"empty":              {content("index.sqlite3", ""), ocilocal.ErrForeignIndex},
		"id of another root": {content("id", "abc\n"), ocilocal.ErrForeignIndex},
		"id is hostile":      {content("id", "../../x\n"), ocilocal.ErrForeignIndex},
		"id is missing":      {func(t *testing.T, root string) { os.Remove(filepath.Join(root, "id")) }, ocilocal.ErrForeignIndex},
		"directory": {func(t *testing.T, root string) {
			index := filepath.Join(root, "index.sqlite3")
			if err := errors.Join(os.Remove(index), os.Mkdir(index, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, ocilocal.ErrForeignIndex},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			r, err := ocilocal.Open(ctx, root, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			c.damage(t, root)
			index := filepath.Join(root, "index.sqlite3")
			before, _ := os.ReadFile(index)
			for _, open := range []func(context.Context, string, *ocilocal.Options) (*ocilocal.LocalRegistry, error){ocilocal.Open, ocilocal.OpenReadOnly} {
				r, err := open(ctx, root, nil)
				if !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if err == nil {
					r.Close()
				}
			}
			if after, _ := os.ReadFile(index); !bytes.Equal(before, after) {
				t.Error("the refused index was changed")
			}
		})
	}
	if _, err := ocilocal.OpenReadOnly(ctx, filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OpenReadOnly of nothing: %v", err)
	}
	if _, err := ocilocal.Open(ctx, "", nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("Open of no name: %v", err)
	}
}

func TestOddRootNames(t *testing.T) {
	parent := t.TempDir()
	t.Chdir(parent)
	for _, name := range []string{"a b", "a?b", "a#b", "a%20b", "a\nb", "ä/ö/ü", "file:x", "relative/deep"} {
		r, err := ocilocal.Open(context.Background(), name, nil)
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if err := os.Chdir(os.TempDir()); err != nil {
			t.Fatal(err)
		}
		if _, err := build(t, r, "example.com/a:v1", nil, "x"); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := os.Chdir(parent); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(parent, name, "index.sqlite3")); err != nil {
			t.Error(err)
		}
	}
}

func TestModes(t *testing.T) {
	root := filepath.Join(t.TempDir(), "new", "root")
	r, err := ocilocal.Open(context.Background(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	a, err := build(t, r, "example.com/a:v1", nil, "x")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{
		".": 0o700, "index.sqlite3": 0o600, "blobs/sha256/" + a.Digest().Encoded(): 0o444,
	} {
		fi, err := os.Stat(filepath.Join(root, name))
		if err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v; want %v", name, fi.Mode(), err, want)
		}
	}

	var logged bytes.Buffer
	if err := os.Chmod(root, 0o777); err != nil {
		t.Fatal(err)
	}
	again, err := ocilocal.Open(context.Background(), root, &ocilocal.Options{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if !strings.Contains(logged.String(), "anybody") {
		t.Errorf("a root that anybody may write to was not reported: %q", logged.String())
	}
}

func TestIndexReplacedWhileOpen(t *testing.T) {
	r := openTemp(t, nil)
	other := openTemp(t, nil)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(other.Root(), "index.sqlite3"), filepath.Join(r.Root(), "index.sqlite3")); err != nil {
		t.Fatal(err)
	}
	if _, err := build(t, r, "example.com/a:v1", nil, "x"); !errors.Is(err, ocilocal.ErrForeignIndex) {
		t.Errorf("publish into an index that nobody will read: %v", err)
	}
}

func TestAfterClose(t *testing.T) {
	ctx := context.Background()
	r := openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/a:v1")
	a, err := build(t, r, ref.String(), nil, "x")
	if err != nil {
		t.Fatal(err)
	}
	open, err := r.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: "a/b"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open.AddLayerBytes(ctx, "text/plain", []byte("y"), nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{Digest: a.Digest(), Size: a.Descriptor().Size}
	for name, call := range map[string]func() error{
		"Close":         r.Close,
		"Resolve":       func() error { _, err := r.Resolve(ctx, ref); return err },
		"ResolveDigest": func() error { _, err := r.ResolveDigest(ctx, a.Digest()); return err },
		"Exists":        func() error { _, err := r.Exists(ctx, ref); return err },
		"Load":          func() error { _, err := r.Load(ctx, ref); return err },
		"Tag":           func() error { _, err := r.Tag(ctx, a.Digest(), ref, nil); return err },
		"Remove":        func() error { _, err := r.Remove(ctx, ref); return err },
		"NewBuilder":    func() error { _, err := r.NewBuilder(ref, nil); return err },
		"AddLayer":      func() error { _, err := open.AddLayerBytes(ctx, "a/b", nil, nil); return err },
		"Build":         func() error { _, err := open.Build(ctx); return err },
		"OpenBlob":      func() error { _, err := r.OpenBlob(ctx, d); return err },
		"OpenBlobFile":  func() error { _, err := r.OpenBlobFile(ctx, d); return err },
		"HasBlob":       func() error { _, err := r.HasBlob(ctx, d.Digest); return err },
		"ImportArchive": func() error { _, err := r.ImportArchive(ctx, &bytes.Buffer{}, nil); return err },
		"ExportArchive": func() error { return r.ExportArchive(ctx, &bytes.Buffer{}, ref) },
		"Refs": func() error {
			for _, err := range r.Refs(ctx, nil) {
				return err
			}
			return nil
		},
		"Blobs": func() error {
			for _, err := range r.Blobs(ctx) {
				return err
			}
			return nil
		},
	} {
		if err := call(); !errors.Is(err, ocilocal.ErrClosed) || !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s: %v, want ErrClosed", name, err)
		}
	}
	if err := open.Cancel(); err != nil {
		t.Errorf("Cancel after Close: %v", err)
	}
}

func TestArtifactTypes(t *testing.T) {
	r := openTemp(t, &ocilocal.Options{ArtifactTypes: []string{"a/b"}})
	if _, err := build(t, r, "example.com/a:v1", &ocilocal.BuilderOptions{ArtifactType: "a/c"}, "x"); !errors.Is(err, ocilocal.ErrArtifactType) {
		t.Errorf("%v", err)
	}
	if _, err := build(t, r, "example.com/a:v1", &ocilocal.BuilderOptions{ArtifactType: "a/b"}, "x"); err != nil {
		t.Error(err)
	}
}

func TestDefaultRoot(t *testing.T) {
	t.Setenv("OCILOCAL_ROOT", "/somewhere")
	if got, err := ocilocal.DefaultRoot(); got != "/somewhere" || err != nil {
		t.Error(got, err)
	}
}

func TestDigestReferences(t *testing.T) {
	ctx := context.Background()
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/a:v1", nil, "x")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"example.com/a@" + a.Digest().String(), "example.com/a:v1@" + a.Digest().String()} {
		if d, err := r.Resolve(ctx, ocilocal.MustParseReference(s)); err != nil || d.Digest != a.Digest() {
			t.Errorf("%s: %v, %v", s, d, err)
		}
	}
	none := digest.FromString("none")
	if _, err := r.Resolve(ctx, ocilocal.MustParseReference("example.com/a:v1@"+none.String())); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	if _, err := r.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/a@"+none.String()), nil); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Error(err)
	}
	if u, err := r.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/b@"+a.Digest().String()), nil); err != nil || u.Outcome != ocilocal.Inserted {
		t.Error(u, err)
	}
}
