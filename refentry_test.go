package ocilocal_test

import (
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestEntryFactsTravel imports an entry with a platform and annotations, does something with it, and
// looks at what an export says.
func TestEntryFactsTravel(t *testing.T) {
	t.Parallel()
	const containerd = "io.containerd.image.name"
	manifest, config := image("layer")
	d := digest.FromString(manifest)
	layout := func(pairs ...string) string {
		e := called(with(desc(imageType, manifest), `"platform":{"os":"linux","architecture":"arm64"}`), pairs...)
		return layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), indexOf(e))
	}
	arm := &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	kind := map[string]string{"kind": "dev.cosignproject.cosign/image"}
	named := layout(ocispec.AnnotationRefName, "v1", containerd, "example.com/a:v1", "kind", kind["kind"])
	// A name of other content stays with content that has no name, and goes when it gets one.
	byDigest := layout(ocispec.AnnotationRefName, "example.com/other@"+digest.FromString("other").String(), "kind", kind["kind"])
	load := func(t *testing.T, r *ocilocal.LocalRegistry, dir string, opts *ocilocal.ImportOptions) {
		t.Helper()
		if _, err := r.ImportLayout(t.Context(), dir, opts); err != nil {
			t.Fatal(err)
		}
	}
	tag := func(t *testing.T, r *ocilocal.LocalRegistry, name string) {
		t.Helper()
		if _, err := r.Tag(t.Context(), d, ref(name), nil); err != nil {
			t.Fatal(err)
		}
	}
	copied := func(t *testing.T, r *ocilocal.LocalRegistry, from string, opts *ocilocal.ImportOptions) *ocilocal.LocalRegistry {
		t.Helper()
		other := openTemp(t, nil)
		if _, err := other.ImportRegistry(t.Context(), r, ref(from), opts); err != nil {
			t.Fatal(err)
		}
		return other
	}
	for what, c := range map[string]struct {
		do          func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry // where to look; nil for r
		name        string                                                                // what to export; "" for the digest
		platform    *ocispec.Platform
		annotations map[string]string
	}{
		"named": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			return r
		}, "example.com/a:v1", arm, map[string]string{"kind": kind["kind"], containerd: "example.com/a:v1"}},
		"named, exported by digest": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			return r
		}, "", arm, kind},
		"tagged again": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			tag(t, r, "example.com/b:v2")
			return r
		}, "example.com/b:v2", arm, kind},
		"imported by digest and tagged": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, byDigest, nil)
			tag(t, r, "example.com/b:v2")
			return r
		}, "example.com/b:v2", arm, kind},
		"imported by digest and tagged, exported by digest": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, byDigest, nil)
			tag(t, r, "example.com/b:v2")
			return r
		}, "", arm, kind},
		"imported by digest and by name": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, byDigest, nil)
			load(t, r, layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), layoutIndex(manifest, "example.com/b:v2")), nil)
			return r
		}, "example.com/b:v2", arm, kind},
		"named without facts, then imported by digest and by name": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			plain := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), layoutIndex(manifest, "example.com/b:v2"))
			load(t, r, plain, nil)
			load(t, r, byDigest, nil)
			load(t, r, plain, nil)
			return r
		}, "example.com/b:v2", arm, kind},
		"copied to another registry": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			return copied(t, r, "example.com/a:v1", nil)
		}, "example.com/a:v1", arm, map[string]string{"kind": kind["kind"], containerd: "example.com/a:v1"}},
		"copied under another name": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			return copied(t, r, "example.com/a:v1", &ocilocal.ImportOptions{Reference: ref("example.com/b:v2")})
		}, "example.com/b:v2", arm, kind},
		"imported and copied by digest": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, byDigest, nil)
			return copied(t, r, "example.com/b@"+d.String(), nil)
		}, "example.com/b@" + d.String(), arm, kind},
		"rebuilt": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			return rebuilt(t, r)
		}, "example.com/a:v1", arm, map[string]string{"kind": kind["kind"], containerd: "example.com/a:v1"}},
		"rebuilt beside a tag": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			tagged := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), layoutIndex(manifest, "example.com/b:v2"))
			load(t, r, tagged, nil)
			load(t, r, named, nil)
			return rebuilt(t, r)
		}, "example.com/b:v2", nil, nil},
		"converted": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			if _, err := r.Convert(t.Context(), ref("example.com/a:v1"), ref("example.com/b:v2"), nil); err != nil {
				t.Fatal(err)
			}
			return r
		}, "example.com/b:v2", arm, nil},
		"moved": {func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
			load(t, r, named, nil)
			other := published(t, r, "example.com/b:v2", "other", nil)
			if _, err := r.Tag(t.Context(), other.Digest(), ref("example.com/a:v1"), &ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil {
				t.Fatal(err)
			}
			return r
		}, "example.com/a:v1", nil, nil},
	} {
		t.Run(what, func(t *testing.T) {
			r := c.do(t, openTemp(t, nil))
			var refs []ocilocal.Reference
			o := &ocilocal.ExportOptions{}
			want := maps.Clone(c.annotations)
			if c.name == "" {
				o.Digests = append(o.Digests, d)
			} else {
				refs = append(refs, ref(c.name))
				if want == nil {
					want = map[string]string{}
				}
				want[ocispec.AnnotationRefName] = c.name
			}
			dir := filepath.Join(t.TempDir(), "out")
			if err := r.ExportLayout(t.Context(), dir, refs, o); err != nil {
				t.Fatal(err)
			}
			out, err := ocilocal.InspectLayout(t.Context(), dir)
			if err != nil || len(out.Entries) != 1 {
				t.Fatal(out, err)
			}
			got := out.Entries[0].Descriptor
			if fmt.Sprint(got.Platform) != fmt.Sprint(c.platform) || !maps.Equal(got.Annotations, want) {
				t.Errorf("platform %v, annotations %q, want %v, %q", got.Platform, got.Annotations, c.platform, want)
			}
			_, rows := indexSays(t, r.Root())
			for _, row := range rows {
				if strings.HasPrefix(row, "unnamed ") {
					t.Errorf("content with a ref has still a row %s", row)
				}
			}
		})
	}
}

// rebuilt closes a registry, makes its index again, and opens it.
func rebuilt(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
	t.Helper()
	root := r.Root()
	mustClose(t, r)
	if _, err := ocilocal.Rebuild(t.Context(), root, nil); err != nil {
		t.Fatal(err)
	}
	return mustOpen(t, root)
}
