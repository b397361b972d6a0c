package ocilocal

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportArchive writes the artifacts that refs name, with everything that they need, to dst as an
// OCI archive. The archive has oci-layout and index.json first, then manifests, then the other
// blobs. By default every entry of index.json has its full name. Equal content gives equal bytes:
// entries are sorted, and times are zero. Gzipped bytes are equal only if the version of Go is the
// same.
//
// After an error, the bytes that were written are not an archive.
//
// Errors:
//   - [ErrNotFound]: a ref does not resolve, or a blob was collected meanwhile
//   - [ErrIncomplete]: with ExportOptions.Lineage, a subject is not in the registry
//   - [ErrTooLarge]: there are more artifacts than an index.json can list
//   - [ErrInvalidDigest]: one of ExportOptions.Digests is not a digest
//   - [ErrInvalidArgument]: there are no refs and no digests, or two refs have the same tag with
//     [NamesTags]
//   - [ErrDigestMismatch], [ErrSizeMismatch]: a blob is damaged
//   - [ErrClosed], and any error from ctx, dst or the file system
func (r *LocalRegistry) ExportArchive(ctx context.Context, dst io.Writer, refs []Reference, opts *ExportOptions) (err error) {
	defer addOp(&err, "export archive", "", "")
	m := exportMeter(opts)
	x, err := r.newExport(ctx, refs, opts, m)
	if err == nil {
		err = x.archive(ctx, dst)
	}
	if err == nil {
		m.finish()
	}
	return err
}

// ExportArchiveFile is [LocalRegistry.ExportArchive] to a file. The file gets its name when it is
// complete and its bytes are on disk. If the name is taken and ExportOptions.Overwrite is not set,
// the export fails with [ErrExists]. A symbolic link with that name is replaced, never followed.
//
// On a file system without hard links, checking the name and taking it are two steps: a file that
// another process makes in between is replaced. A killed process leaves a file in the same
// directory whose name begins with ".ocilocal-".
func (r *LocalRegistry) ExportArchiveFile(ctx context.Context, name string, refs []Reference, opts *ExportOptions) (err error) {
	defer addOp(&err, "export archive", name, "")
	m := exportMeter(opts)
	x, err := r.newExport(ctx, refs, opts, m)
	if err != nil {
		return err
	}
	if err := r.checkTarget(name); err != nil {
		return err
	}
	dir, err := openRoot(filepath.Dir(name), r.root.fault)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	err = writeNew(dir, ".ocilocal-"+rand.Text(), filepath.Base(name), x.opts.Overwrite, func(w io.Writer) error {
		err := x.archive(ctx, w)
		if err == nil {
			m.phase(PhasePublish)
		}
		return err
	})
	if err == nil {
		m.finish()
	}
	return err
}

// exportMeter returns the meter of an export to an archive. All of it runs on the caller's
// goroutine, so the caller's function can be called directly.
func exportMeter(opts *ExportOptions) *meter {
	if opts == nil {
		return nil
	}
	return newMeter(opts.Progress, Reference{})
}

// archive writes the export as a tar, gzipped or not. The caller closes dst. gzip's Close writes
// the checksum, so its error counts.
func (x *export) archive(ctx context.Context, dst io.Writer) error {
	index, err := x.index()
	if err != nil {
		return err
	}
	if x.opts.Gzip {
		z := gzip.NewWriter(dst)
		if err := x.tar(ctx, z, index); err != nil {
			return err
		}
		return z.Close()
	}
	return x.tar(ctx, dst, index)
}

// tar writes the files of the export in a fixed order. OpenBlob verifies each blob, and fails
// before the last byte of a damaged one. So a damaged blob never becomes a complete entry. Each
// blob is a separate call: a collection of an artifact that was removed meanwhile ends the
// export.
func (x *export) tar(ctx context.Context, dst io.Writer, index []byte) error {
	tw := tar.NewWriter(dst)
	if err := writeEntry(tw, ocispec.ImageLayoutFile, strings.NewReader(layoutFile), int64(len(layoutFile))); err != nil {
		return err
	}
	if err := writeEntry(tw, ocispec.ImageIndexFile, bytes.NewReader(index), int64(len(index))); err != nil {
		return err
	}
	x.meter.planned(PhaseBlobs)
	for _, d := range slices.Concat(x.manifests, x.blobs) {
		src, err := x.registry.OpenBlob(ctx, d)
		if err != nil {
			return err
		}
		item := x.meter.item(d)
		if err := errors.Join(writeEntry(tw, blobPath(d.Digest), item.reader(src), d.Size), src.Close()); err != nil {
			return err
		}
		item.end()
	}
	return tw.Close()
}

// writeEntry writes one file. The header has no time and no owner, so that equal content gives
// equal bytes. tar.Writer fails if src has more bytes than size or, at the next header, fewer.
func writeEntry(tw *tar.Writer, name string, src io.Reader, size int64) error {
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o444})
	if err == nil {
		_, err = io.Copy(tw, src)
	}
	return err
}
