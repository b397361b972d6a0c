package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Ref is a row of the index: a reference and the manifest it points at.
type Ref struct {
	Reference  Reference
	Descriptor ocispec.Descriptor // MediaType, Digest, Size and ArtifactType
	Updated    time.Time          // when it was last pointed elsewhere
}

// Resolve returns the descriptor of the manifest that ref names. A reference
// with a digest is resolved by that digest, under whatever name the registry
// has it, as [LocalRegistry.ResolveDigest] does. Only the index is read.
// Errors: [ErrNotFound], [ErrInvalidReference] for a zero ref, [ErrCorruptIndex], [ErrIndexIO].
func (r *LocalRegistry) Resolve(ctx context.Context, ref Reference) (ocispec.Descriptor, error) {
	desc, err := r.resolve(ctx, ref)
	return desc, opError("resolve", ref.String(), "", err)
}

// ResolveDigest returns the descriptor of the manifest with that digest. What
// no ref points at any more is found until it is collected.
// Errors: [ErrNotFound], [ErrInvalidDigest], [ErrCorruptIndex], [ErrIndexIO].
func (r *LocalRegistry) ResolveDigest(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, opError("resolve", "", d, err)
	}
	defer end()
	desc, err := r.resolveDigest(d)
	return desc, opError("resolve", "", d, err)
}

func (r *LocalRegistry) resolve(ctx context.Context, ref Reference) (ocispec.Descriptor, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	return r.lookUp(ref)
}

// lookUp is resolve within a call that has begun.
func (r *LocalRegistry) lookUp(ref Reference) (ocispec.Descriptor, error) {
	if err := ref.checkGiven(); err != nil {
		return ocispec.Descriptor{}, err
	}
	if d := ref.Digest(); d != "" {
		return r.resolveDigest(d)
	}
	return found(r.index.resolve(ref.key()))
}

func (r *LocalRegistry) resolveDigest(d digest.Digest) (ocispec.Descriptor, error) {
	if err := checkDigest(d); err != nil {
		return ocispec.Descriptor{}, err
	}
	return found(r.index.resolveDigest(d))
}

func found(desc ocispec.Descriptor, ok bool, err error) (ocispec.Descriptor, error) {
	if err == nil && !ok {
		err = ErrNotFound
	}
	return desc, err
}

