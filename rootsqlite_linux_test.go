package ocilocal_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// planters put something at a name that SQLite would open, or at which it would block.
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

// TestPlantedSideFiles puts what SQLite must not open beside the databases of every call that
// opens one. Each call reports it, without blocking, and changes nothing.
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

func openAndClose(ctx context.Context, open func(context.Context, string, *ocilocal.Options) (*ocilocal.LocalRegistry, error), dir string) error {
	r, err := open(ctx, dir, nil)
	if err != nil {
		return err
	}
	return r.Close()
}

// listing is the names, modes, sizes and content of the files in a directory.
func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(fi.Mode().String() + " " + e.Name())
		if fi.Mode().IsRegular() {
			content, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			b.WriteString(" " + digest.FromBytes(content).String())
		}
		b.WriteString("\n")
	}
	return b.String()
}

// TestPlantedJournal: a journal beside the index says that pages must be put back. SQLite would do
// that even for a reader, and cut the index to the length that the journal names.
func TestPlantedJournal(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	mustClose(t, mustOpen(t, root))
	dontWatch(root)
	journal := make([]byte, 512)
	copy(journal, "\xd9\xd5\x05\xf9\x20\xa1\x63\xd7") // the magic number; no record follows
	copy(journal[16:], "\x00\x00\x00\x01")            // the database had one page
	copy(journal[20:], "\x00\x00\x02\x00\x00\x00\x10\x00")
	name := filepath.Join(root, "index.sqlite3")
	write(t, name+"-journal", string(journal))
	before := listing(t, root)
	for what, open := range openers {
		if err := openAndClose(t.Context(), open, root); !errors.Is(err, ocilocal.ErrForeignIndex) {
			t.Errorf("%s: %v, want ErrForeignIndex", what, err)
		}
	}
	if after := listing(t, root); after != before {
		t.Errorf("changed\n%s to\n%s", before, after)
	}
}

// TestOMMXJournal: an OMMX registry whose writer was killed has a journal that must be played back
// before its rows mean anything. That changes the registry, so the import leaves it to the SDK.
func TestOMMXJournal(t *testing.T) {
	o := newOMMXRoot(t, 2)
	o.exec("PRAGMA journal_mode = DELETE")
	o.add("example.com/ommx", "v1", "one")
	o.exec("PRAGMA cache_size = 1")
	o.exec("BEGIN")
	o.add("example.com/half", "v1", "two")
	o.exec("CREATE TABLE filler (a)") // it spills the pages of the transaction
	o.exec("INSERT INTO filler VALUES (zeroblob(100000))")
	killed := t.TempDir()
	if err := os.CopyFS(killed, os.DirFS(o.dir)); err != nil {
		t.Fatal(err)
	}
	o.exec("ROLLBACK")
	if fi, err := os.Stat(filepath.Join(killed, "index.sqlite3-journal")); err != nil || fi.Size() == 0 {
		t.Fatal("there is no journal", err)
	}
	before := listing(t, killed)
	r := openTemp(t, nil)
	report, err := r.ImportOMMX(t.Context(), killed, nil)
	if !errors.Is(err, ocilocal.ErrForeignIndex) || report.Scanned != 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if after := listing(t, killed); after != before {
		t.Errorf("changed\n%s to\n%s", before, after)
	}
	checkUnpublished(t, r)
	report, err = r.ImportOMMX(t.Context(), o.dir, nil)
	if err != nil || report.Scanned != 1 || len(report.Failed) != 0 {
		t.Errorf("without the journal: %+v, %v", report, err)
	}
}
