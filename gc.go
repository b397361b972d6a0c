package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// GCOptions govern garbage collection. Nil is the zero value.
type GCOptions struct {
	// Grace is how old something must be to be deleted, by when it was written.
	// Zero means 24 hours, [NoGrace] deletes at once. Whatever it is, no
	// work in flight is harmed: what another call is publishing meanwhile stays.
	Grace time.Duration
	// Protect are manifests or blobs to keep, with what they need and their subjects. One whose file is not
	// there is not kept.
	Protect []digest.Digest
	// KeepReferrers keeps every manifest whose subject is kept, such as the
	// signatures of an artifact, whether or not a ref points at it. Without it, an
	// artifact that was replaced goes even if it was derived from one that stays.
	KeepReferrers bool
}

// NoGrace, as [GCOptions.Grace], deletes what is not needed whatever its age.
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

// young reports whether what was written at t is kept by a collection that began at began.
// With [NoGrace] that is what came since, and not what a clock that was wrong has dated later than now.
func (o *GCOptions) young(t, began time.Time) bool {
	return t.After(began.Add(-o.grace())) && (o.Grace >= 0 || !t.After(time.Now()))
}

// A GCReport tells what garbage collection found and did.
type GCReport struct {
	Roots     int   // manifests that a ref points at, and GCOptions.Protect
	Reachable Count // what is kept because the roots need it, by subjects too
	Orphans   Count // what nothing needs
	Deferred  Count // what nothing needs, but for something that is younger than the grace
	Deleted   Count // the orphans that were deleted; none by a dry run
	Revived   int   // orphans that came into use before it was their turn

	// Missing are blobs and manifests that are not there, and that a root or a subject needs.
	// As long as a ref needs a missing manifest, nothing is deleted.
	Missing []digest.Digest
	// Invalid are manifests that are kept and can't be read, or contradict the
	// index. Unless only [GCOptions.KeepReferrers] keeps it, nothing is deleted as long as there is one.
	Invalid []InvalidManifest
	// Foreign are entries of blobs/ that are no blobs. They are left alone.
	Foreign []string
	// Unreconciled is set when the index was made new beside blobs, or is empty beside
	// artifacts that are older than an hour, and so may not know all that is needed.
	// Then nothing is deleted until [LocalRegistry.Repair].
	Unreconciled bool
}

// maxGCList bounds each list of a report.
const maxGCList = 1000

// An InvalidManifest says what is wrong with a manifest.
type InvalidManifest struct {
	Digest digest.Digest
	Err    error
}

// GCReport says what [LocalRegistry.GC] with the same options would delete, and deletes nothing.
// It reads the bytes of every manifest that a ref needs. Errors: ctx's,
// [ErrInvalidDigest] in opts, those of the index and the file system's.
func (r *LocalRegistry) GCReport(ctx context.Context, opts *GCOptions) (*GCReport, error) {
	g, err := r.collect(ctx, opts, false)
	return g, opError("report garbage", "", "", err)
}

// GC deletes what no ref needs: what was replaced, removed, or never
// published, with its bytes, and what killed processes have left. Roots are all refs,
// GCOptions.Protect, and the subjects of what is kept. It works in short steps, between which other
// processes write, and beside any of them, other collectors included, on a full disk too.
//
// What it deletes it has looked at again with the index locked, so a ref
// that resolves never loses anything. Errors: [ErrUnsafe] with the report, which
// says why nothing was deleted, [ErrReadOnly], [ErrBusy], ctx's (what was deleted by then
// is in the report), [ErrInvalidDigest] in opts, those of the index and the file system's.
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
	g, err := r.mark(ctx, o)
	if err != nil {
		return nil, err
	}
	if g.report.Unreconciled, err = r.unreconciled(ctx); err != nil {
		return nil, err
	}
	if !del {
		return &g.report, nil
	}
	if err := g.unsafe(); err != nil {
		return &g.report, err
	}
	if err := g.sweep(ctx); err != nil {
		return &g.report, err
	}
	return &g.report, r.sweepTmp(ctx, &o)
}

