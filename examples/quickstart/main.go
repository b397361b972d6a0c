// Quickstart builds an artifact, lists it, reads it back, saves it to an archive
// and imports that into a second registry. Given the path of an OCI archive,
// such as an .ommx file, it imports that instead and reads every layer of all that the registry has.
// With -root it uses, and keeps, the registry in that directory. With -serve it serves that instead:
// the names below the host that -host says.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/ocilocal/ocilocal"
)

func main() {
	log.SetFlags(0)
	root := flag.String("root", "", "registry to use and keep (default: a temporary one)")
	address := flag.String("serve", "", "serve the registry at an address such as 127.0.0.1:5000, and do nothing else")
	host := flag.String("host", "localhost", "with -serve: serve the names below this host")
	flag.Parse()
	dir, err := os.MkdirTemp("", "ocilocal-quickstart-")
	if err != nil {
		log.Fatal(err)
	}
	if *root == "" {
		*root = filepath.Join(dir, "registry")
	}
	err = run(context.Background(), dir, *root, *address, *host, flag.Args())
	if rm := os.RemoveAll(dir); err == nil {
		err = rm
	}
	if err != nil {
		log.Fatal(err)
	}
}

// run keeps the archive and the second registry in dir, which is temporary.
func run(ctx context.Context, dir, root, address, host string, args []string) error {
	registry, err := ocilocal.Open(ctx, root, nil)
	if err != nil {
		return err
	}
	defer registry.Close()
	fmt.Printf("registry %s\n", registry.Root())
	if address != "" { // to oras, crane, docker and any other client
		fmt.Printf("serving  %s/… at %s\n", host, address)
		return http.ListenAndServe(address, registry.Handler(&ocilocal.HandlerOptions{Host: host}))
	}
	if len(args) > 0 {
		result, err := registry.ImportArchiveFile(ctx, args[0], nil)
		if err != nil {
			return err
		}
		fmt.Printf("imported %s: %d blobs, %d bytes\n", filepath.Base(args[0]), result.BlobsWritten, result.BytesWritten)
		for _, artifact := range result.Artifacts {
			if artifact.Update.Reference.IsZero() { // ImportOptions.Reference would give it one
				fmt.Printf("no ref   %s: it has no full name, so it stays by its digest only until it is collected\n", artifact.Descriptor.Digest)
			}
		}
		return show(ctx, registry)
	}

	ref, err := ocilocal.ParseReference("ghcr.io/example/diet:v1")
	if err != nil {
		return err
	}
	builder, err := registry.NewOMMXBuilder(ref, nil)
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
	if err := registry.ExportArchiveFile(ctx, archive, []ocilocal.Reference{ref}, nil); err != nil {
		return err
	}
	fmt.Printf("saved    %s\n", archive)

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

// show lists a registry and reads every layer, which verifies it, and prints it if it is short.
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
			fmt.Printf("layer    %s  %d bytes", layer.MediaType, layer.Size)
			if layer.Size <= 100 {
				text, err := artifact.ReadLayer(ctx, layer)
				if err != nil {
					return err
				}
				fmt.Printf(": %q\n", text)
				continue
			}
			src, err := artifact.OpenLayer(ctx, layer)
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, src)
			src.Close()
			if err != nil {
				return err
			}
			fmt.Printf(", verified\n")
		}
	}
	return nil
}
