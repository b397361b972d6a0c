package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FS returns the artifact's layers as a file tree, read-only. A layer's path is its
// annotation org.opencontainers.image.title (image-spec annotations.md), in which oras
// and others keep file names; a slash begins a directory. An image index has no layers, so its tree
// is empty. Every layer is in the tree. It is named by its digest, at the top, if its title
//   - is missing
//   - is not a path that [fs.ValidPath] accepts
//   - has a backslash or a character that can't be printed
//   - is already the name of an earlier layer or of a directory
//
// A file that is read from its beginning is verified on the way, as by
// [LocalRegistry.OpenBlob]; Seek and ReadAt verify all of it first, as
// [LocalRegistry.OpenBlobFile] does. Sys of a file's info is the layer's
// [ocispec.Descriptor]. There are no times. ctx governs all use of the tree, which is
// safe for concurrent use. Errors are those of [LocalArtifact.Manifest].
func (a *LocalArtifact) FS(ctx context.Context) (fs.FS, error) {
	layers, err := a.Layers(ctx)
	if err != nil {
		return nil, err
	}
	return &view{ctx: ctx, registry: a.registry, tree: newLayerTree(layers)}, nil
}

// FS returns the whole registry as a file tree, read-only. The first directory is the
// registry's host, then come the parts of the repository's name; the last of them has the
// tag or digest with it, and below is what [LocalArtifact.FS] returns. So any reference's
// [Reference.String] is the path of its artifact: ghcr.io/org/app:v1/config.json. Each call shows
// the index at that moment. ctx governs all use of the tree, which is safe for concurrent use.
func (r *LocalRegistry) FS(ctx context.Context) fs.FS {
	return &view{ctx: ctx, registry: r, tree: &refTree{ctx: ctx, registry: r}}
}

// A view is an [fs.FS] on a tree. The tree knows names and descriptors, and the view opens blobs:
//
//	LocalArtifact.FS   view ──▶ layerTree                    the layers of one artifact
//	LocalRegistry.FS   view ──▶ refTree ──▶ layerTree …      the refs, and the layers of each
//
// A refTree reads the index in each call, so each call shows the refs of that moment.
type view struct {
	ctx      context.Context
	registry *LocalRegistry
	tree     tree
}

type tree interface {
	// look returns the directory or layer at a valid path, or fs.ErrNotExist.
	look(name string) (viewInfo, error)
	// entries lists a directory, sorted.
	entries(dir string) ([]fs.DirEntry, error)
}

// look checks that the registry is open and the path is valid, and asks the tree.
func (v *view) look(op, name string) (viewInfo, error) {
	var info viewInfo
	err := v.registry.within(v.ctx, func() error { return nil }) // open, and ctx not done
	if err == nil && !fs.ValidPath(name) {
		err = fs.ErrInvalid
	}
	if err == nil {
		info, err = v.tree.look(name)
	}
	return info, pathError(op, name, err)
}

// pathError wraps an error as the package io/fs demands. nil stays nil.
func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Open implements [fs.FS].
func (v *view) Open(name string) (fs.File, error) {
	info, err := v.look("open", name)
	if err != nil {
		return nil, err
	}
	if info.dir {
		return &viewDir{viewInfo: info, view: v, path: name}, nil
	}
	src, err := v.registry.OpenBlob(v.ctx, info.layer)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return &viewFile{viewInfo: info, view: v, path: name, stream: src}, nil
}

// Stat implements [fs.StatFS].
func (v *view) Stat(name string) (fs.FileInfo, error) {
	info, err := v.look("stat", name)
	if err != nil {
		return nil, err
	}
	return info, nil
}

// ReadDir implements [fs.ReadDirFS].
func (v *view) ReadDir(name string) ([]fs.DirEntry, error) {
	info, err := v.look("readdir", name)
	if err != nil {
		return nil, err
	}
	if !info.dir {
		return nil, pathError("readdir", name, errNotDir)
	}
	entries, err := v.tree.entries(name)
	return entries, pathError("readdir", name, err)
}