// Exists reports whether ref resolves. Only the index is read. That it doesn't is no error;
// others are those of [LocalRegistry.Resolve].
// Errors are those of [LocalRegistry.Resolve] but for [ErrNotFound].
func (r *LocalRegistry) Exists(ctx context.Context, ref Reference) (bool, error) {
	_, err := r.Resolve(ctx, ref)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// LoadDigest returns the artifact whose manifest has that digest; its
// Reference is zero. Errors are those of [LocalRegistry.ResolveDigest].
func (r *LocalRegistry) LoadDigest(ctx context.Context, d digest.Digest) (*LocalArtifact, error) {
	desc, err := r.ResolveDigest(ctx, d)
	if err != nil {
		return nil, err
	}
	return r.newArtifact(Reference{}, desc, nil), nil
}

// inPages returns an iterator over the items of pages. read is asked for the n items after the last one of the
// page before, which is nil at first. Nothing of a page is held open while the caller's code runs. A
// positive limit bounds the items. An error is yielded once, at the end.
func inPages[T any](limit, size int, read func(last *T, n int) ([]T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var last *T
		for left := limit; ; {
			n := size
			if limit > 0 {
				n = min(n, left)
			}
			page, err := read(last, n)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, item := range page {
				if !yield(item, nil) {
					return
				}
			}
			if left -= len(page); len(page) < n || limit > 0 && left <= 0 {
				return
			}
			last = &page[len(page)-1]
		}
	}
}

// ListOptions choose refs. Nil and the zero value choose all.
type ListOptions struct {
	// Name, if not empty, is the one registry/repository to list, as [Reference.Name] returns it.
	Name string
	// Prefix, if not empty, is what registry/repository must begin with, such as "ghcr.io/org/".
	Prefix string
	// After, if not zero, starts the listing behind it, whether or not it
	// exists: the last reference of a page begins the next.
	After Reference
	// Limit, if positive, ends the listing after that many.
	Limit int
}

// Refs lists refs in the order of [Reference.Compare], from the index only. It reads
// in pages, so that memory stays the same and no lock is held while the
// caller's code runs; a ref that is added or removed meanwhile may or may not
// be seen. An error (ctx's, [ErrInvalidArgument] for a Name that no reference has,
// [ErrCorruptIndex], [ErrIndexIO]) is yielded once, at the end.
func (r *LocalRegistry) Refs(ctx context.Context, opts *ListOptions) iter.Seq2[Ref, error] {
	var o ListOptions
	if opts != nil {
		o = *opts
	}
	return func(yield func(Ref, error) bool) {
		if err := o.check(); err != nil {
			yield(Ref{}, opError("list", "", "", err))
			return
		}
		name, reference, below := o.bounds()
		inPages(o.Limit, listPage, func(last *Ref, n int) ([]Ref, error) {
			if last != nil {
				name, reference = last.Reference.key()
			}
			page, err := r.page(ctx, name, reference, below, n)
			return page, opError("list", "", "", err)
		})(yield)
	}
}

const listPage = 512

// check refuses a name that can't be any reference's.
func (o *ListOptions) check() error {
	if o.Name == "" {
		return nil
	}
	canonical, err := canonicalName(o.Name)
	if err == nil && canonical != o.Name {
		err = fmt.Errorf("name %q is spelled %q", clip(o.Name), clip(canonical))
	}
	if err != nil {
		return fmt.Errorf("%w: ListOptions.Name: %w", ErrInvalidArgument, err)
	}
	return nil
}

// bounds returns the keys between which the listing lies.
func (o *ListOptions) bounds() (name, reference, below string) {
	// Names hold ASCII only, so these are above all of them.
	const aboveAll = "\x7f"
	below = aboveAll
	if o.Prefix != "" {
		name, below = o.Prefix, o.Prefix+aboveAll
	}
	if o.Name != "" && strings.HasPrefix(o.Name, o.Prefix) {
		name, below = o.Name, o.Name+"\x00"
	} else if o.Name != "" {
		below = ""
	}
	if n, ref := o.After.key(); !o.After.IsZero() && n >= name {
		name, reference = n, ref
	}
	return name, reference, below
}

func (r *LocalRegistry) page(ctx context.Context, name, reference, below string, n int) ([]Ref, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return r.index.list(name, reference, below, n)
}

// HasBlob returns the size of a blob. It looks at the directory entry, not at the bytes.
// Errors: [ErrNotFound], [ErrInvalidDigest], and the file system's.
func (r *LocalRegistry) HasBlob(ctx context.Context, d digest.Digest) (size int64, err error) {
	end, err := r.begin(ctx)
	if err != nil {
		return 0, opError("look for blob", "", d, err)
	}
	defer end()
	size, err = r.blobs.size(d)
	return size, opError("look for blob", "", d, err)
}

// Blobs walks blobs/ and yields the digest and size of every file there, in no
// order, whether or not an artifact needs it. It doesn't read the files.
// An error (ctx's, the file system's) is yielded once, at the end.
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
			end() // the caller's code may close the registry
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

// OpenBlob returns a reader of a blob that verifies size and digest on the
// way: the Read that would return the last byte fails instead if the content
// is not what desc says, so no reader ever gets a whole bad blob. Only desc's
// Digest and Size count; a Size of −1 is unknown. ctx governs the reads too.
//
// Errors, from the call or from Read: [ErrNotFound], [ErrInvalidDigest],
// [ErrSizeMismatch], [ErrDigestMismatch], ctx's, and the file system's.
func (r *LocalRegistry) OpenBlob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, opError("open blob", "", desc.Digest, err)
	}
	defer end()
	v, err := r.blobs.open(ctx, desc.Digest, desc.Size)
	if err != nil {
		return nil, opError("open blob", "", desc.Digest, err)
	}
	return v, nil
}

// A BlobFile is a blob open for reading at any place. Its bytes were verified
// when it was opened. ReadAt may be called from several goroutines.
type BlobFile struct {
	f    *os.File
	size int64
}

// OpenBlobFile reads a blob once to verify it, and returns it for access at
// any place. Errors are those of [LocalRegistry.OpenBlob].
func (r *LocalRegistry) OpenBlobFile(ctx context.Context, desc ocispec.Descriptor) (*BlobFile, error) {
	b, err := r.openBlobFile(ctx, desc)
	return b, opError("open blob", "", desc.Digest, err)
}

func (r *LocalRegistry) openBlobFile(ctx context.Context, desc ocispec.Descriptor) (*BlobFile, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	f, size, err := r.blobs.openFile(desc.Digest, desc.Size)
	if err != nil {
		return nil, err
	}
	// The same open file is verified and handed out, whatever its name comes to mean.
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
