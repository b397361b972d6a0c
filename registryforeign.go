package ocilocal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/opencontainers/go-digest"
)

// checkRoot checks the owner of the root and of its index, and the file system. It warns if others
// may write to the directory. It is the first check of open: nothing in the root is opened or made
// before.
func (r *LocalRegistry) checkRoot() (err error) {
	if r.self, err = r.root.Stat("."); err != nil {
		return err
	}
	if err := r.checkOwner(".", r.self); err != nil {
		return err
	}
	if fi := r.self; fi.Mode().Perm()&0o022 != 0 && runtime.GOOS != "windows" {
		who := "its group"
		if fi.Mode().Perm()&0o002 != 0 {
			who = "everybody on this machine"
		}
		r.opts.Logger.Warn("ocilocal: the registry can be written by "+who+" and trusts whoever writes to it", "root", r.dir, "mode", fi.Mode())
	}
	for _, name := range []string{indexFile, indexFile + "-wal"} {
		fi, err := r.root.Lstat(name)
		if err == nil {
			err = r.checkOwner(name, fi)
		}
		if ignoreNotExist(err) != nil {
			return err
		}
	}
	name, err := networkFS(r.dir)
	if err != nil {
		return err
	}
	return r.checkFS(name)
}

// checkDirs refuses a tmp/ or blobs/ that belongs to another user, or that is not a directory but,
// for example, a link. It returns those that are missing, as in a copy without empty directories.
func (r *LocalRegistry) checkDirs() (missing []string, err error) {
	for _, name := range []string{blobsDir, tmpDir} {
		fi, err := r.root.Lstat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, name)
			continue
		case err == nil && !fi.IsDir():
			err = fmt.Errorf("%w: %s is not a directory", ErrForeignRoot, name)
		case err == nil:
			err = r.checkOwner(name, fi)
		}
		if err != nil {
			return nil, err
		}
	}
	return missing, nil
}

// checkOwner refuses a file or directory of the root that belongs to another user, unless that user
// is root. The owner could change the answers of the registry at any time.
func (r *LocalRegistry) checkOwner(name string, fi fs.FileInfo) error {
	owner, _ := ownerAndLinks(fi)
	if r.opts.AllowOtherOwner || owner == 0 || owner == os.Geteuid() {
		return nil
	}
	if name == "." {
		name = "the directory"
	}
	return fmt.Errorf("%w: %s belongs to user %d, and this process runs as user %d (Options.AllowOtherOwner trusts that user)",
		ErrForeignRoot, name, owner, os.Geteuid())
}

// checkBound returns [ErrForeignIndex] unless the path by which this handle was opened still leads
// to the directory and to the index that it has open.
//
// The problem: files are opened relative to the open directory, but SQLite uses the path, for its
// log and for each new connection. If the path leads elsewhere, because a directory or a mount was
// exchanged, the two halves of this handle would work on two registries. It would publish blobs in
// one and rows in the other, and collections would delete blobs that only the other index needs.
//
// The rule: checkBound is called before and after each connection is made, and in each write. A
// read on an open connection takes a few microseconds, and calls only checkIndexFile.
func (r *LocalRegistry) checkBound() error {
	dir, err := r.root.lstatPath(r.dir)
	if err == nil && !os.SameFile(r.self, dir) {
		return fmt.Errorf("%w: %s leads to another directory now than when it was opened", ErrForeignIndex, r.dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return r.checkIndexFile()
}

// checkIndexFile returns [ErrForeignIndex] unless the path leads to the index that this handle has
// open. If it does, it also leads to the directory, unless somebody has moved the index into
// another one. Even then a read is right: other processes see the same index, and blobs are read
// from the open directory.
func (r *LocalRegistry) checkIndexFile() error {
	index, err := r.root.lstatPath(filepath.Join(r.dir, indexFile))
	if err == nil && !os.SameFile(r.opened, index) {
		return fmt.Errorf("%w: %s was replaced while the registry was open", ErrForeignIndex, indexFile)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %s was moved or deleted while the registry was open", ErrForeignIndex, indexFile)
	}
	return err
}

// checkFS refuses a network file system with this name. A local one has the name "".
func (r *LocalRegistry) checkFS(name string) error {
	if name == "" || r.opts.AllowNetworkFS {
		return nil
	}
	return fmt.Errorf("%w (%s): two machines would damage the index (Options.AllowNetworkFS opens it anyway)", ErrNetworkFS, name)
}

// openOther opens a regular file that the caller names. It refuses the files of the index: POSIX
// locks belong to the process, and closing any descriptor of such a file would drop the locks that
// SQLite holds. It reads the root, so it must be called within a call that has begun.
func (r *LocalRegistry) openOther(name string) (*os.File, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	own, err := r.ownFile(fi)
	if err == nil && own != "" {
		err = fmt.Errorf("%w: this is the registry's own %s", ErrInvalidArgument, own)
	}
	if err != nil {
		return nil, err
	}
	return openRegular(name)
}

// ownFile returns the name of the index's file that fi describes, and "" for any other file. The
// comparison is by identity, so links and other paths to the index are recognised.
func (r *LocalRegistry) ownFile(fi fs.FileInfo) (string, error) {
	for _, suffix := range databaseFiles {
		if same, err := r.isAt(indexFile+suffix, fi); same || err != nil {
			return indexFile + suffix, err
		}
	}
	return "", nil
}

// isAt reports whether fi describes the entry with that name below the root. If the entry cannot be
// read, for example without free descriptors, it could be the same file. So that is an error.
func (r *LocalRegistry) isAt(name string, fi fs.FileInfo) (bool, error) {
	mine, err := r.root.Lstat(name)
	if err != nil {
		return false, ignoreNotExist(err)
	}
	return os.SameFile(mine, fi), nil
}

// checkTarget refuses a path that the caller names if it is in this registry or leads to it. Every
// call that writes to such a path calls checkTarget before it makes anything. Files and directories
// are compared by identity and not by name, since a path may lead here through links, mounts and
// hard links. below are the names that the call will use in the directory path.
//
// Three kinds of entries are compared with those of the registry: the parents of the path, the path
// itself, and the names below it. For the last two, the entry and the target of a link both count.
//
// Errors: [ErrInvalidArgument], and any error from the file system.
func (r *LocalRegistry) checkTarget(path string, below ...string) error {
	own := []string{".", blobsDir, tmpDir, idFile}
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		own = append(own, filepath.ToSlash(filepath.Join(blobsDir, string(alg))))
	}
	check := func(path string, fi fs.FileInfo) error {
		name, err := r.ownFile(fi)
		for _, n := range own {
			if name != "" || err != nil {
				break
			}
			var same bool
			if same, err = r.isAt(n, fi); same {
				name = n
			}
		}
		if name == "" || err != nil {
			return err
		}
		return fmt.Errorf("%w: %s is in the registry itself (%s of %s)", ErrInvalidArgument, path, name, r.dir)
	}
	if err := eachParent(path, check); err != nil {
		return err
	}
	for _, name := range append([]string{""}, below...) {
		name = filepath.Join(path, name)
		for _, look := range []func(string) (fs.FileInfo, error){os.Lstat, os.Stat} {
			fi, err := look(name)
			if err == nil {
				err = check(name, fi)
			}
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
				continue
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
