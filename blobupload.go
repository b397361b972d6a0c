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
//	tmp/upload/<id>-<hash of the repository>/data
//
// The file is all there is to it. Its size is the offset at which the next bytes belong, so the
// upload outlives the process that began it, and any process of the root can continue it. A request
// that writes locks the directory. Nothing is synced: after a power cut the file may hold other
// bytes, and the digest at the end finds that.
//
// The directory goes when the upload is finished or cancelled. A collection removes it when it is
// old and not locked.
type incoming struct {
	store   *blobStore
	dir     string
	release func() error
	file    *rootFile
	size    int64
}

// uploadDir is where uploads are, below tmp/.
const uploadDir = "upload"

// uploadName is the name of an upload's directory. It has the repository in it, so that the id is
// of no use elsewhere.
func uploadName(repository, id string) string { return id + "-" + heldName(repository) }

func isUploadName(name string) bool {
	id, repository, _ := strings.Cut(name, "-")
	return isTempName(id) && isHeldName(repository)
}

// uploadPath returns the directory of an upload, and [ErrNotFound] for an id that cannot be one.
func (s *blobStore) uploadPath(repository, id string) (string, error) {
	if !isTempName(id) {
		return "", fmt.Errorf("upload: %w", ErrNotFound)
	}
	return path.Join(s.tmp, uploadDir, uploadName(repository, id)), nil
}

// newUpload begins an upload into a repository.
func (s *blobStore) newUpload(repository string) (id string, err error) {
	if s.readOnly {
		return "", ErrReadOnly
	}
	id = rand.Text()
	dir, err := s.uploadPath(repository, id)
	if err == nil {
		err = makePartialDir(s.root, dir)
	}
	return id, err
}

// uploadSize returns how many bytes of an upload are here. Errors: [ErrNotFound], and any error of
// the file system.
func (s *blobStore) uploadSize(repository, id string) (int64, error) {
	dir, err := s.uploadPath(repository, id)
	if err != nil {
		return 0, err
	}
	fi, err := s.root.Lstat(path.Join(dir, partialData))
	if errors.Is(err, fs.ErrNotExist) {
		if fi, err = s.root.Lstat(dir); err == nil && fi.IsDir() {
			return 0, nil // nothing has been written
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
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

// openUpload opens an upload for one request. No other request of any process has it until close.
//
// Errors: [ErrNotFound], [ErrInUse] if another request has it, and any error from ctx or the file
// system.
func (s *blobStore) openUpload(ctx context.Context, repository, id string) (_ *incoming, err error) {
	dir, err := s.uploadPath(repository, id)
	if err != nil {
		return nil, err
	}
	u := &incoming{store: s, dir: dir}
	for began := time.Now(); u.release == nil; {
		release, held, err := tryLockDir(s.root, dir)
		switch {
		case err != nil:
			return nil, err
		case held:
			u.release = release
			continue
		}
		if fi, err := s.root.Lstat(dir); errors.Is(err, fs.ErrNotExist) || err == nil && !fi.IsDir() {
			return nil, fmt.Errorf("upload: %w", ErrNotFound)
		}
		if time.Since(began) > uploadWait {
			return nil, fmt.Errorf("upload: %w by another request", ErrInUse)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	u.file, err = s.root.openFile(u.name(), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		u.size, err = checkRegular(u.file)
	}
	if err == nil {
		_, err = u.file.Seek(u.size, io.SeekStart)
		u.file.written, u.file.started = u.size, u.size
	}
	if err != nil {
		return nil, errors.Join(err, u.close())
	}
	return u, nil
}

func (u *incoming) name() string { return path.Join(u.dir, partialData) }

// append adds the bytes of src, and hashes them into h. What was written counts whether or not src
// fails. The upload may have at most limit bytes in all: more are an [ErrTooLarge].
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

// close ends the request. The upload stays.
func (u *incoming) close() error {
	var err error
	if u.file != nil {
		err = u.file.Close()
		u.file = nil
	}
	return errors.Join(err, u.release())
}

// remove ends the request, and the upload with its bytes.
func (u *incoming) remove() error {
	var err error
	if u.file != nil {
		err = u.file.Close()
		u.file = nil
	}
	return errors.Join(err, u.store.removeDir(u.dir, isPartialFile), u.release())
}

// finish takes the complete bytes for a blob of the repository, and the upload goes. verified says
// that the bytes have been hashed while they came in, and that all of them were.
//
// Errors: [ErrDigestMismatch], and any error from ctx or the file system.
func (u *incoming) finish(ctx context.Context, repository string, d digest.Digest, verified bool) error {
	s := u.store
	u.file.start(0, 0) // on its way to the disk by the time that the manifest comes
	if !verified {
		if _, err := u.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		v := s.verifier(ctx, io.NopCloser(u.file), d, u.size)
		if _, err := v.WriteTo(io.Discard); err != nil {
			return err
		}
	}
	if err := u.file.chmod(0o444); err != nil {
		return err
	}
	err := u.file.Close()
	u.file = nil
	if err != nil {
		return err
	}
	return s.hold(repository, u.name(), d, true)
}

// sweepUpload removes the directory of an upload that no request has.
func (s *blobStore) sweepUpload(dir string) error {
	fi, err := s.root.Lstat(dir)
	if err != nil || !fi.IsDir() || !isUploadName(path.Base(dir)) {
		return ignoreNotExist(err)
	}
	return s.removeIdle(dir, isPartialFile)
}

// countUploads returns how many uploads there are, counting up to limit. It first removes those
// that have had no byte since a moment.
func (s *blobStore) countUploads(ctx context.Context, limit int, before time.Time) (n int, err error) {
	count := func(sweep bool) error {
		n = 0
		dir := path.Join(s.tmp, uploadDir)
		err := s.root.eachEntry(ctx, dir, func(name string) error {
			name = path.Join(dir, name)
			if sweep && s.uploadIdleSince(name, before) {
				return s.sweepUpload(name)
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
func (s *blobStore) uploadIdleSince(dir string, moment time.Time) bool {
	for _, name := range []string{dir, path.Join(dir, partialData)} {
		fi, err := s.root.Lstat(name)
		if err == nil && fi.ModTime().After(moment) {
			return false
		}
	}
	return true
}
