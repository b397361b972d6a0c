// This program makes a registry with the schema version that the package writes: see testdata/README.md
// and interop/golden. Its arguments are the root and the layout directory that seed.py writes.
package main

import (
	"context"
	"log"
	"os"

	"github.com/ocilocal/ocilocal"
)

func main() {
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, os.Args[1], nil)
	check(err)
	build := func(ref string, format ocilocal.ManifestFormat, subject *ocilocal.LocalArtifact, layers ...string) *ocilocal.LocalArtifact {
		b, err := r.NewBuilder(ocilocal.MustParseReference(ref), &ocilocal.BuilderOptions{
			ArtifactType: "application/vnd.example.demo", Format: format,
			PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace},
		})
		check(err)
		check(b.SetAnnotation("com.example.label", ref))
		if subject != nil {
			check(b.SetSubject(subject.Descriptor()))
		}
		for _, l := range layers {
			_, err := b.AddLayerBytes(ctx, "text/plain", []byte(l), map[string]string{"org.opencontainers.image.title": l + ".txt"})
			check(err)
		}
		a, err := b.Build(ctx)
		check(err)
		return a
	}
	old := build("example.com/golden/artifact:v1", ocilocal.FormatArtifactManifest, nil, "one", "two")
	build("example.com/golden/artifact:v1", ocilocal.FormatArtifactManifest, nil, "one", "three") // the first is garbage now
	build("example.com/golden/child:v1", ocilocal.FormatImageManifest, old, "two")                // but this needs it as its subject
	image := build("localhost:5000/golden/image:V1", ocilocal.FormatImageManifest, nil, "one")
	_, err = r.Tag(ctx, image.Digest(), ocilocal.MustParseReference("example.com/golden/tagged:sha256__0"), nil)
	check(err)
	build("example.com/golden/removed:v1", ocilocal.FormatImageManifest, nil, "four")
	_, err = r.Remove(ctx, ocilocal.MustParseReference("example.com/golden/removed:v1"))
	check(err)
	_, err = r.ImportLayout(ctx, os.Args[2], &ocilocal.ImportOptions{Select: "multi",
		Reference: ocilocal.MustParseReference("example.com/golden/multi:v1"), Rename: true})
	check(err)
	check(r.Close())
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
