package ocilocal

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/opencontainers/go-digest"
)

// smallBlob is the size up to which a blob is verified before its answer begins. Damage is then an
// answer, and not a broken connection.
const smallBlob = 256 << 10

// unchanged answers that the client has the content already, if it says so.
func (x *exchange) unchanged(d digest.Digest) bool {
	if !matchesETag(x.r.Header.Get("If-None-Match"), d) {
		return false
	}
	x.w.Header().Set("ETag", etag(d))
	x.w.WriteHeader(http.StatusNotModified)
	return true
}

// describe sets the headers of an answer with content.
func (x *exchange) describe(d digest.Digest, mediaType string, size int64) {
	h := x.w.Header()
	h.Set("Docker-Content-Digest", string(d))
	h.Set("ETag", etag(d))
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.FormatInt(size, 10))
}

// getBlob serves GET and HEAD of a blob. Nobody receives all bytes of a damaged blob, nor any range
// of it: what this handle has not verified is verified before a range is sent, and on the way
// otherwise. Then the answer breaks off before the last byte.
func (x *exchange) getBlob() error {
	ctx := x.r.Context()
	end, err := x.registry.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	name, size, err := x.locate(x.digest)
	if err != nil {
		return damaged(err)
	}
	if x.unchanged(x.digest) {
		return nil
	}
	x.w.Header().Set("Accept-Ranges", "bytes")
	if x.r.Method == "HEAD" {
		x.describe(x.digest, mediaTypeBlob, size)
		x.w.WriteHeader(http.StatusOK)
		return nil
	}
	part, whole := byteRange{0, size}, true
	if s := x.r.Header.Get("Range"); s != "" {
		if condition := x.r.Header.Get("If-Range"); condition == "" || condition == etag(x.digest) {
			part, whole, err = parseByteRange(s, size)
		}
	}
	if err != nil {
		x.w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		return err
	}
	if whole {
		part = byteRange{0, size}
	}
	store := x.registry.blobs
	if whole && size > smallBlob && !store.wasVerified(name) {
		return x.sendUnverified(name, size)
	}
	f, got, err := store.openVerified(ctx, name, x.digest)
	if err != nil {
		return damaged(err)
	}
	defer f.Close()
	if got != size { // replaced since
		return &damagedError{ErrSizeMismatch}
	}
	x.describe(x.digest, mediaTypeBlob, part.length)
	if !whole {
		if _, err := f.Seek(part.start, 0); err != nil {
			return err
		}
		x.w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", part.start, part.start+part.length-1, size))
		x.w.WriteHeader(http.StatusPartialContent)
	}
	return x.stream(func(w *serveWriter) error { return w.sendFile(f, part.length) })
}

// locate finds a blob of the repository.
func (x *exchange) locate(d digest.Digest) (name string, size int64, err error) {
	name, size, err = x.repo.locate(d)
	if errors.Is(err, ErrNotFound) {
		// It may have been published, and no longer been held, in between.
		name, size, err = x.repo.locate(d)
	}
	return name, size, err
}

// sendUnverified sends a whole blob and verifies it on the way.
func (x *exchange) sendUnverified(name string, size int64) error {
	store := x.registry.blobs
	f, _, err := store.openNamed(name, x.digest, size)
	if err != nil {
		return damaged(err)
	}
	v := store.verifier(x.r.Context(), f, x.digest, size)
	defer v.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	x.describe(x.digest, mediaTypeBlob, size)
	return x.stream(func(w *serveWriter) error {
		_, err := v.WriteTo(w)
		if err == nil {
			store.noteVerified(name, fi)
		}
		return err
	})
}

// stream sends the body of an answer of known length. If that fails, the connection breaks off, so
// that no client takes a part for the whole.
func (x *exchange) stream(write func(*serveWriter) error) error {
	err := x.send(write)
	if err == nil {
		return nil
	}
	if damage := damaged(err); damage != err {
		x.registry.opts.Logger.Error("ocilocal: a damaged blob was asked for", "digest", x.digest, "error", err)
	}
	panic(http.ErrAbortHandler) // the way of net/http to do that
}

// deleteBlob serves DELETE of a blob.
func (x *exchange) deleteBlob() error {
	if err := x.repo.DeleteBlob(x.r.Context(), x.digest); err != nil {
		return err
	}
	return x.empty(http.StatusAccepted)
}
