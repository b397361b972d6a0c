package ocilocal_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// oddTree makes a directory with everything that a name can lead to, beside a directory outside.
func oddTree(t *testing.T) (root string) {
	t.Helper()
	base := t.TempDir()
	root = filepath.Join(base, "root")
	for _, dir := range []string{"root/d/full", "root/d/empty", "root/e", "outside"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"root/f", "root/d/f", "root/d/g", "root/d/full/f", "outside/f"} {
		if err := os.WriteFile(filepath.Join(base, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{
		"link": "d", "up": "../outside", "d/link": "f", "d/toDir": "full", "d/up": "../../outside/f",
		"d/upNew": "../../outside/new", "d/dangling": "missing", "d/loop": "loop", "d/proc": "/proc/self/root",
	} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(root, "d/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	return root
}

var oddNames = []string{
	"d/f", "d/missing", "d/full", "d/empty", "d/full/f", "d/full/missing", "d/fifo", "d/link", "d/toDir", "d/toDir/f",
	"d/up", "d/upNew", "d/dangling", "d/loop", "d/loop/f", "d/proc", "d/proc/etc", "link/f", "link/missing", "up/f", "up/new",
	"missing/f", "d/f/x", "d/fifo/x", "f", "missing", "d", "", ".", "..", "/", "/etc/passwd", "../outside/f", "d/../../outside/f",
	"d/../d/g", "d/./g", "d//g", "d/g/", "d/empty/", "d/g\x00", "d/\xff", "d/" + strings.Repeat("x", 300),
}

// shortcutOps are the operations of a root that have a shortcut, each with what it shows of its outcome.
var shortcutOps = map[string]func(r *ocilocal.RootDir, name string) string{
	"open": func(r *ocilocal.RootDir, name string) string { return openOdd(r, name, os.O_RDONLY) },
	"open without links": func(r *ocilocal.RootDir, name string) string {
		return openOdd(r, name, os.O_RDWR|syscall.O_NOFOLLOW)
	},
	"create new": func(r *ocilocal.RootDir, name string) string {
		return openOdd(r, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	},
	"create":   func(r *ocilocal.RootDir, name string) string { return openOdd(r, name, os.O_RDWR|os.O_CREATE) },
	"append":   func(r *ocilocal.RootDir, name string) string { return openOdd(r, name, os.O_RDWR|os.O_APPEND) },
	"truncate": func(r *ocilocal.RootDir, name string) string { return openOdd(r, name, os.O_RDWR|os.O_TRUNC) },
	"stat": func(r *ocilocal.RootDir, name string) string {
		fi, err := r.Stat(name)
		return infoText(fi, err)
	},
	"lstat": func(r *ocilocal.RootDir, name string) string {
		fi, err := r.Lstat(name)
		return infoText(fi, err)
	},
	"link from": func(r *ocilocal.RootDir, name string) string {
		return fmt.Sprint(r.Link(name, "e/"+strings.ReplaceAll(name, "/", "_")))
	},
	"link beside": func(r *ocilocal.RootDir, name string) string { return fmt.Sprint(r.Link("d/g", name)) },
	"link to":     func(r *ocilocal.RootDir, name string) string { return fmt.Sprint(r.Link("d/full/f", name)) },
	"remove":      func(r *ocilocal.RootDir, name string) string { return fmt.Sprint(r.Remove(name)) },
}

func openOdd(r *ocilocal.RootDir, name string, flag int) string {
	f, err := r.OpenFile(name, flag|syscall.O_NONBLOCK, 0o640)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	fi, err := f.Stat()
	text := infoText(fi, err)
	if fi.Mode().IsRegular() {
		b, err := io.ReadAll(f)
		_, at := f.WriteAt([]byte("x"), 0)
		text += fmt.Sprintf(", %q, %v, %v", b, err, at)
	}
	return text
}

func infoText(fi fs.FileInfo, err error) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s, %v, %d bytes", fi.Name(), fi.Mode(), fi.Size())
}

// treeText is what lies in a directory, by name.
func treeText(t *testing.T, dir string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		text := fi.Mode().String()
		switch fi.Mode().Type() {
		case 0:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(", %d names, %q", fi.Sys().(*syscall.Stat_t).Nlink, b)
		case fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " to " + to
		}
		name, err := filepath.Rel(dir, path)
		tree[name] = text
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func openRootDir(t *testing.T, dir string, short bool) *ocilocal.RootDir {
	t.Helper()
	r, err := ocilocal.OpenRootDir(dir, short)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// TestShortcutsSame compares each operation with and without its shortcut: outcome,
// error, and the tree that it leaves. Nothing outside the root changes or is read.
func TestShortcutsSame(t *testing.T) {
	for op, do := range shortcutOps {
		var roots [2]*ocilocal.RootDir
		var dirs [2]string
		for i := range roots {
			dirs[i] = oddTree(t)
			roots[i] = openRootDir(t, dirs[i], i == 0)
		}
		outside := treeText(t, filepath.Join(dirs[0], "../outside"))
		for _, name := range oddNames {
			got := strings.ReplaceAll(do(roots[0], name), dirs[0], "/root")
			want := strings.ReplaceAll(do(roots[1], name), dirs[1], "/root")
			if got != want {
				t.Errorf("%s %.40q: by a shortcut %q, by os.Root %q", op, name, got, want)
			}
			if strings.Contains(got, "outside") && !strings.Contains(name, "outside") {
				t.Errorf("%s %.40q leads out: %s", op, name, got)
			}
		}
		for _, r := range roots {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if got := do(r, "d/f"); !strings.Contains(got, fs.ErrClosed.Error()) {
				t.Errorf("%s after Close: %s", op, got)
			}
		}
		if got, want := treeText(t, dirs[0]), treeText(t, dirs[1]); !maps.Equal(got, want) {
			t.Errorf("%s leaves by shortcuts\n%v\nby os.Root\n%v", op, got, want)
		}
		for _, dir := range dirs {
			if got := treeText(t, filepath.Join(dir, "../outside")); !maps.Equal(got, outside) {
				t.Errorf("%s changed what is outside: %v", op, got)
			}
		}
	}
}

// TestOpenNoFollow refuses a link at the end of a name, wherever it leads. It follows one on the way.
func TestOpenNoFollow(t *testing.T) {
	for _, short := range []bool{true, false} {
		r := openRootDir(t, oddTree(t), short)
		for _, name := range []string{"link", "d/link", "d/toDir", "d/up", "d/upNew", "d/dangling", "d/loop", "d/toDir/f"} {
			f, err := r.OpenFile(name, os.O_RDONLY|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
			if err == nil {
				f.Close()
			}
			if want := name != "d/toDir/f"; errors.Is(err, syscall.ELOOP) != want || !want && err != nil {
				t.Errorf("shortcut %v: %s: %v", short, name, err)
			}
		}
	}
}

// TestShortcutsTaken: the paths of blobs have a shortcut, and a name that needs the care of os.Root
// has none.
func TestShortcutsTaken(t *testing.T) {
	r := openRootDir(t, oddTree(t), true)
	if !ocilocal.HasShortcut(r) {
		t.Skip("this system has no openat2, or does not allow it")
	}
	for name, want := range map[string]bool{
		"d/f": true, "d/full/f": true, "d/missing": true, "missing/f": true, "d/empty": true, "d/fifo": true,
		"f": false, "d/link": false, "link/f": false, "up/f": false, "d/../f": false, "d/./f": false, "d/proc/etc": false,
	} {
		f, done, err := ocilocal.ShortcutOpen(r, name)
		if done != want || done && err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: done %v, %v", name, done, err)
		}
		if f != nil {
			f.Close()
		}
	}
	if done, err := ocilocal.ShortcutLink(r, "d/f", "d/full/new"); !done || err != nil {
		t.Errorf("link: done %v, %v", done, err)
	}
	if done, err := ocilocal.ShortcutRemove(r, "d/full/new"); !done || err != nil {
		t.Errorf("remove: done %v, %v", done, err)
	}
}

// TestShortcutReplacedDirectory replaces a directory between two calls, by another directory and by
// a link that leads out.
func TestShortcutReplacedDirectory(t *testing.T) {
	for _, short := range []bool{true, false} {
		dir := oddTree(t)
		r := openRootDir(t, dir, short)
		at := func(name string) string { return filepath.Join(dir, name) }
		read := func() string { return openOdd(r, "d/full/f", os.O_RDWR) }
		if got := read(); !strings.Contains(got, "root/d/full/f") {
			t.Fatal(got)
		}
		if err := errors.Join(os.Rename(at("d/full"), at("old")), os.Mkdir(at("d/full"), 0o700),
			os.WriteFile(at("d/full/f"), []byte("other"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if got := read(); !strings.Contains(got, "other") {
			t.Errorf("shortcut %v: the old directory is read: %s", short, got)
		}
		if err := errors.Join(os.RemoveAll(at("d/full")), os.Symlink("../../outside", at("d/full"))); err != nil {
			t.Fatal(err)
		}
		for op, do := range shortcutOps {
			if got := do(r, "d/full/f"); !strings.Contains(got, "escapes") {
				t.Errorf("shortcut %v: %s through a link: %s", short, op, got)
			}
		}
	}
}

// TestShortcutRaces exchanges a directory and a link that leads out, again and again, while all
// operations use names below it.
func TestShortcutRaces(t *testing.T) {
	for _, short := range []bool{true, false} {
		dir := oddTree(t)
		r := openRootDir(t, dir, short)
		outside := filepath.Join(dir, "../outside")
		want := treeText(t, outside)
		full, kept := filepath.Join(dir, "d/full"), filepath.Join(dir, "kept")
		stop, stopped := make(chan struct{}), make(chan error)
		go func() {
			var err error
			for swaps := 0; err == nil; swaps++ {
				select {
				case <-stop:
					stopped <- nil
					return
				default:
				}
				err = errors.Join(os.Rename(full, kept), os.Symlink("../../outside", full), os.Remove(full), os.Rename(kept, full))
			}
			stopped <- err
		}()
		ops := slices.Sorted(maps.Keys(shortcutOps))
		for range 300 {
			for _, op := range ops {
				for _, name := range []string{"d/full/f", "d/full/new"} {
					if got := shortcutOps[op](r, name); strings.Contains(got, "outside") {
						t.Errorf("shortcut %v: %s reads %s", short, op, got)
					}
				}
			}
		}
		close(stop)
		if err := <-stopped; err != nil {
			t.Fatal(err)
		}
		if got := treeText(t, outside); !maps.Equal(got, want) {
			t.Errorf("shortcut %v: outside is now %v", short, got)
		}
	}
}
