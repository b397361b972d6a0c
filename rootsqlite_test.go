package ocilocal_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func openAndClose(ctx context.Context, open func(context.Context, string, *ocilocal.Options) (*ocilocal.LocalRegistry, error), dir string) error {
	r, err := open(ctx, dir, nil)
	if err != nil {
		return err
	}
	return r.Close()
}

// listing returns the modes and names of the entries of a directory, and the digests of its files.
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
// that even for a reader, and cut the index to the length in the journal. Every way to open the
// registry refuses it and changes nothing.
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

// TestOMMXJournal: an OMMX registry whose writer was killed has a journal, without which its rows
// are half of a transaction. Playing it back changes the registry, so the import refuses and leaves
// that to the SDK.
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
