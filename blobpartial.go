package ocilocal

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"github.com/opencontainers/go-digest"
)

// A partial is a large blob on its way in whose bytes outlive a failed or killed transfer:
// tmp/partial/<algorithm>-<encoded>/data. A transfer locks the directory while it writes there. The
// bytes that an earlier transfer has left count only after openPartial has hashed them again.
//
// A complete blob stays there too, read-only, until it has its name below blobs/, because the rest
// of the transfer may still fail. The stage's file is then the same file, and nothing writes to it
// again.
//
//	openPartial   locks the directory. What is in it decides how the transfer begins:
//	                no file                   at byte 0
//	                a file that is writable   after the file's bytes, once they are hashed
//	                a file that is read-only  not at all, if it is the blob; else at byte 0
//	append        adds bytes. An error leaves those that have come
//	finish        compares the digest, makes the file read-only, links it into the stage
//	close         drops the lock. The file stays unless it is empty or gone
//	settle        (of the stage) links the file below blobs/, and removes the directory
//
// The bytes are not synced before settle. After a power cut they may be wrong, and then the digest
// in finish is wrong as well: finish empties the file, and the next transfer begins at byte 0.
//
// A collection removes directories that are old and not locked.
type partial struct {
	stage   *stage
	dir     string
	release func() error // drops the lock of dir
	file    *rootFile    // nil when the stage has it
	w       *hashingWriter
	digest  digest.Digest
	size    int64  // that it must have in the end
	have    int64  // bytes that are written and hashed
	kept    int64  // of have, those of an earlier transfer
	stays   bool   // the blob is staged, and the directory is the stage's to remove
	grown   func() // if not nil, is called when bytes have been appended
}

