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

// How an archive comes in. Its files may stand in any order, and a stream cannot be rewound. So the
// import does not know which blobs it needs while it reads them:
//
//	src ─ gunzip ─ tarReader ─ readArchive ┬ index.json, oci-layout: into memory, bounded
//	                                       ├ blobs/<alg>/<hex>: archiveBlobs, into the stage
//	                                       └ everything else: skipped
//	after the last byte: importer.run chooses entries, drops the other blobs, and publishes
//
// Until the publish, nothing is visible, and all bytes lie below tmp/. An archive that breaks off
// therefore leaves nothing, and a hostile one can cost only what ImportOptions.MaxBytes and
// the limits below allow.

// Limits of what an archive may hold.
const (
	// MaxArchiveEntries is the largest number of entries in an archive.
	MaxArchiveEntries = 1_000_000
	// maxGzipRatio bounds how far a gzip stream may expand outside its blobs. Blobs are exempt:
	// deflate shrinks a layer of zeros 1032-fold, and such a layer must come in as it went out.
	// Headers and other files of an archive do not compress so well, unless they are a bomb.
	maxGzipRatio = 200
	// gzipRatioFreeBy is how many bytes outside blobs are accepted at any ratio. So few cost little
	// time, and a short stream may reach a high ratio by chance.
	gzipRatioFreeBy = 64 << 20
	// maxArchiveTail is how many bytes are read after the tar's end. Tools pad the last record of a
	// tar, by default to 10 KiB.
	maxArchiveTail = 16 << 20
)

// ImportArchive imports an OCI archive from a stream: a layout directory as a tar, plain or
// gzipped, such as OMMX's .ommx. Its files may come in any order, and oci-layout may be missing.
// Blobs go straight into the store; those that no chosen manifest needs are dropped. A blob that
// the registry has is read and compared, and not written. Every entry of index.json keeps its bytes
// and digest.
//
// After the end of the archive, src is read to its own end, or for 16 MiB, so that its writer can
// finish. A blob may be compressed to almost nothing by gzip. The other bytes of the archive may be
// compressed 200-fold at most.
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
	result, err := r.importArchive(ctx, src, nil, opts)
	return result, opError("import archive", "", "", err)
}

// ImportArchiveFile is [LocalRegistry.ImportArchive] from a regular file. It returns
// [ErrInvalidArgument] for the registry's own index, and for a name that is not a regular file.
func (r *LocalRegistry) ImportArchiveFile(ctx context.Context, name string, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importArchiveFile(ctx, name, opts)
	return result, opError("import archive", name, "", err)
}

// importArchiveFile is ImportArchiveFile for callers that name the operation themselves. The call
// begins here, before the file is opened, because openOther compares it with the open index.
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
	return r.importArchive(ctx, f, f, opts)
}

// importArchive is ImportArchive for callers that name the operation themselves. If file is not
// nil, it is src, and can be read again.
func (r *LocalRegistry) importArchive(ctx context.Context, src io.Reader, file io.ReadSeeker, opts *ImportOptions) (*ImportResult, error) {
	if opts == nil {
		opts = &ImportOptions{}
	}
	return attend(ctx, opts.Progress, opts.Reference, func(ctx context.Context, m *meter) (*ImportResult, error) {
		return r.importArchiveMetered(ctx, src, file, opts, m)
	})
}

// importArchiveMetered reads the whole archive into a stage, and then runs an importer whose source
// is that stage. So fetch finds nothing: a blob that the importer has to fetch is in neither the
// archive nor the registry. Every member of an image index may be absent, as the archive of one
// platform leaves out the others.
func (r *LocalRegistry) importArchiveMetered(ctx context.Context, src io.Reader, file io.ReadSeeker, opts *ImportOptions, m *meter) (*ImportResult, error) {
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
	if file != nil {
		im.mayRepeat(func(ctx context.Context, blobs map[digest.Digest]int64) error {
			return im.readAgain(ctx, file, blobs)
		})
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

// readAgain stages blobs from an archive that was read before.
func (im *importer) readAgain(ctx context.Context, archive io.ReadSeeker, blobs map[digest.Digest]int64) error {
	if len(blobs) == 0 {
		return nil
	}
	if _, err := archive.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := readArchive(ctx, archive, func(ctx context.Context, d digest.Digest, src io.Reader, size int64) error {
		if want, ok := blobs[d]; !ok || size != want || im.stage.has(d) {
			return nil
		}
		_, _, err := im.stage.put(ctx, src, "", d, size)
		return err
	})
	return err
}

// InspectArchive lists the entries of an archive and counts its blobs, without a registry. It
// verifies nothing. If src can seek and is not compressed, blobs are not read.
//
// Errors: [ErrInvalidLayout], [ErrUnsupportedMediaType], [ErrTooLarge], and any error from ctx or
// src.
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

// archiveContents are the files of an archive that are not blobs.
type archiveContents struct {
	files    map[string][]byte // index.json and oci-layout
	isDocker bool              // it has the file manifest.json, which `docker save` writes
	deeper   string            // the name of an index.json in a directory; "" if there is none
}

// index returns the entries of index.json. It is called after the whole archive was read, since
// index.json may be its last file. Docker before version 25 wrote no index.json, so an archive with
// only a manifest.json gets an error that says how to save it.
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
	case !ok && c.deeper != "":
		return nil, fmt.Errorf("%w: archive has %s, but no index.json at its top (make the archive in the directory of the layout)", ErrInvalidLayout, printable(c.deeper))
	case !ok:
		return nil, fmt.Errorf("%w: archive has no index.json", ErrInvalidLayout)
	}
	return parseLayoutIndex(raw)
}

