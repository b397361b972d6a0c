package ocilocal

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"
)

// anonymousTime is the layout of the time in the tag of an anonymous artifact. It is in UTC and of
// fixed length, so that names sort by age. It has no ':', which a tag cannot have.
const anonymousTime = "20060102T150405.000000Z"

// anonymousNonce is the number of random characters after the time, of 5 bits each. Two artifacts
// of the same microsecond get the same name with a probability of 2^-65.
const anonymousNonce = 13

// NewAnonymousBuilder is [LocalRegistry.NewBuilder] for an artifact that does not need a name, such
// as an intermediate result. It is published as <id>.ocilocal.local/anonymous:<time>-<nonce>. The
// parts are the registry's [LocalRegistry.ID], the time in UTC, and random letters and digits. The
// reference is like any other: it keeps the artifact until [LocalRegistry.Remove] or
// [LocalRegistry.PruneAnonymous]. The artifact that Build returns has it.
//
// Errors:
//   - [ErrInvalidArgument]: the options have Expected, although the ref is a new one
//   - those of [LocalRegistry.NewBuilder]
func (r *LocalRegistry) NewAnonymousBuilder(opts *BuilderOptions) (_ *Builder, err error) {
	defer addOp(&err, "start anonymous build", "", "")
	var o PublishOptions
	if opts != nil {
		o = opts.PublishOptions
	}
	ref, err := r.anonymousReference(o)
	if err != nil {
		return nil, err
	}
	return r.NewBuilder(ref, opts)
}

// anonymousName is the name that all anonymous artifacts of this registry share. It has the
// registry's id, so that names of two registries never collide after an import.
func (r *LocalRegistry) anonymousName() string { return r.localHost() + "/anonymous" }

// anonymousReference makes the reference of one anonymous artifact. It refuses Expected: a new
// reference points at nothing yet, so such a publish would always conflict.
func (r *LocalRegistry) anonymousReference(o PublishOptions) (Reference, error) {
	if o.Expected != "" {
		return Reference{}, fmt.Errorf("%w: PublishOptions.Expected is %s, but an anonymous reference is always new", ErrInvalidArgument, printable(string(o.Expected)))
	}
	tag := time.Now().UTC().Format(anonymousTime) + "-" + strings.ToLower(rand.Text()[:anonymousNonce])
	return ParseReference(r.anonymousName() + ":" + tag)
}

// isAnonymousTag reports whether a tag has the form that anonymousReference makes. A user can set
// other tags under the same name, and these must not be pruned.
func isAnonymousTag(tag string) bool {
	made, nonce, _ := strings.Cut(tag, "-")
	_, err := time.Parse(anonymousTime, made)
	return err == nil && len(nonce) == anonymousNonce
}

// AnonymousRefs lists this registry's anonymous artifacts, the oldest names first, as
// [LocalRegistry.Refs] does. [LocalRegistry.OtherAnonymousRefs] lists the names that another
// registry made up.
//
// Errors are those of [LocalRegistry.Refs].
func (r *LocalRegistry) AnonymousRefs(ctx context.Context) iter.Seq2[Ref, error] {
	return func(yield func(Ref, error) bool) {
		for ref, err := range r.Refs(ctx, &ListOptions{Name: r.anonymousName()}) {
			if (err != nil || isAnonymousTag(ref.Reference.Tag())) && !yield(ref, err) {
				return
			}
		}
	}
}

// OtherAnonymousRefs lists the refs whose names other registries made up, as [LocalRegistry.Refs]
// does. Imports and pulls bring such refs. They are anonymous artifacts of registries of this
// package, and anonymous artifacts, experiments and checkpoints of OMMX v3 registries, such as
// 0123abcd.ommx.local/checkpoint:7.
//
// Errors are those of [LocalRegistry.Refs].
func (r *LocalRegistry) OtherAnonymousRefs(ctx context.Context) iter.Seq2[Ref, error] {
	return func(yield func(Ref, error) bool) {
		for name, err := range r.Repositories(ctx, nil) {
			if err != nil {
				yield(Ref{}, err)
				return
			}
			if !r.isOthersName(name) {
				continue
			}
			for ref, err := range r.Refs(ctx, &ListOptions{Name: name}) {
				if !yield(ref, err) {
					return
				}
			}
		}
	}
}

