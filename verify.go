package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
)

// VerifyOptions govern [LocalRegistry.Verify]. Nil is the zero value.
type VerifyOptions struct {
	// Quick compares sizes, and reads no blobs except manifests.
	Quick bool
	// After, if not empty, continues a verification after that digest: the last one that Progress
	// reported as done.
	After digest.Digest
	// Progress, if not nil, is called with the state of the verification. Items are digests of
	// files and of rows. They are done in the order of their digests. All problems of an item are
	// yielded before it is reported as done. With Quick, bytes are not counted.
	Progress func(Progress)
}

// ProblemKind is the kind of a problem that [LocalRegistry.Verify] finds.
type ProblemKind string

const (
	// ProblemIndex: SQLite finds the index damaged, or rows that point at nothing.
	ProblemIndex ProblemKind = "index is damaged"
	// ProblemUnreconciled: the index is new or empty beside blobs. See [GCReport] and
	// [LocalRegistry.Repair].
	ProblemUnreconciled ProblemKind = "index is not reconciled"
	// ProblemRef: a ref points at a manifest that the index does not have or describes differently.
	// Or the name of the ref is invalid; then Problem.Reference is zero.
	ProblemRef ProblemKind = "ref is dangling"
	// ProblemMissing: the index has a blob that blobs/ does not have and that a ref leads to.
	ProblemMissing ProblemKind = "blob is missing"
	// ProblemCollected: the index has a blob that blobs/ does not have and that no ref needs. The
	// subject of an artifact is not needed by it. An interrupted collection leaves such rows, and
	// the next one deletes them.
	ProblemCollected ProblemKind = "row of a collected blob"
	// ProblemSize: a file has another size than the index says. If there is no ProblemDigest for
	// the same digest, the index is wrong.
	ProblemSize ProblemKind = "blob has another size"
	// ProblemDigest: a file's bytes do not hash to its name.
	ProblemDigest ProblemKind = "blob is damaged"
	// ProblemUnreadable: a file cannot be read. It may be good.
	ProblemUnreadable ProblemKind = "blob is unreadable"
	// ProblemMode: a file's permissions are not 0444.
	ProblemMode ProblemKind = "blob has other permissions"
	// ProblemManifest: a manifest's bytes are not a valid manifest.
	ProblemManifest ProblemKind = "manifest is invalid"
	// ProblemRows: the index contradicts a manifest's bytes.
	ProblemRows ProblemKind = "index contradicts manifest"
	// ProblemUnrecorded: a blob that the index does not know. A call that is running may be about
	// to publish it, or a killed process has left it. GC deletes it.
	ProblemUnrecorded ProblemKind = "blob is unrecorded"
	// ProblemForeign: an entry of blobs/ that is not a blob.
	ProblemForeign ProblemKind = "entry is not a blob"
)

// A Problem is one finding of [LocalRegistry.Verify].
type Problem struct {
	Kind      ProblemKind
	Digest    digest.Digest // the blob, or the manifest that a ref points at
	Reference Reference     // of a ref
	Path      string        // below the root, of a foreign entry
	Err       error         // details; never nil
}

// String describes the problem in one line.
func (p Problem) String() string {
	about := string(p.Digest)
	if !p.Reference.IsZero() {
		about = p.Reference.String()
	}
	if p.Path != "" {
		about = p.Path
	}
	return fmt.Sprintf("%s: %s: %v", p.Kind, printable(about), p.Err)
}

// Verify compares the index with blobs/, and every file with its digest. It yields every problem:
// first those of the index, then those of blobs in the order of their digests, so that a
// verification can be continued. It reads several files at once, uses about 100 bytes of memory for
// each blob, and changes nothing.
//
// Other processes may write meanwhile. A blob that is being published may be reported as
// [ProblemUnrecorded]. On a read-only registry, a collection in progress may be reported as
// [ProblemMissing], [ProblemCollected] or [ProblemRows].
//
// An error is yielded once, at the end. It is an error from ctx, the index or the file system, or a
// condition of the process, such as too many open files. None of these is ever reported as damage.
func (r *LocalRegistry) Verify(ctx context.Context, opts *VerifyOptions) iter.Seq2[Problem, error] {
	v := &verification{registry: r, times: 1}
	if opts != nil {
		v.opts = *opts
	}
	return func(yield func(Problem, error) bool) {
		end, err := r.begin(ctx)
		if err == nil {
			defer end()
			if v.opts.Progress != nil {
				v.reports = newProgressQueue(v.opts.Progress)
				v.meter = newMeter(v.reports.put, Reference{})
			}
			err = v.run(ctx, func(p Problem) error {
				if !yield(p, nil) {
					return errStop
				}
				return nil
			})
		}
		if err == nil {
			v.meter.finish()
			v.reports.deliver()
		}
		if err != nil && !errors.Is(err, errStop) {
			yield(Problem{}, opError("verify", "", "", err))
		}
	}
}

// A verification is one run of Verify or one of the two runs of a repair:
//
//	index    integrity of the database, refs that dangle                one goroutine
//	files    digests in blobs/, sorted
//	entries  files and rows, merged in the order of digests  ─┐
//	blob     check one entry                                  ├ order: to the caller
//	                                                          └ work: to one worker per processor
//	run      take the results in order, and yield them
//
// Each entry goes to order before it goes to work. order is bounded: if the caller is slow, entries
// waits, and so do the workers. So the memory for results is bounded too.
type verification struct {
	registry *LocalRegistry
	opts     VerifyOptions
	meter    *meter
	reports  *progressQueue // of meter; nil if another goroutine delivers them
	times    int            // verifications that are still to come, this one included, for the totals
}

