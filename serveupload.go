package ocilocal

import (
	"errors"
	"fmt"
	"hash"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
)

// An uploadHash is the hash of the bytes that an upload has. It saves reading the upload again when
// it is finished. It is valid only for the number of bytes that were hashed: if another process has
// continued the upload, the file is longer. A hash that is lost or does not fit costs one more read
// of the file and nothing else.
type uploadHash struct {
	alg  digest.Algorithm
	hash hash.Hash
	size int64
}

// maxUploadHashes bounds how many hashes are kept. Without one, an upload is read again.
const maxUploadHashes = 256

// takeHash returns the hash of an upload of a size, and noHash if it is not known. No other request
// has it until keepHash.
func (h *handler) takeHash(id string, size int64, alg digest.Algorithm) uploadHash {
	h.mu.Lock()
	defer h.mu.Unlock()
	kept, ok := h.hashes[id]
	delete(h.hashes, id)
	switch {
	case size == 0:
		return uploadHash{alg: alg, hash: newHash(alg)}
	case ok && kept.size == size && kept.alg == alg:
		return kept
	}
	return uploadHash{hash: noHash{}}
}

// keepHash keeps the hash for the next request. If there are too many, another one goes: uploads
// that nobody continues must not keep theirs for ever.
func (h *handler) keepHash(id string, kept uploadHash) {
	if kept.hash == (noHash{}) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for other := range h.hashes {
		if len(h.hashes) < maxUploadHashes {
			break
		}
		delete(h.hashes, other)
	}
	h.hashes[id] = kept
}

// dropHash forgets the hash of an upload.
func (h *handler) dropHash(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.hashes, id)
}

// noHash takes the place of a hash that cannot be continued.
type noHash struct{}

func (noHash) Write(p []byte) (int, error) { return len(p), nil }
func (noHash) Sum(b []byte) []byte         { return b }
func (noHash) Reset()                      {}
func (noHash) Size() int                   { return 0 }
func (noHash) BlockSize() int              { return 1 }

// maxBlob is the largest size of a pushed blob, in bytes.
func (x *exchange) maxBlob() int64 {
	if x.opts.MaxBlobSize > 0 {
		return x.opts.MaxBlobSize
	}
	return math.MaxInt64 - 1
}

// queryDigest returns a digest from the query, or "" if the parameter is missing or empty.
func (x *exchange) queryDigest(name string) (digest.Digest, error) {
	d := digest.Digest(x.r.URL.Query().Get(name))
	if d == "" {
		return "", nil
	}
	if err := checkDigest(d); err != nil {
		return "", serveErrorf(http.StatusBadRequest, codeDigestInvalid, "%v", err)
	}
	return d, nil
}

// An upload session, as the distribution specification has it. Location may change from answer to
// answer by the specification, but here it is the same for the whole session.
//
//	POST   /v2/<name>/blobs/uploads/   202, Location: newUpload made a file below tmp/upload/
//	PATCH  Location                    202, Range: chunk appended the body; any number of times
//	GET    Location                    204, Range: the client asks where to continue
//	PUT    Location?digest=<digest>    201: chunk appended the body, and finish holds the blob
//	DELETE Location                    204: the upload is removed
//
// The session is its file (see incoming): each of these requests may reach another process. What a
// request appended stays when the request fails, and the answer's Range says how much that is. Only
// a wrong digest ends the session, because no further byte can make it right.

// beginUpload serves POST: it mounts a blob, takes a whole blob, or begins an upload. A mount that
// is not possible becomes an upload, as the specification demands.
func (x *exchange) beginUpload() error {
	mount, err := x.queryDigest("mount")
	if err != nil {
		return err
	}
	if mount != "" {
		mounted, err := x.mount(mount, x.r.URL.Query().Get("from"))
		if mounted || err != nil {
			return err
		}
	}
	d, err := x.queryDigest("digest")
	if err != nil {
		return err
	}
	if d != "" && mount == "" {
		return x.putWhole(d)
	}
	store := x.registry.blobs
	end, err := x.registry.beginWrite(x.r.Context())
	if err != nil {
		return err
	}
	defer end()
	if err := x.registry.checkBound(); err != nil {
		return err
	}
	if err := x.admitUpload(); err != nil {
		return err
	}
	id, err := store.newUpload(x.repo.name)
	if err != nil {
		return err
	}
	if x.opts.MinChunk > 0 {
		x.w.Header().Set("OCI-Chunk-Min-Length", strconv.FormatInt(x.opts.MinChunk, 10))
	}
	x.uploadHeaders(id, 0)
	return x.empty(http.StatusAccepted)
}

