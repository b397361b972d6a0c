package ocilocal_test

import (
	"context"
	"errors"
	"testing"

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