func (g *gcGraph) unsafe() error {
	switch {
	case g.report.Unreconciled:
		return fmt.Errorf("%w: the index is new or empty beside blobs that it may not know (Repair makes it know them)", ErrUnsafe)
	}
	for _, m := range g.report.Invalid {
		if g.nodes[g.ids[m.Digest]].hold > holdReferrer {
			return fmt.Errorf("%w: %d manifests can't be relied on, such as %s: %w", ErrUnsafe, len(g.report.Invalid), m.Digest, m.Err)
		}
	}
	for _, d := range g.report.Missing {
		if n := g.nodes[g.ids[d]]; n.manifest && n.hold == holdNeeded {
			return fmt.Errorf("%w: manifest %s is needed and not there", ErrUnsafe, d)
		}
	}
	return nil
}

// unreconciled reports whether the index may not know all that blobs/ holds: because it
// was made new beside it, or because it is empty, as an old copy that was put back can
// be, and there is a whole artifact. That must be an hour old: what the first publish of
// a registry has left, if it was killed, a collection shall delete.
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

// gcStep is how long a step of deletion keeps the index locked, but for its commit, and gcPause
// how long it is free then: longer than other processes sleep before they look again.
const (
	gcStep  = 20 * time.Millisecond
	gcPause = 2 * busyPoll
)

// A gcSweep deletes what a mark has found dead, in steps.
type gcSweep struct {
	*gcGraph
	todo    []int32                // what is left, each manifest before what it needs or refers to
	freed   int                    // how many of todo the steps without rows have looked at
	gone    map[digest.Digest]bool // files that this collection has deleted
	revived map[digest.Digest]bool // what was in use again by its turn
}

// sweep deletes the orphans, step by step.
//
// On a full disk a step can fail with [ErrNoSpace], when it displaces or when it commits. Its files are gone then, and
// the next attempt has more space. If not even one is, the first to go is what dead processes have left in tmp/,
// and then a few files at a time without their rows, until a whole step succeeds again.
func (g *gcGraph) sweep(ctx context.Context) error {
	s := &gcSweep{gcGraph: g, todo: g.orphans(), gone: map[digest.Digest]bool{}, revived: map[digest.Digest]bool{}}
	sweptTmp := false
	for len(s.todo) > 0 {
		before := len(s.gone)
		n, err := s.step(ctx, s.todo, true)
		if errors.Is(err, ErrNoSpace) && len(s.gone) == before {
			switch {
			case !sweptTmp:
				sweptTmp = true
				err = g.registry.sweepTmp(ctx, &g.opts)
			case s.freed == len(s.todo):
				return nil // rows without files do no harm, and the next collection deletes them
			default:
				var looked int
				looked, err = s.step(ctx, s.todo[s.freed:], false)
				s.freed += looked
			}
		} else if errors.Is(err, ErrNoSpace) {
			err = nil
		}
		if err != nil {
			return err
		}
		s.todo, s.freed = s.todo[n:], max(0, s.freed-n)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(gcPause):
		}
	}
	return nil
}

// gcRoom is how much a step without rows frees: enough to displace a commit, and for a few rows.
const gcRoom = 64 << 10

