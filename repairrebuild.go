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
// damaged. The directory blobs must still exist. Then Rebuild does the same as
// [LocalRegistry.Repair]. If the index is sound, it does only that. No other process may have the
// registry open: its writes fail afterwards.
//
// A damaged index is not deleted. It is renamed to index.sqlite3.broken (or .broken2, …), and
// Rebuild keeps the refs, and the untagged manifests of a [Repository], that can still be read from
// it. If there is no index, or a new one that a killed rebuild has left, Rebuild keeps those of the
// last file with such a name. Manifests without refs get the names that Repair makes up.
//
// Errors:
//   - [ErrNotFound]: dir is not a registry
//   - [ErrForeignIndex]: the index belongs to another program
//   - [ErrNewerSchema]
//   - those of [Open] and [LocalRegistry.Repair]
func Rebuild(ctx context.Context, dir string, opts *RepairOptions) (_ *RepairReport, err error) {
	defer addOp(&err, "rebuild", dir, "")
	if opts == nil {
		opts = &RepairOptions{}
	}
	return attend(ctx, opts.Progress, Reference{}, func(ctx context.Context, m *meter) (*RepairReport, error) {
		return rebuild(ctx, dir, opts, m)
	})
}

// rebuild decides by the state of the index:
//
//	sound                         repair, with the refs of an index set aside before if this is new
//	damaged, found by Open        set aside, make a new one, repair
//	damaged, found by the repair  likewise; the report keeps what the first repair healed
//	unrecognisable, our id        likewise: damage can change the application id too
//	unrecognisable, no id of ours ErrForeignIndex: the directory may belong to another program
//	missing                       Open makes a new one, because adopt is set; repair
//	unreadable, newer schema      that error: nothing is known to be damaged
//
// A rebuild that is killed leaves the damaged index under its old name or under the new one, and
// the next rebuild goes on from there. The new index is marked as unreconciled until the repair is
// done, so no collection deletes anything in between.
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
	// The files of the index are renamed together, so each must be a regular file. A lost index may
	// have left a journal.
	_, lost := root.Lstat(indexFile)
	if err := checkDatabase(filepath.Join(dir, indexFile), lost != nil, opts.AllowOtherOwner); err != nil {
		return nil, err
	}
	before := &RepairReport{} // of a repair that found the index damaged
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
	// An index that cannot be read, for example without free descriptors, is not known to be
	// damaged.
	if !errors.Is(err, ErrCorruptIndex) && !errors.Is(err, ErrForeignIndex) || errors.Is(err, ErrNewerSchema) || errors.Is(err, ErrForeignRoot) || processCondition(err) {
		return nil, err
	}
	// Damage may have made the index unrecognisable. Other programs use the names blobs and id too,
	// so the file id must have the form that this package writes.
	if errors.Is(err, errUnrecognised) || errors.Is(err, ErrForeignIndex) && !errors.Is(err, errNoID) {
		id, lost := readID(root)
		if lost == nil && !isMadeID(id) {
			lost = errBadID
		}
		if errors.Is(lost, fs.ErrNotExist) || errors.Is(lost, errBadID) {
			return nil, fmt.Errorf("%w: %w; and there is no file %s by this package (if the registry belongs to this package, rename %s to %s first)",
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

// salvagePath returns the path of an index that was set aside, and "" if there was none.
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

// setAside renames the files of the index, and returns the new name of the first. The index itself
// is renamed before its log. If the rename is interrupted, Open finds a log without an index and
// refuses it. In the other order it would find an index without its log, which looks sound and has
// lost commits.
func setAside(root *rootDir) (string, error) {
	for n := 1; ; n++ {
		aside := asideName(n)
		done, err := moveIndex(root, indexFile, aside)
		if done || err != nil {
			return aside, err
		}
	}
}

// moveIndex renames the files of an index, and reports false if one of the new names is taken. Only
// the names of files that exist are checked. So a log that a killed rebuild has left follows the
// index that it had renamed.
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