// ReadFile implements [fs.ReadFileFS].
func (v *view) ReadFile(name string) ([]byte, error) {
	f, err := v.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

var (
	errNotDir = errors.New("not a directory")
	errIsDir  = errors.New("is a directory")
)

// viewInfo is an [fs.FileInfo] of a directory or a layer.
type viewInfo struct {
	name  string
	dir   bool
	layer ocispec.Descriptor
}

func (i viewInfo) Name() string       { return i.name }
func (i viewInfo) Size() int64        { return i.layer.Size }
func (i viewInfo) ModTime() time.Time { return time.Time{} }
func (i viewInfo) IsDir() bool        { return i.dir }

func (i viewInfo) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o555
	}
	return 0o444
}

// Sys returns a layer's [ocispec.Descriptor].
func (i viewInfo) Sys() any {
	if i.dir {
		return nil
	}
	return i.layer
}

// viewDir is an open directory. The first ReadDir makes its listing, and later calls go on in that,
// whatever changes meanwhile.
type viewDir struct {
	viewInfo
	view   *view
	path   string
	listed bool
	rest   []fs.DirEntry
}

func (d *viewDir) Stat() (fs.FileInfo, error) { return d.viewInfo, nil }
func (d *viewDir) Close() error               { return nil }
func (d *viewDir) Read([]byte) (int, error)   { return 0, pathError("read", d.path, errIsDir) }

// ReadDir implements [fs.ReadDirFile].
func (d *viewDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !d.listed {
		entries, err := d.view.ReadDir(d.path)
		if err != nil {
			return nil, err
		}
		d.rest, d.listed = entries, true
	}
	if n > 0 && len(d.rest) == 0 {
		return nil, io.EOF
	}
	if n <= 0 || n > len(d.rest) {
		n = len(d.rest)
	}
	page := d.rest[:n:n]
	d.rest = d.rest[n:]
	return page, nil
}

// viewFile is an open layer. It begins as a stream, which verifies what is read and never reads a
// byte twice. The first Seek or ReadAt makes it a file, which is verified whole before that: bytes
// at any place can't be verified on the way. A caller that only reads never pays for the file.
type viewFile struct {
	viewInfo
	view *view
	path string

	mu     sync.Mutex    // guards the fields below
	stream io.ReadCloser // not used once there is a file
	read   int64         // bytes read from stream
	file   *BlobFile     // nil before the first Seek or ReadAt
	closed bool
}

func (f *viewFile) Stat() (fs.FileInfo, error) { return f.viewInfo, nil }

func (f *viewFile) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var n int
	err := fs.ErrClosed
	switch {
	case f.closed:
	case f.file != nil:
		n, err = f.file.Read(p)
	default:
		n, err = f.stream.Read(p)
		f.read += int64(n)
	}
	if err != io.EOF {
		err = pathError("read", f.path, err)
	}
	return n, err
}

// atAnyPlace makes the layer a file, unless it is one, and returns the file. Its offset is the
// one up to which the stream was read.
func (f *viewFile) atAnyPlace() (*BlobFile, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, fs.ErrClosed
	}
	if f.file != nil {
		return f.file, nil
	}
	file, err := f.view.registry.OpenBlobFile(f.view.ctx, f.layer)
	if err != nil {
		return nil, err
	}
	if _, err := file.Seek(f.read, io.SeekStart); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	f.file = file
	return file, f.stream.Close()
}

// ReadAt implements [io.ReaderAt].
func (f *viewFile) ReadAt(p []byte, off int64) (n int, err error) {
	file, err := f.atAnyPlace()
	if err == nil {
		n, err = file.ReadAt(p, off)
	}
	if err != io.EOF {
		err = pathError("read", f.path, err)
	}
	return n, err
}

// Seek implements [io.Seeker].
func (f *viewFile) Seek(offset int64, whence int) (at int64, err error) {
	file, err := f.atAnyPlace()
	if err == nil {
		at, err = file.Seek(offset, whence)
	}
	return at, pathError("seek", f.path, err)
}

func (f *viewFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pathError("close", f.path, fs.ErrClosed)
	}
	f.closed = true
	if f.file != nil {
		return f.file.Close()
	}
	return f.stream.Close()
}

// A layerTree has an artifact's layers, sorted by their paths. It does not store directories: a
// name is a directory if some path begins with it and a slash, which a search finds. Otherwise a
// manifest of 4 MiB with hostile titles could make millions of directories.
type layerTree []layerPath // sorted

