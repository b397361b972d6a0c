package ocilocal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// A rootFile is an open file below a [rootDir]. Like the directory, it lets tests make its
// operations fail. One goroutine writes to it at a time.
type rootFile struct {
	file *os.File
	name string // below the directory
	root *rootDir

	locked bool // by openLocked

	written, started int64 // bytes in the file, and those of them that were handed to the disk
}

// writebackEvery is how many bytes of a large file are handed to the disk at a time while the rest
// comes in. Without that the kernel may keep all of them in memory until fsync, which then waits
// for the whole file.
const writebackEvery = 8 << 20

// openFile is OpenFile for a file that is written or synced. It follows no symbolic link.
func (r *rootDir) openFile(name string, flag int, perm fs.FileMode) (*rootFile, error) {
	f, err := r.OpenFile(name, flag|openNoFollow, perm)
	if err != nil {
		return nil, err
	}
	return &rootFile{file: f, name: name, root: r}, nil
}

// openLocked opens an existing file for reading and writing, and locks it against every other
// openLocked until it is closed. It returns nil if the file is locked or gone.
func (r *rootDir) openLocked(name string) (*rootFile, error) {
	f, err := tryLockFile(r, name)
	if f == nil || err != nil {
		return nil, err
	}
	return &rootFile{file: f, name: name, root: r, locked: true}, nil
}

// Close ends the lock of openLocked as well.
func (f *rootFile) Close() error {
	if f.locked {
		return closeLocked(f.file)
	}
	return f.file.Close()
}

func (f *rootFile) Read(p []byte) (int, error)                { return f.file.Read(p) }
func (f *rootFile) ReadAt(p []byte, off int64) (int, error)   { return f.file.ReadAt(p, off) }
func (f *rootFile) Seek(off int64, whence int) (int64, error) { return f.file.Seek(off, whence) }
func (f *rootFile) Stat() (fs.FileInfo, error)                { return f.file.Stat() }

// Write hands bytes that were written to the disk from time to time: see [writebackEvery].
func (f *rootFile) Write(p []byte) (int, error) {
	if err := f.root.fault.before("write", f.name); err != nil {
		return 0, err
	}
	n, err := f.file.Write(p)
	f.wrote(int64(n))
	return n, err
}

// copyFrom appends at most limit bytes of src. Where both are files, the kernel copies them. It
// does not count them as written, so the caller starts the write-back itself.
func (f *rootFile) copyFrom(src io.Reader, limit int64) (int64, error) {
	if err := f.root.fault.before("write", f.name); err != nil {
		return 0, err
	}
	return f.file.ReadFrom(io.LimitReader(src, limit))
}

// wrote hands the file to the disk, once enough of it has been written.
func (f *rootFile) wrote(n int64) {
	f.written += n
	if f.written-f.started >= writebackEvery {
		f.start(f.started, f.written-f.started)
		f.started = f.written
	}
}

// start hands n bytes of the file from off on to the disk, or all from off on if n is 0. It does
// not wait and promises nothing: only sync makes bytes durable.
func (f *rootFile) start(off, n int64) { startWriteback(f.file, off, n) }

// sync makes the bytes of the file durable. After an error they can't be trusted, even if a second
// sync succeeds: the kernel may have dropped the pages that it could not write.
func (f *rootFile) sync() error {
	if err := f.root.fault.before("fsync", f.name); err != nil {
		return err
	}
	return f.file.Sync()
}

// chmod sets the permissions of the open file, even if another file has got its name.
func (f *rootFile) chmod(mode fs.FileMode) error {
	if err := f.root.fault.before("chmod", f.name); err != nil {
		return err
	}
	return f.file.Chmod(mode)
}

// truncate makes the file empty and goes to its beginning, for a transfer that can't continue with
// the bytes that it has.
func (f *rootFile) truncate() error {
	if err := f.root.fault.before("truncate", f.name); err != nil {
		return err
	}
	if err := f.file.Truncate(0); err != nil {
		return err
	}
	f.written, f.started = 0, 0
	_, err := f.file.Seek(0, io.SeekStart)
	return err
}

// checkRegular returns the size of an open regular file, and an error for anything else.
func checkRegular(f interface{ Stat() (fs.FileInfo, error) }) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !fi.Mode().IsRegular() {
		return 0, &fs.PathError{Op: "open", Path: fi.Name(), Err: errors.New("not a regular file")}
	}
	return fi.Size(), nil
}

// openRegular opens a file that the caller named. Anything else than a regular file is
// [ErrInvalidArgument]. Opening a named pipe does not block.
func openRegular(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, err
	}
	if _, err := checkRegular(f); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrInvalidArgument, err), f.Close())
	}
	return f, nil
}
