package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A collection deletes in steps. Each step is one short write transaction, alone in its commit,
// with pauses in between in which other processes write:
//
//	lock the index → is this node still dead? → displace → unlink files → delete rows → commit
//
// The mark decided without the lock whether a node is dead, and other processes have written since.
// So the step checks again. The lock keeps the answer true: every publish checks its blobs and
// writes its rows under the same lock. A publisher that finds its blob deleted puts it back from
// tmp/ (see stage) or fails.
//
// Files go before rows. A collector that is killed in between leaves rows without files. No publish
// and no Tag relies on such rows, and the next collection deletes them. The reverse order would
// need space for the log before it frees any. No directory is synced: a file that comes back after
// a power cut is an orphan again.
//
// One commit can be hidden from the step: its process died after the bytes reached SQLite's log and
// before other processes could see them. The commit would come back when the log is read again, and
// could need a file that the step deletes. Displacing overwrites it with a frame of the step: see
// indexTx.displace. That happens before the first file goes.
//
// On a full disk a step fails with [ErrNoSpace], when it displaces or when it commits:
//
//   - If some files are gone by then, the next attempt has more space.
//   - If not, the sweep removes old files below tmp/ and tries again.
//   - Then it takes a step without rows. This step writes nothing to the index, deletes files until
//     gcRoom is free, and leaves their rows to the steps after it.
//
// A step without rows cannot displace. It need not, if the log's file ends before the frame that
// would be written next: then no commit is hidden there. If the file is longer, a step with rows
// can displace: it overwrites that frame, which needs no space on file systems that overwrite in
// place. On other file systems the collection ends with [ErrNoSpace].

// gcStep is how long a step keeps the index locked, without its commit. gcPause is how long the
// index is free after that. It is longer than the time for which other processes sleep before they
// try again, so each of them gets a turn.
const (
	gcStep  = 20 * time.Millisecond
	gcPause = 2 * busyPoll
)

// gcHolds is the number of manifests whose holds are removed in one transaction.
const gcHolds = 100

// gcRoom is the number of bytes that a step without rows frees: enough to displace a commit and to
// delete some rows. After the disk was full, a step with rows must free as much too, before it may
// end because of its time. Otherwise a slow machine could delete one small file in each step, and
// the commit would need more space than that.
const gcRoom = 64 << 10

// A gcSweep deletes the nodes that a mark has found dead.
type gcSweep struct {
	*gcGraph
	todo    []int32                // nodes that are left, each manifest before its needs and its subject
	freed   int                    // how many of todo the steps without rows have gone through
	full    bool                   // a step has failed for lack of space
	gone    map[digest.Digest]bool // files that this collection has deleted
	revived map[digest.Digest]bool // nodes that were in use again at their turn
	// referred nodes are deleted although something refers to them: see collectOne.
	referred bool
}

// sweep deletes the orphans, step by step. After a step that failed on a full disk, its nodes are
// still in todo: n is 0 then, and s.gone has the files that are deleted already.
func (g *gcGraph) sweep(ctx context.Context) error {
	s := &gcSweep{gcGraph: g, todo: g.orphans(), gone: map[digest.Digest]bool{}, revived: map[digest.Digest]bool{}}
	s.plan()
	if err := s.dropHolds(ctx); err != nil {
		return err
	}
	sweptTmp := false
	for len(s.todo) > 0 {
		before := len(s.gone)
		n, err := s.step(ctx, s.todo, true)
		full := errors.Is(err, ErrNoSpace)
		s.full = s.full || full
		switch {
		case full && len(s.gone) > before:
			err = nil // there is more space now
		case full && !sweptTmp:
			sweptTmp = true
			err = g.registry.sweepTmp(ctx, &g.opts)
		case full && s.freed < len(s.todo):
			var looked int
			looked, err = s.step(ctx, s.todo[s.freed:], false)
			s.freed += looked
		case full:
			return nil // only rows are left, and the next collection deletes them
		}
		if err != nil {
			return err
		}
		s.tell(s.todo[:n])
		s.todo, s.freed = s.todo[n:], max(0, s.freed-n)
		if len(s.todo) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(gcPause):
		}
	}
	return nil
}

// plan counts the orphans for the totals of the progress.
func (s *gcSweep) plan() {
	for _, i := range s.todo {
		s.meter.plan(1, s.nodes[i].descriptor().Size)
	}
	s.meter.planned(PhaseDelete)
}

// tell reports the nodes of a step to the meter. It is called outside of the transaction, because
// it runs the caller's Progress function, which may take long or use the registry.
func (s *gcSweep) tell(nodes []int32) {
	for _, i := range nodes {
		desc := s.nodes[i].descriptor()
		if s.revived[desc.Digest] {
			s.meter.skip(desc)
		} else {
			s.meter.done(desc)
		}
	}
}

