package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Repository is a view of one name (registry/repository) in a registry. By it, raw content is
// put, read and deleted as over the distribution API. It is safe for concurrent use. Its registry
// must be open.
//
// It shows three kinds of content: content to which refs of the name lead, content that was put
// into it by digest, and referrers of these that are in the registry without a name. Other content
// of the registry is not found, even if its digest is known: a name must not give access to the
// content of another one.
//
// Its methods Fetch, Exists, Push, Resolve, Tag, Untag, Predecessors, Delete and Tags have the
// signatures of a target of oras-go, so it can be given to oras.Copy and oras.ExtendedCopy.
type Repository struct {
	registry *LocalRegistry
	name     string
}

// Repository returns the view of a name, such as "localhost/org/app" or "ghcr.io/org/app". The name
// is parsed like the part of a reference before the tag: see [ParseReference]. It need not have any
// content yet.
//
// Error: [ErrInvalidReference].
func (r *LocalRegistry) Repository(name string) (*Repository, error) {
	canonical, err := canonicalName(name)
	if err != nil {
		return nil, opError("look at repository", name, "", err)
	}
	return &Repository{registry: r, name: canonical}, nil
}

// Name returns the canonical name, registry and repository.
func (p *Repository) Name() string { return p.name }

// reference returns the Reference of a tag or digest here.
func (p *Repository) reference(tagOrDigest string) (Reference, error) {
	return referenceFromKey(p.name, tagOrDigest)
}

// tag returns the Reference of a tag here.
func (p *Repository) tag(tag string) (Reference, error) {
	if err := checkTag(tag); err != nil {
		return Reference{}, err
	}
	return p.reference(tag)
}

// begin keeps the registry open until end is called.
func (p *Repository) begin(ctx context.Context) (end func(), err error) {
	return p.registry.begin(ctx)
}

// shows reports whether the repository shows the bytes of a published manifest or blob. Held blobs
// are not in the index: see find.
func (p *Repository) shows(q queryer, d digest.Digest) (bool, error) {
	return shown(q, p.name, d, true, true)
}

// showsManifest reports whether the repository shows d as a manifest, which need not be here.
func (p *Repository) showsManifest(q queryer, d digest.Digest) (bool, error) {
	return shown(q, p.name, d, false, true)
}

// find looks for content that the repository shows: below blobs/ by published or, if it was not
// published, below tmp/held/ by held. The published file comes first, because it is synced: a held
// file may be damaged by a power cut. Content that is published and released between the two looks
// is seen by neither. So the last look is at the index again.
//
// Errors: [ErrNotFound], [ErrInvalidDigest], those of published and held, and any error of the index.
func (p *Repository) find(d digest.Digest, published, held func() error) error {
	if err := checkDigest(d); err != nil {
		return err
	}
	ifShown := func() error {
		ok, err := p.shows(p.registry.index, d)
		switch {
		case err != nil:
			return err
		case !ok:
			return ErrNotFound
		}
		return published()
	}
	err := ifShown()
	if errors.Is(err, ErrNotFound) {
		err = held()
	}
	if errors.Is(err, ErrNotFound) {
		err = ifShown()
	}
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("%s in %s: %w", d, p.name, ErrNotFound)
	}
	return err
}

// locate returns the file and size of content that the repository shows. It reads a held file that
// this handle has not verified, and does not find it if it is damaged. A client that hears that the
// blob is here does not put it again, so the damage would stay, and each manifest that needs the
// blob would be refused.
//
// Errors: those of find, and any error from ctx or the file system.
func (p *Repository) locate(ctx context.Context, d digest.Digest) (name string, size int64, err error) {
	store := p.registry.blobs
	err = p.find(d, func() (err error) {
		name = blobPath(d)
		size, err = store.size(d)
		return err
	}, func() error {
		b, err := p.openHeld(d)
		if err != nil {
			return err
		}
		name, size = b.name, b.size
		return notHeld(d, errors.Join(store.ensureVerified(ctx, b.file, b.name, d), b.file.Close()))
	})
	return name, size, err
}

// open opens the file of content that the repository shows. It reads no byte of it, so a held file
// may be damaged.
//
// Errors: those of find, and any error of the file system.
func (p *Repository) open(d digest.Digest) (b foundBlob, err error) {
	err = p.find(d, func() (err error) {
		b.name = blobPath(d)
		b.file, b.size, err = p.registry.blobs.openFile(d, -1)
		return err
	}, func() (err error) {
		b, err = p.openHeld(d)
		return err
	})
	return b, err
}

// openHeld opens the file of content that was not published: see find.
func (p *Repository) openHeld(d digest.Digest) (b foundBlob, err error) {
	store := p.registry.blobs
	if b.name, _, err = store.heldFile(p.name, d); err == nil {
		b.file, b.size, err = store.openNamed(b.name, d, -1)
	}
	return b, err
}

