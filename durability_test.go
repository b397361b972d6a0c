package ocilocal_test

import (
	"fmt"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// A record is the file operations of one handle, in their order.
type record struct {
	mu  sync.Mutex
	ops []string // "op name"
}

func (r *record) fault(op, name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, op+" "+name)
	return nil
}

// last returns where an operation stands for the last time below end, or -1.
func (r *record) last(op string, end int) int {
	for i := min(end, len(r.ops)) - 1; i >= 0; i-- {
		if r.ops[i] == op {
			return i
		}
	}
	return -1
}

// checkDurable checks the order of the operations of one publish, or of one export into a layout. The
// transaction of an export is the rename of index.json. A kill loses nothing that the kernel has, so
// only this order shows what a power cut would lose:
//
//	mkdir blobs/<alg> → fsyncdir blobs
//	create tmp/<session>/x → last write → fsync of it → link blobs/… → fsyncdir blobs/<alg> → transaction
//	a blob that was there: its fsync → transaction
//
// others are the names of blobs that do not belong to it.
func (r *record) checkDurable(t *testing.T, root, tmp, commitOp string, others ...string) {
	t.Helper()
	commit := slices.Index(r.ops, commitOp)
	if commit < 0 {
		t.Fatalf("no %s", commitOp)
	}
	named, firstNamed := 0, commit // names given below blobs/
	for i, op := range r.ops[:commit] {
		verb, name, _ := strings.Cut(op, " ")
		if isBlob := strings.HasPrefix(name, "blobs/") && strings.Count(name, "/") == 2; isBlob && (verb == "link" || verb == "rename") {
			firstNamed = min(firstNamed, i)
			named++
			if r.last("fsyncdir "+filepath.ToSlash(filepath.Dir(name)), commit) < i {
				t.Errorf("%s isn't followed by an fsync of its directory", op)
			}
		}
	}
	synced := map[string]bool{}
	for i, op := range r.ops {
		verb, name, _ := strings.Cut(op, " ")
		switch {
		case verb == "create" && !strings.HasPrefix(name, tmp):
			t.Errorf("%s: outside of %s", op, tmp)
		case verb == "mkdir" && strings.HasPrefix(name, "blobs/") && r.last("fsyncdir blobs", firstNamed) < i:
			t.Errorf("%s isn't followed by an fsync of blobs before something is named in it", op)
		case verb == "fsync" && i < commit:
			synced[name] = true
		case verb == "write" && i < commit && r.last("fsync "+name, firstNamed) < i && r.last("remove "+name, commit) < i && !dedupedLater(r.ops, name):
			t.Errorf("%s isn't followed by an fsync before a blob gets its name", op)
		}
	}
	reused := 0
	blobs, err := filepath.Glob(filepath.Join(root, "blobs", "*", "*"))
	if err != nil || len(blobs) == 0 {
		t.Fatal("no blobs", err)
	}
	blobs = slices.DeleteFunc(blobs, func(b string) bool { return slices.Contains(others, filepath.Base(b)) })
	for _, b := range blobs {
		name, _ := filepath.Rel(root, b)
		if synced[filepath.ToSlash(name)] {
			reused++
		}
	}
	if named+reused < len(blobs) {
		t.Errorf("of %d blobs %d got their name and %d were synced again", len(blobs), named, reused)
	}
	if reused > 0 && r.last("fsyncdir blobs/sha256", commit) < 0 {
		t.Error("a blob that was there may have a name that isn't durable yet")
	}
}

// dedupedLater reports whether a file in tmp/ is removed without an fsync, because the store has
// the same bytes.
func dedupedLater(ops []string, name string) bool {
	return !slices.Contains(ops, "fsync "+name) && slices.Contains(ops, "remove "+name)
}

