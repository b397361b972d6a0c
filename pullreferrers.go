package ocilocal

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// pullReferrers fetches the referrers of a pulled artifact, of the manifests that it needs, and of
// these referrers. A list of referrers is a claim: a manifest counts only if its own subject is the
// right one.
//
// It runs after the artifact was published, and publishes each referrer by itself. So a failure
// leaves the artifact and the referrers before it. It returns them with the error.
func (p *puller) pullReferrers(ctx context.Context, result *PullResult) (pulled []ocispec.Descriptor, err error) {
	if p.registry.blobs.readOnly {
		return nil, ErrReadOnly
	}
	needs := p.registry.newClosure()
	if _, err := needs.add(ctx, result.Artifact.Descriptor()); err != nil {
		return nil, incomplete(err)
	}
	subjects := needs.manifests
	seen := map[digest.Digest]bool{}
	for i := 0; i < len(subjects); i++ { // each referrer is added, as a possible subject
		var listed []ocispec.Descriptor
		err := p.repo.referrers(ctx, subjects[i].Digest, "", func(d ocispec.Descriptor) error {
			if !seen[d.Digest] && ofType(d, p.opts.ReferrerTypes) {
				seen[d.Digest] = true
				listed = append(listed, d)
			}
			if len(seen) > MaxReferrers {
				return fmt.Errorf("%w: more than %d referrers of %s", ErrTooLarge, MaxReferrers, p.ref)
			}
			return nil
		})
		if err != nil {
			return pulled, err
		}
		for _, d := range listed {
			got, err := p.pullReferrer(ctx, subjects[i].Digest, d, result)
			if err != nil {
				return pulled, fmt.Errorf("referrer %s: %w", d.Digest, err)
			}
			if got != nil {
				pulled, subjects = append(pulled, *got), append(subjects, *got)
			}
		}
	}
	return pulled, nil
}

// pullReferrer fetches one manifest if its subject is the right one, and returns nil otherwise. It
// also returns nil if the registry does not have the manifest, because lists still name deleted
// manifests. A 404 counts if it has the specification's form, or if the registry answers it twice.
func (p *puller) pullReferrer(ctx context.Context, subject digest.Digest, d ocispec.Descriptor, result *PullResult) (*ocispec.Descriptor, error) {
	if err := checkDigest(d.Digest); err != nil {
		return nil, err
	}
	m, err := p.repo.manifest(ctx, string(d.Digest), d.MediaType)
	absent, certain := p.repo.saysAbsent(err)
	if absent && !certain {
		m, err = p.repo.manifest(ctx, string(d.Digest), d.MediaType)
		absent, _ = p.repo.saysAbsent(err)
	}
	if absent {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s := m.doc.Subject; s == nil || s.Digest != subject {
		return nil, nil
	}
	desc := m.Descriptor()
	im := p.registry.newImporter(&ImportOptions{MaxBytes: p.opts.MaxBytes, one: true})
	defer func() { p.registry.logDiscard(im.stage.discard()) }()
	im.added.Add(p.added)
	im.meter = p.meter
	pubs, _, received, err := p.stageClosure(ctx, im, m)
	if err != nil {
		return nil, err
	}
	p.added = im.added.Load()
	if _, err := p.registry.publish(ctx, im.stage, pubs); err != nil {
		return nil, err
	}
	written, reused, bytes := im.stage.counts()
	result.BlobsWritten += written
	result.BlobsReused += reused
	result.BytesWritten += bytes
	result.BytesReceived += received
	return &desc, nil
}
