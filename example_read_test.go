package ocilocal_test

import (
	"context"
	"fmt"
	"io"
	"log"

	"github.com/ocilocal/ocilocal"
)

func ExampleLocalRegistry_Resolve() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	ref := note(registry, "example.com/note:v1", "one").Reference()

	desc, err := registry.Resolve(ctx, ref) // now; the ref may be moved later
	if err != nil {
		log.Fatal(err)
	}
	again, err := registry.ResolveDigest(ctx, desc.Digest) // the same for ever
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(again.Digest == desc.Digest, again.ArtifactType)
	// Output: true application/vnd.example.note
}

// All blobs, whether a ref needs them or not, and the bytes of one.
func ExampleLocalRegistry_Blobs() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	artifact := note(registry, "example.com/note:v1", "hello")

	for desc, err := range registry.Blobs(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		if desc.Digest == artifact.Digest() || desc.Size == 2 {
			continue // the manifest, and the empty config {}
		}
		blob, err := registry.OpenBlob(ctx, desc)
		if err != nil {
			log.Fatal(err)
		}
		text, err := io.ReadAll(blob) // verified as it is read
		if err := blob.Close(); err != nil {
			log.Fatal(err)
		}
		size, _ := registry.HasBlob(ctx, desc.Digest)
		fmt.Printf("%s %d %v\n", text, size, err)
	}
	// Output: hello 5 <nil>
}

func ExampleLocalArtifact_LayersByAnnotation() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	builder, err := registry.NewBuilder(ocilocal.MustParseReference("example.com/set:v1"),
		&ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.set"})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	for _, split := range []string{"train", "test"} {
		if _, err := builder.AddLayerBytes(ctx, "text/csv", []byte("rows to "+split), map[string]string{"com.example.split": split}); err != nil {
			log.Fatal(err)
		}
	}
	artifact, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}

	layers, err := artifact.LayersByAnnotation(ctx, "com.example.split", "test")
	if err != nil {
		log.Fatal(err)
	}
	text, err := artifact.ReadLayer(ctx, layers[0])
	fmt.Println(len(layers), string(text), err)
	// Output: 1 rows to test <nil>
}

// The tags of one repository.
func ExampleListOptions_name() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	for _, s := range []string{"example.com/a:v1", "example.com/a:v2", "example.com/a/b:v1"} {
		note(registry, s, s)
	}

	for ref, err := range registry.Refs(ctx, &ocilocal.ListOptions{Name: "example.com/a"}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(ref.Reference.Tag())
	}
	// Output:
	// v1
	// v2
}

// A digest finds an artifact that no ref names any more, until a collection deletes it.
func ExampleLocalRegistry_LoadDigest() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	a := note(registry, "example.com/note:v1", "one")
	if _, err := registry.Remove(ctx, a.Reference()); err != nil {
		log.Fatal(err)
	}
	found, err := registry.LoadDigest(ctx, a.Digest())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(found.Digest() == a.Digest(), found.Reference().IsZero())
	// Output: true true
}
