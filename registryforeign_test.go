package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// twoRoots makes two registries, each with a ref of its own, and returns their directories.
func twoRoots(t *testing.T) (one, two string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"one", "two"} {
		r := mustOpen(t, filepath.Join(dir, name))
		if _, err := build(t, r, "example.com/"+name+":v1", nil, name); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
	}
	return filepath.Join(dir, "one"), filepath.Join(dir, "two")
}

// refsOf lists the refs of a registry.
func refsOf(r *ocilocal.LocalRegistry) (refs []string, err error) {
	for ref, err := range r.Refs(context.Background(), nil) {
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref.Reference.String())
	}
	return refs, nil
}

// TestLinkSwitched: a handle that was opened by a link stays on the directory to which the link
// led, whatever the link leads to later.
func TestLinkSwitched(t *testing.T) {
	one, two := twoRoots(t)
	current := filepath.Join(t.TempDir(), "current")
	if err := os.Symlink(one, current); err != nil {
		t.Skip(err)
	}
	r, err := ocilocal.Open(t.Context(), current, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(two, current+".new"), os.Rename(current+".new", current)); err != nil {
		t.Fatal(err)
	}
	if _, err := build(t, r, "example.com/new:v1", nil, "new"); err != nil {
		t.Error(err)
	}
	want := []string{"example.com/new:v1", "example.com/one:v1"}
	if refs, err := refsOf(r); err != nil || !slices.Equal(refs, want) {
		t.Errorf("%q, %v", refs, err)
	}
	if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Error(err)
	}
	mustClose(t, r)
	for dir, want := range map[string][]string{one: want, two: {"example.com/two:v1"}} {
		r := mustOpen(t, dir)
		if refs, err := refsOf(r); err != nil || !slices.Equal(refs, want) {
			t.Errorf("%s: %q, %v", dir, refs, err)
		}
		for p, err := range r.Verify(t.Context(), nil) {
			t.Errorf("%s: %v, %v", dir, p, err)
		}
		mustClose(t, r)
	}
}

// TestDirectorySwitched puts another registry, or nothing, in the place of an open one. Every
// call says so, reads too, and neither registry is changed: the other one, which was killed with
// commits in its log, keeps them when the first handle is closed.
func TestDirectorySwitched(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("an open directory can't be renamed there")
	}
	for _, readOnly := range []bool{false, true} {
		for _, place := range []string{"another registry", "a copy", "nothing", "index deleted", "index replaced"} {
			name := place
			open := ocilocal.Open
			if readOnly {
				name, open = place+", read-only", ocilocal.OpenReadOnly
			}
			t.Run(name, func(t *testing.T) {
				one, two := twoRoots(t)
				dontWatch(one)
				dontWatch(two)
				live := mustOpen(t, two)
				two = killed(t, two) // its log has commits
				mustClose(t, live)
				dontWatch(two)
				r, err := open(t.Context(), one, nil)
				if err != nil {
					t.Fatal(err)
				}
				aside := one + ".aside"
				index := filepath.Join(one, "index.sqlite3")
				switch place {
				case "another registry":
					err = errors.Join(os.Rename(one, aside), os.Rename(two, one))
				case "a copy":
					if err = os.Rename(one, aside); err == nil {
						err = os.CopyFS(one, os.DirFS(aside))
					}
				case "nothing":
					err = os.Rename(one, aside)
				case "index deleted":
					err = os.Remove(index)
				case "index replaced":
					err = os.Rename(filepath.Join(two, "index.sqlite3"), index)
				}
				if err != nil {
					t.Fatal(err)
				}
				before := listTree(t, filepath.Dir(one))
				ref := ocilocal.MustParseReference("example.com/one:v1")
				for call, err := range map[string]error{
					"Resolve":       errOf(r.Resolve(t.Context(), ref)),
					"Exists":        errOf(r.Exists(t.Context(), ref)),
					"ResolveDigest": errOf(r.ResolveDigest(t.Context(), digest.FromString("x"))),
					"Refs":          errOf(refsOf(r)),
					"Stats":         errOf(r.Stats(t.Context())),
					"GCReport":      errOf(r.GCReport(t.Context(), nil)),
				} {
					if !errors.Is(err, ocilocal.ErrForeignIndex) {
						t.Errorf("%s: %v", call, err)
					}
				}
				if !readOnly {
					for call, err := range map[string]error{
						"Build":  errOf(build(t, r, "example.com/new:v1", nil, "new")),
						"Remove": errOf(r.Remove(t.Context(), ref)),
						"Tag":    errOf(r.Tag(t.Context(), digest.FromString("x"), ref, nil)),
						"GC":     errOf(r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace})),
						"Backup": errOf(r.Backup(t.Context(), one+".backup", nil)),
					} {
						if !errors.Is(err, ocilocal.ErrForeignIndex) {
							t.Errorf("%s: %v", call, err)
						}
					}
				}
				if err := r.Close(); err != nil && !errors.Is(err, ocilocal.ErrForeignIndex) {
					t.Error(err)
				}
				after := listTree(t, filepath.Dir(one))
				for name, content := range before {
					if strings.HasPrefix(name, filepath.Base(two)) || place == "another registry" && strings.HasPrefix(name, "one"+string(filepath.Separator)) {
						if after[name] != content {
							t.Errorf("%s was changed", name)
						}
					}
				}
			})
		}
	}
}