// step deletes as many of todo, in order, as fit into one short transaction, and returns their number.
//
// The files go first, and with rows their rows follow: then a killed collector leaves rows without files, which publish
// and Tag don't trust, never the reverse. Before the first file, a commit that nobody has seen
// is displaced: it could point at what is about to go. Without rows nothing is written to the index, so that a
// step needs no space. That is safe only where the log has no room for such a commit. No directory is synced:
// a file that comes back after a power cut is an orphan again.
func (s *gcSweep) step(ctx context.Context, todo []int32, rows bool) (n int, err error) {
	var done Count
	var large []string // files whose space is freed later, with the index unlocked
	err = s.registry.writeAlone(ctx, func(tx *indexTx) error {
		prepared := false
		var room int64
		up := s.climb(context.Background(), tx)
		if v, err := meta(tx, metaUnreconciled); err != nil || v != "" {
			return errors.Join(err, ErrUnsafe)
		}
		for start := time.Now(); n < len(todo) && (n == 0 || time.Since(start) < gcStep && (rows || room < gcRoom)); n++ {
			node := &s.nodes[todo[n]]
			ok, err := s.deletable(tx, node, up, rows)
			if err != nil {
				return err
			}
			if n == 0 {
				start = time.Now() // or a large lineage would be looked at again for each of its manifests
			}
			if !ok {
				s.revived[node.digest] = true
				continue
			}
			delete(s.revived, node.digest)
			if !prepared {
				if rows {
					err = tx.displace()
				} else {
					err = s.nothingUnseen(tx)
				}
				if err != nil {
					return err
				}
				prepared = true
			}
			if !s.gone[node.digest] {
				moved, err := s.registry.blobs.unname(node.digest, node.size)
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				if moved != "" {
					large = append(large, moved)
				}
				if s.gone[node.digest] = true; err == nil || !node.file {
					done.add(node.count())
				}
				room += max(node.size, 1<<12)
			}
			if rows && node.row {
				if err := tx.delete(node.digest); err != nil {
					return err
				}
			}
		}
		return nil
	})
	for _, name := range large {
		err = errors.Join(err, ignoreNotExist(s.registry.root.Remove(name)))
	}
	s.report.Deleted.Manifests += done.Manifests
	s.report.Deleted.Blobs += done.Blobs
	s.report.Deleted.Bytes += done.Bytes
	s.report.Revived = len(s.revived)
	if err != nil {
		n = 0
	}
	return n, err
}

// nothingUnseen fails unless no commit can be there that nobody has seen. Such a commit lies in the log's file
// behind all that the others know of it, and has at least one page.
func (s *gcSweep) nothingUnseen(tx *indexTx) error {
	free, err := s.registry.index.nextFrame(tx)
	if err != nil {
		return err
	}
	fi, err := s.registry.root.Lstat(indexFile + "-wal")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && fi.Size() >= free {
		err = fmt.Errorf("%w: a commit that nobody has seen may need what would be deleted, and can't be displaced", ErrNoSpace)
	}
	return err
}

// deletable looks again, in the transaction, whether a node that was dead still
// is. By its turn all dead manifests that point at it are gone, so any that is
// there counts: also one that came back. A node without a file is needed or dead, never kept: see climb.
func (s *gcSweep) deletable(tx *indexTx, n *gcNode, up *climb, rows bool) (bool, error) {
	fi, err := s.registry.root.Lstat(blobPath(n.digest))
	there := err == nil
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case s.gone[n.digest] || s.opts.young(fi.ModTime(), s.began):
		return false, nil // written again since
	}
	if used, err := hasRef(tx, n.digest); used || err != nil {
		return false, err
	}
	used := false
	err = pointers(up.ctx, tx, n.digest, there, func(manifest digest.Digest) error {
		used = true
		if s.gone[manifest] && !rows { // on a full disk its rows are left; without its file it is dead all the same
			if there, err := s.registry.blobs.present(manifest); !there || err != nil {
				used = false
				return err
			}
		}
		return errStop
	})
	if err != nil || used || !s.opts.KeepReferrers || !there {
		return !used && err == nil, err
	}
	subject, err := subjectOf(tx, n.digest)
	if err != nil || subject == "" {
		return err == nil, err
	}
	used, err = up.led(subject)
	return !used, err
}

// climb goes up from what may be kept, by all the ways by which the collection keeps things.
func (g *gcGraph) climb(ctx context.Context, q queryer) *climb {
	return &climb{ctx: ctx, q: q, ways: ways{subjects: true, referrers: g.opts.KeepReferrers}, protected: g.opts.Protect, present: g.registry.blobs.present}
}

// sweepTmp removes what dead processes have left below tmp/, and of the interrupted
// pulls and quarantined files what is older than the grace.
func (r *LocalRegistry) sweepTmp(ctx context.Context, opts *GCOptions) error {
	if err := r.blobs.sweep(); err != nil {
		return err
	}
	began := time.Now()
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
