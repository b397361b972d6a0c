package ocilocal_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestStatsAgreeWithGC compares the numbers of Stats, which come from queries, with those of a
// collection, which follows the graph from the refs and deletes the rest.
func TestStatsAgreeWithGC(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for seed := range uint64(5) {
		rng := rand.New(rand.NewPCG(seed, 0))
		r := openTemp(t, nil)
		var made []*ocilocal.LocalArtifact
		n := 30
		if seed == 0 {
			n = 200 // so many orphans are counted the other way round
		}
		for i := range n {
			o := ocilocal.BuilderOptions{Format: ocilocal.FormatArtifactManifest}
			if rng.IntN(2) == 0 {
				o.Format = ocilocal.FormatImageManifest
			}
			var layers []string
			for range rng.IntN(4) {
				layers = append(layers, fmt.Sprint("layer ", rng.IntN(20)))
			}
			subject := (*ocilocal.LocalArtifact)(nil)
			if len(made) > 0 && rng.IntN(3) == 0 {
				subject = made[rng.IntN(len(made))]
			}
			ref := fmt.Sprintf("example.com/r%d:v%d", rng.IntN(4), i)
			if subject == nil {
				made = append(made, child(t, r, ref, o, nil, map[string]string{"i": fmt.Sprint(i)}, layers...))
			} else {
				made = append(made, child(t, r, ref, o, descOf(subject), map[string]string{"i": fmt.Sprint(i)}, layers...))
			}
		}
		// Two image indexes with a member and layers in common. The second takes the name of the
		// first.
		for _, layers := range [][]string{{"layer 1", "of the first"}, {"layer 1", "layer 2"}} {
			var members, blobs []string
			for _, layer := range layers {
				manifest, config := image(layer)
				members = append(members, manifest)
				blobs = append(blobs, manifest, config, layer)
			}
			archive := archiveOf(t, ocispec.MediaTypeImageIndex, imageIndex(imageType, members...), blobs...)
			if _, err := r.ImportArchive(ctx, bytes.NewReader(archive), &ocilocal.ImportOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}); err != nil {
				t.Fatal(err)
			}
		}
		for ref, err := range r.Refs(ctx, nil) {
			if err != nil {
				t.Fatal(err)
			}
			if rng.IntN(2) == 0 {
				if _, err := r.Remove(ctx, ref.Reference); err != nil {
					t.Fatal(err)
				}
			}
		}
		s, err := r.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace}
		report, err := r.GC(ctx, opts)
		if err != nil {
			t.Fatal(err)
		}
		if s.Orphans != report.Deleted || s.Orphans.Manifests == 0 {
			t.Errorf("seed %d: orphans are %+v, deleted were %+v", seed, s.Orphans, report.Deleted)
		}
		// RefUsage says how many bytes only this ref needs. They are freed when it is removed.
		for ref, err := range r.Refs(ctx, nil) {
			if err != nil {
				t.Fatal(err)
			}
			u, err := r.RefUsage(ctx, ref.Reference)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Remove(ctx, ref.Reference); err != nil {
				t.Fatal(err)
			}
			report, err := r.GCReport(ctx, opts)
			if err != nil {
				t.Fatal(err)
			}
			if u.Own != report.Orphans {
				t.Errorf("seed %d: only %s needs %+v, but without that ref a collection finds %+v", seed, ref.Reference, u.Own, report.Orphans)
			}
			if _, err := r.Tag(ctx, ref.Descriptor.Digest, ref.Reference, nil); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, r)
	}
}
