package ocilocal

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits of what an archive may hold.
const (
	// MaxArchiveEntries is how many entries an archive may have.
	MaxArchiveEntries = 1_000_000
	// A blob may shrink as well as deflate can, 1032-fold: a layer of zeros does, and
	// comes in as it went out. What a gzip stream has beside its blobs may not: there is
	// no use for it. The first bytes are free because they hurt nobody.
	maxGzipRatio    = 200
	gzipRatioFreeBy = 64 << 20
	// Tools fill up the last record of a tar, with up to 10 KiB if not told otherwise.
	maxArchiveTail = 16 << 20
)

// ImportArchive imports an OCI archive (a layout directory as a tar, plain or
// gzipped, such as OMMX's .ommx) from a stream: entries in any order, without
// oci-layout too. Blobs go straight into the store; those that no chosen
// manifest needs are dropped. Every entry of index.json keeps its bytes and digest.
// src is read on behind the archive, to its end or for 16 MiB, so that whoever writes it can finish.
// A blob may shrink to nearly nothing under gzip; what else a gzipped archive holds may not.
//
// Either all is published or nothing, but for entries whose refs are kept: see
// [ImportResult.Conflicts]. Errors: [ErrInvalidLayout],
// [ErrInvalidManifest], [ErrIncomplete], [ErrDigestMismatch],
// [ErrSizeMismatch], [ErrUnsupportedMediaType], [ErrTooLarge],
// [ErrArtifactType] for what Options.ArtifactTypes doesn't have, [ErrReadOnly],
// [ErrBusy], [ErrClosed], [ErrNotFound]
// and [ErrInvalidArgument] for options that fit no entry, [*ConflictError] if the only entry
// conflicts, together with the result, ctx's, src's, and the file system's.
func (r *LocalRegistry) ImportArchive(ctx context.Context, src io.Reader, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchive(ctx, src, opts)
	return result, opError("import archive", "", "", err)
}

// ImportArchiveFile is [LocalRegistry.ImportArchive] from a regular file. The registry's
// own index, and what is no regular file, is refused with [ErrInvalidArgument].
func (r *LocalRegistry) ImportArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchiveFile(ctx, name, opts)
	return result, opError("import archive", name, "", err)
}

func (r *LocalRegistry) importArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	f, err := r.openOther(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return r.importArchive(ctx, f, opts)
}

func (r *LocalRegistry) importArchive(ctx context.Context, src io.Reader, opts *ImportOptions) (_ *ImportResult, err error) {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	im := r.newImporter(opts)
	defer func() { r.logDiscard(im.stage.discard()) }()
	im.fetch = func(_ context.Context, desc ocispec.Descriptor, _ role) error {
		return fmt.Errorf("%w: blob %s (%s) is neither in the archive nor in the registry", ErrIncomplete, desc.Digest, clip(desc.MediaType))
	}
	index, err := readArchive(ctx, src, func(d digest.Digest, src io.Reader, size int64) error {
		if have, err := r.blobs.size(d); !im.stage.has(d) && (err != nil || have != size) {
			if err := im.charge(size); err != nil {
				return err
			}
		}
		_, _, err := im.stage.put(ctx, src, "", d, size)
		return err
	})
	if err != nil {
		return nil, err
	}
	return im.run(ctx, index)
}

// InspectArchive reads what an archive says of itself, without any registry.
// Errors: those of [LocalRegistry.ImportArchive] that concern the archive's form.
func InspectArchive(ctx context.Context, src io.Reader) (*Inspection, error) {
	in, err := inspectArchive(ctx, src)
	return in, opError("inspect archive", "", "", err)
}

func inspectArchive(ctx context.Context, src io.Reader) (*Inspection, error) {
	counted := &Inspection{}
	entries, err := readArchive(ctx, src, func(_ digest.Digest, _ io.Reader, size int64) error {
		counted.Blobs++
		counted.Bytes += size
		return nil
	})
	if err != nil {
		return nil, err
	}
	in := newInspection(entries)
	in.Blobs, in.Bytes = counted.Blobs, counted.Bytes
	return in, nil
}

// readArchive gives every blob of an archive to put and returns its index's entries.
func readArchive(ctx context.Context, src io.Reader, put func(d digest.Digest, src io.Reader, size int64) error) ([]ocispec.Descriptor, error) {
	plain, err := decompressed(&ctxReader{ctx, src})
	if err != nil {
		return nil, err
	}
	var entries []ocispec.Descriptor
	var hasIndex, isDocker bool
	tr := tar.NewReader(plain)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, archiveError(err)
		}
		if n >= MaxArchiveEntries {
			return nil, fmt.Errorf("%w: archive has more than %d entries", ErrTooLarge, MaxArchiveEntries)
		}
		name, err := entryName(h)
		if err != nil {
			return nil, err
		}
		switch {
		case name == "":
			continue
		case name == ocispec.ImageIndexFile:
			if hasIndex {
				return nil, fmt.Errorf("%w: archive has index.json twice", ErrInvalidLayout)
			}
			hasIndex = true
			var raw []byte
			if raw, err = readSmall(tr, h); err == nil {
				entries, err = parseLayoutIndex(raw)
			}
		case name == ocispec.ImageLayoutFile:
			var raw []byte
			if raw, err = readSmall(tr, h); err == nil {
				err = checkLayoutFile(raw)
			}
		case strings.HasPrefix(name, "blobs/"):
			err = readBlob(tr, h, name, func(d digest.Digest, src io.Reader, size int64) error {
				plain.blobs += size
				return put(d, src, size)
			})
		case name == "manifest.json":
			isDocker = true
		}
		if err != nil {
			return nil, archiveError(err)
		}
	}
	if err := plain.end(); err != nil {
		return nil, archiveError(err)
	}
	switch {
	case !hasIndex && isDocker:
		return nil, fmt.Errorf("%w: this is a `docker save` archive without an OCI index.json (save it as oci-archive)", ErrUnsupportedMediaType)
	case !hasIndex:
		return nil, fmt.Errorf("%w: archive has no index.json", ErrInvalidLayout)
	}
	return entries, nil
}

