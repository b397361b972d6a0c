package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"iter"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// artifactForm is for tests that count blobs: artifact manifests have no config.
var artifactForm = &ocilocal.Options{Format: ocilocal.FormatArtifactManifest}

func openTemp(t testing.TB, opts *ocilocal.Options) *ocilocal.LocalRegistry {
	t.Helper()
	r, err := ocilocal.Open(context.Background(), t.TempDir(), opts)
	if err != nil {
		t.Fatal(err)
	}
	closed := watchRoot(t, r.Root())
	t.Cleanup(func() {
		defer closed()
		if err := r.Close(); err != nil && !errors.Is(err, ocilocal.ErrClosed) {
			t.Error(err)
		}
	})
	return r
}

// build publishes an artifact with one layer for each text.
func build(t testing.TB, r *ocilocal.LocalRegistry, ref string, opts *ocilocal.BuilderOptions, texts ...string) (*ocilocal.LocalArtifact, error) {
	t.Helper()
	ctx := context.Background()
	if opts == nil {
		opts = &ocilocal.BuilderOptions{}
	}
	if opts.ArtifactType == "" {
		opts.ArtifactType = "application/vnd.example.test"
	}
	b, err := r.NewBuilder(ocilocal.MustParseReference(ref), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	for _, s := range texts {
		if _, err := b.AddLayer(ctx, "text/plain", strings.NewReader(s), nil); err != nil {
			t.Fatal(err)
		}
	}
	return b.Build(ctx)
}

func TestBuildReadBack(t *testing.T) {
	ctx := context.Background()
	r := openTemp(t, nil)
	for _, format := range []ocilocal.ManifestFormat{ocilocal.FormatArtifactManifest, ocilocal.FormatImageManifest} {
		ref := "example.com/a/b:" + strings.ReplaceAll(format.String(), " ", "-")
		a, err := build(t, r, ref, &ocilocal.BuilderOptions{Format: format}, "one", "", "three", "one")
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.Load(ctx, ocilocal.MustParseReference(ref))
		if err != nil {
			t.Fatal(err)
		}
		if got.Digest() != a.Digest() || got.ArtifactType() != "application/vnd.example.test" {
			t.Fatalf("loaded %s of type %q, built %s", got.Digest(), got.ArtifactType(), a.Digest())
		}
		m1, _ := a.Manifest(ctx)
		m2, err := got.Manifest(ctx)
		if err != nil || !bytes.Equal(m1.Bytes(), m2.Bytes()) {
			t.Fatalf("manifest %s, %v; built %s", m2.Bytes(), err, m1.Bytes())
		}
		layers, err := got.Layers(ctx)
		if err != nil || len(layers) != 4 {
			t.Fatal(layers, err)
		}
		for i, want := range []string{"one", "", "three", "one"} {
			if b, err := got.ReadLayer(ctx, layers[i]); err != nil || string(b) != want {
				t.Fatalf("layer %d: %q, %v", i, b, err)
			}
		}
	}
}

func TestBuildPolicies(t *testing.T) {
	ctx := context.Background()
	r := openTemp(t, nil)
	const ref = "example.com/a:v1"
	first, err := build(t, r, ref, nil, "one")
	if err != nil {
		t.Fatal(err)
	}
	_, err = build(t, r, ref, nil, "two")
	conflict, ok := errors.AsType[*ocilocal.ConflictError](err)
	if !ok || !errors.Is(err, ocilocal.ErrConflict) || conflict.Existing != first.Digest() {
		t.Fatalf("second build: %v", err)
	}
	if _, err := r.ResolveDigest(ctx, conflict.Incoming); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the loser's manifest is visible: %v", err)
	}
	same, err := build(t, r, ref, nil, "one")
	if err != nil || same.Digest() != first.Digest() {
		t.Fatal(same, err)
	}
	var o ocilocal.BuilderOptions
	o.Policy = ocilocal.Replace
	second, err := build(t, r, ref, &o, "two")
	if err != nil {
		t.Fatal(err)
	}
	o.Policy, o.Expected = ocilocal.KeepExisting, first.Digest()
	if _, err = build(t, r, ref, &o, "three"); !errors.Is(err, ocilocal.ErrConflict) {
		t.Fatalf("stale compare-and-swap: %v", err)
	}
	u, err := r.Tag(ctx, first.Digest(), ocilocal.MustParseReference(ref), &ocilocal.PublishOptions{Expected: second.Digest()})
	if err != nil || u.Outcome != ocilocal.Replaced || u.Existing != second.Digest() {
		t.Fatal(u, err)
	}
	removed, err := r.Remove(ctx, ocilocal.MustParseReference(ref))
	if err != nil || removed.Descriptor.Digest != first.Digest() {
		t.Fatal(removed, err)
	}
	if ok, err := r.Exists(ctx, ocilocal.MustParseReference(ref)); ok || err != nil {
		t.Fatal(ok, err)
	}
	if u, err := r.Tag(ctx, removed.Descriptor.Digest, removed.Reference, nil); err != nil || u.Outcome != ocilocal.Inserted {
		t.Fatal(u, err)
	}
}

