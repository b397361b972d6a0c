package ocilocal

import (
	"context"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
)

// A verifier reads a blob and hashes it on the way. If the bytes are wrong, the Read that would
// return the last byte returns the error instead. So even a consumer that stops after size bytes
// never has a whole bad blob.
//
// A verifier is not safe for concurrent use. Its error is final, except that of ctx.
type verifier struct {
	ctx    context.Context
	src    io.ReadCloser // the verifier closes it
	digest digest.Digest
	size   int64 // known, and 0 is a size
	off    int64 // bytes that were read and hashed
	hash   hash.Hash
	err    error // sticky; io.EOF after a good blob

	buffers *sync.Pool // the store's
}

// Read never reads beyond size bytes of src, so the last byte and the verdict come from one call.
// It clears a bad last piece in p, because a caller may look at p in spite of the error.
func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if err := v.ctx.Err(); err != nil {
		return 0, err
	}
	if v.size == 0 {
		v.err = v.finish()
		return 0, v.err
	}
	if int64(len(p)) > v.size-v.off {
		p = p[:v.size-v.off]
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := v.src.Read(p)
	v.hash.Write(p[:n])
	v.off += int64(n)
	if v.off == v.size {
		if v.err = v.finish(); v.err != io.EOF {
			clear(p[:n])
			return 0, v.err
		}
		return n, nil
	}
	v.err = v.cutOff(err)
	return n, v.err
}

// WriteTo implements [io.WriterTo] for io.Copy. A chunk is hashed while it is being written and the
// next one is read. The last chunk is hashed before it is written, by Read, so the rule of the last
// byte holds here too. One token in hashing means that no chunk is being hashed: the loop takes it
// before it starts the next, so hash sees the chunks in order, and a buffer is not overwritten
// while it is hashed.
func (v *verifier) WriteTo(dst io.Writer) (written int64, err error) {
	if v.size-v.off <= copyBufferSize || v.err != nil {
		return v.copyRest(dst)
	}
	bufs := [2]*[]byte{v.buffers.Get().(*[]byte), v.buffers.Get().(*[]byte)}
	defer v.buffers.Put(bufs[0])
	defer v.buffers.Put(bufs[1])
	hashing := make(chan struct{}, 1)
	hashing <- struct{}{}
	defer func() { <-hashing }() // before the buffers go back
	for i := 0; v.size-v.off > copyBufferSize; i++ {
		if err := v.ctx.Err(); err != nil {
			return written, err
		}
		chunk := *bufs[i%2]
		if _, err := io.ReadFull(v.src, chunk); err != nil {
			v.err = v.cutOff(err)
			return written, v.err
		}
		v.off += int64(len(chunk))
		<-hashing
		go func() {
			v.hash.Write(chunk)
			hashing <- struct{}{}
		}()
		n, err := dst.Write(chunk)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
	<-hashing
	hashing <- struct{}{}
	n, err := v.copyRest(dst)
	return written + n, err
}

// copyRest copies by Read. A buffer of the pool makes that one read of the file, where the small one
// that io.Copy or [io.Discard] has would make many.
func (v *verifier) copyRest(dst io.Writer) (int64, error) {
	const small = 8 << 10
	if v.size-v.off <= small {
		return io.Copy(dst, struct{ io.Reader }{v})
	}
	buf := v.buffers.Get().(*[]byte)
	defer v.buffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{v}, *buf)
}

// cutOff turns the end of a file that is too short into an [ErrSizeMismatch]. It returns any other
// error as it is.
func (v *verifier) cutOff(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return endedEarly(v.digest, v.off, v.size)
	}
	return err
}

// endedEarly is the error for a file that is too short.
func endedEarly(d digest.Digest, got, want int64) error {
	return fmt.Errorf("blob %s: %w: ended after %d bytes, want %d", d, ErrSizeMismatch, got, want)
}

// checkContent returns an [ErrDigestMismatch] unless the bytes of a file, which hash to got, are d.
func checkContent(d, got digest.Digest) error {
	if got == d {
		return nil
	}
	return fmt.Errorf("blob %s: %w: its bytes hash to %s (the file is damaged: Repair heals it, and so does Pull with PullOptions.Verify)",
		d, ErrDigestMismatch, got)
}

// finish is called when size bytes have been read. It returns io.EOF if they are the blob, and
// otherwise the error for good: that src goes on, that it cannot be read, or that the digest
// differs.
func (v *verifier) finish() error {
	var one [1]byte
	switch n, err := io.ReadFull(v.src, one[:]); {
	case n > 0:
		return fmt.Errorf("blob %s: %w: goes on after %d bytes", v.digest, ErrSizeMismatch, v.size)
	case err != io.EOF:
		return err
	}
	if err := checkContent(v.digest, hashedDigest(v.digest.Algorithm(), v.hash)); err != nil {
		return err
	}
	return io.EOF
}

// Close makes later reads fail with [ErrClosed], unless an error came before.
func (v *verifier) Close() error {
	if v.err == nil || v.err == io.EOF {
		v.err = ErrClosed
	}
	return v.src.Close()
}