// TestDurableOrder records the operations of publishes, on a new root and on one that has some of
// the blobs.
func TestDurableOrder(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a directory isn't synced there")
	}
	for _, without := range []func(op, name string) error{nil, noLinks} {
		root := filepath.Join(t.TempDir(), "root")
		for round, layers := range [][][]byte{{noise(40, 3<<20), []byte("one")}, {[]byte("one"), noise(40, 3<<20)}} {
			rec := &record{}
			r, err := ocilocal.OpenFaulty(t.Context(), root, func(op, name string) error {
				rec.fault(op, name)
				if without != nil {
					return without(op, name)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if round == 0 {
				for _, name := range []string{"id", "index.sqlite3"} {
					if at := max(rec.last("link "+name, len(rec.ops)), rec.last("rename "+name, len(rec.ops))); at < 0 || rec.last("fsyncdir .", len(rec.ops)) < at {
						t.Errorf("%s got its name at %d of %q, which isn't followed by an fsync", name, at, rec.ops)
					}
				}
			}
			rec.ops = nil
			if _, err := publishLabelled(r, newRef, fmt.Sprint("round", round), ocilocal.Replace, layers...); err != nil {
				t.Fatal(err)
			}
			// The second round does not need the manifest of the first.
			if round == 0 {
				rec.checkDurable(t, root, "tmp/", inTransaction)
			} else {
				commit := slices.Index(rec.ops, inTransaction)
				again := 0
				for _, op := range rec.ops[:commit] {
					if strings.HasPrefix(op, "fsync blobs/sha256/") {
						again++
					}
				}
				if again > 0 || rec.last("fsyncdir blobs/sha256", commit) < 0 {
					t.Errorf("%d blobs that have rows are synced again, or their directory is not: %q", again, rec.ops)
				}
			}
			if t.Failed() {
				t.Logf("round %d: %s", round, strings.Join(rec.ops, "\n"))
			}
			mustClose(t, r)
		}
	}
}

// TestExportOrder records exports. Their blobs follow the order of a publish. A file gets its name
// after its bytes are on the disk, and index.json is the last one. New directories are durable
// before that.
func TestExportOrder(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a directory isn't synced there")
	}
	// named checks that a file gets its name after its bytes are durable, and that the name is made
	// durable. It returns the position of the operation that names it.
	named := func(t *testing.T, ops []string, name string) (at int) {
		t.Helper()
		at = max(slices.Index(ops, "link "+name), slices.Index(ops, "rename "+name)) // a link that fails comes first
		if at < 0 {
			t.Fatalf("nothing is named %s in %q", name, ops)
		}
		temp, unsynced := "", true
		for _, op := range ops[:at] {
			verb, file, _ := strings.Cut(op, " ")
			switch {
			case verb == "create" && !strings.Contains(file, "/"):
				temp, unsynced = file, true
			case file == temp && (verb == "write" || verb == "fsync"):
				unsynced = verb == "write"
			}
		}
		if unsynced || !slices.Contains(ops[at:], "fsyncdir .") {
			t.Errorf("%s gets its name before its bytes are durable (%v), or isn't durable itself: %q", name, unsynced, ops)
		}
		return at
	}
	for i := range flows {
		f := &flows[i]
		if !f.exports {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			root := f.prepare(t)
			rec := &record{}
			r, err := ocilocal.OpenFaulty(t.Context(), root, func(op, name string) error {
				rec.fault(op, name)
				if f.always != nil {
					return f.always(op, name)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, r)
			rec.ops = nil
			if err := f.run(r); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(f.name, "export archive") {
				named(t, rec.ops, archiveName)
				return
			}
			index := named(t, rec.ops, "index.json")
			if f.beside == nil {
				if version := named(t, rec.ops, "oci-layout"); version > index {
					t.Errorf("oci-layout gets its name at %d, index.json at %d", version, index)
				}
				if made := rec.last("mkdir "+besideOf(root), index); made < 0 || rec.ops[made+1] != "open "+filepath.Dir(root) || rec.ops[made+2] != "fsyncdir ." {
					t.Errorf("the target is not made durably: %q", rec.ops)
				}
			}
			if made, blob := rec.last("mkdir blobs", index), rec.last("fsyncdir blobs/sha256", index); rec.last("fsyncdir .", blob) < made {
				t.Errorf("blobs isn't durable before index.json: %q", rec.ops)
			}
			rec.ops = slices.DeleteFunc(rec.ops, func(op string) bool { return strings.HasSuffix(op, " .ocilocal-new") })
			theirs := othersEntries()
			rec.checkDurable(t, besideOf(root), ".ocilocal-tmp/", "rename index.json", path.Base(theirs[2].name), path.Base(theirs[3].name))
		})
	}
}

// TestDurableNameOfAnother: a publisher finds that a blob is missing, and before it links its own
// file, another publisher links the same bytes. The first one must sync them itself: the other may
// not have come to that.
func TestDurableNameOfAnother(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a directory isn't synced there")
	}
	root, a, b := twoHandles(t)
	blob := "blobs/sha256/" + inBoth.Encoded()
	rec, once := &record{}, sync.Once{}
	ocilocal.SetFault(a, func(op, name string) error {
		rec.fault(op, name)
		if op+" "+name == "link "+blob {
			once.Do(func() {
				if err := publishing(b, keptRef, "b", ocilocal.KeepExisting)(); err != nil {
					t.Error(err)
				}
			})
		}
		return nil
	})
	if err := publishing(a, newRef, "a", ocilocal.KeepExisting)(); err != nil {
		t.Fatal(err)
	}
	commit := slices.Index(rec.ops, inTransaction)
	link := rec.last("link "+blob, commit)
	if synced := rec.last("fsync "+blob, commit); link < 0 || synced < link || rec.last("fsyncdir blobs/sha256", commit) < synced {
		t.Errorf("link at %d, sync of the other's file at %d, transaction at %d\n%s", link, synced, commit, strings.Join(rec.ops, "\n"))
	}
	mustClose(t, a)
	mustClose(t, b)
	checkStore(t, root, model{keptRef: {"b"}, newRef: {"a"}})
}
