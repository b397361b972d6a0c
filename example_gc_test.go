package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/ocilocal/ocilocal"
)

func ExampleLocalRegistry_GC() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/kept:v1", "one")
	note(registry, "example.com/old:v1", "two")
	if _, err := registry.Remove(ctx, ocilocal.MustParseReference("example.com/old:v1")); err != nil {
		log.Fatal(err)
	}
	opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace} // usually the default, a day
	dry, err := registry.GCReport(ctx, opts)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("would delete", dry.Orphans.Manifests, "manifest and", dry.Orphans.Blobs, "blob")
	report, err := registry.GC(ctx, opts)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("deleted", report.Deleted == dry.Orphans)
	// Output:
	// would delete 1 manifest and 1 blob
	// deleted true
}

func ExampleLocalRegistry_Verify() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "example.com/note:v1", "one")
	problems := 0
	for problem, err := range registry.Verify(ctx, nil) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(problem)
		problems++
	}
	fmt.Println(problems, "problems")
	// Output: 0 problems
}

// Verify finds a damaged blob, and Repair heals it from an archive.
func ExampleLocalRegistry_Repair() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	a := note(registry, "example.com/note:v1", "one")
	archive := filepath.Join(registry.Root(), "..", "note.tar")
	if err := registry.ExportArchiveFile(ctx, archive, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}
	layers, err := a.Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}
	blob := filepath.Join(registry.Root(), "blobs", "sha256", layers[0].Digest.Encoded())
	if err := errors.Join(os.Chmod(blob, 0o644), os.WriteFile(blob, []byte("two"), 0o644), os.Chmod(blob, 0o444)); err != nil {
		log.Fatal(err)
	}

	for problem, err := range registry.Verify(ctx, nil) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(problem.Kind, problem.Digest == layers[0].Digest)
	}
	report, err := registry.Repair(ctx, &ocilocal.RepairOptions{Sources: []string{archive}})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(report.Healed), "healed,", len(report.Left), "left")
	text, err := a.ReadLayer(ctx, layers[0])
	fmt.Println(string(text), err)
	// Output:
	// blob is damaged true
	// 1 healed, 0 left
	// one <nil>
}

// A backup is the state of a registry at one moment. Others may write meanwhile.
func ExampleLocalRegistry_Backup() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	dir, err := os.MkdirTemp("", "backup")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, text := range []string{"monday", "tuesday"} {
		note(registry, "example.com/note:"+text, text)
		report, err := registry.Backup(ctx, dir, nil)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("refs:", report.Refs, "copied:", report.BlobsCopied, "there already:", report.BlobsPresent)
	}
	backup, err := ocilocal.OpenReadOnly(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer backup.Close()
	exists, err := backup.Exists(ctx, ocilocal.MustParseReference("example.com/note:monday"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(exists)
	// Output:
	// refs: 1 copied: 3 there already: 0
	// refs: 2 copied: 2 there already: 3
	// true
}

// The index is lost, and the names with it. Rebuild makes a new index from the blobs.
func ExampleRebuild() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	dir := filepath.Join(registry.Root(), "..", "lost")
	lost, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	a := note(lost, "example.com/note:v1", "one")
	if err := errors.Join(lost.Close(), os.Remove(filepath.Join(dir, "index.sqlite3"))); err != nil {
		log.Fatal(err)
	}

	report, err := ocilocal.Rebuild(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	again, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer again.Close()
	for _, found := range report.Recovered {
		fmt.Println(found.Reference.Repository(), found.Descriptor.Digest == a.Digest())
		if _, err := again.Tag(ctx, found.Descriptor.Digest, a.Reference(), nil); err != nil {
			log.Fatal(err)
		}
		if _, err := again.Remove(ctx, found.Reference); err != nil {
			log.Fatal(err)
		}
	}
	// Output: recovered true
}
