package ocilocal

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/opencontainers/go-digest"
)

// Repair never deletes a damaged file: it may be all that is left of the content. It moves the file
// from blobs/ to tmp/quarantine/<digest>. So no call reads it by accident, and a good file can take
// its name. A collection deletes it after its grace.

// quarantine moves damaged entries out of blobs/. It is called twice. Before healing, with files
// false, it moves entries that are not regular files: a good file cannot replace a directory. After
// healing, with files true, it moves the damaged files that were not healed. Those that were healed
// have been replaced in their place, so that no reader finds the name missing.
func (p *repair) quarantine(ctx context.Context, files bool) error {
	for _, d := range p.damaged {
		if files && !p.wanted[d] {
			continue
		}
		bad, err := p.inspect(ctx, d, files)
		if err == nil && bad != nil {
			err = p.moveAway(ctx, d, bad)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// inspect looks again at a damaged entry, since another process may have healed or collected it. It
// returns nil if the entry is good or missing now, or if it cannot be read: an unreadable file may
// be good. The returned info identifies the file that was found damaged.
func (p *repair) inspect(ctx context.Context, d digest.Digest, files bool) (fs.FileInfo, error) {
	fi, err := p.registry.root.Lstat(blobPath(d))
	switch {
	case err != nil:
		return nil, ignoreNotExist(err)
	case fi.Mode().IsRegular() != files:
		return nil, nil
	case !files:
		return fi, nil
	}
	f, size, err := p.registry.blobs.openFile(d, -1)
	if processCondition(err) {
		return nil, err
	}
	if err != nil {
		return nil, nil
	}
	src := p.registry.blobs.verifier(ctx, f, d, size)
	defer src.Close()
	if fi, err = f.Stat(); err != nil {
		return nil, err
	}
	_, err = src.WriteTo(io.Discard)
	switch {
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		return fi, nil
	case processCondition(err):
		return nil, err
	case err == nil:
		delete(p.wanted, d)
	}
	return nil, nil
}

// moveAway moves a damaged entry to quarantine, unless another process has replaced it.
//
// The problem: a publisher can replace the file by a good one between the check and the rename, as
// it needs no lock for that. The rename would then move the good file away.
//
// The rule: check the identity of the file before and after the rename. If the moved file is not
// the damaged one, it is moved back.
//
// It is safe because the index is locked meanwhile. Publishers check their blobs with that lock, so
// none of them finds the name missing while the file is moved there and back.
func (p *repair) moveAway(ctx context.Context, d digest.Digest, bad fs.FileInfo) error {
	root := p.registry.root
	dir := path.Join(tmpDir, quarantineDir)
	if err := root.makeDir(dir, 0o700); err != nil {
		return err
	}
	to := path.Join(dir, digestName(d))
	moved := false
	err := p.registry.writeAlone(ctx, func(*indexTx) error {
		moved = false
		fi, err := root.Lstat(blobPath(d))
		if err != nil || !os.SameFile(fi, bad) {
			return ignoreNotExist(err)
		}
		if err := root.Rename(blobPath(d), to); err != nil {
			return ignoreNotExist(err)
		}
		if fi, err = root.Lstat(to); err != nil {
			return err
		}
		if !os.SameFile(fi, bad) {
			return root.Rename(to, blobPath(d)) // healed between the two
		}
		moved = true
		return nil
	})
	if err != nil || !moved {
		return err
	}
	// The grace of a quarantined file begins now. Setting the time fails for another user's file,
	// whose old time then counts.
	root.Chtimes(to, time.Now())
	p.report.Quarantined = append(p.report.Quarantined, d)
	return nil
}
