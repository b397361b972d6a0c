package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// # What this package deletes, renames and truncates
//
// Only what it has made itself, and only where that can be known. These are all the paths, and why
// each is ours:
//
//	path                        operation           why it is ours
//	root/.ocilocal-id           removed, linked     our prefix; a small regular file, or a second
//	                                                name of the id, with the root locked
//	root/tmp/…                  removed, truncated  the marks that blobtmp.go lists, in a root
//	                                                with an id
//	root/blobs/<alg>/<hex>      removed             by a collection: a regular file under a
//	                                                digest, in a root with an id
//	                            renamed             by Repair, to tmp/quarantine/: an entry under
//	                                                a digest that is not the blob. It stays
//	                                                whole, even if it is not a file
//	                            replaced            by a publish: a file or link under a digest
//	                                                that is not the blob. The target of a link
//	                                                is not touched
//	root/index.sqlite3*         renamed             by Rebuild, to index.sqlite3.broken: an index
//	                                                that is damaged, with this package's
//	                                                application id, or beside an id of ours
//	root/tmp/<session>/<name>   linked              as index.sqlite3, while the root is locked
//	                                                and has none
//	target/.ocilocal-<random>   removed, renamed    made by the same call with O_EXCL
//	layout/.ocilocal-new        removed, renamed    our prefix; a regular file, with the layout
//	                                                locked
//	layout/.ocilocal-tmp/…      removed             the same marks as in tmp/
//	layout/blobs/<alg>/<hex>    replaced            a blob of the export whose file is damaged
//	layout/index.json           replaced            the caller asked for it; its entries are kept
//	target file                 replaced            the caller set ExportOptions.Overwrite
//
// A root has an id, or this package makes one, which it does only where tmp/ and blobs/ are free:
// see create in registrycreate.go. No call writes to a path from the caller that is in the
// registry itself: see checkTarget in registryforeign.go. SQLite alone writes, truncates and
// deletes index.sqlite3, -wal and -shm.

// A rootDir is an open directory: a registry's root, or one that is exported to or imported
// from. As with [os.Root], names are relative, with slashes, and none leads out of the directory: a
// link in a foreign layout can't make an import read, or an export write, elsewhere. The directory
// stays the same when its path is renamed or replaced.
//
// All file operations of this package below such a directory go through its methods, and those of
// [rootFile]: they are the seam at which tests make an operation fail, record it, or stop the
// process. The [os.Root] is a field and not embedded, so that a call past the seam does not
// compile. The seam names these operations:
//
//	rootDir    open create stat mkdir link rename chmod chtimes remove readdir fsyncdir lock
//	rootFile   write fsync chmod truncate
//
// Reading an open file and closing it are not among them. The seam is above the [shortcut], so tests
// see the same operations with and without it.
type rootDir struct {
	dir   *os.Root
	short *shortcut // to the same directory; asked first where it saves system calls
	fault faultFunc
}

// A faultFunc is the tests' end of the seam. It is called before each operation, by any goroutine.
// If it returns an error, the operation is not done and fails with that error. It is nil in
// production. name is the new name for a link or rename.
type faultFunc func(op, name string) error

// before returns the error that a test wants op on name to fail with.
func (f faultFunc) before(op, name string) error {
	if f == nil {
		return nil
	}
	if err := f(op, name); err != nil {
		return &fs.PathError{Op: op, Path: name, Err: err}
	}
	return nil
}

// openRoot opens a directory. Unlike [os.OpenRoot] it does not block on a named pipe.
func openRoot(dir string, fault faultFunc) (*rootDir, error) {
	if err := fault.before("open", dir); err != nil {
		return nil, err
	}
	fi, err := os.Stat(dir)
	if err == nil && !fi.IsDir() {
		err = &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOTDIR}
	}
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &rootDir{dir: root, short: newShortcut(root), fault: fault}, nil
}

// below opens a directory of r.
func (r *rootDir) below(name string) (*rootDir, error) {
	if err := r.fault.before("open", name); err != nil {
		return nil, err
	}
	sub, err := r.dir.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &rootDir{dir: sub, short: newShortcut(sub), fault: r.fault}, nil
}

func (r *rootDir) Close() error { return errors.Join(r.short.Close(), r.dir.Close()) }

