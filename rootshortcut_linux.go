package ocilocal

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

// A shortcut finds a name below a directory by one system call (openat2, Linux 5.6). [os.Root] opens
// and closes each directory on the way, in each operation. That took a tenth to a fifth of the
// processor time of imports and exports.
//
// The kernel walks the path. It refuses to leave the directory (RESOLVE_BENEATH), and to follow a
// link on the way or at the end (RESOLVE_NO_SYMLINKS). [os.Root] follows links that stay inside. So
// a shortcut only gives an outcome that os.Root would give as well: the operation was done, or a
// name is missing. In every other case nothing has changed, and done is false. The caller then asks
// the os.Root, which follows the link or returns the error. No directory stays open between calls,
// so a directory that is replaced is noticed as by os.Root.
//
// A nil *shortcut never reports done. It is nil if the kernel is older, if a sandbox refuses the
// call (gVisor, seccomp), and on other systems.
type shortcut struct {
	root string // for the names of files
	dir  *os.File
	conn syscall.RawConn // of dir: during a call, it keeps the descriptor from being closed and used again
}

// newShortcut returns nil if the system does not offer openat2.
func newShortcut(root *os.Root) *shortcut {
	if runtime.GOOS == "android" { // its sandbox kills a process for a system call that it does not know
		return nil
	}
	dir, err := root.Open(".")
	if err != nil {
		return nil
	}
	s := &shortcut{root: root.Name(), dir: dir}
	if s.conn, err = dir.SyscallConn(); err == nil {
		var fd int
		if fd, err = s.open(".", openPath|syscall.O_DIRECTORY, 0); err == nil {
			syscall.Close(fd)
			return s
		}
	}
	dir.Close()
	return nil
}

func (s *shortcut) Close() error {
	if s == nil {
		return nil
	}
	return s.dir.Close()
}

// openFile is [os.Root.OpenFile].
func (s *shortcut) openFile(name string, flag int, perm fs.FileMode) (f *os.File, done bool, err error) {
	if !s.isFor(name) || perm&^fs.ModePerm != 0 {
		return nil, false, nil
	}
	const newFile = os.O_CREATE | os.O_EXCL
	switch {
	case flag&newFile == newFile:
		flag &^= syscall.O_NONBLOCK // an open of a new file does not block, and os.NewFile polls a nonblocking one
	case flag&os.O_CREATE == 0:
		perm = 0
	}
	fd, err := s.open(name, flag|syscall.O_NOFOLLOW|syscall.O_LARGEFILE, perm)
	if err != nil {
		done, err = ifMissing("openat", name, err)
		return nil, done, err
	}
	return s.file(fd, name), true, nil
}

// lstat is [os.Root.Lstat].
func (s *shortcut) lstat(name string) (fi fs.FileInfo, done bool, err error) {
	if !s.isFor(name) {
		return nil, false, nil
	}
	fd, err := s.open(name, openPath|syscall.O_NOFOLLOW, 0) // a link at the end is opened itself
	if err != nil {
		done, err = ifMissing("statat", name, err)
		return nil, done, err
	}
	f := s.file(fd, name)
	defer f.Close()
	fi, err = f.Stat()
	return fi, err == nil, nil
}

// link is [os.Root.Link]. Like it, it gives a link a second name instead of following it.
func (s *shortcut) link(oldname, newname string) (done bool, err error) {
	if !s.isFor(oldname) || !s.isFor(newname) {
		return false, nil
	}
	oldDir, oldBase := splitName(oldname)
	newDir, newBase := splitName(newname)
	oldFD, err := s.open(oldDir, openPath|syscall.O_DIRECTORY, 0)
	if err != nil {
		return false, nil
	}
	defer syscall.Close(oldFD)
	newFD := oldFD
	if newDir != oldDir {
		if newFD, err = s.open(newDir, openPath|syscall.O_DIRECTORY, 0); err != nil {
			return false, nil
		}
		defer syscall.Close(newFD)
	}
	return linkat(oldFD, oldBase, newFD, newBase) == nil, nil
}

// remove is [os.Root.Remove] of anything that is not a directory.
func (s *shortcut) remove(name string) (done bool, err error) {
	if !s.isFor(name) {
		return false, nil
	}
	dir, base := splitName(name)
	fd, err := s.open(dir, openPath|syscall.O_DIRECTORY, 0)
	if err != nil {
		return ifMissing("removeat", name, err)
	}
	defer syscall.Close(fd)
	if err := syscall.Unlinkat(fd, base); err != nil {
		return ifMissing("removeat", name, err)
	}
	return true, nil
}

// isFor reports whether a shortcut to name is shorter than the walk. A name with an empty element,
// "." or ".." is left to [os.Root]: it is not certain that both mean the same by it.
func (s *shortcut) isFor(name string) bool {
	return s != nil && strings.Contains(name, "/") && fs.ValidPath(name)
}

// splitName returns the directory of a name, and its last element.
func splitName(name string) (dir, base string) {
	i := strings.LastIndexByte(name, '/')
	return name[:i], name[i+1:]
}

// ifMissing makes the error of [os.Root] from one that says that a name is missing.
func ifMissing(op, name string, err error) (done bool, _ error) {
	if !errors.Is(err, syscall.ENOENT) {
		return false, nil
	}
	return true, &fs.PathError{Op: op, Path: name, Err: syscall.ENOENT}
}

// file makes a file of a descriptor.
func (s *shortcut) file(fd int, name string) *os.File {
	return os.NewFile(uintptr(fd), s.root+"/"+name)
}

// openPath opens a name without access to what it names (O_PATH). Package syscall lacks it.
const openPath = 0x200000

// open calls openat2 on a name below the directory.
func (s *shortcut) open(name string, flag int, perm fs.FileMode) (fd int, err error) {
	const (
		sysOpenat2 = 437 // on every architecture except MIPS, which has no call of that number

		resolveNoMagiclinks = 0x02
		resolveNoSymlinks   = 0x04
		resolveBeneath      = 0x08
	)
	path, err := syscall.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	how := struct{ flags, mode, resolve uint64 }{ // struct open_how
		uint64(flag | syscall.O_CLOEXEC), uint64(perm),
		resolveBeneath | resolveNoSymlinks | resolveNoMagiclinks,
	}
	var n uintptr
	var errno syscall.Errno
	err = s.conn.Control(func(dir uintptr) {
		n, _, errno = syscall.Syscall6(sysOpenat2, dir, uintptr(unsafe.Pointer(path)),
			uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return int(n), err
}

// linkat is [syscall.Link] for names below two open directories.
func linkat(oldDir int, oldname string, newDir int, newname string) error {
	from, err := syscall.BytePtrFromString(oldname)
	if err != nil {
		return err
	}
	to, err := syscall.BytePtrFromString(newname)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall6(syscall.SYS_LINKAT, uintptr(oldDir), uintptr(unsafe.Pointer(from)),
		uintptr(newDir), uintptr(unsafe.Pointer(to)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}
