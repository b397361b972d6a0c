package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// A stage holds the blobs of one publish while they are on their way in. Everything that ever gets
// a name below blobs/ goes through here, in this order:
//
//	put      tmp/<session>/<random>, O_EXCL → copy, hash, count → digest and
//	         size compared with what was named → chmod 0444
//	settle   fsync (the descriptor that wrote) → close → link to
//	         blobs/<alg>/<encoded> without replacing → fsync blobs/<alg>
//	recheck  inside the index's write transaction: still there, or linked again
//	discard  the names below tmp/ go
//
// The name below tmp/ stays until discard, and a blob that the store has is linked into tmp/ too.
// If a collector deletes the name below blobs/ before the transaction makes it reachable, recheck
// puts it back from there. Where the file system has no hard links, or where a damaged blob was
// replaced, the name below tmp/ is gone, since it was renamed. Then recheck cannot put the blob
// back: such a publish fails with [ErrIncomplete], and succeeds when it is repeated.
//
// An import that can read its source again does without these links, because they are most of the
// work for a blob that the store has: see loose. It repeats such a publish itself.
//
// After a failed fsync the stage fails, and nothing of it may be published: a second fsync could
// report success for pages that the kernel has dropped.
//
// A stage is safe for concurrent use by the goroutines of one operation.
type stage struct {
	store *blobStore

	mu    sync.Mutex                    // guards what follows
	files map[digest.Digest]*stagedFile // nil after discard
	// unsynced files keep their descriptor until fsync. The two limits below keep descriptors and
	// dirty pages few, however many blobs come in: there is one batch that grows, and one that is
	// being synced.
	unsynced      []*stagedFile
	unsyncedBytes int64
	syncing       chan error // the outcome of the batch that is being synced; nil for none
	failed        error      // sticky
	// missed are blobs of which the store had no good file when it was asked: see dedup.
	missed map[digest.Digest]bool
	// loose stages make no link into tmp/ for a blob that the store has. If a collector deletes
	// such a blob, open and recheck fail with errGone.
	loose bool
}

// errGone says that the store had a blob, and that a collector has deleted it since.
var errGone = fmt.Errorf("%w: a collection has deleted it meanwhile", ErrIncomplete)

// A batch of unsynced files is synced when it reaches one of these.
const (
	maxUnsyncedFiles = 64
	maxUnsyncedBytes = 64 << 20
)

// A stagedFile is one blob of a stage. The stage's mutex guards it.
type stagedFile struct {
	name   string // below the root; "" when no link into tmp/ could be made
	digest digest.Digest
	size   int64
	file   *rootFile // nil once it is being synced, and for a blob that was there already
	reused bool      // the bytes were in the store already
	// written is when the file of a reused blob was written; zero if that is not known.
	written time.Time
	// partial is the directory that keeps the file until the store has it; "" for none.
	partial string
}

func (s *blobStore) newStage() *stage {
	return &stage{store: s, files: map[digest.Digest]*stagedFile{}, missed: map[digest.Digest]bool{}}
}

// put copies src into the stage and returns its digest and size. The bytes must hash to want,
// unless that is empty: then alg is the algorithm. There must be size bytes, unless that is −1.
//
// Errors: [ErrDigestMismatch], [ErrSizeMismatch], and any error from ctx, src or the file system.
func (st *stage) put(ctx context.Context, src io.Reader, alg digest.Algorithm, want digest.Digest, size int64) (digest.Digest, int64, error) {
	sf, err := st.receive(ctx, src, alg, want, size)
	if err != nil {
		return "", 0, err
	}
	return sf.digest, sf.size, st.add(ctx, sf)
}

