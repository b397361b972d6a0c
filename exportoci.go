package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Temporary names in a layout directory. They exist only while an export runs, or after it was
// killed.
const (
	layoutTmp  = ".ocilocal-tmp" // the lock, and the directory of blobs that are being copied
	layoutTemp = ".ocilocal-new" // oci-layout or index.json while it is being written
)

// ExportLayout writes the artifacts that refs name, with everything that they need, into an OCI
// image layout directory. The directory is created, or content is added to it. Files and entries of
// other tools are kept. A good blob in the directory is not written again, and a damaged one is
// replaced. index.json is replaced last, in one step, when everything else is on disk. Exports of
// this package into one directory wait for each other. Other tools do not wait. Entries that one
// adds while blobs are copied are kept. A change in the moment of the replacement is lost, so no
// other tool should write to the directory meanwhile.
//
// After an error, index.json is usually as it was. It is new if the error came after the
// replacement, for example because the directory could not be synced. The next export into the
// directory removes the files that a killed one has left.
//
// Errors:
//   - [ErrExists]: a name in the directory has another digest, and ExportOptions.Overwrite is not
//     set
//   - [ErrInvalidLayout]: the directory is not empty and not a layout, or the layout is malformed
//   - those of [LocalRegistry.ExportArchive]
func (r *LocalRegistry) ExportLayout(ctx context.Context, dir string, refs []Reference, opts *ExportOptions) (err error) {
	defer addOp(&err, "export layout", dir, "")
	if opts == nil {
		opts = &ExportOptions{}
	}
	_, err = attend(ctx, opts.Progress, Reference{}, func(ctx context.Context, m *meter) (struct{}, error) {
		return struct{}{}, r.exportLayout(ctx, dir, refs, opts, m)
	})
	return err
}