// errOf returns the error of a call.
func errOf[T any](_ T, err error) error { return err }

// TestTargetInRegistry: no call that writes to a caller's path writes into the registry itself,
// by whatever path it is named.
func TestTargetInRegistry(t *testing.T) {
	r := openTemp(t, nil)
	root := r.Root()
	a, err := build(t, r, "example.com/a:v1", nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	layers, err := a.Layers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	blob := filepath.Join("blobs", "sha256", layers[0].Digest.Encoded())
	for link, target := range map[string]string{"root": root, "tmp": filepath.Join(root, "tmp"), "algorithm": filepath.Join(root, "blobs", "sha256")} {
		if err := os.Symlink(target, filepath.Join(outside, link)); err != nil {
			t.Skip(err)
		}
	}
	if err := errors.Join(os.Mkdir(filepath.Join(outside, "linked"), 0o755), os.Symlink(filepath.Join(root, "blobs"), filepath.Join(outside, "linked", "blobs")),
		os.Link(filepath.Join(root, "index.sqlite3"), filepath.Join(outside, "log")), os.Symlink(outside, filepath.Join(outside, "self"))); err != nil {
		t.Fatal(err)
	}
	t.Chdir(root)
	refs := []ocilocal.Reference{ocilocal.MustParseReference("example.com/a:v1")}
	calls := map[string]func(path string) error{
		"ExportArchiveFile": func(path string) error {
			return r.ExportArchiveFile(t.Context(), path, refs, &ocilocal.ExportOptions{Overwrite: true})
		},
		"ExportLayout": func(path string) error {
			return r.ExportLayout(t.Context(), path, refs, &ocilocal.ExportOptions{Overwrite: true})
		},
		"Backup": func(path string) error { return errOf(r.Backup(t.Context(), path, nil)) },
	}
	paths := []string{
		root, filepath.Join(root, "tmp"), filepath.Join(root, "tmp", "x"), filepath.Join(root, "blobs"), filepath.Join(root, "new", "below"),
		filepath.Join(root, "index.sqlite3"), filepath.Join(root, "index.sqlite3-wal"), filepath.Join(root, "index.sqlite3-shm"),
		filepath.Join(root, "id"), filepath.Join(root, blob), filepath.Join(root, "blobs", "sha256", "x"),
		filepath.Join(outside, "root"), filepath.Join(outside, "root", "x"), filepath.Join(outside, "root") + "/", filepath.Join(outside, "tmp", "x"),
		filepath.Join(outside, "algorithm", "x"), filepath.Join(outside, "self", "root", "new"), outside + "/self/../root/x", filepath.Join(outside, "log"),
		".", "./", "x", "./x", "tmp/../x", "blobs/", "../" + filepath.Base(root), "../" + filepath.Base(root) + "/tmp/x/",
	}
	before := listTree(t, root)
	delete(before, "index.sqlite3-shm")
	for call, f := range calls {
		for _, path := range append(paths, map[string][]string{"ExportLayout": {filepath.Join(outside, "linked")}, "Backup": {filepath.Join(outside, "linked")}}[call]...) {
			if err := f(path); !errors.Is(err, ocilocal.ErrInvalidArgument) {
				t.Errorf("%s to %s: %v", call, path, err)
			}
			after := listTree(t, root)
			delete(after, "index.sqlite3-shm")
			if !maps.Equal(before, after) {
				t.Fatalf("%s to %s changed the registry: %q, then %q", call, path, slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
			}
		}
		// Beside the registry is not in it.
		for _, path := range []string{"../beside-" + call, filepath.Join(root, "..", "also-"+call), filepath.Join(outside, call)} {
			if err := f(path); err != nil {
				t.Errorf("%s to %s: %v", call, path, err)
			}
		}
	}
}

// TestOtherOwner: what belongs to another user is not trusted, unless the caller says so.
func TestOtherOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving files away takes root")
	}
	const other = 65534
	for _, name := range []string{".", "index.sqlite3", "index.sqlite3-wal", "tmp", "blobs"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			dontWatch(dir)
			r := mustOpen(t, dir)
			if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
				t.Fatal(err)
			}
			if name == "index.sqlite3-wal" {
				dir = killed(t, dir)
				dontWatch(dir)
			}
			mustClose(t, r)
			give := func(uid int) {
				if err := os.Lchown(filepath.Join(dir, name), uid, uid); err != nil {
					t.Fatal(err)
				}
			}
			give(other)
			before := listTree(t, dir)
			for _, open := range []func(context.Context, string, *ocilocal.Options) (*ocilocal.LocalRegistry, error){ocilocal.Open, ocilocal.OpenReadOnly} {
				if _, err := open(t.Context(), dir, nil); !errors.Is(err, ocilocal.ErrForeignRoot) {
					t.Error(err)
				}
			}
			if after := listTree(t, dir); !maps.Equal(before, after) {
				t.Errorf("%q, then %q", before, after)
			}
			r, err := ocilocal.Open(t.Context(), dir, &ocilocal.Options{AllowOtherOwner: true})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := build(t, r, "example.com/b:v1", nil, "layer"); err != nil {
				t.Error(err)
			}
			mustClose(t, r)
			if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
				give(0)
			}
			mustClose(t, mustOpen(t, dir))
		})
	}
}

