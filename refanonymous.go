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

// anonymousTime is how the time stands in the tag of an anonymous artifact: in
// UTC, of one length, so that names sort by age, and without a ':', which no tag may have.
const anonymousTime = "20060102T150405.000000Z"

const anonymousNonce = 13 // characters of 5 bits: with the time, never twice

// NewAnonymousBuilder is [LocalRegistry.NewBuilder] for an artifact that does not need a name,
// such as an intermediate result. It is published as
// <id>.ocilocal.local/anonymous:<time>-<nonce>, with the registry's [LocalRegistry.ID], the time in
// UTC, and random letters and digits: a reference as good as any other, by
// which the artifact stays until [LocalRegistry.Remove] or [LocalRegistry.PruneAnonymous]. The
// artifact that Build returns tells it.
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

// anonymousName is the name that this registry's anonymous artifacts share.
func (r *LocalRegistry) anonymousName() string { return r.localHost() + "/anonymous" }

// anonymousReference makes up the reference of one anonymous artifact.
func (r *LocalRegistry) anonymousReference(o PublishOptions) (Reference, error) {
	if o.Expected != "" {
		return Reference{}, fmt.Errorf("%w: an anonymous reference is a new one and can't be expected to be at %s", ErrInvalidArgument, printable(string(o.Expected)))
	}
	tag := time.Now().UTC().Format(anonymousTime) + "-" + strings.ToLower(rand.Text()[:anonymousNonce])
	return ParseReference(r.anonymousName() + ":" + tag)
}

// isAnonymousTag tells the tags of anonymous artifacts from those that
// somebody else has put on their name.
func isAnonymousTag(tag string) bool {
	made, nonce, _ := strings.Cut(tag, "-")
	_, err := time.Parse(anonymousTime, made)
	return err == nil && len(nonce) == anonymousNonce
}

// AnonymousRefs lists this registry's anonymous artifacts, those of the earliest
// name first, as [LocalRegistry.Refs] does. [LocalRegistry.OtherAnonymousRefs] lists the names that
// another registry made up. Errors too are as there.
func (r *LocalRegistry) AnonymousRefs(ctx context.Context) iter.Seq2[Ref, error] {
	return func(yield func(Ref, error) bool) {
		for ref, err := range r.Refs(ctx, &ListOptions{Name: r.anonymousName()}) {
			if (err != nil || isAnonymousTag(ref.Reference.Tag())) && !yield(ref, err) {
				return
			}
		}
	}
}

// OtherAnonymousRefs lists the refs whose names other registries made up, and that imports or pulls
// brought here, as [LocalRegistry.Refs] does: anonymous artifacts of registries of this package,
// and anonymous artifacts, experiments and checkpoints of OMMX v3 registries, such as
// 0123abcd.ommx.local/checkpoint:7. Errors too are as there.
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

// defaultGrace is the age below which collecting and pruning leave things alone.
const defaultGrace = 24 * time.Hour

// PruneOptions choose anonymous refs to remove. Nil is the zero value.
type PruneOptions struct {
	// OlderThan is how long ago a ref must have been written to be removed. Zero
	// means 24 hours; less than zero, such as [NoGrace], removes all.
	OlderThan time.Duration
	// Others removes the refs of [LocalRegistry.OtherAnonymousRefs] too.
	Others bool
}

// prunePage is how many refs are removed in one transaction at most.
const prunePage = 100

// PruneAnonymous removes this registry's anonymous refs that are old enough, with
// [PruneOptions.Others] also those that other registries made up, and returns them in the order of
// their names. A ref that is moved meanwhile stays. The artifacts stay until garbage collection,
// and [LocalRegistry.Tag] restores a ref until then. Of several that prune at the same time, each
// ref is returned by one.
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

// pruneName removes the anonymous refs of one name that are older than age, or all if that is
// negative.
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

// removeUnchanged removes those of refs that are still as they were read, all in one step.
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
