package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestImportArchive imports the same artifact from archives with their files in various orders.
// Each import keeps the three needed blobs, and a second one writes nothing.
func TestImportArchive(t *testing.T) {
	ctx := context.Background()
	manifest, config := image("layer")
	m, c, l := blobEntry(manifest), blobEntry(config), blobEntry("layer")
	idx := layoutIndex(manifest, "example.com/a:v1")
	layout := entry{name: "oci-layout", body: `{"imageLayoutVersion":"1.0.0"}`}
	dotted := func(e entry) entry { e.name = "./" + e.name; return e }
	for name, src := range map[string][]byte{
		"OMMX v2 order, no oci-layout": tarOf(t, c, l, m, idx),
		"index first":                  tarOf(t, layout, idx, m, c, l),
		"dotted, directories":          tarOf(t, entry{name: "./", head: tar.Header{Typeflag: tar.TypeDir}}, entry{name: "./blobs/", head: tar.Header{Typeflag: tar.TypeDir}}, dotted(idx), dotted(m), dotted(c), dotted(l)),
		"repeated blobs":               tarOf(t, c, l, c, m, idx, l),
		"unknown and unneeded":         tarOf(t, c, l, m, idx, entry{name: "README", body: "x"}, blobEntry("unneeded"), entry{name: "link", head: tar.Header{Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}}),
		"gzip":                         gzipped(tarOf(t, c, l, m, idx)),
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			got, err := r.ImportArchive(ctx, bytes.NewReader(src), nil)
			if err != nil {
				t.Fatal(err)
			}
			a := got.Artifacts[0]
			if len(got.Artifacts) != 1 || a.Descriptor.Digest != digest.FromString(manifest) || a.Update.Outcome != ocilocal.Inserted || got.BlobsWritten != 3 {
				t.Fatalf("%+v", got)
			}
			art, err := r.Load(ctx, ocilocal.MustParseReference("example.com/a:v1"))
			if err != nil {
				t.Fatal(err)
			}
			layers, err := art.Layers(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := art.ReadLayer(ctx, layers[0]); err != nil || string(b) != "layer" {
				t.Fatalf("%q, %v", b, err)
			}
			n := 0
			for _, err := range r.Blobs(ctx) {
				if err != nil {
					t.Fatal(err)
				}
				n++
			}
			if n != 3 {
				t.Errorf("%d blobs are kept, want 3", n)
			}
			again, err := r.ImportArchive(ctx, bytes.NewReader(src), nil)
			if err != nil || again.Artifacts[0].Update.Outcome != ocilocal.Unchanged || again.BlobsWritten != 0 || again.BlobsReused != 3 {
				t.Fatalf("second import: %+v, %v", again, err)
			}
		})
	}
}

