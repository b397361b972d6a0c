package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func parsed(t *testing.T, a *ocilocal.LocalArtifact) *ocilocal.Manifest {
	t.Helper()
	m, err := a.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestConvert converts artifacts to the other form and back.
func TestConvert(t *testing.T) {
	ctx := t.Context()
	const other = "application/vnd.example.other"
	for _, c := range []struct {
		name   string
		format ocilocal.ManifestFormat
		layers []string
	}{
		{"artifact", ocilocal.FormatArtifactManifest, []string{"one", "two", "one"}},
		{"image", ocilocal.FormatImageManifest, []string{"one", "two", "one"}},
		{"artifact without layers", ocilocal.FormatArtifactManifest, nil},
		{"image without layers", ocilocal.FormatImageManifest, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := openTemp(t, nil)
			first := child(t, r, "example.com/a:v0", ocilocal.BuilderOptions{}, nil, nil, "before")
			src := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{Format: c.format, ArtifactType: other}, descOf(first),
				map[string]string{"<key>": "& value\u2028", "empty": ""}, c.layers...)
			before := tree(t, r.Root()+"/blobs")
			there, err := r.Convert(ctx, src.Reference(), ref("example.com/b:v1"), nil)
			if err != nil {
				t.Fatal(err)
			}
			if there.Source.Digest != src.Digest() || there.Update.Outcome != ocilocal.Inserted || there.Update.Descriptor.Digest != there.Artifact.Digest() || there.DroppedConfig.Digest != "" {
				t.Errorf("%+v", there)
			}
			from, to := parsed(t, src), parsed(t, there.Artifact)
			want := map[string]string{ocilocal.MediaTypeArtifactManifest: ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageManifest: ocilocal.MediaTypeArtifactManifest}
			if to.MediaType() != want[from.MediaType()] || to.ArtifactType() != other || to.Digest() == from.Digest() {
				t.Errorf("%s of type %s", to.MediaType(), to.ArtifactType())
			}
			if !maps.Equal(to.Annotations(), from.Annotations()) {
				t.Errorf("annotations %v, want %v", to.Annotations(), from.Annotations())
			}
			if len(c.layers) > 0 && !reflect.DeepEqual(to.Layers(), from.Layers()) {
				t.Errorf("layers %v, want %v", to.Layers(), from.Layers())
			}
			a, _ := from.Subject()
			if b, ok := to.Subject(); !ok || !reflect.DeepEqual(a, b) {
				t.Errorf("subject %v, want %v", b, a)
			}
			if config, ok := to.Config(); ok != (c.format == ocilocal.FormatArtifactManifest) || ok && config.MediaType != ocispec.MediaTypeEmptyJSON {
				t.Errorf("config %v", config)
			}
			// The source has not changed.
			if got, err := r.Resolve(ctx, src.Reference()); err != nil || got.Digest != src.Digest() {
				t.Error(got, err)
			}
			after := tree(t, r.Root()+"/blobs")
			for name, b := range before {
				if after[name] != b {
					t.Errorf("%s has changed", name)
				}
			}
			back, err := r.Convert(ctx, ref("example.com/b:v1"), ref("example.com/c:v1"), nil)
			if err != nil {
				t.Fatal(err)
			}
			if back.Artifact.Digest() != src.Digest() {
				t.Errorf("back: %s, want %s", back.Artifact.Digest(), src.Digest())
			}
			again, err := r.Convert(ctx, src.Reference(), ref("example.com/b:v1"), nil)
			if err != nil || again.Update.Outcome != ocilocal.Unchanged || again.Artifact.Digest() != there.Artifact.Digest() {
				t.Errorf("%+v %v", again, err)
			}
			for p, err := range r.Verify(ctx, nil) {
				t.Error(p, err)
			}
			checkNoTmp(t, r)
		})
	}
}

// checkNoTmp fails when a call has left a staged file.
func checkNoTmp(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	for name := range tree(t, filepath.Join(r.Root(), "tmp")) {
		if filepath.Base(name) != "lock" {
			t.Errorf("left in tmp/: %s", name)
		}
	}
}

