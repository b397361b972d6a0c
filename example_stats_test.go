package ocilocal_test

import (
	"context"
	"fmt"
	"log"

	"github.com/ocilocal/ocilocal"
)

func ExampleLocalRegistry_Stats() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/kept:v1", "one")
	note(registry, "example.com/old:v1", "two")
	if _, err := registry.Remove(ctx, ocilocal.MustParseReference("example.com/old:v1")); err != nil {
		log.Fatal(err)
	}
	stats, err := registry.Stats(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(stats.Refs, "ref,", stats.Total.Manifests, "manifests,", stats.Orphans.Manifests, "of them an orphan")
	// Output: 1 ref, 2 manifests, 1 of them an orphan
}

func ExampleLocalRegistry_RepositoryUsage() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/first:v1", "shared")
	note(registry, "example.com/second:v1", "shared")
	note(registry, "example.com/second:v2", "another")
	for name, err := range registry.Repositories(ctx, nil) {
		if err != nil {
			log.Fatal(err)
		}
		usage, err := registry.RepositoryUsage(ctx, name)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(name, "refs:", usage.Refs, "own blobs:", usage.Own.Blobs, "shared blobs:", usage.Shared.Blobs)
	}
	// Output:
	// example.com/first refs: 1 own blobs: 0 shared blobs: 2
	// example.com/second refs: 2 own blobs: 1 shared blobs: 2
}

func ExampleLocalRegistry_RefUsage() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	a := note(registry, "example.com/first:v1", "shared")
	note(registry, "example.com/first:v2", "another")
	if _, err := registry.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/second:v1"), nil); err != nil {
		log.Fatal(err)
	}
	for ref, err := range registry.Refs(ctx, nil) {
		if err != nil {
			log.Fatal(err)
		}
		usage, err := registry.RefUsage(ctx, ref.Reference)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(ref.Reference, "own blobs:", usage.Own.Blobs, "shared blobs:", usage.Shared.Blobs)
	}
	// Output:
	// example.com/first:v1 own blobs: 0 shared blobs: 2
	// example.com/first:v2 own blobs: 1 shared blobs: 1
	// example.com/second:v1 own blobs: 0 shared blobs: 2
}
