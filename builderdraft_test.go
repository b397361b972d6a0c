package ocilocal_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestBuilderRefuses: a part that a manifest cannot have is refused when it is given, and not by
// each Build after that.
func TestBuilderRefuses(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/a:v1")
	for _, artifactType := range []string{"model", "a/", "/b", "a b/c", "a/b/c", "application/vnd.example; v=1", "a/" + strings.Repeat("b", 128), "-a/b"} {
		if _, err := r.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: artifactType}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
			t.Errorf("artifact type %q: %v", artifactType, err)
		}
	}
	b, err := r.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: "Application/vnd.a-b_c+json.1!#$&^", Format: ocilocal.FormatImageManifest})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	good := ocispec.Descriptor{MediaType: "a/b", Digest: digest.FromString("x"), Size: 1}
	for name, spoil := range map[string]func(*ocispec.Descriptor){
		"no media type":          func(d *ocispec.Descriptor) { d.MediaType = "" },
		"media type with ESC":    func(d *ocispec.Descriptor) { d.MediaType = "a/\x1b" },
		"no digest":              func(d *ocispec.Descriptor) { d.Digest = "" },
		"weak digest":            func(d *ocispec.Descriptor) { d.Digest = "md5:9dd4e461268c8034f5c8564e155c67a6" },
		"negative size":          func(d *ocispec.Descriptor) { d.Size = -1 },
		"size no JSON has":       func(d *ocispec.Descriptor) { d.Size = 1 << 53 },
		"data of another size":   func(d *ocispec.Descriptor) { d.Data = []byte("xy") },
		"data of another digest": func(d *ocispec.Descriptor) { d.Data = []byte("y") },
		"annotation not UTF-8":   func(d *ocispec.Descriptor) { d.Annotations = map[string]string{"k": "\xff"} },
		"artifact type":          func(d *ocispec.Descriptor) { d.ArtifactType = "\n" },
	} {
		d := good
		spoil(&d)
		if err := b.SetSubject(d); !errors.Is(err, ocilocal.ErrInvalidManifest) {
			t.Errorf("subject with %s: %v", name, err)
		}
		if err := b.AddExistingLayer(ctx, d); !errors.Is(err, ocilocal.ErrInvalidArgument) {
			t.Errorf("existing layer with %s: %v", name, err)
		}
	}
	if _, err := b.AddLayerBytes(ctx, "text", nil, nil); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("layer: %v", err)
	}
	if _, err := b.AddLayerBytes(ctx, "text/plain", nil, map[string]string{"k": "\xff"}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("layer with annotation: %v", err)
	}
	if _, err := b.SetConfig(ctx, "json", []byte("{}")); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("config: %v", err)
	}
	if err := b.SetSubject(good); err != nil {
		t.Error(err)
	}
	if _, err := b.Build(ctx); err != nil {
		t.Errorf("after all of that: %v", err)
	}
}
