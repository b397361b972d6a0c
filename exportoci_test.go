package ocilocal_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func TestExportLayout(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	one := published(t, r, "example.com/a:v1", "one", nil)
	two := published(t, r, "example.com/a:v2", "two", one)
	dir := filepath.Join(t.TempDir(), "new", "layout")
	if err := r.ExportLayout(ctx, dir, []ocilocal.Reference{ref("example.com/a:v1")}, nil); err != nil {
		t.Fatal(err)
	}
	// Another tool adds an entry with fields of its own, and a file.
	index := filepath.Join(dir, "index.json")
	b, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	foreign := `{"mediaType":"application/x-foreign","digest":"` + digest.FromString("foreign").String() + `","size":7,"x-own":"<&>"}`
	changed := strings.Replace(string(b), `"manifests":[`, `"x-top":{"b":1},"manifests":[`+foreign+`,`, 1)
	if err := os.WriteFile(index, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "NOTES"), []byte("theirs"), 0o644); err != nil {
		t.Fatal(err)
	}
	all := []ocilocal.Reference{ref("example.com/a:v2"), ref("example.com/a:v1")}
	if err := r.ExportLayout(ctx, dir, all, nil); err != nil {
		t.Fatal(err)
	}
	after := tree(t, dir)
	for name := range after {
		if strings.HasPrefix(name, ".ocilocal") {
			t.Errorf("left over: %s", name)
		}
	}
	if after["NOTES"] != "theirs" || !strings.Contains(after["index.json"], foreign) || !strings.Contains(after["index.json"], `"x-top":{"b":1}`) {
		t.Errorf("lost what others had: %s", after["index.json"])
	}
	again := after
	if err := r.ExportLayout(ctx, dir, all, nil); err != nil {
		t.Fatal(err)
	}
	if after = tree(t, dir); !maps.Equal(after, again) {
		t.Errorf("a second export changed something: %s\n%s", again["index.json"], after["index.json"])
	}
	// A round trip: each name and digest.
	to := openTemp(t, nil)
	for _, a := range []*ocilocal.LocalArtifact{one, two} {
		result, err := to.ImportLayout(ctx, dir, &ocilocal.ImportOptions{Select: a.Reference().String()})
		if err != nil {
			t.Fatal(err)
		}
		if u := result.Artifacts[0].Update; u.Reference != a.Reference() || u.Descriptor.Digest != a.Digest() || u.Outcome != ocilocal.Inserted {
			t.Errorf("%+v", u)
		}
	}
}

// TestExportLayoutCutOff exports into directories of exports that were killed just before the
// rename of index.json or of oci-layout.
func TestExportLayoutCutOff(t *testing.T) {
	r := openTemp(t, nil)
	refs := []ocilocal.Reference{published(t, r, "example.com/a:v1", "one", nil).Reference()}
	dir := t.TempDir()
	if err := r.ExportLayout(t.Context(), dir, refs, nil); err != nil {
		t.Fatal(err)
	}
	whole := tree(t, dir)
	for _, name := range []string{"index.json", "oci-layout"} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, ".ocilocal-new")); err != nil {
			t.Fatal(err)
		}
		if name == "oci-layout" {
			if err := os.Remove(filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.ExportLayout(t.Context(), dir, refs, nil); err != nil || !maps.Equal(tree(t, dir), whole) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	// Without index.json a layout is another tool's, if it has anything else.
	if err := errors.Join(os.Remove(filepath.Join(dir, "index.json")), os.WriteFile(filepath.Join(dir, "theirs"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportLayout(t.Context(), dir, refs, nil); !errors.Is(err, ocilocal.ErrInvalidLayout) {
		t.Errorf("beside another's file: %v", err)
	}
}

func TestExportLayoutConflicts(t *testing.T) {
	ctx := t.Context()
	r, other := openTemp(t, artifactForm), openTemp(t, artifactForm)
	refs := []ocilocal.Reference{ref("example.com/a:v1")}
	published(t, r, "example.com/a:v1", "one", nil)
	b := published(t, other, "example.com/a:v1", "another", nil)
	dir := t.TempDir()
	if err := r.ExportLayout(ctx, dir, refs, nil); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	if err := other.ExportLayout(ctx, dir, refs, nil); !errors.Is(err, ocilocal.ErrExists) {
		t.Fatalf("%v, want ErrExists", err)
	}
	if !maps.Equal(before, tree(t, dir)) {
		t.Error("a refused export changed the layout")
	}
	if err := other.ExportLayout(ctx, dir, refs, &ocilocal.ExportOptions{Overwrite: true}); err != nil {
		t.Fatal(err)
	}
	in, err := ocilocal.InspectLayout(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(in.Entries) != 1 || in.Entries[0].Descriptor.Digest != b.Digest() || in.Entries[0].Reference != refs[0] || in.Blobs != 4 {
		t.Errorf("%+v", in)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "thesis.tex"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportLayout(ctx, full, refs, nil); !errors.Is(err, ocilocal.ErrInvalidLayout) {
		t.Errorf("into somebody's directory: %v", err)
	}
	// A damaged blob of the layout is healed, a link in its place replaced and not followed.
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("keep"), 0o644); err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(dir, "blobs", "sha256", digest.FromString("another").Encoded())
	for _, damage := range []func() error{
		func() error { return os.WriteFile(blob, []byte("damaged"), 0o644) },
		func() error { return os.Symlink(victim, blob) },
	} {
		if err := os.Remove(blob); err != nil {
			t.Fatal(err)
		}
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if err := other.ExportLayout(ctx, dir, refs, nil); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Lstat(blob); err != nil || !fi.Mode().IsRegular() {
			t.Fatal(fi, err)
		}
		if got := tree(t, dir)["blobs/sha256/"+filepath.Base(blob)]; got != "another" {
			t.Errorf("blob holds %q", got)
		}
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "keep" {
		t.Errorf("victim: %q %v", b, err)
	}
}

// TestExportLayoutMeanwhile lets another tool add an entry while an export copies blobs, to a
// directory that was a layout before and to one that was empty. Both entries are there afterwards.
// A name that the other tool took meanwhile is a conflict.
func TestExportLayoutMeanwhile(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	manifest, config := image("theirs")
	for name, c := range map[string]struct {
		before []entry
		theirs string
		fails  error
	}{
		"layout":     {[]entry{layoutVersion, indexOf()}, "v2", nil},
		"empty":      {nil, "v2", nil},
		"same name":  {[]entry{layoutVersion, indexOf()}, "example.com/a:v1", ocilocal.ErrExists},
		"no version": {[]entry{indexOf()}, "v2", nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := layoutDir(t, c.before...)
			var once sync.Once
			ocilocal.SetFault(r, func(op, _ string) error {
				if op == "link" { // of the first blob that was copied
					once.Do(func() {
						for _, e := range []entry{blobEntry(manifest), blobEntry(config), blobEntry("theirs"), layoutVersion, indexOf(called(desc(imageType, manifest), refName, c.theirs))} {
							file := filepath.Join(dir, filepath.FromSlash(e.name))
							if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file+".new", []byte(e.body), 0o644), os.Rename(file+".new", file)); err != nil {
								t.Error(err)
							}
						}
					})
				}
				return nil
			})
			err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref("example.com/a:v1")}, nil)
			ocilocal.SetFault(r, nil)
			if !errors.Is(err, c.fails) {
				t.Fatal(err)
			}
			in, err := ocilocal.InspectLayout(t.Context(), dir)
			want := []string{c.theirs, "example.com/a:v1"}
			if c.fails != nil {
				want = want[:1]
			}
			var got []string
			for _, e := range in.Entries {
				got = append(got, e.Name)
			}
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("entries %q, %v, want %q", got, err, want)
			}
		})
	}
}

