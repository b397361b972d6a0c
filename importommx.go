package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportOMMX imports every ref of an OMMX v3 local registry: a root with an
// index.sqlite3 of schema 1 or 2 and blobs/sha256/, where v2 kept its tree (see
// [DefaultLegacyRoot]); [LocalRegistry.ImportLegacy] imports that tree. Artifacts of any
// type are taken, with their bytes and digests. A bad entry doesn't stop the others: it is
// in the report. Running it again, or several times at once, or beside the SDK, does no
// harm. The root is only read, though SQLite may make the -wal and -shm files that readers of
// its index need, and no symbolic link in it is followed.
//
// Errors, together with the report so far: [ErrForeignIndex] and [*SchemaError] for an
// index that is no such, [ErrReadOnly], [ErrBusy], a full disk, ctx's, those of either index,
// and the file system's for root itself.
func (r *LocalRegistry) ImportOMMX(ctx context.Context, root string, opts *LegacyOptions) (*LegacyReport, error) {
	report := &LegacyReport{}
	err := r.importOMMX(ctx, root, opts, report)
	return report, opError("import OMMX registry", root, "", err)
}

func (r *LocalRegistry) importOMMX(ctx context.Context, dir string, opts *LegacyOptions, report *LegacyReport) (err error) {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	if opts == nil {
		opts = &LegacyOptions{}
	}
	root, err := openRoot(dir, r.root.fault)
	if err != nil {
		return err
	}
	defer root.Close()
	theirs, err := openOMMXRoot(ctx, dir, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, theirs.close()) }()
	l := &layout{root: root}
	return theirs.ommxRefs(ctx, func(ref ommxRef) error {
		report.Scanned++
		u, err := r.importOMMXRef(ctx, l, ref, opts.Policy)
		if fatal(err) {
			return err
		}
		report.add(ref.String(), u, err)
		return nil
	})
}

// openOMMXRoot opens the index of an OMMX v3 root.
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

func (o ommxRef) String() string {
	return clip(o.name + ":" + o.reference)
}

// importOMMXRef imports one ref. What the index says of its manifest, schema 1
// more than schema 2, isn't needed: the manifest's own bytes say it.
func (r *LocalRegistry) importOMMXRef(ctx context.Context, l *layout, o ommxRef, policy Policy) (RefUpdate, error) {
	if strings.ContainsAny(o.name, "@") {
		return RefUpdate{}, fmt.Errorf("%w: %q is no name", ErrInvalidReference, clip(o.name))
	}
	ref, err := parseLegacyName(o.name + ":" + o.reference)
	if err != nil {
		return RefUpdate{}, err
	}
	desc := ocispec.Descriptor{Digest: digest.Digest(o.manifest), MediaType: "a manifest"}
	f, err := l.open(desc)
	if err != nil {
		return RefUpdate{}, err
	}
	raw, err := readBounded(f, MaxManifestSize)
	if err = errors.Join(err, f.Close()); err != nil {
		return RefUpdate{}, err
	}
	m, err := parseManifest("", raw)
	if err != nil {
		return RefUpdate{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	desc.MediaType, desc.Size = m.MediaType(), int64(len(raw))
	return r.importAs(ctx, l, []ocispec.Descriptor{desc}, ref, policy, nil)
}
