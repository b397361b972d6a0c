package ocilocal

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A client sends the blobs of an artifact first and its manifest last. Until then no row of the
// index says that they are needed, so below blobs/ the next collection would delete them. They wait
// below tmp/ instead, each held for the repository that it was sent to:
//
//	tmp/held/<period>/<repository>/<algorithm>-<encoded>
//
// The life of a held blob, with the call that makes each step:
//
//	a file below tmp/ ── hold, holdLink ──▶ held ── takeHeld ──▶ a second link, in a stage
//	                                         │                        │ settle: sync and link
//	                  releaseHeld, sweepHeld ▼                        ▼
//	                                        gone                    blobs/
//
// The files are complete and verified, and every process sees them. They are not durable: only the
// publish of the manifest that names one syncs it and links it into blobs/. That saves an fsync and
// a transaction for each blob. After a power cut a file can be damaged. So a publish reads it again
// unless this handle has done so before, and takes a damaged one for missing.
//
// A held file stays when a manifest names it, because another client of the repository may rely on
// the answer that it is there. It is a second link to the bytes, and costs no space.
//
// A period is six hours. Collections remove whole periods that are old enough, so they need not
// look at single files. A put always goes into the period of that moment, and a period that has
// ended gets no more files. So a collection can't remove a blob that has just been held again.

// heldDir is where held blobs are, below tmp/.
const heldDir = "held"

// heldPeriod is for how long new blobs are held in the same directory.
const heldPeriod = 6 * time.Hour

// periodOf returns the directory name of the period that holds a moment.
func periodOf(t time.Time) string {
	return strconv.FormatInt(t.Unix()/int64(heldPeriod/time.Second), 10)
}

