package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
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
	// Protect are manifests or blobs to keep as if a ref pointed at them.
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

	// Missing are blobs and manifests that a root needs and that are not there.
	Missing []digest.Digest
	// Invalid are manifests under a root that can't be read, or contradict the
	// index. As long as there is one, nothing is deleted.
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
	case len(g.report.Invalid) > 0:
		first := g.report.Invalid[0]
		return fmt.Errorf("%w: %d manifests that are needed can't be relied on, such as %s: %w", ErrUnsafe, len(g.report.Invalid), first.Digest, first.Err)
	}
	for _, d := range g.report.Missing {
		if i := g.ids[d]; g.nodes[i].manifest {
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
		if e.digest == "" || e.info.Size() > MaxManifestSize || e.info.ModTime().After(old) || !r.looksLikeManifest(e.digest) {
			return nil
		}
		m, err := r.readVerified(ctx, ocispec.Descriptor{Digest: e.digest, Size: -1})
		if err != nil {
			return ctx.Err()
		}
		for _, c := range m.children() {
			if r.blobs.checkSize(c.Digest, c.Size) != nil {
				return nil
			}
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

// sweep deletes the orphans, step by step.
func (g *gcGraph) sweep(ctx context.Context) error {
	todo := g.orphans()
	gone := make(map[digest.Digest]bool, len(todo))
	var late []int32 // whose rows could not be deleted, on a full disk
	for len(todo) > 0 {
		n, err := g.step(ctx, todo, gone, len(late) == 0)
		if errors.Is(err, ErrNoSpace) && len(late) == 0 {
			late = todo // files only, from here on
			continue
		}
		if err != nil {
			return err
		}
		if todo = todo[n:]; len(todo) > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(gcPause):
			}
		}
	}
	for len(late) > 0 {
		n, err := g.step(ctx, late, gone, true)
		if errors.Is(err, ErrNoSpace) {
			return nil // still full; rows without files do no harm, and the next collection deletes them
		}
		if err != nil {
			return err
		}
		late = late[n:]
	}
	return nil
}

// step deletes as many of todo, in order, as fit into one short transaction, and
// returns their number. The files go first: then a killed collector leaves
// rows without files, which publish and Tag don't trust, never the reverse; and a full
// disk has space again. Before the first file, a commit that nobody has seen is
// displaced: it could point at what is about to go. No directory is synced: a file that comes back after a power cut is an orphan again.
func (g *gcGraph) step(ctx context.Context, todo []int32, gone map[digest.Digest]bool, rows bool) (n int, err error) {
	var done Count
	revived := 0
	var large []string // files whose space is freed later, with the index unlocked
	err = g.registry.writeAlone(ctx, func(tx *indexTx) error {
		n, done, revived = 0, Count{}, 0
		displaced := false
		known := map[digest.Digest]bool{}
		if v, err := meta(tx, metaUnreconciled); err != nil || v != "" {
			return errors.Join(err, ErrUnsafe)
		}
		for start := time.Now(); n < len(todo) && (n == 0 || time.Since(start) < gcStep); n++ {
			node := &g.nodes[todo[n]]
			ok, err := g.deletable(tx, node, gone, known, rows)
			if err != nil {
				return err
			}
			if n == 0 {
				start = time.Now() // or a large lineage would be looked at again for each of its manifests
			}
			if !ok {
				revived++
				continue
			}
			if rows && !displaced { // on a full disk it can't be done, but the files must go
				if err := tx.displace(); err != nil {
					return err
				}
				displaced = true
			}
			if !gone[node.digest] {
				moved, err := g.registry.blobs.unname(node.digest, node.size)
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				if moved != "" {
					large = append(large, moved)
				}
				if gone[node.digest] = true; err == nil || !node.file {
					done.add(node.count())
				}
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
		err = errors.Join(err, ignoreNotExist(g.registry.root.Remove(name)))
	}
	g.report.Deleted.Manifests += done.Manifests
	g.report.Deleted.Blobs += done.Blobs
	g.report.Deleted.Bytes += done.Bytes
	g.report.Revived += revived
	return n, err
}

// deletable looks again, in the transaction, whether a node that was dead still
// is. By its turn all dead manifests that point at it are gone, so any that is
// there counts: also one that came back. known is what reachable found in this transaction.
func (g *gcGraph) deletable(tx *indexTx, n *gcNode, gone, known map[digest.Digest]bool, rows bool) (bool, error) {
	fi, err := g.registry.root.Lstat(blobPath(n.digest))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case gone[n.digest] || g.opts.young(fi.ModTime(), g.began):
		return false, nil // written again since
	}
	if used, err := hasRef(tx, n.digest); used || err != nil {
		return false, err
	}
	used := false
	err = pointers(context.Background(), tx, n.digest, func(manifest digest.Digest) error {
		used = true
		if gone[manifest] && !rows { // on a full disk its rows are left; without its file it is dead all the same
			switch _, err := g.registry.root.Lstat(blobPath(manifest)); {
			case errors.Is(err, fs.ErrNotExist):
				used = false
				return nil
			case err != nil:
				return err
			}
		}
		return errStop
	})
	if err != nil || used || !g.opts.KeepReferrers {
		return !used && err == nil, err
	}
	subject, err := subjectOf(tx, n.digest)
	if err != nil || subject == "" {
		return err == nil, err
	}
	used, err = g.reachable(tx, subject, known)
	return !used, err
}

// reachable looks whether a root leads to d, by going from d to what leads to it. If
// none does, none leads to any of these either. known, if not nil, holds all answers of a transaction.
func (g *gcGraph) reachable(q queryer, d digest.Digest, known map[digest.Digest]bool) (live bool, err error) {
	if live, ok := known[d]; ok {
		return live, nil
	}
	var seen []digest.Digest
	err = leading(q, d, g.opts.KeepReferrers, func(d digest.Digest, ref bool) error {
		if live = ref || slices.Contains(g.opts.Protect, d); live {
			return errStop
		}
		seen = append(seen, d)
		return nil
	})
	if err != nil || known == nil {
		return live, err
	}
	if live {
		seen = []digest.Digest{d}
	}
	for _, d := range seen {
		known[d] = live
	}
	return live, nil
}

// sweepTmp removes what dead processes have left below tmp/, and of the interrupted
// pulls and quarantined files what is older than the grace.
func (r *LocalRegistry) sweepTmp(ctx context.Context, opts *GCOptions) error {
	if err := r.blobs.sweep(); err != nil {
		return err
	}
	began := time.Now()
	for _, dir := range []string{partialDir, quarantineDir} {
		dir = path.Join(tmpDir, dir)
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
			return r.blobs.sweepEntry(name, fi)
		})
		if err != nil {
			return err
		}
	}
	for _, dir := range []string{partialDir, quarantineDir} {
		r.root.Remove(path.Join(tmpDir, dir)) // fails while something is there
	}
	return nil
}
