package ocilocal_test

import (
	"bytes"
	"context"
	"fmt"
	"log"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// revise publishes a text that has another artifact as its subject.
func revise(registry *ocilocal.LocalRegistry, ref, text string, subject ocispec.Descriptor) *ocilocal.LocalArtifact {
	builder, err := registry.NewBuilder(ocilocal.MustParseReference(ref),
		&ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.note"})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	if err := builder.SetSubject(subject); err != nil {
		log.Fatal(err)
	}
	if err := builder.SetAnnotation("com.example.text", text); err != nil {
		log.Fatal(err)
	}
	return finish(builder, text)
}

func ExampleLocalArtifact_History() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	names := map[digest.Digest]string{}
	v1 := note(registry, "example.com/note:v1", "draft")
	v2 := revise(registry, "example.com/note:v2", "second", v1.Descriptor())
	v3 := revise(registry, "example.com/note:v3", "final", v2.Descriptor())
	for _, a := range []*ocilocal.LocalArtifact{v1, v2, v3} {
		names[a.Digest()] = a.Reference().Tag()
	}

	for artifact, err := range v3.History(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(names[artifact.Digest()])
	}
	// Output:
	// v3
	// v2
	// v1
}

func ExampleLocalArtifact_Parent() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	v1 := note(registry, "example.com/note:v1", "draft")
	v2 := revise(registry, "example.com/note:v2", "final", v1.Descriptor())

	parent, err := v2.Parent(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(parent.Digest() == v1.Digest())
	parent, err = v1.Parent(ctx)
	fmt.Println(parent == nil, err)
	// Output:
	// true
	// true <nil>
}

func ExampleLocalArtifact_Diff() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	v1 := note(registry, "example.com/note:v1", "draft")
	v2 := revise(registry, "example.com/note:v2", "final", v1.Descriptor())

	diff, err := v1.Diff(ctx, v2)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(diff.Kept), "kept,", len(diff.Removed), "removed,", len(diff.Added), "added")
	for _, a := range diff.Annotations {
		fmt.Printf("%s: %q → %q\n", a.Key, a.Old, a.New)
	}
	// Output:
	// 0 kept, 1 removed, 1 added
	// com.example.text: "" → "final"
}

func ExampleLocalRegistry_Referrers() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	app := note(registry, "example.com/app:v1", "app")
	revise(registry, "example.com/app:review", "looks good", app.Descriptor())

	for desc, err := range registry.Referrers(ctx, app.Digest(), nil) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(desc.ArtifactType, desc.Annotations["com.example.text"])
	}
	// Output: application/vnd.example.note looks good
}

// A review travels with its subject.
func ExampleImportOptions_referrers() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	app := note(from, "example.com/app:v1", "app")
	revise(from, "example.com/app:review", "looks good", app.Descriptor())
	var archive bytes.Buffer
	err := from.ExportArchive(ctx, &archive, []ocilocal.Reference{app.Reference()}, &ocilocal.ExportOptions{Referrers: true})
	if err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	result, err := to.ImportArchive(ctx, &archive, &ocilocal.ImportOptions{
		Select:    app.Reference().String(),
		Referrers: true,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Artifacts[0].Update.Reference, "and", len(result.Referrers), "referrer")
	// Output: example.com/app:v1 and 1 referrer
}
