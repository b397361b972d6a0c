package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportOMMX imports every ref of an OMMX v3 local registry with the chain of its subjects, which
// the SDK takes for part of the artifact. Artifacts of any type are imported, with their bytes and
// digests. A ref that is set keeps the time at which it was moved in the source ([Ref.Updated]).
//
// An OMMX v3 registry is a root with blobs/sha256/ and an index.sqlite3 of schema 1 or 2. It lies
// where v2 kept its tree: see [DefaultLegacyRoot]. [LocalRegistry.ImportLegacy] imports that tree.
//
// A bad entry does not stop the others: the report lists it. ImportOMMX can be repeated, and run
// several times at once, also while the SDK uses the root. It only reads the root, but SQLite may
// make the -wal and -shm files that readers of its index need. No symbolic link in it is followed.
//
// Errors, together with the report so far:
//   - [ErrForeignIndex], [*SchemaError]: the index does not belong to an OMMX v3 registry of schema
//     1 or 2
//   - [ErrReadOnly], [ErrBusy], [ErrNoSpace], and any error from ctx, either index, or the file
//     system for root itself
func (r *LocalRegistry) ImportOMMX(ctx context.Context, root string, opts *LegacyOptions) (report *LegacyReport, err error) {
	defer addOp(&err, "import OMMX registry", root, "")
	if opts == nil {
		opts = &LegacyOptions{}
	}
	report = &LegacyReport{}
	return report, r.withSource(ctx, root, func(dir *rootDir) error { return r.importOMMX(ctx, root, dir, opts, report) })
}

// importOMMX reads the refs of the other index page by page, and imports each like the entry of a
// layout: the root of an OMMX v3 registry has the blobs/ of one. The refs are read twice with a
// Progress function, since the totals must be known before the first import. The SDK may add refs
// in between; the meter accepts more items than were planned.
func (r *LocalRegistry) importOMMX(ctx context.Context, dir string, root *rootDir, opts *LegacyOptions, report *LegacyReport) (err error) {
	theirs, err := openOMMXRoot(ctx, dir, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, theirs.close()) }()
	l := &layout{root: root}
	m := newMeter(opts.Progress, Reference{}) // it is used on this goroutine only
	if m != nil {
		m.phase(PhasePlan)
		if err := theirs.ommxRefs(ctx, func(ommxRef) error { m.plan(1, 0); return nil }); err != nil {
			return err
		}
		m.planned(PhaseBlobs)
	}
	if err := theirs.ommxRefs(ctx, func(ref ommxRef) error {
		report.Scanned++
		u, missing, err := r.importOMMXRef(ctx, l, ref, opts)
		if fatal(err) {
			return err
		}
		report.add(ref.String(), u, err)
		meterEntry(m, u, err)
		for _, s := range missing {
			if !slices.Contains(report.MissingSubjects, s.Digest) {
				report.MissingSubjects = append(report.MissingSubjects, s.Digest)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	m.finish()
	return nil
}

// openOMMXRoot opens the index of an OMMX v3 root. A missing index is reported here, as SQLite
// would say only that it cannot open a file. walEmpty tells openOMMX whether the log holds
// anything: an index with an empty log can be read where no file may be made.
func openOMMXRoot(ctx context.Context, dir string, root *rootDir) (*index, error) {
	if _, err := root.Lstat(indexFile); err != nil {
		return nil, err
	}
	log, err := root.Lstat(indexFile + "-wal")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	walEmpty := err != nil || log.Size() == 0
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return openOMMX(ctx, filepath.Join(abs, indexFile), walEmpty)
}

// String returns the name of the ref, safe for a message.
func (o ommxRef) String() string {
	return printable(o.name + ":" + o.reference)
}

// moved returns the time at which the ref was moved, and zero if the column has no such time.
// SQLite does not enforce types of columns, so the value may be anything.
func (o ommxRef) moved() time.Time {
	text, _ := o.updated.(string)
	at, err := time.Parse(time.RFC3339, text)
	if err != nil || at.Before(time.UnixMicro(0)) {
		return time.Time{}
	}
	return at
}

// importOMMXRef imports one ref and, by [importer.subjects], its chain of subjects. Only the name
// and the digest are taken from the other index. It also describes the manifest, but the manifest's
// own bytes say the same and are verified. They are read here, because the importer needs media
// type and size.
func (r *LocalRegistry) importOMMXRef(ctx context.Context, l *layout, o ommxRef, opts *LegacyOptions) (RefUpdate, []ocispec.Descriptor, error) {
	ref, err := parseLegacyName(o.name + ":" + o.reference)
	if strings.ContainsAny(o.name, "@") {
		ref, err = Reference{}, fmt.Errorf("%w: name %s has a digest", ErrInvalidReference, printable(o.name))
	}
	if ref, err = legacyNamer(opts.Name).name(o.name+":"+o.reference, ref, err); err != nil {
		return RefUpdate{}, nil, err
	}
	desc := ocispec.Descriptor{Digest: digest.Digest(o.manifest), MediaType: "a manifest"}
	m, err := l.manifest(desc, "")
	if err != nil {
		return RefUpdate{}, nil, err
	}
	desc.MediaType, desc.Size = m.MediaType(), m.Size()
	im := r.importAs(l, ref, PublishOptions{Policy: opts.Policy})
	im.moved = o.moved()
	im.whole = func(ctx context.Context, desc ocispec.Descriptor) (bool, error) { return r.hasWhole(ctx, l, desc, 0) }
	return im.runOne(ctx, []ocispec.Descriptor{desc})
}

// manifest reads a manifest of the layout without verifying its digest. The importer reads and
// verifies it again.
func (l *layout) manifest(desc ocispec.Descriptor, mediaType string) (*Manifest, error) {
	f, err := l.open(desc)
	if err != nil {
		return nil, err
	}
	raw, err := readBounded(f, MaxManifestSize)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	m, err := parseManifest(mediaType, raw)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	return m, nil
}

// hasWhole reports whether a layout and the registry together have files of the right sizes for a
// manifest and all that it needs. The import verifies the bytes later. Damage and missing files
// mean false: a subject is optional. An error of the process, such as too many open files, is
// returned, because it says nothing about the subject.
func (r *LocalRegistry) hasWhole(ctx context.Context, l *layout, desc ocispec.Descriptor, depth int) (bool, error) {
	if depth > MaxIndexNesting || ctx.Err() != nil {
		return false, ctx.Err()
	}
	m, err := l.manifest(desc, desc.MediaType)
	if errors.Is(err, ErrIncomplete) {
		m, err = r.readVerified(ctx, desc)
	}
	if err != nil {
		if processCondition(err) {
			return false, err
		}
		return false, ctx.Err()
	}
	for i, c := range m.children() {
		if m.childRole(i) == roleManifest {
			if ok, err := r.hasWhole(ctx, l, c, depth+1); !ok || err != nil {
				return false, err
			}
			continue
		}
		if r.blobs.checkSize(c.Digest, c.Size) == nil {
			continue
		}
		f, err := l.open(c)
		if err != nil {
			if processCondition(err) {
				return false, err
			}
			return false, nil
		}
		fi, err := f.Stat()
		if err = errors.Join(err, f.Close()); err != nil || fi.Size() != c.Size {
			return false, err
		}
	}
	return true, nil
}
