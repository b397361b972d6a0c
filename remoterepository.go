package ocilocal

import (
	"context"
	"fmt"
	"iter"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A RemoteRepository is one repository of a remote registry, for calls that need no tag. It is safe
// for concurrent use.
type RemoteRepository struct {
	remote *Remote
	ref    Reference // with the default tag, which is not used
}

// Repository returns the repository of a name such as "ghcr.io/org/model", by [ParseReference]'s
// rules. Nothing is asked. Errors: [ErrInvalidReference], also for a name with a tag or digest.
func (r *Remote) Repository(name string) (*RemoteRepository, error) {
	ref, err := ParseReference(name)
	if err == nil {
		if tagged, bad := ParseReference(name + ":" + defaultTag); bad != nil || ref != tagged {
			err = fmt.Errorf("%w: %s is not the name of a repository", ErrInvalidReference, printable(name))
		}
	}
	if err != nil {
		return nil, opError("name a repository", name, "", err)
	}
	return &RemoteRepository{remote: r, ref: ref}, nil
}

// Name returns the repository's name in canonical form: "docker.io/library/alpine".
func (p *RemoteRepository) Name() string { return p.ref.Name() }

// Tags is [Remote.Tags] of the repository.
func (p *RemoteRepository) Tags(ctx context.Context) iter.Seq2[string, error] {
	return p.remote.Tags(ctx, p.ref)
}

// Referrers is [Remote.Referrers] of a digest in the repository. [ErrInvalidDigest] is yielded for
// a bad one.
func (p *RemoteRepository) Referrers(ctx context.Context, subject digest.Digest, artifactType string) iter.Seq2[ocispec.Descriptor, error] {
	ref, err := p.ref.WithDigest(subject)
	if err != nil {
		return func(yield func(ocispec.Descriptor, error) bool) {
			yield(ocispec.Descriptor{}, opError("list referrers of", p.Name(), "", err))
		}
	}
	return p.remote.Referrers(ctx, ref, artifactType)
}

// Delete is [Remote.Delete] of a manifest in the repository with all tags that point at it.
// [ErrInvalidDigest] is returned for a bad digest.
func (p *RemoteRepository) Delete(ctx context.Context, d digest.Digest) error {
	ref, err := p.ref.WithDigest(d)
	if err != nil {
		return opError("delete remotely", p.Name(), "", err)
	}
	return p.remote.Delete(ctx, ref)
}
