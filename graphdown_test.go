package ocilocal_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestClosure: all content that an artifact needs is listed once, children before parents. A
// missing or damaged manifest, or an artifact that is too large, ends the list.
func TestClosure(t *testing.T) {
	r := openTemp(t, nil)
	a := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "shared", "one", "shared")
	manifests, blobs, err := ocilocal.Closure(t.Context(), r, a.Descriptor(), a.Descriptor())
	want := digests(digest.FromString("shared"), digest.FromString("one"), ocilocal.EmptyJSON.Digest)
	slices.Sort(blobs)
	if err != nil || !slices.Equal(manifests, []digest.Digest{a.Digest()}) || !slices.Equal(blobs, want) {
		t.Errorf("%v, %v, %v", manifests, blobs, err)
	}
	if _, _, err := ocilocal.Closure(t.Context(), r, ocispec.Descriptor{Digest: digest.FromString("none"), Size: 4}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	b := published(t, r, "example.com/b:v1", "b", nil)
	rewrite(t, blobFile(r, b.Digest()), flipBit)
	if _, _, err := ocilocal.Closure(t.Context(), r, b.Descriptor()); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Error(err)
	}
}

// TestTagLongLineage: rows are followed without recursion, even along a very long chain of
// subjects.
func TestTagLongLineage(t *testing.T) {
	r := openTemp(t, nil)
	var a *ocilocal.LocalArtifact
	for i := range 50 {
		a = published(t, r, fmt.Sprintf("example.com/a:v%d", i), fmt.Sprint(i), a)
	}
	u, err := r.RefUsage(t.Context(), a.Reference())
	if err != nil || u.Own.Manifests+u.Shared.Manifests != 50 {
		t.Errorf("%+v, %v", u, err)
	}
	// Tag checks the content that is needed. Subjects are not needed.
	if err := os.Remove(blobFile(r, digest.FromString("0"))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Tag(t.Context(), a.Digest(), ref("example.com/b:v1"), nil); err != nil {
		t.Error(err)
	}
	if err := os.Remove(blobFile(r, digest.FromString("49"))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Tag(t.Context(), a.Digest(), ref("example.com/b:v2"), nil); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Error(err)
	}
}
