package ocilocal

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// The two directories of a root that hold blobs.
const (
	blobsDir = "blobs" // blobs/<algorithm>/<encoded>: complete, verified, read-only
	tmpDir   = "tmp"   // tmp/<session>/: what one open handle is writing
)

// blobStore keeps content-addressed files below a root. It knows digests, and neither manifests
// nor the index. Any number of goroutines and processes may use the same root at once.
//
// A file that has its name below blobs/ is complete, verified and durable, and nobody writes to it
// again: only a stage gives such names. But disks fail, and other programs may write there. So
// every read hashes what it reads, except where noteVerified says that this handle has done so.
type blobStore struct {
	root     *rootDir
	tmp      string // the directory for what is being written, tmpDir in a registry
	readOnly bool
	buffers  sync.Pool // *[]byte of copyBufferSize

	mu       sync.Mutex   // guards what follows
	session  string       // tmp/<name>, made and locked by the first write; "" before
	release  func() error // drops the session's lock
	perm     fs.FileMode  // the permissions that a new session has here
	dirSyncs map[digest.Algorithm]*sharedSync
	algDirs  map[digest.Algorithm]bool // whose directory exists durably: see makeAlgDir

	verified map[string]fs.FileInfo // files that this handle has verified, by name: see noteVerified
}

// copyBufferSize makes a large blob cost few system calls, and is small enough that bytes are still
// in the processor's cache when they are hashed and written.
const copyBufferSize = 1 << 20

