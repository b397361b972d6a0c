package ocilocal

import (
	"archive/tar"
	"compress/flate"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
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
	// A blob may shrink as well as deflate can, 1032-fold: a layer of zeros does, and
	// comes in as it went out. What a gzip stream has beside its blobs may not: there is
	// no use for it. The first bytes are free because they hurt nobody.
	maxGzipRatio    = 200
	gzipRatioFreeBy = 64 << 20
	// Tools fill up the last record of a tar, by default with up to 10 KiB.
	maxArchiveTail = 16 << 20
)

// ImportArchive imports an OCI archive (a layout directory as a tar, plain or
// gzipped, such as OMMX's .ommx) from a stream. Its files may come in any order, and oci-layout may
// be missing. Blobs go straight into the store; those that no chosen manifest needs are dropped.
// A blob that the registry has is read and compared, and not written. Every entry of index.json
// keeps its bytes and digest.
//
// After the end of the archive, src is read to its own end, or for 16 MiB, so that its writer can
// finish. A blob may shrink to nearly nothing under gzip; the rest of a gzipped archive may not.
//
// Either everything is published or nothing, except entries whose refs are kept: see
// [ImportResult.Conflicts].
//
// Errors:
//   - [*ConflictError], together with the result, if the only entry conflicts
//   - [ErrInvalidLayout], [ErrInvalidManifest], [ErrIncomplete], [ErrDigestMismatch],
//     [ErrSizeMismatch], [ErrUnsupportedMediaType], [ErrTooLarge]: the content
//   - [ErrNotFound], [ErrInvalidArgument], [ErrBareName]: options that fit no entry
//   - [ErrArtifactType]: a type that [Options.ArtifactTypes] does not have
//   - [ErrReadOnly], [ErrBusy], [ErrNoSpace], [ErrClosed]
//   - any error from ctx, src or the file system
func (r *LocalRegistry) ImportArchive(ctx context.Context, src io.Reader, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchive(ctx, src, opts)
	return result, opError("import archive", "", "", err)
}

// ImportArchiveFile is [LocalRegistry.ImportArchive] from a regular file. The registry's
// own index, and anything else than a regular file, is [ErrInvalidArgument].
func (r *LocalRegistry) ImportArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchiveFile(ctx, name, opts)
	return result, opError("import archive", name, "", err)
}

func (r *LocalRegistry) importArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	f, err := r.openOther(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return r.importArchive(ctx, f, opts)
}

func (r *LocalRegistry) importArchive(ctx context.Context, src io.Reader, opts *ImportOptions) (*ImportResult, error) {
	if opts == nil {
		opts = &ImportOptions{}
	}
	return attend(ctx, opts.Progress, opts.Reference, func(ctx context.Context, m *meter) (*ImportResult, error) {
		return r.importArchiveMetered(ctx, src, opts, m)
	})
}

func (r *LocalRegistry) importArchiveMetered(ctx context.Context, src io.Reader, opts *ImportOptions, m *meter) (*ImportResult, error) {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	im := r.newImporter(opts)
	im.meter = m
	im.meter.phase(PhaseRead)
	defer func() { r.logDiscard(im.stage.discard()) }()
	im.mayLack = func(digest.Digest) (bool, error) { return true, nil }
	im.fetch = func(_ context.Context, desc ocispec.Descriptor, _ role, _ *meteredItem) error {
		return fmt.Errorf("%w: blob %s (%s) is neither in the archive nor in the registry", ErrIncomplete, desc.Digest, printable(desc.MediaType))
	}
	blobs := newArchiveBlobs(ctx, im)
	contents, err := readArchive(ctx, src, blobs.put)
	if err = blobs.wait(err); err != nil {
		return nil, err
	}
	index, err := contents.index()
	if err != nil {
		return nil, err
	}
	return im.run(ctx, index)
}

// InspectArchive lists the entries of an archive and counts its blobs, without a registry. It
// verifies nothing. If src can seek and is not compressed, blobs are not read.
// Errors: those of [LocalRegistry.ImportArchive] that concern the archive's form.
func InspectArchive(ctx context.Context, src io.Reader) (*Inspection, error) {
	in, err := inspectArchive(ctx, src)
	return in, opError("inspect archive", "", "", err)
}

func inspectArchive(ctx context.Context, src io.Reader) (*Inspection, error) {
	counted := &Inspection{}
	contents, err := readArchive(ctx, src, func(_ context.Context, _ digest.Digest, _ io.Reader, size int64) error {
		counted.Blobs++
		counted.Bytes += size
		return nil
	})
	if err != nil {
		return nil, err
	}
	index, err := contents.index()
	if err != nil {
		return nil, err
	}
	in := newInspection(index.entries)
	in.Blobs, in.Bytes = counted.Blobs, counted.Bytes
	return in, nil
}

// archiveContents is what an archive has beside its blobs.
type archiveContents struct {
	files    map[string][]byte // index.json and oci-layout
	isDocker bool              // it has what `docker save` writes
}

