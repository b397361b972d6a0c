package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Policy says what a publish does to a ref that points at another digest.
type Policy int

const (
	// KeepExisting leaves the ref and fails with [*ConflictError].
	KeepExisting Policy = iota
	// Replace moves the ref; the last commit wins.
	Replace
)

// PublishOptions govern how a ref is written. Nil is the zero value.
type PublishOptions struct {
	// Policy is for a ref that points elsewhere. Zero is [KeepExisting].
	Policy Policy
	// Expected, if not empty, makes this a compare-and-swap: the ref is moved
	// if it points at Expected, and otherwise it is a conflict, whatever Policy says.
	Expected digest.Digest
}

// Outcome is what a publish did to its ref.
type Outcome int

const (
	// Inserted: there was no such ref.
	Inserted Outcome = iota + 1
	// Unchanged: the ref pointed at this digest already.
	Unchanged
	// Replaced: the ref pointed elsewhere and was moved.
	Replaced
	// Conflicted: the ref was left as it was, and nothing was published.
	Conflicted
)

// String returns the outcome in lower case.
func (o Outcome) String() string {
	switch o {
	case Inserted:
		return "inserted"
	case Unchanged:
		return "unchanged"
	case Replaced:
		return "replaced"
	case Conflicted:
		return "conflicted"
	}
	return "none"
}

// A RefUpdate is the outcome of a publish for one ref. The zero value stands for content that was
// stored without a ref.
type RefUpdate struct {
	Reference Reference
	Outcome   Outcome
	// Descriptor is of the manifest that was offered.
	Descriptor ocispec.Descriptor
	// Existing is the digest at which the ref pointed before. If Conflicted, it still does.
	Existing digest.Digest
}

// conflict returns the update's [*ConflictError] if it is one.
func (u *RefUpdate) conflict(expected digest.Digest) error {
	if u.Outcome != Conflicted {
		return nil
	}
	return &ConflictError{Reference: u.Reference, Existing: u.Existing, Incoming: u.Descriptor.Digest, Expected: expected}
}

// A publication is one artifact that becomes visible, with its ref if it has one.
type publication struct {
	ref  Reference // zero: stored without a ref
	root ocispec.Descriptor
	// manifests are root, the manifests below it and the referrers that are published with it.
	// Children come before parents.
	manifests []pendingManifest
	// also, if not nil, runs in the transaction before the rows are written, unless there is a
	// conflict. existing is the digest at which the ref points, "" for none. Its error stops all
	// publications.
	also func(tx *indexTx, existing digest.Digest) error
	// hold is the name of a repository that holds the root, "" for none.
	hold string
	// absent are child manifests that need not be here. Their rows say so, unless they are here
	// already. Foreign layers need not be here either, and are not listed.
	absent map[digest.Digest]bool
	// entry is what else an index.json says of the ref, or of root if byDigest is set: canonical JSON,
	// "" for nothing.
	entry    string
	byDigest bool      // imported without a ref
	moved    time.Time // when the ref was moved, as the source says; zero for now
	PublishOptions
}

// A pendingManifest is a manifest that is staged and not yet recorded. A parsed document can take
// twenty times the memory of its bytes, and an image index may name hundreds of them. So an import
// keeps only small ones. The others are read again, one at a time, when their rows are written.
type pendingManifest struct {
	ocispec.Descriptor
	parsed  *Manifest          // nil: to be read again
	subject ocispec.Descriptor // media type, digest and size of its subject; zero for none
}

// read returns the parsed document. Its blob must be in the stage or in the store.
func (p pendingManifest) read(ctx context.Context, st *stage) (*Manifest, error) {
	if p.parsed != nil {
		return p.parsed, nil
	}
	src, err := st.open(ctx, p.Digest, p.Size)
	if err != nil {
		return nil, incomplete(err)
	}
	return readManifest(src, p.Descriptor)
}

// onlyManifest is a publication of one manifest that needs no other.
func onlyManifest(ref Reference, m *Manifest, opts PublishOptions) publication {
	desc := m.Descriptor()
	return publication{ref: ref, root: desc, manifests: []pendingManifest{{Descriptor: desc, parsed: m}}, PublishOptions: opts}
}

