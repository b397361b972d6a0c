//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ocilocal

import (
	"errors"
	"os"
	"syscall"
)

// lockFile is the file by which a directory is locked, where it can't be locked itself.
const lockFile = ".ocilocal-lock"

// openNoFollow makes an open fail on a symbolic link, and not block on a FIFO.
const openNoFollow = syscall.O_NOFOLLOW | openNonblock

// openNonblock makes an open of a FIFO return, so that it can be refused.
const openNonblock = syscall.O_NONBLOCK

// noSpace are the errors of a full disk or quota.
var noSpace = []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT}

// noResources are the errors of a process or machine that is out of descriptors, memory or locks.
var noResources = []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EAGAIN, syscall.ENOLCK}

// tryLockDir tries to lock a directory of root against every other process and every other handle
// in this one. held is false if the directory is locked already or is gone. The lock ends with
// release, or with the process.
func tryLockDir(root *rootDir, name string) (release func() error, held bool, err error) {
	d, err := tryLock(root, name, os.O_RDONLY)
	if d == nil {
		return nil, false, err
	}
	return func() error { return closeLocked(d) }, true, nil
}

// tryLockFile opens a regular file of root for reading and writing, locked against every other
// call of it in any process until [closeLocked]. It returns nil when somebody else has the lock, or
// when the name is gone, or leads to another file once the lock is held.
func tryLockFile(root *rootDir, name string) (*os.File, error) {
	return tryLock(root, name, os.O_RDWR|openNoFollow)
}

// tryLock opens and locks a file or directory. It returns nil if that is locked already or is gone.
//
// flock locks the open file, and not the process as fcntl does. So two handles of one process
// exclude each other, closing another descriptor of the file does not drop the lock, and the kernel
// drops it when the process is killed.
func tryLock(root *rootDir, name string, flag int) (*os.File, error) {
	if err := root.fault.before("lock", name); err != nil {
		return nil, err
	}
	f, err := root.OpenFile(name, flag, 0)
	if err != nil {
		return nil, ignoreNotExist(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, &os.PathError{Op: "flock", Path: name, Err: err}
	}
	// Between open and flock a sweeper may have removed the file, and another process may have made
	// a new one under the name. The lock of a removed file excludes nobody.
	mine, err := f.Stat()
	if err == nil {
		var now os.FileInfo
		if now, err = root.Lstat(name); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
	}
	closeLocked(f)
	return nil, ignoreNotExist(err)
}

// closeLocked unlocks and closes a file that [tryLock] has opened. A child process has a copy of
// each descriptor between fork and exec, and by the copy the lock would outlive a mere close.
func closeLocked(f *os.File) error {
	_ = syscall.Flock(int(f.Fd()), syscall.LOCK_UN)
	return f.Close()
}

// checkWritable returns an error if this process may not make entries in the directory.
func checkWritable(dir string) error {
	const writeAndSearch = 0x2 | 0x1 // W_OK | X_OK
	if err := syscall.Access(dir, writeAndSearch); err != nil {
		return &os.PathError{Op: "access", Path: dir, Err: err}
	}
	return nil
}
