package ocilocal_test

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestExportNames writes names in each form and imports them again.
func TestExportNames(t *testing.T) {
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:v1", "a", nil)
	published(t, r, "example.com/b:v1", "b", nil)
	both := []ocilocal.Reference{ref("example.com/a:v1"), ref("example.com/b:v1")}
	pinned := ref("example.com/a@" + a.Digest().String())
	if _, err := r.Tag(t.Context(), a.Digest(), pinned, nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		names ocilocal.ExportNames
		refs  []ocilocal.Reference
		name  string // of the first entry
		opts  ocilocal.ImportOptions
	}{
		{ocilocal.NamesFull, both, "example.com/a:v1", ocilocal.ImportOptions{}},
		{ocilocal.NamesContainerd, both, "v1", ocilocal.ImportOptions{}},
		{ocilocal.NamesTags, both[:1], "v1", ocilocal.ImportOptions{Repository: "example.com/a"}},
		{ocilocal.NamesFull, []ocilocal.Reference{pinned}, pinned.String(), ocilocal.ImportOptions{}},
		{ocilocal.NamesContainerd, []ocilocal.Reference{pinned}, a.Digest().String(), ocilocal.ImportOptions{}},
		{ocilocal.NamesTags, []ocilocal.Reference{pinned}, a.Digest().String(), ocilocal.ImportOptions{Repository: "example.com/a"}},
	} {
		opts := &ocilocal.ExportOptions{Names: c.names}
		archive, dir := filepath.Join(t.TempDir(), "a.tar"), t.TempDir()
		if err := errors.Join(r.ExportArchiveFile(t.Context(), archive, c.refs, opts), r.ExportLayout(t.Context(), dir, c.refs, opts), r.ExportLayout(t.Context(), dir, c.refs, opts)); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{archive, dir} {
			in, err := ocilocal.InspectPath(t.Context(), path)
			if err != nil || len(in.Entries) != len(c.refs) || in.Entries[0].Name != c.name || in.Entries[0].Descriptor.Digest != a.Digest() {
				t.Fatalf("%v: %+v, %v", c.names, in, err)
			}
			got, err := openTemp(t, nil).ImportPath(t.Context(), path, &c.opts)
			if err != nil {
				t.Fatal(err)
			}
			var refs []ocilocal.Reference
			for _, a := range got.Artifacts {
				refs = append(refs, a.Update.Reference)
			}
			if !slices.Equal(refs, c.refs) {
				t.Errorf("%v: imported %v, want %v", c.names, refs, c.refs)
			}
		}
	}
	if err := r.ExportLayout(t.Context(), t.TempDir(), both, &ocilocal.ExportOptions{Names: ocilocal.NamesTags}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("two refs of one tag: %v", err)
	}
}

// TestExportNamesAgain exports a ref to one directory in each form of names. Tools that search for
// the tag find it after the export with tags, and the artifact can still be imported as one.
func TestExportNamesAgain(t *testing.T) {
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:v1", "layer", nil)
	dir, refs := t.TempDir(), []ocilocal.Reference{ref("example.com/a:v1")}
	for range 2 {
		for _, names := range []ocilocal.ExportNames{ocilocal.NamesFull, ocilocal.NamesContainerd, ocilocal.NamesTags} {
			if err := r.ExportLayout(t.Context(), dir, refs, &ocilocal.ExportOptions{Names: names}); err != nil {
				t.Fatal(err)
			}
		}
	}
	in, err := ocilocal.InspectLayout(t.Context(), dir)
	if err != nil || len(in.Entries) != 2 || in.Entries[0].Name != "example.com/a:v1" || in.Entries[1].Name != "v1" {
		t.Errorf("%+v, %v", in, err)
	}
	for _, opts := range []*ocilocal.ImportOptions{nil, {Select: "example.com/a:v1"}, {Select: "v1"}, {Select: a.Digest().String()}} {
		got, err := openTemp(t, nil).LoadPath(t.Context(), dir, opts)
		if err != nil || got.Reference() != refs[0] || got.Digest() != a.Digest() {
			t.Errorf("%+v: %v, %v", opts, got, err)
		}
	}
}
