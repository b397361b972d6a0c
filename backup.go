package ocilocal

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"path"
	"path/filepath"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BackupOptions govern a backup. Nil is the zero value.
type BackupOptions struct {
	// Overwrite lets the backup undo changes that another program made to its refs since the last
	// backup.
	Overwrite bool
	// AllowNetworkFS is [Options.AllowNetworkFS] for the backup.
	AllowNetworkFS bool
	// AllowOtherOwner is [Options.AllowOtherOwner] for the backup.
	AllowOtherOwner bool
	// Progress, if not nil, is called with the state of the backup. Its counts begin again if
	// content was collected meanwhile. Blobs that cannot be copied are subtracted from the totals.
	Progress func(Progress)
}

// A BackupReport is the result of a backup.
type BackupReport struct {
	Refs         int // refs that the backup has now
	RefsSet      int // refs that are new or changed since the last backup
	RefsRemoved  int // refs that the registry no longer has
	BlobsCopied  int
	BlobsPresent int // blobs that the backup had already
	BytesCopied  int64
	Failed       []BackupFailure // blobs that could not be copied
}

// A BackupFailure is a blob of the registry that is missing, damaged or unreadable.
type BackupFailure struct {
	Digest digest.Digest
	// Refs are the refs that were left out because of this blob. A ref is listed with one failure
	// only. If the backup has such a ref from before, it keeps it.
	Refs []Reference
	Err  error
}

// Backup makes dir a registry with the refs that this one has at one moment, and with everything
// that they lead to. Other processes may write to this registry meanwhile. dir is created if
// necessary. Its refs change in one step, when all content is there. It can be opened at any time;
// during a backup, it should only be read. The next backup to the same dir copies only the blobs
// that dir does not have. It compares the sizes of the others; [LocalRegistry.Verify] checks their
// bytes. Every blob is verified while it is copied.
//
// The backup has this registry's id, so it can replace it. A backup deletes only refs from dir. The
// content of collected artifacts stays there until [LocalRegistry.GC] of the backup. No other
// program should change the refs of dir.
//
// A damaged or missing blob does not stop the backup. The refs that need it are left out, or stay
// as they were in the backup.
//
// Errors:
//   - [ErrIncomplete] with the report: blobs could not be read, and everything else was backed up
//   - [ErrConflict]: the backup's refs were changed and [BackupOptions.Overwrite] is not set, or
//     dir is a registry with another id
//   - [ErrInvalidArgument]: dir is this registry's directory or lies in it
//   - [ErrBusy]: collections in either registry kept deleting content that was being copied
//   - [ErrCorruptIndex]: the index is damaged, so a backup could lack content and look whole
//   - those of [Open], [ErrNoSpace], and any error from ctx or the file system
func (r *LocalRegistry) Backup(ctx context.Context, dir string, opts *BackupOptions) (_ *BackupReport, err error) {
	defer addOp(&err, "back up to", dir, "")
	if opts == nil {
		opts = &BackupOptions{}
	}
	return attend(ctx, opts.Progress, Reference{}, func(ctx context.Context, m *meter) (*BackupReport, error) {
		return r.backup(ctx, dir, opts, m)
	})
}

// backup makes attempts until one is not disturbed by a collection. Each attempt begins with an
// empty report, except for the blobs that were copied: the next attempt finds these in the target.
func (r *LocalRegistry) backup(ctx context.Context, dir string, opts *BackupOptions, m *meter) (report *BackupReport, err error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := r.checkTarget(dir, blobsDir, tmpDir, indexFile, idFile); err != nil {
		return nil, err
	}
	report = &BackupReport{}
	for range maxBackupAttempts {
		m.restart()
		m.phase(PhasePlan)
		if err = r.backupOnce(ctx, dir, opts, report, m); !errors.Is(err, errCollected) {
			return report, err
		}
		report = &BackupReport{BlobsCopied: report.BlobsCopied, BytesCopied: report.BytesCopied}
	}
	return report, fmt.Errorf("%w: %w, %d times", ErrBusy, err, maxBackupAttempts)
}

// maxBackupAttempts is the number of attempts of a backup. An attempt fails if content is collected
// meanwhile.
const maxBackupAttempts = 10

// A backup is one attempt, in this order:
//
//	snapshot  copy the index, as it is at one moment, into a private file of the target
//	copy      bring the blobs of the snapshot to the target, durably
//	leave out remove manifests and refs that need a missing blob from the snapshot
//	merge     in one transaction of the target: check that its refs were not changed, and that all
//	          blobs are there; add the rows of the snapshot; make the refs those of the snapshot
//
// Collections may run meanwhile. If one has deleted a blob that the snapshot needs, the snapshot is
// out of date, and the attempt ends with errCollected. The next one takes a new snapshot, and finds
// the blobs that were copied before. A killed backup leaves the target as it was, with some more
// blobs.
type backup struct {
	source, target *LocalRegistry
	overwrite      bool
	snapshot       *index
	report         *BackupReport
	meter          *meter
}