// uncountedPart is the part of the uploads below the limit that a handler begins before it counts
// again.
const uncountedPart = 64

// admitUpload refuses an upload if there are too many in the root. Counting reads the directory of
// all uploads, so a handler counts once for several: far from the limit for many, and close to it
// for each. A handler that nobody else works beside keeps the limit. Each other one may add the
// uploads that it has left from its last count.
func (x *exchange) admitUpload() error {
	h := x.handler
	h.mu.Lock()
	counted := h.uncounted > 0
	if counted {
		h.uncounted--
	}
	h.mu.Unlock()
	if counted {
		return nil
	}
	limit := h.opts.MaxUploads
	n, err := h.registry.blobs.countUploads(x.r.Context(), limit, time.Now().Add(-h.opts.UploadAge))
	if err != nil {
		return err
	}
	if n >= limit {
		return serveErrorf(http.StatusTooManyRequests, codeTooManyRequests, "too many uploads are under way")
	}
	h.mu.Lock()
	h.uncounted = (limit - n - 1) / uncountedPart
	h.mu.Unlock()
	return nil
}

// mount answers with a blob of another repository, if that is possible. Without from, every blob of
// the registry is a candidate. With HandlerOptions.Authorize there is no mount without from:
// otherwise whoever knows the digest of a private blob could read it.
func (x *exchange) mount(d digest.Digest, from string) (mounted bool, err error) {
	var source *Repository
	switch {
	case from != "":
		if len(from) > maxNameLen || repositoryFault(from) >= 0 {
			return false, nil
		}
		// The client can't tell a source that it may not read from one without the blob.
		if x.opts.Authorize != nil && x.opts.Authorize(x.r, from, ActionPull) != nil {
			return false, nil
		}
		if source, err = x.repository(from); err != nil {
			return false, nil
		}
	case x.opts.Authorize != nil:
		return false, nil
	}
	_, err = x.repo.Mount(x.r.Context(), d, source)
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDigestMismatch) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, x.created(d)
}

// created answers 201: the repository has the blob.
func (x *exchange) created(d digest.Digest) error {
	x.w.Header().Set("Location", x.blobURL(d))
	x.w.Header().Set("Docker-Content-Digest", string(d))
	return x.empty(http.StatusCreated)
}

// putWhole serves POST with a digest: the body is the blob.
func (x *exchange) putWhole(d digest.Digest) error {
	if x.r.ContentLength > x.maxBlob() {
		return serveErrorf(http.StatusRequestEntityTooLarge, codeSizeInvalid, "blob is too large")
	}
	if _, err := x.repo.PutBlob(x.r.Context(), x.body(x.maxBlob()), d, -1); err != nil {
		return err
	}
	return x.created(d)
}

// uploadHeaders say where an upload continues.
func (x *exchange) uploadHeaders(id string, size int64) {
	h := x.w.Header()
	h.Set("Location", x.uploadURL(id))
	h.Set("Docker-Upload-UUID", id)
	// The specification has no spelling for an empty range: 0-0 means no byte or one byte.
	h.Set("Range", fmt.Sprintf("0-%d", max(size-1, 0)))
}

// uploadStatus serves GET of an upload.
func (x *exchange) uploadStatus() error {
	end, err := x.registry.begin(x.r.Context())
	if err != nil {
		return err
	}
	defer end()
	size, err := x.registry.blobs.uploadSize(x.repo.name, x.upload)
	if err != nil {
		return err
	}
	x.uploadHeaders(x.upload, size)
	return x.empty(http.StatusNoContent)
}

// cancelUpload serves DELETE of an upload.
func (x *exchange) cancelUpload() error {
	return x.withUpload(func(u *incoming) (gone bool, err error) {
		x.dropHash(x.upload)
		if err := u.remove(); err != nil {
			return true, err
		}
		return true, x.empty(http.StatusNoContent)
	})
}