// A verifyEntry is a digest of the index or of blobs/, on its way to a worker and back. problems
// has room for one result, so a worker never waits for the caller. item and err are written before
// the result is sent and read after it, which makes them safe without a lock.
type verifyEntry struct {
	checkedBlob
	problems chan []Problem
	item     *meteredItem // nil without a meter. Read after problems
	err      error        // of the index or the process; ends the verification. Read after problems
}

// run verifies everything and calls found with each problem, on its own goroutine. An error of
// found ends it. The deferred calls end the workers before run returns: cancel first, then wait, so
// none reads files after the registry is closed.
func (v *verification) run(ctx context.Context, found func(Problem) error) error {
	v.meter.phase(PhasePlan)
	v.reports.deliver()
	if v.opts.After == "" {
		if err := v.index(ctx, found); err != nil {
			return err
		}
	}
	files, err := v.files(ctx, found)
	if err != nil {
		return err
	}
	v.meter.planned(PhaseBlobs)
	// Workers check entries in any order. The loop below takes the results in the entries' order.
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	work := make(chan *verifyEntry)
	order := make(chan *verifyEntry, 4*runtime.GOMAXPROCS(0))
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for e := range work {
				e.problems <- v.blob(ctx, e)
			}
		})
	}
	var failed error // of entries; read once order is closed
	wg.Go(func() {
		defer close(work)
		defer close(order)
		failed = v.entries(ctx, files, func(row checkedBlob) error {
			e := &verifyEntry{checkedBlob: row, problems: make(chan []Problem, 1)}
			for _, to := range []chan<- *verifyEntry{order, work} {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case to <- e:
				}
			}
			return nil
		})
	})
	for e := range order {
		problems, err := v.result(ctx, e)
		if err != nil {
			return err
		}
		for _, p := range problems {
			if err := found(p); err != nil {
				return err
			}
		}
		e.item.end()
		v.reports.deliver()
	}
	return cmp.Or(ctx.Err(), failed)
}

// result waits for the problems of an entry. Meanwhile it delivers reports of progress, since the
// caller's functions must run on this goroutine.
func (v *verification) result(ctx context.Context, e *verifyEntry) ([]Problem, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-v.reports.news():
			v.reports.deliver()
		case problems := <-e.problems:
			return problems, cmp.Or(ctx.Err(), e.err) // the problems may follow from e.err
		}
	}
}

// index finds the problems that do not concern a single blob. A verification that is continued
// skips it, since the first one has yielded them.
func (v *verification) index(ctx context.Context, found func(Problem) error) error {
	x := v.registry.index
	var bad []string
	if err := x.integrity(ctx, v.opts.Quick, func(text string) { bad = append(bad, text) }); err != nil {
		return err
	}
	for _, text := range bad {
		if err := found(Problem{Kind: ProblemIndex, Err: fmt.Errorf("%w: %s", ErrCorruptIndex, printable(text))}); err != nil {
			return err
		}
	}
	unreconciled, err := v.registry.unreconciled(ctx)
	if err != nil {
		return err
	}
	if unreconciled {
		if err := found(Problem{Kind: ProblemUnreconciled, Err: ErrUnsafe}); err != nil {
			return err
		}
	}
	return x.badRefs(ctx, func(ref Reference, d digest.Digest, err error) error {
		return found(Problem{Kind: ProblemRef, Digest: d, Reference: ref, Err: err})
	})
}

// files returns the digests of blobs/, sorted, and finds the entries that are not blobs.
func (v *verification) files(ctx context.Context, found func(Problem) error) (files []digest.Digest, err error) {
	bytes := int64(0)
	err = v.registry.blobs.walk(ctx, func(e blobEntry) error {
		switch {
		case e.digest > v.opts.After:
			files = append(files, e.digest)
			bytes += v.counted(e.info.Size())
		case e.digest == "" && v.opts.After == "":
			return found(Problem{Kind: ProblemForeign, Path: e.path, Err: errors.New("its name or kind is not that of a blob")})
		}
		return nil
	})
	slices.Sort(files)
	v.meter.left(v.times*len(files), int64(v.times)*bytes)
	return files, err
}

// counted returns the number of bytes that the progress counts for a file of this size. A quick
// verification reads almost none.
func (v *verification) counted(size int64) int64 {
	if v.opts.Quick {
		return 0
	}
	return size
}

// entries visits the digests of the index and of blobs/, in order, each once. It merges two sorted
// lists: files, and the rows, which it reads in pages. A file without a row is visited with a
// checkedBlob that is not recorded.
func (v *verification) entries(ctx context.Context, files []digest.Digest, visit func(checkedBlob) error) error {
	unrecorded := func(below digest.Digest) error { // "" for all
		for len(files) > 0 && (below == "" || files[0] < below) {
			if err := visit(checkedBlob{digest: files[0]}); err != nil {
				return err
			}
			files = files[1:]
		}
		return nil
	}
	err := v.registry.index.blobsAfter(ctx, v.opts.After, func(row checkedBlob) error {
		if err := unrecorded(row.digest); err != nil {
			return err
		}
		if len(files) > 0 && files[0] == row.digest {
			files = files[1:]
		}
		return visit(row)
	})
	if err != nil {
		return err
	}
	return unrecorded("")
}
