package ocilocal_test

import (
	"slices"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestRemoteRepository lists a repository and deletes manifests in it, without a tag.
func TestRemoteRepository(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	subject, signatures := withSignatures(t, r, s, 1)
	for _, a := range append(signatures, subject) {
		if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
			t.Fatal(err)
		}
	}
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	repo, err := remote.Repository(s.host + "/org/model")
	if err != nil || repo.Name() != subject.Reference().Name() {
		t.Fatal(repo, err)
	}
	list := func() (tags, referrers []string) {
		for tag, err := range repo.Tags(t.Context()) {
			if err != nil {
				t.Error(err)
			}
			tags = append(tags, tag)
		}
		for d, err := range repo.Referrers(t.Context(), subject.Digest(), "") {
			if err != nil {
				t.Error(err)
			}
			referrers = append(referrers, string(d.Digest))
		}
		return tags, referrers
	}
	if tags, referrers := list(); !slices.Equal(tags, []string{"sig0", "v1"}) || !slices.Equal(referrers, []string{string(signatures[0].Digest())}) {
		t.Errorf("%q, %q", tags, referrers)
	}
	if err := repo.Delete(t.Context(), signatures[0].Digest()); err != nil {
		t.Error(err)
	}
	if _, referrers := list(); len(referrers) != 0 {
		t.Errorf("%q", referrers)
	}
	mustFail(t, repo.Delete(t.Context(), "sha256:x"), ocilocal.ErrInvalidDigest)
	for _, name := range []string{"", s.host + "/org/model:v1", s.host + "/org/model:latest", s.host + "/org/model@" + string(subject.Digest()), "UPPER/x"} {
		if _, err := remote.Repository(name); err == nil {
			t.Errorf("%q was taken", name)
		}
	}
}

// TestRemoteTag gives tags to a manifest in a remote registry, by a push or later.
func TestRemoteTag(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	a := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 1000))
	if _, err := r.Push(t.Context(), a.Reference(), &ocilocal.PushOptions{Tags: []string{"v1.0", "stable"}}); err != nil {
		t.Fatal(err)
	}
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	sent := s.served()
	if d, err := remote.Tag(t.Context(), a.Reference(), "best", "v2"); err != nil || d.Digest != a.Digest() {
		t.Error(d, err)
	}
	for _, tag := range []string{"v1", "v1.0", "stable", "best", "v2"} {
		if d, err := remote.Resolve(t.Context(), s.ref("org/model:"+tag)); err != nil || d.Digest != a.Digest() {
			t.Errorf("%s: %v, %v", tag, d, err)
		}
	}
	if s.served() != sent {
		t.Error("blobs were transferred")
	}
	_, err := remote.Tag(t.Context(), a.Reference(), "good", "not good")
	mustFail(t, err, ocilocal.ErrInvalidReference)
	_, err = r.Push(t.Context(), a.Reference(), &ocilocal.PushOptions{Tags: []string{"/"}})
	mustFail(t, err, ocilocal.ErrInvalidReference)
	_, err = remote.Tag(t.Context(), s.ref("org/model:absent"), "x")
	mustFail(t, err, ocilocal.ErrNotFound)
}
