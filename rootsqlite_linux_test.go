package ocilocal_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// planters put something under a name that SQLite opens. On some of these it would block, and the
// others lead it to files of somebody else.
var planters = map[string]func(name string) error{
	"named pipe": func(name string) error { return syscall.Mkfifo(name, 0o600) },
	"directory":  func(name string) error { return os.Mkdir(name, 0o700) },
	"link":       func(name string) error { return os.Symlink(filepath.Join(filepath.Dir(name), "id"), name) },
	"lost link":  func(name string) error { return os.Symlink("nowhere", name) },
	"hard link": func(name string) error {
		other := filepath.Join(filepath.Dir(name), "other")
		return errors.Join(ignoreExist(os.WriteFile(other, []byte("theirs"), 0o600)), os.Link(other, name))
	},
	"another user's": func(name string) error {
		if os.Getuid() != 0 {
			return nil
		}
		return errors.Join(os.WriteFile(name, nil, 0o600), os.Chown(name, 65534, 65534))
	},
}

func ignoreExist(err error) error {
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// TestPlantedSideFiles puts pipes, links and foreign files beside the databases of every call that
// opens one. Each call reports them, without blocking, and changes nothing.
func TestPlantedSideFiles(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Log("not run as root: no file of another user is planted")
	}
	ctx := t.Context()
	r := openTemp(t, nil)
	root := filepath.Join(t.TempDir(), "root")
	planted := mustOpen(t, root)
	if _, err := publishLabelled(planted, keptRef, "kept", ocilocal.KeepExisting, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	mustClose(t, planted)
	dontWatch(root)
	o := newOMMXRoot(t, 2)
	o.add("example.com/ommx", "v1", "one")
	if err := o.db.Close(); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		dir  string
		call func() error
	}{
		"Open":         {root, func() error { return openAndClose(ctx, ocilocal.Open, root) }},
		"OpenReadOnly": {root, func() error { return openAndClose(ctx, ocilocal.OpenReadOnly, root) }},
		"Rebuild":      {root, func() error { _, err := ocilocal.Rebuild(ctx, root, nil); return err }},
		"Backup":       {root, func() error { _, err := r.Backup(ctx, root, nil); return err }},
		"ImportOMMX":   {o.dir, func() error { _, err := r.ImportOMMX(ctx, o.dir, nil); return err }},
	} {
		for kind, plant := range planters {
			for _, suffix := range []string{"-journal", "-wal", "-shm"} {
				name := filepath.Join(c.dir, "index.sqlite3"+suffix)
				if err := plant(name); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Lstat(name); err != nil {
					continue
				}
				before := listing(t, c.dir)
				if err := c.call(); !errors.Is(err, ocilocal.ErrForeignIndex) {
					t.Errorf("%s with a %s as %s: %v, want ErrForeignIndex", what, kind, suffix, err)
				}
				if after := listing(t, c.dir); after != before {
					t.Errorf("%s with a %s as %s changed\n%s to\n%s", what, kind, suffix, before, after)
				}
				if err := errors.Join(os.Remove(name), ignoreMissing(os.Remove(filepath.Join(c.dir, "other")))); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := c.call(); err != nil && what != "Backup" {
			t.Errorf("%s afterwards: %v", what, err)
		}
	}
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
