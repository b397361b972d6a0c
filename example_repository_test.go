package ocilocal_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// Raw content is put as over the distribution API: blobs first, and the manifest last.
func ExampleLocalRegistry_Repository() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	repository, err := registry.Repository("localhost/org/app")
	if err != nil {
		log.Fatal(err)
	}
	layer, err := repository.PutBlob(ctx, strings.NewReader("a layer"), "", -1) // digest and size unknown
	if err != nil {
		log.Fatal(err)
	}
	if _, err := repository.PutBlob(ctx, strings.NewReader("{}"), ocispec.DescriptorEmptyJSON.Digest, 2); err != nil {
		log.Fatal(err)
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"artifactType":"application/vnd.example.note",`+
		`"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},`+
		`"layers":[{"mediaType":"text/plain","digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageManifest, ocispec.DescriptorEmptyJSON.Digest, layer.Digest, layer.Size)
	update, err := repository.PutManifest(ctx, ocispec.MediaTypeImageManifest, manifest, &ocilocal.PutManifestOptions{Tag: "v1"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(update.Reference, update.Outcome)

	desc, err := repository.Resolve(ctx, "v1")
	if err != nil {
		log.Fatal(err)
	}
	rc, err := repository.Fetch(ctx, desc)
	if err != nil {
		log.Fatal(err)
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(bytes.Equal(got, manifest), desc.Digest == digest.FromBytes(manifest))
	// Output:
	// localhost/org/app:v1 inserted
	// true true
}

func ExampleLocalRegistry_NewIndexBuilder() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	index, err := registry.NewIndexBuilder(ocilocal.MustParseReference("example.com/note:v1"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer index.Cancel()
	for _, arch := range []string{"amd64", "arm64"} {
		desc := note(registry, "example.com/note:"+arch, "for "+arch).Descriptor()
		desc.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		if _, err := index.AddManifest(ctx, desc); err != nil {
			log.Fatal(err)
		}
	}
	artifact, err := index.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	manifest, err := artifact.Manifest(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, d := range manifest.Manifests() {
		fmt.Println(d.Platform.OS, d.Platform.Architecture)
	}
	// Output:
	// linux amd64
	// linux arm64
}
