package ocilocal_test

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestSweepKeepsForeign: what lies in tmp/ without a mark of ours stays, through publishes and
// collections; what a killed process has left goes.
func TestSweepKeepsForeign(t *testing.T) {
	t.Parallel()
	name, d := rand.Text(), strings.Replace(digest.FromString("x").String(), ":", "-", 1)
	mode := func(p plant, at string, perm fs.FileMode) plant {
		return plant{p.name, func(t *testing.T, dir string) {
			p.make(t, dir)
			if err := os.Chmod(filepath.Join(dir, filepath.FromSlash(at)), perm); err != nil {
				t.Fatal(err)
			}
		}}
	}
	private := func(p plant) plant { return mode(p, "tmp/"+name, 0o700) }
	fifo := func(at string) plant {
		return plant{at + " is a pipe", func(t *testing.T, dir string) {
			if err := syscall.Mkfifo(filepath.Join(dir, filepath.FromSlash(at)), 0o600); err != nil {
				t.Fatal(err)
			}
		}}
	}
	for _, c := range []struct {
		plant
		goes bool
	}{
		{private(planted("a session", "tmp/"+name+"/"+rand.Text(), "tmp/"+name+"/"+rand.Text()+"-wal")), true},
		{private(planted("an empty session", "tmp/"+name+"/")), true},
		{planted("a partial blob", "tmp/partial/"+d+"/data"), true},
		{planted("a quarantined file", "tmp/quarantine/"+d), true},
		{planted("a file", "tmp/thesis.tex"), false},
		{planted("a directory", "tmp/work/data.csv"), false},
		{planted("a file with a session's name", "tmp/"+name), false},
		{planted("a directory of another mode", "tmp/"+name+"/"+rand.Text()), false},
		{private(planted("a foreign file in a session", "tmp/"+name+"/thesis.tex")), false},
		{private(planted("a directory in a session", "tmp/"+name+"/"+rand.Text()+"/thesis.tex")), false},
		{planted("a file in partial", "tmp/partial/thesis.tex"), false},
		{planted("a foreign directory in partial", "tmp/partial/work/data"), false},
		{planted("a foreign file beside a partial blob", "tmp/partial/"+d+"/thesis.tex"), false},
		{planted("a file in quarantine", "tmp/quarantine/thesis.tex"), false},
		{planted("a directory in quarantine", "tmp/quarantine/"+d+"/thesis.tex"), false},
		{planted("a file called partial", "tmp/partial"), false},
		{link("tmp/" + name), false},
		{link("tmp/partial"), false},
		{link("tmp/quarantine"), false},
		{fifo("tmp/" + name), false},
		{fifo("tmp/quarantine"), false},
		{plant{"a link in quarantine to a directory of the root", func(t *testing.T, dir string) {
			planted("", "mine/"+d).make(t, dir)
			if err := os.Symlink("../mine", filepath.Join(dir, "tmp", "quarantine")); err != nil {
				t.Fatal(err)
			}
		}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			mustClose(t, mustOpen(t, dir))
			clean := listTree(t, dir)
			c.make(t, dir)
			there := listTree(t, dir)
			dontWatch(dir)
			r, err := ocilocal.Open(t.Context(), dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
				t.Error(err)
			}
			if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); err != nil {
				t.Error(err)
			}
			if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
				t.Error(err)
			}
			mustClose(t, r)
			want := there
			if c.goes {
				want = clean
			}
			after := listTree(t, dir)
			delete(want, "index.sqlite3")
			delete(after, "index.sqlite3")
			delete(after, filepath.Join("blobs", "sha256"))
			if !maps.Equal(want, after) {
				t.Errorf("want %q\ngot  %q", slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(after)))
			}
		})
	}
}

// TestSweepKeepsMounts: what is mounted in the place of something of ours is neither emptied nor
// entered.
func TestSweepKeepsMounts(t *testing.T) {
	name, d := rand.Text(), strings.Replace(digest.FromString("x").String(), ":", "-", 1)
	for _, at := range []string{"tmp/" + name, "tmp/partial", "tmp/partial/" + d, "tmp/quarantine", "tmp/" + name + "/" + rand.Text()} {
		t.Run(at, func(t *testing.T) {
			dir, other := t.TempDir(), t.TempDir()
			mustClose(t, mustOpen(t, dir))
			dontWatch(dir)
			planted("", "thesis.tex", "work/data.csv").make(t, other)
			full := filepath.Join(dir, filepath.FromSlash(at))
			if err := errors.Join(os.MkdirAll(full, 0o700), os.Chmod(filepath.Dir(full), 0o700)); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mount(other, full, "", syscall.MS_BIND, ""); err != nil {
				t.Skipf("mounting takes root and the right to do so: %v", err)
			}
			defer func() {
				if err := syscall.Unmount(full, syscall.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}()
			before := listTree(t, other)
			r, err := ocilocal.Open(t.Context(), dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
				t.Error(err)
			}
			_, err = r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace})
			if err != nil && !errors.Is(err, syscall.EBUSY) {
				t.Error(err)
			}
			mustClose(t, r)
			if after := listTree(t, other); !maps.Equal(before, after) {
				t.Errorf("before %q\nafter  %q", before, after)
			}
		})
	}
}
