package ocilocal_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// draft publishes a text without a name.
func draft(registry *ocilocal.LocalRegistry, text string) *ocilocal.LocalArtifact {
	builder, err := registry.NewAnonymousBuilder(&ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.note"})
	if err != nil {
		log.Fatal(err)
	}
	return finish(builder, text)
}

func ExampleLocalRegistry_NewAnonymousBuilder() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	artifact := draft(registry, "an intermediate result")

	fmt.Println(strings.HasPrefix(artifact.Reference().String(), registry.ID()+".ocilocal.local/anonymous:"))
	// An artifact that is worth a name gets one.
	update, err := registry.Tag(ctx, artifact.Digest(), ocilocal.MustParseReference("example.com/note:v1"), nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(update.Reference, update.Outcome)
	// Output:
	// true
	// example.com/note:v1 inserted
}

func ExampleLocalRegistry_PruneAnonymous() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	draft(registry, "one")
	draft(registry, "two")

	old, err := registry.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: time.Hour})
	fmt.Println(len(old), "older than an hour", err)
	all, err := registry.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace})
	fmt.Println(len(all), "in all", err)
	// The next collection deletes their bytes.
	// Output:
	// 0 older than an hour <nil>
	// 2 in all <nil>
}

func ExampleLocalRegistry_AnonymousRefs() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	texts := map[digest.Digest]string{}
	for _, text := range []string{"one", "two"} {
		texts[draft(registry, text).Digest()] = text
	}
	note(registry, "example.com/note:v1", "named")

	n := 0
	for ref, err := range registry.AnonymousRefs(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		if texts[ref.Descriptor.Digest] != "" && time.Since(ref.Updated) < time.Minute {
			n++
		}
	}
	fmt.Println(n)
	// Output: 2
}

// An import can give content without a name a generated one.
func ExampleImportOptions_anonymous() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	var archive bytes.Buffer
	if err := from.ExportArchive(ctx, &archive, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{a.Digest()}}); err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	result, err := to.ImportArchive(ctx, &archive, &ocilocal.ImportOptions{Anonymous: true})
	if err != nil {
		log.Fatal(err)
	}
	update := result.Artifacts[0].Update
	fmt.Println(update.Outcome, update.Reference.Repository(), update.Reference.Registry() == to.ID()+".ocilocal.local")
	// Output: inserted anonymous true
}
