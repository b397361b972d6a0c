package ocilocal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// putManifest pushes a manifest's bytes under a tag or its digest.
func (p *remoteRepo) putManifest(ctx context.Context, reference string, m *Manifest) error {
	res, err := p.writeManifest(ctx, reference, m, nil)
	if err != nil {
		return explainManifest(m, err)
	}
	subject := m.doc.Subject
	// Without this header the registry has no referrers API (distribution-spec, "Pushing Manifests with Subject").
	if subject == nil || res.Header.Get("OCI-Subject") != "" {
		return nil
	}
	if err := p.addReferrer(ctx, subject.Digest, m); err != nil {
		return fmt.Errorf("manifest %s is pushed, but not listed as a referrer of %s: %w", m.Digest(), subject.Digest, err)
	}
	return nil
}

func (p *remoteRepo) writeManifest(ctx context.Context, reference string, m *Manifest, header http.Header) (*http.Response, error) {
	c := &remoteCall{
		method: http.MethodPut, url: p.url("manifests", reference), header: header.Clone(),
		body: bytesBody(m.raw), size: m.Size(), actions: []string{"pull", "push"},
		ok: []int{http.StatusCreated, http.StatusOK, http.StatusAccepted},
	}
	if c.header == nil {
		c.header = http.Header{}
	}
	c.header.Set("Content-Type", m.MediaType())
	res, err := p.do(ctx, c)
	if err != nil {
		return nil, err
	}
	res.Body.Close()
	d, err := headerDigest(res.Header)
	if err == nil && d != "" && d.Algorithm() == m.Digest().Algorithm() && d != m.Digest() {
		err = fmt.Errorf("%w: the registry says it took %s, not %s", ErrDigestMismatch, d, m.Digest())
	}
	if err != nil {
		return nil, answerProblem(c, res, err)
	}
	return res, nil
}

// explainManifest says of a refused artifact manifest what can be done.
func explainManifest(m *Manifest, err error) error {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || m.form != formArtifact || e.has("MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "NAME_INVALID", "TAG_INVALID", "DIGEST_INVALID") {
		return err
	}
	switch e.Status {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusNotAcceptable, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
	case http.StatusInternalServerError: // some registries fail on what they don't know
		if !e.has("MANIFEST_INVALID", "UNSUPPORTED") {
			return err
		}
	default:
		return err
	}
	e.Err = fmt.Errorf("%w: %s (build the artifact with FormatImageManifest, or Convert it): %w", ErrUnsupportedManifest, m.MediaType(), e.Err)
	return err
}

// addReferrer lists m in the referrers tag of its subject, unless it is there.
func (p *remoteRepo) addReferrer(ctx context.Context, subject digest.Digest, m *Manifest) error {
	return p.changeReferrers(ctx, subject, func(list *Manifest) (*Manifest, error) { return withReferrer(list, m) })
}

// removeReferrer takes d out of the referrers tag of its subject, unless the registry has the referrers API
// (distribution-spec, "Deleting Manifests").
func (p *remoteRepo) removeReferrer(ctx context.Context, subject, d digest.Digest) error {
	res, err := p.do(ctx, &remoteCall{
		method: http.MethodGet, url: p.url("referrers", string(subject)), header: http.Header{"Accept": {ocispec.MediaTypeImageIndex}},
		actions: []string{"pull"}, ok: []int{http.StatusOK, http.StatusNotFound, http.StatusMethodNotAllowed},
	})
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.StatusCode == http.StatusOK {
		return nil
	}
	return p.changeReferrers(ctx, subject, func(list *Manifest) (*Manifest, error) { return withoutReferrer(list, d) })
}

// changeReferrers writes what change makes of the referrers tag, unless that is nil. One
// goroutine of a host does so at a time; others are noticed if the registry gives ETags.
func (p *remoteRepo) changeReferrers(ctx context.Context, subject digest.Digest, change func(*Manifest) (*Manifest, error)) error {
	select {
	case p.host.referrers <- struct{}{}:
		defer func() { <-p.host.referrers }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for attempt := 1; ; attempt++ {
		old, etag, err := p.referrersTag(ctx, subject)
		if err != nil {
			return err
		}
		list, err := change(old)
		if err != nil || list == nil {
			return err
		}
		header := http.Header{}
		if etag != "" {
			header.Set("If-Match", etag)
		}
		_, err = p.writeManifest(ctx, referrersTagName(subject), list, header)
		if e, ok := errors.AsType[*RemoteError](err); ok && e.Status == http.StatusPreconditionFailed && attempt <= maxRetries {
			continue // somebody else has just changed it
		}
		return err
	}
}

// withReferrer returns the list with m in it, nil if it is there already.
func withReferrer(list, m *Manifest) (*Manifest, error) {
	desc := m.Descriptor()
	var others []ocispec.Descriptor
	if list != nil {
		others = list.doc.Manifests
	}
	if slices.ContainsFunc(others, func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest }) {
		return nil, nil
	}
	return referrersList(list, append(slices.Clip(others), ocispec.Descriptor{
		MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size,
		ArtifactType: m.ArtifactType(), Annotations: m.doc.Annotations,
	}))
}

// withoutReferrer returns the list without a manifest, nil if that isn't in it.
func withoutReferrer(list *Manifest, gone digest.Digest) (*Manifest, error) {
	if list == nil {
		return nil, nil
	}
	others := slices.DeleteFunc(slices.Clone(list.doc.Manifests), func(d ocispec.Descriptor) bool { return d.Digest == gone })
	if len(others) == len(list.doc.Manifests) {
		return nil, nil
	}
	return referrersList(list, others)
}

// referrersList returns a list like old, nil for none, of other manifests.
func referrersList(old *Manifest, manifests []ocispec.Descriptor) (*Manifest, error) {
	doc := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests}
	doc.SchemaVersion = 2
	if old != nil {
		doc.Annotations = old.doc.Annotations
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	return parseManifest(ocispec.MediaTypeImageIndex, raw)
}