func TestConvertSubject(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	first := child(t, r, "example.com/a:v0", ocilocal.BuilderOptions{}, nil, nil, "before")
	src := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, descOf(first), nil, "layer")
	for i, c := range []struct {
		opts *ocilocal.ConvertOptions
		want digest.Digest
	}{
		{nil, first.Digest()},
		{&ocilocal.ConvertOptions{}, first.Digest()},
		{&ocilocal.ConvertOptions{Subject: ocilocal.SubjectSource}, src.Digest()},
		{&ocilocal.ConvertOptions{Subject: ocilocal.SubjectNone}, ""},
	} {
		got, err := r.Convert(ctx, src.Reference(), ref(fmt.Sprintf("example.com/b:v%d", i)), c.opts)
		if err != nil {
			t.Fatal(err)
		}
		subject, ok := parsed(t, got.Artifact).Subject()
		if ok != (c.want != "") || subject.Digest != c.want {
			t.Errorf("%d: subject %v, want %s", i, subject, c.want)
		}
		parent, err := got.Artifact.Parent(ctx)
		if err != nil || (parent != nil) != ok || ok && parent.Digest() != c.want {
			t.Errorf("%d: %v %v", i, parent, err)
		}
	}
	// As its subject, the source outlives its ref.
	for _, name := range []string{"a:v0", "a:v1", "b:v0", "b:v1", "b:v3"} {
		if _, err := r.Remove(ctx, ref("example.com/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	for _, a := range []*ocilocal.LocalArtifact{src, first} {
		if _, err := r.LoadDigest(ctx, a.Digest()); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.Convert(ctx, ref("example.com/b:v2"), ref("example.com/b:v9"), &ocilocal.ConvertOptions{Subject: 3}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Error(err)
	}
}

// TestConvertForeign converts artifacts of other tools, with configs, data fields, platforms and
// unknown fields.
func TestConvertForeign(t *testing.T) {
	ctx := t.Context()
	const full = `{"architecture":"amd64"}`
	layer := `{"mediaType":"text/plain","digest":"` + string(digest.FromString("layer")) + `","size":5,"data":"bGF5ZXI=",
		"urls":["https://example.com/layer"],"annotations":{"b":"2","a":"1"},"platform":{"os":"linux","architecture":"arm64"}}`
	for _, c := range []struct{ mediaType, head, configType, config, wantType string }{
		{ocilocal.MediaTypeDockerManifest, ``, "application/vnd.docker.container.image.v1+json", full, "application/vnd.docker.container.image.v1+json"},
		{imageType, `"unknown":[1],"annotations":{},`, "application/vnd.example.config", full, "application/vnd.example.config"},
		{imageType, `"artifactType":"application/vnd.example.type",`, "application/vnd.example.config", full, "application/vnd.example.type"},
		{imageType, `"artifactType":"application/vnd.example.type",`, "application/vnd.example.config", "{}", "application/vnd.example.type"},
	} {
		r := openTemp(t, nil)
		config := c.config
		manifest := `{` + c.head + `"schemaVersion":2,"mediaType":"` + c.mediaType + `","config":` + desc(c.configType, config) + `,"layers":[` + layer + `]}`
		if _, err := r.ImportArchive(ctx, bytes.NewReader(archiveOf(t, c.mediaType, manifest, config, "layer")), nil); err != nil {
			t.Fatal(err)
		}
		got, err := r.Convert(ctx, ref(newRef), ref("example.com/b:v1"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.DroppedConfig.Digest != digest.FromString(config) || got.Artifact.ArtifactType() != c.wantType || got.Artifact.MediaType() != ocilocal.MediaTypeArtifactManifest {
			t.Errorf("%+v", got)
		}
		want := `{"artifactType":"` + c.wantType + `","blobs":[{"annotations":{"a":"1","b":"2"},"digest":"` + string(digest.FromString("layer")) +
			`","mediaType":"text/plain","platform":{"architecture":"arm64","os":"linux"},"size":5,"urls":["https://example.com/layer"]}],"mediaType":"` + ocilocal.MediaTypeArtifactManifest + `"}`
		if b := parsed(t, got.Artifact).Bytes(); string(b) != want {
			t.Errorf("%s\nwant %s", b, want)
		}
		// The dropped config isn't held by the new artifact.
		if _, err := r.Remove(ctx, ref(newRef)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.HasBlob(ctx, digest.FromString(config)); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Error(err)
		}
		if b, err := got.Artifact.ReadLayer(ctx, ocispec.Descriptor{Digest: digest.FromString("layer")}); err != nil || string(b) != "layer" {
			t.Errorf("%q %v", b, err)
		}
	}
}

func TestConvertPolicies(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	src := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "layer")
	taken := child(t, r, "example.com/b:v1", ocilocal.BuilderOptions{}, nil, nil, "taken")
	dst := taken.Reference()
	convert := func(o ocilocal.PublishOptions) (*ocilocal.ConvertResult, error) {
		return r.Convert(ctx, src.Reference(), dst, &ocilocal.ConvertOptions{PublishOptions: o})
	}
	for _, o := range []ocilocal.PublishOptions{{}, {Policy: ocilocal.Replace, Expected: src.Digest()}} {
		got, err := convert(o)
		conflict, ok := errors.AsType[*ocilocal.ConflictError](err)
		if !ok || conflict.Existing != taken.Digest() || conflict.Expected != o.Expected {
			t.Fatalf("%+v %v", got, err)
		}
		if got == nil || got.Artifact != nil || got.Update.Outcome != ocilocal.Conflicted || got.Source.Digest != src.Digest() {
			t.Errorf("%+v", got)
		}
		if _, err := r.LoadDigest(ctx, conflict.Incoming); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("the loser is visible: %v", err)
		}
	}
	got, err := convert(ocilocal.PublishOptions{Expected: taken.Digest()})
	if err != nil || got.Update.Outcome != ocilocal.Replaced || got.Update.Existing != taken.Digest() {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := r.Tag(ctx, taken.Digest(), dst, &ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil {
		t.Fatal(err)
	}
	if got, err := convert(ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil || got.Update.Outcome != ocilocal.Replaced {
		t.Errorf("%+v %v", got, err)
	}
	checkNoTmp(t, r)
}

func TestConvertRefused(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	src := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "layer", "more")
	manifest, config := image("inner")
	index := imageIndex(imageType, manifest)
	if _, err := r.ImportArchive(ctx, bytes.NewReader(archiveOf(t, ocispec.MediaTypeImageIndex, index, manifest, config, "inner")), nil); err != nil {
		t.Fatal(err)
	}
	dst := ref("example.com/b:v1")
	byDigest, err := src.Reference().WithDigest(src.Digest())
	if err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	none := ocilocal.Reference{}
	for name, c := range map[string]struct {
		ctx      context.Context
		src, dst ocilocal.Reference
		want     error
	}{
		"no source":        {ctx, ref("example.com/a:v9"), dst, ocilocal.ErrNotFound},
		"zero source":      {ctx, none, dst, ocilocal.ErrInvalidReference},
		"zero target":      {ctx, src.Reference(), none, ocilocal.ErrInvalidReference},
		"itself":           {ctx, src.Reference(), src.Reference(), ocilocal.ErrInvalidArgument},
		"itself by digest": {ctx, byDigest, byDigest, ocilocal.ErrInvalidArgument},
		"pinned target":    {ctx, src.Reference(), ref("example.com/b:v1@" + manSHA), ocilocal.ErrDigestMismatch},
		"index":            {ctx, ref(newRef), dst, ocilocal.ErrUnsupportedMediaType},
		"cancelled":        {cancelled, src.Reference(), dst, context.Canceled},
	} {
		if got, err := r.Convert(c.ctx, c.src, c.dst, &ocilocal.ConvertOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}); got != nil || !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v, want %v", name, got, err, c.want)
		}
	}
	if ok, err := r.Exists(ctx, dst); ok || err != nil {
		t.Error(ok, err)
	}
	// A source is also found by its digest alone, and the target may say what it expects to become.
	got, err := r.Convert(ctx, byDigest, dst, nil)
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := dst.WithDigest(got.Artifact.Digest())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Convert(ctx, byDigest, pinned, nil); err != nil || got.Update.Outcome != ocilocal.Inserted {
		t.Errorf("%+v %v", got, err)
	}
	typed, err := ocilocal.Open(ctx, r.Root(), &ocilocal.Options{ArtifactTypes: []string{"application/vnd.example.none"}})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, typed)
	if _, err := typed.Convert(ctx, src.Reference(), ref("example.com/b:v2"), nil); !errors.Is(err, ocilocal.ErrArtifactType) {
		t.Error(err)
	}
	reader, err := ocilocal.OpenReadOnly(ctx, r.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, reader)
	if _, err := reader.Convert(ctx, src.Reference(), ref("example.com/b:v2"), nil); !errors.Is(err, ocilocal.ErrReadOnly) {
		t.Error(err)
	}
}

func TestConvertDamaged(t *testing.T) {
	ctx := t.Context()
	dst := ref("example.com/b:v1")
	flip := func(b []byte) []byte { b[0] ^= 1; return b }
	for _, c := range []struct {
		name, blob string // of the layer, or "" for the manifest
		damage     func([]byte) []byte
		want       []error
	}{
		{"layer missing", "layer", nil, []error{ocilocal.ErrIncomplete, ocilocal.ErrNotFound}},
		{"layer cut off", "layer", func(b []byte) []byte { return b[1:] }, []error{ocilocal.ErrIncomplete, ocilocal.ErrSizeMismatch}},
		{"layer flipped", "layer", flip, []error{ocilocal.ErrIncomplete, ocilocal.ErrDigestMismatch}},
		{"manifest missing", "", nil, []error{ocilocal.ErrNotFound}},
		{"manifest flipped", "", flip, []error{ocilocal.ErrDigestMismatch}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := openTemp(t, nil)
			src := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "layer", "more")
			d := src.Digest()
			if c.blob != "" {
				d = digest.FromString(c.blob)
			}
			name := filepath.Join(r.Root(), "blobs", "sha256", d.Encoded())
			b, err := os.ReadFile(name)
			if err == nil {
				err = os.Remove(name)
			}
			if err == nil && c.damage != nil {
				err = os.WriteFile(name, c.damage(b), 0o444)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.Convert(ctx, src.Reference(), dst, nil)
			for _, want := range c.want {
				if got != nil || !errors.Is(err, want) {
					t.Errorf("%+v, %v, want %v", got, err, want)
				}
			}
			if ok, err := r.Exists(ctx, dst); ok || err != nil {
				t.Error(ok, err)
			}
			checkNoTmp(t, r)
		})
	}
}

