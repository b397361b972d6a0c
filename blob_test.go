package ocilocal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// blobFile is where a blob's file lies.
func blobFile(r *ocilocal.LocalRegistry, d digest.Digest) string {
	return filepath.Join(r.Root(), "blobs", d.Algorithm().String(), d.Encoded())
}

// filesBelow lists the files below a directory of the root.
func filesBelow(t *testing.T, r *ocilocal.LocalRegistry, dir string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(filepath.Join(r.Root(), dir), func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			files = append(files, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// noise returns n bytes, none of which is zero, the same for the same seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	words := n - n%8 // many tests need megabytes
	for i := 0; i < words; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], binary.LittleEndian.Uint64(b[i:])|0x0101010101010101)
	}
	for i := words; i < n; i++ {
		b[i] |= 1
	}
	return b
}

// oneLayer publishes body as the one layer of ref.
func oneLayer(t *testing.T, r *ocilocal.LocalRegistry, ref string, body []byte) (*ocilocal.LocalArtifact, ocispec.Descriptor) {
	t.Helper()
	a, err := build(t, r, ref, nil, string(body))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := a.Layers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a, layers[0]
}

// rewrite changes a blob's file in place.
func rewrite(t *testing.T, name string, change func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err == nil {
		err = os.Chmod(name, 0o644)
	}
	if err == nil {
		err = os.WriteFile(name, change(b), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flipBit(b []byte) []byte { b[len(b)/2] ^= 4; return b }

var damages = []struct {
	name   string
	change func(b []byte) []byte // nil removes the file
	want   error                 // with the size known
}{
	{"bit flip", flipBit, ocilocal.ErrDigestMismatch},
	{"last bit", func(b []byte) []byte { b[len(b)-1] ^= 128; return b }, ocilocal.ErrDigestMismatch},
	{"truncated", func(b []byte) []byte { return b[:len(b)-1] }, ocilocal.ErrSizeMismatch},
	{"grown", func(b []byte) []byte { return append(b, 'x') }, ocilocal.ErrSizeMismatch},
	{"zero-length", func(b []byte) []byte { return nil }, ocilocal.ErrSizeMismatch},
	{"missing", nil, ocilocal.ErrNotFound},
}

// waysToRead read from a reader in different ways, and return the bytes that they got.
var waysToRead = map[string]func(src io.Reader) ([]byte, error){
	"ReadAll": io.ReadAll,
	"one byte": func(src io.Reader) ([]byte, error) {
		// Both ends of a large blob. Its middle would take long.
		const middle = 1<<20 - 2000
		head, err := io.ReadAll(iotest.OneByteReader(io.LimitReader(src, 1000)))
		for err == nil && len(head)%(1<<20) == 1000 {
			part := make([]byte, middle)
			n, partErr := io.ReadFull(src, part)
			if head = append(head, part[:n]...); partErr == io.EOF || partErr == io.ErrUnexpectedEOF {
				return head, nil
			}
			if err = partErr; err == nil {
				part, err = io.ReadAll(iotest.OneByteReader(io.LimitReader(src, 2000)))
				head = append(head, part...)
			}
		}
		return head, err
	},
	"halves": func(src io.Reader) ([]byte, error) { return io.ReadAll(iotest.HalfReader(src)) },
	"WriteTo": func(src io.Reader) ([]byte, error) {
		var b bytes.Buffer
		_, err := io.Copy(&b, src)
		return b.Bytes(), err
	},
	"big": func(src io.Reader) ([]byte, error) {
		// Bytes that a Read leaves in the buffer after its n count as returned.
		var all []byte
		for {
			buf := make([]byte, 4<<20)
			n, err := src.Read(buf)
			if n < len(buf) && bytes.Trim(buf[n:], "\x00") != nil {
				return nil, fmt.Errorf("Read left data behind the %d bytes it returned, with %w", n, err)
			}
			all = append(all, buf[:n]...)
			if err == io.EOF {
				return all, nil
			}
			if err != nil {
				return all, err
			}
		}
	},
}

func sum(b [64]byte) []byte    { return b[:] }
func sum384(b [48]byte) []byte { return b[:] }

// TestLargeLayerMemory streams a layer that is larger than the memory that may be used. It has 64
// MiB, then 256 MiB, and 4 GiB in the full run.
func TestLargeLayerMemory(t *testing.T) {
	const most = 32 << 20
	size := int64(scaled(64, 256, 4096)) << 20
	ctx := t.Context()
	r := openTemp(t, nil)
	if _, err := build(t, r, "example.com/warm:up", nil, "x"); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/large:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	layer, err := b.AddLayer(ctx, "application/octet-stream", io.LimitReader(rand.NewChaCha8([32]byte{8}), size), nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := b.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	src, err := a.OpenLayer(ctx, layer)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if n, err := io.Copy(io.Discard, src); n != size || err != nil {
		t.Fatal(n, err)
	}
	runtime.ReadMemStats(&after)
	grown, total := int64(after.HeapSys)-int64(before.HeapSys), after.TotalAlloc-before.TotalAlloc
	t.Logf("%d MiB in and out: the heap grew by %d KiB, %d KiB were allocated in all", size>>20, grown>>10, total>>10)
	if grown >= most || total >= most {
		t.Error("that is more than a layer may take")
	}
}

// A readerFunc is a function that is used as a reader.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestAddLayerFails breaks off a layer. No file of it is left, and the builder can be used on.
func TestAddLayerFails(t *testing.T) {
	errSource := errors.New("source failed")
	for name, c := range map[string]struct {
		source func(cancel func()) io.Reader
		want   error
	}{
		"cancelled": {func(cancel func()) io.Reader {
			n := 0
			return readerFunc(func(p []byte) (int, error) {
				if n++; n == 3 {
					cancel()
				}
				return len(p), nil // without end
			})
		}, context.Canceled},
		"source error": {func(func()) io.Reader {
			return io.MultiReader(bytes.NewReader(noise(9, 3<<20)), iotest.ErrReader(errSource))
		}, errSource},
		"error at once": {func(func()) io.Reader { return iotest.ErrReader(errSource) }, errSource},
		"data with error": {func(func()) io.Reader {
			return readerFunc(func(p []byte) (int, error) { return copy(p, "data"), errSource })
		}, errSource},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/a:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if _, err := b.AddLayer(ctx, "text/plain", c.source(cancel), nil); !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if left := slices.Concat(filesBelow(t, r, "tmp"), filesBelow(t, r, "blobs")); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			if _, err := b.AddLayer(t.Context(), "text/plain", strings.NewReader("good"), nil); err != nil {
				t.Fatal(err)
			}
			a, err := b.Build(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if layers, err := a.Layers(t.Context()); err != nil || len(layers) != 1 || layers[0].Digest != digest.FromString("good") {
				t.Errorf("%v, %v", layers, err)
			}
		})
	}
}

// TestCancelLeavesNothing cancels a builder with layers. No file is left below tmp/ or blobs/.
func TestCancelLeavesNothing(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/a:v1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 { // more than are left unsynced
		if _, err := b.AddLayer(ctx, "text/plain", strings.NewReader(fmt.Sprint(i)), nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := b.Cancel(); err != nil {
			t.Fatal(err)
		}
	}
	if left := slices.Concat(filesBelow(t, r, "tmp"), filesBelow(t, r, "blobs")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if _, err := b.AddLayer(ctx, "text/plain", strings.NewReader("x"), nil); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("AddLayer after Cancel: %v", err)
	}
	if _, err := b.Build(ctx); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("Build after Cancel: %v", err)
	}
}
