package ocilocal

import (
	"context"
	"iter"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ReferrersOptions choose referrers. Nil and the zero value choose all.
type ReferrersOptions struct {
	// ArtifactType, if not empty, is the artifact type to list.
	ArtifactType string
	// After, if not empty, starts the listing after that digest, whether or not it exists. So the
	// last digest of a page begins the next.
	After digest.Digest
	// Limit, if positive, is the largest number of referrers to list.
	Limit int
}

// MaxReferrers is the largest number of referrers that a push, a pull or a copy transfers with an
// artifact. If there are more, it fails with [ErrTooLarge].
const MaxReferrers = 1000

// Referrers lists the manifests whose subject has the given digest, in the order of their own
// digests, by the index alone. The subject itself need not be in the registry. A referrer without a
// ref is listed until it is collected.
//
// The descriptors are those of the referrers API (distribution-spec, "Listing Referrers"): media
// type, digest, size, artifact type and the manifest's annotations. For an image manifest without
// an artifact type, the media type of its config is used.
//
// Referrers reads in pages, as [LocalRegistry.Refs] does. An error is yielded once, at the end.
//
// Errors: [ErrInvalidDigest], [ErrCorruptIndex], [ErrIndexIO], and any error from ctx.
func (r *LocalRegistry) Referrers(ctx context.Context, subject digest.Digest, opts *ReferrersOptions) iter.Seq2[ocispec.Descriptor, error] {
	var o ReferrersOptions
	if opts != nil {
		o = *opts
	}
	return inPages(o.Limit, referrersPage, func(last *ocispec.Descriptor, n int) ([]ocispec.Descriptor, error) {
		from := o.After
		if last != nil {
			from = last.Digest
		}
		page, err := r.referrers(ctx, subject, o.ArtifactType, from, n)
		return page, opError("list referrers of", "", subject, err)
	})
}

// referrersPage is small because each row comes with all of a manifest's annotations.
const referrersPage = 32

// referrers reads one page: at most n referrers after the digest after.
func (r *LocalRegistry) referrers(ctx context.Context, subject digest.Digest, artifactType string, after digest.Digest, n int) ([]ocispec.Descriptor, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := checkDigest(subject); err != nil {
		return nil, err
	}
	return r.index.referrers(subject, artifactType, after, n)
}
