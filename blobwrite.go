package ocilocal

import (
	"context"
	"errors"
	"hash"
	"io"
	"os"
)

// hashingWriter hashes what it writes to a staged file.
type hashingWriter struct {
	file  *rootFile
	hash  hash.Hash
	store *blobStore
}

func (w *hashingWriter) Write(p []byte) (int, error) {
	if len(p) < copyBufferSize {
		w.hash.Write(p)
		return w.file.Write(p)
	}
	// Hashing and writing a large blob side by side saves a fifth of the time.
	hashed := make(chan struct{})
	go func() {
		w.hash.Write(p)
		close(hashed)
	}()
	n, err := w.file.Write(p)
	<-hashed
	return n, err
}

// cloneChunk is how much clone lets the kernel copy at a time: so little that it is still
// in the processor's cache when it is hashed.
const cloneChunk = 4 << 20

// clone copies at most limit bytes of src without taking them through this process, and hashes what
// has arrived, one chunk while the next is on its way. count is called with the size of each chunk.
func (w *hashingWriter) clone(ctx context.Context, src *os.File, limit int64, count func(n int)) (n int64, err error) {
	hashed := make(chan error, 1)
	hashed <- nil
	for {
		if err = ctx.Err(); err != nil {
			break
		}
		from := n
		m, copyErr := w.file.copyFrom(src, min(cloneChunk, limit-n))
		n += m
		count(int(m))
		if err = errors.Join(copyErr, <-hashed); err != nil || m == 0 {
			hashed <- nil
			break
		}
		go func() {
			_, err := w.store.copy(w.hash, io.NewSectionReader(w.file, from, m))
			w.file.start(from, m)
			hashed <- err
		}()
	}
	return n, errors.Join(err, <-hashed)
}

// A ctxReader is src until ctx ends, and then fails with the error of ctx.
type ctxReader struct {
	ctx context.Context
	src io.Reader
}

func (r *ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.src.Read(p)
}
