package ocilocal_test

import (
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func indexBuilder(t testing.TB, r *ocilocal.LocalRegistry, name string, opts *ocilocal.IndexBuilderOptions) *ocilocal.IndexBuilder {
	t.Helper()
	b, err := r.NewIndexBuilder(ref(name), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Cancel)
	return b
}

func addManifest(t testing.TB, b *ocilocal.IndexBuilder, desc ocispec.Descriptor) {
	t.Helper()
	if _, err := b.AddManifest(t.Context(), desc); err != nil {
		t.Fatal(err)
	}
}

// TestIndexBuilder: the bytes are canonical, nothing is visible before Build, and an index may hold
// indexes.
func TestIndexBuilder(t *testing.T) {
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:amd64", "for amd64", nil)
	c := published(t, r, "example.com/a:arm64", "for arm64", nil)
	build := func(name string, keys ...string) *ocilocal.LocalArtifact {
		b := indexBuilder(t, r, name, &ocilocal.IndexBuilderOptions{ArtifactType: "application/vnd.example.set"})
		addManifest(t, b, ocispec.Descriptor{Digest: a.Digest(), Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}})
		addManifest(t, b, ocispec.Descriptor{Digest: c.Digest(), Annotations: map[string]string{"k": "v"},
			Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8", OSFeatures: []string{"f"}}})
		for _, k := range keys {
			if err := b.SetAnnotation(k, "of "+k); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.SetSubject(*descOf(a)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Resolve(t.Context(), ref(name)); err == nil {
			t.Error("it is visible")
		}
		x, err := b.Build(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if b.Update().Outcome != ocilocal.Inserted {
			t.Errorf("%+v", b.Update())
		}
		_, err = b.Build(t.Context())
		mustFail(t, err, ocilocal.ErrClosed)
		return x
	}
	x, y := build("example.com/a:v1", "one", "two"), build("example.com/a:v2", "two", "one")
	if x.Digest() != y.Digest() {
		t.Error("equal input gives two digests")
	}
	m, err := x.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"annotations":{"one":"of one","two":"of two"},"artifactType":"application/vnd.example.set","manifests":[`+
		`{"digest":%q,"mediaType":%q,"platform":{"architecture":"amd64","os":"linux"},"size":%d},`+
		`{"annotations":{"k":"v"},"digest":%q,"mediaType":%q,"platform":{"architecture":"arm64","os":"linux","os.features":["f"],"variant":"v8"},"size":%d}],`+
		`"mediaType":"application/vnd.oci.image.index.v1+json","schemaVersion":2,"subject":{"digest":%q,"mediaType":%q,"size":%d}}`,
		a.Digest(), a.MediaType(), a.Descriptor().Size, c.Digest(), c.MediaType(), c.Descriptor().Size,
		a.Digest(), a.MediaType(), a.Descriptor().Size)
	if got := string(m.Bytes()); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	outer := indexBuilder(t, r, "example.com/a:all", nil)
	addManifest(t, outer, ocispec.Descriptor{Digest: x.Digest()})
	if _, err := outer.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"example.com/a:v1", "example.com/a:v2", "example.com/a:amd64", "example.com/a:arm64"} {
		if _, err := r.Remove(t.Context(), ref(name)); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, r, atOnce)
	mustClose(t, r)
	checkCollected(t, r.Root(), model{"example.com/a:all": {""}})
}

// TestIndexBuilderErrors: a build that fails publishes nothing and can be repeated.
func TestIndexBuilderErrors(t *testing.T) {
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:v1", "one", nil)
	b := indexBuilder(t, r, "example.com/index:v1", nil)
	for what, c := range map[string]struct {
		desc ocispec.Descriptor
		err  error
	}{
		"absent":        {ocispec.Descriptor{Digest: digest.FromString("absent")}, ocilocal.ErrNotFound},
		"a layer":       {ocispec.Descriptor{Digest: digest.FromString("one")}, ocilocal.ErrNotFound},
		"no digest":     {ocispec.Descriptor{Digest: "sha256:x"}, ocilocal.ErrInvalidDigest},
		"another type":  {ocispec.Descriptor{Digest: a.Digest(), MediaType: ocispec.MediaTypeImageIndex}, ocilocal.ErrInvalidArgument},
		"another size":  {ocispec.Descriptor{Digest: a.Digest(), Size: 1}, ocilocal.ErrInvalidArgument},
		"invalid UTF-8": {ocispec.Descriptor{Digest: a.Digest(), Annotations: map[string]string{"k": "\xff"}}, ocilocal.ErrInvalidArgument},
	} {
		if _, err := b.AddManifest(t.Context(), c.desc); err == nil {
			t.Errorf("%s is added", what)
		} else {
			mustFail(t, err, c.err)
		}
	}
	addManifest(t, b, *descOf(a))
	if _, err := r.Remove(t.Context(), a.Reference()); err != nil {
		t.Fatal(err)
	}
	collect(t, r, atOnce)
	_, err := b.Build(t.Context())
	mustFail(t, err, ocilocal.ErrIncomplete)
	checkNoRefs(t, r)
	published(t, r, "example.com/index:v1", "in the way", nil)
	published(t, r, "example.com/a:v1", "one", nil)
	_, err = b.Build(t.Context())
	mustFail(t, err, ocilocal.ErrConflict)
	if b.Update().Outcome != ocilocal.Conflicted {
		t.Errorf("%+v", b.Update())
	}
	_, err = r.NewIndexBuilder(ocilocal.Reference{}, nil)
	mustFail(t, err, ocilocal.ErrInvalidReference)
	_, err = r.NewIndexBuilder(ref("example.com/a@"+a.Digest().String()), nil)
	mustFail(t, err, ocilocal.ErrInvalidReference)
	_, err = r.NewIndexBuilder(ref("example.com/a:v2"), &ocilocal.IndexBuilderOptions{ArtifactType: "none"})
	mustFail(t, err, ocilocal.ErrInvalidArgument)

	// As deep as an import takes it, and no deeper.
	last, err := r.Resolve(t.Context(), ref("example.com/a:v1"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range ocilocal.MaxIndexNesting + 1 {
		b := indexBuilder(t, r, fmt.Sprintf("example.com/nested:v%d", i), nil)
		addManifest(t, b, last)
		x, err := b.Build(t.Context())
		if i == ocilocal.MaxIndexNesting {
			mustFail(t, err, ocilocal.ErrTooLarge)
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last = x.Descriptor()
	}
	if _, err := r.Backup(t.Context(), t.TempDir()+"/backup", nil); err != nil {
		t.Error(err)
	}
}
