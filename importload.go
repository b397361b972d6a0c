package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Load returns the artifact that ref names. If the registry has the ref, Load reads only the index;
// the artifact reads its manifest on demand. Load does not ask a remote registry whether the ref
// has moved there: [LocalRegistry.Pull] does that. If the registry does not have the ref:
//
//   - if [Options.LegacyRoot] is set, the entry of that name there is imported;
//   - if there is none, and [Options.Remote] is set, the artifact is pulled.
//
// From then on the registry has it. ctx governs the call only.
//
// Errors:
//   - those of [LocalRegistry.Resolve]
//   - those of [LocalRegistry.ImportLayout], for an entry of [Options.LegacyRoot]
//   - those of [LocalRegistry.Pull], for an artifact that is pulled
func (r *LocalRegistry) Load(ctx context.Context, ref Reference) (*LocalArtifact, error) {
	result, err := r.load(ctx, ref, nil, nil)
	if err != nil {
		return nil, opError("load", ref.String(), "", err)
	}
	return result.Artifact, nil
}

// A LoadResult is the outcome of a load.
type LoadResult struct {
	Artifact *LocalArtifact
	// Hit is set if the registry had the artifact, and nothing was fetched or imported.
	Hit bool
	// Pull is the result of the pull; nil if nothing was pulled.
	Pull *PullResult
}

// LoadWith is [LocalRegistry.Load] with options for the pull, which it makes even if
// [Options.Remote] is not set. It checks by sizes that the registry has all that the artifact
// needs, and fetches missing content. With [PullOptions.Platform], an image index in the registry
// chooses the manifest. With [PullOptions.Verify], the local bytes are hashed, and nothing is
// fetched if they are good.
//
// LoadResult.Hit says whether the registry had the artifact. After a hit, no server is asked for
// referrers, even if [PullOptions.Referrers] is set. [LocalRegistry.Referrers] lists the local
// ones, and [LocalRegistry.Pull] fetches others.
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

// load is Load if opts is nil, and otherwise LoadWith. It looks in this order: the registry, the
// legacy root, the remote registry.
//
// Two calls can look for a missing ref at the same time. Both fetch it, and the second one to
// publish gets a conflict if the ref points elsewhere by then. That is not an error of a load: the
// ref is here now, so load looks in the registry again. LoadWith returns the conflict of a pull,
// because its caller chose the policy.
func (r *LocalRegistry) load(ctx context.Context, ref Reference, opts *PullOptions, m *meter) (*LoadResult, error) {
	a, err := r.loadHere(ctx, ref, opts, m)
	if err != nil {
		return nil, err
	}
	if a != nil {
		return &LoadResult{Artifact: a, Hit: true}, nil
	}
	a, err = r.fetchLegacy(ctx, ref)
	if errors.Is(err, ErrConflict) { // another call has just published it
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

// loadHere returns the artifact if the registry has it, and nil otherwise. Without options, the
// ref's row is enough, since a ref that resolves has its content. With options, pullHere checks the
// content as well.
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
//
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

// importPath is ImportPath for callers that name the operation themselves. A symbolic link at path
// is followed, since the caller named it.
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
//
// Errors are theirs, and [ErrInvalidArgument] for a file named as the index of a registry.
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
	// Closing a descriptor of an open index would drop SQLite's locks in this process. No registry
	// is at hand to compare files by identity, so the name decides.
	for _, suffix := range databaseFiles {
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