// TestExportLayoutSpellings exports to a directory in which another tool spells the name in another
// way. It is the same name, so other content under it is a conflict.
func TestExportLayoutSpellings(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	manifest, _ := image("theirs")
	theirs := desc(imageType, manifest)
	d := digest.FromString(manifest).String()
	for _, c := range []struct {
		pairs []string
		names ocilocal.ExportNames
	}{
		{[]string{refName, "EXAMPLE.com/a:v1"}, ocilocal.NamesFull},
		{[]string{refName, "example.com/a:v1@" + d}, ocilocal.NamesFull},
		{[]string{refName, "v1", imageName, "example.com/a:v1@" + d}, ocilocal.NamesFull},
		{[]string{refName, "v1@" + d, imageName, "example.com/a:v1"}, ocilocal.NamesContainerd},
		{[]string{refName, "example.com/a:v1", imageName, "example.com/b:v1"}, ocilocal.NamesFull},
		{[]string{refName, "v1", imageName, "example.com/b:v1"}, ocilocal.NamesTags},
	} {
		dir := layoutDir(t, layoutVersion, indexOf(called(theirs, c.pairs...)))
		opts := &ocilocal.ExportOptions{Names: c.names}
		refs := []ocilocal.Reference{ref("example.com/a:v1")}
		if err := r.ExportLayout(t.Context(), dir, refs, opts); !errors.Is(err, ocilocal.ErrExists) {
			t.Errorf("%q: %v, want ErrExists", c.pairs, err)
		}
		opts.Overwrite = true
		if err := r.ExportLayout(t.Context(), dir, refs, opts); err != nil {
			t.Error(err)
		}
		if in, err := ocilocal.InspectLayout(t.Context(), dir); err != nil || len(in.Entries) != 1 || in.Entries[0].Descriptor.Digest.String() == d {
			t.Errorf("%q: %+v, %v", c.pairs, in, err)
		}
	}
}

// TestExportersRace lets several registries export into one directory at once.
func TestExportersRace(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 {
		r := openTemp(t, nil)
		name := fmt.Sprintf("example.com/a:v%d", i)
		published(t, r, name, name, nil)
		wg.Go(func() {
			if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref(name)}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	in, err := ocilocal.InspectLayout(t.Context(), dir)
	if err != nil || len(in.Entries) != 8 {
		t.Fatalf("%+v %v", in, err)
	}
}

// TestExportIndexIsJSON makes sure that other programs can read names with odd characters.
func TestExportIndexIsJSON(t *testing.T) {
	r := openTemp(t, nil)
	a := published(t, r, "localhost:5000/a__b/c:V-1_x.y", "x", nil)
	dir := t.TempDir()
	if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Manifests []struct{ Annotations map[string]string }
	}
	if err := json.Unmarshal([]byte(tree(t, dir)["index.json"]), &doc); err != nil {
		t.Fatal(err)
	}
	if got := doc.Manifests[0].Annotations["org.opencontainers.image.ref.name"]; got != "localhost:5000/a__b/c:V-1_x.y" {
		t.Errorf("%q", got)
	}
}
