package ocilocal

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// An incoming upload is a blob that a client sends in several requests:
//
//	tmp/upload/<id>-<hash of the repository>
//
// The file is the whole state. Its size is the offset at which the next bytes belong, so the upload
// outlives the process that began it, and any process of the root can continue it. A request that
// writes locks the file: two requests never append at once, and a kill releases the lock. Nothing
// is synced. After a power cut the file may hold other bytes, and the digest at the end finds that.
//
// The steps of an upload, and what a kill after each of them leaves:
//
//	newUpload   an empty file           an upload without bytes, which can be continued
//	append      bytes at the end        an upload that continues at the file's size
//	finish      the file is moved       the blob is complete and held
//	remove      no file                 nothing
//
// Both finish and remove act while the file is locked, and openLocked looks at the name when it has
// the lock. So a request that waited for the lock finds the upload gone, and never writes to a blob
// that is complete. Uploads that nobody ends are removed when they are old and not locked: by a
// collection, or by a request that begins another one when there are too many.
type incoming struct {
	store *blobStore
	name  string
	file  *rootFile // locked; nil when it is closed
	size  int64     // bytes in the file
}

// uploadDir is where uploads are, below tmp/.
const uploadDir = "upload"

// uploadName is the name of an upload's file. It has the repository in it, so that a client that
// may push to one repository can't use the id of an upload into another.
func uploadName(repository, id string) string { return id + "-" + heldName(repository) }

// isUploadName reports whether a name has the form of uploadName's.
func isUploadName(name string) bool {
	id, repository, _ := strings.Cut(name, "-")
	return isTempName(id) && isHeldName(repository)
}

// uploadPath returns the file of an upload, and [ErrNotFound] for an id that cannot be one.
// The id comes from a client: this check is what keeps it from naming another file.
func (s *blobStore) uploadPath(repository, id string) (string, error) {
	if !isTempName(id) {
		return "", fmt.Errorf("upload: %w", ErrNotFound)
	}
	return path.Join(s.tmp, uploadDir, uploadName(repository, id)), nil
}

// newUpload begins an upload into a repository. Its id has 130 random bits, so it can't be guessed.
func (s *blobStore) newUpload(repository string) (id string, err error) {
	if s.readOnly {
		return "", ErrReadOnly
	}
	id = rand.Text()
	name, err := s.uploadPath(repository, id)
	if err != nil {
		return "", err
	}
	for range 10 { // a collection may remove the directory in between
		var f *rootFile
		if f, err = s.root.openFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			return id, f.Close()
		}
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err := s.root.makeDir(path.Dir(name), 0o700); err != nil {
			return "", err
		}
	}
	return "", err
}

