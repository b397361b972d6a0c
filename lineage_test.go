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
	return built(t, r, ocilocal.MustParseReference(ref), o, subject, func(b *ocilocal.Builder) error {
		for k, v := range annotations {
			if err := b.SetAnnotation(k, v); err != nil {
				return err
			}
		}
		for _, l := range layers {
			if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte(l), map[string]string{"com.example.text": l}); err != nil {
				return err
			}
		}
		return nil
	})
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

// TestParentContradicted: Parent fails if a manifest describes its subject wrongly.
func TestParentContradicted(t *testing.T) {
	r := openTemp(t, nil)
	first := child(t, r, "example.com/line:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	size := *descOf(first)
	size.Size++
	kind := *descOf(first)
	kind.MediaType = ocilocal.MediaTypeArtifactManifest
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

func compareText(a, b digest.Digest) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
