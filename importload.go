package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Load returns the artifact that ref names. If the registry has it, only the
// index is read; the artifact reads its manifest when asked for it. If not,
// and [Options.LegacyRoot] is set, its one entry there is imported first; if
// it isn't there either, and [Options.Remote] is set, it is pulled. From then on
// it is found in the index.
//
// Errors are those of [LocalRegistry.Resolve], and for what had to be fetched
// those of [LocalRegistry.ImportLayout] or [LocalRegistry.Pull]. ctx governs the call only.
func (r *LocalRegistry) Load(ctx context.Context, ref Reference) (*LocalArtifact, error) {
	a, err := r.load(ctx, ref)
	return a, opError("load", ref.String(), "", err)
}

func (r *LocalRegistry) load(ctx context.Context, ref Reference) (*LocalArtifact, error) {
	for _, fetch := range []func(context.Context, Reference) (bool, error){nil, r.fetchLegacy, r.fetchRemote} {
		if fetch != nil {
			// A conflict means that somebody else has just put it here.
			if found, err := fetch(ctx, ref); err != nil && !errors.Is(err, ErrConflict) {
				return nil, err
			} else if !found {
				continue
			}
		}
		desc, err := r.resolve(ctx, ref)
		if err == nil {
			return r.newArtifact(ref, desc, nil), nil
		}
		if !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return nil, ErrNotFound
}

// LoadPath imports the one artifact of a layout directory or archive file, told
// apart by what it is and not by its name, and returns it. With several entries,
// opts must choose one. Content without any name gets an anonymous reference, as with
// ImportOptions.Anonymous, so that no collection deletes it.
// Errors are those of [LocalRegistry.ImportLayout] or [LocalRegistry.ImportArchiveFile].
func (r *LocalRegistry) LoadPath(ctx context.Context, path string, opts *ImportOptions) (*LocalArtifact, error) {
	a, err := r.loadPath(ctx, path, opts)
	return a, opError("load", path, "", err)
}

func (r *LocalRegistry) loadPath(ctx context.Context, path string, opts *ImportOptions) (*LocalArtifact, error) {
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

// ImportPath is [LocalRegistry.ImportLayout] of a directory and [LocalRegistry.ImportArchiveFile] of a
// file, told apart by what it is and not by its name. Errors and ctx are theirs.
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
func InspectPath(ctx context.Context, path string) (*Inspection, error) {
	in, err := inspectPath(ctx, path)
	return in, opError("inspect", path, "", err)
}

func inspectPath(ctx context.Context, path string) (*Inspection, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return inspectLayout(ctx, path)
	}
	if filepath.Base(path) == indexFile { // opening it would drop SQLite's locks
		return nil, fmt.Errorf("%w: %s is a registry's index", ErrInvalidArgument, indexFile)
	}
	f, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return inspectArchive(ctx, f)
}
