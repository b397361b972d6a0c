package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// fatIndex is an image index without members. Its annotations take many times their bytes in
// memory, because each has a key of a few characters and an empty value.
func fatIndex(i, size int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `{"schemaVersion":2,"mediaType":%q,"manifests":[],"annotations":{"i":"%d"`, ocispec.MediaTypeImageIndex, i)
	for n := 0; b.Len() < size; n++ {
		fmt.Fprintf(&b, `,"%x":""`, n+1<<12)
	}
	b.WriteString("}}")
	return b.String()
}

// TestImportMemory imports an image index of many large image indexes, and samples the heap while
// they are staged and published. The heap must not grow with their number.
func TestImportMemory(t *testing.T) {
	if ranAlone(t) {
		return
	}
	const size = 1 << 20
	peak := func(children int) uint64 {
		var members []string
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		add := func(name, body string) {
			if err := errors.Join(tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(body)), Mode: 0o644}), func() error {
				_, err := io.WriteString(tw, body)
				return err
			}()); err != nil {
				t.Fatal(err)
			}
		}
		for i := range children {
			doc := fatIndex(i, size)
			members = append(members, desc(ocispec.MediaTypeImageIndex, doc))
			add(blobEntry(doc).name, doc)
		}
		top := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, strings.Join(members, ","))
		add(blobEntry(top).name, top)
		add("index.json", strings.Replace(layoutIndex(top, "example.com/a:v1").body, imageType, ocispec.MediaTypeImageIndex, 1))
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		members = nil
		var mu sync.Mutex
		var most uint64
		r := openTemp(t, nil)
		ocilocal.SetFault(r, func(op, name string) error {
			if op != "open" && op != "link" {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			var now runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc-uint64(b.Len()))
			return nil
		})
		defer ocilocal.SetFault(r, nil)
		if _, err := r.ImportArchive(t.Context(), bytes.NewReader(b.Bytes()), nil); err != nil {
			t.Fatal(err)
		}
		return most
	}
	few, many := peak(3), peak(12)
	if many > few+16<<20 {
		t.Errorf("the heap grows with the number of manifests: %d bytes with 3, %d with 12", few, many)
	}
}

// TestImportMaxBytes imports from a layout and an archive with a limit that is one byte too low,
// and then with one that fits.
func TestImportMaxBytes(t *testing.T) {
	manifest, config := image("layer")
	entries := []entry{layoutVersion, layoutIndex(manifest, "example.com/a:v1"), blobEntry(config), blobEntry("layer"), blobEntry(manifest)}
	dir, archive := layoutDir(t, entries...), tarOf(t, entries...)
	size := int64(len(manifest) + len(config) + len("layer"))
	for name, in := range map[string]func(*ocilocal.LocalRegistry, int64) (*ocilocal.ImportResult, error){
		"layout": func(r *ocilocal.LocalRegistry, most int64) (*ocilocal.ImportResult, error) {
			return r.ImportLayout(context.Background(), dir, &ocilocal.ImportOptions{MaxBytes: most})
		},
		"archive": func(r *ocilocal.LocalRegistry, most int64) (*ocilocal.ImportResult, error) {
			return r.ImportArchive(context.Background(), bytes.NewReader(archive), &ocilocal.ImportOptions{MaxBytes: most})
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			if _, err := in(r, size-1); !errors.Is(err, ocilocal.ErrTooLarge) {
				t.Errorf("%d bytes with a limit of %d: %v", size, size-1, err)
			}
			nothingCame(t, r)
			if got, err := in(r, size); err != nil || got.BytesWritten != size {
				t.Errorf("%d bytes with a limit of %d: %+v, %v", size, size, got, err)
			}
			// The registry has all blobs now, so none counts.
			if got, err := in(r, 1); err != nil || got.BlobsReused != 3 {
				t.Errorf("again, with a limit of 1: %+v, %v", got, err)
			}
		})
	}
}

// TestImportAgain: an import of content that the registry has writes and syncs no blob. If a blob
// is damaged or missing, only this one is written again.
func TestImportAgain(t *testing.T) {
	t.Parallel()
	from := openTemp(t, nil)
	var refs []ocilocal.Reference
	for i := range 3 {
		a, err := build(t, from, fmt.Sprintf("example.com/again:v%d", i), nil, "shared", fmt.Sprint("own ", i), string(noise(byte(i), 200<<10)))
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, a.Reference())
	}
	var archive bytes.Buffer
	dir := filepath.Join(t.TempDir(), "layout")
	if err := errors.Join(from.ExportArchive(t.Context(), &archive, refs, nil), from.ExportLayout(t.Context(), dir, refs, nil)); err != nil {
		t.Fatal(err)
	}
	for source, load := range map[string]func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error){
		"archive": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportArchive(t.Context(), bytes.NewReader(archive.Bytes()), nil)
		},
		"layout": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportLayout(t.Context(), dir, nil)
		},
		"registry": func(r *ocilocal.LocalRegistry) (*ocilocal.ImportResult, error) {
			return r.ImportRegistry(t.Context(), from, refs[0], nil)
		},
	} {
		t.Run(source, func(t *testing.T) {
			r := openTemp(t, nil)
			first, err := load(r)
			if err != nil {
				t.Fatal(err)
			}
			large := digest.FromBytes(noise(0, 200<<10))
			for _, c := range []struct {
				what    string
				damage  func() error
				written int
			}{
				{"whole", func() error { return nil }, 0},
				{"damaged", func() error { rewrite(t, blobFile(r, large), flipBit); return nil }, 1},
				{"gone", func() error { return os.Remove(blobFile(r, large)) }, 1},
				{"whole again", func() error { return nil }, 0},
			} {
				if err := c.damage(); err != nil {
					t.Fatal(err)
				}
				rec := &record{}
				ocilocal.SetFault(r, rec.fault)
				got, err := load(r)
				ocilocal.SetFault(r, nil)
				if err != nil {
					t.Fatal(c.what, err)
				}
				if got.BlobsWritten != c.written || got.BlobsWritten+got.BlobsReused != first.BlobsWritten {
					t.Errorf("%s: %d blobs written, %d reused", c.what, got.BlobsWritten, got.BlobsReused)
				}
				ops := map[string]int{}
				for _, op := range rec.ops {
					verb, name, _ := strings.Cut(op, " ")
					if strings.HasPrefix(name, "tmp/") || strings.HasPrefix(name, "blobs/") {
						ops[verb]++
					}
				}
				if ops["create"] != c.written || ops["fsync"] != c.written || (ops["write"] > 0) != (c.written > 0) {
					t.Errorf("%s: %v", c.what, ops)
				}
				if found := problems(t, r, nil, nil); len(found) > 0 {
					t.Errorf("%s: %q", c.what, found)
				}
			}
		})
	}
}
