package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// TestUnseenCommitOnFullDisk makes a commit that nobody has seen, at each moment of a collection
// that deletes what the commit needs, on full disks with more and more space left. Whenever the
// collector is killed then, the commit is gone or its artifact is whole.
func TestUnseenCommitOnFullDisk(t *testing.T) {
	t.Parallel()
	const kib = 1 << 10
	committed, freed := 0, 0
	step := int64(scaled(96, 24, 4) * kib)
	for _, slack := range []bool{false, true}[:scaled(1, 2, 2)] { // whether the log's file is longer than what it holds
		for room := step % (72 * kib); room <= 96*kib; room += step {
			t.Run(fmt.Sprintf("slack %v, room %d", slack, room), func(t *testing.T) {
				for n := 1; ; n++ {
					u := unseenOnFullDisk{slack: slack, room: room, at: n}
					u.run(t)
					if u.committed {
						committed++
					}
					if u.deleted {
						freed++
					}
					if u.looks < n || t.Failed() {
						break
					}
				}
			})
		}
	}
	if t.Logf("%d commits, %d collections deleted something", committed, freed); committed == 0 || freed == 0 {
		t.Errorf("%d commits were made, and %d collections deleted something", committed, freed)
	}
}

type unseenOnFullDisk struct {
	slack bool
	room  int64 // bytes that the disk has left
	at    int   // at which look at its context the collection meets the commit

	looks              int
	committed, deleted bool
}

func (u *unseenOnFullDisk) run(t *testing.T) {
	mnt := mountTmpfs(t, "size=1m")
	root := filepath.Join(mnt, "root")
	open := func() *ocilocal.LocalRegistry {
		r, err := ocilocal.Open(t.Context(), root, &ocilocal.Options{BusyTimeout: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r, dying := open(), open()
	orphan := child(t, r, "example.com/orphan:v1", ocilocal.BuilderOptions{}, nil, nil, "one", "two", "three")
	kept := child(t, r, "example.com/kept:v1", ocilocal.BuilderOptions{}, nil, nil, "kept")
	if u.slack {
		execIndex(t, root, "PRAGMA wal_checkpoint(RESTART)")
	}
	if _, err := r.Remove(t.Context(), orphan.Reference()); err != nil {
		t.Fatal(err)
	}
	warm := ocilocal.MustParseReference("example.com/warm:v1")
	if _, err := dying.Tag(t.Context(), orphan.Digest(), warm, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := dying.Remove(t.Context(), warm); err != nil {
		t.Fatal(err)
	}
	fill := fillDisk(t, mnt)
	if err := os.Truncate(fill, fileSize(t, fill)-u.room); err != nil {
		t.Fatal(err)
	}
	unseen := ocilocal.MustParseReference("example.com/unseen:v1")
	var deaths []string
	marked := false
	ctx := &lookCtx{Context: t.Context(), look: func() {
		if !marked {
			return // what is committed here is seen, or displaced like any other
		}
		if u.looks++; u.looks == u.at {
			undoCommit(t, root, func() {
				_, err := dying.Tag(t.Context(), orphan.Digest(), unseen, nil)
				if u.committed = err == nil; err != nil && !errors.Is(err, ocilocal.ErrNoSpace) && !errors.Is(err, ocilocal.ErrBusy) && !errors.Is(err, ocilocal.ErrNotFound) && !errors.Is(err, ocilocal.ErrIncomplete) {
					t.Error(err)
				}
			})
		} else if u.committed {
			deaths = append(deaths, killed(t, root))
		}
	}}
	ocilocal.SetFault(r, func(op, name string) error {
		ctx.mu.Lock()
		defer ctx.mu.Unlock()
		marked = marked || op+" "+name == "open "+"blobs/sha256/"+kept.Digest().Encoded()
		if u.committed && op == "remove" && strings.HasPrefix(name, "blobs/") {
			deaths = append(deaths, killed(t, root))
		}
		return nil
	})
	report, err := r.GC(ctx, atOnce)
	ocilocal.SetFault(r, nil)
	if err != nil && !errors.Is(err, ocilocal.ErrNoSpace) || report == nil {
		t.Fatalf("%v, %+v", err, report)
	}
	u.deleted = report.Deleted.Blobs > 0
	if u.committed {
		deaths = append(deaths, killed(t, root))
	}
	for i, dir := range deaths {
		after, err := ocilocal.Open(t.Context(), dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := after.Load(t.Context(), unseen); err == nil {
			if err := readAll(t.Context(), a); err != nil {
				t.Errorf("commit at look %d, death %d of %d: it is back, and not whole: %v", u.at, i, len(deaths), err)
			}
		} else if !errors.Is(err, ocilocal.ErrNotFound) {
			t.Error(err)
		}
		mustClose(t, after)
	}
	mustClose(t, dying)
	mustClose(t, r)
}

// TestFullDiskTakenByOthers: on a full disk, another program takes the space that the deletion of a
// manifest's file frees. The collection still deletes the layers, and then all rows.
func TestFullDiskTakenByOthers(t *testing.T) {
	mnt := mountTmpfs(t, "size=2m")
	root := filepath.Join(mnt, "root")
	r := mustOpen(t, root)
	orphan, layer := oneLayer(t, r, "example.com/orphan:v1", noise(1, 200<<10))
	oneLayer(t, r, keptRef, []byte("kept"))
	if _, err := r.Remove(t.Context(), orphan.Reference()); err != nil {
		t.Fatal(err)
	}
	name, gone := "blobs/sha256/"+layer.Digest.Encoded(), false
	ocilocal.SetFault(r, func(op, at string) error {
		if !gone {
			fillDisk(t, mnt)
		}
		gone = gone || op == "remove" && at == name
		return nil
	})
	report, err := r.GC(t.Context(), atOnce)
	ocilocal.SetFault(r, nil)
	if err != nil || !gone || report.Deleted.Manifests != 1 || report.Deleted.Blobs != 1 || report.Revived > 0 {
		t.Errorf("%v, %+v", err, report)
	}
	if _, err := r.LoadDigest(t.Context(), orphan.Digest()); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("the manifest's row is still there: %v", err)
	}
}

// readAll reads an artifact's manifest and layers.
func readAll(ctx context.Context, a *ocilocal.LocalArtifact) error {
	layers, err := a.Layers(ctx)
	for _, l := range layers {
		if err == nil {
			_, err = a.ReadLayer(ctx, l)
		}
	}
	return err
}

// fillDisk writes a file until the disk is full, and returns its name.
func fillDisk(t *testing.T, mnt string) string {
	t.Helper()
	f, err := os.CreateTemp(mnt, "fill")
	if err != nil {
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		return ""
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return f.Name()
}
