package ocilocal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"strconv"

	"github.com/opencontainers/go-digest"
)

// smallBlob is the size up to which a blob is verified before its answer begins. The client then
// gets a 500 for a damaged one, and not a broken connection.
const smallBlob = 256 << 10

// unchanged answers 304 if the client says by If-None-Match that it has the content, and reports
// whether it has answered. RFC 9110, 15.4.5, wants the ETag in that answer.
func (x *exchange) unchanged(d digest.Digest) bool {
	if !matchesETag(x.r.Header.Get("If-None-Match"), d) {
		return false
	}
	x.w.Header().Set("ETag", etag(d))
	x.w.WriteHeader(http.StatusNotModified)
	return true
}

// describe sets the headers of an answer with content. A digest names its bytes for ever, so it is
// the entity tag as well.
func (x *exchange) describe(d digest.Digest, mediaType string, size int64) {
	h := x.w.Header()
	h.Set("Docker-Content-Digest", string(d))
	h.Set("ETag", etag(d))
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.FormatInt(size, 10))
}

// getBlob serves GET and HEAD of a blob. No client must take damaged bytes for good ones. How that
// is ensured depends on what is asked for, and on whether this handle has verified the file before:
//
//	request            verified before        not verified before
//	a range            sent as it is          the whole file is read first, then the range is sent
//	whole, small       sent as it is          the whole file is read first, then it is sent
//	whole, large       sent as it is          verified while it is sent
//
// In the last case the verifier holds back the last bytes until the digest is right. If it is
// wrong, the connection breaks off, and the client has fewer bytes than Content-Length says.
// A client can't check a range by the digest, so a range never is verified while it is sent.
func (x *exchange) getBlob() error {
	b, err := x.openBlob()
	if b == nil || err != nil {
		return damaged(err)
	}
	defer b.close()
	x.describe(x.digest, mediaTypeBlob, b.part.length)
	if b.ranged {
		x.w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", b.part.start, b.part.start+b.part.length-1, b.size))
		x.w.WriteHeader(http.StatusPartialContent)
	}
	return x.stream(func(w *serveWriter) error {
		if b.follower != nil {
			return x.sendFollowed(w, b)
		}
		if b.unverified == nil {
			return w.sendFile(b.file, b.part.length)
		}
		_, err := b.unverified.WriteTo(w)
		if err == nil {
			x.registry.blobs.noteVerified(b.name, b.info)
		}
		return err
	})
}

// A servedBlob is a blob that is about to be sent.
type servedBlob struct {
	name       string
	file       *os.File
	info       fs.FileInfo // of file, if unverified is not nil
	size       int64       // of the whole blob
	part       byteRange   // what is sent
	ranged     bool        // the answer is a 206
	unverified *verifier   // reads the file; nil if that has been verified
	follower   *follower   // reads the file, which is not complete yet; nil otherwise
}

func (b *servedBlob) close() {
	if b.follower != nil {
		b.follower.Close()
		return
	}
	b.file.Close()
}

// openBlob opens the blob of the path, or answers the request and returns nil. The registry must be
// open for that. It may be closed while the blob is being sent, since only the open file is needed
// then: a slow client must not delay Close.
func (x *exchange) openBlob() (_ *servedBlob, err error) {
	ctx := x.r.Context()
	end, err := x.registry.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	b := &servedBlob{}
	b.name, b.size, err = x.locate(x.digest)
	if x.upstream != nil && errors.Is(err, ErrNotFound) {
		if followed, answered, err := x.openAbsent(); followed != nil || answered || err != nil {
			return followed, err
		}
		b.name, b.size, err = x.locate(x.digest)
	}
	if err != nil {
		return nil, err
	}
	if x.unchanged(x.digest) {
		return nil, nil
	}
	x.w.Header().Set("Accept-Ranges", "bytes")
	if x.r.Method == "HEAD" {
		x.describe(x.digest, mediaTypeBlob, b.size)
		x.w.WriteHeader(http.StatusOK)
		return nil, nil
	}
	whole := true
	if s := x.r.Header.Get("Range"); s != "" {
		// If-Range compares strongly (RFC 9110, 13.1.5), so a weak tag asks for the whole blob.
		if condition := x.r.Header.Get("If-Range"); condition == "" || condition == etag(x.digest) {
			if b.part, whole, err = parseByteRange(s, b.size); err != nil {
				x.w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", b.size))
				return nil, err
			}
		}
	}
	if b.ranged = !whole; whole {
		b.part = byteRange{0, b.size}
	}
	store := x.registry.blobs
	if whole && b.size > smallBlob && !store.wasVerified(b.name) {
		if b.file, _, err = store.openNamed(b.name, x.digest, b.size); err != nil {
			return nil, err
		}
		b.unverified = store.verifier(ctx, b.file, x.digest, b.size)
		b.info, err = b.file.Stat()
	} else {
		var size int64
		if b.file, size, err = store.openVerified(ctx, b.name, x.digest); err != nil {
			return nil, err
		}
		if size != b.size { // replaced since
			err = ErrSizeMismatch
		} else {
			_, err = b.file.Seek(b.part.start, io.SeekStart)
		}
	}
	if err != nil {
		return nil, errors.Join(err, b.file.Close())
	}
	return b, nil
}

// locate finds the file of a blob that the repository shows.
func (x *exchange) locate(d digest.Digest) (name string, size int64, err error) {
	name, size, err = x.repo.locate(d)
	if errors.Is(err, ErrNotFound) {
		// The first look reads the index and then the held files. A blob that was published and
		// released in between was seen by neither, and the second look finds it in the index.
		name, size, err = x.repo.locate(d)
	}
	if err == nil && x.upstream != nil && name == blobPath(d) {
		// A fetch that failed in its last step has left the file. The next one records it.
		var absent bool
		if absent, err = isAbsent(x.registry.index, d); absent && err == nil {
			err = fmt.Errorf("%s in %s: %w", d, x.repo.name, ErrNotFound)
		}
	}
	return name, size, err
}

// stream sends the body of an answer whose headers are written. If that fails, it breaks the
// connection off, so that no client takes a part for the whole. It logs damage, but not a client
// that went away.
func (x *exchange) stream(write func(*serveWriter) error) error {
	err := x.send(write)
	if err == nil {
		return nil
	}
	if damage := damaged(err); damage != err {
		x.registry.opts.Logger.Error("ocilocal: a damaged blob was asked for", "digest", x.digest, "error", err)
	}
	panic(http.ErrAbortHandler) // net/http's way to break off: it recovers, and logs nothing
}

// deleteBlob serves DELETE of a blob.
func (x *exchange) deleteBlob() error {
	if err := x.repo.DeleteBlob(x.r.Context(), x.digest); err != nil {
		return err
	}
	return x.empty(http.StatusAccepted)
}
