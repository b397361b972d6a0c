package ocilocal_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestEntryFacts imports entries with platforms and annotations from archives and directories, and
// exports them to both, with a ref and by digest. The export must have the same facts.
func TestEntryFacts(t *testing.T) {
	arm := &ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7", OSFeatures: []string{"f"}, OSVersion: "1"}
	other := "example.com/other@" + digest.FromString("an image index").String()
	const containerd = "io.containerd.image.name"
	for what, c := range map[string]struct {
		platform          *ocispec.Platform
		annotations, want map[string]string
		opts              ocilocal.ImportOptions
		names             ocilocal.ExportNames
		name              string // of the ref; "" for none
	}{
		"platform alone": {platform: arm},
		"cosign": {annotations: map[string]string{"kind": "dev.cosignproject.cosign/image"},
			want: map[string]string{"kind": "dev.cosignproject.cosign/image"}},
		"named": {arm, map[string]string{ocispec.AnnotationRefName: "example.com/a:v1", ocispec.AnnotationCreated: "2026-01-02T03:04:05Z", "": "<&>"},
			map[string]string{ocispec.AnnotationRefName: "example.com/a:v1", ocispec.AnnotationCreated: "2026-01-02T03:04:05Z", "": "<&>"},
			ocilocal.ImportOptions{}, ocilocal.NamesFull, "example.com/a:v1"},
		"containerd": {nil, map[string]string{ocispec.AnnotationRefName: "v1", containerd: "example.com/a:v1"},
			map[string]string{ocispec.AnnotationRefName: "example.com/a:v1", containerd: "example.com/a:v1"},
			ocilocal.ImportOptions{}, ocilocal.NamesFull, "example.com/a:v1"},
		"containerd, as containerd": {arm, map[string]string{ocispec.AnnotationRefName: "v1", containerd: "example.com/a:v1"},
			map[string]string{ocispec.AnnotationRefName: "v1", containerd: "example.com/a:v1"},
			ocilocal.ImportOptions{}, ocilocal.NamesContainerd, "example.com/a:v1"},
		"containerd, as tag": {nil, map[string]string{ocispec.AnnotationRefName: "v1", containerd: "example.com/a:v1"},
			map[string]string{ocispec.AnnotationRefName: "v1"},
			ocilocal.ImportOptions{}, ocilocal.NamesTags, "example.com/a:v1"},
		"renamed": {arm, map[string]string{ocispec.AnnotationRefName: "v1", containerd: "example.com/a:v1", "k": "v"},
			map[string]string{ocispec.AnnotationRefName: "example.com/b:v2", "k": "v"},
			ocilocal.ImportOptions{Reference: ref("example.com/b:v2"), Rename: true}, ocilocal.NamesFull, "example.com/b:v2"},
		"names ignored": {arm, map[string]string{ocispec.AnnotationRefName: "example.com/a:v1", containerd: "example.com/a:v1", "k": "v"},
			map[string]string{"k": "v"}, ocilocal.ImportOptions{IgnoreNames: true}, ocilocal.NamesFull, ""},
		"a name of other content": {arm, map[string]string{ocispec.AnnotationRefName: other, "k": "v"},
			map[string]string{ocispec.AnnotationRefName: other, "k": "v"}, ocilocal.ImportOptions{}, ocilocal.NamesFull, ""},
		"a name of other content, ignored": {arm, map[string]string{ocispec.AnnotationRefName: other},
			nil, ocilocal.ImportOptions{IgnoreNames: true}, ocilocal.NamesFull, ""},
	} {
		t.Run(what, func(t *testing.T) {
			manifest, config := image("layer")
			e := ocispec.Descriptor{MediaType: imageType, Digest: digest.FromString(manifest), Size: int64(len(manifest)), Platform: c.platform, Annotations: c.annotations}
			index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []ocispec.Descriptor{e}})
			if err != nil {
				t.Fatal(err)
			}
			in := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), entry{name: "index.json", body: string(index)})
			r := openTemp(t, nil)
			for range 2 {
				got, err := r.ImportLayout(t.Context(), in, &c.opts)
				if err != nil || len(got.Artifacts) != 1 {
					t.Fatal(got, err)
				}
			}
			var refs []ocilocal.Reference
			o := &ocilocal.ExportOptions{Names: c.names}
			if c.name != "" {
				refs = append(refs, ref(c.name))
			} else {
				o.Digests = append(o.Digests, e.Digest)
			}
			var archive bytes.Buffer
			dir := filepath.Join(t.TempDir(), "out")
			for range 2 { // the second adds nothing
				if err := r.ExportLayout(t.Context(), dir, refs, o); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.ExportArchive(t.Context(), &archive, refs, o); err != nil {
				t.Fatal(err)
			}
			inArchive, err := ocilocal.InspectArchive(t.Context(), &archive)
			if err != nil {
				t.Fatal(err)
			}
			inDir, err := ocilocal.InspectLayout(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, out := range []*ocilocal.Inspection{inArchive, inDir} {
				if len(out.Entries) != 1 {
					t.Fatalf("%+v", out)
				}
				got := out.Entries[0].Descriptor
				if !reflect.DeepEqual(got.Platform, c.platform) || !maps.Equal(got.Annotations, c.want) || got.Digest != e.Digest {
					t.Errorf("platform %v, annotations %q, want %v, %q", got.Platform, got.Annotations, c.platform, c.want)
				}
			}
		})
	}
}
