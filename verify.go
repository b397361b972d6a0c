package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"runtime"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
)

// VerifyOptions govern [LocalRegistry.Verify]. Nil is the zero value.
type VerifyOptions struct {
	// Quick compares sizes only, and reads no blob but manifests.
	Quick bool
	// After goes on behind that digest: the last one that Progress told of.
	After digest.Digest
	// Progress, if not nil, is called after each digest, by one goroutine at a time.
	Progress func(VerifyProgress)
}

// VerifyProgress tells how far a verification is.
type VerifyProgress struct {
	Digest      digest.Digest // the last one that was looked at
	Done, Total int           // digests; Total counts those of files, and grows by what is missing
	Bytes       int64         // read so far
}

// ProblemKind says what kind of problem [LocalRegistry.Verify] has found.
type ProblemKind string

const (
	// ProblemIndex: SQLite finds the index damaged, or rows that point at nothing.
	ProblemIndex ProblemKind = "index is damaged"
	// ProblemUnreconciled: the index is new or empty beside blobs: see [GCReport] and [LocalRegistry.Repair].
	ProblemUnreconciled ProblemKind = "index is not reconciled"
	// ProblemRef: a ref points at a manifest that the index doesn't have, or describes it otherwise,
	// or has a name that can't be, and then no Reference.
	ProblemRef ProblemKind = "ref is dangling"
	// ProblemMissing: the index has a blob that blobs/ doesn't.
	ProblemMissing ProblemKind = "blob is missing"
	// ProblemCollected: the index has a blob that blobs/ doesn't, and that no ref needs. A collection that was
	// interrupted leaves this, and the next one removes the row. A manifest's subject is not needed either.
	ProblemCollected ProblemKind = "row of a collected blob"
	// ProblemSize: a file has another size than the index says. Without a
	// ProblemDigest for it, it is the index that is wrong.
	ProblemSize ProblemKind = "blob has another size"
	// ProblemDigest: a file's bytes don't hash to its name.
	ProblemDigest ProblemKind = "blob is damaged"
	// ProblemUnreadable: a file can't be read.
	ProblemUnreadable ProblemKind = "blob is unreadable"
	// ProblemMode: a file's permissions aren't 0444.
	ProblemMode ProblemKind = "blob has other permissions"
	// ProblemManifest: a manifest's bytes are no manifest.
	ProblemManifest ProblemKind = "manifest is invalid"
	// ProblemRows: the index says something else of a manifest than its bytes.
	ProblemRows ProblemKind = "index contradicts manifest"
	// ProblemUnrecorded: a blob that the index doesn't know. It may belong to work
	// in flight, or be what a killed process left; GC removes it.
	ProblemUnrecorded ProblemKind = "blob is unrecorded"
	// ProblemForeign: an entry of blobs/ that is no blob.
	ProblemForeign ProblemKind = "entry is no blob"
)

