package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A collection has these parts:
//
//	mark      read the index and blobs/, decide what is kept, read every kept manifest   gcmark.go
//	unsafe    stop with ErrUnsafe if the mark may have missed something
//	sweep     delete the rest in short steps with the index locked, each checked again   gcstep.go
//	sweepTmp  remove leftovers of dead processes, old holds and old quarantined files below tmp/
//
// GCReport is the mark alone. Only sweep locks the index, and only for its steps, so other
// processes go on meanwhile. A collection that is killed has deleted orphans only. The next one
// goes on.

// GCOptions govern garbage collection. Nil is the zero value.
type GCOptions struct {
	// Grace is the age from which unneeded content is deleted. It counts from the time at which the
	// content was written. Zero means 24 hours. [NoGrace] deletes at once. Safety does not depend
	// on the grace: a collection never deletes content that another call is publishing.
	Grace time.Duration
	// Protect lists manifests and blobs to keep, with everything that they need and with their
	// subjects. A digest without a file is not kept.
	Protect []digest.Digest
	// DropReferrers deletes manifests that no ref needs even if their subject is kept. Without it,
	// a collection keeps every manifest whose subject is kept, such as the signatures of an
	// artifact, whether or not a ref points at it. A replaced artifact is then kept as long as its
	// subject.
	DropReferrers bool
	// Held is how long a [Repository] holds blobs that no manifest there names, and manifests
	// without a tag. Zero means 24 hours. Blobs stay up to six hours longer, and a manifest stays
	// as long as its subject. Grace does not apply to them. [NoGrace] deletes them at once, and so
	// breaks pushes that are in progress.
	Held time.Duration
	// Progress, if not nil, gets the state of the collection. Items are the blobs and manifests
	// that it deletes. Skipped items came into use before their turn.
	Progress func(Progress)

	step time.Duration // how long a step keeps the index locked; 0 means gcStep, and tests set others
}

// NoGrace, as [GCOptions.Grace], deletes unneeded content whatever its age.
const NoGrace time.Duration = -1

// grace returns the grace in force: 0 for NoGrace.
func (o *GCOptions) grace() time.Duration {
	switch {
	case o.Grace == 0:
		return defaultGrace
	case o.Grace < 0:
		return 0
	}
	return o.Grace
}

// heldBefore returns the time from which holds are too old: a hold that was last renewed before it
// ends. With NoGrace, the time is in the future. Held blobs lie in one directory for each period of
// six hours, and the directory of the current period must count as old too.
func (o *GCOptions) heldBefore(now time.Time) time.Time {
	switch {
	case o.Held == 0:
		return now.Add(-defaultHeld)
	case o.Held < 0:
		return now.Add(heldPeriod)
	}
	return now.Add(-o.Held)
}

// late reports whether a step that began at start has used its time.
func (o *GCOptions) late(start time.Time) bool {
	return time.Since(start) >= cmp.Or(o.step, gcStep)
}

// defaultHeld is how long a repository holds content. A push of a large image may take hours, and
// its blobs come before the manifest that needs them.
const defaultHeld = 24 * time.Hour

// young reports whether a collection that began at began keeps content because of its age. With
// [NoGrace] it keeps content that was written since it began. Content with a date in the future,
// from a wrong clock, is then not young: otherwise nothing could ever delete it.
func (o *GCOptions) young(written, began time.Time) bool {
	return written.After(began.Add(-o.grace())) && (o.Grace >= 0 || !written.After(time.Now()))
}

// A GCReport is the result of a collection.
type GCReport struct {
	Roots     int   // manifests that refs point at or repositories hold, and the digests of GCOptions.Protect
	Reachable Count // content that is kept: the roots, their needs, subjects and referrers
	Orphans   Count // content that nothing keeps
	Deferred  Count // content that only the grace keeps, its own or that of something that needs it
	Deleted   Count // orphans that were deleted; zero after GCReport
	Revived   int   // orphans that came into use before their turn

	// Missing lists blobs and manifests that a root or a subject needs and that have no file.
	// If a ref needs a missing manifest, nothing is deleted.
	Missing []digest.Digest
	// Invalid lists kept manifests that cannot be read or that contradict the index. Nothing is
	// deleted if there is one, except one that is kept only because of its subject.
	Invalid []InvalidManifest
	// Foreign lists the entries of blobs/ that are not blobs. They are never deleted.
	Foreign []string
	// Unreconciled is set if the index may lack content that is needed: it was made new beside
	// blobs, or it is empty beside artifacts that are older than an hour. Then nothing is deleted
	// until [LocalRegistry.Repair].
	Unreconciled bool
}