// errCollected ends an attempt whose snapshot needs blobs that were collected, in the source or in
// the target.
var errCollected = errors.New("content was collected while it was being copied")

// backupOnce makes one attempt. It opens the target with this registry's id, so a directory that is
// new gets that id, and a registry with another id is refused. The snapshot lies in the session of
// this handle below the target's tmp/. Close removes it; after a kill, the next process does.
func (r *LocalRegistry) backupOnce(ctx context.Context, dir string, opts *BackupOptions, report *BackupReport, m *meter) (err error) {
	target, err := open(ctx, dir, &Options{Logger: r.opts.Logger, BusyTimeout: r.opts.BusyTimeout,
		AllowNetworkFS: opts.AllowNetworkFS, AllowOtherOwner: opts.AllowOtherOwner, id: r.id, fault: r.opts.fault}, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	if target.id != r.id {
		return fmt.Errorf("%w: it is a registry with another id", ErrConflict)
	}
	session, err := target.blobs.enter()
	if err != nil {
		return err
	}
	b := &backup{source: r, target: target, overwrite: opts.Overwrite, report: report, meter: m}
	if err := b.checkMark(target.index); err != nil { // before the work; merge does it again
		return err
	}
	name := filepath.Join(target.dir, session, rand.Text()) // removed with the session
	if err := r.index.snapshot(ctx, name); err != nil {
		return err
	}
	if b.snapshot, err = openIndex(ctx, database{path: name, private: true}, 0, r.schema()); err != nil {
		return err
	}
	err = b.copyBlobs(ctx)
	if err = errors.Join(err, b.snapshot.close()); err == nil {
		err = target.index.attach(name)
	}
	if err == nil {
		m.phase(PhasePublish)
		err = target.writeAlone(ctx, func(tx *indexTx) error { return b.merge(ctx, tx) })
	}
	if err != nil {
		return err
	}
	if n := len(b.report.Failed); n > 0 {
		err = fmt.Errorf("%w: %d blobs could not be copied, the first: %w", ErrIncomplete, n, b.report.Failed[0].Err)
	}
	return err
}

// backupBatch is the number of blobs that are staged and synced together. A stage keeps a file
// below tmp/ for each of them, and a killed backup has to copy one batch again at most.
const backupBatch = 500

// copyBlobs brings the blobs of the snapshot to the target, and removes rows from the snapshot that
// need a blob which the source does not have.
func (b *backup) copyBlobs(ctx context.Context) error {
	var todo []ocispec.Descriptor
	algs := map[digest.Algorithm]bool{}
	err := b.snapshot.blobRows(ctx, func(row blobRow) error {
		desc := ocispec.Descriptor{Digest: row.digest, Size: row.size}
		b.meter.plan(1, row.size)
		switch err := b.target.blobs.checkSize(row.digest, row.size); {
		case err == nil:
			b.meter.skip(desc)
			b.report.BlobsPresent++
			algs[row.digest.Algorithm()] = true
		case processCondition(err):
			return err
		default:
			todo = append(todo, desc)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.report.BlobsPresent = max(0, b.report.BlobsPresent-b.report.BlobsCopied) // without those of earlier attempts
	// The name of a present blob may not be durable: its writer may have been killed before the
	// fsync of the directory.
	for alg := range algs {
		if err := b.target.root.syncDir(path.Dir(blobPath(alg.FromString("")))); err != nil {
			return err
		}
	}
	b.meter.planned(PhaseBlobs)
	var missing []BackupFailure
	for batch := range slices.Chunk(todo, backupBatch) {
		if missing, err = b.copyBatch(ctx, batch, missing); err != nil {
			return err
		}
	}
	return b.snapshot.write(ctx, func(tx *indexTx) error { return b.leaveOut(ctx, tx, missing) })
}

// copyBatch copies blobs, durably, and appends the blobs that the source does not have to missing.
// mu guards missing while several tasks copy.
func (b *backup) copyBatch(ctx context.Context, batch []ocispec.Descriptor, missing []BackupFailure) ([]BackupFailure, error) {
	st := b.target.blobs.newStage()
	defer func() { b.target.logDiscard(st.discard()) }()
	var mu sync.Mutex
	copies := newTasks(ctx, diskWorkers)
	var err error
	for _, desc := range batch {
		err = copies.start(func() error {
			item := b.meter.item(desc)
			bad, err := b.copyBlob(copies.ctx, st, desc, item.from(0))
			switch {
			case err != nil:
			case bad == nil:
				item.end()
			default:
				item.drop()
				mu.Lock()
				defer mu.Unlock()
				missing = append(missing, BackupFailure{Digest: desc.Digest, Err: bad})
			}
			return err
		})
		if err != nil {
			break
		}
	}
	if err := copies.wait(err); err != nil {
		return nil, err
	}
	if err := st.settle(ctx, nil); err != nil {
		return nil, err
	}
	written, _, bytes := st.counts()
	b.report.BlobsCopied += written
	b.report.BytesCopied += bytes
	return missing, nil
}

// copyBlob stages one blob. bad is a fault of the blob in the source, which the backup reports and
// goes on. err is an error of the target or the process, which ends the backup.
func (b *backup) copyBlob(ctx context.Context, st *stage, desc ocispec.Descriptor, count func(n int)) (bad, err error) {
	f, _, err := b.source.blobs.openFile(desc.Digest, desc.Size)
	if processCondition(err) {
		return nil, err
	}
	if err != nil {
		return err, nil
	}
	defer f.Close()
	err = st.putFile(ctx, f, desc.Digest, desc.Size, count)
	if err == nil || processCondition(err) {
		return nil, err
	}
	// Either side may have failed. Reading the source alone shows which.
	switch bad := b.source.blobs.verify(ctx, desc.Digest, desc.Size); {
	case processCondition(bad):
		return nil, bad
	case bad != nil:
		return bad, nil
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		return fmt.Errorf("blob %s: %w", desc.Digest, err), nil
	}
	return nil, err
}

// leaveOut removes missing blobs, and the manifests that need them, from the snapshot. A missing
// blob is one of these:
//
//	a ref leads to it   in the snapshot   in the source now
//	                    no                                   collected: left out, not a failure
//	                    yes               no                 the snapshot is out of date: errCollected
//	                    yes               yes                lost: a failure, and its refs are left out
//
// A lost blob that has a file again by now was put back meanwhile: that is errCollected too, so
// that the next attempt copies it.
func (b *backup) leaveOut(ctx context.Context, tx *indexTx, missing []BackupFailure) error {
	if err := tx.makeLeftOut(); err != nil {
		return err
	}
	lost := map[digest.Digest]bool{}
	for _, m := range missing {
		lost[m.Digest] = errors.Is(m.Err, ErrNotFound)
	}
	then := climb{ctx: ctx, q: tx, ways: ways{subjects: true}, present: func(d digest.Digest) (bool, error) { return !lost[d], nil }}
	needed := map[digest.Digest]bool{}
	for _, m := range missing {
		led, err := then.led(m.Digest)
		if err != nil {
			return err
		}
		if needed[m.Digest] = led; !led {
			continue
		}
		now := climb{ctx: ctx, q: b.source.index, ways: ways{subjects: true}, present: b.source.blobs.present}
		if led, err = now.led(m.Digest); err != nil {
			return err
		}
		switch _, err := b.source.blobs.size(m.Digest); {
		case processCondition(err):
			return err
		case !led || err == nil && errors.Is(m.Err, ErrNotFound):
			return errCollected // it was collected, or it has been put back
		}
	}
	for _, m := range missing {
		above, _, err := (&climb{ctx: ctx, q: tx}).all(m.Digest, math.MaxInt)
		if err != nil {
			return err
		}
		if m.Refs, err = tx.leaveOut(above); err != nil {
			return err
		}
		if needed[m.Digest] {
			b.report.Failed = append(b.report.Failed, m)
		}
	}
	return nil
}

// checkMark refuses a target whose refs another program has changed. Each backup stores a mark of
// the refs that it has set. If the mark of the refs differs now, they were changed since.
func (b *backup) checkMark(q queryer) error {
	mark, last, refs, err := refsMark(q)
	if err == nil && refs > 0 && last != mark && !b.overwrite {
		err = fmt.Errorf("%w: the backup's refs were changed since the last backup (BackupOptions.Overwrite undoes that)", ErrConflict)
	}
	return err
}

// merge gives the target's index the refs of the snapshot, if all blobs are there. It runs in a
// transaction of the target, which keeps the target's collections out. checkMark is repeated here,
// because the refs may have changed while blobs were copied.
func (b *backup) merge(ctx context.Context, tx *indexTx) error {
	if err := b.checkMark(tx); err != nil {
		return err
	}
	if err := tx.otherBlobs(ctx, b.target.blobs.checkSize); errors.Is(err, ErrNotFound) {
		return errCollected
	} else if err != nil {
		return err
	}
	set, removed, err := tx.merge(ctx)
	if err != nil {
		return err
	}
	mark, _, refs, err := refsMark(tx)
	if err != nil {
		return err
	}
	b.report.Refs, b.report.RefsSet, b.report.RefsRemoved = refs, int(set), int(removed)
	return tx.setMeta(metaBackup, mark)
}
