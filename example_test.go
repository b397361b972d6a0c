package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/ocilocal/ocilocal"
)

// scratch opens a registry in a directory that done removes. Real programs
// pass a lasting directory, such as the one of DefaultRoot.
func scratch() (registry *ocilocal.LocalRegistry, done func()) {
	dir, err := os.MkdirTemp("", "ocilocal-example-")
	if err != nil {
		log.Fatal(err)
	}
	registry, err = ocilocal.Open(context.Background(), filepath.Join(dir, "registry"), nil)
	if err != nil {
		log.Fatal(err)
	}
	return registry, func() {
		if err := errors.Join(registry.Close(), os.RemoveAll(dir)); err != nil {
			log.Fatal(err)
		}
	}
}

// note publishes a text as an artifact.
func note(registry *ocilocal.LocalRegistry, ref, text string) *ocilocal.LocalArtifact {
	builder, err := registry.NewBuilder(ocilocal.MustParseReference(ref),
		&ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.note"})
	if err != nil {
		log.Fatal(err)
	}
	return finish(builder, text)
}

// finish adds a text as a layer, and publishes.
func finish(builder *ocilocal.Builder, text string) *ocilocal.LocalArtifact {
	ctx := context.Background()
	defer builder.Cancel()
	if _, err := builder.AddLayerBytes(ctx, "text/plain", []byte(text), nil); err != nil {
		log.Fatal(err)
	}
	artifact, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	return artifact
}

func ExampleOpenReadOnly() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/note:v1", "one")

	reader, err := ocilocal.OpenReadOnly(ctx, registry.Root(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer reader.Close()
	ok, err := reader.Exists(ctx, ocilocal.MustParseReference("example.com/note:v1"))
	fmt.Println(ok, err)
	_, err = reader.Remove(ctx, ocilocal.MustParseReference("example.com/note:v1"))
	fmt.Println(errors.Is(err, ocilocal.ErrReadOnly))
	// Output:
	// true <nil>
	// true
}

// An artifact with a config, an annotation and a layer that has a file's name.
func ExampleLocalRegistry_NewBuilder() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()

	builder, err := registry.NewBuilder(ocilocal.MustParseReference("example.com/model:v1"), &ocilocal.BuilderOptions{
		ArtifactType: "application/vnd.example.model",
	})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	if _, err := builder.SetConfig(ctx, "application/vnd.example.config+json", []byte(`{"layers":3}`)); err != nil {
		log.Fatal(err)
	}
	if err := builder.SetAnnotation("com.example.trained-on", "mice"); err != nil {
		log.Fatal(err)
	}
	if _, err := builder.AddLayerBytes(ctx, "application/octet-stream", []byte{1, 2, 3},
		map[string]string{"org.opencontainers.image.title": "weights.bin"}); err != nil {
		log.Fatal(err)
	}
	artifact, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(artifact.MediaType())
	fmt.Println(artifact.Digest())
	// Output:
	// application/vnd.oci.image.manifest.v1+json
	// sha256:57e7cc94d3b76f7acd550d5e8d7965cfcd14f5700a44bff65112aa1b4d25cc38
}

func ExampleBuilder_AddLayerFile() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	file := filepath.Join(registry.Root(), "..", "data.csv")
	if err := os.WriteFile(file, []byte("a,b\n1,2\n"), 0o600); err != nil {
		log.Fatal(err)
	}

	builder, err := registry.NewBuilder(ocilocal.MustParseReference("example.com/data:v1"),
		&ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.data"})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	layer, err := builder.AddLayerFile(ctx, "text/csv", file, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(layer.Annotations["org.opencontainers.image.title"], layer.Size)
	// Output: data.csv 8
}

func ExampleLocalRegistry_NewOMMXBuilder() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()

	builder, err := registry.NewOMMXBuilder(ocilocal.MustParseReference("example.com/lp:v1"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	if _, err := builder.AddLayerBytes(ctx, ocilocal.MediaTypeOMMXInstance, []byte("protobuf"), nil); err != nil {
		log.Fatal(err)
	}
	artifact, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	instances, err := artifact.LayersByMediaType(ctx, ocilocal.MediaTypeOMMXInstance)
	fmt.Println(artifact.ArtifactType(), len(instances), err)
	// Output: application/org.ommx.v1.artifact 1 <nil>
}

func ExampleLocalRegistry_NewGitHubBuilder() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()

	builder, err := registry.NewGitHubBuilder("Example", "Repo", "Model", "v1",
		&ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.model"})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	artifact, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	annotations, err := artifact.Annotations(ctx)
	fmt.Println(artifact.Reference(), annotations["org.opencontainers.image.source"], err)
	// Output: ghcr.io/example/repo/model:v1 https://github.com/Example/Repo <nil>
}

// Pages: the last reference of one page begins the next.
func ExampleLocalRegistry_Refs() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	for _, s := range []string{"example.com/a/x:v1", "example.com/a/x:v2", "example.com/a/y:v1", "example.com/b:v1"} {
		note(registry, s, s)
	}

	page := &ocilocal.ListOptions{Prefix: "example.com/a/", Limit: 2}
	for {
		n := 0
		for ref, err := range registry.Refs(ctx, page) {
			if err != nil {
				log.Fatal(err)
			}
			fmt.Println(ref.Reference)
			page.After = ref.Reference
			n++
		}
		if n < page.Limit {
			break
		}
		fmt.Println("--")
	}
	// Output:
	// example.com/a/x:v1
	// example.com/a/x:v2
	// --
	// example.com/a/y:v1
}

func ExampleLocalRegistry_Remove() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/note:v1", "one")

	removed, err := registry.Remove(ctx, ocilocal.MustParseReference("example.com/note:v1"))
	if err != nil {
		log.Fatal(err)
	}
	// Until it is collected, what was removed can be put back.
	update, err := registry.Tag(ctx, removed.Descriptor.Digest, removed.Reference, nil)
	fmt.Println(update.Outcome, err)
	// Output: inserted <nil>
}

