package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Repair writes rows in the same way as a publish. An importer whose source is empty stages the
// manifest and all that it needs, by links to the files in blobs/. Then record checks each blob in
// the transaction. So a manifest gets rows only if its closure is whole. A collection that runs
// meanwhile cannot break it: a staged file that it deletes is linked again.

// rewrite makes the rows of a recorded manifest agree with its bytes. If the bytes are not a
// manifest, the rows must not say that they are one.
//
// The old rows of members are deleted first, since they may be wrong in any way. Then all manifests
// below are recorded too, because their rows may be missing. All of it is one transaction, so no
// other process sees the manifest without its members.
func (p *repair) rewrite(ctx context.Context, d digest.Digest) error {
	_, err := p.registry.readVerified(ctx, ocispec.Descriptor{Digest: d, Size: -1})
	if errors.Is(err, ErrInvalidManifest) || errors.Is(err, ErrUnsupportedMediaType) || errors.Is(err, ErrTooLarge) {
		return p.registry.write(ctx, func(tx *indexTx) error { return tx.notManifest(d) })
	}
	m, pub, st, err := p.load(ctx, d)
	if st != nil {
		defer func() { p.registry.logDiscard(st.discard()) }()
	}
	if err != nil {
		return p.tolerate(ctx, err)
	}
	err = p.registry.write(ctx, func(tx *indexTx) error {
		if err := tx.deleteMembers(d); err != nil { // they may exist without the row of the manifest
			return err
		}
		checked := map[digest.Digest]bool{}
		for _, pending := range pub.manifests {
			if _, err := record(ctx, tx, st, pending, pub.absent, checked, time.Now()); err != nil {
				return err
			}
		}
		return tx.replaceManifest(m, time.Now())
	})
	if err == nil {
		p.report.Rewritten = append(p.report.Rewritten, d)
	}
	return p.tolerate(ctx, err)
}

// load stages a manifest that is in blobs/, with everything that it needs, and settles the stage.
// The caller discards the stage. It is nil if the manifest itself cannot be read.
func (p *repair) load(ctx context.Context, d digest.Digest) (m *Manifest, pub publication, st *stage, err error) {
	m, err = p.registry.readVerified(ctx, ocispec.Descriptor{Digest: d, Size: -1})
	if err != nil {
		return nil, pub, nil, err
	}
	pub.root = m.Descriptor()
	im := p.registry.newImporter(nil)
	im.mayLack = p.mayLack
	maps.Copy(im.refetched, p.absent)
	im.fetch = func(_ context.Context, desc ocispec.Descriptor, _ role, _ *meteredItem) error {
		return fmt.Errorf("%w: blob %s", ErrIncomplete, desc.Digest)
	}
	_, err = im.manifest(ctx, pub.root, 0, map[digest.Digest]bool{}, &pub.manifests)
	pub.absent = im.absent.manifests
	if err == nil {
		err = im.stage.settle(ctx, nil)
	}
	return m, pub, im.stage, err
}

// mayLack reports whether a member of an image index is recorded as absent, by this index or by the
// damaged one in salvage.
func (p *repair) mayLack(d digest.Digest) (bool, error) {
	if p.absent[d] {
		return true, nil
	}
	return isAbsent(p.registry.index, d, roleManifest)
}

// tolerate returns nil for an error that concerns one artifact only, so that the repair goes on
// with the others. The verification at the end finds the artifact again and reports it. An error of
// the process is returned, even if it is wrapped in one of these. After the end of ctx, its error is.
func (p *repair) tolerate(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	for _, e := range []error{
		ErrIncomplete, ErrNotFound, ErrInvalidDigest, ErrInvalidManifest, ErrUnsupportedMediaType,
		ErrTooLarge, ErrDigestMismatch, ErrSizeMismatch, ErrArtifactType,
	} {
		if errors.Is(err, e) && !processCondition(err) {
			return nil
		}
	}
	return err
}

