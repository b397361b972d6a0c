package benchmarks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Large makes the bytes of a large layer as fast as memory can be copied, so
// that a measure shows the store and not the source. seed makes it unique.
func Large(seed uint64, size int64) io.Reader {
	return &large{left: size, count: seed << 32}
}

type large struct {
	left  int64
	count uint64
	rest  []byte
	block []byte
}

func (l *large) Read(p []byte) (int, error) {
	if l.left == 0 {
		return 0, io.EOF
	}
	if l.block == nil {
		l.block = make([]byte, 64<<10)
		for i := range len(l.block) / 8 {
			binary.LittleEndian.PutUint64(l.block[8*i:], uint64(i)*0x9e3779b97f4a7c15+l.count)
		}
	}
	n := 0
	for n < len(p) && l.left > 0 {
		if len(l.rest) == 0 {
			l.count++
			binary.LittleEndian.PutUint64(l.block, l.count) // no two blocks are equal
			l.rest = l.block
		}
		m := copy(p[n:], l.rest[:min(int64(len(l.rest)), l.left)])
		l.rest = l.rest[m:]
		l.left -= int64(m)
		n += m
	}
	return n, nil
}

// DigestLarge is the digest of [Large].
func DigestLarge(seed uint64, size int64) digest.Digest {
	h := sha256.New()
	io.CopyBuffer(struct{ io.Writer }{h}, Large(seed, size), make([]byte, 256<<10))
	return digest.NewDigest(digest.SHA256, h)
}

// PlainWrite writes src to a new file and syncs it: what any durable put costs at least.
func PlainWrite(name string, src io.Reader) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, src, make([]byte, 256<<10)); err != nil {
		return err
	}
	return f.Sync()
}

// PlainPublish does with dir, which has t and b in it, what a durable publish of two
// new blobs asks of a file system, and nothing else: it tells what the disk allows.
func PlainPublish(dir string, i int) error {
	names := [2]string{fmt.Sprintf("%d-layer", i), fmt.Sprintf("%d-manifest", i)}
	var errs [2]error
	var wg sync.WaitGroup
	for k, name := range names {
		wg.Go(func() { errs[k] = PlainWrite(filepath.Join(dir, "t", name), bytes.NewReader(SmallLayer(2*i+k))) })
	}
	wg.Wait()
	err := errors.Join(errs[:]...)
	for _, name := range names {
		err = errors.Join(err, os.Link(filepath.Join(dir, "t", name), filepath.Join(dir, "b", name)))
	}
	b, openErr := os.Open(filepath.Join(dir, "b"))
	if err = errors.Join(err, openErr); err != nil {
		return err
	}
	err = errors.Join(b.Sync(), b.Close())
	for _, name := range names {
		err = errors.Join(err, os.Remove(filepath.Join(dir, "t", name)))
	}
	return err
}

// PeakDisk adds up the files below dir, those with several names once, every five milliseconds until peak is called. It
// returns the largest sum.
func PeakDisk(dir string) (peak func() int64) {
	var largest int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for last := false; !last; {
			select {
			case <-stop:
				last = true
			case <-time.After(5 * time.Millisecond):
			}
			var counted []fs.FileInfo
			var sum int64
			filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
				if err != nil || !e.Type().IsRegular() {
					return nil
				}
				fi, err := e.Info()
				if err == nil && !slices.ContainsFunc(counted, func(other fs.FileInfo) bool { return os.SameFile(fi, other) }) {
					counted = append(counted, fi)
					sum += fi.Size()
				}
				return nil
			})
			largest = max(largest, sum)
		}
	}()
	return func() int64 {
		close(stop)
		<-done
		return largest
	}
}

// PeakMemory runs fn and returns by how many bytes the process's resident
// memory, all of it and not only Go's heap, exceeded at its highest what it
// was before; −1 where the system doesn't tell.
func PeakMemory(fn func() error) (int64, error) {
	debug.FreeOSMemory()
	before := procStatus("VmRSS:")
	reset := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
	err := fn()
	peak := procStatus("VmHWM:")
	if before < 0 || peak < 0 || reset != nil {
		return -1, err
	}
	return max(peak-before, 0), err
}

func procStatus(key string) int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return -1
	}
	_, rest, ok := bytes.Cut(b, []byte(key))
	fields := bytes.Fields(rest)
	if !ok || len(fields) == 0 {
		return -1
	}
	kib, err := strconv.ParseInt(string(fields[0]), 10, 64)
	if err != nil {
		return -1
	}
	return kib << 10
}
