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

// TestCorruption damages a registry in every way that has a kind of problem. It compares the
// findings of Verify, those of a quick Verify, and those that Repair leaves.
func TestCorruption(t *testing.T) {
	t.Parallel()
	const name = "example.com/a:v1"
	const layer = "layer of the artifact"
	remove := func(t *testing.T, file string) {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	flip := func(t *testing.T, file string) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 4
		write(t, file, string(b))
	}
	sql := func(text string) func(*testing.T, *ocilocal.LocalRegistry, string, string) {
		return func(t *testing.T, r *ocilocal.LocalRegistry, _, _ string) { execIndex(t, r.Root(), text) }
	}
	for what, c := range map[string]struct {
		damage func(t *testing.T, r *ocilocal.LocalRegistry, layer, manifest string)
		full   []string
		quick  []string // nil: the same
		left   []string // after a repair without sources
	}{
		"sound":            {func(*testing.T, *ocilocal.LocalRegistry, string, string) {}, nil, nil, nil},
		"layer, bit flip":  {func(t *testing.T, _ *ocilocal.LocalRegistry, l, _ string) { flip(t, l) }, []string{"blob is damaged layer"}, []string{}, []string{"blob is missing layer"}},
		"layer, truncated": {func(t *testing.T, _ *ocilocal.LocalRegistry, l, _ string) { write(t, l, layer[:4]) }, []string{"blob has another size layer", "blob is damaged layer"}, []string{"blob has another size layer"}, []string{"blob is missing layer"}},
		"layer, empty":     {func(t *testing.T, _ *ocilocal.LocalRegistry, l, _ string) { write(t, l, "") }, []string{"blob has another size layer", "blob is damaged layer"}, []string{"blob has another size layer"}, []string{"blob is missing layer"}},
		"layer, missing":   {func(t *testing.T, _ *ocilocal.LocalRegistry, l, _ string) { remove(t, l) }, []string{"blob is missing layer"}, nil, []string{"blob is missing layer"}},
		"layer, wrong name": {func(t *testing.T, _ *ocilocal.LocalRegistry, l, m string) {
			write(t, filepath.Join(filepath.Dir(l), digest.FromString("other").Encoded()), layer)
		}, []string{"blob is unrecorded other", "blob is damaged other"}, []string{"blob is unrecorded other"}, nil},
		"layer, a directory": {func(t *testing.T, _ *ocilocal.LocalRegistry, l, _ string) { remove(t, l); os.Mkdir(l, 0o755) }, []string{"entry is not a blob blobs/sha256/LAYER", "blob is missing layer"}, nil, []string{"blob is missing layer"}},
		"layer, permissions": {func(t *testing.T, _ *ocilocal.LocalRegistry, l, _ string) { os.Chmod(l, 0o600) }, []string{"blob has other permissions layer"}, nil, nil},
		"manifest, bit flip": {func(t *testing.T, _ *ocilocal.LocalRegistry, _, m string) { flip(t, m) }, []string{"blob is damaged manifest"}, nil, []string{"blob is missing manifest"}},
		"manifest, missing":  {func(t *testing.T, _ *ocilocal.LocalRegistry, _, m string) { remove(t, m) }, []string{"blob is missing manifest"}, nil, []string{"blob is missing manifest"}},
		"foreign file": {func(t *testing.T, r *ocilocal.LocalRegistry, _, _ string) {
			write(t, filepath.Join(r.Root(), "blobs", "README"), "x")
		}, []string{"entry is not a blob blobs/README"}, nil, nil},
		"file without row": {func(t *testing.T, r *ocilocal.LocalRegistry, l, _ string) {
			write(t, blobFile(r, digest.FromString("other")), "other")
		}, []string{"blob is unrecorded other"}, nil, nil},
		"row: other size":     {sql("UPDATE content SET size = size + 1 WHERE kind = 2"), []string{"blob has another size layer"}, nil, nil},
		"row: manifest size":  {sql("UPDATE content SET size = size + 1 WHERE kind = 3"), []string{"ref is dangling manifest", "blob has another size manifest", "index contradicts manifest manifest"}, nil, nil},
		"row: artifact type":  {sql("UPDATE manifests SET artifact_type = media_type"), []string{"ref is dangling manifest", "index contradicts manifest manifest"}, nil, nil},
		"row: annotations":    {sql("UPDATE members SET annotations = '{}x'"), []string{"index contradicts manifest manifest"}, nil, nil},
		"row: member lost":    {sql("DELETE FROM members"), []string{"index contradicts manifest manifest"}, nil, nil},
		"row: member doubled": {sql("INSERT INTO members SELECT manifest, 1, role, content, media_type, size, annotations FROM members"), []string{"index contradicts manifest manifest"}, nil, nil},
		"row: ref altered":    {sql("UPDATE refs SET media_type = artifact_type"), []string{"ref is dangling manifest"}, nil, nil},
		"row: blob lost":      {sql("DELETE FROM content WHERE kind = 2"), []string{"index is damaged", "blob is unrecorded layer", "index contradicts manifest manifest"}, nil, nil},
		"row: manifest lost":  {sql("DELETE FROM manifests"), []string{"index is damaged", "index is damaged", "ref is dangling manifest", "index contradicts manifest manifest"}, nil, nil},
		"index not its own":   {sql("INSERT INTO meta VALUES ('unreconciled', '1')"), []string{"index is not reconciled"}, nil, nil},
	} {
		t.Run(what, func(t *testing.T) {
			r := openTemp(t, artifactForm)
			a := published(t, r, name, layer, nil)
			names := map[digest.Digest]string{digest.FromString(layer): "layer", a.Digest(): "manifest", digest.FromString("other"): "other"}
			layerFile := blobFile(r, digest.FromString(layer))
			c.damage(t, r, layerFile, blobFile(r, a.Digest()))
			dontWatch(r.Root())
			expand := func(want []string) []string {
				var out []string
				for _, w := range want {
					out = append(out, strings.Replace(w, "LAYER", filepath.Base(layerFile), 1))
				}
				return out
			}
			check := func(when string, got, want []string) {
				t.Helper()
				want = expand(want)
				slices.Sort(got)
				slices.Sort(want)
				if !slices.Equal(got, want) {
					t.Errorf("%s: found %q, want %q", when, got, want)
				}
			}
			check("full", problems(t, r, nil, names), c.full)
			quick := c.quick
			if quick == nil {
				quick = c.full
			}
			check("quick", problems(t, r, &ocilocal.VerifyOptions{Quick: true}, names), quick)
			report, err := r.Repair(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			var left []string
			for _, p := range report.Left {
				left = append(left, strings.TrimSpace(string(p.Kind)+" "+names[p.Digest]))
			}
			check("left", left, c.left)
			if len(c.left) == 0 {
				checkArtifact(t, a, layer)
				if got, err := r.Load(t.Context(), a.Reference()); err != nil || got.Digest() != a.Digest() {
					t.Error(err)
				}
				return
			}
			// Damaged content is never returned, and an import of the same content heals it.
			from := openTemp(t, artifactForm)
			published(t, from, name, layer, nil)
			archive := filepath.Join(t.TempDir(), "a.tar")
			layout := filepath.Join(t.TempDir(), "layout")
			if err := errors.Join(from.ExportArchiveFile(t.Context(), archive, []ocilocal.Reference{a.Reference()}, nil),
				from.ExportLayout(t.Context(), layout, []ocilocal.Reference{a.Reference()}, nil)); err != nil {
				t.Fatal(err)
			}
			for _, source := range []string{archive, layout} {
				report, err := r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: []string{source}})
				if err != nil || len(report.Left) != 0 {
					t.Fatalf("%v %+v", err, report)
				}
				if source == archive && len(report.Healed) != 1 {
					t.Errorf("%+v", report)
				}
				checkArtifact(t, a, layer)
			}
		})
	}
}
