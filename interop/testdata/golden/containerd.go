// This program exports an image with containerd's own exporter, as `ctr images export` and `nerdctl
// save` do, from a layout directory: all of an index, and the index with one platform's content only.
package main

import (
	"context"
	_ "crypto/sha256"
	"encoding/json"
	"log"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	layout, dir, name := os.Args[1], os.Args[2], os.Args[3]
	ctx := context.Background()
	tmp, err := os.MkdirTemp("", "containerd")
	check(err)
	defer os.RemoveAll(tmp)
	store, err := local.NewStore(tmp)
	check(err)
	blobs, err := filepath.Glob(filepath.Join(layout, "blobs", "*", "*"))
	check(err)
	for _, blob := range blobs {
		f, err := os.Open(blob)
		check(err)
		fi, err := f.Stat()
		check(err)
		check(content.WriteBlob(ctx, store, filepath.Base(blob), f, ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(blob)), Size: fi.Size()}))
		f.Close()
	}
	raw, err := os.ReadFile(filepath.Join(layout, "index.json"))
	check(err)
	var index ocispec.Index
	check(json.Unmarshal(raw, &index))
	for _, m := range index.Manifests {
		if m.Annotations[ocispec.AnnotationRefName] != "multi" {
			continue
		}
		desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size}
		for file, opts := range map[string][]archive.ExportOpt{
			"containerd.tar":          {archive.WithManifest(desc, name), archive.WithAllPlatforms()},
			"containerd-platform.tar": {archive.WithManifest(desc, name), archive.WithPlatform(platforms.OnlyStrict(platforms.MustParse("linux/arm64")))},
		} {
			f, err := os.Create(filepath.Join(dir, file))
			check(err)
			check(archive.Export(ctx, store, f, opts...))
			check(f.Close())
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
