package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash"
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

// A stage holds the blobs of one publish while they are on their way in.
// Everything that ever gets a name below blobs/ goes through here, in this order:
//
//	put      tmp/<session>/<random>, O_EXCL → copy, hash, count → digest and
//	         size compared with what was named → chmod 0444
//	settle   fsync (the descriptor that wrote) → close → link to
//	         blobs/<alg>/<encoded> without replacing → fsync blobs/<alg>
//	recheck  inside the index's write transaction: still there, or linked again
//	discard  the names below tmp/ go
//
// The name below tmp/ stays until discard, and a blob that was there already is
// linked into tmp/ too: should a garbage collector delete the name below blobs/
// before the transaction makes it reachable, recheck puts it back from there.
// Where the file system has no hard links, or where a damaged blob was replaced,
// the name below tmp/ is gone, since it was renamed. Then such a publish fails
// with [ErrIncomplete], as nothing can be put back; it has to be made anew.
//
// After a failed fsync the file is gone for good: the stage fails, and
// nothing of it may be published (a second fsync could report success for pages
// that the kernel has dropped).
//
// A stage is safe for concurrent use by the goroutines of one operation.
type stage struct {
	store *blobStore

	mu    sync.Mutex
	files map[digest.Digest]*stagedFile
	// unsynced files keep their descriptor until fsync. Both bounds keep
	// descriptors and dirty pages few, however many blobs come in: there are
	// never more than these, and as many that are being synced.
	unsynced      []*stagedFile
	unsyncedBytes int64
	syncing       chan error // the outcome of the batch that is being synced; nil for none
	failed        error      // sticky
}

const (
	maxUnsyncedFiles = 64
	maxUnsyncedBytes = 64 << 20
)

type stagedFile struct {
	name   string // below the root; "" when no link into tmp/ could be made
	digest digest.Digest
	size   int64
	file   *rootFile // nil once it is being synced, and for a blob that was there already
	reused bool      // the bytes were in the store already
	// partial is the directory where the file is kept in case that it doesn't get into the store; "" for none.
	partial string
}

func (s *blobStore) newStage() *stage {
	return &stage{store: s, files: map[digest.Digest]*stagedFile{}}
}

// put copies src into the stage. want, when not empty, is what the bytes must
// hash to, and size, when not −1, how many they must be; alg chooses the
// algorithm when want doesn't. Errors: [ErrDigestMismatch], [ErrSizeMismatch],
// ctx's, src's, and the file system's.
func (st *stage) put(ctx context.Context, src io.Reader, alg digest.Algorithm, want digest.Digest, size int64) (digest.Digest, int64, error) {
	if want != "" {
		if err := checkDigest(want); err != nil {
			return "", 0, err
		}
		alg = want.Algorithm()
	}
	f, err := st.create()
	if err != nil {
		return "", 0, err
	}
	w := &hashingWriter{file: f, hash: newHash(alg), store: st.store}
	in := io.Reader(&ctxReader{ctx, src})
	if size >= 0 && size < math.MaxInt64 {
		in = io.LimitReader(in, size+1)
	}
	n, err := st.store.copy(w, in)
	return st.complete(ctx, w, n, err, alg, want, size)
}

// putFile is put for a file whose digest and size are known. Where the kernel can,
// it copies a large one, or shares its blocks, and only the copy is read.
func (st *stage) putFile(ctx context.Context, src *os.File, want digest.Digest, size int64) error {
	if err := checkDigest(want); err != nil {
		return err
	}
	if size < cloneChunk {
		_, _, err := st.put(ctx, src, "", want, size)
		return err
	}
	f, err := st.create()
	if err != nil {
		return err
	}
	w := &hashingWriter{file: f, hash: newHash(want.Algorithm()), store: st.store}
	var n int64
	if kernelCopies(src, f.file) {
		n, err = w.clone(ctx, src, size+1)
	} else {
		n, err = st.store.copy(w, io.LimitReader(&ctxReader{ctx, src}, size+1))
	}
	_, _, err = st.complete(ctx, w, n, err, want.Algorithm(), want, size)
	return err
}