type layerPath struct {
	path  string
	layer ocispec.Descriptor
}

// newLayerTree gives each layer a path. A title is taken if it is a path, if no earlier layer has
// it, and if no other path makes it a directory. The other layers are named by their digests, at
// the top. No title can be such a name (see isLayerPath), so a layer can't hide another one.
func newLayerTree(layers []ocispec.Descriptor) layerTree {
	t := layerTree{}
	taken := map[string]bool{}
	var unnamed []ocispec.Descriptor
	for _, l := range layers {
		title := l.Annotations[ocispec.AnnotationTitle]
		if !isLayerPath(title) || taken[title] {
			unnamed = append(unnamed, l)
			continue
		}
		taken[title] = true
		t = append(t, layerPath{title, l})
	}
	t.sort()
	t = slices.DeleteFunc(slices.Clone(t), func(p layerPath) bool {
		directory := t.isDir(p.path)
		if directory {
			unnamed = append(unnamed, p.layer)
		}
		return directory
	})
	for _, l := range unnamed {
		if name := l.Digest.String(); !taken[name] {
			taken[name] = true
			t = append(t, layerPath{name, l})
		}
	}
	t.sort()
	return t
}

func (t layerTree) sort() {
	slices.SortFunc(t, func(a, b layerPath) int { return cmp.Compare(a.path, b.path) })
}

