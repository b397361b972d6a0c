//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package ocilocal

import (
	"io/fs"
	"syscall"
)

// ownerAndLinks returns the user that a file belongs to, and how many names the file has.
func ownerAndLinks(fi fs.FileInfo) (owner int, links uint64) {
	st := fi.Sys().(*syscall.Stat_t)
	return int(st.Uid), uint64(st.Nlink)
}
