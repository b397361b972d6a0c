package ocilocal

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// idTemp is the name of the file id until it is complete. It exists only while the directory is
// locked, or after a process was killed in that time.
const idTemp = ".ocilocal-id"

// create makes the directory a root, or completes a creation that a killed process has begun. One
// process at a time does it, with the directory locked:
//
//	id             the first file, and the mark: tmp/ and blobs/ beside it belong to the registry. So
//	               it is made only if both names are free.
//	blobs/, tmp/   empty
//	index.sqlite3  made in a session below tmp/, and linked when it is complete
//
// The id and the index get their names by [rootDir.linkNew], which does not replace a file that
// another program puts there meanwhile. A process that is killed before the id has its name leaves
// an empty directory, or [idTemp]. One that is killed later leaves an id, so the next Open knows
// that it may go on. It may also leave a second name of the id or of the index. The next Open
// removes the former, and the sweep of tmp/ the latter.
func (r *LocalRegistry) create(ctx context.Context) error {
	// The process that made the directory may have been killed before its entry was synced. If this
	// process may not sync the parent, it has not made the directory.
	if err := syncEntries(filepath.Dir(r.dir), r.opts.fault); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	unlock, err := r.lockRoot(ctx)
	if err != nil {
		return err
	}
	return errors.Join(r.createLocked(ctx), unlock())
}

// lockRoot locks the directory. It waits as long as a write waits for the index, and then fails
// with [ErrBusy].
func (r *LocalRegistry) lockRoot(ctx context.Context) (unlock func() error, err error) {
	wait, cancel := context.WithTimeout(ctx, r.opts.BusyTimeout)
	defer cancel()
	unlock, err = r.root.lockDir(wait, ".")
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		err = fmt.Errorf("%w: another process keeps the directory locked", ErrBusy)
	}
	return unlock, err
}

// createLocked is create with the directory locked. The index is made under a private name, with
// its schema and in WAL mode, so no other process ever opens a half-made index: it either has no
// name or is complete. The index of a root with blobs gets the mark that it is not reconciled.
func (r *LocalRegistry) createLocked(ctx context.Context) error {
	if _, err := r.root.Lstat(indexFile); !errors.Is(err, fs.ErrNotExist) {
		return err // another process was faster
	}
	if err := r.checkNoLog(); err != nil {
		return err
	}
	id, err := r.claim()
	if err != nil {
		return err
	}
	if err := r.makeDirs(); err != nil {
		return err
	}
	session, err := r.blobs.enter()
	if err != nil {
		return err
	}
	fresh, err := r.blobs.empty()
	if err != nil {
		return err
	}
	private := path.Join(session, rand.Text())
	if err := createIndex(ctx, filepath.Join(r.dir, private), id, r.schema(), !fresh); err != nil {
		return err
	}
	if err := r.root.Chmod(private, 0o600); err != nil {
		return err
	}
	_, err = r.root.linkNew(private, indexFile)
	if errors.Is(err, fs.ErrExist) {
		return nil // another program's file, which open checks like every index
	}
	if err != nil {
		return err
	}
	// On Windows this fails if another process has opened the index already. Then the name is
	// removed with the session.
	_ = r.root.Remove(private)
	return r.root.syncDir(".")
}

