package ocilocal

import (
	"context"
	"errors"
	"os"
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
// opts must choose one. Its Reference is the zero value if it has no full name and is given none.
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
	o.one = true
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	load := r.importArchiveFile
	if fi.IsDir() {
		load = r.importLayout
	}
	result, err := load(ctx, path, &o)
	if err != nil {
		return nil, err
	}
	a := result.Artifacts[0]
	return r.newArtifact(a.Update.Reference, a.Descriptor, nil), nil
}
