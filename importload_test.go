package ocilocal_test

import (
	"context"
	"errors"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func TestLoadPulls(t *testing.T) {
	s := newServer(t)
	want := s.put(t, "org/model", "v1", noise(1, 10))
	r := openRemote(t, nil)
	for range 2 {
		if a, err := r.Load(t.Context(), s.ref("org/model:v1")); err != nil || a.Digest() != want {
			t.Fatal(err)
		}
	}
	if n := len(s.requests("")); n != 4 { // where the tag points, manifest, config, layer
		t.Errorf("%q", s.requests(""))
	}
	_, err := r.Load(t.Context(), s.ref("org/model:v2"))
	e, ok := errors.AsType[*ocilocal.RemoteError](err)
	if !errors.Is(err, ocilocal.ErrNotFound) || !ok || e.Status != 404 || len(e.Codes) != 1 || e.Codes[0].Code != "MANIFEST_UNKNOWN" {
		t.Error(err)
	}
	// By digest, and what is here under another name.
	s.forget()
	pinned, err := s.ref("other/name").WithDigest(want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Pull(t.Context(), pinned, nil); err != nil || got.Update.Outcome != ocilocal.Inserted || len(s.requests("")) != 0 {
		t.Errorf("%+v, %v, %q", got, err, s.requests(""))
	}
}

// LoadWith tells whether it was a hit, and takes options for the pull.
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
	s.put(t, "org/model", "v1", noise(2, 1000)) // it moves, which a load doesn't ask
	if got, err = r.LoadWith(t.Context(), ref, nil); err != nil || !got.Hit || got.Pull != nil || got.Artifact.Digest() != want || len(s.requests("")) != 0 {
		t.Errorf("%+v, %v, %q", got, err, s.requests(""))
	}
}

// Nothing is a hit that failed.
func TestLoadWithFailure(t *testing.T) {
	r := openRemote(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := r.LoadWith(ctx, ocilocal.MustParseReference("example.com/a:v1"), nil); err == nil || got != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

// After a hit, nobody is asked for referrers.
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