// exportLayout writes into a directory in this order, with the directory locked:
//
//	check    the directory is not in the registry; it is a layout, or empty
//	addTo    the new index.json, in memory: a conflict ends the export before any copy
//	blobs    staged in layoutTmp, synced, linked into blobs/
//	version  oci-layout, if it is missing
//	addTo    again, since another tool may have changed index.json during the copies
//	index    index.json, by rename
//
// A kill at any point leaves a valid layout with the old index.json, some more blobs, and perhaps
// the temporary names. An oci-layout without an index.json is recognised by prepareLayout.
func (r *LocalRegistry) exportLayout(ctx context.Context, dir string, refs []Reference, opts *ExportOptions, m *meter) (err error) {
	x, err := r.newExport(ctx, refs, opts, m)
	if err != nil {
		return err
	}
	if err := r.checkTarget(dir, blobsDir, path.Join(blobsDir, string(digest.SHA256)), layoutTmp); err != nil {
		return err
	}
	if err := mkdirAllSync(dir, 0o755, r.root.fault); err != nil {
		return err
	}
	root, err := openRoot(dir, r.root.fault)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	release, err := lockLayout(ctx, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	l := &layout{root: root}
	if err := prepareLayout(ctx, l); err != nil {
		return err
	}
	added, err := x.index()
	if err != nil {
		return err
	}
	if _, err := x.addTo(l, added); err != nil {
		return err
	}
	if err := x.writeBlobs(ctx, root); err != nil {
		return err
	}
	m.phase(PhasePublish)
	version, err := l.has(ocispec.ImageLayoutFile)
	if err != nil {
		return err
	}
	if !version {
		if err := writeLayoutFile(root, ocispec.ImageLayoutFile, []byte(layoutFile)); err != nil {
			return err
		}
	}
	index, err := x.addTo(l, added)
	if err != nil {
		return err
	}
	return writeLayoutFile(root, ocispec.ImageIndexFile, index)
}

// writeLayoutFile replaces a file of the layout. layoutTemp is fixed, because the directory is
// locked. A file that a killed export has left there is removed first. Anything else under that
// name is not this package's, and is an error.
func writeLayoutFile(root *rootDir, name string, b []byte) error {
	if fi, err := root.Lstat(layoutTemp); err == nil && !fi.Mode().IsRegular() {
		return fmt.Errorf("%w: %s exists and is not a regular file, as an export leaves it", ErrInvalidLayout, layoutTemp)
	}
	if err := ignoreNotExist(root.Remove(layoutTemp)); err != nil {
		return err
	}
	return writeNew(root, layoutTemp, name, true, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

// lockLayout keeps other exports out of a layout directory, also those of other processes.
//
// The problem: everybody who can open a directory can lock it. A user who may only read the layout
// could stop its writer.
//
// The rule: the lock is on layoutTmp, which only its owner can open. release removes layoutTmp
// while it still holds the lock. An export that was waiting for the lock then finds that the name
// is gone, and makes another directory.
//
// It is safe after a kill, because the lock ends with the process: the next export takes over the
// directory and removes the files in it.
func lockLayout(ctx context.Context, root *rootDir) (release func() error, err error) {
	if fi, err := root.Lstat(layoutTmp); err == nil && !fi.IsDir() {
		return nil, fmt.Errorf("%w: %s is not a directory", ErrInvalidLayout, layoutTmp)
	}
	unlock, err := root.lockDir(ctx, layoutTmp)
	if err != nil {
		return nil, err
	}
	store := newBlobStore(root, true)
	store.tmp = layoutTmp
	return func() error {
		_ = store.sweep() // files of exports that were killed
		_ = root.Remove(path.Join(layoutTmp, lockFile))
		err := root.Remove(layoutTmp)
		if errors.Is(err, fs.ErrExist) { // it is not empty: other files in it are not this package's
			err = nil
		}
		return errors.Join(err, unlock())
	}, nil
}

// prepareLayout checks that l is a layout, or that it may become one. Then it has no index.json, and
// no entries except those of an export that was interrupted.
func prepareLayout(ctx context.Context, l *layout) error {
	version, err := l.has(ocispec.ImageLayoutFile)
	if err == nil && version {
		err = l.check()
	}
	if err != nil {
		return err
	}
	if index, err := l.has(ocispec.ImageIndexFile); err != nil || index {
		return err
	}
	ours := []string{blobsDir, layoutTmp, layoutTemp, ocispec.ImageLayoutFile}
	return l.root.eachEntry(ctx, ".", func(name string) error {
		if !slices.Contains(ours, name) {
			return fmt.Errorf("%w: the directory holds %s and is not a layout", ErrInvalidLayout, printable(name))
		}
		return nil
	})
}

// addTo returns the index.json of l with the entries of x added. added is the index.json of x
// alone, which is the result if l has none. Other tools may have written fields and entries that
// this package does not know. They are kept, because the document is decoded only to raw values.
// The entries are parsed as well, to compare their names and digests.
func (x *export) addTo(l *layout, added []byte) ([]byte, error) {
	if found, err := l.has(ocispec.ImageIndexFile); err != nil || !found {
		return added, err
	}
	raw, err := l.file(ocispec.ImageIndexFile)
	if err != nil {
		return nil, err
	}
	was, err := parseLayoutIndex(raw)
	if err != nil {
		return nil, err
	}
	var doc, more map[string]json.RawMessage
	var entries, ours []json.RawMessage
	for _, err := range []error{
		json.Unmarshal(raw, &doc), json.Unmarshal(doc["manifests"], &entries),
		json.Unmarshal(added, &more), json.Unmarshal(more["manifests"], &ours),
	} {
		if err != nil {
			return nil, fmt.Errorf("%w: index.json: %w", ErrInvalidLayout, err)
		}
	}
	if entries, err = x.merge(was.entries, entries, ours); err != nil {
		return nil, err
	}
	if doc["manifests"], err = verbatim(entries); err != nil {
		return nil, err
	}
	out, err := verbatim(doc)
	if err == nil && len(out) > MaxLayoutIndexSize {
		err = fmt.Errorf("%w: index.json would have %d bytes, at most %d are taken", ErrTooLarge, len(out), MaxLayoutIndexSize)
	}
	return out, err
}

// merge returns the old entries and the new ones. was are the old entries parsed, entries the same
// in raw form. An entry that exists with the same name and digest is not added again, unless the
// name has another form there: tools would not find it by the form that the caller chose. A name
// with another digest is [ErrExists] or, with Overwrite, all its old entries are removed. With
// [NamesTags], a tag is a name, even if the old entry has a full name besides: tools search for it.
func (x *export) merge(was []ocispec.Descriptor, entries, ours []json.RawMessage) ([]json.RawMessage, error) {
	type key struct{ name, form, digest string }
	name := entryName
	if x.opts.Names == NamesTags {
		name = func(e ocispec.Descriptor) string {
			if full := entryName(e); full != "" {
				return cmp.Or(e.Annotations[ocispec.AnnotationRefName], full)
			}
			return ""
		}
	}
	keyOf := func(e ocispec.Descriptor) key {
		k := key{name: name(e), digest: string(e.Digest)}
		if k.name != "" {
			k.form = e.Annotations[ocispec.AnnotationRefName]
		}
		return k
	}
	have, digests := map[key]bool{}, map[string]string{}
	for _, e := range was {
		have[keyOf(e)] = true
		digests[name(e)] = string(e.Digest)
	}
	moved := map[string]bool{}
	var add []json.RawMessage
	for i, e := range x.entries {
		k := keyOf(e.Descriptor)
		if have[k] {
			continue
		}
		if d := digests[k.name]; k.name != "" && d != "" && d != k.digest {
			if !x.opts.Overwrite {
				return nil, fmt.Errorf("%s is %s in the directory: %w (ExportOptions.Overwrite moves it)", k.name, printable(d), ErrExists)
			}
			moved[k.name] = true
		}
		add = append(add, ours[i])
	}
	var keep []json.RawMessage
	for i, e := range was {
		if !moved[name(e)] {
			keep = append(keep, entries[i])
		}
	}
	return append(keep, add...), nil
}

// verbatim is json.Marshal that does not escape <, > and & in strings. json.Marshal escapes them in
// raw values too, and so would change entries of other tools.
func verbatim(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// writeBlobs writes the blobs by a stage, as a registry does: see stage for the order of its steps.
// The layout has its own blobStore, whose tmp/ is layoutTmp. The directory is synced before settle,
// which makes the entry blobs/ durable.
func (x *export) writeBlobs(ctx context.Context, root *rootDir) (err error) {
	err = root.Mkdir(blobsDir, 0o755)
	if errors.Is(err, fs.ErrExist) {
		var fi fs.FileInfo
		if fi, err = root.Lstat(blobsDir); err == nil && !fi.IsDir() {
			err = fmt.Errorf("%w: %s is not a directory", ErrInvalidLayout, blobsDir)
		}
	}
	if err != nil {
		return err
	}
	store := newBlobStore(root, false)
	store.tmp = layoutTmp
	st := store.newStage()
	defer func() { err = errors.Join(err, st.discard(), store.close()) }()
	x.meter.planned(PhaseBlobs)
	copies := newTasks(ctx, diskWorkers)
	for _, d := range slices.Concat(x.manifests, x.blobs) {
		if err = copies.start(func() error { return x.writeBlob(copies.ctx, st, d) }); err != nil {
			break
		}
	}
	if err := copies.wait(err); err != nil {
		return err
	}
	if err := root.syncDir("."); err != nil {
		return err
	}
	return st.settle(ctx, nil)
}

// writeBlob stages a blob unless the layout has a good one. The call on the registry lasts only for
// this blob. putFile verifies the bytes while it copies them.
func (x *export) writeBlob(ctx context.Context, st *stage, d ocispec.Descriptor) error {
	ok, err := st.reuse(ctx, d.Digest, d.Size)
	if err != nil {
		return err
	}
	if ok {
		x.meter.skip(d)
		return nil
	}
	end, err := x.registry.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	src, _, err := x.registry.blobs.openFile(d.Digest, d.Size)
	if err != nil {
		return err
	}
	item := x.meter.item(d)
	if err := errors.Join(st.putFile(ctx, src, d.Digest, d.Size, item.from(0)), src.Close()); err != nil {
		return err
	}
	item.end()
	return nil
}
