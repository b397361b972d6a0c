package ocilocal_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/ocilocal/ocilocal"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// A registry is made, an artifact built into it, and its one layer read back.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "ocilocal-example-") // usually the directory of ocilocal.DefaultRoot
	check(err)
	defer os.RemoveAll(dir)

	registry, err := ocilocal.Open(ctx, dir, nil) // creates it if it does not exist
	check(err)
	defer registry.Close()

	ref := ocilocal.MustParseReference("ghcr.io/example/greeting:v1")
	builder, err := registry.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.greeting"})
	check(err)
	defer builder.Cancel()
	_, err = builder.AddLayer(ctx, "text/plain", strings.NewReader("hello"), nil)
	check(err)
	_, err = builder.Build(ctx) // from here on it is visible, and survives a power cut
	check(err)

	artifact, err := registry.Load(ctx, ref)
	check(err)
	layers, err := artifact.Layers(ctx)
	check(err)
	text, err := artifact.ReadLayer(ctx, layers[0]) // verified
	check(err)
	fmt.Printf("%s: %s\n", artifact.Reference(), text)
	// Output: ghcr.io/example/greeting:v1: hello
}
