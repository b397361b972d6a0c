package ocilocal_test

import (
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestRepositoryDelete: content that a repository needs or does not show cannot be deleted. Content
// that was deleted is no longer shown, and the next collection deletes its files.
func TestRepositoryDelete(t *testing.T) {
	r := openTemp(t, nil)
	p, other := repository(t, r, "localhost/org/app"), repository(t, r, "localhost/org/other")
	manifest, config := image("layer")
	desc := push(t, p, manifest, config, "layer")
	shown := func(p *ocilocal.Repository, want bool) { t.Helper(); checkShown(t, p, want, manifest, config, "layer") }
	if err := p.Tag(t.Context(), desc, "v1"); err != nil {
		t.Fatal(err)
	}
	mustFail(t, p.DeleteBlob(t.Context(), blobOf("layer").Digest), ocilocal.ErrInUse)
	mustFail(t, other.DeleteBlob(t.Context(), blobOf("layer").Digest), ocilocal.ErrNotFound)
	mustFail(t, other.DeleteManifest(t.Context(), desc.Digest), ocilocal.ErrNotFound)

	push(t, p, manifest, config, "layer") // again
	if err := p.Untag(t.Context(), "v1"); err != nil {
		t.Fatal(err)
	}
	mustFail(t, p.Untag(t.Context(), "v1"), ocilocal.ErrNotFound)
	collect(t, r, atOnce)
	shown(p, true)
	if err := p.Delete(t.Context(), desc); err != nil {
		t.Fatal(err)
	}
	mustFail(t, p.Delete(t.Context(), desc), ocilocal.ErrNotFound)
	for _, text := range []string{config, "layer"} { // they were put by themselves as well
		if err := p.Delete(t.Context(), blobOf(text)); err != nil {
			t.Error(err)
		}
		mustFail(t, p.Delete(t.Context(), blobOf(text)), ocilocal.ErrNotFound)
	}
	shown(p, false)
	collect(t, r, atOnce)
	if names := blobNames(t, r); len(names) > 0 {
		t.Errorf("%q are left", names)
	}
}

// TestRepositoryDeleteReferrer: a repository can delete a referrer that a manifest of another
// repository refers to. The answer does not name that manifest, which stays. A referrer in the same
// repository stops the deletion.
func TestRepositoryDeleteReferrer(t *testing.T) {
	r := openTemp(t, nil)
	p, other := repository(t, r, "localhost/org/app"), repository(t, r, "localhost/org/other")
	subject := pushImage(t, p, "v1", "image")
	manifest, config := image("signature")
	signature := referring(manifest, subject)
	desc := push(t, p, signature, config, "signature")
	foreign := push(t, other, referring(manifest, desc), config, "signature")

	stamp, config := image("stamp")
	own := push(t, p, referring(stamp, desc), config, "stamp")
	err := p.Delete(t.Context(), desc)
	mustFail(t, err, ocilocal.ErrInUse)
	if !strings.Contains(err.Error(), own.Digest.String()) {
		t.Error(err)
	}
	for _, d := range []ocispec.Descriptor{own, desc} {
		if err := p.Delete(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	showsManifests(t, p, false, desc, own, foreign)
	collect(t, r, atOnce)
	showsManifests(t, p, true, subject)
	showsManifests(t, other, true, foreign)
	for problem, err := range r.Verify(t.Context(), nil) {
		t.Error(problem, err)
	}
	push(t, p, signature, config, "signature") // again
	showsManifests(t, p, true, desc)
	mustClose(t, r)
}