// withUpload calls fn with the upload of the path, which no other request of any process has until
// fn returns. fn reports gone if it has closed or removed the upload. Otherwise withUpload closes
// it.
func (x *exchange) withUpload(fn func(*incoming) (gone bool, err error)) error {
	ctx := x.r.Context()
	end, err := x.registry.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := x.registry.checkBound(); err != nil {
		return err
	}
	u, err := x.registry.blobs.openUpload(ctx, x.repo.name, x.upload)
	if errors.Is(err, ErrInUse) {
		return serveErrorf(http.StatusTooManyRequests, codeTooManyRequests, "another request of this upload is under way")
	}
	if err != nil {
		return err
	}
	gone, err := fn(u)
	if !gone {
		err = errors.Join(err, u.close())
	}
	return err
}

// chunk appends the body of the request, which must begin where the upload ends. It returns the
// hash of all bytes of the upload, or a noHash if an earlier part was not hashed here.
//
// If the request has both Content-Range and Content-Length, they must agree, and the body must have
// that length. A body without either, as docker sends it, ends where its last chunk says.
func (x *exchange) chunk(u *incoming, alg digest.Algorithm) (uploadHash, error) {
	n := x.r.ContentLength // −1 if it is not known
	if s := x.r.Header.Get("Content-Range"); s != "" {
		part, ok := parseContentRange(s)
		switch {
		case !ok:
			return uploadHash{}, serveErrorf(http.StatusBadRequest, codeUploadInvalid, "invalid Content-Range, want <first>-<last>")
		case n >= 0 && n != part.length:
			return uploadHash{}, serveErrorf(http.StatusBadRequest, codeSizeInvalid, "Content-Range and Content-Length differ")
		case part.start != u.size:
			return uploadHash{}, serveErrorf(http.StatusRequestedRangeNotSatisfiable, codeUploadInvalid, "upload continues at byte %d", u.size)
		}
		n = part.length
	}
	limit := x.maxBlob()
	if n > limit-u.size {
		return uploadHash{}, serveErrorf(http.StatusRequestEntityTooLarge, codeSizeInvalid, "blob is too large")
	}
	if n >= 0 {
		limit = u.size + n
	}
	h := x.takeHash(x.upload, u.size, alg)
	before := u.size
	err := u.append(x.r.Context(), x.body(math.MaxInt64), h.hash, limit)
	if err == nil && n >= 0 && u.size != before+n {
		err = serveErrorf(http.StatusBadRequest, codeSizeInvalid, "body has %d bytes, not %d", u.size-before, n)
	}
	h.size = u.size
	return h, err
}

// patchUpload serves PATCH: the next bytes of an upload.
func (x *exchange) patchUpload() error {
	return x.withUpload(func(u *incoming) (bool, error) {
		h, err := x.chunk(u, digest.SHA256)
		x.uploadHeaders(x.upload, u.size)
		if err != nil {
			return false, err
		}
		x.keepHash(x.upload, h)
		// Before the answer, so that the next request finds the upload free.
		if err := u.close(); err != nil {
			return true, err
		}
		return true, x.empty(http.StatusAccepted)
	})
}

// putUpload serves PUT: the last bytes of an upload, which may be all or none. On success and after
// a wrong digest the upload is gone. After any other failure it stays.
func (x *exchange) putUpload() error {
	d, err := x.queryDigest("digest")
	if err == nil && d == "" {
		err = serveErrorf(http.StatusBadRequest, codeDigestInvalid, "the digest parameter is missing")
	}
	if err != nil {
		return err
	}
	return x.withUpload(func(u *incoming) (bool, error) {
		h, err := x.chunk(u, d.Algorithm())
		if err != nil {
			x.uploadHeaders(x.upload, u.size)
			return false, err
		}
		verified := h.alg != ""
		if verified {
			if got := hashedDigest(h.alg, h.hash); got != d {
				err = fmt.Errorf("%w: bytes hash to %s, want %s", ErrDigestMismatch, got, d)
			}
		}
		if err == nil {
			err = u.finish(x.r.Context(), x.repo.name, d, verified)
		}
		switch {
		case err == nil:
			return true, x.created(d)
		case errors.Is(err, ErrDigestMismatch):
			return true, errors.Join(err, u.remove())
		}
		return false, err
	})
}
