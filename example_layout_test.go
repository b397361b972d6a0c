package ocilocal_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/ocilocal/ocilocal"
)

func ExampleLocalRegistry_ExportLayout() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	dir := filepath.Join(from.Root(), "..", "layout")
	if err := from.ExportLayout(ctx, dir, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	inside, err := ocilocal.InspectLayout(ctx, dir)
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range inside.Entries {
		fmt.Println(e.Reference, e.Descriptor.Digest == a.Digest())
	}
	// Output: example.com/note:v1 true
}

func ExampleLocalRegistry_ImportLayout() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	dir := filepath.Join(from.Root(), "..", "layout")
	defer os.RemoveAll(dir)
	if err := from.ExportLayout(ctx, dir, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	result, err := to.ImportLayout(ctx, dir, &ocilocal.ImportOptions{
		Reference: ocilocal.MustParseReference("example.com/copy:v1"),
		Rename:    true,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Artifacts[0].Update.Reference, result.Artifacts[0].Update.Outcome, result.BlobsWritten, "blobs")
	// Output: example.com/copy:v1 inserted 3 blobs
}

func ExampleLocalRegistry_ExportArchiveFile() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	file := filepath.Join(from.Root(), "..", "note.tar.gz")
	defer os.Remove(file)
	if err := from.ExportArchiveFile(ctx, file, []ocilocal.Reference{a.Reference()}, &ocilocal.ExportOptions{Gzip: true}); err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	loaded, err := to.LoadPath(ctx, file, nil) // an archive or a layout directory
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(loaded.Reference(), loaded.Digest() == a.Digest())
	// Output: example.com/note:v1 true
}

func ExampleLocalRegistry_LoadPath() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	dir := filepath.Join(from.Root(), "..", "layout")
	if err := from.ExportLayout(ctx, dir, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	loaded, err := to.LoadPath(ctx, dir, nil) // an archive file would do as well
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(loaded.Reference(), loaded.Digest() == a.Digest())
	// Output: example.com/note:v1 true
}

func ExampleInspectLayout() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	dir := filepath.Join(from.Root(), "..", "layout")
	if err := from.ExportLayout(ctx, dir, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}
	inside, err := ocilocal.InspectLayout(ctx, dir)
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range inside.Entries {
		fmt.Println(e.Name, e.Descriptor.MediaType)
	}
	fmt.Println(inside.Blobs, "blobs")
	// Output:
	// example.com/note:v1 application/vnd.oci.image.manifest.v1+json
	// 3 blobs
}

// An archive can be inspected as a stream, here from a file.
func ExampleInspectArchive() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a := note(from, "example.com/note:v1", "one")
	name := filepath.Join(from.Root(), "..", "note.tar")
	if err := from.ExportArchiveFile(ctx, name, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}
	file, err := os.Open(name)
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	inside, err := ocilocal.InspectArchive(ctx, file)
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range inside.Entries {
		fmt.Println(e.Reference, e.Descriptor.Digest == a.Digest())
	}
	fmt.Println(inside.Blobs, "blobs")
	// Output:
	// example.com/note:v1 true
	// 3 blobs
}

// An import of several entries reports each conflict, and imports the others.
func ExampleLocalRegistry_ImportPath() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a, b := note(from, "example.com/a:v1", "one"), note(from, "example.com/b:v1", "two")
	dir := filepath.Join(from.Root(), "..", "layout")
	defer os.RemoveAll(dir)
	if err := from.ExportLayout(ctx, dir, []ocilocal.Reference{a.Reference(), b.Reference()}, nil); err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	note(to, "example.com/a:v1", "my own")
	result, err := to.ImportPath(ctx, dir, nil) // a layout directory or an archive
	if err != nil {
		log.Fatal(err)
	}
	for _, artifact := range result.Artifacts {
		fmt.Println(artifact.Update.Reference, artifact.Update.Outcome)
	}
	for _, kept := range result.Conflicts() {
		fmt.Println("kept:", kept.Reference)
	}
	// Output:
	// example.com/a:v1 conflicted
	// example.com/b:v1 inserted
	// kept: example.com/a:v1
}

