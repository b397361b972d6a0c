package ocilocal_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestImportCounts imports an archive with more blobs than a stage syncs at once, twice. The first
// import counts all blobs as written, the second one as reused.
func TestImportCounts(t *testing.T) {
	t.Parallel()
	const layers = 100
	from, to := openTemp(t, nil), openTemp(t, nil)
	name := ref("example.com/many:v1")
	b, err := from.NewBuilder(name, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range layers {
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", fmt.Appendf(nil, "layer %d", i), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := from.ExportArchive(t.Context(), &archive, []ocilocal.Reference{name}, nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct{ written, reused int }{{layers + 2, 0}, {0, layers + 2}} {
		got, err := to.ImportArchive(t.Context(), bytes.NewReader(archive.Bytes()), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.BlobsWritten != want.written || got.BlobsReused != want.reused || (got.BytesWritten == 0) != (want.written == 0) {
			t.Errorf("%d written (%d bytes), %d reused, want %d and %d", got.BlobsWritten, got.BytesWritten, got.BlobsReused, want.written, want.reused)
		}
	}
}