// OpenFile is [os.Root.OpenFile]. With [openNoFollow] it fails if the last element of name is a link.
func (r *rootDir) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	op := "open"
	if flag&os.O_CREATE != 0 {
		op = "create"
	}
	if err := r.fault.before(op, name); err != nil {
		return nil, err
	}
	if f, done, err := r.short.openFile(name, flag, perm); done {
		return f, err
	}
	if openNoFollow != 0 && flag&openNoFollow == openNoFollow && flag&os.O_EXCL == 0 {
		// os.Root follows a link that stays inside the root, whatever the flags.
		if fi, err := r.dir.Lstat(name); err == nil && fi.Mode().Type() == fs.ModeSymlink {
			return nil, &fs.PathError{Op: "openat", Path: name, Err: syscall.ELOOP}
		}
	}
	return r.dir.OpenFile(name, flag, perm)
}

func (r *rootDir) Open(name string) (*os.File, error) {
	return r.OpenFile(name, os.O_RDONLY, 0)
}

func (r *rootDir) Stat(name string) (fs.FileInfo, error) {
	if err := r.fault.before("stat", name); err != nil {
		return nil, err
	}
	if fi, done, err := r.short.lstat(name); done && (err != nil || fi.Mode().Type() != fs.ModeSymlink) {
		return fi, err
	}
	return r.dir.Stat(name)
}

func (r *rootDir) Lstat(name string) (fs.FileInfo, error) {
	if err := r.fault.before("stat", name); err != nil {
		return nil, err
	}
	if fi, done, err := r.short.lstat(name); done {
		return fi, err
	}
	return r.dir.Lstat(name)
}

func (r *rootDir) Mkdir(name string, perm fs.FileMode) error {
	if err := r.fault.before("mkdir", name); err != nil {
		return err
	}
	return r.dir.Mkdir(name, perm)
}

func (r *rootDir) Link(oldname, newname string) error {
	if err := r.fault.before("link", newname); err != nil {
		return err
	}
	if done, err := r.short.link(oldname, newname); done {
		return err
	}
	return r.dir.Link(oldname, newname)
}

func (r *rootDir) Rename(oldname, newname string) error {
	if err := r.fault.before("rename", newname); err != nil {
		return err
	}
	return r.dir.Rename(oldname, newname)
}

func (r *rootDir) Chmod(name string, mode fs.FileMode) error {
	if err := r.fault.before("chmod", name); err != nil {
		return err
	}
	return r.dir.Chmod(name, mode)
}

func (r *rootDir) Chtimes(name string, at time.Time) error {
	if err := r.fault.before("chtimes", name); err != nil {
		return err
	}
	return r.dir.Chtimes(name, at, at)
}

func (r *rootDir) Remove(name string) error {
	if err := r.fault.before("remove", name); err != nil {
		return err
	}
	if done, err := r.short.remove(name); done {
		return err
	}
	return r.dir.Remove(name)
}

// makeDir makes a directory unless it exists. If anything else has its name, such as a link, that
// is [ErrForeignRoot]. A directory that a sweeper removes meanwhile is not an error: the caller
// finds out when it uses the directory.
func (r *rootDir) makeDir(name string, perm fs.FileMode) error {
	err := r.Mkdir(name, perm)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	fi, err := r.Lstat(name)
	if err == nil && !fi.IsDir() {
		err = fmt.Errorf("%w: %s is not a directory", ErrForeignRoot, name)
	}
	return ignoreNotExist(err) // removed since
}

// removeEmpty removes a directory if nothing is in it. Anything else that has its name stays. The
// system decides whether the directory is empty, so a file that appears at that moment is safe.
func (r *rootDir) removeEmpty(name string) error {
	fi, err := r.Lstat(name)
	if err == nil && fi.IsDir() {
		err = r.Remove(name)
	}
	if errors.Is(err, fs.ErrExist) { // it is not empty
		return nil
	}
	return ignoreNotExist(err)
}

// linkNew gives the file name the new name to, unless that is taken: [fs.ErrExist]. The file
// keeps its old name as well. If the file system, or this file, cannot have another hard link, it
// is renamed instead, and moved is true. Only then are the check of to and the rename two steps,
// and a file that appears between them is replaced: [os.Root] has no rename without replacing.
func (r *rootDir) linkNew(name, to string) (moved bool, err error) {
	err = r.Link(name, to)
	if !linkUnsupported(err) {
		return false, err
	}
	switch _, err := r.Lstat(to); {
	case err == nil:
		return false, &fs.PathError{Op: "link", Path: to, Err: fs.ErrExist}
	case !errors.Is(err, fs.ErrNotExist):
		return false, err
	}
	err = r.Rename(name, to)
	return err == nil, err
}

