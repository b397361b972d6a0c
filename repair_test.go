package ocilocal_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A damaged blob that others heal while Repair is about to move it away stays, and so do all refs to it.
func TestRepairBesideHealers(t *testing.T) {
	layer := digest.FromString("layer")
	for what, heal := range map[string]struct {
		op string // before which the other comes
		do func(t *testing.T, r, other *ocilocal.LocalRegistry)
	}{
		"published": {"mkdir", func(t *testing.T, _, other *ocilocal.LocalRegistry) {
			published(t, other, "example.com/b:v1", "layer", nil)
		}},
		// A publisher that has come so far waits for the index from here on.
		"settled": {"rename", func(t *testing.T, r, _ *ocilocal.LocalRegistry) {
			healed := filepath.Join(t.TempDir(), "healed")
			write(t, healed, "layer")
			if err := os.Rename(healed, blobFile(r, layer)); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(what, func(t *testing.T) {
			if runtime.GOOS == "windows" && heal.op == "rename" {
				t.Skip("no file can be renamed to the name of one that is open")
			}
			r := openTemp(t, nil)
			dontWatch(r.Root())
			a := published(t, r, "example.com/a:v1", "layer", nil)
			rewrite(t, blobFile(r, layer), flipBit)
			other := openAgain(t, r)
			defer mustClose(t, other)
			once := false
			ocilocal.SetFault(r, func(op, name string) error {
				if op == heal.op && strings.Contains(name, "quarantine") && !once {
					once = true
					heal.do(t, r, other)
				}
				return nil
			})
			report, err := r.Repair(t.Context(), nil)
			ocilocal.SetFault(r, nil)
			if err != nil || !once || len(report.Quarantined)+len(report.Left) != 0 {
				t.Errorf("%v, %v, %+v", err, once, report)
			}
			checkArtifact(t, a, "layer")
		})
	}
}

// What can't be read isn't moved away: it may be good, and the failure may pass.
func TestRepairUnreadable(t *testing.T) {
	r := openTemp(t, nil)
	dontWatch(r.Root())
	a := published(t, r, "example.com/a:v1", "layer", nil)
	archive := filepath.Join(t.TempDir(), "a.tar")
	if err := r.ExportArchiveFile(t.Context(), archive, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	file := blobFile(r, digest.FromString("layer"))
	fail := func(times int64, err error) {
		var opened atomic.Int64
		ocilocal.SetFault(r, func(op, name string) error {
			if op == "open" && strings.HasSuffix(name, filepath.Base(file)) && opened.Add(1) <= times {
				return err
			}
			return nil
		})
	}
	defer ocilocal.SetFault(r, nil)
	// What the process lacks ends the repair.
	fail(1, syscall.EMFILE)
	if report, err := r.Repair(t.Context(), nil); !errors.Is(err, syscall.EMFILE) || len(report.Quarantined)+len(report.Left) != 0 {
		t.Errorf("%v, %+v", err, report)
	}
	// Verify finds it, each of Repair's looks, and none.
	for times := range int64(4) {
		fail(times, syscall.EIO)
		report, err := r.Repair(t.Context(), nil)
		if err != nil || len(report.Quarantined)+len(report.Left) != 0 {
			t.Errorf("%d failures: %v, %+v", times, err, report)
		}
	}
	fail(1<<30, syscall.EIO)
	if got := problems(t, r, nil, map[digest.Digest]string{digest.FromString("layer"): "layer"}); !slices.Equal(got, []string{"blob is unreadable layer"}) {
		t.Errorf("found %q", got)
	}
	report, err := r.Repair(t.Context(), nil)
	if err != nil || len(report.Quarantined) != 0 || len(report.Left) != 1 || report.Left[0].Kind != ocilocal.ProblemUnreadable {
		t.Errorf("%v, %+v", err, report)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	report, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: []string{archive}})
	if err != nil || !slices.Equal(report.Healed, []digest.Digest{digest.FromString("layer")}) {
		t.Errorf("%v, %+v", err, report)
	}
	ocilocal.SetFault(r, nil)
	if after, err := os.Stat(file); err != nil || os.SameFile(before, after) {
		t.Error("the file is the one that can't be read", err)
	}
	checkArtifact(t, a, "layer")
}

// Permissions that can't be changed, on another user's file, don't end a repair.
func TestRepairForeignMode(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("modes are not looked at")
	}
	r := openTemp(t, nil)
	dontWatch(r.Root())
	a := published(t, r, "example.com/a:v1", "layer", nil)
	os.Chmod(blobFile(r, digest.FromString("layer")), 0o644)
	execIndex(t, r.Root(), "DELETE FROM members")
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "chmod" && strings.HasPrefix(name, "blobs/") {
			return syscall.EPERM
		}
		return nil
	})
	report, err := r.Repair(t.Context(), nil)
	ocilocal.SetFault(r, nil)
	if err != nil || len(report.Rewritten) != 1 || len(report.Left) != 1 || report.Left[0].Kind != ocilocal.ProblemMode {
		t.Errorf("%v, %+v", err, report)
	}
	checkArtifact(t, a, "layer")
}

