package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func TestStats(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, artifactForm)
	if s, err := r.Stats(ctx); err != nil || s != (ocilocal.Stats{}) {
		t.Errorf("an empty registry has %+v, %v", s, err)
	}
	a := child(t, r, "example.com/one:v1", ocilocal.BuilderOptions{}, nil, nil, "both", "first")
	b := child(t, r, "example.com/one:v2", ocilocal.BuilderOptions{}, nil, nil, "both", "second!")
	c := child(t, r, "example.com/two:v1", ocilocal.BuilderOptions{}, descOf(b), nil, "third")
	size := func(as ...*ocilocal.LocalArtifact) (n int64) {
		for _, a := range as {
			n += a.Descriptor().Size
		}
		return n
	}
	total := ocilocal.Count{Manifests: 3, Blobs: 4, Bytes: size(a, b, c) + 4 + 5 + 7 + 5}
	checkStats(t, r, ocilocal.Stats{Refs: 3, Repositories: 2, Total: total})

	usage := func(ref string) ocilocal.Usage {
		t.Helper()
		u, err := r.RefUsage(ctx, ocilocal.MustParseReference(ref))
		if err != nil {
			t.Error(err)
		}
		return u
	}
	for _, check := range []struct {
		what string
		got  ocilocal.Usage
		want ocilocal.Usage
	}{
		{"one:v1", usage("example.com/one:v1"), ocilocal.Usage{Refs: 1,
			Own: ocilocal.Count{Manifests: 1, Blobs: 1, Bytes: size(a) + 5}, Shared: ocilocal.Count{Blobs: 1, Bytes: 4}}},
		{"one:v2, all of it a subject's", usage("example.com/one:v2"), ocilocal.Usage{Refs: 1,
			Shared: ocilocal.Count{Manifests: 1, Blobs: 2, Bytes: size(b) + 4 + 7}}},
		{"two:v1 with its subject", usage("example.com/two:v1"), ocilocal.Usage{Refs: 1,
			Shared: ocilocal.Count{Manifests: 2, Blobs: 3, Bytes: size(b, c) + 4 + 7 + 5}}}, // its subject keeps it
		{"repository one", repositoryUsage(t, r, "example.com/one"), ocilocal.Usage{Refs: 2,
			Own: ocilocal.Count{Manifests: 1, Blobs: 1, Bytes: size(a) + 5}, Shared: ocilocal.Count{Manifests: 1, Blobs: 2, Bytes: size(b) + 4 + 7}}},
		{"no repository", repositoryUsage(t, r, "example.com/none"), ocilocal.Usage{}},
	} {
		if check.got != check.want {
			t.Errorf("%s: %+v, want %+v", check.what, check.got, check.want)
		}
	}

	// Without its ref, two:v1 is a referrer. It goes with its subject.
	if _, err := r.Remove(ctx, ocilocal.MustParseReference("example.com/two:v1")); err != nil {
		t.Fatal(err)
	}
	checkStats(t, r, ocilocal.Stats{Refs: 2, Repositories: 1, Total: total})
	if _, err := r.RefUsage(ctx, ocilocal.MustParseReference("example.com/two:v1")); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("usage of what was removed: %v", err)
	}
	orphans := ocilocal.Count{Manifests: 2, Blobs: 2, Bytes: size(b, c) + 7 + 5}
	if got := usage("example.com/one:v2").Own; got != orphans {
		t.Errorf("a subject with its referrer: own is %+v, want %+v", got, orphans)
	}
	if _, err := r.Remove(ctx, ocilocal.MustParseReference("example.com/one:v2")); err != nil {
		t.Fatal(err)
	}
	checkStats(t, r, ocilocal.Stats{Refs: 1, Repositories: 1, Total: total, Orphans: orphans})
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	total.Manifests, total.Blobs, total.Bytes = total.Manifests-2, total.Blobs-2, total.Bytes-orphans.Bytes
	checkStats(t, r, ocilocal.Stats{Refs: 1, Repositories: 1, Total: total})

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.Stats(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func repositoryUsage(t *testing.T, r *ocilocal.LocalRegistry, name string) ocilocal.Usage {
	t.Helper()
	u, err := r.RepositoryUsage(t.Context(), name)
	if err != nil {
		t.Error(err)
	}
	return u
}

func checkStats(t *testing.T, r *ocilocal.LocalRegistry, want ocilocal.Stats) {
	t.Helper()
	if s, err := r.Stats(t.Context()); err != nil || s != want {
		t.Errorf("stats are %+v, %v\nwant %+v", s, err, want)
	}
}

// TestStatsAgreeWithGC compares the index's word with what garbage collection,
// which goes the other way round, finds and deletes.
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
		// Two image indexes, of which the second takes the first one's name, with a member and layers in common.
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
		// What a ref's usage calls its own goes with the ref.
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
				t.Errorf("seed %d: %s has %+v of its own, %+v would go with it", seed, ref.Reference, u.Own, report.Orphans)
			}
			if _, err := r.Tag(ctx, ref.Descriptor.Digest, ref.Reference, nil); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, r)
	}
}