// Tag moves a ref only if nobody else has moved it meanwhile.
func ExampleLocalRegistry_Tag() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	v1, v2 := note(registry, "example.com/note:v1", "one"), note(registry, "example.com/note:v2", "two")
	latest := ocilocal.MustParseReference("example.com/note:latest")

	update, err := registry.Tag(ctx, v1.Digest(), latest, nil)
	fmt.Println(update.Outcome, err)
	update, err = registry.Tag(ctx, v2.Digest(), latest, &ocilocal.PublishOptions{Expected: v1.Digest()})
	fmt.Println(update.Outcome, err)
	update, err = registry.Tag(ctx, v1.Digest(), latest, nil)
	conflict, ok := errors.AsType[*ocilocal.ConflictError](err)
	fmt.Println(update.Outcome, ok && conflict.Existing == v2.Digest())
	// Output:
	// inserted <nil>
	// replaced <nil>
	// conflicted true
}

func ExampleLocalRegistry_OpenBlobFile() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	layers, err := note(registry, "example.com/note:v1", "0123456789").Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}

	blob, err := registry.OpenBlobFile(ctx, layers[0])
	if err != nil {
		log.Fatal(err)
	}
	defer blob.Close()
	part, err := io.ReadAll(io.NewSectionReader(blob, 3, 4))
	fmt.Println(string(part), err)
	// Output: 3456 <nil>
}

func ExampleLocalRegistry_ExportArchive() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	to, doneTo := scratch()
	defer doneTo()
	artifact := note(from, "example.com/note:v1", "one")

	var archive bytes.Buffer // usually a file, or a connection
	if err := from.ExportArchive(ctx, &archive, []ocilocal.Reference{artifact.Reference()}, nil); err != nil {
		log.Fatal(err)
	}
	result, err := to.ImportArchive(ctx, &archive, nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, a := range result.Artifacts {
		fmt.Println(a.Update.Reference, a.Update.Outcome, a.Descriptor.Digest == artifact.Digest())
	}
	// Output: example.com/note:v1 inserted true
}

