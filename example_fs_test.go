package ocilocal_test

import (
	"context"
	"fmt"
	"io/fs"
	"log"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// The layers of an artifact are files under their titles, also for [http.FileServerFS] or [template.ParseFS].
func ExampleLocalArtifact_FS() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	builder, err := registry.NewBuilder(ocilocal.MustParseReference("example.com/site:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.site"})
	if err != nil {
		log.Fatal(err)
	}
	defer builder.Cancel()
	for title, text := range map[string]string{"index.html": "<h1>Hello</h1>", "css/main.css": "h1 { color: green }"} {
		annotations := map[string]string{ocispec.AnnotationTitle: title}
		if _, err := builder.AddLayerBytes(ctx, "text/plain", []byte(text), annotations); err != nil {
			log.Fatal(err)
		}
	}
	site, err := builder.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	files, err := site.FS(ctx)
	if err != nil {
		log.Fatal(err)
	}
	css, err := fs.ReadFile(files, "css/main.css")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(css))
	// The whole registry is a tree too: a reference is the path of its artifact.
	matches, err := fs.Glob(registry.FS(ctx), "example.com/*/*.html")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(matches)
	// Output:
	// h1 { color: green }
	// [example.com/site:v1/index.html]
}
