package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// gzipBomb is an entry that says 100 GiB, with 65 MiB of zeros in 66 KiB of gzip members.
func gzipBomb(t testing.TB) []byte {
	t.Helper()
	var tarHead bytes.Buffer
	tw := tar.NewWriter(&tarHead)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: 100 << 30}); err != nil {
		t.Fatal(err)
	}
	return append(gzipped(tarHead.Bytes()), bytes.Repeat(gzipped(make([]byte, 1<<20)), 64+1)...)
}

// TestGzipOfZeros has a layer that shrinks as far as deflate can: it comes in as it went out.
func TestGzipOfZeros(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	from, to := openTemp(t, nil), openTemp(t, nil)
	name := ocilocal.MustParseReference("example.com/zeros:v1")
	b, err := from.NewBuilder(name, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddLayer(ctx, "application/vnd.numpy", io.LimitReader(endlessZeros{}, 80<<20), nil); err != nil {
		t.Fatal(err)
	}
	a, err := b.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := from.ExportArchive(ctx, &out, []ocilocal.Reference{name}, &ocilocal.ExportOptions{Gzip: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := to.ImportArchive(ctx, bytes.NewReader(out.Bytes()), nil); err != nil {
		t.Fatal(err)
	}
	if desc, err := to.Resolve(ctx, name); err != nil || desc.Digest != a.Digest() {
		t.Error(err)
	}
}

// TestArchiveTail imports archives that the stream goes on behind.
func TestArchiveTail(t *testing.T) {
	manifest, config := image("layer")
	src := tarOf(t, blobEntry(config), blobEntry("layer"), blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1"))
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := io.Copy(w, io.MultiReader(bytes.NewReader(src), io.LimitReader(endlessZeros{}, 20<<20))); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		src  io.Reader
		want error
	}{
		"tar":  {io.MultiReader(bytes.NewReader(src), endlessZeros{}), nil},
		"gzip": {&z, ocilocal.ErrTooLarge}, // its checksum can't be had
	} {
		if _, err := openTemp(t, nil).ImportArchive(t.Context(), c.src, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
