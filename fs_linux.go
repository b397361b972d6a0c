package ocilocal

import (
	"os"
	"syscall"
)

// networkFS names the network file system that dir lies on, "" for a local one.
// The numbers are those of linux/magic.h and of the file systems' own headers.
func networkFS(dir string) (string, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return "", err
	}
	switch uint32(st.Type) {
	case 0x6969:
		return "nfs", nil
	case 0x517b, 0xff534d42, 0xfe534d42:
		return "smb", nil
	case 0x5346414f, 0x6b414653:
		return "afs", nil
	case 0x00c36400:
		return "ceph", nil
	case 0x0bd00bd0:
		return "lustre", nil
	case 0x7461636f:
		return "ocfs2", nil
	}
	return "", nil
}

// kernelCopies reports whether [os.File.ReadFrom] can have the kernel copy src
// to dst (copy_file_range). Across file systems it may copy in small pieces instead.
func kernelCopies(src, dst *os.File) bool {
	var a, b syscall.Stat_t
	return syscall.Fstat(int(src.Fd()), &a) == nil && syscall.Fstat(int(dst.Fd()), &b) == nil && a.Dev == b.Dev
}
