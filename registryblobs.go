package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// HasBlob returns the size of a blob. It reads the directory entry, and not the bytes.
//
// Errors: [ErrNotFound], with [ErrAbsent] where it applies, [ErrInvalidDigest], and any error from
// the file system.
func (r *LocalRegistry) HasBlob(ctx context.Context, d digest.Digest) (size int64, err error) {
	defer addOp(&err, "look for blob", "", d)
	end, err := r.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	size, err = r.blobs.size(d)
	return size, r.absence(err, d, roleLayer)
}

// Blobs walks blobs/ and yields the digest and size of every file there, in no particular order,
// whether or not an artifact needs it. It does not read the files. An error, from ctx or the file
// system, is yielded once, at the end.
func (r *LocalRegistry) Blobs(ctx context.Context) iter.Seq2[ocispec.Descriptor, error] {
	return func(yield func(ocispec.Descriptor, error) bool) {
		end, err := r.begin(ctx)
		if err != nil {
			yield(ocispec.Descriptor{}, opError("walk blobs", "", "", err))
			return
		}
		defer func() { end() }()
		stop := errors.New("stop")
		err = r.blobs.walk(ctx, func(e blobEntry) (err error) {
			if e.digest == "" {
				return nil
			}
			// The caller's code may close the registry, which waits for calls: so the call ends
			// before it runs, and begins again after it.
			end()
			end = func() {}
			if !yield(ocispec.Descriptor{Digest: e.digest, Size: e.info.Size()}, nil) {
				return stop
			}
			again, err := r.begin(ctx)
			if err == nil {
				end = again
			}
			return err
		})
		if err != nil && err != stop {
			yield(ocispec.Descriptor{}, opError("walk blobs", "", "", err))
		}
	}
}

// OpenBlob returns a reader of a blob that verifies size and digest on the way. If the content does
// not match desc, the Read that would return the last byte fails instead. So no reader ever gets a
// whole bad blob. Only Digest and Size of desc are used; a Size of −1 is unknown. ctx governs the
// reads too.
//
// Errors, from the call or from Read:
//   - [ErrNotFound], with [ErrAbsent] if the registry records the blob as absent
//   - [ErrInvalidDigest]
//   - [ErrSizeMismatch], [ErrDigestMismatch]: the blob is damaged
//   - any error from ctx or the file system
func (r *LocalRegistry) OpenBlob(ctx context.Context, desc ocispec.Descriptor) (_ io.ReadCloser, err error) {
	defer addOp(&err, "open blob", "", desc.Digest)
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	v, err := r.blobs.open(ctx, desc.Digest, desc.Size)
	if err != nil {
		return nil, r.absence(err, desc.Digest, roleLayer) // v would be a reader that is not nil
	}
	return v, nil
}

// absence adds [ErrAbsent] to an [ErrNotFound] of content that is recorded as absent in the role
// as. Other errors stay as they are. The index is asked only after a file was not found, so reads
// of present blobs cost no query.
func (r *LocalRegistry) absence(err error, d digest.Digest, as role) error {
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	absent, failed := isAbsent(r.index, d, as)
	if absent {
		err = fmt.Errorf("%w: a manifest in this registry names it, but the content is not here: %w", ErrAbsent, err)
	}
	return errors.Join(err, failed)
}

// A BlobFile is a blob that is open for reading at any offset. Its bytes were verified when it was
// opened. ReadAt may be called from several goroutines.
type BlobFile struct {
	f    *os.File
	size int64
}

// OpenBlobFile reads a blob once to verify it, and returns it for access at any offset.
//
// Errors are those of [LocalRegistry.OpenBlob].
func (r *LocalRegistry) OpenBlobFile(ctx context.Context, desc ocispec.Descriptor) (_ *BlobFile, err error) {
	defer addOp(&err, "open blob", "", desc.Digest)
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	f, size, err := r.blobs.openFile(desc.Digest, desc.Size)
	if err != nil {
		return nil, r.absence(err, desc.Digest, roleLayer)
	}
	// The open file is verified and returned. A file that gets its name meanwhile has no effect.
	if _, err = r.blobs.verifier(ctx, f, desc.Digest, size).WriteTo(io.Discard); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &BlobFile{f: f, size: size}, nil
}

// Size returns the blob's size in bytes.
func (b *BlobFile) Size() int64 { return b.size }

// Read implements [io.Reader].
func (b *BlobFile) Read(p []byte) (int, error) { return b.f.Read(p) }

// ReadAt implements [io.ReaderAt].
func (b *BlobFile) ReadAt(p []byte, off int64) (int, error) { return b.f.ReadAt(p, off) }

// Seek implements [io.Seeker].
func (b *BlobFile) Seek(offset int64, whence int) (int64, error) { return b.f.Seek(offset, whence) }

// Close closes the file. The errors of a BlobFile's methods are those of [os.File].
func (b *BlobFile) Close() error { return b.f.Close() }