// index returns the entries of index.json.
func (c *archiveContents) index() (*layoutIndex, error) {
	if raw, ok := c.files[ocispec.ImageLayoutFile]; ok {
		if err := checkLayoutFile(raw); err != nil {
			return nil, err
		}
	}
	raw, ok := c.files[ocispec.ImageIndexFile]
	switch {
	case !ok && c.isDocker:
		return nil, fmt.Errorf("%w: this is a `docker save` archive without an OCI index.json (save it as oci-archive)", ErrUnsupportedMediaType)
	case !ok:
		return nil, fmt.Errorf("%w: archive has no index.json", ErrInvalidLayout)
	}
	return parseLayoutIndex(raw)
}

// readArchive gives every blob of an archive to put and returns the rest. put need not read all.
// Entries that have no meaning in a layout are passed over, whatever their form.
func readArchive(ctx context.Context, src io.Reader, put func(ctx context.Context, d digest.Digest, src io.Reader, size int64) error) (*archiveContents, error) {
	stream, err := openTarStream(ctx, src)
	if err != nil {
		return nil, archiveError(err)
	}
	c := &archiveContents{files: map[string][]byte{}}
	tr := &tarReader{src: stream}
	for n := 0; ; n++ {
		e, err := tr.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, archiveError(err)
		}
		if n >= MaxArchiveEntries {
			return nil, fmt.Errorf("%w: archive has more than %d entries", ErrTooLarge, MaxArchiveEntries)
		}
		name, err := e.layoutName()
		if err != nil {
			return nil, err
		}
		switch d := blobOf(name); {
		case name == ocispec.ImageIndexFile || name == ocispec.ImageLayoutFile:
			err = c.add(name, tr, e.size)
		case d != "":
			stream.blobs += e.size
			if err = put(ctx, d, tr, e.size); err != nil {
				err = fmt.Errorf("archive entry %s: %w", printable(name), err)
			}
		case name == "manifest.json":
			c.isDocker = true
		}
		if err != nil {
			return nil, archiveError(err)
		}
	}
	if err := stream.end(); err != nil {
		return nil, archiveError(err)
	}
	return c, nil
}

// add keeps one of the two files that a layout has beside its blobs.
func (c *archiveContents) add(name string, src io.Reader, size int64) error {
	if c.files[name] != nil {
		return fmt.Errorf("%w: archive has %s twice", ErrInvalidLayout, name)
	}
	if size > MaxLayoutIndexSize {
		return fmt.Errorf("%w: %s has %d bytes, at most %d are taken", ErrTooLarge, name, size, MaxLayoutIndexSize)
	}
	raw, err := io.ReadAll(src)
	c.files[name] = append([]byte{}, raw...) // not nil
	return err
}

// archiveError gives errors of the tar and gzip readers their sentinel.
func archiveError(err error) error {
	if _, bad := errors.AsType[flate.CorruptInputError](err); bad || err == io.EOF || errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) ||
		errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: archive is damaged or cut off: %w", ErrInvalidLayout, err)
	}
	return err
}

// layoutName returns the name that an entry has in a layout, and "" for an entry that means
// nothing there. Programs that unpack archives clean names in different ways. So a name that any of
// them could turn into one with a meaning must be that name already, except for "./" and "//".
func (e *tarEntry) layoutName() (string, error) {
	plain := path.Clean(e.name)
	if e.kind == tar.TypeReg && !e.sparse && plain == "manifest.json" {
		return plain, nil
	}
	if !inLayout(plain) && !inLayout(unpackedName(e.name)) && !inLayout(unpackedName(e.alias)) {
		return "", nil
	}
	isDir := plain == blobsDir || path.Dir(plain) == blobsDir
	problem := ""
	switch {
	case isDir && e.kind == tar.TypeDir:
		return "", nil
	case isDir:
		problem = "is not a directory"
	case e.sparse:
		problem = "is sparse"
	case e.kind != tar.TypeReg:
		problem = fmt.Sprintf("is not a regular file (type %q)", e.kind)
	case e.odd || !inLayout(plain) || strings.ContainsAny(e.name, "\x00\\") || slices.Contains(strings.Split(e.name, "/"), "..") || strings.HasSuffix(e.name, "/"):
		problem = "has a name that not all programs unpack alike"
	default:
		return plain, nil
	}
	return "", fmt.Errorf("%w: archive entry %s %s", ErrInvalidLayout, printable(e.name), problem)
}

// inLayout reports whether a clean name means something in a layout.
func inLayout(name string) bool {
	switch dir, base := path.Split(name); dir {
	case "":
		return name == ocispec.ImageIndexFile || name == ocispec.ImageLayoutFile || name == blobsDir
	case blobsDir + "/":
		return digestHexLen(digest.Algorithm(base)) != 0
	}
	return blobOf(name) != ""
}

// unpackedName is the most that a program could make of an entry's name.
func unpackedName(name string) string {
	name, _, _ = strings.Cut(name, "\x00")
	return strings.TrimPrefix(path.Clean("/"+strings.ReplaceAll(name, "\\", "/")), "/")
}

// blobOf returns the digest that a clean name in a layout promises, "" if it promises none: then
// no descriptor can ask for it.
func blobOf(name string) digest.Digest {
	rest, ok := strings.CutPrefix(name, blobsDir+"/")
	alg, encoded, ok2 := strings.Cut(rest, "/")
	d := digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded)
	if !ok || !ok2 || checkDigest(d) != nil {
		return ""
	}
	return d
}