// An artifact without a full name gets one.
func ExampleLocalRegistry_ImportArchive() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	to, doneTo := scratch()
	defer doneTo()
	var archive bytes.Buffer
	if err := from.ExportArchive(ctx, &archive, []ocilocal.Reference{note(from, "example.com/note:v1", "one").Reference()}, nil); err != nil {
		log.Fatal(err)
	}

	result, err := to.ImportArchive(ctx, &archive, &ocilocal.ImportOptions{
		Reference: ocilocal.MustParseReference("example.org/mirror/note:v1"),
		Rename:    true,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Artifacts[0].Name, "→", result.Artifacts[0].Update.Reference)
	// Output: example.com/note:v1 → example.org/mirror/note:v1
}

func ExampleOpen() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "ocilocal-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	// Opening creates the registry; a second handle sees the same one.
	first, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer first.Close()
	second, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer second.Close()
	fmt.Println(first.ID() == second.ID())
	// Output: true
}

func ExampleDefaultRoot() {
	old, set := os.LookupEnv("OCILOCAL_ROOT")
	defer func() {
		if os.Unsetenv("OCILOCAL_ROOT"); set {
			os.Setenv("OCILOCAL_ROOT", old)
		}
	}()
	os.Setenv("OCILOCAL_ROOT", "/srv/artifacts")

	dir, err := ocilocal.DefaultRoot()
	fmt.Println(dir, err)
	// Output: /srv/artifacts <nil>
}

// By default a publish keeps an existing ref. Replace moves it.
func ExampleConflictError() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	old := note(registry, "example.com/note:v1", "one")

	builder, err := registry.NewBuilder(old.Reference(), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.note"})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	_, err = builder.Build(ctx)
	if conflict, ok := errors.AsType[*ocilocal.ConflictError](err); ok {
		fmt.Println(conflict.Reference, conflict.Existing == old.Digest())
	}

	replacer, err := registry.NewBuilder(old.Reference(), &ocilocal.BuilderOptions{
		ArtifactType:   "application/vnd.example.note",
		PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer replacer.Cancel()
	_, err = replacer.Build(ctx)
	fmt.Println(replacer.Update().Outcome, err)
	// Output:
	// example.com/note:v1 true
	// replaced <nil>
}

func ExampleLocalArtifact_OpenLayer() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/note:v1", "one")

	artifact, err := registry.Load(ctx, ocilocal.MustParseReference("example.com/note:v1"))
	if err != nil {
		log.Fatal(err)
	}
	layers, err := artifact.Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}
	layer, err := artifact.OpenLayer(ctx, layers[0])
	if err != nil {
		log.Fatal(err)
	}
	defer layer.Close()
	text, err := io.ReadAll(layer) // verified on the way
	fmt.Println(string(text), err)
	// Output: one <nil>
}

// The next version of an artifact has the layers of the previous one, and one more. Nothing is copied.
func ExampleBuilder_AddExistingLayer() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	v1 := note(registry, "example.com/note:v1", "one")

	builder, err := registry.NewBuilder(ocilocal.MustParseReference("example.com/note:v2"),
		&ocilocal.BuilderOptions{ArtifactType: v1.ArtifactType()})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	layers, err := v1.Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, layer := range layers {
		if err := builder.AddExistingLayer(ctx, layer); err != nil {
			log.Fatal(err)
		}
	}
	if _, err := builder.AddLayerBytes(ctx, "text/plain", []byte("two"), nil); err != nil {
		log.Fatal(err)
	}
	v2, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	layers, err = v2.Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, layer := range layers {
		text, err := v2.ReadLayer(ctx, layer)
		fmt.Println(string(text), err)
	}
	// Output:
	// one <nil>
	// two <nil>
}
