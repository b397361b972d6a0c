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

// networkNames are those that more than one machine can have mounted. FUSE isn't among
// them, which can be anything and is mostly local, nor 9p, as which gVisor shows all its files.
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

// kernelCopies reports whether [os.File.ReadFrom] can have the kernel copy src
// to dst (copy_file_range). Across file systems it may copy in small pieces instead.
func kernelCopies(src, dst *os.File) bool {
	var a, b syscall.Stat_t
	return syscall.Fstat(int(src.Fd()), &a) == nil && syscall.Fstat(int(dst.Fd()), &b) == nil && a.Dev == b.Dev
}