// complete takes a file into the stage after n bytes of it were written, if it is as it should be.
func (st *stage) complete(ctx context.Context, w *hashingWriter, n int64, err error, alg digest.Algorithm, want digest.Digest, size int64) (digest.Digest, int64, error) {
	f := w.file
	got := digest.NewDigest(alg, w.hash)
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
		return "", 0, errors.Join(err, st.store.root.Remove(f.name))
	}
	return got, n, st.add(ctx, &stagedFile{name: f.name, digest: got, size: n, file: f})
}

// putBytes is put for bytes in memory; it skips writing what is there already
// and can be read.
func (st *stage) putBytes(ctx context.Context, b []byte, alg digest.Algorithm) (digest.Digest, error) {
	d := digestOf(alg, b)
	if ok, err := st.reuse(ctx, d, int64(len(b))); ok || ctx.Err() != nil {
		return d, err
	}
	_, _, err := st.put(ctx, bytes.NewReader(b), alg, d, int64(len(b)))
	return d, err
}

// create makes an empty file in the session's directory.
func (st *stage) create() (*rootFile, error) {
	dir, err := st.store.enter()
	if err != nil {
		return nil, err
	}
	return st.store.root.openFile(path.Join(dir, rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// add takes a complete file into the stage.
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

// reuse takes a blob into the stage that the store has already, if it is whole.
// One that is damaged or can't be read is not reused: putting it again heals it.
func (st *stage) reuse(ctx context.Context, d digest.Digest, size int64) (bool, error) {
	if st.has(d) {
		return true, nil
	}
	sf, err := st.borrow(ctx, d, size)
	if sf == nil || err != nil {
		return false, err
	}
	return true, st.add(ctx, sf)
}

// borrow links a blob of the store into tmp/, if it is whole. Nil means that it isn't there, is damaged or can't be read.
func (st *stage) borrow(ctx context.Context, d digest.Digest, size int64) (*stagedFile, error) {
	if err := st.store.verify(ctx, d, size); processCondition(err) {
		return nil, err
	} else if err != nil {
		return nil, nil
	}
	dir, err := st.store.enter()
	if err != nil {
		return nil, err
	}
	sf := &stagedFile{name: path.Join(dir, rand.Text()), digest: d, size: size, reused: true}
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

// take is reuse of a blob that must be there: missing is [ErrNotFound], damaged what verify says.
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
	defer st.mu.Unlock() // until it is open: dedup may remove the file for another
	sf := st.files[d]
	if sf == nil || sf.name == "" {
		return st.store.open(ctx, d, size)
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

// keepOnly forgets what is staged and not needed, before it costs an fsync.
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

// settle gives every staged blob its name below blobs/, durably.
func (st *stage) settle(ctx context.Context) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.failed != nil {
		return st.failed
	}
	if err := errors.Join(st.sync(ctx), st.wait()); err != nil {
		return err
	}
	dirs := map[digest.Algorithm]bool{}
	for _, d := range slices.Sorted(maps.Keys(st.files)) { // the same order in every run, for the tests
		sf := st.files[d]
		if err := ctx.Err(); err != nil {
			return err
		}
		alg := sf.digest.Algorithm()
		if !dirs[alg] {
			if err := st.store.makeAlgDir(alg); err != nil {
				return err
			}
			dirs[alg] = true
		}
		if sf.reused {
			// Whoever linked it may not have synced it yet, and our commit relies on it.
			if err := st.syncReused(blobPath(sf.digest)); err != nil {
				return err
			}
			continue
		}
		if err := st.link(ctx, sf); err != nil {
			return err
		}
	}
	if err := st.syncAlgDirs(dirs); err != nil {
		return err
	}
	return st.sweepPartials()
}

// sweepPartials removes what is kept of transfers: their blobs have their names now, or can't
// be trusted. What somebody else uses is theirs to remove.
func (st *stage) sweepPartials() error {
	var errs []error
	for _, sf := range st.files {
		if sf.partial == "" {
			continue
		}
		errs = append(errs, st.store.sweepPartial(sf.partial))
		errs = append(errs, st.store.root.removeEmpty(path.Dir(sf.partial)))
		sf.partial = ""
	}
	return errors.Join(errs...)
}

// dedup turns sf into a reused blob when the store has the same bytes.
func (st *stage) dedup(ctx context.Context, sf *stagedFile) error {
	have, _ := st.borrow(ctx, sf.digest, sf.size) // its failure costs an fsync, no more
	if have == nil {
		return ctx.Err()
	}
	err := st.drop(sf)
	have.partial = sf.partial
	*sf = *have
	return err
}

// syncReused syncs a file that somebody else made: below blobs/, or a link to it below tmp/.
func (st *stage) syncReused(name string) error {
	f, err := st.store.root.openFile(name, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // collected: recheck brings it back
	}
	if err != nil {
		return err
	}
	// Young again, so that garbage collection's grace holds for it. No more than a
	// courtesy: it fails on another user's file.
	if fi, err := f.Stat(); err == nil && time.Since(fi.ModTime()) > time.Hour {
		st.store.root.Chtimes(name, time.Now())
	}
	return st.fail(errors.Join(f.sync(), f.Close()))
}

// link names sf's file below blobs/. A file that is there under that name stays
// if it is good, and is replaced if it is damaged.
func (st *stage) link(ctx context.Context, sf *stagedFile) error {
	name := blobPath(sf.digest)
	if sf.name == "" { // renamed by an earlier attempt to publish
		return st.syncReused(name)
	}
	moved, err := st.store.root.linkNew(sf.name, name)
	if moved {
		sf.name = ""
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if st.store.verify(ctx, sf.digest, sf.size) == nil {
		sf.reused = true // somebody was faster
		return st.syncReused(name)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// Replacing is right here: the name promises these very bytes, and the
	// file that has it is broken. An open reader keeps the old file.
	if err := st.store.root.Rename(sf.name, name); err != nil {
		return err
	}
	sf.name = ""
	return nil
}

// recheck makes sure that d is there with its size. It is called inside the
// index's write transaction, which keeps every garbage collector out: what one
// has deleted since settle comes back here. Missing is [ErrNotFound].
func (st *stage) recheck(d digest.Digest, size int64) error {
	err := st.store.checkSize(d, size)
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	sf := st.files[d]
	if sf == nil || sf.name == "" || sf.size != size {
		return err
	}
	if sf.reused { // it may have gone before settle came to syncing it
		if err := st.syncReused(sf.name); err != nil {
			return err
		}
	}
	if err := st.relink(sf); err != nil {
		return err
	}
	return st.fail(st.store.root.syncDir(path.Dir(blobPath(d))))
}

// relink gives sf's file the name that is free now, unless another publisher is faster.
func (st *stage) relink(sf *stagedFile) error {
	moved, err := st.store.root.linkNew(sf.name, blobPath(sf.digest))
	if moved {
		sf.name = ""
	}
	if errors.Is(err, fs.ErrExist) {
		return st.store.checkSize(sf.digest, sf.size) // it was synced before it got the name
	}
	return err
}

// counts tells how many blobs and bytes of need are new and how many were there.
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

// discard removes the stage's files below tmp/. It may be called more than
// once; after it, put fails with [ErrClosed].
func (st *stage) discard() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	_ = st.wait() // of files that nobody wants any more
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

// sync has the bytes of all unsynced files made durable, once those of the batch
// before are, while the next come in.
func (st *stage) sync(ctx context.Context) error {
	// What came in unnamed may be there already: then its fsync can be saved.
	for _, sf := range st.unsynced {
		if err := st.dedup(ctx, sf); err != nil {
			return err
		}
	}
	if err := st.wait(); err != nil {
		return err
	}
	var batch []stagedFile
	for _, sf := range st.unsynced {
		if !sf.reused {
			batch = append(batch, *sf)
			sf.file = nil
		}
	}
	st.unsynced, st.unsyncedBytes = nil, 0
	done := make(chan error, 1)
	st.syncing = done
	go func() { done <- st.syncFiles(batch) }()
	return nil
}

// wait returns once no file is being synced.
func (st *stage) wait() error {
	if st.syncing == nil {
		return nil
	}
	err := <-st.syncing
	st.syncing = nil
	return st.fail(err)
}

// syncFiles makes files durable and closes them. Side by side, and with all of
// them on their way to the disk before the first fsync, because a journalling
// file system then writes one record for several.
func (st *stage) syncFiles(files []stagedFile) error {
	for _, sf := range files {
		sf.file.start(0, 0)
	}
	errs := make([]error, len(files))
	parallel(maxParallelSyncs, slices.All(files), func(i int, sf stagedFile) { errs[i] = st.syncFile(sf) })
	return errors.Join(errs...)
}

func (st *stage) syncFile(sf stagedFile) error {
	err := sf.file.sync()
	if err != nil && sf.partial != "" { // it is the same file
		err = errors.Join(err, ignoreNotExist(st.store.root.Remove(path.Join(sf.partial, partialData))))
	}
	return errors.Join(err, sf.file.Close())
}

// fail makes a failed fsync the stage's last word.
func (st *stage) fail(err error) error {
	if err != nil && st.failed == nil {
		st.failed = fmt.Errorf("%w (what was added can't be trusted to reach the disk: start over)", err)
	}
	return err
}

const maxParallelSyncs = 16

func (st *stage) syncAlgDirs(dirs map[digest.Algorithm]bool) error {
	for alg := range dirs {
		if err := st.store.root.syncDir(path.Join(blobsDir, string(alg))); err != nil {
			return st.fail(err)
		}
	}
	return nil
}

// hashingWriter hashes what it writes to a staged file.
type hashingWriter struct {
	file  *rootFile
	hash  hash.Hash
	store *blobStore
}

func (w *hashingWriter) Write(p []byte) (int, error) {
	if len(p) < copyBufferSize {
		w.hash.Write(p)
		return w.file.Write(p)
	}
	// Hashing and writing a large blob side by side saves a fifth of the time.
	hashed := make(chan struct{})
	go func() {
		w.hash.Write(p)
		close(hashed)
	}()
	n, err := w.file.Write(p)
	<-hashed
	return n, err
}

// cloneChunk is how much clone lets the kernel copy at a time: little enough to be
// in the processor's cache still when it is hashed.
const cloneChunk = 4 << 20

// clone copies at most limit bytes of src without taking them through this
// process, and hashes what has arrived, one chunk while the next is on its way.
func (w *hashingWriter) clone(ctx context.Context, src *os.File, limit int64) (n int64, err error) {
	hashed := make(chan error, 1)
	hashed <- nil
	for {
		if err = ctx.Err(); err != nil {
			break
		}
		from := n
		m, copyErr := w.file.copyFrom(src, min(cloneChunk, limit-n))
		n += m
		if err = errors.Join(copyErr, <-hashed); err != nil || m == 0 {
			hashed <- nil
			break
		}
		go func() {
			_, err := w.store.copy(w.hash, io.NewSectionReader(w.file, from, m))
			w.file.start(from, m)
			hashed <- err
		}()
	}
	return n, errors.Join(err, <-hashed)
}

// ctxReader fails with ctx's error once ctx is done.
type ctxReader struct {
	ctx context.Context
	src io.Reader
}

func (r *ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.src.Read(p)
}
