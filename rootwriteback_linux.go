//go:build linux && (amd64 || arm64)

package ocilocal

import (
	"os"
	"syscall"
)

// startWriteback asks the kernel to begin writing a range. It is no fsync and
// promises nothing, so its error says nothing either: fsync's will.
func startWriteback(f *os.File, off, n int64) {
	const syncFileRangeWrite = 2
	_ = syscall.SyncFileRange(int(f.Fd()), off, n, syncFileRangeWrite)
}
