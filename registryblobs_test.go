package ocilocal_test

import (
	"bytes"
	"io"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/iotest"
)

func TestOpenBlobFile(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	body := noise(6, scaled(300<<10, 2<<20, 2<<20)) // iotest reads it byte by byte
	_, layer := oneLayer(t, r, "example.com/a:v1", body)
	f, err := r.OpenBlobFile(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Size() != int64(len(body)) {
		t.Errorf("size %d", f.Size())
	}
	if err := iotest.TestReader(f, body); err != nil {
		t.Error(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			p := make([]byte, 1000)
			off := int64(i * len(body) / 10)
			if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, body[off:off+1000]) {
				t.Errorf("ReadAt %d: %v", off, err)
			}
		})
	}
	wg.Wait()
	if off, err := f.Seek(-10, io.SeekEnd); err != nil || off != f.Size()-10 {
		t.Error(off, err)
	}
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, body[len(body)-10:]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if n, err := f.ReadAt(make([]byte, 5), f.Size()-2); n != 2 || err != io.EOF {
		t.Error(n, err)
	}
}

func TestReaderOutlivesFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("an open file can't be deleted there")
	}
	r := openTemp(t, nil)
	body := noise(7, 3<<20)
	_, layer := oneLayer(t, r, "example.com/a:v1", body)
	src, err := r.OpenBlob(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	f, err := r.OpenBlobFile(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(blobFile(r, layer.Digest)); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	if b, err := io.ReadAll(src); err != nil || !bytes.Equal(b, body) {
		t.Errorf("OpenBlob: %d bytes, %v", len(b), err)
	}
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, body) {
		t.Errorf("OpenBlobFile: %d bytes, %v", len(b), err)
	}
}
