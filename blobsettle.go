package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// The second half of a stage's life: its files become durable, get their names below blobs/, and
// are still there when the index refers to them. Three things work against that.
//
//   - A power cut loses a name before its directory is synced, and bytes before the file is. So the
//     order is: fsync of the file, link, fsync of the directory. A blob that the store has is
//     synced as well, because the process that linked it may not have come to that yet. If the
//     index has a row for the blob, that process has: a row is written only after settle. Then the
//     file is not synced again. The directory is, because a collector that dies leaves rows without
//     files, and another publisher may have linked such a file just now.
//   - A collector deletes files that no row refers to. It does so with the index's write lock held,
//     and recheck looks under the same lock, in the transaction that writes the rows. A file that
//     went before is linked again, from the name that the stage keeps below tmp/. One that is there
//     stays until the commit.
//   - Another publisher stages the same bytes. The first link wins, and the others find a good
//     file. Only a file that does not hash to its name is replaced.

// settle gives every staged blob its name below blobs/, durably. recorded reports whether the index
// has a row for a blob. It may be nil if nothing is known of rows.
//
// A kill in the middle leaves blobs without rows, which the next collection removes. A failure does
// the same, and settle may be called again: blobs that have their names are then found as another
// publisher's would be. After a failed fsync it fails for good.
func (st *stage) settle(ctx context.Context, recorded func(digest.Digest) (bool, error)) error {
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
			if err := st.settleReused(sf, recorded); err != nil {
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

// sweepPartials removes the files that are kept of transfers. Their blobs have their names now, or
// cannot be trusted. A directory that another transfer uses is left to it.
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

// link names sf's file below blobs/. A file that has that name stays if it is good, and is replaced
// if it is damaged. If the process can't read it, for example without free descriptors, link fails:
// nothing is known of the file then.
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
	err = st.store.verify(ctx, sf.digest, sf.size)
	if err == nil {
		sf.reused = true // another publisher was faster
		return st.syncReused(name)
	}
	if processCondition(err) {
		return err
	}
	// Replacing is right here: the name promises these bytes, and the file that has it
	// is damaged. An open reader keeps the old file.
	if err := st.store.root.Rename(sf.name, name); err != nil {
		return err
	}
	sf.name = ""
	return nil
}

// recheck makes sure that d has a file of the right size, and links the staged one again if a
// collector has deleted it since settle. It is called inside the index's write transaction, which
// keeps every collector out. It returns [ErrNotFound] for a blob that cannot be linked again, and
// errGone if the stage is loose.
func (st *stage) recheck(d digest.Digest, size int64) error {
	err := st.store.checkSize(d, size)
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	sf := st.files[d]
	if sf == nil || sf.name == "" || sf.size != size {
		return st.explain(sf, err)
	}
	if sf.reused { // settle may have found it gone, and not synced it
		if err := st.syncReused(sf.name); err != nil {
			return err
		}
	}
	if err := st.relink(sf); err != nil {
		return err
	}
	return st.fail(st.store.root.syncDir(path.Dir(blobPath(d))))
}

// relink gives sf's file the name that a collector has freed, unless another publisher is faster.
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

// settleReused makes the file of a blob that the store had durable. It also renews the file's time,
// so that a collection takes it for young.
func (st *stage) settleReused(sf *stagedFile, recorded func(digest.Digest) (bool, error)) error {
	durable := false
	if recorded != nil {
		var err error
		if durable, err = recorded(sf.digest); err != nil {
			return err
		}
	}
	name := blobPath(sf.digest)
	if !durable {
		return st.syncReused(name)
	}
	st.refresh(name, sf.written)
	return nil
}

// refresh gives an old file a new time, so that a collection's grace holds for it. Correctness does
// not need it (recheck does that), so its error is dropped: it fails for another user's file and
// for one that was collected.
func (st *stage) refresh(name string, written time.Time) {
	if time.Since(written) > time.Hour {
		st.store.root.Chtimes(name, time.Now())
	}
}

// syncReused syncs a file that another publisher made: below blobs/, or a link to it below tmp/.
func (st *stage) syncReused(name string) error {
	f, err := st.store.root.openFile(name, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // collected: recheck brings it back
	}
	if err != nil {
		return err
	}
	if fi, err := f.Stat(); err == nil {
		st.refresh(name, fi.ModTime())
	}
	return st.fail(errors.Join(f.sync(), f.Close()))
}

// dedup turns sf into a reused blob if the store has a good file with the same bytes. Reading that
// file costs less than an fsync, and the disk keeps one copy. It does not look for a small blob that
// the store did not have a moment ago. st.mu must be held.
func (st *stage) dedup(ctx context.Context, sf *stagedFile) error {
	if st.missed[sf.digest] && sf.size < cloneChunk {
		return nil
	}
	have, _ := st.borrow(ctx, sf.digest, sf.size, nil) // a failure costs only an fsync
	if have == nil {
		return ctx.Err()
	}
	err := st.drop(sf)
	have.partial = sf.partial
	*sf = *have
	return err
}

// sync starts to make all unsynced files durable, as one batch, once the batch before it is
// durable. Blobs come in while a batch is being synced:
//
//	add      batch 2 fills up      batch 3 fills up
//	sync     ── batch 1 ────────── batch 2 ────────── …
//
// So at most two batches of files are open or dirty, and a transfer waits for the disk only if the
// disk is slower than the transfer. st.mu must be held.
func (st *stage) sync(ctx context.Context) error {
	// A blob whose digest was not known before it came in may be in the store: then it needs no
	// fsync.
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

// wait returns when no file is being synced, with the error of the last batch. st.mu must be held.
func (st *stage) wait() error {
	if st.syncing == nil {
		return nil
	}
	err := <-st.syncing
	st.syncing = nil
	return st.fail(err)
}

// syncFiles makes files durable and closes them. All are on their way to the disk before the first
// fsync, and they are synced side by side: a journalling file system then writes one record for
// several.
func (st *stage) syncFiles(files []stagedFile) error {
	for _, sf := range files {
		sf.file.start(0, 0)
	}
	errs := make([]error, len(files))
	parallel(maxParallelSyncs, slices.All(files), func(i int, sf stagedFile) { errs[i] = st.syncFile(sf) })
	return errors.Join(errs...)
}

// syncFile makes one file durable and closes it. If that fails, it removes the copy of the bytes
// that a later transfer would find below tmp/partial/ and go on with.
func (st *stage) syncFile(sf stagedFile) error {
	err := sf.file.sync()
	if err != nil && sf.partial != "" { // a link to the same file
		err = errors.Join(err, ignoreNotExist(st.store.root.Remove(path.Join(sf.partial, partialData))))
	}
	return errors.Join(err, sf.file.Close())
}

// fail makes the stage fail for good if err is not nil: a failed fsync cannot be repeated.
func (st *stage) fail(err error) error {
	if err != nil && st.failed == nil {
		st.failed = fmt.Errorf("%w (what was added can't be trusted to reach the disk: start over)", err)
	}
	return err
}

// syncAlgDirs makes the names of this stage's blobs durable, with one fsync for each algorithm.
// Publishes that come at the same time share it.
func (st *stage) syncAlgDirs(dirs map[digest.Algorithm]bool) error {
	for alg := range dirs {
		err := st.store.dirSync(alg).do(func() error {
			return st.store.root.syncDir(path.Join(blobsDir, string(alg)))
		})
		if err != nil {
			return st.fail(err)
		}
	}
	return nil
}

// dirSync returns the shared fsync of blobs/<alg>.
func (s *blobStore) dirSync(alg digest.Algorithm) *sharedSync {
	s.mu.Lock()
	defer s.mu.Unlock()
	shared := s.dirSyncs[alg]
	if shared == nil {
		shared = newSharedSync()
		s.dirSyncs[alg] = shared
	}
	return shared
}

// A sharedSync lets concurrent callers share an fsync. An fsync covers what was done before it
// began. So a caller can't join the one that is under way. It waits for the next one, and everybody
// who comes before that begins waits with it: the first of them makes it for all. An error is the
// error of each.
type sharedSync struct {
	syncing chan struct{} // full during an fsync

	mu   sync.Mutex
	next *syncBatch // nil if nobody waits
}

func newSharedSync() *sharedSync { return &sharedSync{syncing: make(chan struct{}, 1)} }

type syncBatch struct {
	done chan struct{} // closed after the fsync
	err  error
}

// do returns after a call of fn that began after do did, with its error.
func (s *sharedSync) do(fn func() error) error {
	s.mu.Lock()
	b := s.next
	if b != nil {
		s.mu.Unlock()
		<-b.done
		return b.err
	}
	b = &syncBatch{done: make(chan struct{}), err: errors.New("an fsync for several calls ended in a panic")}
	s.next = b
	s.mu.Unlock()
	s.syncing <- struct{}{}
	defer func() { <-s.syncing }()
	defer close(b.done)
	s.mu.Lock()
	s.next = nil // who comes from now on may be too late for this one
	s.mu.Unlock()
	b.err = fn()
	return b.err
}

// maxParallelSyncs bounds the goroutines, and so the system threads, that wait in fsync.
const maxParallelSyncs = 16