// checkNoLog refuses to make an index beside the log of a lost one. SQLite would take the log for
// that of the new index, and apply its commits.
func (r *LocalRegistry) checkNoLog() error {
	for _, suffix := range []string{"-wal", "-journal"} {
		_, err := r.root.Lstat(indexFile + suffix)
		if err == nil {
			return fmt.Errorf("%w: %s is missing, but %s%s exists (put the index back, or call Rebuild)", ErrCorruptIndex, indexFile, indexFile, suffix)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// claim returns the id of the directory, and writes one if there is none. Without an id, nothing in
// the directory belongs to a registry: then claim fails with [ErrForeignRoot] unless the names of a
// registry are free.
func (r *LocalRegistry) claim() (id string, err error) {
	id, err = readID(r.root)
	if err == nil && !isMadeID(id) && id != r.opts.id && !r.opts.adopt {
		err = fmt.Errorf("%w: it holds %s", errBadID, printable(id))
	}
	if errors.Is(err, errBadID) {
		return "", fmt.Errorf("%w: there is no %s, and %w", ErrForeignRoot, indexFile, err)
	}
	if err == nil {
		err = r.removeIDLink()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	if err := r.checkFree(); err != nil {
		return "", err
	}
	if err := r.writeID(); err != nil {
		return "", err
	}
	return readID(r.root)
}

// checkFree checks that a root can be made: the names blobs and tmp are free. For Rebuild, blobs/
// may exist, and a tmp/ in which each entry has the marks of this package.
func (r *LocalRegistry) checkFree() error {
	for _, name := range []string{blobsDir, tmpDir} {
		_, err := r.root.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) || err == nil && r.opts.adopt && name == blobsDir {
			continue
		}
		if err == nil && r.opts.adopt {
			err = r.blobs.checkTmp()
		} else if err == nil {
			err = fmt.Errorf("%w: %s exists, but not the file %s that a registry has beside it (use another directory)", ErrForeignRoot, name, idFile)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// makeDirs makes the directories of a root that are missing, and checks those that exist. A copy of
// a root can lack them, since some tools do not copy empty directories.
func (r *LocalRegistry) makeDirs() error {
	missing, err := r.checkDirs()
	if err != nil || len(missing) == 0 {
		return err
	}
	for _, dir := range missing {
		if err := r.root.makeDir(dir, 0o755); err != nil {
			return err
		}
	}
	return r.root.syncDir(".")
}

// isMadeID reports whether an id has the form that writeID gives it: the text of [rand.Text] in
// lower case.
func isMadeID(id string) bool { return isTempName(strings.ToUpper(id)) && strings.ToLower(id) == id }

// writeID gives the directory its id. It is called with the directory locked. The file is complete
// and synced before it gets its name, so an id that can be read is whole.
func (r *LocalRegistry) writeID() error {
	if err := r.removeIDTemp(); err != nil {
		return err
	}
	f, err := r.root.openFile(idTemp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if _, err = io.WriteString(f, cmp.Or(r.opts.id, strings.ToLower(rand.Text()))+"\n"); err == nil {
		err = f.sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		_, err = r.root.linkNew(idTemp, idFile)
	}
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%w: another program made the file %s meanwhile", ErrForeignRoot, idFile)
	}
	if err = errors.Join(err, ignoreNotExist(r.root.Remove(idTemp))); err != nil {
		return err
	}
	return r.root.syncDir(".")
}

// removeIDLink removes the second name of the id. A process leaves it if it is killed between the
// link of the id and the removal of [idTemp]. Any other file under that name stays.
func (r *LocalRegistry) removeIDLink() error {
	temp, err := r.root.Lstat(idTemp)
	if err != nil {
		return ignoreNotExist(err)
	}
	id, err := r.root.Lstat(idFile)
	if err != nil || !os.SameFile(temp, id) {
		return err
	}
	return ignoreNotExist(r.root.Remove(idTemp))
}

// removeIDTemp removes the file that a process leaves if it is killed while it writes the id. A
// file that this package cannot have left is not removed.
func (r *LocalRegistry) removeIDTemp() error {
	fi, err := r.root.Lstat(idTemp)
	if err != nil {
		return ignoreNotExist(err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxIDFile {
		return fmt.Errorf("%w: %s is not a file that this package has left", ErrForeignRoot, idTemp)
	}
	return r.root.Remove(idTemp)
}

// maxIDFile is the largest size of a file id: 64 characters and a newline.
const maxIDFile = 65

// readID returns the id of a root. If the file id is not one that a registry can have made, the
// error is errBadID. Names of anonymous artifacts have the id in their host, so it may have only
// lower-case letters and digits.
func readID(root *rootDir) (string, error) {
	f, err := root.OpenFile(idFile, os.O_RDONLY|openNoFollow, 0)
	if err != nil {
		if fi, bad := root.Lstat(idFile); bad == nil && !fi.Mode().IsRegular() {
			err = fmt.Errorf("%w: it is not a regular file", errBadID)
		}
		return "", err
	}
	defer f.Close()
	if _, err := checkRegular(f); err != nil {
		return "", fmt.Errorf("%w: %w", errBadID, err)
	}
	b, err := readBounded(f, maxIDFile)
	if errors.Is(err, ErrTooLarge) {
		return "", fmt.Errorf("%w: %w", errBadID, err)
	}
	if err != nil {
		return "", err
	}
	id := strings.TrimSuffix(string(b), "\n")
	if len(id) == 0 || len(id) >= maxIDFile || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyz") != "" {
		return "", fmt.Errorf("%w: it holds %s", errBadID, printable(id))
	}
	return id, nil
}

// errBadID is the error for a file with the name of the id that does not hold one.
var errBadID = errors.New("the file " + idFile + " was not made by a registry")

// errNoID is the error for an index by this package in a root that has lost its id.
var errNoID = errors.New("the root has no file")

// checkID checks that the index belongs to this root: it has the same id as the file. Otherwise an
// index that was copied into another root would make its collections delete that root's blobs.
func (r *LocalRegistry) checkID() error {
	var err error
	if r.id, err = meta(r.index, metaID); err != nil {
		return err
	}
	switch id, err := readID(r.root); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w %s; the index's id is %s (if they belong together, write that id there)", ErrForeignIndex, errNoID, idFile, r.id)
	case errors.Is(err, errBadID):
		return fmt.Errorf("%w: %w", ErrForeignIndex, err)
	case err != nil:
		return err
	case id != r.id:
		return fmt.Errorf("%w: the index's id is %s, the root's is %s", ErrForeignIndex, r.id, id)
	}
	return nil
}