func newBlobStore(root *rootDir, readOnly bool) *blobStore {
	return &blobStore{
		root:     root,
		tmp:      tmpDir,
		perm:     sessionPerm,
		readOnly: readOnly,
		algDirs:  map[digest.Algorithm]bool{},
		dirSyncs: map[digest.Algorithm]*sharedSync{},
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

// size returns the size of d's file, and [ErrNotFound] if there is none. It looks at the directory
// only, so the bytes may be damaged.
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

// present reports whether d has a directory entry, of any kind and with any content. d must have
// passed [checkDigest].
func (s *blobStore) present(d digest.Digest) (bool, error) {
	_, err := s.root.Lstat(blobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// checkSize returns an error unless d has a file of that size: [ErrNotFound] or [ErrSizeMismatch].
func (s *blobStore) checkSize(d digest.Digest, size int64) error {
	got, err := s.size(d)
	if err == nil && got != size {
		err = wrongSize(d, got, size)
	}
	return err
}

// wrongSize is the error for a file whose size is not that of its blob.
func wrongSize(d digest.Digest, got, want int64) error {
	return fmt.Errorf("blob %s: %w: file has %d bytes, want %d", d, ErrSizeMismatch, got, want)
}

// openFile opens d's file and returns its size, which must be the one given, unless that is −1.
//
// Errors: [ErrNotFound], [ErrSizeMismatch], [ErrDigestMismatch] for anything but a regular file,
// [ErrInvalidDigest], and any error of the file system.
func (s *blobStore) openFile(d digest.Digest, size int64) (*os.File, int64, error) {
	if err := checkDigest(d); err != nil {
		return nil, 0, err
	}
	f, got, err := s.openNamed(blobPath(d), d, size)
	if err != nil {
		if openNoFollow != 0 && errors.Is(err, ErrNotFound) {
			return nil, 0, err // not even a link
		}
		// A link below blobs/ is not followed. It counts as damage, so that a put heals it.
		if _, bad := s.size(d); errors.Is(bad, ErrDigestMismatch) {
			err = bad
		}
		return nil, 0, err
	}
	return f, got, nil
}

// A foundBlob is a file that holds a blob, below blobs/ or tmp/held/.
type foundBlob struct {
	name string
	size int64
	file *os.File // nil if nobody has opened it
}

// openNamed is openFile for a file of any name below the root that holds d.
func (s *blobStore) openNamed(name string, d digest.Digest, size int64) (*os.File, int64, error) {
	f, err := s.root.OpenFile(name, os.O_RDONLY|openNoFollow, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, 0, err
	}
	got, err := checkRegular(f)
	if err == nil && size >= 0 && got != size {
		err = wrongSize(d, got, size)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, got, nil
}

// open returns a reader of d that verifies what it reads. ctx governs the reads too.
func (s *blobStore) open(ctx context.Context, d digest.Digest, size int64) (*verifier, error) {
	f, size, err := s.openFile(d, size)
	if err != nil {
		return nil, err
	}
	return s.verifier(ctx, f, d, size), nil
}

// readAll reads and closes a file that holds d and has size bytes, and compares the bytes with d. It
// is for small files: it costs less than a verifier, and needs the memory for the whole file.
//
// Errors: [ErrSizeMismatch], [ErrDigestMismatch], and any error of the file system.
func (s *blobStore) readAll(f *os.File, d digest.Digest, size int64) ([]byte, error) {
	b := make([]byte, size)
	n, err := io.ReadFull(f, b)
	f.Close()
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil, endedEarly(d, int64(n), size)
	}
	if err == nil {
		err = checkContent(d, digestOf(d.Algorithm(), b))
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// verifier returns a verifying reader of src, which must hold d and have size bytes. The reader
// closes src.
func (s *blobStore) verifier(ctx context.Context, src io.ReadCloser, d digest.Digest, size int64) *verifier {
	return &verifier{ctx: ctx, src: src, digest: d, size: size, hash: newHash(d.Algorithm()), buffers: &s.buffers}
}

// verify reads all of d and compares it with its name.
//
// Errors: [ErrNotFound], [ErrSizeMismatch], [ErrDigestMismatch], and any error from ctx or the file
// system.
func (s *blobStore) verify(ctx context.Context, d digest.Digest, size int64) error {
	r, err := s.open(ctx, d, size)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = r.WriteTo(io.Discard)
	return err
}

// verifyFile is verify, and returns when the file was written. If same is not nil, the bytes of the
// file are compared with it and not hashed, which is cheaper. They are at most copyBufferSize.
func (s *blobStore) verifyFile(ctx context.Context, d digest.Digest, size int64, same []byte) (written time.Time, err error) {
	if err := checkDigest(d); err != nil {
		return written, err
	}
	f, size, err := s.openNamed(blobPath(d), d, size)
	if err != nil {
		return written, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil {
		written = fi.ModTime()
	}
	if same == nil {
		_, err = s.verifier(ctx, f, d, size).WriteTo(io.Discard)
		return written, err
	}
	buf := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buf)
	n, err := io.ReadFull(f, (*buf)[:len(same)])
	if err == nil && !bytes.Equal((*buf)[:n], same) {
		err = fmt.Errorf("blob %s: %w", d, ErrDigestMismatch)
	}
	return written, err
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

// walkBlobs calls visit for every entry below blobs/ of a root or layout, in no order, holding one
// batch of names at a time. An entry that is not a blob (another name, a directory, a link) comes
// with an empty digest. An error of visit ends the walk and is returned.
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

// empty reports whether the store has no blob. It stops at the first one.
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

// largeFile is the size of a file that takes a file system milliseconds to free.
const largeFile = 64 << 20

// unname removes the name of d's file, for a collection that holds the index's write lock. Freeing
// a large file takes long, and every writer would wait. So a large file is moved instead, to the
// name below tmp/ that is returned, and the caller removes that after the transaction. If the
// process is killed before that, the sweep of its session does it. Anything but a regular file
// stays, as if d had no file: this package has not made it.
func (s *blobStore) unname(d digest.Digest, size int64) (moved string, err error) {
	fi, err := s.root.Lstat(blobPath(d))
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return "", fmt.Errorf("blob %s: is not a regular file: %w", d, ErrNotFound)
	}
	if size >= largeFile {
		if dir, err := s.enter(); err == nil { // else the disk is too full for that
			moved = path.Join(dir, rand.Text())
			return moved, s.root.Rename(blobPath(d), moved)
		}
	}
	return "", s.root.Remove(blobPath(d))
}

// makeAlgDir makes blobs/<alg> and makes its entry in blobs/ durable, once per handle.
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
	// The entry is synced even if it existed: its maker may have been killed before this line.
	if err := s.root.syncDir(blobsDir); err != nil {
		return err
	}
	s.algDirs[alg] = true
	return nil
}
