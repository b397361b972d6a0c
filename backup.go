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
	// Overwrite lets the backup undo changes that somebody made to its refs since the last backup.
	Overwrite bool
	// AllowNetworkFS is [Options.AllowNetworkFS] for the backup.
	AllowNetworkFS bool
	// AllowOtherOwner is [Options.AllowOtherOwner] for the backup.
	AllowOtherOwner bool
	// Progress, if not nil, is called with how far the backup is. Its counts begin again if
	// something was collected meanwhile. Blobs that cannot be copied leave the totals.
	Progress func(Progress)
}

// A BackupReport says what a backup did.
type BackupReport struct {
	Refs         int // refs that the backup has now
	RefsSet      int // refs that are new or changed since the last backup
	RefsRemoved  int // refs that the registry has no more
	BlobsCopied  int
	BlobsPresent int // blobs that the backup had already
	BytesCopied  int64
	Failed       []BackupFailure // blobs that could not be copied
}

// A BackupFailure is a blob of the registry that is missing, damaged or unreadable.
type BackupFailure struct {
	Digest digest.Digest
	Refs   []Reference // refs left out for it, unless an earlier failure has them; the backup keeps its own
	Err    error
}

// Backup makes dir a registry with the refs that this one has at one moment, and with all that they
// lead to. Other processes may write here meanwhile. dir is created if necessary. Until everything
// is there, it stays as it was, and it can be opened at any time, during a backup for reading. The
// next backup to the same dir copies only blobs that it lacks. Of the others it checks the sizes;
// [LocalRegistry.Verify] checks the rest. Every blob is verified while it is copied.
//
// The backup has this registry's id, so it can take its place. Nothing but refs is ever deleted
// from it: [LocalRegistry.GC] there deletes what was collected here. Nobody else should change its
// refs.
//
// A damaged or missing blob does not stop the backup. The refs that need it are left out, or stay
// as they were in the backup.
//
// Errors:
//   - [ErrIncomplete] with the report, after everything else was backed up, if blobs could not be
//     read
//   - [ErrConflict] if the backup's refs were changed and [BackupOptions.Overwrite] is not set, or
//     if dir is a registry with another id
//   - [ErrInvalidArgument] if dir is this registry's or lies in it
//   - [ErrBusy] if collections, here or there, kept deleting what was being copied
//   - [ErrCorruptIndex] if the index is damaged: a backup that lacked something would look whole
//   - those of [Open], [ErrNoSpace], and any error from ctx or the file system
func (r *LocalRegistry) Backup(ctx context.Context, dir string, opts *BackupOptions) (*BackupReport, error) {
	if opts == nil {
		opts = &BackupOptions{}
	}
	report, err := attend(ctx, opts.Progress, Reference{}, func(ctx context.Context, m *meter) (*BackupReport, error) {
		return r.backup(ctx, dir, opts, m)
	})
	return report, opError("back up to", dir, "", err)
}

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

// maxBackupAttempts is how often a backup starts again because something was collected meanwhile.
const maxBackupAttempts = 10

// A backup is one attempt, in this order:
//
//	snapshot  copy the index, as it is at one moment, into a private file of the target
//	copy      bring the blobs of the snapshot to the target, durably
//	leave out take manifests and refs that need a missing blob out of the snapshot
//	merge     in one transaction of the target: check that nobody changed its refs, and that all
//	          blobs are there; take in the rows of the snapshot; make the refs those of the snapshot
//
// Collections run meanwhile. If one has deleted a blob that the snapshot needs, the registry has
// moved on, and the attempt ends with errCollected. The next one takes a new snapshot, and the
// blobs that were copied are there already. A killed backup leaves the target as it was, with some
// blobs more.
type backup struct {
	source, target *LocalRegistry
	overwrite      bool
	snapshot       *index
	report         *BackupReport
	meter          *meter
}

// errCollected ends an attempt whose snapshot needs blobs that were collected, in the source or in
// the target.
var errCollected = errors.New("something was collected while it was being copied")

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
	name := filepath.Join(target.dir, session, rand.Text()) // goes with the session
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

const backupBatch = 500 // blobs that are staged and synced together

// copyBlobs brings the blobs of the snapshot to the target, and takes out of the snapshot what the
// source does not have.
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
	b.report.BlobsPresent = max(0, b.report.BlobsPresent-b.report.BlobsCopied) // by attempts before
	// A blob that is there may not be durable: its writer may have been killed before its fsync.
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

// copyBatch copies blobs, durably, and appends those that the source does not have to missing.
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

// copyBlob stages one blob. bad is a fault of the blob in the source, never of the process.
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
	// Either side may have failed. Reading the source by itself tells which.
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

// leaveOut takes missing blobs, and the manifests that need them, out of the snapshot. A blob that
// no ref leads to, in the snapshot or by now in the source, was collected, and is no failure. But a
// snapshot in which a ref leads to it is out of date.
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
			return errCollected // it was collected, or it has come back
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

// checkMark refuses a target whose refs somebody else has changed.
func (b *backup) checkMark(q queryer) error {
	mark, last, refs, err := refsMark(q)
	if err == nil && refs > 0 && last != mark && !b.overwrite {
		err = fmt.Errorf("%w: its refs were changed since the last backup (BackupOptions.Overwrite undoes that)", ErrConflict)
	}
	return err
}

// merge makes the target's index that of the snapshot, if all blobs are there.
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
