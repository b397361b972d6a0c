// Quickstart builds an artifact, lists it, reads it back, saves it to an archive
// and imports that into a second registry. Given the path of an OCI archive,
// such as an .ommx file, it imports that instead and reads every layer.
// With -root it uses, and keeps, the registry in that directory.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/ocilocal/ocilocal"
)

func main() {
	log.SetFlags(0)
	root := flag.String("root", "", "registry to use and keep (default: a temporary one)")
	flag.Parse()
	dir, err := os.MkdirTemp("", "ocilocal-quickstart-")
	if err != nil {
		log.Fatal(err)
	}
	if *root == "" {
		*root = filepath.Join(dir, "registry")
	}
	err = run(context.Background(), dir, *root, flag.Args())
	if rm := os.RemoveAll(dir); err == nil {
		err = rm
	}
	if err != nil {
		log.Fatal(err)
	}
}

// run keeps the archive and the second registry in dir, which is temporary.
func run(ctx context.Context, dir, root string, args []string) error {
	registry, err := ocilocal.Open(ctx, root, nil)
	if err != nil {
		return err
	}
	defer registry.Close()
	if len(args) > 0 {
		result, err := registry.ImportArchiveFile(ctx, args[0], nil)
		if err != nil {
			return err
		}
		fmt.Printf("imported %s: %d blobs, %d bytes\n", filepath.Base(args[0]), result.BlobsWritten, result.BytesWritten)
		return show(ctx, registry)
	}

	ref, err := ocilocal.ParseReference("ghcr.io/example/diet:v1")
	if err != nil {
		return err
	}
	builder, err := registry.NewOMMXBuilder(ref, &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest})
	if err != nil {
		return err
	}
	defer builder.Cancel()
	_, err = builder.AddLayer(ctx, "application/json", strings.NewReader(`{"minimize":"3x + 2y"}`),
		map[string]string{"org.opencontainers.image.title": "diet.json"})
	if err != nil {
		return err
	}
	built, err := builder.Build(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("built    %s\n         %s\n", built.Reference(), built.Digest())
	if err := show(ctx, registry); err != nil {
		return err
	}

	archive := filepath.Join(dir, "diet.ommx")
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := registry.ExportArchive(ctx, f, []ocilocal.Reference{ref}, nil); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	fmt.Printf("saved    %s\n", filepath.Base(archive))

	second, err := ocilocal.Open(ctx, filepath.Join(dir, "second"), nil)
	if err != nil {
		return err
	}
	defer second.Close()
	if _, err := second.ImportArchiveFile(ctx, archive, nil); err != nil {
		return err
	}
	again, err := second.Load(ctx, ref)
	if err != nil {
		return err
	}
	if again.Digest() != built.Digest() {
		return fmt.Errorf("the round trip changed the digest to %s", again.Digest())
	}
	fmt.Printf("imported into a second registry: same digest\n")
	return nil
}

// show lists a registry and reads every layer, which verifies it.
func show(ctx context.Context, registry *ocilocal.LocalRegistry) error {
	for ref, err := range registry.Refs(ctx, nil) {
		if err != nil {
			return err
		}
		fmt.Printf("ref      %s\n         %s  %s\n", ref.Reference, ref.Descriptor.Digest, ref.Descriptor.ArtifactType)
		artifact, err := registry.Load(ctx, ref.Reference)
		if err != nil {
			return err
		}
		layers, err := artifact.Layers(ctx)
		if err != nil {
			return err
		}
		for _, layer := range layers {
			src, err := artifact.OpenLayer(ctx, layer)
			if err != nil {
				return err
			}
			n, err := io.Copy(io.Discard, src)
			src.Close()
			if err != nil {
				return err
			}
			fmt.Printf("layer    %s  %d bytes, verified\n", layer.MediaType, n)
		}
	}
	return nil
}
