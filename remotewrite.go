package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// any2xx are the statuses of success. Registries differ in the one that they send, so each is
// accepted. A status that the specification does not name is checked before it counts: see
// [created].
var any2xx = []int{http.StatusOK, http.StatusCreated, http.StatusAccepted, http.StatusNonAuthoritativeInfo, http.StatusNoContent}

// created reports whether an answer says plainly that a manifest or blob was created. A proxy's
// page of 200, for example, does not. After any other success the registry is asked whether it has
// the content.
func created(res *http.Response, d digest.Digest) bool {
	if digest.Digest(res.Header.Get("Docker-Content-Digest")) == d {
		return true
	}
	given, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	return res.StatusCode == http.StatusCreated && given != "text/html"
}

// Tag gives further tags to the manifest that ref names, in its repository, without transferring
// blobs. It overwrites existing tags, and returns the descriptor of the manifest.
//
// Errors are those of [Remote.Manifest], and [ErrInvalidReference] for a malformed tag. Then
// nothing is written.
func (r *Remote) Tag(ctx context.Context, ref Reference, tags ...string) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "tag remotely", ref.String(), "")
	for _, tag := range tags {
		if err := checkTag(tag); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	p, err := r.repo(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m, err := p.manifest(ctx, p.reference(), "")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, tag := range tags {
		if _, err := p.writeManifest(ctx, tag, m); err != nil {
			return ocispec.Descriptor{}, explainManifest(m, err)
		}
	}
	return m.Descriptor(), nil
}

// putManifest pushes the bytes of a manifest under a tag or its digest. If the registry does not
// list referrers itself, the manifest is added to the list of its subject.
func (p *remoteRepo) putManifest(ctx context.Context, reference string, m *Manifest) error {
	res, err := p.writeManifest(ctx, reference, m)
	if err != nil {
		return explainManifest(m, err)
	}
	subject := m.doc.Subject
	// Without this header the registry has no referrers API (distribution-spec, "Pushing Manifests
	// with Subject").
	if subject == nil || res.Header.Get("OCI-Subject") != "" {
		return nil
	}
	if err := p.addReferrer(ctx, subject.Digest, m); err != nil {
		return fmt.Errorf("manifest %s is pushed, but not listed as a referrer of %s: %w", m.Digest(), subject.Digest, err)
	}
	return nil
}

// writeManifest puts a manifest, and returns when the registry has it.
func (p *remoteRepo) writeManifest(ctx context.Context, reference string, m *Manifest) (*http.Response, error) {
	c, res, err := p.sendManifest(ctx, reference, m, nil)
	if err != nil || created(res, m.Digest()) {
		return res, err
	}
	switch got, err := p.head(ctx, reference); {
	case err != nil:
		return nil, err
	case got.Digest != m.Digest():
		return nil, answerProblem(c, res, fmt.Errorf("%w: the registry answered success, and has %s there, not %s", ErrProtocol, got.Digest, m.Digest()))
	}
	return res, nil
}

// sendManifest puts a manifest. header has further fields, such as conditions. Its success only
// means that the answer was a 2xx: [created] says whether the registry then has the manifest.
func (p *remoteRepo) sendManifest(ctx context.Context, reference string, m *Manifest, header http.Header) (*remoteCall, *http.Response, error) {
	c := &remoteCall{
		method: http.MethodPut, url: p.url("manifests", reference), header: header.Clone(),
		body: bytesBody(m.raw), size: m.Size(), actions: []string{"pull", "push"}, ok: any2xx,
	}
	if c.header == nil {
		c.header = http.Header{}
	}
	c.header.Set("Content-Type", m.MediaType())
	res, err := p.do(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	res.Body.Close()
	d, err := headerDigest(res.Header)
	if err == nil && d != "" && d.Algorithm() == m.Digest().Algorithm() && d != m.Digest() {
		err = fmt.Errorf("%w: the registry says it took %s, not %s", ErrDigestMismatch, d, m.Digest())
	}
	if err != nil {
		return nil, nil, answerProblem(c, res, err)
	}
	return c, res, nil
}

// explainManifest explains the refusal of an artifact manifest, and says what the user can do.
// Registries refuse that form with several statuses, so it is recognised by excluding other
// reasons.
func explainManifest(m *Manifest, err error) error {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || m.form != formArtifact || e.unknownBlob() || e.has("NAME_UNKNOWN", "NAME_INVALID", "TAG_INVALID", "DIGEST_INVALID") {
		return err
	}
	switch e.Status {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusNotAcceptable, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
	case http.StatusInternalServerError: // some registries fail on forms that they don't know
		if !e.has("MANIFEST_INVALID", "UNSUPPORTED") {
			return err
		}
	default:
		return err
	}
	e.Err = fmt.Errorf("%w: %s (build the artifact with FormatImageManifest, or Convert it): %w", ErrUnsupportedManifest, m.MediaType(), e.Err)
	return err
}

// unknownBlob reports whether the registry has refused a manifest because it lacks a blob or
// manifest that it needs.
func (e *RemoteError) unknownBlob() bool {
	return slices.Contains([]int{http.StatusBadRequest, http.StatusNotFound, http.StatusUnprocessableEntity}, e.Status) &&
		e.has("MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN")
}
