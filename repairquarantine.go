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

// A damaged file is never deleted: it may be all that is left of its content. It leaves blobs/ for
// tmp/quarantine/<digest>, so that nothing reads it by accident and a good file can take its name.

// quarantine moves damaged entries out of blobs/. Without files it moves those that are not regular
// files, which nothing can heal in their place. With files it moves those that were not healed.
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

// inspect looks again at a damaged entry. It returns nil if the entry is good now, or gone, or if
// it cannot be read: an unreadable file may be good.
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

// moveAway moves a damaged entry to quarantine, unless another process heals it meanwhile. No
// publish can miss the file while it is moved there and back, because publishers check their blobs
// with the index locked, and moveAway holds that lock.
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
	root.Chtimes(to, time.Now()) // its grace begins. This fails on another user's file, whose grace has begun already
	p.report.Quarantined = append(p.report.Quarantined, d)
	return nil
}
