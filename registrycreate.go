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

// idTemp is what the file id is called until it is complete. It exists only while the directory
// is locked, or after a process was killed in that time.
const idTemp = ".ocilocal-id"

// create makes the directory a root, or completes what a killed process has begun. One process
// at a time does it, with the directory locked:
//
//	id             the first file, and the mark: tmp/ and blobs/ beside it are ours. So it is
//	               made only where both names are free.
//	blobs/, tmp/   empty
//	index.sqlite3  made in a session below tmp/, and linked when it is complete
//
// The id and the index get their names by [rootDir.linkNew], so that a file that another program
// puts there meanwhile is not replaced. A process that is killed before the id has its name leaves
// an empty directory, or [idTemp]. One that is killed later leaves an id, from which the next Open
// knows that it may go on, and perhaps a second name of the id or of the index. The next Open
// removes the former, the sweep of tmp/ the latter.
func (r *LocalRegistry) create(ctx context.Context) error {
	// Whoever made the root may have been killed before its entry was synced.
	// Where this process can't do that, it didn't make the root either.
	if err := syncEntries(filepath.Dir(r.dir), r.opts.fault); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	unlock, err := r.lockRoot(ctx)
	if err != nil {
		return err
	}
	return errors.Join(r.createLocked(ctx), unlock())
}

// lockRoot locks the directory, for at most the time for which a write waits too.
func (r *LocalRegistry) lockRoot(ctx context.Context) (unlock func() error, err error) {
	wait, cancel := context.WithTimeout(ctx, r.opts.BusyTimeout)
	defer cancel()
	unlock, err = r.root.lockDir(wait, ".")
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		err = fmt.Errorf("%w: another process keeps the directory locked", ErrBusy)
	}
	return unlock, err
}

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
	// On Windows this fails if another process has opened the index already. Then the name goes
	// with the session.
	_ = r.root.Remove(private)
	return r.root.syncDir(".")
}

// checkNoLog refuses to make an index where the log of a lost one lies: SQLite would take
// it for the new one's, and what it says for the truth.
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

// claim returns the id of the directory, which it writes if there is none. Without an id nothing
// in the directory is ours: then it fails with [ErrForeignRoot] unless our names are free.
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

// checkFree looks whether a root can be made: nothing has our names. For Rebuild, blobs/ may
// exist, and a tmp/ in which everything is marked as ours.
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

// makeDirs makes the directories of a root that are missing, and checks those that exist.
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

// isMadeID reports whether an id has the form of those that writeID makes.
func isMadeID(id string) bool { return isTempName(strings.ToUpper(id)) && strings.ToLower(id) == id }

// writeID gives the directory its id. It is called with the directory locked.
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

// removeIDLink removes the second name of the id, which a process leaves that is killed between the
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

// removeIDTemp removes what a process has left that was killed while it wrote the id.
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

// maxIDFile is how many bytes a file id may have.
const maxIDFile = 65

// readID returns the id of a root. A file id that cannot be one is errBadID.
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

// errBadID is of a file that has the id's name and is not one.
var errBadID = errors.New("the file " + idFile + " was not made by a registry")

// errNoID is of an index that is this package's, in a root that has lost its id.
var errNoID = errors.New("the root has no file")

// checkID makes sure that the index is this root's own.
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
