package ocilocal_test

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// child publishes an artifact with a subject, annotations and layers.
func child(t testing.TB, r *ocilocal.LocalRegistry, ref string, o ocilocal.BuilderOptions, subject *ocispec.Descriptor, annotations map[string]string, layers ...string) *ocilocal.LocalArtifact {
	t.Helper()
	if o.ArtifactType == "" {
		o.ArtifactType = testType
	}
	b, err := r.NewBuilder(ocilocal.MustParseReference(ref), &o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if subject != nil {
		if err := b.SetSubject(*subject); err != nil {
			t.Fatal(err)
		}
	}
	for k, v := range annotations {
		if err := b.SetAnnotation(k, v); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range layers {
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte(l), map[string]string{"com.example.text": l}); err != nil {
			t.Fatal(err)
		}
	}
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestHistory(t *testing.T) {
	r := openTemp(t, nil)
	image := ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest}
	first := child(t, r, "example.com/line:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	second := child(t, r, "example.com/line:v2", image, descOf(first), nil, "two")
	third := child(t, r, "example.com/line:v3", ocilocal.BuilderOptions{}, descOf(second), nil, "three")

	var got []digest.Digest
	for a, err := range third.History(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, a.Digest())
	}
	if want := []digest.Digest{third.Digest(), second.Digest(), first.Digest()}; !slices.Equal(got, want) {
		t.Errorf("history is %v, want %v", got, want)
	}
	if p, err := third.Parent(t.Context()); err != nil || p.Digest() != second.Digest() {
		t.Errorf("parent is %v, %v", p, err)
	}
	if p, err := first.Parent(t.Context()); p != nil || err != nil {
		t.Errorf("the first one's parent is %v, %v", p, err)
	}
	n := 0
	for range third.History(t.Context()) {
		n++
		break
	}
	if n != 1 {
		t.Error("history went on after break")
	}
}

func TestHistoryMissingParent(t *testing.T) {
	r := openTemp(t, nil)
	gone := ocispec.Descriptor{MediaType: imageType, Digest: digest.FromString("gone"), Size: 4}
	first := child(t, r, "example.com/line:v1", ocilocal.BuilderOptions{}, &gone, nil, "one")
	second := child(t, r, "example.com/line:v2", ocilocal.BuilderOptions{}, descOf(first), nil, "two")
	var errs []error
	n := 0
	for a, err := range second.History(t.Context()) {
		if n++; err != nil {
			errs = append(errs, err)
			if a != nil {
				t.Error("an artifact came with the error")
			}
		}
	}
	if n != 3 || len(errs) != 1 {
		t.Fatalf("%d steps, errors %v", n, errs)
	}
	missing, ok := errors.AsType[*ocilocal.MissingSubjectError](errs[0])
	if !ok || missing.Artifact != first.Digest() || missing.Subject.Digest != gone.Digest || missing.Subject.MediaType != gone.MediaType {
		t.Errorf("%+v, %v", missing, errs[0])
	}
	if !errors.Is(errs[0], ocilocal.ErrNotFound) || !errors.Is(errs[0], fs.ErrNotExist) {
		t.Error(errs[0])
	}
}

// A subject that is described wrongly leads nowhere.
func TestParentContradicted(t *testing.T) {
	r := openTemp(t, nil)
	first := child(t, r, "example.com/line:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	size := *descOf(first)
	size.Size++
	kind := *descOf(first)
	kind.MediaType = imageType
	for i, c := range []struct {
		subject ocispec.Descriptor
		want    error
	}{{size, ocilocal.ErrSizeMismatch}, {kind, ocilocal.ErrInvalidManifest}} {
		a := child(t, r, fmt.Sprintf("example.com/line:bad%d", i), ocilocal.BuilderOptions{}, &c.subject, nil, "x")
		if p, err := a.Parent(t.Context()); p != nil || !errors.Is(err, c.want) {
			t.Errorf("%v, %v, want %v", p, err, c.want)
		}
	}
}

func TestDiff(t *testing.T) {
	r := openTemp(t, nil)
	image := ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest}
	from := child(t, r, "example.com/diff:a", ocilocal.BuilderOptions{}, nil,
		map[string]string{"same": "1", "gone": "2", "other": "3", "emptied": "x"}, "kept", "gone", "twice", "twice", "moved")
	to := child(t, r, "example.com/diff:b", image, nil,
		map[string]string{"same": "1", "other": "4", "new": "", "emptied": ""}, "kept", "moved", "twice", "new")
	d, err := from.Diff(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, k := range d.Kept {
		got = append(got, fmt.Sprint("kept ", k.From.Position, k.To.Position, " ", k.To.Descriptor.Annotations["com.example.text"]))
	}
	for _, l := range d.Removed {
		got = append(got, fmt.Sprint("removed ", l.Position, " ", l.Descriptor.Annotations["com.example.text"]))
	}
	for _, l := range d.Added {
		got = append(got, fmt.Sprint("added ", l.Position, " ", l.Descriptor.Annotations["com.example.text"]))
	}
	for _, a := range d.Annotations {
		got = append(got, fmt.Sprintf("%s %v %q %v %q", a.Key, a.Had, a.Old, a.Has, a.New))
	}
	want := []string{
		"kept 0 0 kept", "kept 4 1 moved", "kept 2 2 twice",
		"removed 1 gone", "removed 3 twice", "added 3 new",
		`emptied true "x" true ""`, `gone true "2" false ""`, `new false "" true ""`, `other true "3" true "4"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	if _, err := from.Diff(t.Context(), nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Error(err)
	}
}

// The layer that stands for none is none, and the same bytes under another media type are another layer.
func TestDiffAcrossForms(t *testing.T) {
	r := openTemp(t, nil)
	image := ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest}
	a := child(t, r, "example.com/diff:a", ocilocal.BuilderOptions{}, nil, nil)
	b := child(t, r, "example.com/diff:b", image, nil, nil)
	d, err := a.Diff(t.Context(), b)
	if err != nil || len(d.Kept)+len(d.Added)+len(d.Removed)+len(d.Annotations) != 0 {
		t.Errorf("%+v, %v", d, err)
	}
	typed := func(ref, mediaType string) *ocilocal.LocalArtifact {
		b, err := r.NewBuilder(ocilocal.MustParseReference(ref), &ocilocal.BuilderOptions{ArtifactType: testType})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Cancel()
		if _, err := b.AddLayerBytes(t.Context(), mediaType, []byte("bytes"), nil); err != nil {
			t.Fatal(err)
		}
		art, err := b.Build(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return art
	}
	d, err = typed("example.com/diff:c", "text/plain").Diff(t.Context(), typed("example.com/diff:d", "text/csv"))
	if err != nil || len(d.Kept) != 0 || len(d.Added) != 1 || len(d.Removed) != 1 {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestReferrers(t *testing.T) {
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

func compareText(a, b digest.Digest) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
