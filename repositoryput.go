package ocilocal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PutBlob copies src to its end into the repository and returns the descriptor, with the media type
// application/octet-stream. The bytes must hash to want, unless that is empty: then the digest is
// SHA-256. There must be size bytes, unless that is −1. Memory does not grow with the blob.
//
// The blob is there for every process when PutBlob returns nil, and stays until a manifest of the
// repository needs it, but at least for [GCOptions.Held]. It is durable with that manifest: see
// [Repository.PutManifest]. Putting a blob that is there is harmless.
//
// Errors:
//   - [ErrDigestMismatch], [ErrSizeMismatch]: src has other bytes
//   - [ErrInvalidDigest]
//   - [ErrReadOnly], [ErrNoSpace], and any error from ctx, src or the file system
func (p *Repository) PutBlob(ctx context.Context, src io.Reader, want digest.Digest, size int64) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "put blob into", p.name, want)
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	if err := p.registry.checkBound(); err != nil {
		return ocispec.Descriptor{}, err
	}
	return p.registry.blobs.holdNew(ctx, p.name, src, digest.SHA256, want, size)
}

// Mount puts a blob into the repository that another one shows, without copying it where the file
// system has hard links. If from is nil, any blob of the registry is taken: whoever knows a digest
// then gets the content.
//
// Errors: [ErrNotFound], [ErrInvalidDigest], [ErrReadOnly], and any error from ctx or the file
// system.
func (p *Repository) Mount(ctx context.Context, d digest.Digest, from *Repository) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "mount blob in", p.name, d)
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	store := p.registry.blobs
	var name string
	var size int64
	if from != nil {
		name, size, err = from.locate(d)
	} else if size, err = store.size(d); err == nil {
		name = blobPath(d)
	} else if errors.Is(err, ErrNotFound) {
		name, size, err = store.heldAnywhere(ctx, d)
	}
	if err == nil {
		err = store.holdLink(ctx, p.name, name, d)
	}
	if err != nil {
		return ocispec.Descriptor{}, notHeld(d, err)
	}
	return ocispec.Descriptor{MediaType: mediaTypeBlob, Digest: d, Size: size}, nil
}

// PutManifestOptions say how a manifest is put. Nil is the zero value.
type PutManifestOptions struct {
	// Tag, if not empty, is the tag under which the manifest is published, by the Policy and
	// Expected of PublishOptions. Without one it is put by digest.
	Tag string
	// Digest, if not empty, is what the bytes must hash to. It chooses the algorithm, which is
	// SHA-256 otherwise.
	Digest digest.Digest
	PublishOptions
}

// PutManifest publishes the bytes of a manifest or image index. All that it needs must be in the
// repository: see [Repository.PutBlob]. When it returns nil, the manifest and all its content are
// durable. mediaType is as for [ParseManifest], which says what is accepted.
//
// A manifest without a tag is held by the repository: if it is put by digest, and when its tag is
// moved or deleted. It stays for [GCOptions.Held], as long as its subject, and as long as an image
// index in the repository needs it. [Repository.Tag] with its digest keeps it for good. Putting one
// that is there is harmless.
//
// Errors:
//   - [ErrIncomplete]: a config, layer or manifest that it needs is not in the repository
//   - [*ConflictError], together with the outcome [Conflicted]
//   - [ErrDigestMismatch], [ErrInvalidDigest]: see PutManifestOptions.Digest
//   - [ErrInvalidReference]: the tag is not one
//   - [ErrInvalidArgument]: PublishOptions are set without a tag
//   - [ErrArtifactType]: see [Options.ArtifactTypes]
//   - those of [ParseManifest]
//   - [ErrReadOnly], [ErrBusy], [ErrNoSpace], and any error from ctx or the file system
func (p *Repository) PutManifest(ctx context.Context, mediaType string, raw []byte, opts *PutManifestOptions) (u RefUpdate, err error) {
	var o PutManifestOptions
	if opts != nil {
		o = *opts
	}
	defer addOp(&err, "put manifest into", p.name, o.Digest)
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return u, err
	}
	defer end()
	if len(raw) > MaxManifestSize { // before the copy
		return u, tooLargeManifest(len(raw))
	}
	m, err := parseManifest(mediaType, bytes.Clone(raw))
	if err != nil {
		return u, err
	}
	if o.Digest != "" {
		if err := checkDigest(o.Digest); err != nil {
			return u, err
		}
		if got := digestOf(o.Digest.Algorithm(), m.raw); got != o.Digest {
			return u, fmt.Errorf("%w: bytes hash to %s, want %s", ErrDigestMismatch, got, o.Digest)
		}
		m.digest = o.Digest
	}
	var ref Reference
	switch {
	case o.Tag != "":
		if ref, err = p.tag(o.Tag); err != nil {
			return u, err
		}
	case o.PublishOptions != (PublishOptions{}):
		return u, fmt.Errorf("%w: PutManifestOptions.PublishOptions is set without a tag", ErrInvalidArgument)
	}
	st := p.registry.blobs.newStage()
	defer func() { p.registry.logDiscard(st.discard()) }()
	if err := p.takeChildren(ctx, st, m); err != nil {
		return u, err
	}
	if _, err := st.putBytes(ctx, m.raw, m.digest.Algorithm()); err != nil {
		return u, err
	}
	pub := onlyManifest(ref, m, o.PublishOptions)
	pub.also = func(tx *indexTx) error {
		if err := p.holdReplaced(tx, ref, m.digest); err != nil {
			return err
		}
		return p.registry.checkMemberRows(ctx, tx, m)
	}
	if o.Tag == "" {
		pub.hold = p.name
	}
	updates, err := p.registry.publish(ctx, st, []publication{pub})
	if err != nil {
		return u, err
	}
	return updates[0], updates[0].conflict(o.Expected)
}

