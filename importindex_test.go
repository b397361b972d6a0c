package ocilocal_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestImportPlatforms imports the forms in which tools write several platforms: two entries of one
// name, an index.json without names, and an image index with the manifest of one platform only.
func TestImportPlatforms(t *testing.T) {
	t.Parallel()
	arm := &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	first, config := image("layer")
	second, _ := image("LAYER")
	parts := []entry{blobEntry(second), blobEntry(config), blobEntry("LAYER")}
	all := append([]entry{blobEntry(first), blobEntry("layer")}, parts...)
	amd64 := with(desc(imageType, first), `"platform":{"os":"linux","architecture":"amd64"}`)
	arm64 := with(desc(imageType, second), `"platform":{"os":"linux","architecture":"arm64"}`)

	twins := indexOf(called(amd64, refName, "example.com/a:v1"), called(arm64, refName, "example.com/a:v1"))
	if _, _, err := importBoth(t, nil, append(all, twins)...); !errors.Is(err, ocilocal.ErrInvalidArgument) || !strings.Contains(err.Error(), "Platform") {
		t.Errorf("two entries of one name: %v", err)
	}
	sparse := imageIndexOf(amd64, arm64)
	top := called(desc(ocispec.MediaTypeImageIndex, sparse), refName, "example.com/a:v1")
	for name, entries := range map[string][]entry{
		"two entries of one name": append(all, twins),
		"a flat index.json":       append(all, indexOf(amd64, arm64)),
		"a sparse image index":    append(parts, blobEntry(sparse), indexOf(top)),
	} {
		opts := &ocilocal.ImportOptions{Platform: arm}
		if strings.HasPrefix(name, "a flat") {
			opts.Reference = ref("example.com/a:v1")
		}
		_, got, err := importBoth(t, opts, entries...)
		if err != nil || len(got.Artifacts) != 1 || got.Artifacts[0].Descriptor.Digest != digest.FromString(second) || got.Artifacts[0].Update.Reference != ref("example.com/a:v1") {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if _, _, err := importBoth(t, &ocilocal.ImportOptions{Platform: &ocispec.Platform{OS: "plan9"}}, entries...); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%s, a platform that it does not have: %v", name, err)
		}
	}
	_, got, err := importBoth(t, &ocilocal.ImportOptions{Select: digest.FromString(second).String()}, append(parts, blobEntry(sparse), indexOf(top))...)
	if err != nil || len(got.Unnamed()) != 1 || got.Artifacts[0].Descriptor.Digest != digest.FromString(second) {
		t.Errorf("the member of a sparse image index: %+v, %v", got, err)
	}
	deep := append(all, blobEntry(sparse))
	for range ocilocal.MaxIndexNesting {
		index := imageIndexOf(top)
		deep, top = append(deep, blobEntry(index)), desc(ocispec.MediaTypeImageIndex, index)
	}
	_, got, err = importBoth(t, &ocilocal.ImportOptions{Select: digest.FromString(second).String()}, append(deep, indexOf(top))...)
	if err != nil || len(got.Artifacts) != 1 || got.Artifacts[0].Descriptor.Digest != digest.FromString(second) {
		t.Errorf("the member of a nested image index: %+v, %v", got, err)
	}
	_, _, err = importBoth(t, &ocilocal.ImportOptions{Select: "example.com/a:v1", Platform: &ocispec.Platform{OS: "plan9"}},
		append(all, indexOf(called(amd64, refName, "example.com/a:v1")))...)
	if !errors.Is(err, ocilocal.ErrNotFound) || !strings.Contains(err.Error(), "plan9") {
		t.Errorf("an entry of the name for another platform: %v", err)
	}
	flat := indexOf(amd64, arm64)
	r, got, err := importBoth(t, &ocilocal.ImportOptions{AsIndex: true, Reference: ref("example.com/a:v1")}, append(all, flat)...)
	if err != nil || got.Artifacts[0].Descriptor.Digest != digest.FromString(flat.body) {
		t.Fatalf("AsIndex: %+v, %v", got, err)
	}
	a, err := r.Load(t.Context(), ref("example.com/a:v1"))
	if err != nil {
		t.Fatal(err)
	}
	if m, err := a.Manifest(t.Context()); err != nil || len(m.Manifests()) != 2 || m.Manifests()[1].Platform.Architecture != "arm64" {
		t.Errorf("AsIndex: %v, %v", m, err)
	}
}

