package ocilocal

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// The contents of tmp/: who removes them, and the mark by which this package knows its own names.
// Nothing else in there is touched.
//
//	tmp/<session>/           one open handle, which removes it when it is closed. After a kill, the
//	                         next handle that writes or collects locks it and removes it.
//	                         Mark: a name by rand.Text; a directory; mode 0700.
//	tmp/<session>/<name>     its stages, or the maker of an index. Mark: a name by rand.Text,
//	                         with SQLite's suffixes; a regular file.
//	tmp/partial/<digest>/    the pull that completes the blob; a collection when it is old and
//	                         not locked. Mark: a digest for a name; a directory with nothing
//	                         but data in it.
//	tmp/quarantine/<digest>  a collection when it is old. Mark: a digest for a name; a regular
//	                         file.
//	tmp/held/<period>/<repository>/<digest>
//	                         a collection when the period is old: see heldDir. Mark: a number,
//	                         a SHA-256 and a digest for names; a regular file.
//	tmp/upload/<id>-<repository>
//	                         the request that ends the upload; a collection, or a request that
//	                         begins one, when it is old and not locked: see incoming. Mark: a
//	                         name by rand.Text and a SHA-256; a regular file.
//
// A directory is removed entry by entry, without entering a directory, a link or a mount in it. The
// last step is a call that fails for a directory that is not empty.

// sessionPerm are the permissions of a session's directory. A file system that does not keep
// permissions shows others: see blobStore.perm.
const sessionPerm = 0o700

// partialDir, below tmp/, is where interrupted pulls keep the bytes that have come: each large blob
// in its own directory, as partialData.
const (
	partialDir  = "partial"
	partialData = "data"
)

// quarantineDir, below tmp/, is where repair puts damaged files.
const quarantineDir = "quarantine"

// isTempName reports whether a name has the form of those by [rand.Text]: 26 characters of base32.
func isTempName(name string) bool {
	const length = 26
	return len(name) == length && strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// isTempFile reports whether a name is that of a file in a session. Besides blobs these are
// databases with SQLite's side files, while an index is made, and the lock file on Windows.
func isTempFile(name string) bool {
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return isTempName(name) || name == lockFile
}

// isPartialFile is isTempFile for the directory of a partial blob.
func isPartialFile(name string) bool { return name == partialData || name == lockFile }

// digestName is a digest as one part of a path, as partial and quarantined files are called.
func digestName(d digest.Digest) string { return string(d.Algorithm()) + "-" + d.Encoded() }

func isDigestName(name string) bool {
	alg, encoded, _ := strings.Cut(name, "-")
	return checkDigest(digest.Digest(alg+":"+encoded)) == nil
}

// enter makes this handle's own directory below tmp/ on first use, and returns its path. The
// directory is locked for as long as the handle is open. By that lock a sweeper of any process
// knows that the directory is in use. An age would be wrong for a long transfer, and a process
// number means nothing in another container or after a restart.
//
// Some file systems do not keep permissions, so a new session may have others than it was made
// with. They become part of its mark (see perm), and old sessions are then looked for once more.
func (s *blobStore) enter() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly {
		return "", ErrReadOnly
	}
	if s.session != "" {
		return s.session, nil
	}
	_ = s.sweepSessions(s.perm) // not needed for correctness; may free the space that is needed
	for {
		name := path.Join(s.tmp, rand.Text())
		if err := s.root.Mkdir(name, sessionPerm); err != nil {
			return "", err
		}
		release, held, err := tryLockDir(s.root, name)
		if err != nil {
			return "", err
		}
		if held { // else a sweeper took it for abandoned in between
			s.session, s.release = name, release
			break
		}
	}
	if fi, err := s.root.Lstat(s.session); err == nil && fi.Mode().Perm()&^s.perm != 0 {
		s.perm |= fi.Mode().Perm()
		_ = s.sweepSessions(s.perm)
	}
	return s.session, nil
}