// holdReplaced holds the manifest that a tag is about to be moved from.
func (p *Repository) holdReplaced(tx *indexTx, ref Reference, to digest.Digest) error {
	if ref.IsZero() {
		return nil
	}
	from, err := tx.ref(ref.key())
	if err != nil || from == "" || from == to {
		return err
	}
	return tx.setHold(p.name, from, time.Now())
}

// takeChildren takes what a manifest needs into the stage where it is held. The rest must be
// published in the repository: then it is durable, and the publish looks again that it is there.
func (p *Repository) takeChildren(ctx context.Context, st *stage, m *Manifest) error {
	seen := map[digest.Digest]bool{}
	for i, c := range m.children() {
		if seen[c.Digest] {
			continue
		}
		seen[c.Digest] = true
		if m.childRole(i) == roleManifest {
			if _, err := p.manifest(p.registry.index, c.Digest); err != nil {
				return incomplete(err)
			}
			continue
		}
		err := st.takeHeld(ctx, p.name, c.Digest)
		if !errors.Is(err, ErrNotFound) {
			if err == nil {
				err = sizeAs(st, c)
			}
			if err != nil {
				return err
			}
			continue
		}
		ok, err := p.shows(p.registry.index, c.Digest)
		if err == nil && !ok && foreignLayer(c.MediaType) {
			// It may be absent. But what another repository has must not be shown here because a
			// manifest names it.
			if ok, err = p.registry.blobs.present(c.Digest); err == nil && !ok {
				continue
			}
			ok = false
		}
		if err == nil && !ok {
			err = fmt.Errorf("%w: %s in %s: %w", ErrIncomplete, c.Digest, p.name, ErrNotFound)
		}
		if err != nil {
			return err
		}
	}
	return p.registry.checkMembers(ctx, m)
}

// sizeAs returns an [ErrSizeMismatch] if a staged blob has another size than its descriptor says.
func sizeAs(st *stage, desc ocispec.Descriptor) error {
	if n, ok := st.size(desc.Digest); ok && n != desc.Size {
		return fmt.Errorf("blob %s: %w: has %d bytes, the manifest says %d", desc.Digest, ErrSizeMismatch, n, desc.Size)
	}
	return nil
}

// Push puts a manifest by its digest, if the media type is one of a manifest, and otherwise a blob.
// Pushing what is there is harmless. A manifest comes after all that it needs.
//
// Errors are those of [Repository.PutManifest] and [Repository.PutBlob].
func (p *Repository) Push(ctx context.Context, desc ocispec.Descriptor, src io.Reader) error {
	if formOf(desc.MediaType) == 0 {
		_, err := p.PutBlob(ctx, src, desc.Digest, desc.Size)
		return err
	}
	raw, err := readPushed(ctx, desc, src)
	if err != nil {
		return opError("push to", p.name, desc.Digest, err)
	}
	_, err = p.PutManifest(ctx, desc.MediaType, raw, &PutManifestOptions{Digest: desc.Digest})
	return err
}

// readPushed reads a manifest of the size that its descriptor says.
func readPushed(ctx context.Context, desc ocispec.Descriptor, src io.Reader) ([]byte, error) {
	if desc.Size > MaxManifestSize {
		return nil, fmt.Errorf("%w: manifest of %d bytes, at most %d are taken", ErrTooLarge, desc.Size, MaxManifestSize)
	}
	raw, err := io.ReadAll(io.LimitReader(&ctxReader{ctx, src}, MaxManifestSize+1))
	if err == nil && int64(len(raw)) != desc.Size {
		err = fmt.Errorf("%w: %d bytes, want %d", ErrSizeMismatch, len(raw), desc.Size)
	}
	return raw, err
}
