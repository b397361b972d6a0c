package ocilocal

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportOptions say what an export holds besides the artifacts of its refs, and
// how it is written. Nil is the zero value.
type ExportOptions struct {
	// Digests are manifests to export as well, without a name.
	Digests []digest.Digest
	// Lineage adds the subject of each artifact, that one's subject, and so on
	// to the end of the chain, without a name. All of it must be there.
	Lineage bool
	// Referrers adds every manifest whose subject is a manifest of the export, such as a
	// signature of an artifact, then those whose subject is one of these, and
	// so on, each with all it needs. They are listed in index.json
	// without a name, even where refs point at them.
	Referrers bool
	// Gzip compresses an archive. A layout directory is never compressed.
	Gzip bool
	// Overwrite lets [LocalRegistry.ExportArchiveFile] replace a file, and
	// [LocalRegistry.ExportLayout] a name that stands for another digest.
	Overwrite bool
}

// ExportArchive writes the artifacts that refs name, with all they need, to dst as an OCI
// archive: oci-layout and index.json first, where every entry carries its full name,
// then manifests, then the other blobs. Equal content gives equal bytes (entries are
// sorted, times are zero), gzipped ones by the same version of Go only.
//
// Errors: [ErrNotFound] for a ref that doesn't resolve, or for a blob that was
// collected meanwhile, [ErrIncomplete] for a lineage with a gap, [ErrTooLarge] for more
// artifacts than an index.json can list, [ErrInvalidDigest] for one of ExportOptions.Digests,
// [ErrDigestMismatch], [ErrSizeMismatch], [ErrClosed], ctx's, and
// dst's. After an error what was written is no archive.
func (r *LocalRegistry) ExportArchive(ctx context.Context, dst io.Writer, refs []Reference, opts *ExportOptions) error {
	x, err := r.newExport(ctx, refs, opts)
	if err == nil {
		err = x.archive(ctx, dst)
	}
	return opError("export archive", "", "", err)
}

// ExportArchiveFile is [LocalRegistry.ExportArchive] to a file, which has its name
// only when it is complete and its bytes are on disk. It fails with [ErrExists] if the name
// is taken and ExportOptions.Overwrite isn't set; a symbolic link there
// is replaced, never followed. Where the file system has no hard links, looking for
// the name and taking it are two steps, and a file that another process makes in between
// is replaced. A killed process leaves a file beside it whose name begins with ".ocilocal-".
func (r *LocalRegistry) ExportArchiveFile(ctx context.Context, name string, refs []Reference, opts *ExportOptions) error {
	return opError("export archive", name, "", r.exportArchiveFile(ctx, name, refs, opts))
}

func (r *LocalRegistry) exportArchiveFile(ctx context.Context, name string, refs []Reference, opts *ExportOptions) (err error) {
	x, err := r.newExport(ctx, refs, opts)
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
	return writeNew(dir, ".ocilocal-"+rand.Text(), filepath.Base(name), x.opts.Overwrite, func(w io.Writer) error { return x.archive(ctx, w) })
}

// writeNew makes a file in dir that has its name only when it is complete and
// durable. Until then it is called temp.
func writeNew(dir *rootDir, temp, name string, overwrite bool, write func(io.Writer) error) (err error) {
	if _, err := dir.Lstat(name); err == nil && !overwrite {
		return ErrExists
	}
	f, err := dir.openFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.sync()
	}
	err = errors.Join(err, f.Close())
	switch {
	case err != nil:
	case overwrite:
		err = dir.Rename(temp, name)
	default:
		if _, err = dir.linkNew(temp, name); errors.Is(err, fs.ErrExist) {
			err = ErrExists
		}
	}
	if rm := dir.Remove(temp); !errors.Is(rm, fs.ErrNotExist) {
		err = errors.Join(err, rm)
	}
	if err != nil {
		return err
	}
	return dir.syncDir(".")
}

// export is the list of what one export holds, each manifest and blob once.
type export struct {
	closure // its lists are sorted by digest in the end
	opts    ExportOptions
	entries []ocispec.Descriptor   // of index.json, sorted
	entered map[digest.Digest]bool // entries
}

