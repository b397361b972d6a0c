package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/ocilocal/ocilocal"
)

// A reader of artifact manifests gets one from an image manifest, which builders make.
func ExampleLocalRegistry_Convert() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	source := note(registry, "example.com/note:v1", "hello")

	result, err := registry.Convert(ctx, source.Reference(), ocilocal.MustParseReference("example.com/note:v1-artifact"), nil)
	if err != nil {
		log.Fatal(err)
	}
	layers, err := result.Artifact.Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}
	text, err := result.Artifact.ReadLayer(ctx, layers[0])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(source.MediaType())
	fmt.Println(result.Artifact.MediaType())
	fmt.Printf("%s: %s\n", result.Update.Outcome, text)
	// Output:
	// application/vnd.oci.image.manifest.v1+json
	// application/vnd.oci.artifact.manifest.v1+json
	// inserted: hello
}

// The new artifact can name its source as its subject.
func ExampleConvertOptions() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	source := note(registry, "example.com/note:v1", "hello")
	note(registry, "example.com/note:v2", "taken")

	_, err := registry.Convert(ctx, source.Reference(), ocilocal.MustParseReference("example.com/note:v2"),
		&ocilocal.ConvertOptions{Subject: ocilocal.SubjectSource})
	fmt.Println("taken:", errors.Is(err, ocilocal.ErrConflict))
	result, err := registry.Convert(ctx, source.Reference(), ocilocal.MustParseReference("example.com/note:v2"),
		&ocilocal.ConvertOptions{
			Subject:        ocilocal.SubjectSource,
			PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace},
		})
	if err != nil {
		log.Fatal(err)
	}
	parent, err := result.Artifact.Parent(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Update.Outcome, parent.Digest() == source.Digest())
	// Output:
	// taken: true
	// replaced true
}
