package ocilocal_test

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestLostManifestRow loses the row of a manifest in an image index, and of a subject. Verify finds
// it, collections do not delete its blobs, and Repair records it again.
func TestLostManifestRow(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	manifest, config := image("layer")
	pushImage(t, repository(t, r, "localhost/app"), "v1", manifest) // it was a layer before
	index := imageIndex(imageType, manifest)
	if _, err := r.ImportArchive(ctx, bytes.NewReader(archiveOf(t, ocispec.MediaTypeImageIndex, index, manifest, config, "layer")), nil); err != nil {
		t.Fatal(err)
	}
	first := published(t, r, "example.com/a:0", "zero", nil)
	published(t, r, "example.com/a:1", "one", first)
	if _, err := r.Remove(ctx, first.Reference()); err != nil {
		t.Fatal(err)
	}
	before := blobNames(t, r)
	names := map[digest.Digest]string{digest.FromString(manifest): "child", digest.FromString(index): "index", first.Digest(): "subject"}
	for _, c := range []struct {
		victim digest.Digest
		found  []string
	}{
		{first.Digest(), []string{"index contradicts manifest subject"}},
		{digest.FromString(manifest), []string{"index contradicts manifest child", "index contradicts manifest index"}},
	} {
		execIndex(t, r.Root(), "DELETE FROM members WHERE manifest = "+sqlID(c.victim))
		execIndex(t, r.Root(), "DELETE FROM manifests WHERE id = "+sqlID(c.victim))
		got := problems(t, r, nil, names)
		slices.Sort(got)
		if !slices.Equal(got, c.found) {
			t.Errorf("found %q, want %q", got, c.found)
		}
		report, err := r.GC(ctx, atOnce)
		if !errors.Is(err, ocilocal.ErrUnsafe) || len(report.Invalid) != 1 || report.Invalid[0].Digest != c.victim {
			t.Errorf("%v, %+v", err, report)
		}
		if report, err := r.Repair(ctx, nil); err != nil || len(report.Left) != 0 {
			t.Errorf("%v, %+v", err, report)
		}
		collect(t, r, atOnce)
		if !slices.Equal(before, blobNames(t, r)) {
			t.Error("something was deleted")
		}
	}
}

// TestImpossibleRows has rows that this package cannot have written. Verify finds them, and Repair
// corrects everything else. After Rebuild they are gone, and the artifact has its name or a new
// one.
func TestImpossibleRows(t *testing.T) {
	t.Parallel()
	for what, text := range map[string]string{
		"a blob's digest": "PRAGMA ignore_check_constraints = ON; INSERT INTO content (digest, size, kind, created) VALUES (x'01ff', 1, 2, 0)",
		"a ref's digest":  "UPDATE refs SET digest = x'6e6f6e73656e7365'",
		"a ref's name":    "UPDATE refs SET name = 'EXAMPLE com/a'",
		"a ref's tag":     "UPDATE refs SET reference = 'a b'",
	} {
		t.Run(what, func(t *testing.T) {
			ctx := t.Context()
			r := openTemp(t, nil)
			dontWatch(r.Root())
			a := published(t, r, "example.com/a:v1", "layer", nil)
			os.Chmod(blobFile(r, a.Digest()), 0o600)
			execIndex(t, r.Root(), text)
			if got := problems(t, r, nil, nil); len(got) < 2 {
				t.Errorf("found %q", got)
			}
			if report, err := r.Repair(ctx, nil); err != nil || len(report.Left) == 0 {
				t.Errorf("%v, %+v", err, report)
			}
			mustClose(t, r)
			if report, err := ocilocal.Rebuild(ctx, r.Root(), nil); err != nil || len(report.Left) != 0 || len(report.Recovered) != 1 {
				t.Errorf("%v, %+v", err, report)
			}
			r = mustOpen(t, r.Root())
			defer mustClose(t, r)
			if got := problems(t, r, nil, nil); len(got) != 0 {
				t.Errorf("found %q", got)
			}
			if err := last(r.Refs(ctx, nil)); err != nil {
				t.Error(err)
			}
			if _, err := r.LoadDigest(ctx, a.Digest()); err != nil {
				t.Error(err)
			}
		})
	}
}