// record records the manifests in blobs/ that have no row, if everything that they need is there.
func (p *repair) record(ctx context.Context) error {
	// The list is complete before the first publish: no walk of blobs/ is open while files are
	// linked there.
	unknown, err := p.unrecorded(ctx)
	if err != nil {
		return err
	}
	for _, d := range unknown {
		if err := p.recordOne(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// unrecorded returns the files in blobs/ that may be manifests and have no row. Only the first byte
// of a file is read here. Whether it is a manifest is decided when it is parsed.
func (p *repair) unrecorded(ctx context.Context) (unknown []digest.Digest, err error) {
	err = p.registry.blobs.walk(ctx, func(e blobEntry) error {
		if e.digest == "" || e.info.Size() > MaxManifestSize {
			return nil
		}
		if p.absent[e.digest] {
			return nil // the bytes were a blob for the damaged index, and are no manifest by themselves
		}
		if _, ok, err := p.registry.index.resolveDigest(e.digest); ok || err != nil {
			return err
		}
		ok, err := p.registry.looksLikeManifest(e.digest)
		if ok {
			unknown = append(unknown, e.digest)
		}
		return err
	})
	slices.Sort(unknown)
	return unknown, err
}

// A lack is a missing blob and the manifest that needs it.
type lack struct {
	by   digest.Digest
	desc ocispec.Descriptor
	role role
}

// findLacks finds the missing blobs that unrecorded manifests need, and adds them to wanted. Absent
// members and foreign layers are not missed. It starts with an empty p.lacks each time, because a
// healed manifest may need more, and a healed blob is not missing any more.
func (p *repair) findLacks(ctx context.Context) error {
	p.lacks = map[digest.Digest]lack{}
	unknown, err := p.unrecorded(ctx)
	if err != nil {
		return err
	}
	for _, d := range unknown {
		m, err := p.registry.readVerified(ctx, ocispec.Descriptor{Digest: d, Size: -1})
		if err != nil {
			if err := p.tolerate(ctx, err); err != nil {
				return err
			}
			continue
		}
		for i, c := range m.children() {
			_, err := p.registry.blobs.size(c.Digest)
			if errors.Is(err, ErrNotFound) {
				may := foreignLayer(c.MediaType)
				if !may && m.childRole(i) == roleManifest {
					var failed error
					if may, failed = p.mayLack(c.Digest); failed != nil {
						return failed
					}
				}
				if may {
					continue
				}
			}
			if errors.Is(err, ErrNotFound) {
				p.lacks[c.Digest] = lack{d, c, m.childRole(i)}
				p.wanted[c.Digest] = true
			} else if err := p.tolerate(ctx, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// recordOne records one manifest, and the manifests below an image index, without a ref.
func (p *repair) recordOne(ctx context.Context, d digest.Digest) error {
	if _, ok, err := p.registry.index.resolveDigest(d); ok || err != nil {
		return err // it was recorded with the image index that needs it
	}
	_, pub, st, err := p.load(ctx, d)
	if st != nil {
		defer func() { p.registry.logDiscard(st.discard()) }()
	}
	if err == nil {
		_, err = p.registry.publish(ctx, st, []publication{pub})
	}
	if err == nil {
		p.report.Recorded = append(p.report.Recorded, d)
	}
	return p.tolerate(ctx, err)
}

// reconcile gives refs to the manifests that have lost theirs: those that neither a ref nor another
// manifest points at. A subject or a member of an index needs no ref, since it is kept by the other
// manifest. If no unrecorded manifest lacks anything, reconcile also removes the mark, so that
// collections delete again. As long as one does, a collection would delete the blobs that it has.
func (p *repair) reconcile(ctx context.Context) error {
	var tops []digest.Digest
	x := p.registry.index
	var all []digest.Digest
	if err := x.manifestRows(ctx, func(d, _ digest.Digest) { all = append(all, d) }); err != nil {
		return err
	}
	for _, d := range all {
		top := true
		if err := pointers(ctx, x, d, true, func(digest.Digest) error {
			top = false
			return errStop
		}); err != nil {
			return err
		}
		if top {
			top, err := hasRef(x, d)
			if err != nil {
				return err
			}
			if !top {
				tops = append(tops, d)
			}
		}
	}
	for _, d := range tops {
		ref, err := p.registry.recoveredName(d)
		if err != nil {
			return err
		}
		if err := p.name(ctx, d, ref, ""); err != nil {
			return err
		}
	}
	if len(p.lacks) > 0 {
		return nil
	}
	return p.registry.write(ctx, func(tx *indexTx) error { return tx.deleteMeta(metaUnreconciled) })
}

// keepAbsent reads which members the index that was set aside records as absent. It runs before
// anything is recorded: without it, an image index with absent members would not count as whole.
func (p *repair) keepAbsent(ctx context.Context) error {
	if p.salvage == "" {
		return nil
	}
	p.absent = map[digest.Digest]bool{}
	return salvage(p.salvage, func(x *index) error {
		return x.salvageAbsent(ctx, func(d digest.Digest) { p.absent[d] = true })
	})
}

// keep takes refs, the facts of imports by digest, and holds from the index that was set aside. The
// index is damaged: salvage ends a read at the damage, and the next read begins with another table.
// Refs whose manifest is not whole are left out by name.
func (p *repair) keep(ctx context.Context) error {
	err := salvage(p.salvage, func(x *index) error {
		return x.salvageRefs(ctx, func(s salvagedRef) error { return p.name(ctx, s.manifest, s.Reference, s.entry) })
	})
	if err != nil {
		return err
	}
	err = salvage(p.salvage, func(x *index) error {
		return x.salvageUnnamed(ctx, func(d digest.Digest, since time.Time, entry string) error {
			return p.registry.write(ctx, func(tx *indexTx) error {
				if _, ok, err := tx.manifest(d); !ok || err != nil {
					return err
				}
				return tx.setUnnamed(d, entry, since)
			})
		})
	})
	if err != nil {
		return err
	}
	return salvage(p.salvage, func(x *index) error {
		return x.salvageHolds(ctx, func(h holdRow) error {
			err := p.registry.write(ctx, func(tx *indexTx) error { return tx.setHold(h.name, h.digest, h.since) })
			return p.tolerate(ctx, err)
		})
	})
}

// name gives a manifest a ref, with the facts of its index.json entry. It does nothing if the
// manifest is not whole or if the ref points elsewhere: this registry's own refs are newer than
// salvaged ones.
func (p *repair) name(ctx context.Context, d digest.Digest, ref Reference, entry string) error {
	u, err := p.registry.tag(ctx, d, ref, nil)
	if errors.Is(err, ErrConflict) || errors.Is(err, ErrDigestMismatch) {
		return nil
	}
	if err == nil && (entry != "" || u.Outcome != Unchanged) { // Tag may have taken that of another ref
		name, reference := ref.key()
		err = p.registry.write(ctx, func(tx *indexTx) error { return tx.setRefEntry(name, reference, entry) })
	}
	if err == nil {
		p.report.Recovered = append(p.report.Recovered, Ref{Reference: ref, Descriptor: u.Descriptor, Updated: time.Now()})
	}
	return p.tolerate(ctx, err)
}

// recoveredName returns the reference for a manifest whose names were lost. It depends only on the
// digest, so a repeated repair gives the same name. Its host is under .local, so it is never taken
// for a name in a remote registry.
func (r *LocalRegistry) recoveredName(d digest.Digest) (Reference, error) {
	encoded := d.Encoded()
	if len(encoded) > 64 {
		encoded = encoded[:64] // a tag has at most 128 characters
	}
	return ParseReference(fmt.Sprintf("%s/recovered:%s-%s", r.localHost(), d.Algorithm(), encoded))
}
