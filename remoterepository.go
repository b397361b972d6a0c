package ocilocal

import (
	"context"
	"fmt"
	"iter"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A RemoteRepository is a repository of a remote registry, for calls that need no tag. It is safe
// for concurrent use.
type RemoteRepository struct {
	remote *Remote
	ref    Reference // with the default tag, which is not used
}

// Repository returns the repository of a name such as "ghcr.io/org/model". The rules are those of
// [ParseReference]. It makes no request. The error is [ErrInvalidReference], also for a name with a
// tag or a digest.
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

// Tags lists the tags of the repository, as [Remote.Tags] does. Its errors are those of
// [Remote.Tags].
func (p *RemoteRepository) Tags(ctx context.Context) iter.Seq2[string, error] {
	return p.remote.Tags(ctx, p.ref)
}

// Referrers lists the referrers of a digest in the repository, as [Remote.Referrers] does, with its
// errors. It yields [ErrInvalidDigest] for a malformed digest.
func (p *RemoteRepository) Referrers(ctx context.Context, subject digest.Digest, artifactType string) iter.Seq2[ocispec.Descriptor, error] {
	ref, err := p.ref.WithDigest(subject)
	if err != nil {
		return func(yield func(ocispec.Descriptor, error) bool) {
			yield(ocispec.Descriptor{}, opError("list referrers of", p.Name(), "", err))
		}
	}
	return p.remote.Referrers(ctx, ref, artifactType)
}

// Delete deletes a manifest of the repository with all tags that point at it, as [Remote.Delete]
// does, with its errors. It returns [ErrInvalidDigest] for a malformed digest.
func (p *RemoteRepository) Delete(ctx context.Context, d digest.Digest) error {
	ref, err := p.ref.WithDigest(d)
	if err != nil {
		return opError("delete remotely", p.Name(), "", err)
	}
	return p.remote.Delete(ctx, ref)
}
