package ocilocal

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// reference returns the tag or digest in the path.
func (x *exchange) reference() string {
	if x.tag != "" {
		return x.tag
	}
	return string(x.digest)
}

// getManifest serves GET and HEAD of a manifest. HEAD and a request with a matching If-None-Match
// read only the index. A GET has the whole manifest in memory, verified, before it answers, so
// damage is a 500, or is healed: see [exchange.heals]. Accept is ignored: manifests are never
// converted, so there is nothing to choose.
func (x *exchange) getManifest() error {
	desc, raw, err := x.resolve()
	if err != nil {
		return err
	}
	if x.unchanged(desc.Digest) {
		return nil
	}
	if x.r.Method == "HEAD" {
		x.describe(desc.Digest, desc.MediaType, desc.Size)
		x.w.WriteHeader(http.StatusOK)
		return nil
	}
	if raw == nil {
		if raw, err = x.readManifest(desc); errors.Is(err, ErrNotFound) || x.heals(err) {
			desc, raw, err = x.findManifest()
		}
	}
	if err != nil {
		return damaged(err)
	}
	x.identify(desc.Digest)
	x.respond(http.StatusOK, desc.MediaType, raw)
	return nil
}

// readManifest reads and verifies a manifest that resolve has found. So the repository shows it,
// and the index need not be asked once more. The limit bounds the memory if a damaged index and a
// foreign file agree on a huge size.
func (x *exchange) readManifest(desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > MaxManifestSize {
		return nil, fmt.Errorf("manifest %s: %w: index says that it has %d bytes", desc.Digest, ErrSizeMismatch, desc.Size)
	}
	end, err := x.registry.begin(x.r.Context())
	if err != nil {
		return nil, err
	}
	defer end()
	store := x.registry.blobs
	f, size, err := store.openFile(desc.Digest, desc.Size)
	if errors.Is(err, ErrNotFound) {
		var held foundBlob
		held, err = x.repo.openHeld(desc.Digest)
		f, size = held.file, held.size
	}
	if err != nil {
		return nil, err
	}
	return store.readAll(f, desc.Digest, size)
}

// findManifest is for a GET whose manifest was resolved and not found, or found damaged. The tag
// may have been moved and the manifest collected in between: then a second look answers. If the
// second look finds the same, the file is lost. That is not a 404, by which the client would take
// it for deleted. A mirror fetches a lost or damaged manifest again.
func (x *exchange) findManifest() (ocispec.Descriptor, []byte, error) {
	desc, raw, err := x.resolve()
	if raw != nil || err != nil {
		return desc, raw, err
	}
	raw, err = x.readManifest(desc)
	if x.heals(err) {
		x.noteDamage(desc.Digest, err)
		if _, failed := x.bringManifest(desc.Digest); failed != nil {
			return desc, nil, notHealed(err, failed)
		}
		raw, err = x.readManifest(desc)
	}
	if errors.Is(err, ErrNotFound) {
		err = &damagedError{err}
	}
	return desc, raw, err
}

// putManifest serves PUT of a manifest, by tag or by digest. A tag that points elsewhere is moved,
// as every registry does it. The answer comes after the commit: see [Repository.PutManifest].
//
// A request takes its turn after its body was read, so a slow client does not block the others: see
// [manifestTurns]. It has no parsed document while it waits for an upstream.
func (x *exchange) putManifest() error {
	mediaType := x.r.Header.Get("Content-Type")
	if mediaType != "" {
		var err error
		if mediaType, _, err = mime.ParseMediaType(mediaType); err != nil {
			return serveErrorf(http.StatusBadRequest, codeManifestInvalid, "invalid Content-Type")
		}
	}
	if x.r.ContentLength > MaxManifestSize {
		return tooLargeManifest(int(min(x.r.ContentLength, 1<<30)))
	}
	raw, err := io.ReadAll(x.body(MaxManifestSize))
	if err != nil {
		return err
	}
	turn := x.turns.newTurn()
	defer turn.end()
	parse := func() (*Manifest, error) {
		if err := turn.begin(x.r.Context(), len(raw)); err != nil {
			return nil, err
		}
		return parseManifest(mediaType, raw)
	}
	m, err := parse()
	if err != nil {
		return err
	}
	var lacked map[digest.Digest]bool
	if x.upstream != nil {
		d, needs := cmp.Or(x.digest, m.digest), m.needs()
		m = nil
		turn.end()
		if lacked, err = x.complete(d, needs); err != nil {
			return err
		}
		if m, err = parse(); err != nil {
			return err
		}
	}
	opts := &PutManifestOptions{Tag: x.tag, Digest: x.digest}
	if x.tag != "" {
		opts.Policy = Replace
	}
	u, err := x.repo.putManifest(x.r.Context(), opts, x.precondition(), lacked, func() (*Manifest, error) { return m, nil })
	if errors.Is(err, ErrNotFound) && !errors.Is(err, ErrIncomplete) {
		// A member of the manifest is missing. As ErrNotFound it would be a 404 about the manifest.
		err = errors.Join(ErrIncomplete, err)
	}
	if err != nil {
		return err
	}
	h := x.w.Header()
	h.Set("Location", x.url(x.name+"/manifests/"+string(u.Descriptor.Digest)))
	h.Set("Docker-Content-Digest", string(u.Descriptor.Digest))
	if subject, ok := m.Subject(); ok {
		h.Set("OCI-Subject", string(subject.Digest))
	}
	if m.form == formArtifact {
		h.Set("Warning", `299 - "OCI artifact manifests are not part of image-spec 1.1: many clients can't read them"`)
	}
	return x.empty(http.StatusCreated)
}

// deleteManifest serves DELETE of a tag, or of a manifest with all tags of the repository that
// point at it. Deleting a tag leaves the manifest, held for a while: see [Repository.Untag].
func (x *exchange) deleteManifest() (err error) {
	if x.tag != "" {
		err = x.repo.untag(x.r.Context(), x.tag, x.precondition())
	} else {
		err = x.repo.deleteManifest(x.r.Context(), x.digest, x.precondition())
	}
	if err != nil {
		return err
	}
	return x.empty(http.StatusAccepted)
}

// precondition returns what If-Match and If-None-Match demand of a change (RFC 9110, 13.1). With
// them, a client moves or deletes a tag only if nobody else has moved it since, and creates a tag
// only if there is none. It returns nil without them.
func (x *exchange) precondition() precondition {
	match, none := strings.Join(x.r.Header["If-Match"], ","), strings.Join(x.r.Header["If-None-Match"], ",")
	if match == "" && none == "" {
		return nil
	}
	return func(present digest.Digest) error {
		switch {
		case match != "" && (present == "" || !matchesStrongly(match, present)):
		case none != "" && present != "" && matchesETag(none, present):
		default:
			return nil
		}
		return serveErrorf(http.StatusPreconditionFailed, codeDenied, "the tag or manifest is not what the request expects")
	}
}