func ExampleInspectPath() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	a := note(registry, "example.com/note:v1", "one")
	file := filepath.Join(registry.Root(), "..", "note.tar")
	defer os.Remove(file)
	if err := registry.ExportArchiveFile(ctx, file, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		log.Fatal(err)
	}

	inside, err := ocilocal.InspectPath(ctx, file) // or a layout directory
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range inside.Entries {
		fmt.Println(e.Reference, e.Descriptor.ArtifactType)
	}
	fmt.Println(inside.Blobs, "blobs")
	// Output:
	// example.com/note:v1 application/vnd.example.note
	// 3 blobs
}

// An OMMX v2 registry is a tree of layout directories, host/repository/__tag.
func ExampleLocalRegistry_ImportLegacy() {
	ctx := context.Background()
	from, doneFrom := scratch()
	defer doneFrom()
	old := ommxTree(from, ocilocal.MustParseReference("example.com/lp:v1"))

	registry, done := scratch()
	defer done()
	for range 2 {
		report, err := registry.ImportLegacy(ctx, old, nil)
		if err != nil {
			log.Fatal(err)
		}
		for _, f := range report.Failed {
			fmt.Println(f.Entry, f.Err)
		}
		fmt.Println(report.Imported, "imported,", report.Verified, "were here")
	}
	// Output:
	// 1 imported, 0 were here
	// 0 imported, 1 were here
}

// An import reads the registry of an OMMX v3 SDK in its place, and does not change it.
func ExampleLocalRegistry_ImportOMMX() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	root, err := ocilocal.DefaultLegacyRoot()
	if err != nil {
		log.Fatal(err)
	}
	report, err := registry.ImportOMMX(ctx, root, nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, f := range report.Failed {
		log.Print(f.Entry, ": ", f.Err)
	}
}

// Load imports an artifact that is not here yet from the tree of an OMMX v2 SDK, once.
func ExampleOptions_legacyRoot() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	ref := ocilocal.MustParseReference("example.com/lp:v1")
	old := ommxTree(from, ref) // ocilocal.DefaultLegacyRoot says where OMMX has it

	dir := filepath.Join(from.Root(), "..", "new")
	registry, err := ocilocal.Open(ctx, dir, &ocilocal.Options{LegacyRoot: old})
	if err != nil {
		log.Fatal(err)
	}
	defer registry.Close()
	before, err := registry.Exists(ctx, ref)
	if err != nil {
		log.Fatal(err)
	}
	a, err := registry.Load(ctx, ref)
	if err != nil {
		log.Fatal(err)
	}
	after, err := registry.Exists(ctx, ref)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(before, after, a.Reference())
	// Output: false true example.com/lp:v1
}

// ommxTree makes the tree that an OMMX v2 SDK keeps, with one artifact in it.
func ommxTree(from *ocilocal.LocalRegistry, ref ocilocal.Reference) (root string) {
	ctx := context.Background()
	builder, err := from.NewOMMXBuilder(ref, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	if _, err := builder.Build(ctx); err != nil {
		log.Fatal(err)
	}
	root = filepath.Join(from.Root(), "..", "ommx")
	parent := filepath.Join(root, filepath.FromSlash(ref.Name()))
	if err := os.MkdirAll(parent, 0o755); err != nil {
		log.Fatal(err)
	}
	if err := from.ExportLayout(ctx, filepath.Join(parent, "__"+ref.Tag()), []ocilocal.Reference{ref}, nil); err != nil {
		log.Fatal(err)
	}
	return root
}

// Several names, and one of them chosen.
func ExampleLocalRegistry_ImportArchiveFile() {
	ctx := context.Background()
	from, done := scratch()
	defer done()
	a, b := note(from, "example.com/a:v1", "one"), note(from, "example.com/b:v1", "two")
	file := filepath.Join(from.Root(), "..", "notes.tar")
	if err := from.ExportArchiveFile(ctx, file, []ocilocal.Reference{a.Reference(), b.Reference()}, nil); err != nil {
		log.Fatal(err)
	}

	to, doneTo := scratch()
	defer doneTo()
	result, err := to.ImportArchiveFile(ctx, file, &ocilocal.ImportOptions{Select: "example.com/b:v1"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Artifacts[0].Update.Reference, result.Artifacts[0].Update.Outcome)
	// Output: example.com/b:v1 inserted
}
