package ocilocal

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// NewReferrerBuilder starts an artifact without a name that refers to subject, such as a signature
// or a bill of materials. The subject need not be here. Build publishes the artifact by digest, and
// [LocalRegistry.Referrers] lists it.
//
// A referrer has no ref. A collection keeps it as long as its subject, unless
// [GCOptions.DropReferrers] is set, and deletes it if nothing keeps the subject. To push one, push
// its subject with [PushOptions.Referrers], or the reference that [Reference.WithDigest] makes of
// the subject's name and the digest of the referrer.
//
// Errors: those of [LocalRegistry.NewBuilder] and [Builder.SetSubject], and [ErrInvalidArgument] if
// PublishOptions are set, because they are about a ref.
func (r *LocalRegistry) NewReferrerBuilder(subject ocispec.Descriptor, opts *BuilderOptions) (_ *Builder, err error) {
	defer addOp(&err, "start build of a referrer of", "", subject.Digest)
	if opts != nil && opts.PublishOptions != (PublishOptions{}) {
		return nil, fmt.Errorf("%w: BuilderOptions.PublishOptions is set for a referrer, which has no ref", ErrInvalidArgument)
	}
	b, err := r.newBuilder(Reference{}, opts)
	if err != nil {
		return nil, err
	}
	if err := b.SetSubject(subject); err != nil {
		b.Cancel()
		return nil, err
	}
	return b, nil
}
