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
	// After, if not empty, continues after that digest: that of the last item that Progress
	// reported as done.
	After digest.Digest
	// Progress, if not nil, is called with how far the verification is. Items are digests of files
	// and of rows. They are done in the order of their digests, and then all their problems have
	// been yielded. With Quick, bytes are not counted.
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
	// ProblemRef: a ref points at a manifest that the index does not have, or describes it
	// otherwise. Or its name is invalid; then Problem.Reference is zero.
	ProblemRef ProblemKind = "ref is dangling"
	// ProblemMissing: the index has a blob that blobs/ does not have and that a ref leads to.
	ProblemMissing ProblemKind = "blob is missing"
	// ProblemCollected: the index has a blob that blobs/ does not have and that no ref needs. An
	// interrupted collection leaves such rows, and the next one deletes them. A subject is not
	// needed either.
	ProblemCollected ProblemKind = "row of a collected blob"
	// ProblemSize: a file has another size than the index says. Without a ProblemDigest for the
	// same digest, the index is wrong.
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
	// ProblemUnrecorded: a blob that the index does not know. It may be work in flight, or the rest
	// of a killed process. GC deletes it.
	ProblemUnrecorded ProblemKind = "blob is unrecorded"
	// ProblemForeign: an entry of blobs/ that is not a blob.
	ProblemForeign ProblemKind = "entry is no blob"
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
// verification can be continued. It reads several files at once, holds about 100 bytes for each
// blob, and changes nothing.
//
// Others may write meanwhile. Work in flight may show as [ProblemUnrecorded]. On a read-only
// registry, a collection may show as [ProblemMissing], [ProblemCollected] or [ProblemRows].
//
// An error is yielded once, at the end. It is of ctx, the index or the file system, or a condition
// of the process, such as too many open files. None of these is ever reported as damage.
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

type verification struct {
	registry *LocalRegistry
	opts     VerifyOptions
	meter    *meter
	reports  *progressQueue // of meter; nil if another goroutine delivers them
	times    int            // that everything will be checked, this time included
}

// A verifyEntry is a digest of the index or of blobs/, on its way to a worker and back.
type verifyEntry struct {
	checkedBlob
	problems chan []Problem
	item     *meteredItem // nil without a meter. Read after problems
	err      error        // of the index or the process; ends the verification. Read after problems
}

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

// result waits for the problems of an entry, and delivers reports meanwhile.
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

// index looks for problems that do not concern a single blob.
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
			return found(Problem{Kind: ProblemForeign, Path: e.path, Err: errors.New("its name or kind is not a blob's")})
		}
		return nil
	})
	slices.Sort(files)
	v.meter.left(v.times*len(files), int64(v.times)*bytes)
	return files, err
}

// counted returns how many bytes of a file of this size are counted.
func (v *verification) counted(size int64) int64 {
	if v.opts.Quick {
		return 0
	}
	return size
}

// entries visits the digests of the index and of blobs/, in order.
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
