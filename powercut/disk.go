// Package powercut tests ocilocal on a disk whose power is cut.
//
// The disk is a file of a FUSE file system, which another process serves. ext4
// lies on a loop device over it, and the registry on that. Every write and
// every flush that reaches the disk is logged, between marks that the test
// sets. For any moment of the log, a disk as the cut may have left it is then
// put together: all that was written before the last flush, and of what came
// after a random part, some of it torn.
package powercut

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// sector is what a disk writes whole or not at all.
const sector = 512

// superblock is where the first block of the disk ends. ext4 trusts disks to write its
// superblock whole and does not mount with a torn one, whose checksum is wrong.
const superblock = 4096

// An event is one entry of the log: a write when data isn't nil, a flush otherwise.
type event struct {
	off  int64
	data []byte
}

// disk is the one file of the file system.
type disk struct {
	fs.Inode

	mu   sync.Mutex // guards what follows
	now  []byte     // what reading returns
	base []byte     // what it was when the log began
	log  []event
}

func newDisk(image []byte) *disk {
	return &disk{now: image, base: slices.Clone(image)}
}

// mark returns the present length of the log: a moment.
func (d *disk) mark() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.log)
}

// cut returns a disk whose power failed when the log had n entries.
func (d *disk) cut(n int, rng *rand.Rand) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	image := slices.Clone(d.base)
	flushed := n
	for flushed > 0 && d.log[flushed-1].data != nil {
		flushed--
	}
	for i, e := range d.log[:n] {
		data := e.data
		if i >= flushed {
			switch rng.IntN(4) {
			case 0: // never reached the medium
				continue
			case 1: // torn
				if e.off < superblock {
					break
				}
				sectors := (len(data) + sector - 1) / sector
				data = data[:min(len(data), rng.IntN(sectors+1)*sector)]
			}
		}
		copy(image[e.off:], data)
	}
	return image
}

func (d *disk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	out.Mode, out.Size = 0o600, uint64(len(d.now))
	return 0
}

func (d *disk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (d *disk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.now)) {
		return fuse.ReadResultData(nil), 0
	}
	n := copy(dest, d.now[off:])
	return fuse.ReadResultData(dest[:n]), 0
}

func (d *disk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off+int64(len(data)) > int64(len(d.now)) {
		return 0, syscall.ENOSPC
	}
	copy(d.now[off:], data)
	d.log = append(d.log, event{off, slices.Clone(data)})
	return uint32(len(data)), 0
}

// Fsync is a flush: the disk says that everything before it is on the medium.
func (d *disk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, event{})
	return 0
}

// directory is the file system's root.
type directory struct {
	fs.Inode
	disk *disk
}

func (r *directory) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, r.disk, fs.StableAttr{Mode: fuse.S_IFREG}), false)
}

var (
	_ fs.NodeOnAdder   = (*directory)(nil)
	_ fs.NodeGetattrer = (*disk)(nil)
	_ fs.NodeOpener    = (*disk)(nil)
	_ fs.NodeReader    = (*disk)(nil)
	_ fs.NodeWriter    = (*disk)(nil)
	_ fs.NodeFsyncer   = (*disk)(nil)
)