// readArchive gives every blob of an archive to put and returns the rest. put need not read to the
// end: the next entry is found by the size in the header. Entries that have no meaning in a layout
// are skipped, whatever their form.
//
// stream.blobs grows before put reads the blob. Otherwise the first bytes of a blob that compresses
// well would count as bytes outside blobs, and exceed maxGzipRatio.
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
			if err = archiveError(err); n == 0 && errors.Is(err, ErrInvalidLayout) {
				err = fmt.Errorf("%w (the file may not be a tar)", err)
			}
			return nil, err
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
		case c.deeper == "" && path.Base(e.name) == ocispec.ImageIndexFile:
			c.deeper = e.name
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

// add keeps index.json or oci-layout. A second file of the same name is refused, because programs
// differ in which of the two they use. The limit holds for the size in the header, which is also as
// much as src can return. An empty file is kept as well, so that it counts as present.
func (c *archiveContents) add(name string, src io.Reader, size int64) error {
	if c.files[name] != nil {
		return fmt.Errorf("%w: archive has %s twice", ErrInvalidLayout, name)
	}
	if size > MaxLayoutIndexSize {
		return fmt.Errorf("%w: %s has %d bytes, the limit is %d", ErrTooLarge, name, size, MaxLayoutIndexSize)
	}
	raw, err := io.ReadAll(src)
	c.files[name] = append([]byte{}, raw...) // not nil
	return err
}

// archiveError gives errors of the tar and gzip readers their sentinel. io.EOF is one of them,
// since readArchive handles the regular end of an archive itself. An error that already matches a
// sentinel, or that comes from src or the file system, stays as it is.
func archiveError(err error) error {
	if _, bad := errors.AsType[flate.CorruptInputError](err); bad || err == io.EOF || errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) ||
		errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: archive is damaged or cut off: %w", ErrInvalidLayout, err)
	}
	return err
}

// layoutName returns the name that an entry has in a layout, and "" for an entry that has no
// meaning there.
//
// The problem: programs that unpack archives clean names in different ways. One reads a\b as a/b,
// one drops "..", one stops at a NUL. So an archive could have one index.json for a scanner and
// another one for this package.
//
// The rule: if any program could turn a name into one that a layout uses, the entry must be a
// regular file (or directory) that has exactly this name. Only "./" and "//" are cleaned, because
// all programs clean them alike. Names that no program could turn into such a name may be anything.
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

// inLayout reports whether a layout uses a clean name: index.json, oci-layout, blobs, a directory
// of an algorithm that this package knows, or a blob in it.
func inLayout(name string) bool {
	switch dir, base := path.Split(name); dir {
	case "":
		return name == ocispec.ImageIndexFile || name == ocispec.ImageLayoutFile || name == blobsDir
	case blobsDir + "/":
		return digestHexLen(digest.Algorithm(base)) != 0
	}
	return blobOf(name) != ""
}

// unpackedName is the result of all cleaning that is known of programs that unpack: the name ends
// at a NUL, backslashes are slashes, and nothing leads out of the target directory.
func unpackedName(name string) string {
	name, _, _ = strings.Cut(name, "\x00")
	return strings.TrimPrefix(path.Clean("/"+strings.ReplaceAll(name, "\\", "/")), "/")
}

// blobOf returns the digest in a clean name of the form blobs/<alg>/<hex>, and "" for another name.
// A file whose digest this package does not accept is skipped: no descriptor can refer to it.
func blobOf(name string) digest.Digest {
	rest, ok := strings.CutPrefix(name, blobsDir+"/")
	alg, encoded, ok2 := strings.Cut(rest, "/")
	d := digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded)
	if !ok || !ok2 || checkDigest(d) != nil {
		return ""
	}
	return d
}