// periodEnd returns when a period ends, and false for a name that is not a period's.
func periodEnd(name string) (time.Time, bool) {
	n, err := strconv.ParseInt(name, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != name || n > int64(1)<<40 {
		return time.Time{}, false
	}
	return time.Unix((n+1)*int64(heldPeriod/time.Second), 0), true
}

// heldName is a repository's name as one part of a path: its SHA-256. The name itself has slashes,
// and may be longer than a file's name may be.
func heldName(repository string) string {
	sum := sha256.Sum256([]byte(repository))
	return hex.EncodeToString(sum[:])
}

func isHeldName(name string) bool {
	return checkDigest(digest.NewDigestFromEncoded(digest.SHA256, name)) == nil
}

// hold moves a complete file of this root, below tmp/, to where blobs are held. fi is of the file
// if this handle has compared its bytes with d, and nil otherwise. Renaming replaces a file that is
// held already: it has the same bytes, unless a power cut has damaged it, and then it is healed.
//
// The directories are made only if the rename fails without them, which is once per repository and
// period. A collection may remove them between the two steps, so this is tried several times.
func (s *blobStore) hold(repository, file string, d digest.Digest, fi fs.FileInfo) (err error) {
	held := path.Join(s.tmp, heldDir)
	for range 10 {
		period := path.Join(held, periodOf(time.Now()))
		dir := path.Join(period, heldName(repository))
		name := path.Join(dir, digestName(d))
		if err = s.root.Rename(file, name); err == nil {
			if fi != nil {
				s.noteVerified(name, fi)
			}
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, missing := s.root.Lstat(file); missing != nil {
			return missing // not the directory is missing, but the file
		}
		for _, dir := range []string{held, period, dir} {
			if err := s.root.makeDir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return err
}

// holdLink holds a blob that is here under another name: below blobs/, or held for another
// repository. It links the file into the session first, because hold renames, and the blob must
// keep its old name. A file system without hard links gets a copy. Both are verified, unless this
// handle has verified the file: a client that gets a damaged blob would not put a good one.
func (s *blobStore) holdLink(ctx context.Context, repository, name string, d digest.Digest) error {
	dir, err := s.enter()
	if err != nil {
		return err
	}
	link := path.Join(dir, rand.Text())
	err = s.root.Link(name, link)
	if linkUnsupported(err) {
		f, err := s.root.OpenFile(name, os.O_RDONLY|openNoFollow, 0)
		if err != nil {
			return err
		}
		_, err = s.holdNew(ctx, repository, f, d.Algorithm(), d, -1)
		return errors.Join(err, f.Close())
	}
	if err != nil {
		return err
	}
	fi, err := s.root.Lstat(link)
	if err == nil && !s.isVerified(name, fi) {
		err = s.verifyNamed(ctx, link, d)
	}
	if err == nil {
		err = s.hold(repository, link, d, fi)
	}
	// If the new name was a link to the same file already, rename(2) did nothing and left the old
	// name.
	return errors.Join(err, ignoreNotExist(s.root.Remove(link)))
}

// holdNew holds the bytes of src, and returns their descriptor. The arguments and the errors are
// those of [stage.put]. The bytes are verified while they are copied, and not synced.
func (s *blobStore) holdNew(ctx context.Context, repository string, src io.Reader, alg digest.Algorithm, want digest.Digest, size int64) (ocispec.Descriptor, error) {
	st := s.newStage()
	sf, err := st.receive(ctx, src, alg, want, size)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	sf.file.start(0, 0) // on its way to the disk by the time that the manifest comes
	fi, err := sf.file.Stat()
	err = errors.Join(err, sf.file.Close())
	sf.file = nil
	if err == nil {
		err = s.hold(repository, sf.name, sf.digest, fi)
	}
	if err != nil {
		return ocispec.Descriptor{}, errors.Join(err, st.drop(sf))
	}
	return ocispec.Descriptor{MediaType: mediaTypeBlob, Digest: sf.digest, Size: sf.size}, nil
}

// mediaTypeBlob is the media type of content of which only the bytes are known.
const mediaTypeBlob = "application/octet-stream"

// heldFile returns the name and size of a held blob, and [ErrNotFound] if the repository holds
// none. Of a blob that is held in several periods it returns the newest file: it is the last one
// that a collection removes, and the one that a put after a power cut has healed.
func (s *blobStore) heldFile(repository string, d digest.Digest) (name string, size int64, err error) {
	if err := checkDigest(d); err != nil {
		return "", 0, err
	}
	// Most are in the present period, of which no file is older.
	name = path.Join(s.tmp, heldDir, periodOf(time.Now()), heldName(repository), digestName(d))
	if fi, err := s.root.Lstat(name); err == nil && fi.Mode().IsRegular() {
		return name, fi.Size(), nil
	}
	name = ""
	newest := time.Time{}
	err = s.eachHeld(repository, d, func(file string, end time.Time, fi fs.FileInfo) error {
		if fi.Mode().IsRegular() && end.After(newest) {
			name, size, newest = file, fi.Size(), end
		}
		return nil
	})
	if err == nil && name == "" {
		err = fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	return name, size, err
}

// eachHeld visits a held blob in each period that has it.
func (s *blobStore) eachHeld(repository string, d digest.Digest, visit func(file string, end time.Time, fi fs.FileInfo) error) error {
	held := path.Join(s.tmp, heldDir)
	return s.root.eachEntry(context.Background(), held, func(period string) error {
		end, ok := periodEnd(period)
		if !ok {
			return nil
		}
		file := path.Join(held, period, heldName(repository), digestName(d))
		fi, err := s.root.Lstat(file)
		if err == nil {
			err = visit(file, end, fi)
		}
		return ignoreNotExist(err)
	})
}

// heldAnywhere is heldFile for any repository that holds the blob. It looks into the directory of
// each repository, so it costs one system call for each: only a mount without a source needs it.
func (s *blobStore) heldAnywhere(ctx context.Context, d digest.Digest) (name string, size int64, err error) {
	if err := checkDigest(d); err != nil {
		return "", 0, err
	}
	held := path.Join(s.tmp, heldDir)
	err = s.root.eachEntry(ctx, held, func(period string) error {
		if _, ok := periodEnd(period); !ok {
			return nil
		}
		period = path.Join(held, period)
		return s.root.eachEntry(ctx, period, func(repository string) error {
			file := path.Join(period, repository, digestName(d))
			fi, err := s.root.Lstat(file)
			if err == nil && fi.Mode().IsRegular() && isHeldName(repository) {
				name, size = file, fi.Size()
				return errStop
			}
			return ignoreNotExist(err)
		})
	})
	if err == errStop {
		return name, size, nil
	}
	if err == nil {
		err = fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	return "", 0, err
}

// releaseHeld removes a held blob from a repository, and reports whether there was one.
func (s *blobStore) releaseHeld(repository string, d digest.Digest) (released bool, err error) {
	err = s.eachHeld(repository, d, func(file string, _ time.Time, fi fs.FileInfo) error {
		if !fi.Mode().IsRegular() {
			return nil
		}
		released = true
		return s.root.Remove(file)
	})
	return released, err
}

// sweepHeld removes the held blobs of every period that ended before a moment. It removes regular
// files with names of ours, and then the directories if nothing else is in them. A reader that has
// such a file open is not disturbed, and a publish that has linked it keeps the bytes.
func (s *blobStore) sweepHeld(ctx context.Context, before time.Time) error {
	held := path.Join(s.tmp, heldDir)
	if fi, err := s.root.Lstat(held); err != nil || !fi.IsDir() {
		return ignoreNotExist(err)
	}
	err := s.root.eachEntry(ctx, held, func(period string) error {
		end, ok := periodEnd(period)
		if !ok || end.After(before) {
			return nil
		}
		period = path.Join(held, period)
		if fi, err := s.root.Lstat(period); err != nil || !fi.IsDir() {
			return ignoreNotExist(err)
		}
		err := s.root.eachEntry(ctx, period, func(repository string) error {
			dir := path.Join(period, repository)
			fi, err := s.root.Lstat(dir)
			if err != nil || !fi.IsDir() || !isHeldName(repository) {
				return ignoreNotExist(err)
			}
			return s.removeDir(dir, isDigestName)
		})
		return errors.Join(err, s.root.removeEmpty(period))
	})
	return errors.Join(err, s.root.removeEmpty(held))
}

// takeHeld takes a held blob into the stage: its bytes are verified, unless this handle has
// verified the same file before, and are synced before they get their name below blobs/.
//
// It makes a link first and opens that. From then on no collection can remove the bytes, and no
// other put can replace them, since both work on the held name. A file system without hard links
// gets a copy.
//
// Errors: [ErrNotFound] for a blob that is not held or is damaged, and any error from ctx or the
// file system.
func (st *stage) takeHeld(ctx context.Context, repository string, d digest.Digest) error {
	if st.has(d) {
		return nil
	}
	s := st.store
	held, size, err := s.heldFile(repository, d)
	if err != nil {
		return err
	}
	dir, err := s.enter()
	if err != nil {
		return err
	}
	sf := &stagedFile{name: path.Join(dir, rand.Text()), digest: d, size: size}
	switch err := s.root.Link(held, sf.name); {
	case linkUnsupported(err):
		f, err := s.root.OpenFile(held, os.O_RDONLY|openNoFollow, 0)
		if err == nil {
			_, _, err = st.put(ctx, f, "", d, size)
			err = errors.Join(err, f.Close())
		}
		return notHeld(d, err)
	case err != nil:
		return notHeld(d, err)
	}
	var fi fs.FileInfo
	if sf.file, err = s.root.openFile(sf.name, os.O_RDONLY, 0); err == nil {
		if sf.size, err = checkRegular(sf.file); err == nil {
			fi, err = sf.file.Stat()
		}
	}
	if err == nil && !s.isVerified(held, fi) {
		_, err = s.verifier(ctx, sf.file, d, sf.size).WriteTo(io.Discard)
	}
	if err == nil && fi.Mode()&0o222 != 0 { // see finish
		err = s.root.Chmod(sf.name, 0o444)
	}
	if err != nil {
		if sf.file != nil {
			err = errors.Join(err, sf.file.Close())
		}
		return notHeld(d, errors.Join(err, s.root.Remove(sf.name)))
	}
	return st.add(ctx, sf)
}

// notHeld makes [ErrNotFound] of the error for a held file that is gone or damaged.
func notHeld(d digest.Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch) {
		return fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	return err
}

// maxVerified bounds how many files a handle remembers as verified.
const maxVerified = 4096

// noteVerified remembers that this handle has verified a file, so that it need not read it again to
// serve parts of it or to publish it. That is true only of this file and only while nobody writes
// to it: isVerified compares identity, size and modification time. When the map is full it is
// emptied, and files are read once more. blobStore.mu guards it.
func (s *blobStore) noteVerified(name string, fi fs.FileInfo) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.verified == nil || len(s.verified) >= maxVerified {
		s.verified = map[string]fs.FileInfo{}
	}
	s.verified[name] = fi
}

// isVerified reports whether fi, which has that name, is of the file that this handle has verified
// under it.
func (s *blobStore) isVerified(name string, fi fs.FileInfo) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.verified[name]
	return was != nil && os.SameFile(was, fi) && was.Size() == fi.Size() && was.ModTime().Equal(fi.ModTime())
}

// verifyNamed reads all of a file of any name below the root, and compares it with d.
//
// Errors: those of [blobStore.verify].
func (s *blobStore) verifyNamed(ctx context.Context, name string, d digest.Digest) error {
	f, size, err := s.openNamed(name, d, -1)
	if err != nil {
		return err
	}
	_, err = s.verifier(ctx, f, d, size).WriteTo(io.Discard)
	return errors.Join(err, f.Close())
}

// ensureVerified reads all of an open file that holds d, unless this handle has verified the same
// file under its name before. It leaves the file at its start. Another file may get the name
// meanwhile, so the caller must go on with f.
//
// Errors: [ErrDigestMismatch], [ErrSizeMismatch], and any error from ctx or the file system.
func (s *blobStore) ensureVerified(ctx context.Context, f *os.File, name string, d digest.Digest) error {
	fi, err := f.Stat()
	if err != nil || s.isVerified(name, fi) {
		return err
	}
	if _, err = s.verifier(ctx, f, d, fi.Size()).WriteTo(io.Discard); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		s.noteVerified(name, fi)
	}
	return err
}