// TestImportUnrelated puts files and entries into a layout that no artifact needs. They must not
// stop the import of the others.
func TestImportUnrelated(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	noLayers := fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":null}`, desc("application/vnd.example.config", config))
	parts := []entry{layoutVersion, blobEntry(config), blobEntry("layer"), blobEntry(manifest)}
	good := called(desc(imageType, manifest), refName, "example.com/a:v1")
	half := blobEntry("whole")
	half.body = "half"
	odd := func(name string) entry { return entry{name: "blobs/" + name, body: "?"} }
	for name, more := range map[string][]entry{
		"half-written blob":  {half, indexOf(good)},
		"AppleDouble":        {odd("sha256/._" + strings.Repeat("a", 64)), odd("._sha256"), indexOf(good)},
		"desktop file":       {odd(".DS_Store"), odd("sha256/.DS_Store"), indexOf(good)},
		"temporary file":     {odd("sha256/oci-put-blob123"), indexOf(good)},
		"lock":               {odd("sha256/" + strings.Repeat("a", 64) + ".lock"), indexOf(good)},
		"other algorithm":    {odd("blake3/" + strings.Repeat("a", 64)), indexOf(good)},
		"unknown digest":     {indexOf(strings.Replace(desc(imageType, "x"), "sha256:", "blake3:", 1), good)},
		"unknown media type": {indexOf(desc("application/xml", "<x/>"), good)},
		"null layers":        {blobEntry(noLayers), indexOf(called(desc(imageType, noLayers), refName, "example.com/b:v1"), good)},
	} {
		t.Run(name, func(t *testing.T) {
			r, got, err := importBoth(t, nil, append(parts, more...)...)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(name, "unknown") != (len(got.Skipped) == 1) {
				t.Errorf("skipped %v", got.Skipped)
			}
			if _, err := r.Load(t.Context(), ref("example.com/a:v1")); err != nil {
				t.Error(err)
			}
			// An export adds to such a directory, and keeps its files and entries.
			published(t, r, "example.com/c:v1", "another layer", nil)
			dir := layoutDir(t, append(parts, more...)...)
			if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref("example.com/c:v1")}, nil); err != nil {
				t.Error(err)
			}
			if in, err := ocilocal.InspectPath(t.Context(), dir); err != nil || len(in.Entries) != len(got.Artifacts)+len(got.Skipped)+1 {
				t.Errorf("%+v, %v", in, err)
			}
		})
	}
	for name, index := range map[string]string{
		"null":  `{"schemaVersion":2,"manifests":null}`,
		"empty": `{"schemaVersion":2,"manifests":[]}`,
	} {
		_, got, err := importBoth(t, nil, layoutVersion, entry{name: "index.json", body: index})
		if err != nil || len(got.Artifacts) != 0 {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		r := openTemp(t, nil)
		published(t, r, "example.com/c:v1", "layer", nil)
		dir := layoutDir(t, entry{name: "index.json", body: index}) // without oci-layout
		if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref("example.com/c:v1")}, nil); err != nil {
			t.Errorf("export into it: %v", err)
		}
		if got, err := openTemp(t, nil).ImportLayout(t.Context(), dir, nil); err != nil || len(got.Artifacts) != 1 {
			t.Errorf("%+v, %v", got, err)
		}
		if files := tree(t, dir); files["oci-layout"] == "" {
			t.Errorf("the export wrote no oci-layout: %v", files)
		}
	}
}

// TestImportLargeIndex imports from an index.json that is larger than the limit of a manifest.
func TestImportLargeIndex(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	d := desc(imageType, manifest)
	var entries []string
	for i := range 20_000 {
		entries = append(entries, called(d, refName, fmt.Sprintf("registry.example.com/a/long/repository/name/%d:v1", i)))
	}
	index := indexOf(entries...)
	if len(index.body) <= ocilocal.MaxManifestSize {
		t.Fatalf("%d bytes", len(index.body))
	}
	opts := &ocilocal.ImportOptions{Select: "registry.example.com/a/long/repository/name/19999:v1"}
	r, got, err := importBoth(t, opts, index, blobEntry(manifest), blobEntry(config), blobEntry("layer"))
	if err != nil || len(got.Artifacts) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	published(t, r, "example.com/c:v1", "another layer", nil)
	dir := layoutDir(t, index, blobEntry(manifest), blobEntry(config), blobEntry("layer"))
	if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref("example.com/c:v1")}, nil); err != nil {
		t.Error(err)
	}
}
