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

// layoutImporter returns an importer that fetches from a layout directory. Every member of an image
// index may be absent, as in an archive: tools save one platform of a multi-platform image so.
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
	im.mayRepeat(im.fetchAgain)
	im.look = func(ctx context.Context, desc ocispec.Descriptor) (*verifier, error) {
		f, err := l.open(desc)
		if err != nil {
			return nil, err
		}
		return r.blobs.verifier(ctx, f, desc.Digest, desc.Size), nil
	}
	return im
}

// withSource opens the directory of a source and calls read with it. The call on the registry begins
// before the directory is opened, so an import on a closed or read-only registry fails with that
// error and reads nothing.
func (r *LocalRegistry) withSource(ctx context.Context, dir string, read func(*rootDir) error) error {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	root, err := openRoot(dir, r.root.fault)
	if err != nil {
		return err
	}
	defer root.Close()
	return read(root)
}

// A layout is a layout directory. It is not trusted, and another program may change it at any time.
// All access is relative to root, which does not lead out of the directory, and only regular files
// are opened: see regular. Bytes are hashed while they are copied, so a change of a file meanwhile
// is a digest or size mismatch.
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

// check reads oci-layout and refuses another version. A missing file is accepted: some tools leave
// it out, although image-spec requires it, and nothing else in a layout depends on it.
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

// file reads index.json or oci-layout. If the file is missing, the error is [ErrInvalidLayout]: the
// directory is not a layout.
func (l *layout) file(name string) ([]byte, error) {
	f, err := l.regular(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the directory has no %s", ErrInvalidLayout, name)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// A file that is too large is refused by its size, without reading it. The read is bounded as
	// well, because the file can grow meanwhile.
	size, err := checkRegular(f)
	if err == nil && size > MaxLayoutIndexSize {
		err = fmt.Errorf("%w: %s has %d bytes, the limit is %d", ErrTooLarge, name, size, MaxLayoutIndexSize)
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

// open opens the file of a blob. The caller verifies the bytes. If the file is missing, the error
// is [ErrIncomplete], which lets the importer look elsewhere. If blobs/ or the directory of an
// algorithm is a link or a file, the error says so: a bare "not found" would hide the cause.
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

// regular opens a regular file. It does not follow a link, and does not open a named pipe or a
// device, which could block or have an effect. The kind can only be checked before the open, and
// another program can replace the file in between. So the open file is compared with the one that
// was checked.
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
