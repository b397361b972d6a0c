//go:build unix

package ocilocal_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// undoCommit lets publish commit, and then hides the commit as the death of its process can: the
// log has it, but SQLite's shared memory does not say so. No process sees it until the log is read
// again from the file. The next commit overwrites it.
func undoCommit(t *testing.T, root string, publish func()) {
	t.Helper()
	shm, err := os.OpenFile(filepath.Join(root, "index.sqlite3-shm"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shm.Close() }) // not before the registry, whose locks would go with it
	header := make([]byte, 96)        // two copies of SQLite's WalIndexHdr
	if _, err := shm.ReadAt(header, 0); err != nil {
		t.Fatal(err)
	}
	publish()
	if _, err := shm.WriteAt(header, 0); err != nil {
		t.Fatal(err)
	}
}

// TestCollectionAfterUnseenCommit: a process dies in the last moment of a commit, so that only the
// log has it. To a collector the blobs of that commit are garbage, and it deletes them. The commit
// must not appear afterwards, even if the collector is killed at any moment.
func TestCollectionAfterUnseenCommit(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"publish", "tag"} {
		root := t.TempDir()
		r, err := ocilocal.Open(t.Context(), root, nil)
		if err != nil {
			t.Fatal(err)
		}
		orphan := child(t, r, "example.com/orphan:v1", ocilocal.BuilderOptions{}, nil, nil, "orphan")
		child(t, r, "example.com/kept:v1", ocilocal.BuilderOptions{}, nil, nil, "kept")
		if _, err := r.Remove(t.Context(), orphan.Reference()); err != nil {
			t.Fatal(err)
		}
		ref := ocilocal.MustParseReference("example.com/unseen:v1")
		undoCommit(t, root, func() {
			dying, err := ocilocal.Open(t.Context(), root, nil)
			if err != nil {
				t.Fatal(err)
			}
			if what == "publish" {
				child(t, dying, ref.String(), ocilocal.BuilderOptions{}, nil, nil, "unseen", "another")
			} else if _, err := dying.Tag(t.Context(), orphan.Digest(), ref, nil); err != nil {
				t.Fatal(err)
			}
			mustClose(t, dying)
		})
		if ok, err := r.Exists(t.Context(), ref); ok || err != nil {
			t.Fatal("the commit is seen", err)
		}
		if copied := mustOpen(t, killed(t, root)); true {
			if _, err := copied.Load(t.Context(), ref); err != nil {
				t.Fatal("the commit is not in the log: ", err)
			}
			sweep(t, copied)
			mustClose(t, copied)
		}
		var deaths []string
		removed := 0
		ocilocal.SetFault(r, func(op, name string) error {
			if op == "remove" && strings.HasPrefix(name, "blobs/") {
				if removed++; removed > 1 {
					deaths = append(deaths, killed(t, root))
				}
			}
			return nil
		})
		if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
			t.Fatal(err)
		}
		ocilocal.SetFault(r, nil)
		deaths = append(deaths, killed(t, root))
		if removed < 2 || len(deaths) != removed {
			t.Fatalf("%s: %d files removed, %d deaths", what, removed, len(deaths))
		}
		for i, dir := range deaths {
			after := mustOpen(t, dir)
			if _, err := after.Resolve(t.Context(), ref); err == nil {
				t.Errorf("%s: after death %d of %d the commit is back", what, i, len(deaths))
			} else if !errors.Is(err, ocilocal.ErrNotFound) {
				t.Error(err)
			}
			if got, err := after.GCReport(t.Context(), nil); err != nil || len(got.Missing) > 0 {
				t.Errorf("%+v, %v", got, err)
			}
			sweep(t, after)
			mustClose(t, after)
		}
		mustClose(t, r)
	}
}

// sweep publishes, which removes the files that dead processes left in tmp/.
func sweep(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	child(t, r, "example.com/new:v1", ocilocal.BuilderOptions{}, nil, nil, "new")
	checkNoTmp(t, r)
}

// TestDeletedLog: somebody deletes the log after a crash. The refs since the last checkpoint are
// lost, but the registry is sound. It reports the blobs that no row names, and Repair records them.
func TestDeletedLog(t *testing.T) {
	root := t.TempDir()
	r := mustOpen(t, root)
	kept := child(t, r, "example.com/kept:v1", ocilocal.BuilderOptions{}, nil, nil, "kept")
	mustClose(t, r) // which writes the log back
	r = mustOpen(t, root)
	lost := child(t, r, "example.com/lost:v1", ocilocal.BuilderOptions{}, nil, nil, "lost")
	dir := killed(t, root)
	mustClose(t, r)
	if err := os.Remove(filepath.Join(dir, "index.sqlite3-wal")); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, dir)
	defer mustClose(t, r)
	if a, err := r.Load(t.Context(), kept.Reference()); err != nil || a.Digest() != kept.Digest() {
		t.Error(err)
	}
	if _, err := r.Load(t.Context(), lost.Reference()); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	unrecorded := 0
	for p, err := range r.Verify(t.Context(), nil) {
		switch {
		case err != nil:
			t.Error(err)
		case p.Kind == ocilocal.ProblemUnrecorded:
			unrecorded++
		case p.Kind != ocilocal.ProblemMode: // by copying
			t.Error(p)
		}
	}
	if unrecorded != 2 {
		t.Errorf("%d blobs are unrecorded", unrecorded)
	}
	if report, err := r.Repair(t.Context(), nil); err != nil || !slices.Equal(report.Recorded, []digest.Digest{lost.Digest()}) {
		t.Errorf("%v, %+v", err, report)
	}
	if _, err := r.Tag(t.Context(), lost.Digest(), lost.Reference(), nil); err != nil {
		t.Error(err)
	}
	checkSound(t, r)
	if lost, err := r.Load(t.Context(), lost.Reference()); err != nil {
		t.Error(err)
	} else {
		checkArtifact(t, lost, "lost")
	}
}