// archiveError gives errors of the tar and gzip readers their sentinel.
func archiveError(err error) error {
	if _, bad := errors.AsType[flate.CorruptInputError](err); bad || err == io.EOF || errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) ||
		errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: archive is damaged or cut off: %w", ErrInvalidLayout, err)
	}
	return err
}

// entryName returns the clean name of an entry that may matter, "" for one to pass over.
func entryName(h *tar.Header) (string, error) {
	name := h.Name
	for _, part := range strings.Split(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("%w: archive entry %q leads out of the archive", ErrInvalidLayout, clip(name))
		}
	}
	if strings.ContainsAny(name, "\x00\\") || strings.HasPrefix(name, "/") {
		return "", fmt.Errorf("%w: archive entry %q has no plain relative name", ErrInvalidLayout, clip(name))
	}
	name = path.Clean(name)
	ours := name == ocispec.ImageIndexFile || name == ocispec.ImageLayoutFile || name == "blobs" || strings.HasPrefix(name, "blobs/")
	if h.Typeflag == tar.TypeDir {
		if name == ocispec.ImageIndexFile || name == ocispec.ImageLayoutFile {
			return "", fmt.Errorf("%w: archive entry %q is a directory", ErrInvalidLayout, clip(name))
		}
		return "", nil
	}
	if ours && h.Typeflag != tar.TypeReg {
		return "", fmt.Errorf("%w: archive entry %q is not a regular file (type %q)", ErrInvalidLayout, clip(name), h.Typeflag)
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return "", fmt.Errorf("%w: archive entry %q is sparse", ErrInvalidLayout, clip(name))
		}
	}
	if h.Typeflag == tar.TypeGNUSparse {
		return "", fmt.Errorf("%w: archive entry %q is sparse", ErrInvalidLayout, clip(name))
	}
	if h.Typeflag != tar.TypeReg {
		return "", nil
	}
	return name, nil
}

// readSmall reads an entry that must be small.
func readSmall(src io.Reader, h *tar.Header) ([]byte, error) {
	if h.Size > MaxManifestSize {
		return nil, fmt.Errorf("%w: %q has %d bytes, at most %d are taken", ErrTooLarge, clip(h.Name), h.Size, MaxManifestSize)
	}
	return io.ReadAll(src)
}

// readBlob gives put the blob that an entry's name promises.
func readBlob(src io.Reader, h *tar.Header, name string, put func(digest.Digest, io.Reader, int64) error) error {
	parts := strings.Split(name, "/")
	if len(parts) != 3 {
		return nil // not a place for a blob, so nobody's business
	}
	d := digest.NewDigestFromEncoded(digest.Algorithm(parts[1]), parts[2])
	if err := checkDigest(d); err != nil {
		return fmt.Errorf("%w: archive entry %q: %w", ErrInvalidLayout, clip(name), err)
	}
	if err := put(d, src, h.Size); err != nil {
		return fmt.Errorf("archive entry %q: %w", clip(name), err)
	}
	return nil
}

// decompressed looks at the first bytes and returns the tar stream.
func decompressed(src io.Reader) (*tarStream, error) {
	br := bufio.NewReaderSize(src, 64<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	for magic, format := range map[string]string{
		"\x28\xb5\x2f\xfd": "zstd", "\xfd7zXZ\x00": "xz", "BZh": "bzip2", "PK\x03\x04": "zip",
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return nil, fmt.Errorf("%w: archive is compressed as %s; plain tar and gzip are taken", ErrUnsupportedMediaType, format)
		}
	}
	if !bytes.HasPrefix(head, []byte("\x1f\x8b")) {
		return &tarStream{src: br}, nil
	}
	in := &countingReader{src: br}
	z, err := gzip.NewReader(bufio.NewReader(in))
	if err != nil {
		return nil, archiveError(err)
	}
	return &tarStream{src: z, in: in}, nil
}

type countingReader struct {
	src io.Reader
	n   int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.src.Read(p)
	c.n += int64(n)
	return n, err
}

// tarStream is a tar. From a gzip stream, it ends with [ErrTooLarge] when what it has
// beside its blobs is out of all proportion to the input.
type tarStream struct {
	src   io.Reader
	in    *countingReader // what gzip reads; nil for a plain tar
	out   int64
	blobs int64 // bytes of out that are, or will be, those of blobs
}

func (s *tarStream) Read(p []byte) (int, error) {
	n, err := s.src.Read(p)
	s.out += int64(n)
	if more := s.out - s.blobs; s.in != nil && more > gzipRatioFreeBy && more/maxGzipRatio > s.in.n {
		return 0, fmt.Errorf("%w: gzip stream grows more than %d-fold beside its blobs", ErrTooLarge, maxGzipRatio)
	}
	return n, err
}

// end reads on from the end of the tar, which need not be that of the stream: whoever
// writes it may have more to say, and gzip's checksum comes last.
func (s *tarStream) end() error {
	n, err := io.Copy(io.Discard, io.LimitReader(s, maxArchiveTail))
	if err == nil && n == maxArchiveTail && s.in != nil {
		err = fmt.Errorf("%w: gzip stream goes on for %d bytes after the archive's end", ErrTooLarge, n)
	}
	return err
}