// maxGCList bounds each list of a report, since a damaged registry can have a problem for each
// blob.
const maxGCList = 1000

// An InvalidManifest is a manifest with the error that makes it invalid.
type InvalidManifest struct {
	Digest digest.Digest
	Err    error
}

// GCReport returns the report that [LocalRegistry.GC] with the same options would begin with, and
// deletes nothing. It reads the bytes of every manifest that is kept. It does not return
// [ErrUnsafe].
//
// Errors:
//   - [ErrInvalidDigest] for one of GCOptions.Protect
//   - any error from ctx, the index or the file system
func (r *LocalRegistry) GCReport(ctx context.Context, opts *GCOptions) (_ *GCReport, err error) {
	defer addOp(&err, "report garbage", "", "")
	return r.collect(ctx, opts, false)
}

// GC deletes content that no ref needs: it was replaced, removed or never published, or killed
// processes have left it. The roots are all refs, the holds of repositories, and GCOptions.Protect.
// Everything that they need, their subjects and their referrers are kept.
//
// GC works in short steps and lets other processes write in between. It may run beside any other
// call, other collectors included, and on a full disk. Each step checks again, with the index
// locked, that its content is unneeded. So a ref that resolves never loses anything.
//
// Errors:
//   - [ErrUnsafe] with the report, which says why nothing was deleted
//   - [ErrReadOnly], [ErrBusy]
//   - [ErrNoSpace] if the disk is full and nothing can be deleted safely
//   - [ErrInvalidDigest] for one of GCOptions.Protect
//   - any error from ctx, the index or the file system; the report counts the deletions until then
func (r *LocalRegistry) GC(ctx context.Context, opts *GCOptions) (_ *GCReport, err error) {
	defer addOp(&err, "collect garbage", "", "")
	return r.collect(ctx, opts, true)
}

// collect is GC if del is set, and otherwise GCReport. An error before the mark is done comes
// without a report. Any later one comes with it: the caller must learn what was deleted.
//
// tmp/ is swept last. A step on a full disk sweeps it earlier, to gain space.
func (r *LocalRegistry) collect(ctx context.Context, opts *GCOptions, del bool) (*GCReport, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if del && r.blobs.readOnly {
		return nil, ErrReadOnly
	}
	o := GCOptions{}
	if opts != nil {
		o = *opts
	}
	m := newMeter(o.Progress, Reference{}) // it is used on this goroutine only
	m.phase(PhasePlan)
	g, err := r.mark(ctx, o)
	if err != nil {
		return nil, err
	}
	g.meter = m
	if g.report.Unreconciled, err = r.unreconciled(ctx); err != nil {
		return nil, err
	}
	if !del {
		m.finish()
		return &g.report, nil
	}
	if err := g.unsafe(); err != nil {
		return &g.report, err
	}
	if err := g.sweep(ctx); err != nil {
		return &g.report, err
	}
	if err := r.sweepTmp(ctx, &o); err != nil {
		return &g.report, err
	}
	m.finish()
	return &g.report, nil
}

// unsafe returns an [ErrUnsafe] if the mark may have missed something that is needed. A manifest
// that is needed and cannot be read may need anything, so nothing at all may be deleted.
func (g *gcGraph) unsafe() error {
	if g.report.Unreconciled {
		return fmt.Errorf("%w: the index is new or empty beside blobs that it may not know (Repair records them)", ErrUnsafe)
	}
	if len(g.unreliable) > 0 {
		first := g.unreliable[0]
		return fmt.Errorf("%w: %d needed manifests are missing or invalid, such as %s: %w", ErrUnsafe, len(g.unreliable), first.Digest, first.Err)
	}
	return nil
}

