package ocilocal_test

import (
	"errors"
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

// TestRepairBesideHealers: if another process heals a damaged blob while Repair is about to move it
// away, the blob stays, and so do all refs to it.
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

// TestRepairUnreadable: a file that cannot be read is not moved away, because it may be good.
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
	// A lack of descriptors ends the repair.
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