// TestConvertRace converts to the same refs by several handles, while another one collects.
func TestConvertRace(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	const handles, n = 4, 8
	var sources []*ocilocal.LocalArtifact
	for i := range handles {
		sources = append(sources, child(t, r, fmt.Sprintf("example.com/a:v%d", i), ocilocal.BuilderOptions{}, nil, nil, "shared", fmt.Sprint(i)))
	}
	var mu sync.Mutex
	outcomes := map[string][]ocilocal.Outcome{}
	var wg sync.WaitGroup
	for i := range handles {
		h := mustOpen(t, r.Root())
		wg.Go(func() {
			for k := range n {
				// All make the same, and each its own.
				for _, c := range []struct{ src, dst string }{
					{sources[0].Reference().String(), fmt.Sprintf("example.com/same:v%d", k)},
					{sources[i].Reference().String(), fmt.Sprintf("example.com/rival:v%d", k)},
				} {
					got, err := h.Convert(ctx, ref(c.src), ref(c.dst), nil)
					if err != nil && !errors.Is(err, ocilocal.ErrConflict) {
						t.Error(err)
						return
					}
					mu.Lock()
					outcomes[c.dst] = append(outcomes[c.dst], got.Update.Outcome)
					mu.Unlock()
				}
			}
		})
	}
	// A collector without grace, all the while.
	stop := make(chan struct{})
	var collector sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	wg.Wait()
	close(stop)
	collector.Wait()
	// A rival that lost inside the transaction has left its blob after the collector's last round.
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Error(err)
	}
	for dst, got := range outcomes {
		slices.Sort(got)
		want := []ocilocal.Outcome{ocilocal.Inserted, ocilocal.Unchanged, ocilocal.Unchanged, ocilocal.Unchanged}
		if strings.Contains(dst, "rival") {
			want = []ocilocal.Outcome{ocilocal.Inserted, ocilocal.Conflicted, ocilocal.Conflicted, ocilocal.Conflicted}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", dst, got, want)
		}
	}
	for p, err := range r.Verify(ctx, nil) {
		t.Error(p, err)
	}
}
