package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// Rebuild makes a new index for the registry in dir from its blobs, if the index is lost or
// damaged. The directory blobs must be left. Then it does what [LocalRegistry.Repair] does. If the
// index is sound, Rebuild is Repair. No other process may have the registry open: one that has it
// can write no more.
//
// A damaged index is not deleted. It is renamed to index.sqlite3.broken (or .broken2, …), and
// Rebuild keeps the refs, and the untagged manifests of a [Repository], that can still be read from
// it. If there is no index, or a new one, as a killed rebuild leaves it, Rebuild keeps those of the
// last file with such a name. Manifests without refs get the names that Repair makes up.
//
// Errors:
//   - [ErrNotFound] if dir is not a registry
//   - [ErrForeignIndex] if the index is another program's
//   - [ErrNewerSchema]
//   - those of [Open] and [LocalRegistry.Repair]
func Rebuild(ctx context.Context, dir string, opts *RepairOptions) (*RepairReport, error) {
	if opts == nil {
		opts = &RepairOptions{}
	}
	report, err := attend(ctx, opts.Progress, Reference{}, func(ctx context.Context, m *meter) (*RepairReport, error) {
		return rebuild(ctx, dir, opts, m)
	})
	return report, opError("rebuild", dir, "", err)
}

func rebuild(ctx context.Context, dir string, opts *RepairOptions, m *meter) (*RepairReport, error) {
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
	// Only files of an index are renamed with it. A lost index may have left a journal.
	_, lost := root.Lstat(indexFile)
	if err := checkDatabase(filepath.Join(dir, indexFile), lost != nil, opts.AllowOtherOwner); err != nil {
		return nil, err
	}
	before := &RepairReport{} // of an index that proved to be damaged
	r, err := Open(ctx, dir, &Options{AllowOtherOwner: opts.AllowOtherOwner, fault: opts.fault, adopt: true})
	if err == nil {
		damaged := false
		err = r.index.integrity(ctx, false, func(string) { damaged = true })
		if err != nil && !errors.Is(err, ErrCorruptIndex) {
			return nil, errors.Join(err, r.Close())
		}
		if err == nil && !damaged {
			p := newRepair(r, opts)
			p.meter = m
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
	// An index that cannot be read, for lack of descriptors for example, is not known to be
	// damaged.
	if !errors.Is(err, ErrCorruptIndex) && !errors.Is(err, ErrForeignIndex) || errors.Is(err, ErrNewerSchema) || errors.Is(err, ErrForeignRoot) || processCondition(err) {
		return nil, err
	}
	// Damage may have made our index unrecognisable. Other programs have a directory blobs and a
	// file id too, so the id must be one that this package has made.
	if errors.Is(err, errUnrecognised) || errors.Is(err, ErrForeignIndex) && !errors.Is(err, errNoID) {
		id, lost := readID(root)
		if lost == nil && !isMadeID(id) {
			lost = errBadID
		}
		if errors.Is(lost, fs.ErrNotExist) || errors.Is(lost, errBadID) {
			return nil, fmt.Errorf("%w: %w; and there is no %s that this package has made (if the registry is this package's, rename %s to %s first)",
				ErrForeignIndex, err, idFile, indexFile, asideName(1))
		}
		if lost != nil {
			return nil, errors.Join(err, lost)
		}
	}
	aside, err := setAside(root)
	if err != nil {
		return nil, err
	}
	if r, err = Open(ctx, dir, &Options{AllowOtherOwner: opts.AllowOtherOwner, fault: opts.fault, adopt: true}); err != nil {
		return nil, err
	}
	m.restart()
	p := newRepair(r, opts)
	p.meter = m
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

// lastAside returns the last name that setAside has used, or one that does not exist.
func lastAside(root *rootDir) (name string) {
	for n := 1; ; n++ {
		next := asideName(n)
		if _, err := root.Lstat(next); n > 1 && err != nil {
			return name
		}
		name = next
	}
}

// asideName returns the n-th name for a damaged index.
func asideName(n int) string {
	name := indexFile + ".broken"
	if n > 1 {
		name += fmt.Sprint(n)
	}
	return name
}

// setAside renames the index's files, and returns the new name of the first. The index goes first:
// until the last file follows, Open refuses what is left. An index without its log would look
// sound.
func setAside(root *rootDir) (string, error) {
	for n := 1; ; n++ {
		aside := asideName(n)
		done, err := moveIndex(root, indexFile, aside)
		if done || err != nil {
			return aside, err
		}
	}
}

// moveIndex renames the files of an index, unless a name is taken. Files that a killed rebuild has
// left follow those that it has renamed.
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
