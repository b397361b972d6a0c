package ocilocal

import (
	"context"
	"fmt"
	"iter"

	"github.com/opencontainers/go-digest"
)

// Parent returns the artifact that is the subject of a. If a has no subject, Parent returns nil and
// no error: a is the first of its line. Both forms of manifest can have subjects, and be subjects.
// The parent's Reference is zero.
//
// Errors:
//   - [*MissingSubjectError], which matches [ErrNotFound]: the subject is not in the registry
//   - [ErrSizeMismatch], [ErrInvalidManifest]: the registry has the subject with another size or
//     media type than a says
//   - those of [LocalArtifact.Manifest] for the manifest of a
func (a *LocalArtifact) Parent(ctx context.Context) (*LocalArtifact, error) {
	p, err := a.parent(ctx)
	return p, opError("find parent of", a.ref.String(), a.desc.Digest, err)
}

// parent is Parent for History, which names the operation itself. The manifest of a is read before
// the call begins, because that read begins another call. The subject is looked up in the
// index only; its bytes are verified when they are read.
func (a *LocalArtifact) parent(ctx context.Context) (*LocalArtifact, error) {
	m, err := a.manifest(ctx)
	if err != nil || m.doc.Subject == nil {
		return nil, err
	}
	subject := *m.doc.Subject
	end, err := a.registry.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	desc, ok, err := a.registry.index.resolveDigest(subject.Digest)
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, &MissingSubjectError{Artifact: a.desc.Digest, Subject: cloneDescriptor(subject)}
	case desc.Size != subject.Size:
		return nil, fmt.Errorf("subject %s: %w: has %d bytes, its descriptor says %d", subject.Digest, ErrSizeMismatch, desc.Size, subject.Size)
	case desc.MediaType != subject.MediaType:
		return nil, fmt.Errorf("subject %s: %w: is a %s, its descriptor says %s", subject.Digest, ErrInvalidManifest, desc.MediaType, printable(subject.MediaType))
	}
	return a.registry.newArtifact(Reference{}, desc, nil), nil
}

// History yields a, its parent, its parent's parent and so on, until one has no subject. ctx
// governs the iteration. An error is yielded once, at the end, with a nil artifact.
//
// Errors:
//   - [*MissingSubjectError]: a parent is not in the registry
//   - [ErrInvalidManifest]: the chain returns to one of its artifacts, which is possible only if
//     the hash function is broken
//   - [ErrTooLarge]: there are more than [MaxClosure] generations
//   - those of [LocalArtifact.Parent]
func (a *LocalArtifact) History(ctx context.Context) iter.Seq2[*LocalArtifact, error] {
	return func(yield func(*LocalArtifact, error) bool) {
		seen := map[digest.Digest]bool{}
		for at := a; at != nil; {
			if !yield(at, nil) {
				return
			}
			seen[at.desc.Digest] = true
			next, err := at.parent(ctx)
			switch {
			case err != nil || next == nil:
			case seen[next.desc.Digest]:
				err = fmt.Errorf("%w: the chain of subjects comes back to %s", ErrInvalidManifest, next.desc.Digest)
			case len(seen) >= MaxClosure:
				err = fmt.Errorf("%w: more than %d generations", ErrTooLarge, MaxClosure)
			}
			if err != nil {
				yield(nil, opError("follow history of", a.ref.String(), at.desc.Digest, err))
				return
			}
			at = next
		}
	}
}
