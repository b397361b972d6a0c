package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// gzipBomb is a gzipped tar with an entry of 100 GiB, of which 65 MiB of zeros follow in 66 KiB.
func gzipBomb(t testing.TB) []byte {
	t.Helper()
	var tarHead bytes.Buffer
	tw := tar.NewWriter(&tarHead)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: 100 << 30}); err != nil {
		t.Fatal(err)
	}
	return append(gzipped(tarHead.Bytes()), bytes.Repeat(gzipped(make([]byte, 1<<20)), 64+1)...)
}

// TestGzipOfZeros exports and imports a layer that deflate compresses as far as it can. The limit
// on gzip bombs must not refuse it.
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

// TestArchiveTail imports archives from streams that have more bytes after the end of the tar.
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
		"gzip": {&z, ocilocal.ErrTooLarge}, // its checksum is never reached
	} {
		if _, err := openTemp(t, nil).ImportArchive(t.Context(), c.src, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// virtualTar is a tar with one huge blob of zeros that are not in memory.
type virtualTar struct {
	head, tail []byte
	size       int64 // of the blob between them
	read       int64 // bytes that were read
}

func (v *virtualTar) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	tail := int64(len(v.head)) + v.size
	if off >= tail+int64(len(v.tail)) {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), tail+int64(len(v.tail))-off)]
	if off < int64(len(v.head)) {
		copy(p, v.head[off:])
	}
	if end := off + int64(len(p)); end > tail {
		at := max(off, tail)
		copy(p[at-off:], v.tail[at-tail:])
	}
	v.read += int64(len(p))
	return len(p), nil
}

// TestInspectSeeks: an inspection of a plain tar that can seek reads the headers and index.json,
// but not the blobs.
func TestInspectSeeks(t *testing.T) {
	const size = 2 << 30
	var head, tail bytes.Buffer
	tw := tar.NewWriter(&head)
	blob := "blobs/sha256/" + digest.FromString("huge").Encoded()
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: blob, Size: size, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	manifest, _ := image("layer")
	for _, e := range []entry{layoutVersion, blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1")} {
		tail.Write(oneEntry(t, e))
	}
	tail.Write(make([]byte, 1024))
	v := &virtualTar{head: head.Bytes(), tail: tail.Bytes(), size: size}
	all := int64(head.Len()+tail.Len()) + size
	in, err := ocilocal.InspectArchive(t.Context(), io.NewSectionReader(v, 0, all))
	if err != nil || len(in.Entries) != 1 || in.Blobs != 2 || in.Bytes != size+int64(len(manifest)) {
		t.Fatalf("%+v, %v", in, err)
	}
	if v.read > 1<<20 {
		t.Errorf("read %d bytes of %d", v.read, all)
	}
	// A source that ends within the blob is damaged, though the blob is not read.
	_, err = ocilocal.InspectArchive(t.Context(), io.NewSectionReader(v, 0, int64(head.Len())+size/2))
	mustFail(t, err, ocilocal.ErrInvalidLayout)
}

// oneEntry returns one entry of a tar, without the end of the archive.
func oneEntry(t *testing.T, e entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: e.name, Size: int64(len(e.body)), Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tw, e.body); err != nil {
		t.Fatal(err)
	}
	if err := tw.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
