package ocilocal

import (
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"

	"github.com/opencontainers/go-digest"
)

// tinyBlob is the size up to which a blob is sent from memory. Above it, a blob that was verified
// before costs less if the kernel copies it (sendfile).
const tinyBlob = 8 << 10

// smallBlob is the size up to which a blob is verified before its answer begins. The client then
// gets a 500 for a damaged one, and not a broken connection. A mirror fetches it again instead.
const smallBlob = 256 << 10

// unchanged answers 304 if the client says by If-None-Match that it has the content, and reports
// whether it has answered. RFC 9110, 15.4.5, wants the ETag in that answer.
func (x *exchange) unchanged(d digest.Digest) bool {
	if !matchesETag(x.r.Header.Get("If-None-Match"), d) {
		return false
	}
	x.w.Header().Set("Etag", etag(d))
	x.w.WriteHeader(http.StatusNotModified)
	return true
}

// identify says in the headers which content the answer has. A digest names its bytes for ever, so
// it is the entity tag as well.
func (x *exchange) identify(d digest.Digest) {
	h := x.w.Header()
	h.Set("Docker-Content-Digest", string(d))
	h.Set("Etag", etag(d)) // ETag in the form that net/http sends
}

// describe sets the headers of an answer with content.
func (x *exchange) describe(d digest.Digest, mediaType string, size int64) {
	x.identify(d)
	h := x.w.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.FormatInt(size, 10))
}

// getBlob serves GET and HEAD of a blob. No client must take damaged bytes for good ones. How that
// is ensured depends on what is asked for, and on whether this handle has verified the file before:
//
//	request            verified before        not verified before
//	a range            sent as it is          the whole file is read first, then the range is sent
//	whole, tiny        read into memory, verified, then sent
//	whole, small       sent as it is          the whole file is read first, then it is sent
//	whole, large       sent as it is          verified while it is sent, unless it is being healed
//
// Most requests are for tiny blobs, and sending these from memory takes the fewest system calls. In
// the last case the verifier holds back the last bytes until the digest is right. If it is wrong,
// the connection breaks off, and the client has fewer bytes than Content-Length says. A client
// can't check a range by the digest, so a range never is verified while it is sent, except one of a
// blob that a mirror fetches meanwhile: see [sharedFetch].
func (x *exchange) getBlob() error {
	b, err := x.openBlob()
	if b == nil || err != nil {
		return damaged(err)
	}
	if b.content != nil {
		x.identify(x.digest)
		x.respond(http.StatusOK, mediaTypeBlob, b.content)
		return nil
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
		} else if saysDamaged(err) {
			x.healSent(err)
		}
		return err
	})
}

// A servedBlob is a blob that is about to be sent.
type servedBlob struct {
	foundBlob
	content    []byte      // all bytes of a tiny blob, verified, in place of the file; nil for others
	info       fs.FileInfo // of the file, if unverified is not nil
	part       byteRange   // what is sent
	ranged     bool        // the answer is a 206
	unverified *verifier   // reads the file; nil if that has been verified
	follower   *follower   // reads the file, which is not complete yet; nil otherwise
}

func (b *servedBlob) close() {
	if b.follower != nil {
		b.follower.Close()
	} else if b.file != nil {
		b.file.Close()
	}
}

// openBlob opens the blob of the path, or answers the request and returns nil. The registry must be
// open for that. It may be closed while the blob is being sent, since only the open file is needed
// then: a slow client must not delay Close.
func (x *exchange) openBlob() (*servedBlob, error) {
	end, err := x.registry.begin(x.r.Context())
	if err != nil {
		return nil, err
	}
	defer end()
	b, err := x.openHere()
	if !x.heals(err) {
		return b, err
	}
	x.noteDamage(x.digest, err)
	followed, answered, failed := x.openAbsent()
	if failed != nil {
		return nil, notHealed(err, failed)
	}
	if followed != nil || answered {
		return followed, nil
	}
	return x.openHere()
}

// openHere is openBlob without an upstream.
func (x *exchange) openHere() (*servedBlob, error) {
	// The answer to HEAD, and to a client that has the content, needs no file.
	sizeOnly := x.r.Method == "HEAD" || matchesETag(x.r.Header.Get("If-None-Match"), x.digest)
	b, err := x.find(x.digest, sizeOnly)
	if err != nil || x.unchanged(x.digest) {
		return nil, err
	}
	x.w.Header().Set("Accept-Ranges", "bytes")
	if x.r.Method == "HEAD" {
		x.describe(x.digest, mediaTypeBlob, b.size)
		x.w.WriteHeader(http.StatusOK)
		return nil, nil
	}
	if err = x.prepare(b); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// choosePart decides which part of the blob the request wants, by its size.
func (x *exchange) choosePart(b *servedBlob) (err error) {
	whole := true
	if s := x.r.Header.Get("Range"); s != "" {
		// If-Range compares strongly (RFC 9110, 13.1.5), so a weak tag asks for the whole blob.
		if condition := x.r.Header.Get("If-Range"); condition == "" || condition == etag(x.digest) {
			if b.part, whole, err = parseByteRange(s, b.size); err != nil {
				x.w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", b.size))
				return err
			}
		}
	}
	if b.ranged = !whole; whole {
		b.part = byteRange{0, b.size}
	}
	return nil
}

// prepare decides which part of an open blob is sent, and verifies as much as getBlob says.
func (x *exchange) prepare(b *servedBlob) (err error) {
	ctx, store := x.r.Context(), x.registry.blobs
	if err := x.choosePart(b); err != nil { // unless the size is wrong
		return cmp.Or(store.ensureVerified(ctx, b.file, b.name, x.digest), err)
	}
	whole := !b.ranged
	if whole && b.size <= tinyBlob {
		b.content, err = store.readAll(b.file, x.digest, b.size)
		return err
	}
	if whole && b.size > smallBlob && !x.healing() {
		if b.info, err = b.file.Stat(); err == nil && !store.isVerified(b.name, b.info) {
			b.unverified = store.verifier(ctx, b.file, x.digest, b.size)
		}
		return err
	}
	if err = store.ensureVerified(ctx, b.file, b.name, x.digest); err == nil {
		_, err = b.file.Seek(b.part.start, io.SeekStart)
	}
	return err
}

// find finds a blob that the repository shows, and opens it unless only its size is asked for.
func (x *exchange) find(d digest.Digest, sizeOnly bool) (_ *servedBlob, err error) {
	b := &servedBlob{}
	if sizeOnly {
		b.name, b.size, err = x.repo.locate(x.r.Context(), d)
	} else {
		b.foundBlob, err = x.repo.open(d)
	}
	if err == nil && x.upstream != nil && b.name == blobPath(d) {
		// A fetch that failed in its last step has left the file. The next one records it.
		var absent bool
		if absent, err = isAbsent(x.registry.index, d, roleLayer); absent && err == nil {
			err = fmt.Errorf("%s in %s: %w", d, x.repo.name, ErrNotFound)
		}
		if err != nil {
			b.close()
		}
	}
	return b, err
}

// stream sends the body of an answer whose headers are written. If that fails, it breaks the
// connection off, so that no client takes a part for the whole. It logs damage, but not a client
// that went away.
func (x *exchange) stream(write func(*serveWriter) error) error {
	err := x.send(write)
	if err == nil {
		return nil
	}
	if saysDamaged(err) {
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
