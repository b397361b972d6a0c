package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestVerifiedReader damages blobs in every way. No reader gets all bytes of a damaged one.
func TestVerifiedReader(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for _, size := range []int{1, 1000, 3<<20 + 5} {
		body := noise(1, size)
		for _, c := range damages {
			r := openTemp(t, nil)
			_, layer := oneLayer(t, r, "example.com/a:v1", body)
			for name, read := range waysToRead {
				src, err := r.OpenBlob(ctx, layer)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := read(src); err != nil || !bytes.Equal(got, body) {
					t.Fatalf("%d bytes, %s, good: %d bytes, %v", size, name, len(got), err)
				}
				mustClose(t, src)
			}
			file := blobFile(r, layer.Digest)
			if c.change == nil {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			} else {
				rewrite(t, file, c.change)
			}
			for _, known := range []bool{true, false} {
				desc, want := layer, c.want
				if !known {
					desc.Size = -1
					if c.change != nil {
						want = ocilocal.ErrDigestMismatch
					}
				}
				for name, read := range waysToRead {
					src, err := r.OpenBlob(ctx, desc)
					var got []byte
					if err == nil {
						got, err = read(src)
						mustClose(t, src)
					}
					if !errors.Is(err, want) {
						t.Errorf("%d bytes, %s, %s, size known %t: %v, want %v", size, c.name, name, known, err, want)
					}
					if fi, err := os.Stat(file); err == nil && len(got) > 0 && int64(len(got)) >= fi.Size() {
						t.Errorf("%d bytes, %s, %s, size known %t: handed out all %d bytes", size, c.name, name, known, len(got))
					}
				}
				if f, err := r.OpenBlobFile(ctx, desc); !errors.Is(err, want) {
					t.Errorf("%d bytes, %s: OpenBlobFile: %v, %v", size, c.name, f, err)
				}
			}
		}
	}
}

// TestDamageWhileReading changes the file of a reader that is open.
func TestDamageWhileReading(t *testing.T) {
	t.Parallel()
	body := noise(2, 3<<20)
	for _, c := range damages {
		if c.change == nil {
			continue
		}
		for name, read := range waysToRead {
			r := openTemp(t, nil)
			_, layer := oneLayer(t, r, "example.com/a:v1", body)
			src, err := r.OpenBlob(t.Context(), layer)
			if err != nil {
				t.Fatal(err)
			}
			rewrite(t, blobFile(r, layer.Digest), c.change)
			got, err := read(src)
			if !errors.Is(err, c.want) || len(got) >= len(body) {
				t.Errorf("%s, %s: %d bytes, %v, want %v", c.name, name, len(got), err, c.want)
			}
			if n, again := src.Read(make([]byte, 10)); n != 0 || !errors.Is(again, c.want) {
				t.Errorf("%s, %s: Read after the error: %d, %v", c.name, name, n, again)
			}
			mustClose(t, src)
		}
	}
}

// TestReaderContextAndClose: a reader fails with the error of its context, and after Close with
// ErrClosed.
func TestReaderContextAndClose(t *testing.T) {
	r := openTemp(t, nil)
	_, layer := oneLayer(t, r, "example.com/a:v1", noise(3, 3<<20))
	ctx, cancel := context.WithCancel(t.Context())
	src, err := r.OpenBlob(ctx, layer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(src, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.Copy(io.Discard, src); !errors.Is(err, context.Canceled) {
		t.Errorf("read after cancel: %v", err)
	}
	mustClose(t, src)
	if src, err = r.OpenBlob(t.Context(), layer); err != nil {
		t.Fatal(err)
	}
	mustClose(t, src)
	if _, err := src.Read(make([]byte, 1)); !errors.Is(err, ocilocal.ErrClosed) {
		t.Errorf("Read after Close: %v", err)
	}
}
