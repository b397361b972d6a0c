package ocilocal

import (
	"context"
)

// ImportLayout imports an OCI image layout directory (image-spec image-layout.md). It imports every
// entry of index.json, or the one that opts choose, with its bytes and digest. Image indexes come
// with all members that the directory or the registry has. Blobs that the registry has are not read
// from the directory. The directory is not changed, and no symbolic link in it is followed.
//
// Either everything is published or nothing, except entries whose refs are kept: see
// [ImportResult.Conflicts].
//
// Errors:
//   - [*ConflictError], together with the result, if the only entry conflicts
//   - [ErrInvalidLayout], [ErrInvalidManifest], [ErrIncomplete], [ErrDigestMismatch],
//     [ErrSizeMismatch], [ErrUnsupportedMediaType], [ErrTooLarge]: the content
//   - [ErrNotFound], [ErrInvalidArgument], [ErrBareName]: options that fit no entry
//   - [ErrArtifactType]: a type that [Options.ArtifactTypes] does not have
//   - [ErrReadOnly], [ErrBusy], [ErrNoSpace], [ErrClosed]
//   - any error from ctx or the file system
func (r *LocalRegistry) ImportLayout(ctx context.Context, dir string, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importLayout(ctx, dir, opts)
	return result, opError("import layout", dir, "", err)
}

// importLayout is ImportLayout for callers that name the operation themselves.
func (r *LocalRegistry) importLayout(ctx context.Context, dir string, opts *ImportOptions) (*ImportResult, error) {
	if opts == nil {
		opts = &ImportOptions{}
	}
	return attend(ctx, opts.Progress, opts.Reference, func(ctx context.Context, m *meter) (*ImportResult, error) {
		return r.importLayoutMetered(ctx, dir, opts, m)
	})
}

// importLayoutMetered reads index.json, and runs an importer that fetches from the directory.
func (r *LocalRegistry) importLayoutMetered(ctx context.Context, dir string, opts *ImportOptions, m *meter) (result *ImportResult, err error) {
	err = r.withSource(ctx, dir, func(root *rootDir) error {
		l := &layout{root: root}
		index, err := l.index()
		if err != nil {
			return err
		}
		im := r.layoutImporter(l, opts)
		im.meter = m
		defer func() { r.logDiscard(im.stage.discard()) }()
		result, err = im.run(ctx, index)
		return err
	})
	return result, err
}

// InspectLayout lists the entries of a layout directory and counts its blobs, without a registry.
// It verifies nothing.
//
// Errors: [ErrInvalidLayout], [ErrUnsupportedMediaType], [ErrTooLarge], and any error from ctx or
// the file system.
func InspectLayout(ctx context.Context, dir string) (*Inspection, error) {
	in, err := inspectLayout(ctx, dir)
	return in, opError("inspect layout", dir, "", err)
}

// inspectLayout is InspectLayout for callers that name the operation themselves.
func inspectLayout(ctx context.Context, dir string) (*Inspection, error) {
	root, err := openRoot(dir, nil)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	index, err := (&layout{root: root}).index()
	if err != nil {
		return nil, err
	}
	in := newInspection(index.entries)
	err = walkBlobs(ctx, root, func(e blobEntry) error {
		if e.digest != "" {
			in.Blobs++
			in.Bytes += e.info.Size()
		}
		return nil
	})
	return in, err
}