// unreconciled reports whether the index may lack content that blobs/ has. GC, Verify and Repair
// ask it. There are two cases:
//
//   - The index was made new beside blobs. It has a mark then, which Repair removes.
//   - The index has no blob at all, for example because an old copy of it was put back, and blobs/
//     has a whole artifact. The artifact must be an hour old, by the clock that stamps the files:
//     a first publish that was killed leaves one too, and a collection may delete that.
//
// An index that knows any blob costs two queries. Only with an empty one is blobs/ searched, until
// the first artifact is found.
func (r *LocalRegistry) unreconciled(ctx context.Context) (bool, error) {
	mark, err := meta(r.index, metaUnreconciled)
	if mark != "" || err != nil {
		return mark != "", err
	}
	if known, err := hasAnyBlob(r.index); known || err != nil {
		return false, err
	}
	found := false
	old := r.blobs.now().Add(-time.Hour)
	err = r.blobs.walk(ctx, func(e blobEntry) error {
		if e.digest == "" || e.info.Size() > MaxManifestSize || e.info.ModTime().After(old) {
			return nil
		}
		if ok, err := r.looksLikeManifest(e.digest); !ok || err != nil {
			return err
		}
		m, err := r.readVerified(ctx, ocispec.Descriptor{Digest: e.digest, Size: -1})
		for i := 0; err == nil && i < len(m.children()); i++ {
			c := m.children()[i]
			err = r.blobs.checkSize(c.Digest, c.Size)
		}
		if processCondition(err) {
			return err
		}
		if err != nil {
			return nil // not a manifest, or an artifact that is not whole
		}
		found = true
		return errStop
	})
	if found {
		err = nil
	}
	return found, err
}

// sweepTmp removes old files below tmp/:
//
//	sessions      of processes that have ended; at once
//	held/         blobs of repositories, after GCOptions.Held
//	upload/       uploads that have had no byte for GCOptions.Held
//	partial/      interrupted pulls, after the grace
//	quarantine/   damaged files, after the grace
//
// Files that a process uses are locked or too young, so this is safe beside any other call. The
// directories themselves go when they are empty.
func (r *LocalRegistry) sweepTmp(ctx context.Context, opts *GCOptions) error {
	if err := r.blobs.sweep(); err != nil {
		return err
	}
	began := time.Now()
	if err := r.blobs.sweepHeld(ctx, opts.heldBefore(began)); err != nil {
		return err
	}
	if err := r.sweepUploads(ctx, opts.heldBefore(began)); err != nil {
		return err
	}
	for dir, sweep := range map[string]func(name string) error{partialDir: r.blobs.sweepPartial, quarantineDir: r.blobs.sweepQuarantined} {
		dir = path.Join(tmpDir, dir)
		if fi, err := r.root.Lstat(dir); err != nil || !fi.IsDir() {
			continue // missing, or a link to files that are not this package's
		}
		err := r.root.eachEntry(ctx, dir, func(name string) error {
			name = path.Join(dir, name)
			fi, err := r.root.Lstat(name)
			if err != nil || opts.young(fi.ModTime(), began) {
				return ignoreNotExist(err)
			}
			// A pull that resumes a blob changes only the time of the file in the directory.
			if data, err := r.root.Lstat(path.Join(name, partialData)); err == nil && opts.young(data.ModTime(), began) {
				return nil
			}
			return sweep(name)
		})
		if err != nil {
			return err
		}
	}
	for _, dir := range []string{partialDir, quarantineDir} {
		if err := r.root.removeEmpty(path.Join(tmpDir, dir)); err != nil {
			return err
		}
	}
	return nil
}

// sweepUploads removes the uploads that have had no byte since a moment. An upload that a request
// is writing to is locked, and stays.
func (r *LocalRegistry) sweepUploads(ctx context.Context, before time.Time) error {
	dir := path.Join(tmpDir, uploadDir)
	if fi, err := r.root.Lstat(dir); err != nil || !fi.IsDir() {
		return ignoreNotExist(err)
	}
	err := r.root.eachEntry(ctx, dir, func(name string) error {
		if name = path.Join(dir, name); r.blobs.uploadIdleSince(name, before) {
			_, err := r.blobs.sweepUpload(name, before)
			return err
		}
		return nil
	})
	return errors.Join(err, r.root.removeEmpty(dir))
}
