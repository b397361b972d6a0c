package ocilocal_test

import (
	"testing"

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
