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

// GCOptions govern garbage collection. Nil is the zero value.
type GCOptions struct {
	// Grace is the age from which unneeded content is deleted, counted from when it was written.
	// Zero means 24 hours. [NoGrace] deletes at once. No grace is needed for safety: what another
	// call is publishing meanwhile stays.
	Grace time.Duration
	// Protect lists manifests and blobs to keep, with their needs and subjects. A digest without
	// a file is not kept.
	Protect []digest.Digest
	// DropReferrers deletes manifests that no ref needs even if their subject is kept. Without it,
	// a collection keeps every manifest whose subject is kept, such as the signatures of an
	// artifact, whether or not a ref points at it. An artifact that was replaced is then kept as
	// long as the one that it was derived from.
	DropReferrers bool
	// Held is for how long a [Repository] holds blobs that no manifest there names, and manifests
	// without a tag. Zero means 24 hours. Blobs stay up to six hours longer, and a manifest stays
	// as long as its subject. The grace does not matter. [NoGrace] deletes them at once, and so
	// breaks pushes that are under way.
	Held time.Duration
	// Progress, if not nil, gets the state of the collection. Items are the blobs and manifests
	// that it deletes. Skipped items came into use before their turn.
	Progress func(Progress)

	step time.Duration // how long a step keeps the index locked; 0 means gcStep, and tests set others
}

// NoGrace, as [GCOptions.Grace], deletes unneeded content whatever its age.
const NoGrace time.Duration = -1

func (o *GCOptions) grace() time.Duration {
	switch {
	case o.Grace == 0:
		return defaultGrace
	case o.Grace < 0:
		return 0
	}
	return o.Grace
}

// heldBefore returns the moment before which something must have been held for the last time to go.
func (o *GCOptions) heldBefore(now time.Time) time.Time {
	switch {
	case o.Held == 0:
		return now.Add(-defaultHeld)
	case o.Held < 0:
		return now.Add(heldPeriod)
	}
	return now.Add(-o.Held)
}

// late reports whether a step that began at start must end.
func (o *GCOptions) late(start time.Time) bool {
	return time.Since(start) >= cmp.Or(o.step, gcStep)
}

// defaultHeld is for how long what was put into a repository is held there.
const defaultHeld = 24 * time.Hour

// young reports whether a collection that began at began keeps content for its age. With [NoGrace]
// it keeps what was written since it began, but not what a wrong clock has dated into the future.
func (o *GCOptions) young(written, began time.Time) bool {
	return written.After(began.Add(-o.grace())) && (o.Grace >= 0 || !written.After(time.Now()))
}

// A GCReport says what a collection found and did.
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
	// Invalid lists kept manifests that cannot be read or that contradict the index. If there is
	// one that is not only kept because of its subject, nothing is deleted.
	Invalid []InvalidManifest
	// Foreign lists the entries of blobs/ that are not blobs. They are left alone.
	Foreign []string
	// Unreconciled says that the index may not know all that is needed: it was made new beside
	// blobs, or it is empty beside artifacts that are older than an hour. Then nothing is deleted
	// until [LocalRegistry.Repair].
	Unreconciled bool
}

// maxGCList bounds each list of a report.
const maxGCList = 1000

// An InvalidManifest is a manifest and what is wrong with it.
type InvalidManifest struct {
	Digest digest.Digest
	Err    error
}

// GCReport says what [LocalRegistry.GC] with the same options would delete, and deletes nothing.
// It reads the bytes of every manifest that is kept.
//
// Errors:
//   - [ErrInvalidDigest] for one of GCOptions.Protect
//   - any error from ctx, the index or the file system
func (r *LocalRegistry) GCReport(ctx context.Context, opts *GCOptions) (*GCReport, error) {
	g, err := r.collect(ctx, opts, false)
	return g, opError("report garbage", "", "", err)
}

// GC deletes what no ref needs: content that was replaced, removed or never published, and what
// killed processes have left. All refs and GCOptions.Protect are roots. Their needs, their
// subjects and their referrers are kept.
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
//   - any error from ctx, the index or the file system; the report has what was deleted by then
func (r *LocalRegistry) GC(ctx context.Context, opts *GCOptions) (*GCReport, error) {
	g, err := r.collect(ctx, opts, true)
	return g, opError("collect garbage", "", "", err)
}

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

// unsafe returns an [ErrUnsafe] if the mark may have missed something that is needed.
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

// unreconciled reports whether the index may not know all that blobs/ holds: it was made new
// beside blobs, or it is empty, as an old copy that was put back can be, and there is a whole
// artifact. The artifact must be an hour old, because a collection may delete what the first
// publish of a registry has left, if it was killed.
func (r *LocalRegistry) unreconciled(ctx context.Context) (bool, error) {
	mark, err := meta(r.index, metaUnreconciled)
	if mark != "" || err != nil {
		return mark != "", err
	}
	if known, err := hasAnyBlob(r.index); known || err != nil {
		return false, err
	}
	found := false
	old := time.Now().Add(-time.Hour)
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
			return nil // not a manifest, or not a whole artifact
		}
		found = true
		return errStop
	})
	if found {
		err = nil
	}
	return found, err
}

// sweepTmp removes what dead processes have left below tmp/. Interrupted pulls and quarantined
// files go when they are older than the grace.
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
			continue // nothing, or a link that leads to what is not ours
		}
		err := r.root.eachEntry(ctx, dir, func(name string) error {
			name = path.Join(dir, name)
			fi, err := r.root.Lstat(name)
			if err != nil || opts.young(fi.ModTime(), began) {
				return ignoreNotExist(err)
			}
			// A pull that goes on with a blob writes to the file only.
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

// sweepUploads removes the uploads that have had no byte since a moment.
func (r *LocalRegistry) sweepUploads(ctx context.Context, before time.Time) error {
	dir := path.Join(tmpDir, uploadDir)
	if fi, err := r.root.Lstat(dir); err != nil || !fi.IsDir() {
		return ignoreNotExist(err)
	}
	err := r.root.eachEntry(ctx, dir, func(name string) error {
		if name = path.Join(dir, name); r.blobs.uploadIdleSince(name, before) {
			return r.blobs.sweepUpload(name)
		}
		return nil
	})
	return errors.Join(err, r.root.removeEmpty(dir))
}