// dropHolds removes the rows of expired holds, for manifests that nothing else keeps. If something
// else keeps the manifest, such as the subject of a signature, the row stays, because the
// repository shows the manifest by it. dropHolds runs before the first step, which would otherwise
// see the hold and keep the manifest. On a full disk no hold is removed, and such manifests stay
// until the next collection.
func (s *gcSweep) dropHolds(ctx context.Context) error {
	var expired []digest.Digest
	for _, i := range s.todo {
		if n := &s.nodes[i]; n.expired {
			expired = append(expired, n.digest)
		}
	}
	for page := range slices.Chunk(expired, gcHolds) {
		err := s.registry.writeAlone(ctx, func(tx *indexTx) error {
			up := s.climb(context.Background(), tx)
			for _, d := range page {
				if led, err := up.led(d); led || err != nil {
					if err != nil {
						return err
					}
					continue
				}
				if err := tx.expireHolds(d, s.heldSince); err != nil {
					return err
				}
			}
			return nil
		})
		if errors.Is(err, ErrNoSpace) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// step deletes nodes of todo, in order, for as long as one short transaction may take, and returns
// their number. Without rows it deletes files only.
//
// After an error the transaction is rolled back, and n is 0: the rows are back, but deleted files
// are not. They stay in s.gone, and a later step deletes their rows. Large files are only moved
// while the index is locked, because freeing one can take a file system long. They are removed
// after the commit.
func (s *gcSweep) step(ctx context.Context, todo []int32, rows bool) (n int, err error) {
	var done Count
	var large []string // moved files whose space is freed once the index is unlocked
	err = s.registry.writeAlone(ctx, func(tx *indexTx) error {
		if v, err := meta(tx, metaUnreconciled); err != nil || v != "" {
			return errors.Join(err, ErrUnsafe)
		}
		up := s.climb(context.Background(), tx)
		prepared := false
		room := int64(0)
		for start := time.Now(); n < len(todo); n++ {
			tight := s.full && room < gcRoom // the commit needs this space
			if late := s.opts.late(start); n > 0 && (late && !tight || !rows && room >= gcRoom) {
				break
			}
			node := &s.nodes[todo[n]]
			dead, err := s.stillDead(tx, node, up, rows)
			if err != nil {
				return err
			}
			if n == 0 {
				// The first check may climb a large lineage. Its time does not count: the step then
				// uses the answer for more than one node.
				start = time.Now()
			}
			if !dead {
				s.revived[node.digest] = true
				continue
			}
			delete(s.revived, node.digest)
			if !prepared {
				if err := s.prepare(tx, rows); err != nil {
					return err
				}
				prepared = true
			}
			if !s.gone[node.digest] {
				moved, err := s.unlink(node, &done)
				if err != nil {
					return err
				}
				if moved != "" {
					large = append(large, moved)
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

// collectOne deletes a manifest if nothing needs it, even if its subject is kept or something refers
// to it. It does not delete the blobs that the manifest needs: the next collection does.
// [Repository.DeleteManifest] calls it for referrers. The graph has this one node, so one step is
// enough, and no mark is needed: the step itself checks that the manifest is dead.
func (r *LocalRegistry) collectOne(ctx context.Context, desc ocispec.Descriptor) error {
	g := &gcGraph{registry: r, opts: GCOptions{Grace: NoGrace, DropReferrers: true}, began: time.Now()}
	g.heldSince = g.opts.heldBefore(g.began)
	g.nodes = []gcNode{{digest: desc.Digest, size: desc.Size, manifest: true, row: true, file: true, subject: -1}}
	s := &gcSweep{gcGraph: g, gone: map[digest.Digest]bool{}, revived: map[digest.Digest]bool{}, referred: true}
	_, err := s.step(ctx, []int32{0}, true)
	return err
}

// prepare makes sure, before the first file goes, that no hidden commit can come back that needs
// it. A step with rows displaces such a commit. A step without rows only checks that there is none.
func (s *gcSweep) prepare(tx *indexTx, rows bool) error {
	if rows {
		return tx.displace()
	}
	end, err := s.registry.index.nextFrame(tx)
	if err != nil {
		return err
	}
	fi, err := s.registry.root.Lstat(indexFile + "-wal")
	if err == nil && fi.Size() >= end {
		err = fmt.Errorf("%w: a hidden commit in SQLite's log may need the files to delete, and cannot be displaced", ErrNoSpace)
	}
	return ignoreNotExist(err)
}

// unlink removes a node's file and counts it. A large file is only moved, to the returned name. A
// file that is missing now was removed by another collector, which has counted it. A node that had
// no file before is counted by its row.
func (s *gcSweep) unlink(n *gcNode, done *Count) (moved string, err error) {
	moved, err = s.registry.blobs.unname(n.digest, n.size)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if s.gone[n.digest] = true; err == nil || !n.file {
		done.add(n.count())
	}
	return moved, nil
}

// stillDead checks again, in the transaction, whether a dead node is still dead. It is not if:
//
//   - its file was written since the mark, or is young. A publisher that reuses an old blob gives
//     its file a new time: see stage.refresh
//   - a ref or a hold points at it
//   - a manifest points at it. All dead manifests that did are gone by its turn: see orphans. After
//     a step without rows, the rows of such manifests are still there, and do not count
//   - it is a referrer whose subject is kept
//
// A node without a file cannot be kept only by its subject or its referrers: see climb.
func (s *gcSweep) stillDead(tx *indexTx, n *gcNode, up *climb, rows bool) (bool, error) {
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
	err = pointers(up.ctx, tx, n.digest, there && !s.referred, func(manifest digest.Digest) error {
		if s.gone[manifest] && !rows {
			if there, err := s.registry.blobs.present(manifest); !there || err != nil {
				return err
			}
		}
		used = true
		return errStop
	})
	if err != nil || used || s.opts.DropReferrers || !there {
		return !used && err == nil, err
	}
	subject, err := subjectOf(tx, n.digest)
	if err != nil || subject == "" {
		return err == nil, err
	}
	used, err = up.led(subject)
	return !used, err
}

// climb returns a climb along all relations by which this collection keeps content.
func (g *gcGraph) climb(ctx context.Context, q queryer) *climb {
	return &climb{ctx: ctx, q: q, ways: ways{subjects: true, referrers: !g.opts.DropReferrers, heldSince: g.heldSince},
		protected: g.opts.Protect, present: g.registry.blobs.present}
}
