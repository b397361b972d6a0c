package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Ref is a row of the index: a reference and the manifest it points at.
type Ref struct {
	Reference  Reference
	Descriptor ocispec.Descriptor // MediaType, Digest, Size and ArtifactType
	Updated    time.Time          // when it was last pointed elsewhere
}

// Resolve returns the descriptor of the manifest that ref names. It reads only the index. A
// reference with a digest is resolved by that digest alone, as [LocalRegistry.ResolveDigest] does:
// the registry may have the manifest under any name.
//
// Errors: [ErrNotFound], [ErrInvalidReference] for a zero ref, [ErrCorruptIndex], [ErrIndexIO].
func (r *LocalRegistry) Resolve(ctx context.Context, ref Reference) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "resolve", ref.String(), "")
	end, err := r.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	return r.resolve(ref)
}

// ResolveDigest returns the descriptor of the manifest with that digest. A manifest to which no
// ref points any more is found until it is collected.
//
// Errors:
//   - [ErrNotFound], with [ErrAbsent] if the registry records the manifest as absent
//   - [ErrInvalidDigest]
//   - [ErrCorruptIndex], [ErrIndexIO]
func (r *LocalRegistry) ResolveDigest(ctx context.Context, d digest.Digest) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "resolve", "", d)
	end, err := r.begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer end()
	return r.resolveDigest(d)
}

// resolve is Resolve within a call that has begun.
func (r *LocalRegistry) resolve(ref Reference) (ocispec.Descriptor, error) {
	if err := ref.checkGiven(); err != nil {
		return ocispec.Descriptor{}, err
	}
	if d := ref.Digest(); d != "" {
		return r.resolveDigest(d)
	}
	return found(r.index.resolve(ref.key()))
}

// resolveDigest is ResolveDigest within a call that has begun.
func (r *LocalRegistry) resolveDigest(d digest.Digest) (ocispec.Descriptor, error) {
	if err := checkDigest(d); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := found(r.index.resolveDigest(d))
	return desc, r.absence(err, d, roleManifest)
}

// found turns the index's answer "no such row" into [ErrNotFound].
func found(desc ocispec.Descriptor, ok bool, err error) (ocispec.Descriptor, error) {
	if err == nil && !ok {
		err = ErrNotFound
	}
	return desc, err
}

// Exists reports whether ref resolves. It reads only the index.
//
// Errors are those of [LocalRegistry.Resolve], except [ErrNotFound].
func (r *LocalRegistry) Exists(ctx context.Context, ref Reference) (bool, error) {
	_, err := r.Resolve(ctx, ref)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// LoadDigest returns the artifact whose manifest has that digest. Its Reference is zero.
//
// Errors are those of [LocalRegistry.ResolveDigest].
func (r *LocalRegistry) LoadDigest(ctx context.Context, d digest.Digest) (*LocalArtifact, error) {
	desc, err := r.ResolveDigest(ctx, d)
	if err != nil {
		return nil, err
	}
	return r.newArtifact(Reference{}, desc, nil), nil
}

// inPages returns an iterator over the items of pages. read returns the n items after the last one
// of the page before, which is nil at first. A positive limit bounds the items. An error is yielded
// once, at the end.
//
// All listings are built on it. A page is read to its end before its items are yielded, so no rows
// and no connection are open while the caller's code runs. That code may query, write or close the
// registry. The next page begins by key and not by number: rows that are added or deleted meanwhile
// neither repeat nor hide others.
func inPages[T any](limit, size int, read func(last *T, n int) ([]T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var last *T
		for left := limit; ; {
			n := size
			if limit > 0 {
				n = min(n, left)
			}
			page, err := read(last, n)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, item := range page {
				if !yield(item, nil) {
					return
				}
			}
			if left -= len(page); len(page) < n || limit > 0 && left <= 0 {
				return
			}
			last = &page[len(page)-1]
		}
	}
}

// ListOptions choose refs. Nil and the zero value choose all.
type ListOptions struct {
	// Name, if not empty, is the one registry/repository to list, as [Reference.Name] returns it.
	Name string
	// Prefix, if not empty, is the beginning of registry/repository, such as "ghcr.io/org/".
	Prefix string
	// After, if not zero, starts the listing after this reference, whether or not it exists. So the
	// last reference of a page begins the next one.
	After Reference
	// Limit, if positive, is the largest number of refs to list.
	Limit int
}

// Refs lists refs in the order of [Reference.Compare], from the index only. It reads in pages, so
// that memory does not grow and no lock is held while the caller's code runs. A ref that is added
// or removed meanwhile may or may not be listed. An error is yielded once, at the end.
//
// Errors: [ErrInvalidArgument] for a Name that no reference has, [ErrCorruptIndex], [ErrIndexIO],
// and any error from ctx.
func (r *LocalRegistry) Refs(ctx context.Context, opts *ListOptions) iter.Seq2[Ref, error] {
	var o ListOptions
	if opts != nil {
		o = *opts
	}
	return func(yield func(Ref, error) bool) {
		if err := o.check(); err != nil {
			yield(Ref{}, opError("list", "", "", err))
			return
		}
		name, reference, below := o.bounds()
		inPages(o.Limit, listPage, func(last *Ref, n int) ([]Ref, error) {
			if last != nil {
				name, reference = last.Reference.key()
			}
			page, err := r.page(ctx, name, reference, below, n)
			return page, opError("list", "", "", err)
		})(yield)
	}
}

// listPage is the number of refs, or names, in one page.
const listPage = 512

// check refuses a name that a reference cannot have. A name in another spelling would list nothing,
// and the caller would take it for an empty repository.
func (o *ListOptions) check() error {
	if o.Name == "" {
		return nil
	}
	canonical, err := canonicalName(o.Name)
	if err == nil && canonical != o.Name {
		err = fmt.Errorf("name %s is spelled %s", printable(o.Name), printable(canonical))
	}
	if err != nil {
		return fmt.Errorf("%w: ListOptions.Name: %w", ErrInvalidArgument, err)
	}
	return nil
}

// bounds returns the range of keys of the listing: greater than (name, reference), with a name less
// than below. Ranges use the primary key, so a listing of one name does not read the others. An
// empty range has below = "".
func (o *ListOptions) bounds() (name, reference, below string) {
	// Names have printable ASCII characters only, so this is greater than all of them.
	const aboveAll = "\x7f"
	below = aboveAll
	if o.Prefix != "" {
		name, below = o.Prefix, o.Prefix+aboveAll
	}
	if o.Name != "" && strings.HasPrefix(o.Name, o.Prefix) {
		name, below = o.Name, o.Name+"\x00"
	} else if o.Name != "" {
		below = ""
	}
	if n, ref := o.After.key(); !o.After.IsZero() && n >= name {
		name, reference = n, ref
	}
	return name, reference, below
}

// page reads one page of refs, as a call that begins and ends with it.
func (r *LocalRegistry) page(ctx context.Context, name, reference, below string, n int) ([]Ref, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return r.index.list(name, reference, below, n)
}
