package ocilocal

import (
	"os"
	"path/filepath"
	"syscall"
)

// lockFile is the file by which a directory is locked.
const lockFile = ".ocilocal-lock"

const (
	openNoFollow = 0
	openNonblock = 0
)

// noSpace are the errors of a full disk: ERROR_DISK_FULL, ERROR_HANDLE_DISK_FULL.
var noSpace = []syscall.Errno{112, 39}

// noResources are the errors of a process or machine that is out of handles or memory:
// ERROR_TOO_MANY_OPEN_FILES, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_NO_SYSTEM_RESOURCES,
// ERROR_COMMITMENT_LIMIT.
var noResources = []syscall.Errno{4, 8, 14, 1450, 1455}

// tryLockDir has the contract of that for Unix. It locks a directory by an open file in it that no
// other handle may read or write. The file may be deleted, because a sweeper removes the directory
// while it holds the lock. os.Root can't do this: it shares all files that it opens. Windows closes
// the handle, and so drops the lock, when the process ends.
func tryLockDir(root *rootDir, name string) (release func() error, held bool, err error) {
	const errSharingViolation = syscall.Errno(32)
	if err := root.fault.before("lock", name); err != nil {
		return nil, false, err
	}
	marker, err := syscall.UTF16PtrFromString(filepath.Join(root.dir.Name(), filepath.FromSlash(name), lockFile))
	if err != nil {
		return nil, false, err
	}
	h, err := syscall.CreateFile(marker, syscall.GENERIC_READ|syscall.GENERIC_WRITE, fileShareDelete,
		nil, syscall.OPEN_ALWAYS, syscall.FILE_ATTRIBUTE_NORMAL, 0)
	switch err {
	case nil:
		return func() error { return os.NewSyscallError("CloseHandle", syscall.CloseHandle(h)) }, true, nil
	case errSharingViolation, syscall.ERROR_PATH_NOT_FOUND:
		return nil, false, nil // somebody has it, or it is gone
	}
	return nil, false, &os.PathError{Op: "lock", Path: name, Err: err}
}

// tryLockFile opens a file for reading and writing that nobody else may read or write until it is
// closed. It may be renamed and deleted meanwhile. It returns nil when somebody else has the file,
// or when it is gone.
func tryLockFile(root *rootDir, name string) (*os.File, error) {
	const errSharingViolation = syscall.Errno(32)
	if err := root.fault.before("lock", name); err != nil {
		return nil, err
	}
	path, err := syscall.UTF16PtrFromString(filepath.Join(root.dir.Name(), filepath.FromSlash(name)))
	if err != nil {
		return nil, err
	}
	h, err := syscall.CreateFile(path, syscall.GENERIC_READ|syscall.GENERIC_WRITE, fileShareDelete,
		nil, syscall.OPEN_EXISTING, syscall.FILE_ATTRIBUTE_NORMAL|syscall.FILE_FLAG_OPEN_REPARSE_POINT, 0)
	switch err {
	case nil:
		return os.NewFile(uintptr(h), name), nil
	case errSharingViolation, syscall.ERROR_FILE_NOT_FOUND, syscall.ERROR_PATH_NOT_FOUND:
		return nil, nil
	}
	return nil, &os.PathError{Op: "open", Path: name, Err: err}
}

// closeLocked closes a file of [tryLockFile]. A child process inherits no handle, so the lock ends.
func closeLocked(f *os.File) error { return f.Close() }

const fileShareDelete = 0x4 // FILE_SHARE_DELETE

// checkWritable is nil here: the first write fails instead.
func checkWritable(string) error { return nil }