// manifest returns the descriptor of a manifest that the repository shows. With the transaction of
// a write as q, the answer holds until the commit.
func (p *Repository) manifest(q queryer, d digest.Digest) (ocispec.Descriptor, error) {
	if err := checkDigest(d); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, ok, err := shownManifest(q, p.name, d)
	if err == nil && !ok {
		err = fmt.Errorf("manifest %s in %s: %w", d, p.name, ErrNotFound)
	}
	if err != nil { // desc may be of another repository's manifest
		return ocispec.Descriptor{}, err
	}
	return desc, nil
}

// Stat returns the descriptor of a manifest or blob: for a manifest with its media type and
// artifact type, for a blob with the media type application/octet-stream. It reads no content,
// except once of a held blob that another handle has put: a power cut may have damaged that.
//
// Errors: [ErrNotFound], [ErrInvalidDigest], [ErrCorruptIndex], [ErrIndexIO], and any error from
// ctx or the file system.
func (p *Repository) Stat(ctx context.Context, d digest.Digest) (_ ocispec.Descriptor, err error) {
	desc, err := p.StatManifest(ctx, d)
	if errors.Is(err, ErrNotFound) {
		return p.StatBlob(ctx, d)
	}
	return desc, err
}

// StatManifest is Stat for manifests alone.
func (p *Repository) StatManifest(ctx context.Context, d digest.Digest) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "look for manifest in", p.name, d)
	end, err := p.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	return p.manifest(p.registry.index, d)
}

// StatBlob is Stat that returns the descriptor of a blob for a manifest too: in a registry,
// manifests are stored as blobs.
func (p *Repository) StatBlob(ctx context.Context, d digest.Digest) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "look for blob in", p.name, d)
	end, err := p.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	_, size, err := p.locate(ctx, d)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: mediaTypeBlob, Digest: d, Size: size}, nil
}

// Exists reports whether the repository shows content of that digest and size.
//
// Errors are those of [Repository.Stat], except [ErrNotFound].
func (p *Repository) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	got, err := p.StatBlob(ctx, desc.Digest)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil && got.Size == desc.Size, err
}

// Fetch returns a reader of a manifest or blob that verifies size and digest on the way, as
// [LocalRegistry.OpenBlob] does. A Size of −1 is unknown. ctx governs the reads too.
//
// Errors, from the call or from Read: those of [Repository.Stat], [ErrSizeMismatch] and
// [ErrDigestMismatch].
func (p *Repository) Fetch(ctx context.Context, desc ocispec.Descriptor) (_ io.ReadCloser, err error) {
	defer addOp(&err, "fetch from", p.name, desc.Digest)
	end, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	b, err := p.open(desc.Digest)
	if err != nil {
		return nil, err
	}
	if desc.Size >= 0 && b.size != desc.Size {
		b.file.Close()
		return nil, wrongSize(desc.Digest, b.size, desc.Size)
	}
	return p.registry.blobs.verifier(ctx, b.file, desc.Digest, b.size), nil
}

// OpenFile returns a manifest or blob for access at any offset. Its bytes are verified when this
// handle of the registry opens it for the first time.
//
// Errors are those of [Repository.Stat], [ErrSizeMismatch] and [ErrDigestMismatch].
func (p *Repository) OpenFile(ctx context.Context, d digest.Digest) (_ *BlobFile, err error) {
	defer addOp(&err, "open in", p.name, d)
	end, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	b, err := p.open(d)
	if err != nil {
		return nil, err
	}
	if err := p.registry.blobs.ensureVerified(ctx, b.file, b.name, d); err != nil {
		return nil, errors.Join(err, b.file.Close())
	}
	return &BlobFile{f: b.file, size: b.size}, nil
}

// Resolve returns media type, digest and size of the manifest that a tag or digest of the
// repository names. It reads only the index.
//
// Errors: [ErrNotFound], [ErrInvalidReference], [ErrCorruptIndex], [ErrIndexIO], and any error from
// ctx.
func (p *Repository) Resolve(ctx context.Context, reference string) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "resolve in "+p.name, reference, "")
	ref, err := p.reference(reference)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	end, err := p.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	var desc ocispec.Descriptor
	if ref.Digest() != "" {
		desc, err = p.manifest(p.registry.index, ref.Digest())
	} else {
		desc, err = p.registry.resolve(ref)
	}
	return ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, err
}

