package ocilocal

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// NewReferrerBuilder starts an artifact without a name that refers to subject, such as a signature
// or a bill of materials. The subject need not be in the registry. Build publishes the artifact by
// digest, and [LocalRegistry.Referrers] lists it.
//
// A referrer has no ref. A collection keeps it as long as its subject, unless
// [GCOptions.DropReferrers] is set, and deletes it if nothing keeps the subject. To push a
// referrer, push its subject with [PushOptions.Referrers]. Or push it by its own digest, with the
// reference that [Reference.WithDigest] makes of the subject's name.
//
// Errors:
//   - [ErrInvalidArgument]: PublishOptions are set, but a referrer has no ref to publish
//   - those of [LocalRegistry.NewBuilder] and [Builder.SetSubject]
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
