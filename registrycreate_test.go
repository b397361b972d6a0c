package ocilocal_test

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A plant is something in a directory that is not a registry's. dir exists.
type plant struct {
	name string
	make func(t *testing.T, dir string)
}

// planted is a plant of files, by their paths. A path that ends with a slash is a directory.
func planted(name string, paths ...string) plant {
	return plant{name, func(t *testing.T, dir string) {
		t.Helper()
		for _, p := range paths {
			full := filepath.Join(dir, filepath.FromSlash(p))
			err := os.MkdirAll(filepath.Dir(full), 0o755)
			if strings.HasSuffix(p, "/") {
				err = os.MkdirAll(full, 0o755)
			} else if err == nil {
				err = os.WriteFile(full, []byte("content of "+p), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}}
}

// link is a plant of a symbolic link to a directory outside that has a file.
func link(at string) plant {
	return plant{at + " is a link", func(t *testing.T, dir string) {
		t.Helper()
		outside := t.TempDir()
		t.Cleanup(func() {
			if b, err := os.ReadFile(filepath.Join(outside, "thesis.tex")); err != nil || string(b) != "content of thesis.tex" {
				t.Errorf("where the link leads: %q, %v", b, err)
			}
		})
		planted("", "thesis.tex").make(t, outside)
		full := filepath.Join(dir, filepath.FromSlash(at))
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.Symlink(outside, full)); err != nil {
			t.Fatal(err)
		}
	}}
}

// listTree is every entry below dir, with its kind, mode and bytes.
func listTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		got[rel] = fi.Mode().String()
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			got[rel] += " " + string(b)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestOpenForeignNames: a registry is made only where its names are free. Otherwise, whatever
// has them, nothing is changed.
func TestOpenForeignNames(t *testing.T) {
	blob := "blobs/sha256/" + digest.FromString("x").Encoded()
	plants := []plant{
		planted("tmp with files", "tmp/thesis.tex", "tmp/work/data.csv"),
		planted("tmp is empty", "tmp/"),
		planted("tmp is a file", "tmp"),
		planted("tmp with what looks like a session", "tmp/"+rand.Text()+"/"+rand.Text()),
		planted("blobs with a blob", blob),
		planted("blobs is empty", "blobs/"),
		planted("blobs is a file", "blobs"),
		planted("id is text", "id"),
		planted("id is a directory", "id/x"),
		planted("half an id is a directory", ".ocilocal-id/"),
		link("tmp"), link("blobs"), link("id"), link(".ocilocal-id"),
		{"id is a number", func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, "id"), []byte("1234\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, p := range plants {
		t.Run(p.name, func(t *testing.T) {
			dir := t.TempDir()
			p.make(t, dir)
			planted("", "notes.txt").make(t, dir)
			before := listTree(t, dir)
			source := openTemp(t, nil)
			if _, err := build(t, source, "example.com/a:v1", nil, "layer"); err != nil {
				t.Fatal(err)
			}
			if r, err := ocilocal.Open(t.Context(), dir, nil); !errors.Is(err, ocilocal.ErrForeignRoot) || r != nil {
				t.Errorf("Open: %v", err)
			}
			if _, err := ocilocal.OpenReadOnly(t.Context(), dir, nil); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("OpenReadOnly: %v", err)
			}
			if _, err := source.Backup(t.Context(), dir, nil); !errors.Is(err, ocilocal.ErrForeignRoot) {
				t.Errorf("Backup: %v", err)
			}
			if !strings.HasPrefix(p.name, "blobs") { // which Rebuild is for
				if _, err := ocilocal.Rebuild(t.Context(), dir, nil); err == nil {
					t.Error("Rebuild succeeded")
				}
			}
			if after := listTree(t, dir); !maps.Equal(before, after) {
				t.Errorf("before %q\nafter  %q", before, after)
			}
		})
	}
}

// TestOpenAfterKill stops the first open of a root at each file operation: nothing that it does
// after that takes effect, as if it had been killed. The next Open completes the root.
func TestOpenAfterKill(t *testing.T) {
	t.Parallel()
	for n := 1; ; n++ {
		root := filepath.Join(t.TempDir(), "root")
		dontWatch(root)
		ops, stopped := 0, ""
		r, err := ocilocal.OpenFaulty(t.Context(), root, func(op, name string) error {
			if ops++; ops >= n {
				if ops == n {
					stopped = op + " " + name
				}
				return syscall.EIO
			}
			return nil
		})
		if err == nil {
			ocilocal.SetFault(r, nil)
			mustClose(t, r)
			if n < 20 {
				t.Errorf("only %d operations", n)
			}
			return
		}
		if r, err = ocilocal.Open(t.Context(), root, nil); err != nil {
			t.Fatalf("after a stop before %s: %v", stopped, err)
		}
		if _, err := publishLabelled(r, newRef, "x", ocilocal.KeepExisting); err != nil {
			t.Fatalf("after a stop before %s: %v", stopped, err)
		}
		mustClose(t, r)
		checkStore(t, root, model{newRef: {"x"}})
		for _, left := range []string{".ocilocal-id", "tmp/*"} {
			if names, _ := filepath.Glob(filepath.Join(root, left)); len(names) > 0 {
				t.Errorf("left over: %q", names)
			}
		}
		if t.Failed() {
			t.Fatalf("after a stop before %s", stopped)
		}
	}
}

// TestOpenNameTaken: another program takes the name of the id or of the index while the first open
// makes its own. That file is not replaced, with and without hard links.
func TestOpenNameTaken(t *testing.T) {
	for name, want := range map[string]error{"id": ocilocal.ErrForeignRoot, "index.sqlite3": ocilocal.ErrForeignIndex} {
		for links, fails := range map[string]error{"links": nil, "no links": syscall.EPERM} {
			t.Run(name+" "+links, func(t *testing.T) {
				root := t.TempDir()
				dontWatch(root)
				file := filepath.Join(root, name)
				r, err := ocilocal.OpenFaulty(t.Context(), root, func(op, at string) error {
					if op != "link" {
						return nil
					}
					if at == name {
						if err := os.WriteFile(file, []byte("another program's"), 0o600); err != nil {
							t.Error(err)
						}
					}
					return fails
				})
				if !errors.Is(err, want) || r != nil {
					t.Errorf("Open: %v, want %v", err, want)
				}
				if b, err := os.ReadFile(file); err != nil || string(b) != "another program's" {
					t.Errorf("%s holds %q, %v", name, b, err)
				}
				for _, left := range []string{".ocilocal-id", "tmp/*"} {
					if names, _ := filepath.Glob(filepath.Join(root, left)); len(names) > 0 {
						t.Errorf("left over: %q", names)
					}
				}
			})
		}
	}
}

// TestOpenBusyRoot: a root that somebody keeps locked can't be made, and Open says so in time.
func TestOpenBusyRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	reached, let := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		r, err := ocilocal.OpenFaulty(context.Background(), root, func(op, name string) error {
			if op+" "+name == "link index.sqlite3" {
				close(reached)
				<-let
			}
			return nil
		})
		if err == nil {
			err = r.Close()
		}
		first <- err
	}()
	<-reached
	if _, err := ocilocal.Open(t.Context(), root, &ocilocal.Options{BusyTimeout: 1}); !errors.Is(err, ocilocal.ErrBusy) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ocilocal.Open(ctx, root, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(let)
	if err := <-first; err != nil {
		t.Error(err)
	}
	mustClose(t, mustOpen(t, root))
}