// A failed look at the registry's own names does not make a target free: that the file system
// refuses one, for want of descriptors say, tells nothing about the others.
func TestTargetUnknown(t *testing.T) {
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/a:v1", nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	refs := []ocilocal.Reference{a.Reference()}
	for _, name := range []string{".", "tmp", "blobs", "blobs/sha256"} {
		target := filepath.Join(r.Root(), filepath.FromSlash(name), "x")
		ocilocal.SetFault(r, func(op, at string) error {
			if op == "stat" && !filepath.IsAbs(at) && !strings.HasPrefix(at, "blobs/sha256/") {
				return syscall.EMFILE
			}
			return nil
		})
		for call, err := range map[string]error{
			"ExportArchiveFile": r.ExportArchiveFile(t.Context(), target, refs, nil),
			"ExportLayout":      r.ExportLayout(t.Context(), target, refs, nil),
			"Backup":            errOf(r.Backup(t.Context(), target, nil)),
			"ImportArchiveFile": errOf(r.ImportArchiveFile(t.Context(), filepath.Join(r.Root(), "id"), nil)),
		} {
			if !errors.Is(err, syscall.EMFILE) {
				t.Errorf("%s to %s: %v", call, target, err)
			}
		}
		ocilocal.SetFault(r, nil)
	}
}

// Backup and Rebuild refuse another user's root as Open does, and have the same option.
func TestOtherOwnerUpkeep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving files away takes root")
	}
	const other = 65534
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/a:v1", nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := r.Backup(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "index.sqlite3", "tmp", "blobs"} {
		give := func(uid int) {
			if err := os.Lchown(filepath.Join(dir, name), uid, uid); err != nil {
				t.Fatal(err)
			}
		}
		give(other)
		for call, f := range map[string]func(allow bool) error{
			"Backup": func(allow bool) error {
				return errOf(r.Backup(t.Context(), dir, &ocilocal.BackupOptions{AllowOtherOwner: allow}))
			},
			"Rebuild": func(allow bool) error {
				return errOf(ocilocal.Rebuild(t.Context(), dir, &ocilocal.RepairOptions{AllowOtherOwner: allow}))
			},
		} {
			if err := f(false); !errors.Is(err, ocilocal.ErrForeignRoot) {
				t.Errorf("%s, owner of %s: %v", call, name, err)
			}
			if err := f(true); err != nil {
				t.Errorf("%s, owner of %s, allowed: %v", call, name, err)
			}
		}
		give(0)
	}
	// Rebuild makes a lost index in another user's root too.
	if err := errors.Join(os.Chown(dir, other, other), os.Remove(filepath.Join(dir, "index.sqlite3"))); err != nil {
		t.Fatal(err)
	}
	report, err := ocilocal.Rebuild(t.Context(), dir, &ocilocal.RepairOptions{AllowOtherOwner: true})
	if err != nil || len(report.Recovered) != 1 || report.Recovered[0].Descriptor.Digest != a.Digest() {
		t.Errorf("%+v, %v", report, err)
	}
}

// TestWorldWritableWarning: a root that more than its owner may write to is reported.
func TestWorldWritableWarning(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no such mode there")
	}
	root := t.TempDir()
	for mode, want := range map[fs.FileMode]string{0o700: "", 0o755: "", 0o750: "", 0o770: "its group", 0o775: "its group", 0o777: "everybody", 0o757: "everybody"} {
		if err := os.Chmod(root, mode); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		r, err := ocilocal.Open(t.Context(), root, &ocilocal.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
		if got := log.String(); want == "" && got != "" || want != "" && !strings.Contains(got, want) {
			t.Errorf("mode %o logs %q", mode, got)
		}
	}
}