// uploadSize returns how many bytes of an upload are here. It takes no lock, so a request that is
// under way may add bytes at any time.
//
// Errors: [ErrNotFound], and any error of the file system.
func (s *blobStore) uploadSize(repository, id string) (int64, error) {
	name, err := s.uploadPath(repository, id)
	if err != nil {
		return 0, err
	}
	fi, err := s.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("upload: %w", ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// uploadWait is for how long a request waits for another one of the same upload. A client that has
// broken off a request comes back before the server has seen the end of the old one.
const uploadWait = 5 * time.Second

// openUpload opens an upload for one request. No other request of any process has it until close or
// remove. It waits up to uploadWait for a request that has it.
//
// Errors: [ErrNotFound], [ErrInUse] if another request has it, and any error from ctx or the file
// system.
func (s *blobStore) openUpload(ctx context.Context, repository, id string) (_ *incoming, err error) {
	name, err := s.uploadPath(repository, id)
	if err != nil {
		return nil, err
	}
	u := &incoming{store: s, name: name}
	for began := time.Now(); u.file == nil; {
		if u.file, err = s.root.openLocked(name); err != nil {
			return nil, err
		}
		if u.file != nil {
			break
		}
		if fi, err := s.root.Lstat(name); errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
			return nil, fmt.Errorf("upload: %w", ErrNotFound)
		}
		// A lock of another process can't be waited for with a context, so it is tried again and
		// again.
		if time.Since(began) > uploadWait {
			return nil, fmt.Errorf("upload: %w by another request", ErrInUse)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	if u.size, err = checkRegular(u.file); err == nil && u.size > 0 {
		_, err = u.file.Seek(u.size, io.SeekStart)
		u.file.written, u.file.started = u.size, u.size
	}
	if err != nil {
		return nil, errors.Join(err, u.close())
	}
	return u, nil
}

// append adds the bytes of src, and hashes them into h. The bytes that were written before an error
// stay, and size includes them: the client continues after them. The upload may have at most limit
// bytes in all: more are an [ErrTooLarge], and the bytes up to the limit stay.
func (u *incoming) append(ctx context.Context, src io.Reader, h hash.Hash, limit int64) error {
	w := &hashingWriter{file: u.file, hash: h, store: u.store}
	n, err := u.store.copy(w, io.LimitReader(&ctxReader{ctx, src}, limit-u.size))
	u.size += n
	if err != nil || u.size < limit {
		return err
	}
	switch n, err := io.ReadFull(src, make([]byte, 1)); {
	case n > 0:
		return fmt.Errorf("%w: upload has more than %d bytes", ErrTooLarge, limit)
	case err != io.EOF:
		return err
	}
	return nil
}

// close ends the request and drops the lock. The upload stays.
func (u *incoming) close() error {
	if u.file == nil {
		return nil
	}
	err := u.file.Close()
	u.file = nil
	return err
}

// remove ends the request, and the upload with its bytes. The lock is dropped last, so no other
// request sees half of it.
func (u *incoming) remove() error {
	err := ignoreNotExist(u.store.root.Remove(u.name)) // while it is locked
	return errors.Join(err, u.close())
}

// finish holds the complete bytes as a blob of the repository. verified says that all bytes were
// hashed while they came in, and have the digest. Otherwise the file is read here. Then the request
// ends and the upload is gone.
//
// Errors: [ErrDigestMismatch], and any error from ctx or the file system. After them the bytes are
// still the upload's.
func (u *incoming) finish(ctx context.Context, repository string, d digest.Digest, verified bool) error {
	s := u.store
	u.file.start(0, 0) // most bytes are on the disk when the manifest comes and they are synced
	if !verified {
		if _, err := u.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		v := s.verifier(ctx, io.NopCloser(u.file), d, u.size)
		if _, err := v.WriteTo(io.Discard); err != nil {
			return err
		}
	}
	fi, err := u.file.Stat()
	if err == nil {
		err = s.hold(repository, u.name, d, fi)
	}
	if err != nil {
		return err
	}
	// Not before: nobody could continue an upload that is read-only. If this fails, or the process
	// is killed before it, takeHeld does it.
	_ = u.file.chmod(0o444)
	return u.close()
}

// sweepUpload removes an upload that no request has, and that has had no byte since a moment. The
// caller has asked uploadIdleSince. A request may have continued the upload and ended since, so the
// time is compared again when the upload is locked. swept is false if the upload stays.
func (s *blobStore) sweepUpload(name string, moment time.Time) (swept bool, err error) {
	fi, err := s.root.Lstat(name)
	if err != nil || !fi.Mode().IsRegular() || !isUploadName(path.Base(name)) {
		return err != nil, ignoreNotExist(err)
	}
	f, err := s.root.openLocked(name)
	if f == nil {
		if errors.Is(err, fs.ErrPermission) {
			err = nil // another user's: theirs to sweep
		}
		return false, err
	}
	if fi, err = f.Stat(); err == nil && !fi.ModTime().After(moment) {
		swept, err = true, ignoreNotExist(s.root.Remove(name))
	}
	return swept, errors.Join(err, f.Close())
}

// countUploads returns how many uploads there are, counting up to limit. If there are that many, it
// removes those that have had no byte since a moment, and counts the others. Most calls therefore
// read no file's time. Requests that count at once may together begin more uploads than the limit:
// it guards the disk, and need not be exact.
func (s *blobStore) countUploads(ctx context.Context, limit int, before time.Time) (n int, err error) {
	count := func(sweep bool) error {
		n = 0
		dir := path.Join(s.tmp, uploadDir)
		err := s.root.eachEntry(ctx, dir, func(name string) error {
			name = path.Join(dir, name)
			if sweep && s.uploadIdleSince(name, before) {
				if swept, err := s.sweepUpload(name, before); swept || err != nil {
					return err
				}
			}
			if n++; n >= limit && !sweep {
				return errStop
			}
			return nil
		})
		if err == errStop {
			err = nil
		}
		return err
	}
	if err := count(false); err != nil || n < limit {
		return n, err
	}
	return n, count(true)
}

// uploadIdleSince reports whether an upload has had no byte since a moment.
func (s *blobStore) uploadIdleSince(name string, moment time.Time) bool {
	fi, err := s.root.Lstat(name)
	return err != nil || !fi.ModTime().After(moment)
}