// linkUnsupported reports whether err says that this file system, or this file, cannot have another
// hard link: EPERM on FAT, EMLINK for a file with too many names, EXDEV for a target on another
// mount.
func linkUnsupported(err error) bool {
	for _, e := range []error{syscall.EPERM, syscall.EMLINK, syscall.EXDEV, errors.ErrUnsupported} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// eachEntry calls visit with every name in a directory, in no order. It reads a batch of names at a
// time, so memory does not grow with the directory. A directory that does not exist has none. visit
// may remove entries; whether it sees entries that are added meanwhile is open. The first error
// ends it, errStop too: the caller tells that one apart.
func (r *rootDir) eachEntry(ctx context.Context, dir string, visit func(name string) error) error {
	if err := r.fault.before("open", dir); err != nil {
		return err
	}
	// Not by the shortcut. ReadDir may have to ask for the type of an entry, and only a file that
	// os.Root has opened asks below the root.
	f, err := r.dir.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		if err := r.fault.before("readdir", dir); err != nil {
			return err
		}
		entries, err := f.ReadDir(1024)
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := visit(e.Name()); err != nil {
				return err
			}
		}
		if err == io.EOF || errors.Is(err, fs.ErrNotExist) { // the latter: removed since it was opened
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// syncDir makes the entries of a directory durable: after a link, rename, mkdir or removal, a power
// cut can undo the change until the directory is synced.
func (r *rootDir) syncDir(name string) error {
	if runtime.GOOS == "windows" {
		return nil // there, a directory cannot be synced: NTFS journals its entries
	}
	if err := r.fault.before("fsyncdir", name); err != nil {
		return err
	}
	d, err := r.Open(name)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// lockDir waits until it gets the lock of a directory: see [tryLockDir]. It makes the directory if
// it is missing, as it is after its last holder has removed it. It tries again and again, because a
// call that waits for a lock in the kernel could not be ended by ctx.
func (r *rootDir) lockDir(ctx context.Context, name string) (release func() error, err error) {
	for {
		if name != "." {
			if err := r.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, err
			}
		}
		release, held, err := tryLockDir(r, name)
		if err != nil || held {
			return release, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// lstatPath is Lstat of a path outside the directory, by which a handle finds out whether the path
// of its root still leads to the directory that it has open.
func (r *rootDir) lstatPath(path string) (fs.FileInfo, error) {
	if err := r.fault.before("stat", path); err != nil {
		return nil, err
	}
	return os.Lstat(path)
}

// resolveDir returns the absolute path of a directory, without symbolic links in it.
func resolveDir(dir string) (string, error) {
	// Links come first: to the system, link/.. is not the directory that link lies in.
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil || filepath.IsAbs(dir) {
		return dir, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// eachParent calls visit with the existing directories in which a path lies, from the innermost to
// the root of the file system. The path itself need not exist. A path through a symbolic link has
// two rows of parents, those of the link and those of its target. Both are visited, so a directory
// may come twice. The first error ends it.
func eachParent(path string, visit func(dir string, fi fs.FileInfo) error) error {
	lexical, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	for _, from := range []string{path, filepath.Dir(lexical)} {
		dir, err := resolveDir(from)
		for errors.Is(err, fs.ErrNotExist) && filepath.Dir(from) != from {
			from = filepath.Dir(from)
			dir, err = resolveDir(from)
		}
		for up := ""; err == nil && up != dir; dir, up = filepath.Dir(dir), dir {
			var fi fs.FileInfo
			if fi, err = os.Stat(dir); err == nil {
				err = visit(dir, fi)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mkdirAllSync is [os.MkdirAll], and makes the entry of each new directory durable. Otherwise a
// power cut could lose the parent of a registry whose commits were durable.
func mkdirAllSync(dir string, perm fs.FileMode, fault faultFunc) error {
	if fi, err := os.Stat(dir); err == nil {
		if !fi.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: dir, Err: errors.New("exists and is not a directory")}
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := mkdirAllSync(parent, 0o755, fault); err != nil {
			return err
		}
	}
	if err := fault.before("mkdir", dir); err != nil {
		return err
	}
	// The parent is synced even if another process made dir: it may not have come to that yet.
	if err := os.Mkdir(dir, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncEntries(parent, fault)
}

// syncEntries makes the entries of a directory that is not open durable.
func syncEntries(dir string, fault faultFunc) error {
	r, err := openRoot(dir, fault)
	if err != nil {
		return err
	}
	defer r.Close()
	return r.syncDir(".")
}
