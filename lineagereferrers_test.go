package ocilocal_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func TestReferrers(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	subject := child(t, r, "example.com/app:v1", ocilocal.BuilderOptions{}, nil, nil, "app")
	other := child(t, r, "example.com/app:v2", ocilocal.BuilderOptions{}, nil, nil, "app 2")
	child(t, r, "example.com/app:other", ocilocal.BuilderOptions{}, descOf(other), nil, "x")
	const n = 70 // more than two pages
	byType := map[string]int{}
	want := map[digest.Digest]string{}
	for i := range n {
		o := ocilocal.BuilderOptions{ArtifactType: fmt.Sprintf("application/vnd.example.sig%d", i%3)}
		if i%2 == 1 {
			o.Format = ocilocal.FormatImageManifest
		}
		a := child(t, r, fmt.Sprintf("example.com/app:sig%d", i), o, descOf(subject), map[string]string{labelKey: fmt.Sprint(i)}, "sig")
		byType[o.ArtifactType]++
		want[a.Digest()] = fmt.Sprint(i)
	}
	list := func(o *ocilocal.ReferrersOptions) (all []ocispec.Descriptor) {
		t.Helper()
		for d, err := range r.Referrers(t.Context(), subject.Digest(), o) {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, d)
		}
		return all
	}
	all := list(nil)
	if len(all) != n || !slices.IsSortedFunc(all, func(a, b ocispec.Descriptor) int { return compareText(a.Digest, b.Digest) }) {
		t.Fatalf("%d referrers", len(all))
	}
	for _, d := range all {
		a, err := r.LoadDigest(t.Context(), d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		got := a.Descriptor()
		if got.MediaType != d.MediaType || got.Size != d.Size || got.ArtifactType != d.ArtifactType || d.Annotations[labelKey] != want[d.Digest] || len(d.Annotations) != 1 {
			t.Errorf("%+v, want %+v", d, got)
		}
	}
	for typ, n := range byType {
		if got := list(&ocilocal.ReferrersOptions{ArtifactType: typ}); len(got) != n || got[0].ArtifactType != typ {
			t.Errorf("%s: %d, want %d", typ, len(got), n)
		}
	}
	var paged []ocispec.Descriptor
	for after := digest.Digest(""); ; {
		page := list(&ocilocal.ReferrersOptions{After: after, Limit: 33})
		if len(page) > 33 {
			t.Fatalf("page of %d", len(page))
		}
		if len(page) == 0 {
			break
		}
		paged = append(paged, page...)
		after = page[len(page)-1].Digest
	}
	if !slices.EqualFunc(paged, all, func(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest }) {
		t.Errorf("%d by pages, %d at once", len(paged), len(all))
	}
	for _, err := range r.Referrers(t.Context(), "sha256:no", nil) {
		if !errors.Is(err, ocilocal.ErrInvalidDigest) {
			t.Error(err)
		}
	}
	for d, err := range r.Referrers(t.Context(), digest.FromString("nobody"), nil) {
		t.Error(d, err)
	}
}
