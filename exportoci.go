package ocilocal

import (
	"bytes"
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

// What an export has in a layout directory only as long as it runs.
const (
	layoutTmp  = ".ocilocal-tmp" // the lock, and the directory of blobs on their way in
	layoutTemp = ".ocilocal-new" // the file that is to be oci-layout or index.json
)

// ExportLayout writes the artifacts that refs name, with all they need, into an OCI
// image layout directory, which is created or added to: what other tools have
// put into it stays, in index.json too. A blob that is there whole stays as it
// is, a damaged one is replaced. index.json is replaced last, in one step, when all
// else is on disk. Exports of this package into one directory wait for each
// other; other tools don't, so let none write to it meanwhile.
//
// After an error, index.json is as it was, unless the error came after it had been replaced, as
// when its directory could not be synced. The next export into the directory removes the files that
// a killed one has left. Errors:
//   - [ErrExists]: a name stands for another digest there (ExportOptions.Overwrite moves it)
//   - [ErrInvalidLayout]: the directory holds something else
//   - those of [LocalRegistry.ExportArchive]
func (r *LocalRegistry) ExportLayout(ctx context.Context, dir string, refs []Reference, opts *ExportOptions) error {
	if opts == nil {
		opts = &ExportOptions{}
	}
	_, err := attend(ctx, opts.Progress, Reference{}, func(ctx context.Context, m *meter) (struct{}, error) {
		return struct{}{}, r.exportLayout(ctx, dir, refs, opts, m)
	})
	return opError("export layout", dir, "", err)
}

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
	fresh, err := prepareLayout(ctx, l)
	if err != nil {
		return err
	}
	index, err := x.addTo(l, fresh)
	if err != nil {
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
	if fresh || !version {
		if err := writeLayoutFile(root, ocispec.ImageLayoutFile, []byte(layoutFile)); err != nil {
			return err
		}
	}
	return writeLayoutFile(root, ocispec.ImageIndexFile, index)
}

func writeLayoutFile(root *rootDir, name string, b []byte) error {
	if fi, err := root.Lstat(layoutTemp); err == nil && !fi.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a file that an export has left", ErrInvalidLayout, layoutTemp)
	}
	if err := ignoreNotExist(root.Remove(layoutTemp)); err != nil {
		return err
	}
	return writeNew(root, layoutTemp, name, true, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

// lockLayout keeps other exports out of a layout directory, those of other processes included.
//
// Whoever can open a directory can lock it, and a reader of the layout must not be able to stop its
// writer. So the lock is on layoutTmp, which only its owner can open. release removes it while it
// is still held. An export that was waiting for it then finds that its name has gone, and makes
// another. A lock of a process that was killed has ended: the next export takes the directory over.
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
		_ = store.sweep() // what exports that were killed have left
		_ = root.Remove(path.Join(layoutTmp, lockFile))
		err := root.Remove(layoutTmp)
		if errors.Is(err, fs.ErrExist) { // something in it is not ours
			err = nil
		}
		return errors.Join(err, unlock())
	}, nil
}

// prepareLayout makes sure that l is a layout or may become one: then it is fresh.
func prepareLayout(ctx context.Context, l *layout) (fresh bool, err error) {
	version, err := l.has(ocispec.ImageLayoutFile)
	if err == nil && version {
		err = l.check()
	}
	if err != nil {
		return false, err
	}
	if index, err := l.has(ocispec.ImageIndexFile); err != nil || index {
		return false, err
	}
	ours := []string{blobsDir, layoutTmp, layoutTemp, ocispec.ImageLayoutFile} // left by an export that was cut off
	return true, l.root.eachEntry(ctx, ".", func(name string) error {
		if !slices.Contains(ours, name) {
			return fmt.Errorf("%w: the directory holds %s and is not a layout", ErrInvalidLayout, printable(name))
		}
		return nil
	})
}

// addTo returns the index.json that l has with x's entries added. What it
// doesn't know in there it keeps.
func (x *export) addTo(l *layout, fresh bool) ([]byte, error) {
	added, err := x.index()
	if err != nil || fresh {
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

// merge returns the entries that were there, as parsed and as they stand, with ours.
func (x *export) merge(was []ocispec.Descriptor, entries, ours []json.RawMessage) ([]json.RawMessage, error) {
	type key struct{ name, digest string }
	name := entryName
	have, digests := map[key]bool{}, map[string]string{}
	for _, e := range was {
		have[key{name(e), string(e.Digest)}] = true
		digests[name(e)] = string(e.Digest)
	}
	moved := map[string]bool{}
	var add []json.RawMessage
	for i, e := range x.entries {
		n := name(e.Descriptor)
		if have[key{n, string(e.Digest)}] {
			continue
		}
		if d := digests[n]; n != "" && d != "" {
			if !x.opts.Overwrite {
				return nil, fmt.Errorf("%s is %s there: %w (ExportOptions.Overwrite moves it)", n, printable(d), ErrExists)
			}
			moved[n] = true
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

// verbatim is json.Marshal that leaves <, > and & in strings alone.
func verbatim(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// writeBlobs takes the way that every blob of a registry takes too: see stage.
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

// writeBlob stages a blob unless the layout has it.
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
