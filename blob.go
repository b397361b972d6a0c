package ocilocal

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"

	"github.com/opencontainers/go-digest"
)

// The two directories of a root that hold blobs.
const (
	blobsDir = "blobs" // blobs/<algorithm>/<encoded>: complete, verified, read-only
	tmpDir   = "tmp"   // tmp/<session>/: what one open handle is writing
)

// blobStore keeps content-addressed files below a root. It knows digests; it
// knows nothing of manifests or of the index. It is safe for concurrent use,
// by other processes on the same root too.
type blobStore struct {
	root     *rootDir
	tmp      string // the directory for what is being written, tmpDir in a registry
	readOnly bool
	buffers  sync.Pool // *[]byte of copyBufferSize

	mu      sync.Mutex
	session string       // tmp/<name>, made and locked by the first write; "" before
	release func() error // drops the session's lock
	perm    fs.FileMode  // the permissions that a new session has here
	algDirs map[digest.Algorithm]bool
}

// copyBufferSize makes a large blob cost few system calls, and still lets
// what was read be hashed and written while it is in the processor's cache.
const copyBufferSize = 1 << 20

func newBlobStore(root *rootDir, readOnly bool) *blobStore {
	return &blobStore{
		root:     root,
		tmp:      tmpDir,
		perm:     sessionPerm,
		readOnly: readOnly,
		algDirs:  map[digest.Algorithm]bool{},
		buffers: sync.Pool{New: func() any {
			b := make([]byte, copyBufferSize)
			return &b
		}},
	}
}

// blobPath is where d's bytes are. It panics unless d has passed [checkDigest].
func blobPath(d digest.Digest) string {
	return path.Join(blobsDir, string(d.Algorithm()), d.Encoded())
}

// size returns the size of d's file, and [ErrNotFound] when there is none.
// It is a look at the directory: it doesn't say that the bytes are good.
func (s *blobStore) size(d digest.Digest) (int64, error) {
	if err := checkDigest(d); err != nil {
		return 0, err
	}
	fi, err := s.root.Lstat(blobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	if !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("blob %s: is not a regular file: %w", d, ErrDigestMismatch)
	}
	return fi.Size(), nil
}

// present reports whether d has a file, whatever is in it.
func (s *blobStore) present(d digest.Digest) (bool, error) {
	_, err := s.root.Lstat(blobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// checkSize is nil if d's file is there with that size.
func (s *blobStore) checkSize(d digest.Digest, size int64) error {
	got, err := s.size(d)
	if err == nil && got != size {
		err = fmt.Errorf("blob %s: %w: file has %d bytes, want %d", d, ErrSizeMismatch, got, size)
	}
	return err
}

// openFile opens d's file. A size of −1 takes the file's own.
func (s *blobStore) openFile(d digest.Digest, size int64) (*os.File, int64, error) {
	if err := checkDigest(d); err != nil {
		return nil, 0, err
	}
	f, err := s.root.OpenFile(blobPath(d), os.O_RDONLY|openNoFollow, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		// A link is not followed. As damage, it is healed like any other.
		if _, bad := s.size(d); errors.Is(bad, ErrDigestMismatch) {
			err = bad
		}
		return nil, 0, err
	}
	got, err := checkRegular(f)
	if err == nil && size >= 0 && got != size {
		err = fmt.Errorf("blob %s: %w: file has %d bytes, want %d", d, ErrSizeMismatch, got, size)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, got, nil
}

// open returns a reader of d that verifies as it goes. ctx governs the reads as well.
func (s *blobStore) open(ctx context.Context, d digest.Digest, size int64) (*verifier, error) {
	f, size, err := s.openFile(d, size)
	if err != nil {
		return nil, err
	}
	return s.verifier(ctx, f, d, size), nil
}

func (s *blobStore) verifier(ctx context.Context, src io.ReadCloser, d digest.Digest, size int64) *verifier {
	return &verifier{ctx: ctx, src: src, digest: d, size: size, hash: newHash(d.Algorithm()), buffers: &s.buffers}
}

// verify reads all of d and says whether it is what its name says:
// nil, [ErrNotFound], [ErrSizeMismatch] or [ErrDigestMismatch].
func (s *blobStore) verify(ctx context.Context, d digest.Digest, size int64) error {
	r, err := s.open(ctx, d, size)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = r.WriteTo(io.Discard)
	return err
}

// copy is io.Copy with one of the store's buffers.
func (s *blobStore) copy(dst io.Writer, src io.Reader) (int64, error) {
	buf := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buf)
	// The wrappers hide WriterTo and ReaderFrom, which would bring buffers of their own.
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, *buf)
}

// A blobEntry is one directory entry below blobs/.
type blobEntry struct {
	path   string        // below the root
	digest digest.Digest // empty when the name is not a digest in its right place
	info   fs.FileInfo
}

// walkBlobs calls visit for every entry below blobs/ of a root or layout, in no order, holding one batch
// of names at a time. What is no blob (another name, a directory, a link) comes
// with an empty digest. visit's error ends the walk and is returned.
func walkBlobs(ctx context.Context, root *rootDir, visit func(blobEntry) error) error {
	return root.eachEntry(ctx, blobsDir, func(name string) error {
		dir := path.Join(blobsDir, name)
		alg := digest.Algorithm(name)
		fi, err := root.Lstat(dir)
		if err != nil {
			return ignoreNotExist(err)
		}
		if !fi.IsDir() || digestHexLen(alg) == 0 {
			return visit(blobEntry{path: dir, info: fi})
		}
		return root.eachEntry(ctx, dir, func(name string) error {
			e := blobEntry{path: path.Join(dir, name)}
			e.info, err = root.Lstat(e.path)
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil // deleted since the directory was read
				}
				return err
			}
			if d := digest.NewDigestFromEncoded(alg, name); e.info.Mode().IsRegular() && checkDigest(d) == nil {
				e.digest = d
			}
			return visit(e)
		})
	})
}