// receive is put without taking the file into the stage. The caller owns the file, which is
// complete, verified, open and not synced. Its errors are those of put, and leave no file.
func (st *stage) receive(ctx context.Context, src io.Reader, alg digest.Algorithm, want digest.Digest, size int64) (*stagedFile, error) {
	if want != "" {
		if err := checkDigest(want); err != nil {
			return nil, err
		}
		alg = want.Algorithm()
	}
	f, err := st.store.create()
	if err != nil {
		return nil, err
	}
	w := &hashingWriter{file: f, hash: newHash(alg), store: st.store}
	in := io.Reader(&ctxReader{ctx, src})
	if size >= 0 && size < math.MaxInt64 {
		in = io.LimitReader(in, size+1)
	}
	n, err := st.store.copy(w, in)
	return st.complete(w, n, err, alg, want, size)
}

// putFile is put for a file whose digest and size are known. Where the kernel can, it copies a
// large file or shares its blocks. Then the copy is what is hashed, so a change of src meanwhile
// can't go unnoticed. count is called with each number of bytes that are copied.
func (st *stage) putFile(ctx context.Context, src *os.File, want digest.Digest, size int64, count func(n int)) error {
	if err := checkDigest(want); err != nil {
		return err
	}
	if size < cloneChunk {
		_, _, err := st.put(ctx, src, "", want, size) // too quick for count to matter
		return err
	}
	f, err := st.store.create()
	if err != nil {
		return err
	}
	w := &hashingWriter{file: f, hash: newHash(want.Algorithm()), store: st.store}
	var n int64
	if kernelCopies(src, f.file) {
		n, err = w.clone(ctx, src, size+1, count)
	} else {
		n, err = st.store.copy(w, io.LimitReader(&countedReader{&ctxReader{ctx, src}, count}, size+1))
	}
	sf, err := st.complete(w, n, err, want.Algorithm(), want, size)
	if err != nil {
		return err
	}
	return st.add(ctx, sf)
}

// complete finishes a file after n bytes of it were written. If its digest or size is wrong, or err
// is set, it removes the file. A good file becomes read-only through its open descriptor, which
// stays open for fsync: an error of the disk is reported to the descriptor that wrote.
func (st *stage) complete(w *hashingWriter, n int64, err error, alg digest.Algorithm, want digest.Digest, size int64) (*stagedFile, error) {
	f := w.file
	got := hashedDigest(alg, w.hash)
	switch {
	case err != nil:
	case size >= 0 && n > size:
		err = fmt.Errorf("%w: more than the %d bytes it should have", ErrSizeMismatch, size)
	case size >= 0 && n < size:
		err = fmt.Errorf("%w: %d bytes, want %d", ErrSizeMismatch, n, size)
	case want != "" && got != want:
		err = fmt.Errorf("%w: bytes hash to %s, want %s", ErrDigestMismatch, got, want)
	default:
		err = f.chmod(0o444)
	}
	if err != nil {
		f.Close()
		return nil, errors.Join(err, st.store.root.Remove(f.name))
	}
	return &stagedFile{name: f.name, digest: got, size: n, file: f}, nil
}

// putBytesAs is put for bytes, at most copyBufferSize, that should hash to d. If the stage or the
// store has them, it writes nothing and reports true. The bytes are hashed in any case: a name in a
// foreign archive proves nothing. A file of the store is compared with them, and not hashed.
func (st *stage) putBytesAs(ctx context.Context, b []byte, d digest.Digest) (had bool, err error) {
	size := int64(len(b))
	var sf *stagedFile
	if !st.has(d) {
		if sf, err = st.borrow(ctx, d, size, b); err != nil {
			return false, err
		}
		if sf == nil {
			st.miss(d)
			_, _, err = st.put(ctx, bytes.NewReader(b), "", d, size)
			return false, err
		}
	}
	got := digestOf(d.Algorithm(), b)
	switch {
	case got == d && sf != nil:
		err = st.add(ctx, sf)
	case got != d:
		err = fmt.Errorf("%w: bytes hash to %s, want %s", ErrDigestMismatch, got, d)
		if sf != nil { // the store has the same wrong bytes
			err = errors.Join(err, st.drop(sf))
		}
	}
	return true, err
}

