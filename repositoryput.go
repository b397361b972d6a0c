package ocilocal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PutBlob copies src to its end into the repository and returns the descriptor, with the media type
// application/octet-stream. The bytes must hash to want, unless that is empty: then the digest is
// SHA-256. There must be size bytes, unless that is −1. Memory does not grow with the blob.
//
// When PutBlob returns nil, every process can read the blob. It is held for [GCOptions.Held]; a
// manifest of the repository that needs it keeps it for longer. It becomes durable with that
// manifest: see [Repository.PutManifest]. So a power cut may lose a held blob, and the client must
// put it again. Putting a blob that is there already is harmless.
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

// Mount puts a blob into the repository that another one shows. If the file system has hard links,
// the blob is not copied. It is read once, unless this handle has verified it. If from is nil, any
// blob of the registry can be mounted. Everybody who may call Mount so, and knows a digest, then
// gets the content.
//
// Errors:
//   - [ErrNotFound]: the blob does not exist, or it is damaged
//   - [ErrInvalidDigest], [ErrReadOnly], and any error from ctx or the file system
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
		name, size, err = from.locate(ctx, d)
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
	// Expected of PublishOptions. Without a tag it is put by digest.
	Tag string
	// Digest, if not empty, is the digest that the bytes must have. It also chooses the algorithm,
	// which is SHA-256 otherwise.
	Digest digest.Digest
	PublishOptions
}

// PutManifest publishes the bytes of a manifest or image index. Everything that it needs must be in
// the repository: see [Repository.PutBlob]. Two things may be absent: layers that need not be
// distributed, and absent members of an image index that the repository has already. When
// PutManifest returns nil, the manifest and all its content are durable. mediaType is that of
// [ParseManifest], which says which documents are accepted.
//
// The repository holds a manifest that has no tag, because it was put by digest, or because its tag
// was moved or deleted. It is kept for [GCOptions.Held], as long as its subject is kept, and as
// long as an image index in the repository needs it. [Repository.Tag] with its digest keeps it for
// good. Putting a manifest that is there already is harmless.
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
func (p *Repository) PutManifest(ctx context.Context, mediaType string, raw []byte, opts *PutManifestOptions) (RefUpdate, error) {
	return p.putManifest(ctx, opts, nil, nil, func() (*Manifest, error) {
		if len(raw) > MaxManifestSize { // before the copy
			return nil, tooLargeManifest(len(raw))
		}
		return parseManifest(mediaType, bytes.Clone(raw))
	})
}