// walk calls visit for every entry below blobs/, see [walkBlobs].
func (s *blobStore) walk(ctx context.Context, visit func(blobEntry) error) error {
	return walkBlobs(ctx, s.root, visit)
}

// empty reports whether no blob is there.
func (s *blobStore) empty() (bool, error) {
	err := s.walk(context.Background(), func(e blobEntry) error {
		if e.digest != "" {
			return errStop
		}
		return nil
	})
	if err == errStop {
		return false, nil
	}
	return err == nil, err
}

// largeFile is the size from which on it takes a file system milliseconds to free a file's space.
const largeFile = 64 << 20

// unname takes the name of d's file away. A large file is only moved, to the name below tmp/ that is returned.
func (s *blobStore) unname(d digest.Digest, size int64) (moved string, err error) {
	if size >= largeFile {
		if dir, err := s.enter(); err == nil { // else the disk is too full for that
			moved = path.Join(dir, rand.Text())
			return moved, s.root.Rename(blobPath(d), moved)
		}
	}
	return "", s.root.Remove(blobPath(d))
}

// makeAlgDir makes blobs/<alg> durably.
func (s *blobStore) makeAlgDir(alg digest.Algorithm) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.algDirs[alg] {
		return nil
	}
	name := path.Join(blobsDir, string(alg))
	if err := s.root.makeDir(name, 0o755); err != nil {
		return err
	}
	// Also when it was there: its maker may not have come to this line.
	if err := s.root.syncDir(blobsDir); err != nil {
		return err
	}
	s.algDirs[alg] = true
	return nil
}

// verifier reads a blob and hashes it on the way. The Read that would hand out
// the last byte hands out an error instead if the bytes are not the digest's,
// so that even a consumer that stops after size bytes never has a whole bad blob.
type verifier struct {
	ctx    context.Context
	src    io.ReadCloser
	digest digest.Digest
	size   int64
	off    int64
	hash   hash.Hash
	err    error // sticky

	buffers *sync.Pool // the store's
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if err := v.ctx.Err(); err != nil {
		return 0, err
	}
	if v.size == 0 { // its end comes before its first byte
		v.err = v.finish()
		return 0, v.err
	}
	if int64(len(p)) > v.size-v.off {
		p = p[:v.size-v.off]
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := v.src.Read(p)
	v.hash.Write(p[:n])
	v.off += int64(n)
	if v.off == v.size {
		if v.err = v.finish(); v.err != io.EOF {
			clear(p[:n])
			return 0, v.err
		}
		return n, nil
	}
	v.err = v.cutOff(err)
	return n, v.err
}

// WriteTo implements [io.WriterTo], for io.Copy: a chunk is hashed while it is
// being written and the next one read, and the last is hashed before it is written.
func (v *verifier) WriteTo(dst io.Writer) (written int64, err error) {
	if v.size-v.off <= copyBufferSize || v.err != nil {
		return io.Copy(dst, struct{ io.Reader }{v})
	}
	bufs := [2]*[]byte{v.buffers.Get().(*[]byte), v.buffers.Get().(*[]byte)}
	defer v.buffers.Put(bufs[0])
	defer v.buffers.Put(bufs[1])
	hashing := make(chan struct{}, 1)
	hashing <- struct{}{}
	defer func() { <-hashing }() // before the buffers go back
	for i := 0; v.size-v.off > copyBufferSize; i++ {
		if err := v.ctx.Err(); err != nil {
			return written, err
		}
		chunk := *bufs[i%2]
		if _, err := io.ReadFull(v.src, chunk); err != nil {
			v.err = v.cutOff(err)
			return written, v.err
		}
		v.off += int64(len(chunk))
		<-hashing
		go func() {
			v.hash.Write(chunk)
			hashing <- struct{}{}
		}()
		n, err := dst.Write(chunk)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
	<-hashing
	hashing <- struct{}{}
	n, err := io.Copy(dst, struct{ io.Reader }{v})
	return written + n, err
}

// cutOff says of the end of a file that came too early what it is.
func (v *verifier) cutOff(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("blob %s: %w: ended after %d bytes, want %d", v.digest, ErrSizeMismatch, v.off, v.size)
	}
	return err
}

// finish is called when size bytes were read: io.EOF if they are the blob.
func (v *verifier) finish() error {
	var one [1]byte
	switch n, err := io.ReadFull(v.src, one[:]); {
	case n > 0:
		return fmt.Errorf("blob %s: %w: goes on after %d bytes", v.digest, ErrSizeMismatch, v.size)
	case err != io.EOF:
		return err
	}
	if got := digest.NewDigest(v.digest.Algorithm(), v.hash); got != v.digest {
		return fmt.Errorf("blob %s: %w: its bytes hash to %s (the file is damaged: importing or pulling the artifact again heals it)",
			v.digest, ErrDigestMismatch, got)
	}
	return io.EOF
}

func (v *verifier) Close() error {
	if v.err == nil || v.err == io.EOF {
		v.err = ErrClosed
	}
	return v.src.Close()
}