// A Problem is one thing that [LocalRegistry.Verify] has found.
type Problem struct {
	Kind      ProblemKind
	Digest    digest.Digest // what it is about, or what a ref points at
	Reference Reference     // of a ref
	Path      string        // below the root, of a foreign entry
	Err       error         // what exactly; never nil
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

// Verify compares the index with blobs/ and every file with its digest, and yields
// every problem: first those of the index, then those of blobs in the order of
// their digests, so that it can be resumed. Files are read side by side. Others
// may write meanwhile: what is under way may show as [ProblemUnrecorded], and on a read-only
// registry what is being collected as [ProblemMissing] or [ProblemRows]. It changes nothing. It holds
// about 100 bytes for each blob.
//
// An error is yielded once, at the end. Errors: those of ctx, of the index and of the file system, and any
// condition of the process, such as too many open files. None of these is ever reported as damage.
func (r *LocalRegistry) Verify(ctx context.Context, opts *VerifyOptions) iter.Seq2[Problem, error] {
	v := &verification{registry: r}
	if opts != nil {
		v.opts = *opts
	}
	return func(yield func(Problem, error) bool) {
		end, err := r.begin(ctx)
		if err == nil {
			defer end()
			err = v.run(ctx, func(p Problem) error {
				if !yield(p, nil) {
					return errStop
				}
				return nil
			})
		}
		if err != nil && !errors.Is(err, errStop) {
			yield(Problem{}, opError("verify", "", "", err))
		}
	}
}

type verification struct {
	registry *LocalRegistry
	opts     VerifyOptions
}

// A verifyEntry is a digest that the index or blobs/ has.
type verifyEntry struct {
	checkedBlob // size −1 for no row
	problems    chan []Problem
	bytesRead   int64
	err         error // of the index or the process; ends the verification. Read after problems
}

func (v *verification) run(ctx context.Context, found func(Problem) error) error {
	if v.opts.After == "" {
		if err := v.index(ctx, found); err != nil {
			return err
		}
	}
	files, err := v.files(ctx, found)
	if err != nil {
		return err
	}
	// Workers look at entries in any order; the reader of results takes them in theirs.
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
	progress := VerifyProgress{Total: len(files)}
	for e := range order {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case problems := <-e.problems:
			if err := cmp.Or(ctx.Err(), e.err); err != nil {
				return err // they may be no more than that
			}
			for _, p := range problems {
				if err := found(p); err != nil {
					return err
				}
			}
		}
		progress.Done++
		progress.Total = max(progress.Total, progress.Done)
		progress.Digest = e.digest
		progress.Bytes += e.bytesRead
		if v.opts.Progress != nil {
			v.opts.Progress(progress)
		}
	}
	return cmp.Or(ctx.Err(), failed)
}

