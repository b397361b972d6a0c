//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package ocilocal

import (
	"os"
	"path/filepath"
)

const (
	openNoFollow = 0
	openNonblock = 0
)

// lockDir holds a directory by a file inside it that is open. Where an open
// file can't be removed (Windows), removing the directory's marker tells
// whether somebody has it; the directory itself goes only after its marker.
func lockDir(root *os.Root, name string) (release func() error, held bool, err error) {
	marker := filepath.Join(name, "lock")
	if err := root.Remove(marker); err != nil && !os.IsNotExist(err) {
		return nil, false, nil // held
	}
	f, err := root.OpenFile(marker, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, false, nil
	}
	return func() error {
		err := f.Close()
		root.Remove(marker) // gone already where the directory was removed
		return err
	}, true, nil
}

// checkWritable leaves it to the first write to fail here.
func checkWritable(string) error { return nil }