// putBytes is put for bytes in memory. It writes nothing if the store has a good blob of them.
func (st *stage) putBytes(ctx context.Context, b []byte, alg digest.Algorithm) (digest.Digest, error) {
	d := digestOf(alg, b)
	if ok, err := st.reuse(ctx, d, int64(len(b))); ok || ctx.Err() != nil {
		return d, err
	}
	_, _, err := st.put(ctx, bytes.NewReader(b), "", d, int64(len(b)))
	return d, err
}

// add takes a complete file into the stage, and starts a sync when enough files are unsynced. If it
// fails or the stage has the blob already, the file is dropped.
func (st *stage) add(ctx context.Context, sf *stagedFile) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.files == nil {
		return errors.Join(ErrClosed, st.drop(sf))
	}
	if st.failed != nil {
		return errors.Join(st.failed, st.drop(sf))
	}
	if st.files[sf.digest] != nil { // the same bytes came twice
		return st.drop(sf)
	}
	st.files[sf.digest] = sf
	if sf.file == nil {
		return nil
	}
	st.unsynced = append(st.unsynced, sf)
	st.unsyncedBytes += sf.size
	if len(st.unsynced) >= maxUnsyncedFiles || st.unsyncedBytes >= maxUnsyncedBytes {
		return st.sync(ctx)
	}
	return nil
}

// reuse takes a blob of the store into the stage, and reports false if the store has no good one. A
// damaged blob is not reused: putting it again heals it.
func (st *stage) reuse(ctx context.Context, d digest.Digest, size int64) (bool, error) {
	if st.has(d) {
		return true, nil
	}
	sf, err := st.borrow(ctx, d, size, nil)
	if err != nil {
		return false, err
	}
	if sf == nil {
		st.miss(d)
		return false, nil
	}
	return true, st.add(ctx, sf)
}

// miss notes that the store has no good file of a blob.
func (st *stage) miss(d digest.Digest) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.missed[d] = true
}

// borrow takes a blob of the store. Unless the stage is loose, it links the blob into tmp/, so that a
// collection can't take its bytes from this publish. It returns nil if the blob is missing or
// damaged. If same is not nil, a blob with other bytes than these is damaged, and nothing is hashed.
func (st *stage) borrow(ctx context.Context, d digest.Digest, size int64, same []byte) (*stagedFile, error) {
	written, err := st.store.verifyFile(ctx, d, size, same)
	if processCondition(err) {
		return nil, err
	} else if err != nil {
		return nil, nil
	}
	sf := &stagedFile{digest: d, size: size, reused: true, written: written}
	if st.loose {
		return sf, nil
	}
	dir, err := st.store.enter()
	if err != nil {
		return nil, err
	}
	sf.name = path.Join(dir, rand.Text())
	switch err := st.store.root.Link(blobPath(d), sf.name); {
	case errors.Is(err, fs.ErrNotExist): // collected in between
		return nil, nil
	case linkUnsupported(err):
		sf.name = ""
	case err != nil:
		return nil, err
	}
	return sf, nil
}

// take is reuse of a blob that must exist. It returns [ErrNotFound] for a missing blob, and the
// error of [blobStore.verify] for a damaged one.
func (st *stage) take(ctx context.Context, d digest.Digest, size int64) error {
	if n, ok := st.size(d); ok && n != size {
		return fmt.Errorf("%w: has %d bytes, want %d", ErrSizeMismatch, n, size)
	}
	ok, err := st.reuse(ctx, d, size)
	if err == nil && !ok {
		err = cmp.Or(st.store.verify(ctx, d, size), ErrNotFound)
	}
	return err
}

// has reports whether d is in the stage.
func (st *stage) has(d digest.Digest) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.files[d] != nil
}

