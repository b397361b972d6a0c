//go:build linux && (amd64 || arm64)

package ocilocal

import (
	"os"
	"syscall"
)

// startWriteback asks the kernel to begin writing a range (sync_file_range). It promises nothing,
// so its error is dropped: a write that failed is reported by the fsync that follows.
func startWriteback(f *os.File, off, n int64) {
	const syncFileRangeWrite = 2
	_ = syscall.SyncFileRange(int(f.Fd()), off, n, syncFileRangeWrite)
}