// create makes an empty file in the session's directory. Its name is random and new (O_EXCL).
func (s *blobStore) create() (*rootFile, error) {
	dir, err := s.enter()
	if err != nil {
		return nil, err
	}
	return s.root.openFile(path.Join(dir, rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// now is the time by the clock that stamps the store's files. The process's clock may be far from
// it, on a network share or once somebody has set it. It has to do where no file can be made.
func (s *blobStore) now() time.Time {
	f, err := s.create()
	if err != nil {
		return time.Now()
	}
	defer s.root.Remove(f.name)
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return time.Now()
	}
	return fi.ModTime()
}

// close removes the session's directory and gives up its lock.
func (s *blobStore) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == "" {
		return nil
	}
	err := s.removeDir(s.session, isTempFile)
	err = errors.Join(err, s.release())
	s.session, s.release = "", nil
	return err
}

// sweep removes the sessions below tmp/ that no process holds.
func (s *blobStore) sweep() error {
	s.mu.Lock()
	perm := s.perm
	s.mu.Unlock()
	return s.sweepSessions(perm)
}

// sweepSessions is sweep, given the permissions by which a session is recognised.
func (s *blobStore) sweepSessions(perm fs.FileMode) error {
	var errs []error // one that can't be removed must not keep the others
	err := s.root.eachEntry(context.Background(), s.tmp, func(name string) error {
		dir := path.Join(s.tmp, name)
		fi, err := s.root.Lstat(dir)
		if err == nil && isTempName(name) && fi.IsDir() && fi.Mode().Perm()&^perm == 0 {
			err = s.removeIdle(dir, isTempFile)
		}
		errs = append(errs, ignoreNotExist(err))
		return nil
	})
	return errors.Join(append(errs, err)...)
}

// sweepPartial removes the directory of a partial blob that no process holds.
func (s *blobStore) sweepPartial(dir string) error {
	fi, err := s.root.Lstat(dir)
	if err != nil || !fi.IsDir() || !isDigestName(path.Base(dir)) {
		return ignoreNotExist(err)
	}
	return s.removeIdle(dir, isPartialFile)
}

// sweepQuarantined removes a damaged file that repair has put away.
func (s *blobStore) sweepQuarantined(name string) error {
	fi, err := s.root.Lstat(name)
	if err != nil || !fi.Mode().IsRegular() || !isDigestName(path.Base(name)) {
		return ignoreNotExist(err)
	}
	return ignoreNotExist(s.root.Remove(name))
}

// removeIdle is removeDir for a directory that no process has locked. It holds the lock itself
// while it removes, so nobody begins to use the directory meanwhile. A locked directory stays.
func (s *blobStore) removeIdle(dir string, own func(name string) bool) error {
	release, held, err := tryLockDir(s.root, dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil // another user's: theirs to sweep
	}
	if err != nil || !held {
		return ignoreNotExist(err)
	}
	return errors.Join(s.removeDir(dir, own), release())
}

// removeDir removes a directory with the regular files in it whose names are our own. If
// there is anything else, that stays, and so does the directory.
func (s *blobStore) removeDir(dir string, own func(name string) bool) error {
	err := s.root.eachEntry(context.Background(), dir, func(name string) error {
		if !own(name) {
			return nil
		}
		name = path.Join(dir, name)
		fi, err := s.root.Lstat(name)
		if err == nil && fi.Mode().IsRegular() {
			err = s.root.Remove(name)
		}
		return ignoreNotExist(err)
	})
	if err != nil {
		return err
	}
	if err = s.root.Remove(dir); errors.Is(err, fs.ErrExist) { // it is not empty
		return nil
	}
	return ignoreNotExist(err)
}

// checkTmp returns [ErrForeignRoot] unless tmp/ is a directory in which everything has our marks.
func (s *blobStore) checkTmp() error {
	foreign := func(name string) error {
		return fmt.Errorf("%w: %s was not made by this package", ErrForeignRoot, name)
	}
	fi, err := s.root.Lstat(s.tmp)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return foreign(s.tmp)
	}
	each := func(dir string, own func(name string, fi fs.FileInfo) bool) error {
		return s.root.eachEntry(context.Background(), dir, func(name string) error {
			fi, err := s.root.Lstat(path.Join(dir, name))
			if err == nil && !own(name, fi) {
				err = foreign(path.Join(dir, name))
			}
			return ignoreNotExist(err)
		})
	}
	var dirs []string
	err = each(s.tmp, func(name string, fi fs.FileInfo) bool {
		dirs = append(dirs, name)
		return fi.IsDir() && (isTempName(name) || name == partialDir || name == quarantineDir || name == heldDir || name == uploadDir)
	})
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		err := each(path.Join(s.tmp, dir), func(name string, fi fs.FileInfo) bool {
			switch dir {
			case partialDir:
				return fi.IsDir() && isDigestName(name)
			case uploadDir:
				return fi.Mode().IsRegular() && isUploadName(name)
			case heldDir:
				_, period := periodEnd(name)
				return fi.IsDir() && period
			case quarantineDir:
				return fi.Mode().IsRegular() && isDigestName(name)
			}
			return fi.Mode().IsRegular() && isTempFile(name)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
