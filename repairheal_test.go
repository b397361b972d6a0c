package ocilocal_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestRepairSourceSize: a file of a source that has another size is not copied, because a sparse
// file of 1 TiB would fill the disk. If the size is not known, a copy may be as large as a
// manifest.
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

// TestRepairBadSources: a source that can't be read does not keep the next from healing. What it
// had before its fault counts, and it is an error only if something is still wanted.
func TestRepairBadSources(t *testing.T) {
	r := openTemp(t, nil)
	dontWatch(r.Root())
	a := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "first", "second")
	first, second := digest.FromString("first"), digest.FromString("second")
	dir := t.TempDir()
	archive := func(name string, raw []byte) string {
		name = filepath.Join(dir, name)
		write(t, name, string(raw))
		return name
	}
	noArchive := archive("bad.tar", []byte("not an archive"))
	// What an old docker save writes: a tar, and not an OCI archive.
	docker := archive("docker.tar", tarOf(t, entry{name: "manifest.json", body: "[]"}))
	noIndex := archive("no-index.tar", tarOf(t, blobEntry("second")))
	whole := tarOf(t, layoutVersion, blobEntry("first"), blobEntry("second"))
	truncated := archive("truncated.tar", whole[:len(whole)-2048-100]) // within the second blob's entry
	linked := t.TempDir()
	writeEntries("", []entry{blobEntry("second")})(t, linked)
	if err := os.Symlink("/dev/zero", filepath.Join(linked, "blobs", "sha256", first.Encoded())); err != nil {
		t.Skip(err)
	}
	missing := filepath.Join(dir, "missing")
	for what, c := range map[string]struct {
		sources []string
		failed  []string
		healed  []digest.Digest
	}{
		"an archive without an index":    {[]string{noArchive, noIndex}, []string{noArchive}, []digest.Digest{second}},
		"docker save's archive":          {[]string{docker, noIndex}, nil, []digest.Digest{second}},
		"a truncated archive":            {[]string{truncated}, []string{truncated}, []digest.Digest{first}},
		"a link in a layout":             {[]string{missing, linked}, []string{missing, linked}, []digest.Digest{second}},
		"all blobs, from bad and better": {[]string{missing, noArchive, truncated, linked}, []string{missing, noArchive, truncated}, []digest.Digest{first, second}},
	} {
		for _, text := range []string{"first", "second"} {
			rewrite(t, blobFile(r, digest.FromString(text)), flipBit)
		}
		report, err := r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: c.sources})
		var failed []string
		for _, f := range report.FailedSources {
			if f.Err == nil {
				t.Errorf("%s: %s failed without an error", what, f.Source)
			}
			failed = append(failed, f.Source)
		}
		slices.Sort(report.Healed)
		if !slices.Equal(failed, c.failed) || !slices.Equal(report.Healed, digests(c.healed...)) || (err != nil) != (len(c.failed) > 0 && len(c.healed) < 2) {
			t.Errorf("%s: %v, %+v", what, err, report)
		}
		if _, err := r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: []string{archive("good.tar", whole)}}); err != nil {
			t.Error(err)
		}
		checkSound(t, r)
	}
	if _, err := a.Layers(t.Context()); err != nil {
		t.Error(err)
	}
}