// TestImportArchiveHostile imports archives that are damaged, unsafe or of another format. Each
// fails with its error, and leaves no ref, blob or temporary file.
func TestImportArchiveHostile(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	m, c, l := blobEntry(manifest), blobEntry(config), blobEntry("layer")
	idx := layoutIndex(manifest, "example.com/a:v1")
	whole := tarOf(t, c, l, m, idx)
	wrong := l
	wrong.body = "LAYER"
	link := func(name string, kind byte) entry {
		return entry{name: name, head: tar.Header{Typeflag: kind, Linkname: "/etc/passwd"}}
	}
	bad := func(e entry) []byte { return tarOf(t, e, c, l, m, idx) }
	z := gzipped(whole)
	crc := bytes.Clone(z)
	crc[len(crc)-5] ^= 1
	lying := strings.Replace(manifest, `"size":5`, `"size":6`, 1)
	huge := strings.Replace(manifest, `"size":5`, `"size":4611686018427387904`, 1)
	ambiguous := strings.Replace(manifest, `"layers"`, `"manifests":[],"layers"`, 1)
	for name, c := range map[string]struct {
		src  []byte
		want error
	}{
		"empty":               {nil, ocilocal.ErrInvalidLayout},
		"text":                {[]byte(strings.Repeat("not a tar ", 200)), ocilocal.ErrInvalidLayout},
		"cut":                 {whole[:len(whole)/2-100], ocilocal.ErrInvalidLayout},
		"no index":            {tarOf(t, c, l, m), ocilocal.ErrInvalidLayout},
		"one level deeper":    {tarOf(t, entry{name: "layout/index.json", body: idx.body}, c, l, m), ocilocal.ErrInvalidLayout},
		"index twice":         {tarOf(t, idx, idx, m, c, l), ocilocal.ErrInvalidLayout},
		"index is a link":     {tarOf(t, link("index.json", tar.TypeSymlink), m, c, l), ocilocal.ErrInvalidLayout},
		"missing layer":       {tarOf(t, c, m, idx), ocilocal.ErrIncomplete},
		"missing config":      {tarOf(t, l, m, idx), ocilocal.ErrIncomplete},
		"missing manifest":    {tarOf(t, c, l, idx), ocilocal.ErrIncomplete},
		"wrong bytes":         {tarOf(t, c, wrong, m, idx), ocilocal.ErrDigestMismatch},
		"second copy differs": {tarOf(t, c, l, wrong, m, idx), ocilocal.ErrDigestMismatch},
		"symlink blob":        {bad(link("blobs/sha256/"+strings.Repeat("0", 64), tar.TypeSymlink)), ocilocal.ErrInvalidLayout},
		"hard link blob":      {bad(link("blobs/sha256/"+strings.Repeat("0", 64), tar.TypeLink)), ocilocal.ErrInvalidLayout},
		"device blob":         {bad(link("blobs/sha256/"+strings.Repeat("0", 64), tar.TypeChar)), ocilocal.ErrInvalidLayout},
		"fifo blob":           {bad(link("blobs/sha256/"+strings.Repeat("0", 64), tar.TypeFifo)), ocilocal.ErrInvalidLayout},
		"traversal":           {bad(entry{name: "blobs/../index.json"}), ocilocal.ErrInvalidLayout},
		"absolute":            {bad(entry{name: "/index.json"}), ocilocal.ErrInvalidLayout},
		"absolute blob":       {bad(entry{name: "/" + c.name}), ocilocal.ErrInvalidLayout},
		"backslash":           {bad(entry{name: `blobs\sha256\` + strings.Repeat("0", 64)}), ocilocal.ErrInvalidLayout},
		"file with a slash":   {bad(entry{name: "index.json/", head: tar.Header{Typeflag: tar.TypeDir}}), ocilocal.ErrInvalidLayout},
		"blobs is a link":     {bad(link("blobs", tar.TypeSymlink)), ocilocal.ErrInvalidLayout},
		"blobs/sha256 is one": {bad(link("blobs/sha256", tar.TypeSymlink)), ocilocal.ErrInvalidLayout},
		"layout version":      {bad(entry{name: "oci-layout", body: `{"imageLayoutVersion":"2.0.0"}`}), ocilocal.ErrInvalidLayout},
		"layout no JSON":      {bad(entry{name: "oci-layout", body: `nope`}), ocilocal.ErrInvalidLayout},
		"layer size lies":     {tarOf(t, c, l, blobEntry(lying), layoutIndex(lying, "example.com/a:v1")), ocilocal.ErrSizeMismatch},
		"layer size 2^62":     {tarOf(t, c, l, blobEntry(huge), layoutIndex(huge, "example.com/a:v1")), ocilocal.ErrInvalidManifest},
		"ambiguous":           {tarOf(t, c, l, blobEntry(ambiguous), layoutIndex(ambiguous, "example.com/a:v1")), ocilocal.ErrInvalidManifest},
		"giant index":         {tarOf(t, entry{name: "index.json", body: strings.Repeat(" ", ocilocal.MaxLayoutIndexSize+1)}), ocilocal.ErrTooLarge},
		"docker save":         {tarOf(t, entry{name: "manifest.json", body: "[]"}, l), ocilocal.ErrUnsupportedMediaType},
		"zstd":                {[]byte("\x28\xb5\x2f\xfd......"), ocilocal.ErrUnsupportedMediaType},
		"xz":                  {[]byte("\xfd7zXZ\x00......"), ocilocal.ErrUnsupportedMediaType},
		"bzip2":               {[]byte("BZh91AY....."), ocilocal.ErrUnsupportedMediaType},
		"zip":                 {[]byte("PK\x03\x04....."), ocilocal.ErrUnsupportedMediaType},
		"lz4":                 {[]byte("\x04\x22\x4d\x18......"), ocilocal.ErrUnsupportedMediaType},
		"lzma":                {[]byte("\x5d\x00\x00\x80\x00\xff\xff"), ocilocal.ErrUnsupportedMediaType},
		"compress":            {[]byte("\x1f\x9d\x90......"), ocilocal.ErrUnsupportedMediaType},
		"JSON":                {[]byte(idx.body), ocilocal.ErrInvalidLayout},
		"gzip cut":            {z[:len(z)-20], ocilocal.ErrInvalidLayout},
		"gzip checksum":       {crc, ocilocal.ErrInvalidLayout},
		"gzip bomb":           {gzipBomb(t), ocilocal.ErrTooLarge},
		"index of an index":   {tarOf(t, entry{name: "index.json", body: `{"schemaVersion":2,"manifests":[{"mediaType":"text/plain","digest":"sha256:` + strings.Repeat("0", 64) + `","size":1}]}`}), ocilocal.ErrUnsupportedMediaType},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			r := openTemp(t, nil)
			got, err := r.ImportArchive(ctx, bytes.NewReader(c.src), nil)
			if !errors.Is(err, c.want) {
				t.Fatalf("%+v, error %v; want %v", got, err, c.want)
			}
			if errors.Is(err, ocilocal.ErrUnsupportedMediaType) && name != "index of an index" && !strings.Contains(err.Error(), name) {
				t.Errorf("%v: doesn't name the format %s", err, name)
			}
			if deeper := name == "one level deeper"; deeper != strings.Contains(err.Error(), "layout/index.json") {
				t.Errorf("%v: names layout/index.json, or should", err)
			}
			if notTar := name == "JSON" || name == "text"; notTar != strings.Contains(err.Error(), "may not be a tar") {
				t.Errorf("%v: says that the file may not be a tar, or should", err)
			}
			for ref, err := range r.Refs(ctx, nil) {
				t.Error("visible after a failed import:", ref, err)
			}
			for d := range r.Blobs(ctx) {
				t.Error("blob kept after a failed import:", d.Digest)
			}
			staged, err := filepath.Glob(filepath.Join(r.Root(), "tmp", "*", "*"))
			if err != nil || len(staged) > 0 {
				t.Error("left in tmp/:", staged, err)
			}
		})
	}
}

func (endlessZeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestImportArchiveOptions tries each option that names or selects an entry, and the errors of
// those that fit none.
func TestImportArchiveOptions(t *testing.T) {
	ctx := context.Background()
	manifest, config := image("layer")
	named := tarOf(t, blobEntry(config), blobEntry("layer"), blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1"))
	bare := tarOf(t, blobEntry(config), blobEntry("layer"), blobEntry(manifest), layoutIndex(manifest, "v1"))
	other := ocilocal.MustParseReference("example.com/b:v1")
	r := openTemp(t, nil)
	if _, err := r.ImportArchive(ctx, bytes.NewReader(named), &ocilocal.ImportOptions{Reference: other}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("another name without Rename: %v", err)
	}
	got, err := r.ImportArchive(ctx, bytes.NewReader(named), &ocilocal.ImportOptions{Reference: other, Rename: true})
	if err != nil || got.Artifacts[0].Update.Reference != other {
		t.Errorf("Rename: %+v, %v", got, err)
	}
	got, err = r.ImportArchive(ctx, bytes.NewReader(bare), nil)
	if !errors.Is(err, ocilocal.ErrBareName) {
		t.Errorf("bare tag: %+v, %v", got, err)
	}
	for _, choice := range []string{"Repository", "Reference", "Anonymous", "IgnoreNames"} {
		if !strings.Contains(err.Error(), choice) {
			t.Errorf("%v: does not offer %s", err, choice)
		}
	}
	got, err = r.ImportArchive(ctx, bytes.NewReader(bare), &ocilocal.ImportOptions{IgnoreNames: true})
	if err != nil || !got.Artifacts[0].Update.Reference.IsZero() || got.Artifacts[0].Name != "v1" || len(got.Unnamed()) != 1 {
		t.Errorf("bare tag, ignored: %+v, %v", got, err)
	}
	if _, err := r.LoadDigest(ctx, digest.FromString(manifest)); err != nil {
		t.Error(err)
	}
	if _, err = r.ImportArchive(ctx, bytes.NewReader(named), &ocilocal.ImportOptions{Select: "nope"}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("Select: %v", err)
	}
	if _, err := build(t, r, "example.com/a:v1", nil, "else"); err != nil {
		t.Fatal(err)
	}
	got, err = r.ImportArchive(ctx, bytes.NewReader(named), nil)
	if !errors.Is(err, ocilocal.ErrConflict) || got.Artifacts[0].Update.Outcome != ocilocal.Conflicted {
		t.Errorf("conflict: %+v, %v", got, err)
	}
}

// TestRealArchive imports an archive that the OMMX SDK 1 wrote. It needs the collection of real
// artifacts beside the checkout.
func TestRealArchive(t *testing.T) {
	const name = "../shared/data/random_lp_instance.ommx"
	if _, err := os.Stat(name); err != nil {
		t.Skip("the collection of real artifacts is not here")
	}
	ctx := context.Background()
	r := openTemp(t, nil)
	if _, err := r.ImportArchiveFile(ctx, name, nil); err != nil {
		t.Fatal(err)
	}
	a, err := r.Load(ctx, ocilocal.MustParseReference("ghcr.io/jij-inc/ommx/random_lp_instance:e69fb91"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "sha256:034b093babdefec70aae4371fc10d1a8fae0f00a9de352c940047cc64a7c31f9"; a.Digest().String() != want {
		t.Errorf("digest %s, want %s", a.Digest(), want)
	}
	layers, err := a.LayersByMediaType(ctx, ocilocal.MediaTypeOMMXInstance)
	if err != nil || len(layers) != 1 {
		t.Fatal(layers, err)
	}
	if b, err := a.ReadLayer(ctx, layers[0]); err != nil || len(b) != 754 {
		t.Fatal(len(b), err)
	}
}

// FuzzArchive imports any bytes. An import fails with a sentinel, or its artifacts can be read.
func FuzzArchive(f *testing.F) {
	manifest, config := image("layer")
	f.Add(tarOf(f, blobEntry(config), blobEntry("layer"), blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1")))
	f.Add(gzipped(tarOf(f, layoutIndex(manifest, "v1"))))
	r := openTemp(f, nil)
	f.Fuzz(func(t *testing.T, src []byte) {
		ctx := context.Background()
		opts := &ocilocal.ImportOptions{IgnoreNames: true}
		opts.Policy = ocilocal.Replace
		got, err := r.ImportArchive(ctx, bytes.NewReader(src), opts)
		if err != nil {
			for _, want := range []error{ocilocal.ErrInvalidLayout, ocilocal.ErrInvalidManifest, ocilocal.ErrIncomplete, ocilocal.ErrDigestMismatch,
				ocilocal.ErrSizeMismatch, ocilocal.ErrUnsupportedMediaType, ocilocal.ErrTooLarge, ocilocal.ErrInvalidDigest} {
				if errors.Is(err, want) {
					return
				}
			}
			t.Fatalf("untyped error %v", err)
		}
		for _, a := range got.Artifacts {
			art, err := r.LoadDigest(ctx, a.Descriptor.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := art.Manifest(ctx); err != nil {
				t.Fatal(err)
			}
		}
	})
}