// firstError returns the first error of a listing.
func firstError[T any](list iter.Seq2[T, error]) error {
	for _, err := range list {
		if err != nil {
			return err
		}
	}
	return nil
}

// TestAddExistingLayer adds a layer of one artifact to another. The layer stays when the first
// artifact is collected.
func TestAddExistingLayer(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	old, err := build(t, r, "example.com/a:v1", nil, "one")
	if err != nil {
		t.Fatal(err)
	}
	layers, err := old.Layers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	layers[0].Annotations = map[string]string{"k": "v"}
	b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/a:v2"), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	for range 2 {
		if err := b.AddExistingLayer(ctx, layers[0]); err != nil {
			t.Fatal(err)
		}
	}
	longer := layers[0]
	longer.Size++
	if err := b.AddExistingLayer(ctx, longer); !errors.Is(err, ocilocal.ErrSizeMismatch) {
		t.Errorf("a layer with two sizes: %v", err)
	}
	absent := ocispec.Descriptor{MediaType: "text/plain", Digest: digest.FromString("absent"), Size: 6}
	if err := b.AddExistingLayer(ctx, absent); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("a layer that isn't here: %v", err)
	}
	if _, err := r.Remove(ctx, old.Reference()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	a, err := b.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := a.Layers(ctx)
	if err != nil || len(got) != 2 || got[0].Annotations["k"] != "v" || got[0].MediaType != "text/plain" {
		t.Fatalf("%+v, %v", got, err)
	}
	if text, err := a.ReadLayer(ctx, got[0]); err != nil || string(text) != "one" {
		t.Errorf("%q, %v", text, err)
	}
	if err := b.AddExistingLayer(ctx, got[0]); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("after Build: %v", err)
	}
}

// TestDirectoryForFile: a directory is refused as a layer and as an archive.
func TestDirectoryForFile(t *testing.T) {
	r := openTemp(t, nil)
	b, err := r.NewBuilder(ref("example.com/a:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if _, err := b.AddLayerFile(t.Context(), "text/plain", t.TempDir(), nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("layer: %v", err)
	}
	if _, err := r.ImportArchiveFile(t.Context(), t.TempDir(), nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("archive: %v", err)
	}
}

// TestBuildDefault: builders make image manifests, with the empty config {} and a media type in the
// document, unless a registry or a builder chooses the other form.
func TestBuildDefault(t *testing.T) {
	image, artifact := ocispec.MediaTypeImageManifest, ocilocal.MediaTypeArtifactManifest
	for _, c := range []struct {
		registry, builder ocilocal.ManifestFormat
		want              string
	}{
		{ocilocal.FormatDefault, ocilocal.FormatDefault, image},
		{ocilocal.FormatDefault, ocilocal.FormatArtifactManifest, artifact},
		{ocilocal.FormatArtifactManifest, ocilocal.FormatDefault, artifact},
		{ocilocal.FormatArtifactManifest, ocilocal.FormatImageManifest, image},
		{ocilocal.FormatImageManifest, ocilocal.FormatDefault, image},
	} {
		r := openTemp(t, &ocilocal.Options{Format: c.registry})
		for _, start := range []func(ocilocal.Reference, *ocilocal.BuilderOptions) (*ocilocal.Builder, error){r.NewBuilder, r.NewOMMXBuilder} {
			b, err := start(ref("example.com/a:v1"), &ocilocal.BuilderOptions{
				ArtifactType: testType, Format: c.builder, PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte("layer"), nil); err != nil {
				t.Fatal(err)
			}
			a, err := b.Build(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m, err := a.Manifest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if m.ArtifactType() != testType || !bytes.Contains(m.Bytes(), []byte(`"mediaType":"`+c.want+`"`)) {
				t.Errorf("%v, %v: %s", c.registry, c.builder, m.Bytes())
			}
			config, ok := m.Config()
			if ok != (c.want == image) || ok && config.Digest != ocilocal.EmptyJSON.Digest {
				t.Errorf("%v, %v: config %v", c.registry, c.builder, config)
			}
			if !ok {
				continue
			}
			if got, err := r.OpenBlob(t.Context(), config); err != nil {
				t.Error(err)
			} else {
				got.Close()
			}
		}
	}
}
