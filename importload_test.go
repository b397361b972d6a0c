package ocilocal_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestLoadPulls: Load pulls an artifact once. A missing tag is an error with the facts of the
// registry.
func TestLoadPulls(t *testing.T) {
	s := newServer(t)
	want := s.put(t, "org/model", "v1", noise(1, 10))
	r := openRemote(t, nil)
	for range 2 {
		if a, err := r.Load(t.Context(), s.ref("org/model:v1")); err != nil || a.Digest() != want {
			t.Fatal(err)
		}
	}
	if n := len(s.requests("")); n != 4 { // tag, manifest, config, layer
		t.Errorf("%q", s.requests(""))
	}
	_, err := r.Load(t.Context(), s.ref("org/model:v2"))
	e, ok := errors.AsType[*ocilocal.RemoteError](err)
	if !errors.Is(err, ocilocal.ErrNotFound) || !ok || e.Status != 404 || len(e.Codes) != 1 || e.Codes[0].Code != "MANIFEST_UNKNOWN" {
		t.Error(err)
	}
	// A pull by digest of content that the registry has under another name.
	s.forget()
	pinned, err := s.ref("other/name").WithDigest(want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Pull(t.Context(), pinned, nil); err != nil || got.Update.Outcome != ocilocal.Inserted || len(s.requests("")) != 0 {
		t.Errorf("%+v, %v, %q", got, err, s.requests(""))
	}
}

// TestLoadWith: LoadWith uses the options of the pull, and reports whether the registry had the
// artifact.
func TestLoadWith(t *testing.T) {
	s := newServer(t)
	want := s.put(t, "org/model", "v1", noise(1, 1000))
	r := openTemp(t, nil) // without a Remote, so that Load doesn't pull
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	ref := s.ref("org/model:v1")
	if _, err := r.Load(t.Context(), ref); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	_, err := r.LoadWith(t.Context(), ref, &ocilocal.PullOptions{Remote: remote, MaxBytes: 10})
	mustFail(t, err, ocilocal.ErrTooLarge)
	got, err := r.LoadWith(t.Context(), ref, &ocilocal.PullOptions{Remote: remote})
	if err != nil || got.Hit || got.Pull == nil || got.Artifact.Digest() != want {
		t.Fatalf("%+v, %v", got, err)
	}
	s.forget()
	s.put(t, "org/model", "v1", noise(2, 1000)) // the tag moves, but a load does not ask
	if got, err = r.LoadWith(t.Context(), ref, nil); err != nil || !got.Hit || got.Pull != nil || got.Artifact.Digest() != want || len(s.requests("")) != 0 {
		t.Errorf("%+v, %v, %q", got, err, s.requests(""))
	}
}

// TestLoadWithFailure: a load that fails returns no result.
func TestLoadWithFailure(t *testing.T) {
	r := openRemote(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := r.LoadWith(ctx, ocilocal.MustParseReference("example.com/a:v1"), nil); err == nil || got != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestLoadWithReferrers: after a hit, LoadWith does not ask the registry for referrers.
func TestLoadWithReferrers(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	subject, _ := withSignatures(t, r, s, 1)
	opts := &ocilocal.PullOptions{Referrers: true}
	if _, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true}); err != nil {
		t.Fatal(err)
	}
	there := openRemote(t, nil)
	got, err := there.LoadWith(t.Context(), subject.Reference(), opts)
	if err != nil || got.Hit || len(got.Pull.Referrers) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	s.forget()
	if got, err = there.LoadWith(t.Context(), subject.Reference(), opts); err != nil || !got.Hit || len(s.requests("")) > 0 {
		t.Errorf("%+v, %v, %q", got, err, s.requests(""))
	}
}

// TestLoadPath loads the artifact of a directory and of an archive. Content without a name gets an
// anonymous one.
func TestLoadPath(t *testing.T) {
	ctx := t.Context()
	from := openTemp(t, nil)
	a, b := published(t, from, "example.com/a:v1", "one", nil), published(t, from, "example.com/b:v1", "two", nil)
	dir := t.TempDir()
	layout, archive, both := filepath.Join(dir, "looks-like.tar"), filepath.Join(dir, "looks-like-a-directory"), filepath.Join(dir, "both")
	one := []ocilocal.Reference{a.Reference()}
	if err := errors.Join(from.ExportLayout(ctx, layout, one, nil), from.ExportArchiveFile(ctx, archive, one, nil),
		from.ExportLayout(ctx, both, []ocilocal.Reference{a.Reference(), b.Reference()}, nil)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{layout, archive} {
		r := openTemp(t, nil)
		got, err := r.LoadPath(ctx, p, nil)
		if err != nil || got.Digest() != a.Digest() || got.Reference() != a.Reference() {
			t.Errorf("%s: %v", p, err)
		}
	}
	r := openTemp(t, nil)
	if _, err := r.LoadPath(ctx, both, nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("two entries: %v", err)
	}
	checkNothingVisible(t, r)
	got, err := r.LoadPath(ctx, both, &ocilocal.ImportOptions{Select: "example.com/b:v1"})
	if err != nil || got.Digest() != b.Digest() {
		t.Error(err)
	}
	if _, err := r.LoadPath(ctx, filepath.Join(dir, "nothing"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if !slices.Contains(slices.Collect(maps.Keys(tree(t, dir))), "looks-like-a-directory") {
		t.Error("the source is gone")
	}
}

// TestImportPath imports several entries from a directory and an archive. A conflict of one entry
// is in the result, and the others are imported.
func TestImportPath(t *testing.T) {
	ctx := t.Context()
	from := openTemp(t, nil)
	a, b := published(t, from, "example.com/a:v1", "one", nil), published(t, from, "example.com/b:v1", "two", nil)
	both := []ocilocal.Reference{a.Reference(), b.Reference()}
	dir, archive := filepath.Join(t.TempDir(), "dir"), filepath.Join(t.TempDir(), "archive")
	if err := errors.Join(from.ExportLayout(ctx, dir, both, nil), from.ExportArchiveFile(ctx, archive, both, nil)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, archive} {
		if in, err := ocilocal.InspectPath(ctx, path); err != nil || len(in.Entries) != 2 || in.Blobs != 5 {
			t.Errorf("%+v, %v", in, err)
		}
		r := openTemp(t, nil)
		own := published(t, r, "example.com/a:v1", "own", nil)
		got, err := r.ImportPath(ctx, path, nil)
		if err != nil || len(got.Artifacts) != 2 {
			t.Fatalf("%+v, %v", got, err)
		}
		if c := got.Conflicts(); len(c) != 1 || c[0].Reference != a.Reference() || c[0].Existing != own.Digest() || c[0].Descriptor.Digest != a.Digest() {
			t.Errorf("%+v", c)
		}
		if ok, err := r.Exists(ctx, b.Reference()); !ok || err != nil {
			t.Errorf("the other one: %v, %v", ok, err)
		}
		if got, err = r.ImportPath(ctx, path, &ocilocal.ImportOptions{Select: "example.com/a:v1"}); !errors.Is(err, ocilocal.ErrConflict) || len(got.Conflicts()) != 1 {
			t.Errorf("alone: %+v, %v", got, err)
		}
	}
	nothing := filepath.Join(t.TempDir(), "nothing")
	if _, err := ocilocal.InspectPath(ctx, nothing); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := from.ImportPath(ctx, nothing, nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Join(from.Root(), "index.sqlite3-shm"), link); err != nil {
		link = filepath.Join(from.Root(), "index.sqlite3") // links need a privilege there
	}
	for _, name := range []string{filepath.Join(from.Root(), "index.sqlite3"), filepath.Join(from.Root(), "index.sqlite3-wal"), filepath.Join(from.Root(), "index.sqlite3-shm"), link} {
		if _, err := ocilocal.InspectPath(ctx, name); !errors.Is(err, ocilocal.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
