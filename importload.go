package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Load returns the artifact that ref names, from here if it can. If the ref is here, only the index
// is read; the artifact reads its manifest when asked for it. Whether the ref has moved in its
// remote registry isn't asked: [LocalRegistry.Pull] does that. If the ref isn't here:
//
//   - if [Options.LegacyRoot] is set, its one entry there is imported;
//   - if that has none, and [Options.Remote] is set, it is pulled.
//
// From then on it is here. ctx governs the call only. Errors are those of [LocalRegistry.Resolve],
// and for content that had to be fetched those of [LocalRegistry.ImportLayout] or
// [LocalRegistry.Pull].
func (r *LocalRegistry) Load(ctx context.Context, ref Reference) (*LocalArtifact, error) {
	result, err := r.load(ctx, ref, nil, nil)
	if err != nil {
		return nil, opError("load", ref.String(), "", err)
	}
	return result.Artifact, nil
}

// A LoadResult tells where a load found the artifact.
type LoadResult struct {
	Artifact *LocalArtifact
	// Hit is set if the artifact was here, and nothing was fetched or imported.
	Hit bool
	// Pull tells what was pulled; nil if nothing was.
	Pull *PullResult
}

// LoadWith is [LocalRegistry.Load] with options for the pull, which it makes even if
// [Options.Remote] isn't set. It looks that everything that the artifact needs is here, by sizes,
// and fetches what is missing. With [PullOptions.Platform], an image index that is here chooses the
// manifest. With [PullOptions.Verify], the bytes that are here are hashed, and nothing is fetched
// if they are good. The result tells whether it was a hit. After a hit nobody is asked for
// referrers, whatever [PullOptions.Referrers] says: those that are here are listed by
// [LocalRegistry.Referrers], and [LocalRegistry.Pull] brings others.
//
// Errors are those of Load.
func (r *LocalRegistry) LoadWith(ctx context.Context, ref Reference, opts *PullOptions) (*LoadResult, error) {
	if opts == nil {
		opts = &PullOptions{}
	}
	result, err := attend(ctx, opts.Progress, ref, func(ctx context.Context, m *meter) (*LoadResult, error) {
		return r.load(ctx, ref, opts, m)
	})
	return result, opError("load", ref.String(), "", err)
}

// load is Load if opts is nil, and otherwise LoadWith.
func (r *LocalRegistry) load(ctx context.Context, ref Reference, opts *PullOptions, m *meter) (*LoadResult, error) {
	a, err := r.loadHere(ctx, ref, opts, m)
	if err != nil {
		return nil, err
	}
	if a != nil {
		return &LoadResult{Artifact: a, Hit: true}, nil
	}
	a, err = r.fetchLegacy(ctx, ref)
	if errors.Is(err, ErrConflict) { // another call has just put it here
		a, err = r.loadHere(ctx, ref, opts, m)
	}
	if err != nil {
		return nil, err
	}
	if a != nil {
		return &LoadResult{Artifact: a}, nil
	}
	if opts == nil && r.opts.Remote == nil || r.blobs.readOnly {
		return nil, ErrNotFound
	}
	pulled, err := r.pull(ctx, ref, opts, m)
	if errors.Is(err, ErrConflict) && opts == nil {
		a, here := r.loadHere(ctx, ref, nil, nil)
		if here != nil {
			return nil, here
		}
		if a != nil {
			return &LoadResult{Artifact: a}, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return &LoadResult{Artifact: pulled.Artifact, Pull: pulled}, nil
}

// loadHere returns the artifact if it is here, and nil if it isn't.
func (r *LocalRegistry) loadHere(ctx context.Context, ref Reference, opts *PullOptions, m *meter) (*LocalArtifact, error) {
	if opts != nil {
		return r.pullHere(ctx, ref, opts, m)
	}
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	desc, err := r.resolve(ref)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return r.newArtifact(ref, desc, nil), nil
}

// LoadPath imports the one artifact of a layout directory, or of an archive if path is a file, and
// returns it. With several entries, opts must choose one. Content without a name gets an anonymous
// reference, as with ImportOptions.Anonymous, so that no collection deletes it.
// Errors are those of [LocalRegistry.ImportLayout] or [LocalRegistry.ImportArchiveFile].
func (r *LocalRegistry) LoadPath(ctx context.Context, path string, opts *ImportOptions) (_ *LocalArtifact, err error) {
	defer addOp(&err, "load", path, "")
	o := ImportOptions{}
	if opts != nil {
		o = *opts
	}
	o.one, o.mustName = true, true
	result, err := r.importPath(ctx, path, &o)
	if err != nil {
		return nil, err
	}
	a := result.Artifacts[0]
	return r.newArtifact(a.Update.Reference, a.Descriptor, nil), nil
}

// ImportPath is [LocalRegistry.ImportLayout] of a directory and [LocalRegistry.ImportArchiveFile]
// of a file. Errors and ctx are theirs.
func (r *LocalRegistry) ImportPath(ctx context.Context, path string, opts *ImportOptions) (*ImportResult, error) {
	result, err := r.importPath(ctx, path, opts)
	return result, opError("import", path, "", err)
}

func (r *LocalRegistry) importPath(ctx context.Context, path string, opts *ImportOptions) (*ImportResult, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return r.importLayout(ctx, path, opts)
	}
	return r.importArchiveFile(ctx, path, opts)
}

// InspectPath is [InspectLayout] of a directory and [InspectArchive] of a file.
// Errors and ctx are theirs; a registry's index is refused with [ErrInvalidArgument].
func InspectPath(ctx context.Context, path string) (_ *Inspection, err error) {
	defer addOp(&err, "inspect", path, "")
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return inspectLayout(ctx, path)
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	for _, suffix := range databaseFiles { // closing any of them would drop SQLite's locks
		if filepath.Base(target) == indexFile+suffix {
			return nil, fmt.Errorf("%w: this is a registry's %s%s", ErrInvalidArgument, indexFile, suffix)
		}
	}
	f, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return inspectArchive(ctx, f)
}
