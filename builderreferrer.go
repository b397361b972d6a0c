package ocilocal

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// NewReferrerBuilder starts an artifact without a name that refers to subject, such as a signature or a bill of
// materials: subject is its subject. Build publishes it by digest, and [LocalRegistry.Referrers] lists it. The subject need
// not be here.
//
// Referrers have no refs, so a collection deletes them unless [GCOptions.KeepReferrers] is set. To push one, push its
// subject with [PushOptions.Referrers], or the reference that [Reference.WithDigest] makes of the
// subject's name and the digest of the referrer.
//
// Errors: those of [LocalRegistry.NewBuilder] and [Builder.SetSubject]; [ErrInvalidArgument] if
// PublishOptions are set, as there is no ref that they could be about.
func (r *LocalRegistry) NewReferrerBuilder(subject ocispec.Descriptor, opts *BuilderOptions) (*Builder, error) {
	b, err := r.newReferrerBuilder(subject, opts)
	return b, opError("start build of a referrer of", "", subject.Digest, err)
}

func (r *LocalRegistry) newReferrerBuilder(subject ocispec.Descriptor, opts *BuilderOptions) (*Builder, error) {
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
