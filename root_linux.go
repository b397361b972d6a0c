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
	return networkNames[uint32(st.Type)], nil
}

// networkNames are the file systems that several machines can mount at once. FUSE is not among
// them: it can be anything, and mostly is local. Neither is 9p: gVisor shows all files as 9p.
var networkNames = map[uint32]string{
	0x6969:     "nfs",
	0x517b:     "smb",
	0xff534d42: "smb",
	0xfe534d42: "smb",
	0x5346414f: "afs",
	0x6b414653: "afs",
	0x00c36400: "ceph",
	0x0bd00bd0: "lustre",
	0x7461636f: "ocfs2",
	0x786f4256: "vboxsf",
	0x01161970: "gfs2",
	0x47504653: "gpfs",
	0x19830326: "beegfs",
	0x73757245: "coda",
	0x564c:     "ncp",
}

// kernelCopies reports whether [os.File.ReadFrom] can let the kernel copy src to dst
// (copy_file_range). It is false for files on two file systems, where the copy may go through small
// buffers and is slower than one by this package.
func kernelCopies(src, dst *os.File) bool {
	var a, b syscall.Stat_t
	return syscall.Fstat(int(src.Fd()), &a) == nil && syscall.Fstat(int(dst.Fd()), &b) == nil && a.Dev == b.Dev
}
