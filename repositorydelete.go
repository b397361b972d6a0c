package ocilocal

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Untag deletes a tag. The repository still shows the manifest by its digest, for [GCOptions.Held]:
// a client may untag first and delete or tag the digest next. If reference is a digest, Untag
// undoes [Repository.Tag] with that digest.
//
// Errors: [ErrNotFound], [ErrInvalidReference], [ErrReadOnly], [ErrBusy], and any error from ctx.
func (p *Repository) Untag(ctx context.Context, reference string) error {
	return p.untag(ctx, reference, nil)
}

// untag is Untag with a precondition.
func (p *Repository) untag(ctx context.Context, reference string, may precondition) (err error) {
	defer addOp(&err, "untag in "+p.name, reference, "")
	if _, err := p.reference(reference); err != nil {
		return err
	}
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	return p.registry.write(ctx, func(tx *indexTx) error {
		desc, _, ok, err := tx.resolved(p.name, reference)
		if err == nil && !ok {
			err = ErrNotFound
		}
		if err == nil && may != nil {
			err = may(desc.Digest)
		}
		if err != nil {
			return err
		}
		if err := tx.deleteRef(p.name, reference); err != nil {
			return err
		}
		return tx.setHold(p.name, desc.Digest, time.Now())
	})
}

// Delete deletes a manifest, if desc has the media type of one, and otherwise a blob.
//
// Errors are those of [Repository.DeleteManifest] and [Repository.DeleteBlob].
func (p *Repository) Delete(ctx context.Context, desc ocispec.Descriptor) error {
	if formOf(desc.MediaType) != 0 {
		return p.DeleteManifest(ctx, desc.Digest)
	}
	return p.DeleteBlob(ctx, desc.Digest)
}

// DeleteManifest deletes all tags of the repository that point at a manifest, and its hold there.
// The repository no longer shows the manifest. The next collection deletes its bytes, and those
// that only it needs.
//
// A referrer would still be shown and kept because of its subject. So a referrer is collected at
// once: after the transaction that deletes its refs, in a second one. If the process is killed in
// between, the referrer stays, and can be deleted again. Referrers of it in other repositories do
// not stop that: whoever knows the digest can push them.
//
// Errors:
//   - [ErrNotFound]: the repository does not show the manifest
//   - [ErrInUse]: an image index in the repository needs the manifest, or it is a referrer that has
//     referrers there. Nothing was deleted
//   - [ErrInvalidDigest], [ErrReadOnly], [ErrBusy], and any error from ctx or the file system
func (p *Repository) DeleteManifest(ctx context.Context, d digest.Digest) error {
	return p.deleteManifest(ctx, d, nil)
}

// deleteManifest is DeleteManifest with a precondition.
func (p *Repository) deleteManifest(ctx context.Context, d digest.Digest, may precondition) (err error) {
	defer addOp(&err, "delete manifest from", p.name, d)
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	var desc ocispec.Descriptor
	var subject digest.Digest
	err = p.registry.write(ctx, func(tx *indexTx) (err error) {
		if desc, err = p.manifest(tx, d); err == nil && may != nil {
			err = may(d)
		}
		if err != nil {
			return err
		}
		references, err := referencesTo(tx, p.name, d)
		if err != nil {
			return err
		}
		for _, reference := range references {
			if err := tx.deleteRef(p.name, reference); err != nil {
				return err
			}
		}
		if _, err := tx.dropHold(p.name, d); err != nil {
			return err
		}
		needed, err := shown(tx, p.name, d, false, false)
		if err != nil {
			return err
		}
		if needed {
			return fmt.Errorf("%w: an image index of the repository has it", ErrInUse)
		}
		if subject, err = subjectOf(tx, d); err != nil || subject == "" {
			return err
		}
		if still, err := p.showsManifest(tx, d); !still || err != nil {
			return err
		}
		return pointers(ctx, tx, d, true, func(other digest.Digest) error {
			if own, err := p.showsManifest(tx, other); !own || err != nil {
				return err
			}
			return fmt.Errorf("%w: %s refers to it", ErrInUse, other)
		})
	})
	if err != nil || subject == "" {
		return err
	}
	return p.registry.collectOne(ctx, desc)
}

// DeleteBlob deletes a blob that was put into the repository and that no manifest there needs.
// Other repositories that hold the same bytes keep them.
//
// Errors:
//   - [ErrNotFound]: the repository does not show the blob
//   - [ErrInUse]: a manifest in the repository needs it; nothing was deleted
//   - [ErrInvalidDigest], [ErrReadOnly], and any error from ctx, the index or the file system
func (p *Repository) DeleteBlob(ctx context.Context, d digest.Digest) (err error) {
	defer addOp(&err, "delete blob from", p.name, d)
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := checkDigest(d); err != nil {
		return err
	}
	switch needed, err := p.shows(p.registry.index, d); {
	case err != nil:
		return err
	case needed:
		return fmt.Errorf("%w: a manifest of the repository needs it", ErrInUse)
	}
	released, err := p.registry.blobs.releaseHeld(p.name, d)
	if err == nil && !released {
		err = fmt.Errorf("blob %s in %s: %w", d, p.name, ErrNotFound)
	}
	return err
}
