package ocilocal

import (
	"io/fs"
	"os"
	"syscall"
)

// rootDir is a registry's root directory, or one that is exported to or imported
// from. It is an [os.Root], so that no name leads out of it, whose operations
// tests can make fail or stop at.
type rootDir struct {
	*os.Root
	// fault is the tests' seam: called before each operation on the file
	// system, by any goroutine, its error is the operation's. Nil in production.
	fault func(op, name string) error
}

// openRoot opens a directory, by whose fault its operations are to fail. Unlike
// [os.OpenRoot] it doesn't block on a named pipe.
func openRoot(dir string, fault func(op, name string) error) (*rootDir, error) {
	r := &rootDir{fault: fault}
	if err := r.injected("open", dir); err != nil {
		return nil, err
	}
	fi, err := os.Stat(dir)
	if err == nil && !fi.IsDir() {
		err = &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOTDIR}
	}
	if err != nil {
		return nil, err
	}
	if r.Root, err = os.OpenRoot(dir); err != nil {
		return nil, err
	}
	return r, nil
}

// below opens a directory of r.
func (r *rootDir) below(name string) (*rootDir, error) {
	if err := r.injected("open", name); err != nil {
		return nil, err
	}
	sub, err := r.Root.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &rootDir{Root: sub, fault: r.fault}, nil
}

// injected asks the tests' seam whether op on name shall fail.
func (r *rootDir) injected(op, name string) error {
	if r.fault == nil {
		return nil
	}
	if err := r.fault(op, name); err != nil {
		return &fs.PathError{Op: op, Path: name, Err: err}
	}
	return nil
}

func (r *rootDir) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	op := "open"
	if flag&os.O_CREATE != 0 {
		op = "create"
	}
	if err := r.injected(op, name); err != nil {
		return nil, err
	}
	return r.Root.OpenFile(name, flag, perm)
}

func (r *rootDir) Open(name string) (*os.File, error) {
	return r.OpenFile(name, os.O_RDONLY, 0)
}

func (r *rootDir) Lstat(name string) (fs.FileInfo, error) {
	if err := r.injected("stat", name); err != nil {
		return nil, err
	}
	return r.Root.Lstat(name)
}

func (r *rootDir) Mkdir(name string, perm fs.FileMode) error {
	if err := r.injected("mkdir", name); err != nil {
		return err
	}
	return r.Root.Mkdir(name, perm)
}

func (r *rootDir) Link(oldname, newname string) error {
	if err := r.injected("link", newname); err != nil {
		return err
	}
	return r.Root.Link(oldname, newname)
}

func (r *rootDir) Rename(oldname, newname string) error {
	if err := r.injected("rename", newname); err != nil {
		return err
	}
	return r.Root.Rename(oldname, newname)
}

func (r *rootDir) Chmod(name string, mode fs.FileMode) error {
	if err := r.injected("chmod", name); err != nil {
		return err
	}
	return r.Root.Chmod(name, mode)
}

func (r *rootDir) Remove(name string) error {
	if err := r.injected("remove", name); err != nil {
		return err
	}
	return r.Root.Remove(name)
}

func (r *rootDir) RemoveAll(name string) error {
	if err := r.injected("remove", name); err != nil {
		return err
	}
	return r.Root.RemoveAll(name)
}

// writebackEvery is how much of a large file is handed to the disk at once
// while the rest comes in, so that fsync doesn't have to wait for all of it.
const writebackEvery = 8 << 20

// A writeback hands a file to the disk while it is being written.
type writeback struct {
	written, started int64 // bytes of the file: all, and those under writeback
}

func (w *writeback) wrote(f *os.File, n int) {
	w.written += int64(n)
	if w.written-w.started >= writebackEvery {
		startWriteback(f, w.started, w.written-w.started)
		w.started = w.written
	}
}

// seamWriter writes to an open file below a root.
type seamWriter struct {
	root      *rootDir
	file      *os.File
	name      string
	writeback writeback
}

func (w *seamWriter) Write(p []byte) (int, error) {
	if err := w.root.injected("write", w.name); err != nil {
		return 0, err
	}
	n, err := w.file.Write(p)
	w.writeback.wrote(w.file, n)
	return n, err
}

// sync makes the bytes of an open file below the root durable.
func (r *rootDir) sync(f *os.File, name string) error {
	if err := r.injected("fsync", name); err != nil {
		return err
	}
	return f.Sync()
}
