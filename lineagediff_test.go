package ocilocal_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/ocilocal/ocilocal"
)

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

// TestDiffAcrossForms: the empty layer of an image manifest is not counted. The same bytes with
// another media type are another layer.
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
