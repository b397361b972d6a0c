package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// Rebuild makes the index of the registry in dir anew from its blobs, of which the directory
// blobs must be left, if it is lost or damaged, and then does what [LocalRegistry.Repair] does. A damaged index is
// not deleted but renamed to index.sqlite3.broken (or .broken2, …), and refs that can still be
// read from it are kept; if there is no index, or one that was made new, those of the last file
// with such a name, as a rebuild that was killed leaves it. What has lost its refs is named as Repair says.
// On a sound index it is Repair. No other process may have the registry open: one that
// has can't write any more.
//
// Errors: [ErrNotFound] if dir is no registry, [ErrForeignIndex] if it is another program's,
// [ErrNewerSchema], those of [Open] and of [LocalRegistry.Repair].
func Rebuild(ctx context.Context, dir string, opts *RepairOptions) (*RepairReport, error) {
	report, err := rebuild(ctx, dir, opts)
	return report, opError("rebuild", dir, "", err)
}

func rebuild(ctx context.Context, dir string, opts *RepairOptions) (*RepairReport, error) {
	if opts == nil {
		opts = &RepairOptions{}
	}
	dir, err := resolveDir(dir)
	var root *rootDir
	if err == nil {
		root, err = openRoot(dir, opts.fault)
	}
	if err == nil {
		defer root.Close()
		_, err = root.Lstat(blobsDir)
	}
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", ErrNotFound, err)
		}
		return nil, err
	}
	// Files that no index of ours has beside it are not renamed with it. A lost index may have left a journal.
	_, lost := root.Lstat(indexFile)
	if err := checkDatabase(filepath.Join(dir, indexFile), lost != nil, false); err != nil {
		return nil, err
	}
	before := &RepairReport{} // of an index that proved to be damaged
	r, err := Open(ctx, dir, &Options{fault: opts.fault, adopt: true})
	if err == nil {
		damaged := false
		err = r.index.integrity(ctx, false, func(string) { damaged = true })
		if err != nil && !errors.Is(err, ErrCorruptIndex) {
			return nil, errors.Join(err, r.Close())
		}
		if err == nil && !damaged {
			p := newRepair(r, opts)
			if mark, _ := meta(r.index, metaUnreconciled); mark != "" {
				p.salvage = salvagePath(root, dir, lastAside(root))
			}
			before, err = &p.report, p.run(ctx)
			if !errors.Is(err, ErrCorruptIndex) && !slices.ContainsFunc(before.Left, impossible) {
				return before, errors.Join(err, r.Close())
			}
		}
		err = errors.Join(ErrCorruptIndex, err, r.Close())
	}
	// An index that cannot be read, for want of descriptors say, is not known to be damaged.
	if !errors.Is(err, ErrCorruptIndex) && !errors.Is(err, ErrForeignIndex) || errors.Is(err, ErrNewerSchema) || errors.Is(err, ErrForeignRoot) || processCondition(err) {
		return nil, err
	}
	// Damage may have made the index of a root of ours unrecognisable. Others have a directory blobs too.
	if errors.Is(err, ErrForeignIndex) && !errors.Is(err, errNoID) {
		if _, lost := root.Lstat(idFile); errors.Is(lost, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w; nor is there a file %s (if the registry is this package's, rename %s to %s first)",
				err, idFile, indexFile, asideName(1))
		} else if lost != nil {
			return nil, errors.Join(err, lost)
		}
	}
	aside, err := setAside(root)
	if err != nil {
		return nil, err
	}
	if r, err = Open(ctx, dir, &Options{fault: opts.fault, adopt: true}); err != nil {
		return nil, err
	}
	p := newRepair(r, opts)
	p.report.Healed, p.report.Quarantined = before.Healed, before.Quarantined
	p.salvage = salvagePath(root, dir, aside)
	err = p.run(ctx)
	return &p.report, errors.Join(err, r.Close())
}

// salvagePath returns the absolute path of an index that was set aside, "" if there was none.
func salvagePath(root *rootDir, dir, aside string) string {
	if _, err := root.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return filepath.Join(dir, aside)
}

// lastAside returns the name that setAside found last, or one that nothing has.
func lastAside(root *rootDir) (name string) {
	for n := 1; ; n++ {
		next := asideName(n)
		if _, err := root.Lstat(next); n > 1 && err != nil {
			return name
		}
		name = next
	}
}

// asideName is the n-th name for a damaged index.
func asideName(n int) string {
	name := indexFile + ".broken"
	if n > 1 {
		name += fmt.Sprint(n)
	}
	return name
}

// setAside renames the index's files, and returns the new name of the first. That goes first:
// until the last one follows, Open refuses what is left. An index without its log would look sound.
func setAside(root *rootDir) (string, error) {
	for n := 1; ; n++ {
		aside := asideName(n)
		done, err := moveIndex(root, indexFile, aside)
		if done || err != nil {
			return aside, err
		}
	}
}

// moveIndex renames the files of an index, unless one would take another's name. Of
// those that a killed rebuild has renamed already, the rest joins them.
func moveIndex(root *rootDir, from, to string) (done bool, err error) {
	var there []string
	for _, suffix := range []string{"", "-journal", "-wal", "-shm"} {
		switch _, err := root.Lstat(from + suffix); {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return false, err
		}
		switch _, err := root.Lstat(to + suffix); {
		case err == nil:
			return false, nil
		case !errors.Is(err, fs.ErrNotExist):
			return false, err
		}
		there = append(there, suffix)
	}
	for _, suffix := range there {
		if err := root.Rename(from+suffix, to+suffix); err != nil {
			return false, err
		}
	}
	return true, root.syncDir(".")
}