// Tag points a tag of the repository at a manifest that the repository shows. A tag that points
// elsewhere is moved; [Repository.PutManifest] and [LocalRegistry.Tag] have policies for that. If
// reference is the digest of the manifest, Tag keeps the manifest until [Repository.Untag] or
// [Repository.Delete].
//
// Errors:
//   - [ErrNotFound]: the repository does not show the manifest
//   - [ErrInvalidReference]
//   - [ErrDigestMismatch]: reference is another digest
//   - those of [LocalRegistry.Tag]
func (p *Repository) Tag(ctx context.Context, desc ocispec.Descriptor, reference string) (err error) {
	defer addOp(&err, "tag in "+p.name, reference, desc.Digest)
	ref, err := p.reference(reference)
	if err != nil {
		return err
	}
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	if pin := ref.Digest(); pin != "" && pin != desc.Digest {
		return fmt.Errorf("%w: %s names another digest", ErrDigestMismatch, ref)
	}
	return p.registry.write(ctx, func(tx *indexTx) error {
		if _, err := p.manifest(tx, desc.Digest); err != nil {
			return err
		}
		from, err := tx.ref(ref.key())
		if err == nil {
			err = p.holdReplaced(tx, from, desc.Digest)
		}
		if err != nil {
			return err
		}
		_, err = p.registry.tagIn(ctx, tx, desc.Digest, ref, PublishOptions{Policy: Replace})
		return err
	})
}

// Tags calls fn with the tags of the repository after last, in order, a page at a time. An empty
// last lists all. last need not exist. fn may use the registry. An error of fn ends the listing and
// is returned.
//
// Errors: those of fn, [ErrCorruptIndex], [ErrIndexIO], and any error from ctx.
func (p *Repository) Tags(ctx context.Context, last string, fn func(tags []string) error) error {
	for {
		page, err := p.TagList(ctx, last, listPage)
		if err != nil {
			return err
		}
		if len(page) > 0 {
			if err := fn(page); err != nil {
				return err
			}
			last = page[len(page)-1]
		}
		if len(page) < listPage {
			return nil
		}
	}
}

// TagList returns at most limit tags of the repository after last, in order. last need not exist.
//
// Errors: [ErrCorruptIndex], [ErrIndexIO], and any error from ctx.
func (p *Repository) TagList(ctx context.Context, last string, limit int) (tags []string, err error) {
	defer addOp(&err, "list tags of", p.name, "")
	for limit > len(tags) {
		n := min(limit-len(tags), listPage)
		page, err := p.registry.page(ctx, p.name, last, p.name+"\x00", n)
		if err != nil {
			return nil, err
		}
		for _, ref := range page {
			last = ref.Reference.Tag()
			if d := ref.Reference.Digest(); d != "" {
				// Any number of refs by digest may follow, and no tag is between them. So the next
				// page begins after the last possible digest of this algorithm.
				last = string(d.Algorithm()) + ":~"
				continue
			}
			tags = append(tags, last)
		}
		if len(page) < n {
			break
		}
	}
	return tags, nil
}

// Predecessors returns the manifests in the repository that point at desc: its referrers, with
// their annotations, and the manifests that need it. Both are read from the index, in pages. The
// result is complete and not limited.
//
// Errors: [ErrInvalidDigest], [ErrCorruptIndex], [ErrIndexIO], and any error from ctx.
func (p *Repository) Predecessors(ctx context.Context, desc ocispec.Descriptor) (found []ocispec.Descriptor, err error) {
	for d, err := range p.Referrers(ctx, desc.Digest, nil) {
		if err != nil {
			return nil, err
		}
		found = append(found, d)
	}
	defer addOp(&err, "find predecessors in", p.name, desc.Digest)
	end, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	x := p.registry.index
	err = pointers(ctx, x, desc.Digest, false, func(d digest.Digest) error {
		parent, err := p.manifest(x, d)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		found = append(found, parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// Referrers is [LocalRegistry.Referrers], limited to manifests that the repository shows. Errors
// are the same.
func (p *Repository) Referrers(ctx context.Context, subject digest.Digest, opts *ReferrersOptions) iter.Seq2[ocispec.Descriptor, error] {
	var o ReferrersOptions
	if opts != nil {
		o = *opts
	}
	limit := o.Limit
	o.Limit = 0
	return func(yield func(ocispec.Descriptor, error) bool) {
		n := 0
		for d, err := range p.registry.Referrers(ctx, subject, &o) {
			shown := false
			if err == nil {
				err = p.registry.within(ctx, func() (err error) {
					shown, err = p.showsManifest(p.registry.index, d.Digest)
					return opError("list referrers in", p.name, subject, err)
				})
			}
			if err != nil {
				yield(ocispec.Descriptor{}, err)
				return
			}
			if !shown {
				continue
			}
			if n++; !yield(d, nil) || n == limit {
				return
			}
		}
	}
}