// newExport gathers the closure of what is exported from the manifests.
func (r *LocalRegistry) newExport(ctx context.Context, refs []Reference, opts *ExportOptions) (*export, error) {
	x := &export{closure: r.newClosure(), entered: map[digest.Digest]bool{}}
	if opts != nil {
		x.opts = *opts
	}
	if len(refs) == 0 && len(x.opts.Digests) == 0 {
		return nil, fmt.Errorf("%w: nothing was chosen to be exported", ErrInvalidArgument)
	}
	for _, ref := range slices.Compact(slices.SortedFunc(slices.Values(refs), Reference.Compare)) {
		desc, err := r.resolve(ctx, ref)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ref, err)
		}
		name := map[string]string{ocispec.AnnotationRefName: ref.String()}
		if err := x.root(ctx, desc, name); err != nil {
			return nil, err
		}
	}
	for _, d := range slices.Compact(slices.Sorted(slices.Values(x.opts.Digests))) {
		desc, err := r.ResolveDigest(ctx, d)
		if err != nil {
			return nil, err
		}
		if err := x.root(ctx, desc, nil); err != nil {
			return nil, err
		}
	}
	if x.opts.Referrers {
		if err := x.referrers(ctx); err != nil {
			return nil, err
		}
	}
	x.sort()
	return x, nil
}

// root adds an entry with its closure, and with its lineage if that is asked for.
func (x *export) root(ctx context.Context, desc ocispec.Descriptor, annotations map[string]string) error {
	for {
		var m *Manifest
		if err := x.registry.within(ctx, func() (err error) {
			m, err = x.add(ctx, desc)
			return err
		}); err != nil {
			return err
		}
		walked := x.entered[desc.Digest]
		if annotations != nil || !walked {
			x.entered[desc.Digest] = true
			desc.Annotations = annotations
			x.entries = append(x.entries, desc)
		}
		subject, ok := m.Subject()
		if !x.opts.Lineage || !ok || walked {
			return nil
		}
		parent, err := x.registry.ResolveDigest(ctx, subject.Digest)
		if errors.Is(err, ErrNotFound) {
			return fmt.Errorf("%w: %s, the subject of %s, is not in the registry", ErrIncomplete, subject.Digest, desc.Digest)
		}
		if err != nil {
			return err
		}
		desc, annotations = parent, nil
	}
}

// referrers adds what refers to any of the manifests, these included.
func (x *export) referrers(ctx context.Context) error {
	for i := 0; i < len(x.manifests); i++ { // it grows
		subject := x.manifests[i].Digest
		for desc, err := range x.registry.Referrers(ctx, subject, nil) {
			if err == nil {
				err = x.root(ctx, desc, nil)
			}
			if err != nil {
				return fmt.Errorf("referrers of %s: %w", subject, err)
			}
		}
	}
	return nil
}

// sort puts the lists into the order that only the content decides.
func (x *export) sort() {
	named := map[digest.Digest]bool{}
	for _, e := range x.entries {
		named[e.Digest] = named[e.Digest] || e.Annotations != nil
	}
	x.entries = slices.DeleteFunc(x.entries, func(e ocispec.Descriptor) bool { return e.Annotations == nil && named[e.Digest] })
	byDigest := func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) }
	slices.SortFunc(x.manifests, byDigest)
	slices.SortFunc(x.blobs, byDigest)
	slices.SortStableFunc(x.entries, func(a, b ocispec.Descriptor) int {
		if c := strings.Compare(a.Annotations[ocispec.AnnotationRefName], b.Annotations[ocispec.AnnotationRefName]); c != 0 {
			return c
		}
		return byDigest(a, b)
	})
}

const layoutFile = `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`

// index returns the bytes of index.json.
func (x *export) index() ([]byte, error) {
	var w canonicalWriter
	w.raw("{")
	w.descriptors("manifests", x.entries)
	w.field("mediaType", ocispec.MediaTypeImageIndex)
	w.key("schemaVersion")
	w.int(2)
	w.raw("}")
	if w.err == nil && len(w.buf) > MaxLayoutIndexSize {
		w.err = fmt.Errorf("%w: index.json of %d artifacts would have %d bytes, at most %d are taken",
			ErrTooLarge, len(x.entries), len(w.buf), MaxLayoutIndexSize)
	}
	return w.buf, w.err
}

// archive writes all of it as a tar.
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

func (x *export) tar(ctx context.Context, dst io.Writer, index []byte) error {
	tw := tar.NewWriter(dst)
	if err := writeEntry(tw, ocispec.ImageLayoutFile, strings.NewReader(layoutFile), int64(len(layoutFile))); err != nil {
		return err
	}
	if err := writeEntry(tw, ocispec.ImageIndexFile, bytes.NewReader(index), int64(len(index))); err != nil {
		return err
	}
	for _, d := range slices.Concat(x.manifests, x.blobs) {
		src, err := x.registry.OpenBlob(ctx, d)
		if err != nil {
			return err
		}
		if err := errors.Join(writeEntry(tw, blobPath(d.Digest), src, d.Size), src.Close()); err != nil {
			return err
		}
	}
	return tw.Close()
}

func writeEntry(tw *tar.Writer, name string, src io.Reader, size int64) error {
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o444})
	if err == nil {
		_, err = io.Copy(tw, src)
	}
	return err
}
