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

// checkRoot looks at where the root lies, who owns it and who may write to it.
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

// checkDirs refuses a tmp/ or blobs/ that is not a directory, as a link is not, or not this
// user's. It returns those that are missing, as they are in a copy without empty directories.
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

// checkOwner refuses a file or directory of the root that belongs to another user, unless that is
// the system's root. Its owner could change what the registry answers at any time.
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
// Files are opened relative to the open directory, but SQLite goes by the path, for its log and
// for each new connection. If the path leads elsewhere, because a directory or a mount was
// exchanged, the two halves of this handle would work on two registries: it would publish here
// what only the other's index names, and delete blobs here that only this one's index needs.
// So this is asked before and after each connection is made, and in each write. A read on an open
// connection, which takes a few microseconds, asks only checkIndexFile.
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
// open. Then it leads to the directory, too, unless somebody has moved the file into another one. A
// read is right even then: the index is the one that others see, and blobs are read from the open directory.
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

// checkFS refuses a network file system, by name; "" is a local one.
func (r *LocalRegistry) checkFS(name string) error {
	if name == "" || r.opts.AllowNetworkFS {
		return nil
	}
	return fmt.Errorf("%w (%s): two machines would damage the index (Options.AllowNetworkFS opens it all the same)", ErrNetworkFS, name)
}

// openOther opens a regular file that the caller names. It refuses those of the index: closing
// any descriptor of them would drop the locks that SQLite holds in this process. It looks at the
// root, so the caller has begun its call.
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

// isAt reports whether fi is of what has that name below the root. A name that cannot be looked
// at, for want of descriptors say, may be fi's, so that is an error.
func (r *LocalRegistry) isAt(name string, fi fs.FileInfo) (bool, error) {
	mine, err := r.root.Lstat(name)
	if err != nil {
		return false, ignoreNotExist(err)
	}
	return os.SameFile(mine, fi), nil
}

// checkTarget refuses to write to a path that the caller names if it is, or lies in, this
// registry. Every call that writes to a caller's path asks it before it makes anything.
// Files and directories are told by what they are and not by their names, since a path may
// lead here through links, mounts and hard links. below are names that the call is going to
// use in the directory path.
//
// Errors: [ErrInvalidArgument] and the file system's.
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