// The index is lost, and blobs with it: what can't be recorded for that is told, is
// safe from collections, and comes back when a source has what it lacks.
func TestRebuildIncomplete(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	dontWatch(r.Root())
	manifest, config := image("layer")
	index := imageIndex(imageType, manifest)
	archive := filepath.Join(t.TempDir(), "a.tar")
	write(t, archive, string(archiveOf(t, "application/vnd.oci.image.index.v1+json", index, manifest, config, "layer")))
	if _, err := r.ImportArchiveFile(ctx, archive, nil); err != nil {
		t.Fatal(err)
	}
	before := blobNames(t, r)
	mustClose(t, r)
	for _, name := range []string{filepath.Join(r.Root(), "index.sqlite3"), blobFile(r, digest.FromString(manifest)), blobFile(r, digest.FromString("layer"))} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time there is an index
		report, err := ocilocal.Rebuild(ctx, r.Root(), nil)
		if err != nil || len(report.Recorded) != 0 || len(report.Left) != 2 || report.Left[1].Digest != digest.FromString(manifest) {
			t.Errorf("%v, %+v", err, report)
		}
		r = mustOpen(t, r.Root())
		if _, err := r.GC(ctx, atOnce); !errors.Is(err, ocilocal.ErrUnsafe) {
			t.Error(err)
		}
		mustClose(t, r)
	}
	report, err := ocilocal.Rebuild(ctx, r.Root(), &ocilocal.RepairOptions{Sources: []string{archive}})
	if err != nil || len(report.Healed) != 2 || len(report.Recorded) != 2 || len(report.Recovered) != 1 || len(report.Left) != 0 {
		t.Errorf("%v, %+v", err, report)
	}
	r = mustOpen(t, r.Root())
	defer mustClose(t, r)
	collect(t, r, atOnce)
	if !slices.Equal(before, blobNames(t, r)) {
		t.Error("not all is there")
	}
	if got := problems(t, r, nil, nil); len(got) != 0 {
		t.Errorf("found %q", got)
	}
}

// A root that has lost its file id keeps its refs: the index is this package's. What is not
// recognisable then isn't touched, but for one who renames it.
func TestRebuildWithoutID(t *testing.T) {
	for name, damage := range map[string]func(b []byte) []byte{"sound": nil, "damaged": func(b []byte) []byte {
		copy(b, "no SQLite format") // where its name is
		return b
	}} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			r := mustOpen(t, root)
			a, _ := oneLayer(t, r, keptRef, []byte("body"))
			mustClose(t, r)
			if err := os.Remove(filepath.Join(root, "id")); err != nil {
				t.Fatal(err)
			}
			index := filepath.Join(root, "index.sqlite3")
			if damage != nil {
				rewrite(t, index, damage)
				before := tree(t, root)
				if _, err := ocilocal.Rebuild(t.Context(), root, nil); !errors.Is(err, ocilocal.ErrForeignIndex) || !strings.Contains(err.Error(), "index.sqlite3.broken") {
					t.Error(err)
				}
				if !maps.Equal(tree(t, root), before) {
					t.Error("the root is another")
				}
				if err := os.Rename(index, index+".broken"); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := ocilocal.Rebuild(t.Context(), root, nil); err != nil {
				t.Fatal(err)
			}
			r = mustOpen(t, root)
			defer mustClose(t, r)
			if damage != nil { // its refs can't be read
				if _, err := r.ResolveDigest(t.Context(), a.Digest()); err != nil {
					t.Error(err)
				}
				return
			}
			if d, err := r.Resolve(t.Context(), a.Reference()); err != nil || d.Digest != a.Digest() {
				t.Errorf("%v, %v", d, err)
			}
		})
	}
}

// A source's file of another size is not copied: a sparse one of 1 TiB would fill the disk. Where nothing
// says the size, a copy may be as large as a manifest.
func TestRepairSourceSize(t *testing.T) {
	r := openTemp(t, nil)
	dontWatch(r.Root())
	a := published(t, r, "example.com/a:v1", "layer", nil)
	good, huge := t.TempDir(), t.TempDir()
	if err := r.ExportLayout(t.Context(), good, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	layer, unknown := digest.FromString("layer"), digest.FromString("unknown")
	write(t, blobFile(r, unknown), "damaged")
	rewrite(t, blobFile(r, layer), flipBit)
	writeEntries("", []entry{layoutVersion, blobEntry("layer"), blobEntry("unknown")})(t, huge)
	for _, d := range []digest.Digest{layer, unknown} {
		name := filepath.Join(huge, "blobs", "sha256", d.Encoded())
		if err := errors.Join(os.Chmod(name, 0o644), os.Truncate(name, 1<<40)); err != nil {
			t.Fatal(err)
		}
	}
	var written atomic.Int64
	ocilocal.SetFault(r, func(op, _ string) error {
		if op == "write" {
			written.Add(1)
		}
		return nil
	})
	report, err := r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: []string{huge}})
	if n := written.Load(); err != nil || n > 0 || len(report.Healed) > 0 {
		t.Errorf("%v, %d writes, %+v", err, n, report)
	}
	report, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: []string{huge, good}})
	ocilocal.SetFault(r, nil)
	if err != nil || !slices.Equal(report.Healed, []digest.Digest{layer}) || len(report.Left) > 0 {
		t.Errorf("%v, %+v", err, report)
	}
	checkArtifact(t, a, "layer")
}
