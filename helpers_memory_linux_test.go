// A place in memory for the temporary files of the quick tests.

package ocilocal_test

import (
	"flag"
	"os"
	"path/filepath"
	"syscall"
)

func init() { tempInMemory = tempInShm }

const (
	shm       = "/dev/shm"
	shmPrefix = "ocilocal-test-"
	shmMagic  = 0x01021994 // of tmpfs, see statfs(2)
	shmNeeded = 1 << 30    // ten times what the quick tests need
)

// tempInShm moves the temporary files of this process and its children to /dev/shm, and returns a
// function that removes them. Making and syncing small files takes half of the tests' time on a
// disk. It changes nothing if TMPDIR is set, in deep tests, in benchmarks, and where /dev/shm is
// small or missing.
//
// A killed run leaves its directory behind. The next one removes each that nobody has locked.
func tempInShm() (remove func()) {
	nothing := func() {}
	var fs syscall.Statfs_t
	if os.Getenv("TMPDIR") != "" || deepLevel() > 0 || benchmarking() ||
		syscall.Statfs(shm, &fs) != nil || fs.Type != shmMagic || fs.Bavail*uint64(fs.Bsize) < shmNeeded {
		return nothing
	}
	old, _ := filepath.Glob(filepath.Join(shm, shmPrefix+"*"))
	for _, dir := range old {
		if unlock := lockDir(dir); unlock != nil {
			os.RemoveAll(dir)
			unlock()
		}
	}
	dir, err := os.MkdirTemp(shm, shmPrefix)
	if err != nil {
		return nothing
	}
	unlock := lockDir(dir)
	// Other users enter it, as they enter /tmp.
	if unlock == nil || os.Chmod(dir, 0o711) != nil || os.Setenv("TMPDIR", dir) != nil {
		os.RemoveAll(dir)
		return nothing
	}
	return func() {
		os.RemoveAll(dir)
		unlock()
	}
}

func benchmarking() bool {
	f := flag.Lookup("test.bench")
	return f != nil && f.Value.String() != ""
}

// lockDir locks a directory until this process ends, or else returns nil.
func lockDir(dir string) (unlock func()) {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil
	}
	return func() { f.Close() }
}