// index looks for problems that are no single blob's.
func (v *verification) index(ctx context.Context, found func(Problem) error) error {
	x := v.registry.index
	var bad []string
	if err := x.integrity(ctx, v.opts.Quick, func(text string) { bad = append(bad, text) }); err != nil {
		return err
	}
	for _, text := range bad {
		if err := found(Problem{Kind: ProblemIndex, Err: fmt.Errorf("%w: %s", ErrCorruptIndex, clip(text))}); err != nil {
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

// files returns the digests that blobs/ has, in their order, and finds what is no blob there.
func (v *verification) files(ctx context.Context, found func(Problem) error) (files []digest.Digest, err error) {
	err = v.registry.blobs.walk(ctx, func(e blobEntry) error {
		switch {
		case e.digest > v.opts.After:
			files = append(files, e.digest)
		case e.digest == "" && v.opts.After == "":
			return found(Problem{Kind: ProblemForeign, Path: e.path, Err: errors.New("its name or kind is not a blob's")})
		}
		return nil
	})
	slices.Sort(files)
	return files, err
}

// entries calls visit with what blobs/ or the index has, in the order of digests.
func (v *verification) entries(ctx context.Context, files []digest.Digest, visit func(checkedBlob) error) error {
	unrecorded := func(below digest.Digest) error { // "" for all
		for len(files) > 0 && (below == "" || files[0] < below) {
			if err := visit(checkedBlob{digest: files[0], size: -1}); err != nil {
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

// again looks, with the write lock held where that can be had, at what seems to be
// wrong: a collection, which deletes files before rows and one row after the other, is then over or not begun.
func (v *verification) again(ctx context.Context, look func(queryer) error) error {
	if v.registry.blobs.readOnly {
		return look(v.registry.index)
	}
	return v.registry.writeAlone(ctx, func(tx *indexTx) error { return look(tx) })
}

// missing looks into a blob that has no file: whether the index has it, and whether something needs it.
// A manifest without a file is not kept by its referrers or its subject: see climb.
func (v *verification) missing(ctx context.Context, d digest.Digest) (recorded, needed bool, err error) {
	if known, err := hasBlob(v.registry.index, d); !known || err != nil {
		return false, false, err
	}
	err = v.again(ctx, func(q queryer) error {
		recorded, needed = false, false
		fi, err := v.registry.root.Lstat(blobPath(d))
		if err == nil && fi.Mode().IsRegular() {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if recorded, err = hasBlob(q, d); !recorded || err != nil {
			return err
		}
		up := climb{ctx: ctx, q: q, ways: ways{subjects: true}, present: v.registry.blobs.present}
		needed, err = up.led(d)
		return err
	})
	return recorded, needed, err
}

// blob looks at one digest.
func (v *verification) blob(ctx context.Context, e *verifyEntry) (problems []Problem) {
	add := func(kind ProblemKind, err error) {
		problems = append(problems, Problem{Kind: kind, Digest: e.digest, Err: err})
	}
	r := v.registry
	if _, err := rowDigest(string(e.digest)); err != nil {
		add(ProblemIndex, fmt.Errorf("row of a blob: %w", err))
		return problems
	}
	file, err := r.root.Lstat(blobPath(e.digest))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !file.Mode().IsRegular() {
		var recorded, needed bool
		switch recorded, needed, e.err = v.missing(ctx, e.digest); {
		case e.err != nil || !recorded: // collected since
		case needed:
			add(ProblemMissing, ErrNotFound)
		default:
			add(ProblemCollected, errors.New("no ref needs it, and its file is not there"))
		}
		return problems
	}
	if processCondition(err) {
		e.err = err
		return problems
	}
	if err != nil {
		add(ProblemUnreadable, err)
		return problems
	}
	if e.size < 0 {
		add(ProblemUnrecorded, errors.New("the index doesn't know it"))
	}
	if file.Mode().Perm() != 0o444 && runtime.GOOS != "windows" {
		add(ProblemMode, fmt.Errorf("mode is %v", file.Mode()))
	}
	if e.size >= 0 && file.Size() != e.size {
		add(ProblemSize, fmt.Errorf("%w: file has %d bytes, the index says %d", ErrSizeMismatch, file.Size(), e.size))
	}
	if e.manifest {
		return append(problems, v.manifest(ctx, e, file.Size())...)
	}
	if v.opts.Quick {
		return problems
	}
	src, err := r.blobs.open(ctx, e.digest, -1)
	if err == nil {
		_, err = src.WriteTo(io.Discard)
		src.Close()
		e.bytesRead = file.Size()
	}
	switch {
	case err == nil || errors.Is(err, ErrNotFound): // collected since
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		add(ProblemDigest, err)
	case processCondition(err):
		e.err = err
	default:
		add(ProblemUnreadable, err)
	}
	return problems
}

func (v *verification) manifest(ctx context.Context, e *verifyEntry, size int64) []Problem {
	problem := func(kind ProblemKind, err error) []Problem {
		return []Problem{{Kind: kind, Digest: e.digest, Err: err}}
	}
	failed := func(err error) []Problem { // to look into the index
		if errors.Is(err, ErrCorruptIndex) {
			return problem(ProblemRows, err)
		}
		e.err = err
		return nil
	}
	r := v.registry
	desc, ok, err := r.index.resolveDigest(e.digest)
	if err != nil {
		return failed(err)
	}
	if !ok {
		lost := false
		err := v.again(ctx, func(q queryer) (err error) {
			lost, err = lostManifest(q, e.digest)
			return err
		})
		if lost {
			err = fmt.Errorf("%w: no row says what this manifest needs", ErrCorruptIndex)
		}
		return failed(err) // or was collected since
	}
	desc.Size = size // what the row says is compared below
	m, err := r.readVerified(ctx, desc)
	switch {
	case errors.Is(err, ErrNotFound): // collected since
		return nil
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		return problem(ProblemDigest, err)
	case errors.Is(err, ErrInvalidManifest) || errors.Is(err, ErrUnsupportedMediaType) || errors.Is(err, ErrTooLarge):
		return problem(ProblemManifest, err)
	case processCondition(err):
		return failed(err)
	case err != nil:
		return problem(ProblemUnreadable, err)
	}
	e.bytesRead = desc.Size
	differ, err := rowsDiffer(ctx, r.index, m)
	if differ != "" {
		err = v.again(ctx, func(q queryer) error {
			differ, err = rowsDiffer(ctx, q, m)
			return err
		})
	}
	if err == nil && differ != "" {
		err = fmt.Errorf("%w: %s", ErrCorruptIndex, differ)
	}
	return failed(err)
}
