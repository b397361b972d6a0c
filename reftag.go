package ocilocal

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// Tag points ref at a manifest that the registry has, and checks that everything that it needs is
// there. It returns the outcome for the ref.
//
// Errors:
//   - [ErrNotFound]: the registry does not have d
//   - [*ConflictError], together with the outcome [Conflicted]
//   - [ErrIncomplete]: content that the artifact needs is missing
//   - [ErrDigestMismatch]: ref names a digest other than d
//   - [ErrInvalidReference], [ErrInvalidDigest]
//   - [ErrReadOnly], [ErrBusy], and any error from the file system
func (r *LocalRegistry) Tag(ctx context.Context, d digest.Digest, ref Reference, opts *PublishOptions) (u RefUpdate, err error) {
	defer addOp(&err, "tag", ref.String(), d)
	end, err := r.begin(ctx)
	if err != nil {
		return u, err
	}
	defer end()
	return r.tag(ctx, d, ref, opts)
}

// tag is Tag within a call that has begun. Repair uses it too. After an error it returns a zero
// update, except for a conflict.
func (r *LocalRegistry) tag(ctx context.Context, d digest.Digest, ref Reference, opts *PublishOptions) (u RefUpdate, err error) {
	if err := checkDigest(d); err != nil {
		return u, err
	}
	if err := ref.checkGiven(); err != nil {
		return u, err
	}
	if pin := ref.Digest(); pin != "" && pin != d {
		return u, fmt.Errorf("%w: %s names another digest", ErrDigestMismatch, ref)
	}
	var o PublishOptions
	if opts != nil {
		o = *opts
	}
	err = r.write(ctx, func(tx *indexTx) (err error) {
		u, err = r.tagIn(ctx, tx, d, ref, o)
		return err
	})
	if err != nil && u.Outcome != Conflicted {
		u = RefUpdate{}
	}
	return u, err
}

// tagIn is the part of tag that is done in a transaction. [Repository.Tag] calls it in one of its
// own. Everything that the decision rests on is read here: the manifest's row, the ref and the
// files. A collection could otherwise delete the artifact between the check and the write.
func (r *LocalRegistry) tagIn(ctx context.Context, tx *indexTx, d digest.Digest, ref Reference, o PublishOptions) (u RefUpdate, err error) {
	desc, ok, err := tx.manifest(d)
	if err != nil {
		return u, err
	}
	if !ok {
		return u, ErrNotFound
	}
	name, reference := ref.key()
	existing, err := tx.ref(name, reference)
	if err != nil {
		return u, err
	}
	u = RefUpdate{Reference: ref, Descriptor: desc, Existing: existing, Outcome: o.outcome(existing, d)}
	if u.Outcome == Conflicted {
		return u, u.conflict(o.Expected)
	}
	if err := r.checkClosure(ctx, tx, nil, desc); err != nil || u.Outcome == Unchanged {
		return u, err
	}
	// The platform and the annotations of another ref describe the same manifest.
	entry, err := entryOf(tx, d)
	if err == nil {
		entry, err = withoutNames(entry)
	}
	if err != nil {
		return u, err
	}
	return u, putNamed(tx, name, reference, desc, entry, time.Now())
}

// Remove deletes a ref and returns it with the descriptor of its manifest. A ref with a tag and a
// digest is deleted only if the tag points at that digest. The artifact stays until it is
// collected. Until then [LocalRegistry.Tag] can restore the ref. An artifact whose subject is kept
// is not collected, because it is a referrer: [Repository.DeleteManifest] deletes it.
//
// Errors:
//   - [ErrNotFound]: there is no such ref, or it points at another digest
//   - [ErrInvalidReference]: ref is zero
//   - [ErrReadOnly], [ErrBusy], and any error from ctx
func (r *LocalRegistry) Remove(ctx context.Context, ref Reference) (removed Ref, err error) {
	defer addOp(&err, "remove", ref.String(), "")
	end, err := r.begin(ctx)
	if err != nil {
		return removed, err
	}
	defer end()
	if err := ref.checkGiven(); err != nil {
		return removed, err
	}
	err = r.write(ctx, func(tx *indexTx) error {
		name, reference := ref.key()
		desc, updated, ok, err := tx.resolved(name, reference)
		if err != nil {
			return err
		}
		if !ok || ref.Digest() != "" && ref.Digest() != desc.Digest {
			return ErrNotFound
		}
		removed = Ref{Reference: ref, Descriptor: desc, Updated: updated}
		return tx.deleteRef(name, reference)
	})
	if err != nil {
		return Ref{}, err
	}
	return removed, nil
}
