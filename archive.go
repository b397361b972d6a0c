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
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits of what an archive may hold.
const (
	// MaxArchiveEntries is how many entries an archive may have.
	MaxArchiveEntries = 1_000_000
	// Layers of real artifacts shrink less than 20-fold, and deflate can't do
	// better than 1032:1, so a bomb lies between. The first bytes are free
	// because they hurt nobody.
	maxGzipRatio    = 200
	gzipRatioFreeBy = 64 << 20
)

// ImportArchive imports an OCI archive (a layout directory as a tar, plain or
// gzipped, such as OMMX's .ommx) from a stream: entries in any order, without
// oci-layout too. Blobs go straight into the store; those that no chosen
// manifest needs are dropped. Every entry of index.json keeps its bytes and digest.
//
// Either all is published or nothing. Errors: [ErrInvalidLayout],
// [ErrInvalidManifest], [ErrIncomplete], [ErrDigestMismatch],
// [ErrSizeMismatch], [ErrUnsupportedMediaType], [ErrTooLarge], [ErrNotFound]
// and [ErrInvalidArgument] for options that fit no entry, [*ConflictError] together
// with the result, ctx's, src's, and the file system's.
func (r *LocalRegistry) ImportArchive(ctx context.Context, src io.Reader, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchive(ctx, src, opts)
	return result, opError("import archive", "", "", err)
}

// ImportArchiveFile is [LocalRegistry.ImportArchive] from a regular file.
func (r *LocalRegistry) ImportArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchiveFile(ctx, name, opts)
	return result, opError("import archive", name, "", err)
}

func (r *LocalRegistry) importArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := checkRegular(f); err != nil {
		return nil, err
	}
	return r.importArchive(ctx, f, opts)
}

func (r *LocalRegistry) importArchive(ctx context.Context, src io.Reader, opts *ImportOptions) (_ *ImportResult, err error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if r.blobs.readOnly {
		return nil, ErrReadOnly
	}
	im := r.newImporter(opts)
	defer func() { r.logDiscard(im.stage.discard()) }()
	im.fetch = func(_ context.Context, desc ocispec.Descriptor) error {
		return fmt.Errorf("%w: blob %s (%s) is neither in the archive nor in the registry", ErrIncomplete, desc.Digest, clip(desc.MediaType))
	}
	index, err := readArchive(ctx, im.stage, src)
	if err != nil {
		return nil, err
	}
	return im.run(ctx, index)
}

