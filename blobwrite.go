package ocilocal

import (
	"context"
	"errors"
	"hash"
	"io"
	"os"
)

// hashingWriter writes to a staged file and hashes the bytes. It is used by one goroutine at a
// time. Bytes are hashed on their way to the file, so the digest is of the bytes that came and
// not of those that the disk returns later.
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
	// Hashing and writing a large blob side by side saves a fifth of the time. p is used by both
	// and must not change, so Write returns after both.
	hashed := make(chan struct{})
	go func() {
		w.hash.Write(p)
		close(hashed)
	}()
	n, err := w.file.Write(p)
	<-hashed
	return n, err
}

// cloneChunk is how many bytes clone lets the kernel copy at a time. It is so small that they are
// still in the processor's cache when they are hashed.
const cloneChunk = 4 << 20

// clone copies at most limit bytes of src without taking them through this process. It then reads
// each chunk of the copy and hashes it, while the kernel copies the next chunk. count is called
// with the size of each chunk. The verdict is about the copy, so it holds even if src changes.
//
// One token in hashed means that no chunk is being hashed. The loop takes it before it starts the
// next one, so the hash sees the chunks in order. After an error it is put back, for the last line.
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

// A ctxReader is src until ctx ends, and then fails with the error of ctx. It can't interrupt a
// Read of src that blocks.
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