// isOthersName reports whether another registry made up the references of this name.
func (r *LocalRegistry) isOthersName(name string) bool {
	host, repository, _ := strings.Cut(name, "/")
	return isOMMXLocalName(host, repository) ||
		strings.HasSuffix(host, localHostSuffix) && repository == "anonymous" && host != r.localHost()
}

// defaultGrace is the age below which collections and PruneAnonymous keep content and refs.
const defaultGrace = 24 * time.Hour

// PruneOptions choose anonymous refs to remove. Nil is the zero value.
type PruneOptions struct {
	// OlderThan is the age from which refs are removed, counted from their last write. Zero means
	// 24 hours. A negative age, such as [NoGrace], removes all.
	OlderThan time.Duration
	// Others removes the refs of [LocalRegistry.OtherAnonymousRefs] too.
	Others bool
}

// prunePage is the largest number of refs that one transaction removes. Other writers get their
// turn between two pages.
const prunePage = 100

// PruneAnonymous removes this registry's anonymous refs that are old enough, and returns them in
// the order of their names. With [PruneOptions.Others] it also removes those that other registries
// made up. A ref that is moved meanwhile stays. The artifacts stay until they are collected. Until
// then [LocalRegistry.Tag] can restore a ref. If several calls prune at the same time, each ref is
// in the result of one of them.
//
// Errors, together with the refs that were removed by then: [ErrReadOnly], [ErrBusy],
// [ErrCorruptIndex], [ErrIndexIO], and any error from ctx.
func (r *LocalRegistry) PruneAnonymous(ctx context.Context, opts *PruneOptions) (removed []Ref, err error) {
	defer addOp(&err, "prune anonymous artifacts", "", "")
	end, err := r.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if opts == nil {
		opts = &PruneOptions{}
	}
	names := []string{r.anonymousName()}
	if opts.Others {
		for name, err := range r.Repositories(ctx, nil) {
			if err != nil {
				return nil, err
			}
			if r.isOthersName(name) {
				names = append(names, name)
			}
		}
		slices.Sort(names)
	}
	for _, name := range names {
		gone, err := r.pruneName(ctx, name, cmp.Or(opts.OlderThan, defaultGrace))
		removed = append(removed, gone...)
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

// pruneName removes the anonymous refs of one name that are older than age, or all if age is
// negative. Under a name that another registry made up, every tag counts: this package knows only
// its own form.
func (r *LocalRegistry) pruneName(ctx context.Context, prunedName string, age time.Duration) (removed []Ref, err error) {
	young := time.Now().Add(-age)
	ours := prunedName == r.anonymousName()
	name, reference, below := (&ListOptions{Name: prunedName}).bounds()
	for ctx.Err() == nil {
		page, err := r.index.list(name, reference, below, prunePage)
		if err != nil {
			return removed, err
		}
		var old []Ref
		for _, ref := range page {
			if (!ours || isAnonymousTag(ref.Reference.Tag())) && (age < 0 || ref.Updated.Before(young)) {
				old = append(old, ref)
			}
		}
		gone, err := r.removeUnchanged(ctx, old)
		removed = append(removed, gone...)
		if err != nil || len(page) < prunePage {
			return removed, err
		}
		name, reference = page[len(page)-1].Reference.key()
	}
	return removed, ctx.Err()
}

// removeUnchanged removes the refs that are still as they were read, all in one transaction. A ref
// that was moved since is in use again, even if it points at the same digest: its time has changed.
func (r *LocalRegistry) removeUnchanged(ctx context.Context, refs []Ref) (removed []Ref, err error) {
	if len(refs) == 0 {
		return nil, nil
	}
	err = r.write(ctx, func(tx *indexTx) error {
		removed = nil
		for _, ref := range refs {
			name, reference := ref.Reference.key()
			desc, updated, ok, err := tx.resolved(name, reference)
			if err != nil {
				return err
			}
			if !ok || desc.Digest != ref.Descriptor.Digest || !updated.Equal(ref.Updated) {
				continue
			}
			if err := tx.deleteRef(name, reference); err != nil {
				return err
			}
			removed = append(removed, ref)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return removed, nil
}