// putManifest is PutManifest of the manifest that parse returns. It may change the digest of that.
// lacked are members, of it or below it, that may be absent: see [exchange.complete].
func (p *Repository) putManifest(ctx context.Context, opts *PutManifestOptions, may precondition, lacked map[digest.Digest]bool, parse func() (*Manifest, error)) (u RefUpdate, err error) {
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
	m, err := parse()
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
	absent, err := p.takeChildren(ctx, st, m, lacked)
	if err != nil {
		return u, err
	}
	if _, err := st.putBytes(ctx, m.raw, m.digest.Algorithm()); err != nil {
		return u, err
	}
	pub := onlyManifest(ref, m, o.PublishOptions)
	pub.absent = absent
	pub.also = func(tx *indexTx, existing digest.Digest) error {
		err := p.ask(tx, may, o.Tag, m.digest)
		if err == nil {
			err = p.holdReplaced(tx, existing, m.digest)
		}
		if err != nil {
			return err
		}
		return p.registry.checkMemberRows(ctx, tx, m, absent)
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

// A precondition decides, in the transaction of a change, whether the change may be made. present
// is the digest at which the tag points, or the digest that is put or deleted. It is "" if the
// repository has no such tag or manifest. Nil allows every change.
type precondition func(present digest.Digest) error

// ask asks a precondition about a tag, or about the manifest d if tag is empty.
func (p *Repository) ask(tx *indexTx, may precondition, tag string, d digest.Digest) (err error) {
	if may == nil {
		return nil
	}
	if tag != "" {
		d, err = tx.ref(p.name, tag)
	} else if _, err = p.manifest(tx, d); errors.Is(err, ErrNotFound) {
		d, err = "", nil
	}
	if err != nil {
		return err
	}
	return may(d)
}

// holdReplaced holds the manifest from which a tag is about to be moved, in the transaction that
// moves it. A client that has resolved the old tag can still pull its manifest by digest. from is ""
// for a tag that is new.
func (p *Repository) holdReplaced(tx *indexTx, from, to digest.Digest) error {
	if from == "" || from == to {
		return nil
	}
	return tx.setHold(p.name, from, time.Now())
}

// takeChildren checks that the repository shows everything that a manifest needs, and takes held
// blobs into the stage, so that the publish makes them durable. Other content must be published in
// the repository: then it is durable already, and the publish checks again that it is there.
//
// A manifest may only name content of this repository. Otherwise a client that knows a digest could
// put a manifest with it, and read the content of another repository.
//
// The result is the members of an image index that may be absent: those in lacked, and those that
// are recorded as absent, if the repository has this index already. Then a put adds no claim, and
// is what Tag would be. A new index may not name them: a client that has not put a member may have
// forgotten it. A mirror may fetch a member at any time. So the first question is whether it is
// absent, and the second one whether it is here: in the other order, both answers could be no.
func (p *Repository) takeChildren(ctx context.Context, st *stage, m *Manifest, lacked map[digest.Digest]bool) (absent map[digest.Digest]bool, err error) {
	seen := map[digest.Digest]bool{}
	absent = map[digest.Digest]bool{}
	maps.Copy(absent, lacked)
	known := false
	if m.IsIndex() {
		if known, err = p.has(m.digest); err != nil {
			return nil, err
		}
	}
	for i, c := range m.children() {
		if seen[c.Digest] {
			continue
		}
		seen[c.Digest] = true
		if m.childRole(i) == roleManifest {
			if known && !absent[c.Digest] {
				if absent[c.Digest], err = isAbsent(p.registry.index, c.Digest, roleManifest); err != nil {
					return nil, err
				}
			}
			if absent[c.Digest] {
				continue
			}
			here, err := p.has(c.Digest)
			if err == nil && !here {
				err = missing(c.Digest)
			}
			if err != nil {
				return nil, err
			}
			continue
		}
		err := st.takeHeld(ctx, p.name, c.Digest)
		if !errors.Is(err, ErrNotFound) {
			if err == nil {
				err = sizeAs(st, c)
			}
			if err != nil {
				return nil, err
			}
			continue
		}
		ok, err := p.shows(p.registry.index, c.Digest)
		if err == nil && ok {
			// Its file may be here although its row says that it is absent, and need not be durable.
			var absent bool
			if absent, err = isAbsent(p.registry.index, c.Digest, m.childRole(i)); absent && err == nil {
				_, err = st.reuse(ctx, c.Digest, c.Size)
			}
		}
		if err == nil && !ok && foreignLayer(c.MediaType) {
			// It may be absent. But if another repository has it, it must not be shown here because
			// a manifest names it.
			if ok, err = p.registry.blobs.present(c.Digest); err == nil && !ok {
				continue
			}
			ok = false
		}
		if err == nil && !ok {
			err = missing(c.Digest)
		}
		if err != nil {
			return nil, err
		}
	}
	return absent, p.registry.checkMembers(ctx, m, absent)
}

// has reports whether the repository shows a manifest.
func (p *Repository) has(d digest.Digest) (bool, error) {
	_, err := p.manifest(p.registry.index, d)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// missing is the error for content that a manifest needs and that the repository does not have. The
// text reaches clients of the handler, which do not know the name of the repository.
func missing(d digest.Digest) error {
	return fmt.Errorf("%w: %s: %w", ErrIncomplete, d, ErrNotFound)
}

// sizeAs returns an [ErrSizeMismatch] if a staged blob does not have the size in its descriptor.
func sizeAs(st *stage, desc ocispec.Descriptor) error {
	if n, ok := st.size(desc.Digest); ok && n != desc.Size {
		return fmt.Errorf("blob %s: %w: has %d bytes, the manifest says %d", desc.Digest, ErrSizeMismatch, n, desc.Size)
	}
	return nil
}

// Push puts a manifest by its digest, if desc has the media type of one, and otherwise a blob.
// Pushing content that is there already is harmless. A manifest must be pushed after everything
// that it needs.
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

// readPushed reads a manifest that must have the size in its descriptor. The size is checked before
// anything is read, and the read is bounded, because the caller's size may be wrong.
func readPushed(ctx context.Context, desc ocispec.Descriptor, src io.Reader) ([]byte, error) {
	if desc.Size > MaxManifestSize {
		return nil, fmt.Errorf("%w: manifest has %d bytes, the limit is %d", ErrTooLarge, desc.Size, MaxManifestSize)
	}
	raw, err := io.ReadAll(io.LimitReader(&ctxReader{ctx, src}, MaxManifestSize+1))
	if err == nil && int64(len(raw)) != desc.Size {
		err = fmt.Errorf("%w: %d bytes, want %d", ErrSizeMismatch, len(raw), desc.Size)
	}
	return raw, err
}
