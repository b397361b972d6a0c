package ocilocal_test

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestOtherAlgorithms imports and reads layers named by SHA-384 and SHA-512.
func TestOtherAlgorithms(t *testing.T) {
	ctx := t.Context()
	layers := map[digest.Digest]string{
		digest.NewDigestFromBytes(digest.SHA512, sum(sha512.Sum512([]byte("five")))):     "five",
		digest.NewDigestFromBytes(digest.SHA384, sum384(sha512.Sum384([]byte("three")))): "three",
		digest.FromString("two"): "two",
	}
	entries := []entry{blobEntry("{}")}
	var descs []string
	for d, body := range layers {
		entries = append(entries, entry{name: "blobs/" + d.Algorithm().String() + "/" + d.Encoded(), body: body})
		descs = append(descs, fmt.Sprintf(`{"mediaType":"text/plain","digest":%q,"size":%d}`, d, len(body)))
	}
	manifest := fmt.Sprintf(`{"schemaVersion":2,"artifactType":"application/vnd.example.test","config":%s,"layers":[%s]}`,
		desc("application/vnd.oci.empty.v1+json", "{}"), strings.Join(descs, ","))
	md := digest.NewDigestFromBytes(digest.SHA512, sum(sha512.Sum512([]byte(manifest))))
	entries = append(entries, entry{name: "blobs/sha512/" + md.Encoded(), body: manifest},
		entry{name: "index.json", body: fmt.Sprintf(
			`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":"example.com/a:v1"}}]}`,
			imageType, md, len(manifest))})
	r := openTemp(t, nil)
	result, err := r.ImportArchive(ctx, bytes.NewReader(tarOf(t, entries...)), nil)
	if err != nil || result.BlobsWritten != 5 {
		t.Fatal(result, err)
	}
	a, err := r.Load(ctx, ocilocal.MustParseReference("example.com/a:v1"))
	if err != nil || a.Digest() != md {
		t.Fatal(a, err)
	}
	for d, body := range layers {
		if b, err := a.ReadLayer(ctx, ocispec.Descriptor{Digest: d}); err != nil || string(b) != body {
			t.Errorf("%s: %q, %v", d, b, err)
		}
		rewrite(t, blobFile(r, d), flipBit)
		if b, err := a.ReadLayer(ctx, ocispec.Descriptor{Digest: d}); !errors.Is(err, ocilocal.ErrDigestMismatch) {
			t.Errorf("damaged %s: %q, %v", d, b, err)
		}
	}
}