// isLayerPath reports whether a title can be a path. It can't begin with a digest, which names
// another layer, or have characters that mislead a terminal or mean a directory on Windows.
func isLayerPath(title string) bool {
	const longest = 4096
	first, _, _ := strings.Cut(title, "/")
	return title != "." && len(title) <= longest && fs.ValidPath(title) &&
		!strings.Contains(title, `\`) && !strings.ContainsFunc(title, func(c rune) bool { return !unicode.IsPrint(c) }) &&
		checkDigest(digest.Digest(first)) != nil
}

// from returns the index of the first path that is at least s.
func (t layerTree) from(s string) int {
	return sort.Search(len(t), func(i int) bool { return t[i].path >= s })
}

// isDir reports whether a path lies below name.
func (t layerTree) isDir(name string) bool {
	i := t.from(name + "/")
	return name == "." || i < len(t) && strings.HasPrefix(t[i].path, name+"/")
}

func (t layerTree) look(name string) (viewInfo, error) {
	if t.isDir(name) {
		return viewInfo{name: path.Base(name), dir: true}, nil
	}
	if i := t.from(name); i < len(t) && t[i].path == name {
		return viewInfo{name: path.Base(name), layer: t[i].layer}, nil
	}
	return viewInfo{}, fs.ErrNotExist
}

func (t layerTree) entries(dir string) ([]fs.DirEntry, error) {
	prefix := prefixOf(dir)
	var all []fs.DirEntry
	for i := t.from(prefix); i < len(t); {
		rest, inside := strings.CutPrefix(t[i].path, prefix)
		if !inside {
			break
		}
		name, _, deeper := strings.Cut(rest, "/")
		if deeper {
			all = append(all, dirEntry(name))
			i = t.from(prefix + name + behindSlash)
		} else {
			all = append(all, fs.FileInfoToDirEntry(viewInfo{name: name, layer: t[i].layer}))
			i++
		}
	}
	sortEntries(all)
	return all, nil
}

// behindSlash is the character after the slash in ASCII. Every text that begins with name/ sorts
// before name + behindSlash, so a search for that skips all of them.
const behindSlash = "0"

// prefixOf returns the text with which all paths in a directory begin.
func prefixOf(dir string) string {
	if dir == "." {
		return ""
	}
	return dir + "/"
}

func dirEntry(name string) fs.DirEntry {
	return fs.FileInfoToDirEntry(viewInfo{name: name, dir: true})
}

func sortEntries(all []fs.DirEntry) {
	slices.SortFunc(all, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
}

// A refTree has the refs as directories, by the parts of their names, and the layers of each
// artifact below. A directory is a part of a name as long as some ref's name begins with it. The
// index finds that by a range of names, so no call reads all refs.
type refTree struct {
	ctx      context.Context
	registry *LocalRegistry

	mu     sync.Mutex
	recent []recentTree // guarded by mu; the latest first, at most maxRecentTrees
}

// A recentTree has the layers of a manifest. Neither of them ever changes.
type recentTree struct {
	manifest digest.Digest
	layers   layerTree
}

// maxRecentTrees is how many artifacts can be read side by side without reading the manifest
// again for each of their layers.
const maxRecentTrees = 8

// layers returns the tree of an artifact's layers. A walk asks for it at each layer of the
// artifact. Reading the manifest each time would cost the square of their number, so the latest
// trees are kept.
func (t *refTree) layers(ref Reference, desc ocispec.Descriptor) (layerTree, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.recent, func(r recentTree) bool { return r.manifest == desc.Digest })
	if i >= 0 {
		tree := t.recent[i]
		t.recent = slices.Insert(slices.Delete(t.recent, i, i+1), 0, tree)
		return tree.layers, nil
	}
	layers, err := t.registry.newArtifact(ref, desc, nil).Layers(t.ctx)
	if err != nil {
		return nil, err
	}
	tree := newLayerTree(layers)
	t.recent = slices.Insert(t.recent, 0, recentTree{desc.Digest, tree})
	t.recent = t.recent[:min(len(t.recent), maxRecentTrees)]
	return tree, nil
}

// artifact returns the layers of the artifact in whose directory name lies, and the path from
// there. The tree is nil if name lies above all artifacts. An artifact's directory is the first
// one after the host with a colon or an @ in its name: no part of a repository's name can have
// these.
func (t *refTree) artifact(name string) (layerTree, string, error) {
	parts := strings.Split(name, "/")
	i := slices.IndexFunc(parts[1:], func(s string) bool { return strings.ContainsAny(s, ":@") })
	if i < 0 {
		return nil, "", nil
	}
	dir := strings.Join(parts[:i+2], "/")
	ref, err := ParseReference(dir)
	if err != nil || ref.String() != dir || ref.Tag() != "" && ref.Digest() != "" {
		return nil, "", fs.ErrNotExist
	}
	var desc ocispec.Descriptor
	if err = t.registry.within(t.ctx, func() (err error) {
		desc, err = found(t.registry.index.resolve(ref.key()))
		return err
	}); err != nil {
		return nil, "", err
	}
	layers, err := t.layers(ref, desc)
	rest := path.Join(parts[i+2:]...)
	return layers, cmp.Or(rest, "."), err
}

func (t *refTree) look(name string) (viewInfo, error) {
	layers, rest, err := t.artifact(name)
	if err != nil {
		return viewInfo{}, err
	}
	info := viewInfo{dir: true}
	if layers != nil {
		info, err = layers.look(rest)
	} else if name != "." {
		var first string
		if first, err = t.next(prefixOf(name), "", prefixOf(name)); err == nil && first == "" {
			err = fs.ErrNotExist
		}
	}
	info.name = path.Base(name)
	return info, err
}

// next returns the first name >= from and > after that has refs and begins with prefix, or "".
func (t *refTree) next(from, after, prefix string) (name string, err error) {
	err = t.registry.within(t.ctx, func() error {
		page, err := t.registry.index.names(from, after, prefix+"\x7f", 1)
		if len(page) > 0 {
			name = page[0]
		}
		return err
	})
	return name, err
}

func (t *refTree) entries(dir string) ([]fs.DirEntry, error) {
	layers, rest, err := t.artifact(dir)
	if err != nil {
		return nil, err
	}
	if layers != nil {
		return layers.entries(rest)
	}
	var all []fs.DirEntry
	prefix := prefixOf(dir)
	for from, after := prefix, ""; ; {
		name, err := t.next(from, after, prefix)
		if err != nil {
			return nil, err
		}
		if name == "" {
			sortEntries(all)
			return all, nil
		}
		part, _, deeper := strings.Cut(name[len(prefix):], "/")
		if deeper {
			all = append(all, dirEntry(part))
			from, after = prefix+part+behindSlash, ""
			continue
		}
		for ref, err := range t.registry.Refs(t.ctx, &ListOptions{Name: name}) {
			if err != nil {
				return nil, fmt.Errorf("repository %s: %w", name, err)
			}
			all = append(all, dirEntry(strings.TrimPrefix(ref.Reference.String(), prefix)))
		}
		after = name
	}
}