// openPartial continues where an earlier transfer of the blob stopped, or begins one. It returns
// nil if another transfer of the blob is under way.
func (st *stage) openPartial(ctx context.Context, d digest.Digest, size int64) (_ *partial, err error) {
	if _, err := st.store.enter(); err != nil { // a stage that may not write
		return nil, err
	}
	root := st.store.root
	p := &partial{stage: st, digest: d, size: size, dir: partialPath(d)}
	if err := makePartialDir(root, p.dir); err != nil {
		return nil, err
	}
	release, held, err := tryLockDir(root, p.dir)
	if err != nil || !held {
		return nil, err
	}
	p.release = release
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if fi, err := root.Lstat(p.name()); err == nil && fi.Mode()&0o200 == 0 {
		whole, err := p.reopen(ctx)
		if whole || err != nil {
			return p, err
		}
	}
	if p.file, err = root.openFile(p.name(), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	got, err := checkRegular(p.file)
	if err == nil && got > size {
		err = p.reset()
	}
	if err == nil {
		err = p.rehash(ctx)
	}
	return p, err
}

// partialSize returns how many bytes of a blob a transfer under way has written, and −1 if that is
// not known. It takes no lock: a transfer that waits for another one sees by it whether that one
// makes progress.
func (st *stage) partialSize(d digest.Digest) int64 {
	fi, err := st.store.root.Lstat(path.Join(partialPath(d), partialData))
	if err != nil {
		return -1
	}
	return fi.Size()
}

// partialPath is the directory of a blob on its way in.
func partialPath(d digest.Digest) string {
	return path.Join(tmpDir, partialDir, digestName(d))
}

// reopen opens a file that finish has made read-only. It is hashed again, since a power cut may
// have damaged it. If it is not the blob, it is removed, because it can't be written to.
func (p *partial) reopen(ctx context.Context) (whole bool, err error) {
	root := p.stage.store.root
	if p.file, err = root.openFile(p.name(), os.O_RDONLY, 0); err != nil {
		return false, err
	}
	got, err := checkRegular(p.file)
	if err == nil && got == p.size {
		if err = p.rehash(ctx); err == nil && hashedDigest(p.digest.Algorithm(), p.w.hash) == p.digest {
			return true, nil
		}
	}
	if err == nil {
		err = errors.Join(p.file.Close(), root.Remove(p.name()))
		p.file, p.have, p.kept = nil, 0, 0
	}
	return false, err
}

// makePartialDir makes a directory and its parent. The parent is removed whenever it is empty, so
// it may vanish between the two steps: then both are repeated.
func makePartialDir(root *rootDir, name string) (err error) {
	for range 10 {
		if err = root.makeDir(path.Dir(name), 0o700); err != nil {
			return err
		}
		if err = root.makeDir(name, 0o700); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return err
}

func (p *partial) name() string { return path.Join(p.dir, partialData) }

// rehash hashes the bytes that the file has, and goes to its end. After it, w continues that hash.
func (p *partial) rehash(ctx context.Context) error {
	store := p.stage.store
	p.w = &hashingWriter{file: p.file, hash: newHash(p.digest.Algorithm()), store: store}
	if _, err := p.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n, err := store.copy(p.w.hash, &ctxReader{ctx, p.file})
	p.have, p.kept = n, n
	p.file.written, p.file.started = n, n
	return err
}

// reset empties the file.
func (p *partial) reset() error {
	p.have, p.kept = 0, 0
	p.w = &hashingWriter{file: p.file, hash: newHash(p.digest.Algorithm()), store: p.stage.store}
	return p.file.truncate()
}

// append adds the bytes of src. More bytes than are missing are an [ErrSizeMismatch]: it takes one
// byte too many to notice them. The file then is too long, and finish or the next openPartial
// empties it.
func (p *partial) append(ctx context.Context, src io.Reader) error {
	dst := io.Writer(p.w)
	if p.grown != nil {
		dst = &reportingWriter{p.w, p.grown}
	}
	n, err := p.stage.store.copy(dst, io.LimitReader(&ctxReader{ctx, src}, p.size-p.have+1))
	p.have += n
	if p.have > p.size {
		return fmt.Errorf("%w: more than the %d bytes it should have", ErrSizeMismatch, p.size)
	}
	return err
}

// A reportingWriter calls a function after each write.
type reportingWriter struct {
	dst   io.Writer
	after func()
}

func (w *reportingWriter) Write(b []byte) (int, error) {
	n, err := w.dst.Write(b)
	w.after()
	return n, err
}

// finish takes the complete blob into the stage. After an [ErrDigestMismatch] the file is empty: it
// is not known which of the bytes are wrong.
func (p *partial) finish(ctx context.Context) error {
	if got := hashedDigest(p.digest.Algorithm(), p.w.hash); got != p.digest {
		return errors.Join(fmt.Errorf("%w: bytes hash to %s, want %s", ErrDigestMismatch, got, p.digest), p.reset())
	}
	if err := p.file.chmod(0o444); err != nil {
		return err
	}
	dir, err := p.stage.store.enter()
	if err != nil {
		return err
	}
	name := path.Join(dir, rand.Text())
	moved, err := p.stage.store.root.linkNew(p.name(), name)
	if err != nil {
		return err
	}
	p.stays = !moved
	sf := &stagedFile{name: name, digest: p.digest, size: p.size, file: p.file}
	if p.file = nil; p.stays {
		sf.partial = p.dir
	}
	return p.stage.add(ctx, sf)
}

// close ends the transfer. Bytes that have come stay for a later one. Otherwise the directory is
// removed, while it still is locked.
func (p *partial) close() error {
	var errs []error
	if p.file != nil {
		errs = append(errs, p.file.Close())
	}
	if !p.stays && (p.file == nil || p.have == 0) {
		errs = append(errs, p.stage.store.removeDir(p.dir, isPartialFile))
		errs = append(errs, p.stage.store.root.removeEmpty(path.Dir(p.dir)))
	}
	return errors.Join(append(errs, p.release())...)
}