// size returns the size of a blob in the stage.
func (st *stage) size(d digest.Digest) (int64, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if sf := st.files[d]; sf != nil {
		return sf.size, true
	}
	return 0, false
}

// open returns a verifying reader of a blob in the stage, or else in the store.
func (st *stage) open(ctx context.Context, d digest.Digest, size int64) (*verifier, error) {
	st.mu.Lock()
	defer st.mu.Unlock() // held until the file is open: dedup may replace it by another name
	sf := st.files[d]
	if sf == nil || sf.name == "" {
		v, err := st.store.open(ctx, d, size)
		return v, st.explain(sf, err)
	}
	if size >= 0 && size != sf.size {
		return nil, fmt.Errorf("blob %s: %w: has %d bytes, want %d", d, ErrSizeMismatch, sf.size, size)
	}
	f, err := st.store.root.OpenFile(sf.name, os.O_RDONLY|openNoFollow, 0)
	if err != nil {
		return nil, err
	}
	return st.store.verifier(ctx, f, d, sf.size), nil
}

// explain makes errGone of the error for a missing blob, if the stage has the blob by its name
// below blobs/ only.
func (st *stage) explain(sf *stagedFile, err error) error {
	if st.loose && sf != nil && sf.name == "" && errors.Is(err, ErrNotFound) {
		return fmt.Errorf("blob %s: %w", sf.digest, errGone)
	}
	return err
}

// tighten ends that the stage is loose. It forgets the blobs that the stage has by their names below
// blobs/ only, and returns their sizes. They are to be staged again.
func (st *stage) tighten() map[digest.Digest]int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.loose = false
	forgotten := map[digest.Digest]int64{}
	for d, sf := range st.files {
		if sf.reused && sf.name == "" {
			forgotten[d] = sf.size
			delete(st.files, d)
		}
	}
	return forgotten
}

// keepOnly drops the staged blobs that are not needed, before each of them costs an fsync. An
// import stages blobs before it knows which artifacts are complete.
func (st *stage) keepOnly(need map[digest.Digest]int64) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if err := st.wait(); err != nil {
		return err
	}
	var errs []error
	for d, sf := range st.files {
		if _, needed := need[d]; !needed {
			delete(st.files, d)
			errs = append(errs, st.drop(sf))
		}
	}
	st.unsynced = slices.DeleteFunc(st.unsynced, func(sf *stagedFile) bool {
		_, needed := need[sf.digest]
		return !needed
	})
	return errors.Join(errs...)
}

// counts returns how many blobs and bytes are new, and how many blobs the store had.
func (st *stage) counts() (written, reused int, writtenBytes int64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, sf := range st.files {
		if sf.reused {
			reused++
		} else {
			written++
			writtenBytes += sf.size
		}
	}
	return written, reused, writtenBytes
}

// discard removes the stage's files below tmp/. It may be called more than once. After it, put
// fails with [ErrClosed]. Blobs that settle has named stay.
func (st *stage) discard() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	_ = st.wait() // its error no longer matters
	var errs []error
	if st.failed != nil { // no later transfer may go on with these bytes
		errs = append(errs, st.sweepPartials())
	}
	for _, d := range slices.Sorted(maps.Keys(st.files)) {
		errs = append(errs, st.drop(st.files[d]))
	}
	st.files, st.unsynced = nil, nil
	return errors.Join(errs...)
}

// drop closes and removes the file of sf below tmp/. A blob below blobs/ is another link, and
// stays.
func (st *stage) drop(sf *stagedFile) error {
	var err error
	if sf.file != nil {
		err = sf.file.Close()
		sf.file = nil
	}
	if sf.name != "" {
		// Closing the registry has removed the session's directory already.
		if rm := st.store.root.Remove(sf.name); !errors.Is(rm, fs.ErrNotExist) && !errors.Is(rm, fs.ErrClosed) {
			err = errors.Join(err, rm)
		}
		sf.name = ""
	}
	return err
}
