package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layoutImporter returns an importer that fetches from a layout directory.
func (r *LocalRegistry) layoutImporter(l *layout, opts *ImportOptions) *importer {
	im := r.newImporter(opts)
	im.workers = diskWorkers
	im.mayLack = func(digest.Digest) (bool, error) { return true, nil }
	im.fetch = func(ctx context.Context, desc ocispec.Descriptor, _ role, item *meteredItem) error {
		f, err := l.open(desc)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := im.stage.putFile(ctx, f, desc.Digest, desc.Size, item.from(0)); err != nil {
			return fmt.Errorf("blob %s of the layout: %w", desc.Digest, err)
		}
		return nil
	}
	im.look = func(ctx context.Context, desc ocispec.Descriptor) (*verifier, error) {
		f, err := l.open(desc)
		if err != nil {
			return nil, err
		}
		return r.blobs.verifier(ctx, f, desc.Digest, desc.Size), nil
	}
	return im
}

// A layout is a layout directory that others may be changing, and which is not trusted.
type layout struct {
	root *rootDir
}

// index checks oci-layout and returns the entries of index.json.
func (l *layout) index() (*layoutIndex, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	raw, err := l.file(ocispec.ImageIndexFile)
	if err != nil {
		return nil, err
	}
	return parseLayoutIndex(raw)
}

// check reads oci-layout. Some tools leave it out, and nothing in a layout depends on it.
func (l *layout) check() error {
	if found, err := l.has(ocispec.ImageLayoutFile); err != nil || !found {
		return err
	}
	raw, err := l.file(ocispec.ImageLayoutFile)
	if err == nil {
		err = checkLayoutFile(raw)
	}
	return err
}

// file reads one of the two files that a layout has beside its blobs. Missing is
// [ErrInvalidLayout].
func (l *layout) file(name string) ([]byte, error) {
	f, err := l.regular(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the directory has no %s", ErrInvalidLayout, name)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// A file that is too large by its size is refused without reading it. The read is bounded all
	// the same, since the file can grow.
	size, err := checkRegular(f)
	if err == nil && size > MaxLayoutIndexSize {
		err = fmt.Errorf("%w: %s has %d bytes, and may have %d", ErrTooLarge, name, size, MaxLayoutIndexSize)
	}
	if err != nil {
		return nil, err
	}
	b, err := readBounded(f, MaxLayoutIndexSize)
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return b, err
}

// has reports whether the directory has an entry of that name.
func (l *layout) has(name string) (bool, error) {
	_, err := l.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// open opens the file of a blob, which is to be verified by whoever reads it.
// Missing is [ErrIncomplete].
func (l *layout) open(desc ocispec.Descriptor) (*os.File, error) {
	if err := checkDigest(desc.Digest); err != nil {
		return nil, err
	}
	name := blobPath(desc.Digest)
	for _, dir := range []string{blobsDir, path.Dir(name)} {
		if fi, err := l.root.Lstat(dir); err == nil && !fi.IsDir() {
			return nil, fmt.Errorf("%w: %s is not a directory (%v)", ErrInvalidLayout, dir, fi.Mode().Type())
		}
	}
	f, err := l.regular(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: blob %s (%s) is neither in the layout nor in the registry", ErrIncomplete, desc.Digest, printable(desc.MediaType))
	}
	return f, err
}

// regular opens a file if it is one, without following a link or blocking on anything else.
func (l *layout) regular(name string) (*os.File, error) {
	before, err := l.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file (%v)", ErrInvalidLayout, name, before.Mode().Type())
	}
	f, err := l.root.OpenFile(name, os.O_RDONLY|openNoFollow, 0)
	if err != nil {
		return nil, err
	}
	after, err := f.Stat()
	if err == nil && !os.SameFile(before, after) {
		err = fmt.Errorf("%w: %s was replaced while it was being opened", ErrInvalidLayout, name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
