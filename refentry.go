package ocilocal

import (
	"cmp"
	"context"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The facts of an index.json entry describe a manifest, and are kept with a ref, or in a row of
// unnamed if the manifest was imported by digest. They are copied by these rules:
//
//   - A ref that is set by a call without facts takes those of the row of unnamed, which is
//     deleted.
//   - Tag takes those of another ref of the same manifest.
//   - Nothing else copies them, since a ref that moves points at other content.

// putNamed points a ref at a manifest. If the caller knows no facts of an index.json entry, the ref
// takes those with which the manifest was imported by digest. That record goes: the manifest has a
// name now.
func putNamed(tx *indexTx, name, reference string, root ocispec.Descriptor, entry string, at time.Time) error {
	left, err := takeFacts(tx, root.Digest)
	if err != nil {
		return err
	}
	return tx.putRef(name, reference, root, cmp.Or(entry, left), at)
}

// takeFacts is [indexTx.takeUnnamed] for a manifest that gets a ref: names are not among its facts.
func takeFacts(tx *indexTx, d digest.Digest) (entry string, err error) {
	if entry, err = tx.takeUnnamed(d); err == nil {
		entry, err = withoutNames(entry)
	}
	return entry, err
}

// entryFacts is knownFacts as a call that can be made while the registry is open.
func (r *LocalRegistry) entryFacts(ctx context.Context, ref Reference, d digest.Digest) (f entryFacts, err error) {
	err = r.within(ctx, func() error {
		f, err = r.knownFacts(ref, d)
		return err
	})
	return f, err
}

// knownFacts returns the facts of a manifest under a ref. If the ref does not point at the
// manifest, or is zero, they are those of an import by digest, or else those of another ref.
func (r *LocalRegistry) knownFacts(ref Reference, d digest.Digest) (f entryFacts, err error) {
	if !ref.IsZero() {
		name, reference := ref.key()
		detail, ok, err := refDetails(r.index, name, reference)
		if err != nil {
			return f, err
		}
		if ok && detail.digest == d {
			return parseFacts(detail.entry)
		}
	}
	text, err := unnamedEntry(r.index, d)
	if err == nil && text == "" {
		if text, err = entryOf(r.index, d); err == nil {
			text, err = withoutNames(text)
		}
	}
	if err != nil {
		return f, err
	}
	return parseFacts(text)
}