// publish is the only way by which manifests and refs get into the index:
//
//	accept    refuses an artifact type or digest that must not be published
//	decide    asks the policy, as the index is now; only saves work if all conflict
//	settle    makes the stage's blobs durable under their names below blobs/
//	write     in one transaction of the index, for each publication:
//	  decide    asks the policy again: this answer counts
//	  record    checks that each blob is there, and writes its row and the manifests'
//	  putRef    points the ref at the manifest
//
// A kill before the commit leaves blobs that no row names, which a collection removes. After the
// commit all is durable. No collector deletes a blob between record and the commit, since it needs
// the write lock for that. Readers see all publications or none.
//
// Conflicts are outcomes here, and the other publications still count. Any error means that nothing
// was published.
func (r *LocalRegistry) publish(ctx context.Context, st *stage, pubs []publication) ([]RefUpdate, error) {
	if r.blobs.readOnly {
		return nil, ErrReadOnly
	}
	updates := make([]RefUpdate, len(pubs))
	conflicts := 0
	for i := range pubs {
		p := &pubs[i]
		if err := r.accept(p); err != nil {
			return nil, err
		}
		// A conflict that is found now saves the fsyncs. Only the transaction decides: see below.
		if p.ref.IsZero() || p.Policy == Replace && p.Expected == "" {
			continue // never a conflict
		}
		name, reference := p.ref.key()
		existing, _, err := r.index.resolve(name, reference)
		if err != nil {
			return nil, err
		}
		if updates[i] = p.decide(existing.Digest); updates[i].Outcome == Conflicted {
			conflicts++
		}
	}
	if conflicts == len(pubs) {
		return updates, nil
	}
	recorded := func(d digest.Digest) (bool, error) { return hasBlob(r.index, d) }
	if err := st.settle(ctx, recorded); err != nil {
		return nil, err
	}
	err := r.write(ctx, func(tx *indexTx) error {
		now := time.Now()
		checked := map[digest.Digest]bool{}
		for i := range pubs {
			p := &pubs[i]
			name, reference := p.ref.key()
			existing, err := tx.ref(name, reference)
			if err != nil {
				return err
			}
			updates[i] = p.decide(existing)
			if updates[i].Outcome == Conflicted {
				continue
			}
			if p.also != nil {
				if err := p.also(tx, existing); err != nil {
					return err
				}
			}
			var root ocispec.Descriptor
			for _, m := range p.manifests { // the root is not the last one if referrers came along
				desc, err := record(ctx, tx, st, m, p.absent, checked, now)
				if err != nil {
					return err
				}
				if desc.Digest == p.root.Digest {
					root = desc
				}
			}
			if p.hold != "" {
				if err := tx.setHold(p.hold, p.root.Digest, now); err != nil {
					return err
				}
			}
			if err := p.putRef(tx, updates[i].Outcome, root, now); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return updates, nil
}

// putRef writes the row of the ref, or of a root that was imported by digest. A ref that is
// Unchanged keeps its time.
func (p *publication) putRef(tx *indexTx, outcome Outcome, root ocispec.Descriptor, now time.Time) error {
	name, reference := p.ref.key()
	switch {
	case outcome == Inserted || outcome == Replaced:
		at := now
		if !p.moved.IsZero() && p.moved.Before(now) {
			at = p.moved
		}
		return putNamed(tx, name, reference, root, p.entry, at)
	case outcome == Unchanged:
		left, err := takeFacts(tx, root.Digest)
		if p.entry == "" && left == "" || err != nil {
			return err
		}
		// The ref may come from a build or a pull, and have no entry of an index.json yet. Only
		// Replace changes an entry that it has.
		detail, _, err := refDetails(tx, name, reference)
		if err != nil || detail.entry != "" && (p.entry == "" || p.Policy != Replace) {
			return err
		}
		return tx.setRefEntry(name, reference, cmp.Or(p.entry, left))
	case p.byDigest:
		return tx.setUnnamed(root.Digest, p.entry, now)
	}
	return nil
}

// accept refuses a publication that no policy allows: a ref by digest that names another manifest,
// and an artifact type that the registry does not take.
func (r *LocalRegistry) accept(p *publication) error {
	if d := p.ref.Digest(); d != "" && d != p.root.Digest {
		return fmt.Errorf("%w: %s names another digest than the manifest's, %s", ErrDigestMismatch, p.ref, p.root.Digest)
	}
	for _, m := range p.manifests {
		if err := r.acceptType(m.Descriptor); err != nil {
			return err
		}
	}
	return nil
}

// acceptType refuses a manifest of a type that the registry doesn't take.
func (r *LocalRegistry) acceptType(m ocispec.Descriptor) error {
	types := r.opts.ArtifactTypes
	if len(types) == 0 || formOf(m.MediaType) == formIndex || slices.Contains(types, m.ArtifactType) {
		return nil
	}
	return fmt.Errorf("%w: %s is not among the registry's Options.ArtifactTypes", ErrArtifactType, printable(m.ArtifactType))
}

// decide applies the ref policy. existing is the digest at which the ref points, "" for no ref.
func (p *publication) decide(existing digest.Digest) RefUpdate {
	if p.ref.IsZero() {
		return RefUpdate{Descriptor: p.root}
	}
	u := RefUpdate{Reference: p.ref, Descriptor: p.root, Existing: existing}
	u.Outcome = p.outcome(existing, u.Descriptor.Digest)
	return u
}

// outcome is the one place where the policies are told apart.
func (o PublishOptions) outcome(existing, incoming digest.Digest) Outcome {
	switch {
	case o.Expected != "" && existing != o.Expected:
		return Conflicted
	case existing == "":
		return Inserted
	case existing == incoming:
		return Unchanged
	case o.Policy == Replace || o.Expected != "":
		return Replaced
	default:
		return Conflicted
	}
}

// record writes the rows of one manifest, after it has found the files of the manifest, its config
// and its layers. The caller records child manifests before. A child in absent and a foreign layer
// may be missing, and are recorded as absent then. checked has the digests that were found in this
// transaction. It returns the descriptor that the index has for the manifest.
func record(ctx context.Context, tx *indexTx, st *stage, p pendingManifest, absent, checked map[digest.Digest]bool, now time.Time) (ocispec.Descriptor, error) {
	blob := func(d digest.Digest, size int64, kind role) error {
		if checked[d] {
			return nil
		}
		if err := st.recheck(d, size); err != nil {
			return incomplete(err)
		}
		checked[d] = true
		return tx.putBlob(d, size, kind, now)
	}
	if err := blob(p.Digest, p.Size, roleManifest); err != nil {
		return ocispec.Descriptor{}, err
	}
	m, err := p.read(ctx, st)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for i, c := range m.children() {
		kind := m.childRole(i)
		var err error
		if absent[c.Digest] {
			// It is not linked again even if it is staged: the content that it needs is not staged.
			if err = st.store.checkSize(c.Digest, c.Size); err == nil {
				err = tx.putAbsent(c.Digest, c.Size, kind, now) // it is here for another artifact, and stays so
			}
		} else {
			err = blob(c.Digest, c.Size, kind)
		}
		if errors.Is(err, ErrNotFound) && (absent[c.Digest] || foreignLayer(c.MediaType)) {
			err = recordAbsent(ctx, tx, c, kind, now)
		}
		if err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	return tx.putManifest(m, now)
}

// recordAbsent records that a child of a manifest is not here. The caller has looked for its file
// in the same transaction. If a row says that it is here and no ref needs it, a collector was
// killed after it had deleted the file, and recordAbsent finishes its work. If a ref needs it,
// the file was lost. That row stays, so that Verify finds the loss.
func recordAbsent(ctx context.Context, tx *indexTx, c ocispec.Descriptor, kind role, now time.Time) error {
	known, err := hasBlob(tx, c.Digest)
	if known && err == nil {
		up := climb{ctx: ctx, q: tx, ways: ways{subjects: true}}
		led, err := up.led(c.Digest)
		if led || err != nil {
			return err
		}
		return tx.becomeAbsent(c.Digest, c.Size)
	}
	if err == nil {
		err = tx.putAbsent(c.Digest, c.Size, kind, now)
	}
	return err
}

// incomplete makes [ErrIncomplete] of [ErrNotFound]: a missing blob means that an artifact is not
// whole. Other errors stay as they are.
func incomplete(err error) error {
	if errors.Is(err, ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	return err
}

// write is index.write for this root. It fails if the index file was replaced since it was
// opened: a commit would go to a file that no other process reads.
func (r *LocalRegistry) write(ctx context.Context, fn func(*indexTx) error) error {
	return r.index.write(ctx, r.guarded(fn))
}

// writeAlone is index.writeAlone for this root.
func (r *LocalRegistry) writeAlone(ctx context.Context, fn func(*indexTx) error) error {
	return r.index.writeAlone(ctx, r.guarded(fn))
}

// guarded returns fn with a check before it that the root and its index are still those that were
// opened.
func (r *LocalRegistry) guarded(fn func(*indexTx) error) func(*indexTx) error {
	return func(tx *indexTx) error {
		if err := r.checkBound(); err != nil {
			return err
		}
		if index, err := r.root.Lstat(indexFile); err != nil || !os.SameFile(r.opened, index) {
			return cmp.Or(err, fmt.Errorf("%w: %s was replaced while the registry was open", ErrForeignIndex, indexFile))
		}
		return fn(tx)
	}
}

// checkClosure returns [ErrIncomplete] unless all content that manifests need, by the index's rows,
// has files of the right size. It does not read them. Members of image indexes and foreign layers
// may be absent. Other blobs are absent where a mirror has not fetched them yet, and are missing
// here. Manifests in skip are not looked at, and neither is what only they need.
func (r *LocalRegistry) checkClosure(ctx context.Context, q queryer, skip map[digest.Digest]bool, roots ...ocispec.Descriptor) error {
	down := descent{q: q, seen: maps.Clone(skip), lacked: func(c member) bool { return c.role != roleManifest && !foreignLayer(c.desc.MediaType) }}
	for _, root := range roots {
		err := down.each(ctx, root, func(d ocispec.Descriptor) error {
			return incomplete(r.blobs.checkSize(d.Digest, d.Size))
		})
		if err != nil {
			return err
		}
	}
	return nil
}
