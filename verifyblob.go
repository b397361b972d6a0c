package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// again checks a finding a second time, with the write lock held if the registry is not read-only.
// Without the lock, a collection in progress looks like damage: it deletes files before rows, and
// rows one by one. With the lock, no collection is between two of these. A read-only registry
// cannot lock, so its findings may be those of a collection.
func (v *verification) again(ctx context.Context, look func(queryer) error) error {
	if v.registry.blobs.readOnly {
		return look(v.registry.index)
	}
	return v.registry.writeAlone(ctx, func(tx *indexTx) error { return look(tx) })
}

// missing reports whether the index has a blob that has no file, and whether a ref needs it. Both
// are decided under again, so that a blob that was collected or put back meanwhile is not reported.
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

// blob checks one digest. Other processes write meanwhile, so there are three kinds of findings:
//
//   - About bytes: the file was read, and its bytes are wrong whatever the index says by now. The
//     finding is reported at once.
//   - About a row and a file: it may only show a publish or a collection in progress. A finding
//     that would mean a loss is checked again, by again, before it is reported. A file that is
//     missing when it is opened was collected, and is not reported.
//   - A condition of the process or an error of the index: it goes into e.err, ends the
//     verification, and discards the findings for this digest.
func (v *verification) blob(ctx context.Context, e *verifyEntry) (problems []Problem) {
	add := func(kind ProblemKind, err error) {
		problems = append(problems, Problem{Kind: kind, Digest: e.digest, Err: err})
	}
	r := v.registry
	if _, err := rowDigest(string(e.digest)); err != nil {
		add(ProblemIndex, fmt.Errorf("row of a blob: %w", err))
		return problems
	}
	e.item = v.meter.item(ocispec.Descriptor{Digest: e.digest})
	if e.torn {
		add(ProblemIndex, fmt.Errorf("%w: the rows of blob %s and of its manifest have different digests", ErrCorruptIndex, e.digest))
	}
	file, err := r.root.Lstat(blobPath(e.digest))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !file.Mode().IsRegular() {
		var recorded, needed bool
		switch recorded, needed, e.err = v.missing(ctx, e.digest); {
		case e.err != nil || !recorded: // collected since
		case needed:
			add(ProblemMissing, ErrNotFound)
		default:
			add(ProblemCollected, errors.New("its file is missing, and no ref needs it"))
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
	e.item = v.meter.item(ocispec.Descriptor{Digest: e.digest, Size: v.counted(file.Size())})
	if !e.recorded {
		add(ProblemUnrecorded, errors.New("the index does not know it"))
	}
	if file.Mode().Perm() != 0o444 && runtime.GOOS != "windows" {
		add(ProblemMode, fmt.Errorf("mode is %v", file.Mode()))
	}
	if e.recorded && file.Size() != e.size {
		add(ProblemSize, fmt.Errorf("%w: file has %d bytes, the index says %d", ErrSizeMismatch, file.Size(), e.size))
	}
	if e.manifest {
		return append(problems, v.manifest(ctx, e, file.Size())...)
	}
	if v.opts.Quick {
		return problems
	}
	// The size is not given: a wrong size in the row must not hide that the bytes are good.
	src, err := r.blobs.open(ctx, e.digest, -1)
	if err == nil {
		_, err = src.WriteTo(e.item.writer())
		src.Close()
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

// manifest checks a manifest's bytes, and compares them with its rows. blob has compared the size
// with the row, so the bytes are read by the size of the file. That finds a manifest good whose row
// has a wrong size. A manifest that has no row is reported only if another row says that
// it is one. Otherwise it was collected, or it is not a manifest.
func (v *verification) manifest(ctx context.Context, e *verifyEntry, size int64) []Problem {
	problem := func(kind ProblemKind, err error) []Problem {
		return []Problem{{Kind: kind, Digest: e.digest, Err: err}}
	}
	failed := func(err error) []Problem { // of the index, or of the process
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
	invalid := func(err error) bool {
		return errors.Is(err, ErrInvalidManifest) || errors.Is(err, ErrUnsupportedMediaType) || errors.Is(err, ErrTooLarge)
	}
	desc.Size = size // rowsDiffer compares the size of the row below
	m, err := r.readVerified(ctx, desc)
	if invalid(err) { // unless it is the row's media type that is wrong
		if other, bad := r.readVerified(ctx, ocispec.Descriptor{Digest: e.digest, Size: size}); bad == nil && other.MediaType() != desc.MediaType {
			m, err = other, nil
		}
	}
	switch {
	case errors.Is(err, ErrNotFound): // collected since
		return nil
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		return problem(ProblemDigest, err)
	case invalid(err):
		return problem(ProblemManifest, err)
	case processCondition(err):
		return failed(err)
	case err != nil:
		return problem(ProblemUnreadable, err)
	}
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