// readArchive stages every blob of an archive and returns its index's entries.
func readArchive(ctx context.Context, st *stage, src io.Reader) ([]ocispec.Descriptor, error) {
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
			err = readBlob(ctx, st, tr, h, name)
		case name == "manifest.json":
			isDocker = true
		}
		if err != nil {
			return nil, archiveError(err)
		}
	}
	// The end of the tar is not the end of the stream: read on, so that a
	// gzip stream's checksum is verified.
	if _, err := st.store.copy(io.Discard, plain); err != nil {
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

// readBlob stages the blob that an entry's name promises.
func readBlob(ctx context.Context, st *stage, src io.Reader, h *tar.Header, name string) error {
	parts := strings.Split(name, "/")
	if len(parts) != 3 {
		return nil // not a place for a blob, so nobody's business
	}
	d := digest.NewDigestFromEncoded(digest.Algorithm(parts[1]), parts[2])
	if err := checkDigest(d); err != nil {
		return fmt.Errorf("%w: archive entry %q: %w", ErrInvalidLayout, clip(name), err)
	}
	if _, _, err := st.put(ctx, src, "", d, h.Size); err != nil {
		return fmt.Errorf("archive entry %q: %w", clip(name), err)
	}
	return nil
}

// decompressed looks at the first bytes and returns the tar stream.
func decompressed(src io.Reader) (io.Reader, error) {
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
		return br, nil
	}
	in := &countingReader{src: br}
	z, err := gzip.NewReader(bufio.NewReader(in))
	if err != nil {
		return nil, archiveError(err)
	}
	return &gzipReader{z: z, in: in}, nil
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

// gzipReader ends with [ErrTooLarge] when the output is out of all proportion to the input.
type gzipReader struct {
	z   *gzip.Reader
	in  *countingReader
	out int64
}

func (g *gzipReader) Read(p []byte) (int, error) {
	n, err := g.z.Read(p)
	g.out += int64(n)
	if g.out > gzipRatioFreeBy && g.out/maxGzipRatio > g.in.n {
		return 0, fmt.Errorf("%w: gzip stream grows more than %d-fold", ErrTooLarge, maxGzipRatio)
	}
	return n, err
}

// ExportArchive writes the artifacts that refs name, with all they need, to dst as an OCI
// archive: oci-layout and index.json first, where every entry carries its full name,
// then manifests, then the other blobs. Equal content gives equal bytes:
// entries are sorted, times are zero.
//
// Errors: [ErrNotFound] for a ref that doesn't resolve, or for a blob that was
// collected meanwhile, [ErrDigestMismatch], [ErrSizeMismatch], ctx's, and
// dst's. After an error what was written is no archive.
func (r *LocalRegistry) ExportArchive(ctx context.Context, dst io.Writer, refs ...Reference) error {
	return opError("export archive", "", "", r.exportArchive(ctx, dst, refs))
}

func (r *LocalRegistry) exportArchive(ctx context.Context, dst io.Writer, refs []Reference) error {
	x := &exporter{registry: r, seen: map[digest.Digest]bool{}}
	if len(refs) == 0 {
		return fmt.Errorf("%w: no reference was given", ErrInvalidArgument)
	}
	for _, ref := range slices.SortedFunc(slices.Values(refs), Reference.Compare) {
		desc, err := r.resolve(ctx, ref)
		if err != nil {
			return fmt.Errorf("%s: %w", ref, err)
		}
		if err := x.add(ctx, desc, 0); err != nil {
			return err
		}
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: ref.String()}
		x.entries = append(x.entries, desc)
	}
	var w canonicalWriter
	w.raw("{")
	w.descriptors("manifests", x.entries)
	w.field("mediaType", ocispec.MediaTypeImageIndex)
	w.key("schemaVersion")
	w.int(2)
	w.raw("}")
	if w.err != nil {
		return w.err
	}
	tw := tar.NewWriter(dst)
	if err := writeEntry(tw, ocispec.ImageLayoutFile, strings.NewReader(layoutFile), int64(len(layoutFile))); err != nil {
		return err
	}
	if err := writeEntry(tw, ocispec.ImageIndexFile, bytes.NewReader(w.buf), int64(len(w.buf))); err != nil {
		return err
	}
	for _, group := range [][]ocispec.Descriptor{x.manifests, x.blobs} {
		slices.SortFunc(group, func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
		for _, d := range group {
			if err := x.write(ctx, tw, d); err != nil {
				return err
			}
		}
	}
	return tw.Close()
}

const layoutFile = `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`

// exporter gathers the closure of what is exported, each blob once.
type exporter struct {
	registry  *LocalRegistry
	entries   []ocispec.Descriptor
	manifests []ocispec.Descriptor
	blobs     []ocispec.Descriptor
	seen      map[digest.Digest]bool
}

func (x *exporter) add(ctx context.Context, desc ocispec.Descriptor, depth int) error {
	if depth > MaxIndexNesting {
		return fmt.Errorf("%w: image indexes nested more than %d deep", ErrTooLarge, MaxIndexNesting)
	}
	if x.seen[desc.Digest] {
		return nil
	}
	x.seen[desc.Digest] = true
	m, err := x.registry.newArtifact(Reference{}, desc, nil).manifest(ctx)
	if err != nil {
		return err
	}
	x.manifests = append(x.manifests, desc)
	for i, c := range m.children() {
		if m.childRole(i) == roleManifest {
			if err := x.add(ctx, c, depth+1); err != nil {
				return err
			}
		} else if !x.seen[c.Digest] {
			x.seen[c.Digest] = true
			x.blobs = append(x.blobs, c)
		}
	}
	return nil
}

func (x *exporter) write(ctx context.Context, tw *tar.Writer, d ocispec.Descriptor) error {
	src, err := x.registry.OpenBlob(ctx, d)
	if err != nil {
		return err
	}
	defer src.Close()
	return writeEntry(tw, "blobs/"+string(d.Digest.Algorithm())+"/"+d.Digest.Encoded(), src, d.Size)
}

func writeEntry(tw *tar.Writer, name string, src io.Reader, size int64) error {
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o444})
	if err == nil {
		_, err = io.Copy(tw, src)
	}
	return err
}
