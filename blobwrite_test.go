package ocilocal_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestLayoutLargeBlobs: large blobs of a layout are copied by the kernel in few calls. They are
// verified like others, on the way in and on the way out, and share no file with the layout.
func TestLayoutLargeBlobs(t *testing.T) {
	t.Parallel()
	const chunk = 4 << 20
	for _, n := range []int{chunk - 1, chunk, 2*chunk + 3} {
		from := openTemp(t, nil)
		ref := ocilocal.MustParseReference("example.com/large:v1")
		a := pushed(t, from, ref, nil, nil, noise(1, n))
		dir := filepath.Join(t.TempDir(), "layout")
		if err := from.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref}, nil); err != nil {
			t.Fatal(err)
		}
		to := openTemp(t, nil)
		var writes atomic.Int64
		ocilocal.SetFault(to, func(op, name string) error {
			if op == "write" {
				writes.Add(1)
			}
			return nil
		})
		if _, err := to.ImportLayout(t.Context(), dir, nil); err != nil {
			t.Fatal(err)
		}
		// One write for each 4 MiB, one more that finds the end, and those of the small blobs.
		if most := 2 + n/chunk + 2; runtime.GOOS == "linux" && n >= chunk && writes.Load() > int64(most) {
			t.Errorf("%d bytes: %d writes, the kernel's would be %d", n, writes.Load(), most)
		}
		layers, err := a.Layers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		copied, err := to.Load(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := copied.ReadLayer(t.Context(), layers[0]); err != nil || !bytes.Equal(b, noise(1, n)) {
			t.Error(err)
		}
		file := filepath.Join(dir, "blobs", "sha256", layers[0].Digest.Encoded())
		// The imported blob is not a link to the source's file, which others may change.
		rewrite(t, file, flipBit)
		if b, err := copied.ReadLayer(t.Context(), layers[0]); err != nil || !bytes.Equal(b, noise(1, n)) {
			t.Errorf("%d bytes: after a change of the source: %v", n, err)
		}
		for name, c := range map[string]struct {
			change func(b []byte) []byte
			want   error
		}{
			"flipped": {func(b []byte) []byte { b[len(b)-2] ^= 1; return b }, ocilocal.ErrDigestMismatch},
			"shorter": {func(b []byte) []byte { return b[:len(b)-1] }, ocilocal.ErrSizeMismatch},
			"longer":  {func(b []byte) []byte { return append(b, 0) }, ocilocal.ErrSizeMismatch},
		} {
			rewrite(t, file, func([]byte) []byte { return c.change(noise(1, n)) })
			r := openTemp(t, nil)
			if _, err := r.ImportLayout(t.Context(), dir, nil); !errors.Is(err, c.want) {
				t.Errorf("%d bytes, %s: %v", n, name, err)
			}
			checkNothingVisible(t, r)
		}
		// A damaged blob of the registry is not exported.
		rewrite(t, filepath.Join(from.Root(), "blobs", "sha256", layers[0].Digest.Encoded()), func(b []byte) []byte { b[5] ^= 1; return b })
		if err := from.ExportLayout(t.Context(), dir+"2", []ocilocal.Reference{ref}, nil); !errors.Is(err, ocilocal.ErrDigestMismatch) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}
