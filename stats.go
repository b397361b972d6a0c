package ocilocal

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Count is a number of digests, each counted once, and their total size.
type Count struct {
	Manifests, Blobs int // Blobs are all digests that are not manifests
	Bytes            int64
}

// add counts one digest.
func (c *Count) add(manifest bool, size int64) {
	if manifest {
		c.Manifests++
	} else {
		c.Blobs++
	}
	c.Bytes += size
}

// Stats are the figures of a registry, by its index.
type Stats struct {
	Refs         int
	Repositories int   // distinct names that have refs
	Total        Count // all content that was published and not collected
	Orphans      Count // the part of Total that [LocalRegistry.GC] with [NoGrace] deletes
}

// Stats counts by the index alone: it walks no directory and reads no blob. So it does not see
// files of interrupted calls that are not in the index; [LocalRegistry.GCReport] does. The figures
// are read one after the other. While other processes write, they may be of different moments.
//
// The time grows with the number of artifacts and the size of their annotations: about 0.1 s for
// 100,000 artifacts without annotations. With thousands of orphans it is ten times as much, and it
// is time for [LocalRegistry.GC].
//
// Errors: [ErrCorruptIndex], [ErrIndexIO], and any error from ctx.
func (r *LocalRegistry) Stats(ctx context.Context) (s Stats, err error) {
	defer addOp(&err, "count", "", "")
	end, err := r.begin(ctx)
	if err != nil {
		return s, err
	}
	defer end()
	x := r.index
	var noRef, noPointer []digest.Digest
	blobs := 0
	// Each half uses one connection, and both take about the same time.
	var wg sync.WaitGroup
	var errs [2]error
	for i, steps := range [2][]func() error{{
		func() (err error) { noPointer, err = x.withoutPointer(ctx); return err },
		func() (err error) { s.Refs, s.Repositories, err = x.refTotals(); return err },
	}, {
		func() (err error) { blobs, s.Total.Bytes, s.Total.Manifests, err = x.totals(); return err },
		func() (err error) { noRef, err = x.withoutRef(ctx); return err },
	}} {
		wg.Go(func() {
			for _, step := range steps {
				if errs[i] = ctx.Err(); errs[i] == nil {
					errs[i] = step()
				}
				if errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if err := cmp.Or(errs[0], errs[1]); err != nil {
		return Stats{}, err
	}
	s.Total.Blobs = blobs - s.Total.Manifests // every manifest has a row among the blobs too
	if n := len(noRef) + len(noPointer); n > manyOrphans && n > blobs/manyOrphans {
		s.Orphans, err = r.deadRows(ctx)
	} else {
		s.Orphans, err = x.orphans(ctx, noRef, noPointer)
	}
	if err != nil {
		return Stats{}, err
	}
	return s, nil
}

// manyOrphans decides between two ways of counting orphans, which give the same figures: orphans
// goes up from each candidate, and deadRows goes down from all refs. One digest takes about 50
// times as long by itself as in a scan of all.
const manyOrphans = 50

// deadRows counts the rows that no ref leads to, by going down from all refs as a collection does.
// It uses the graph of a collection without its files, so nodes count by their rows.
func (r *LocalRegistry) deadRows(ctx context.Context) (c Count, err error) {
	g, err := r.graph(ctx, GCOptions{Grace: NoGrace})
	if err != nil {
		return c, err
	}
	g.follow()
	for i := range g.nodes {
		if n := &g.nodes[i]; n.row && !n.live() {
			c.add(n.manifest, n.size)
		}
	}
	return c, nil
}

// orphans counts the rows that no ref leads to, by going up from the candidates: manifests without
// a ref, blobs that no manifest needs, and blobs that only such manifests need. Every orphan is
// among these. climb remembers its answers, so shared ancestors are visited once.
func (x *index) orphans(ctx context.Context, noRef, noPointer []digest.Digest) (c Count, err error) {
	up := climb{ctx: ctx, q: x, ways: keptByDefault()}
	counted := map[digest.Digest]bool{}
	count := func(d digest.Digest) error {
		if counted[d] {
			return nil
		}
		counted[d] = true
		if led, err := up.led(d); led || err != nil {
			return err
		}
		_, manifest, err := x.resolveDigest(d)
		if err != nil {
			return err
		}
		size, err := blobSize(x, d)
		c.add(manifest, size)
		return err
	}
	for _, d := range noRef {
		if err := count(d); err != nil {
			return c, err
		}
		if err := members(x, d, func(m member) error { return count(m.desc.Digest) }); err != nil {
			return c, err
		}
	}
	for _, d := range noPointer {
		if err := count(d); err != nil {
			return c, err
		}
	}
	return c, nil
}

// A Usage is the content of some refs.
type Usage struct {
	Refs   int
	Own    Count // content that is freed if the refs are removed and collected, referrers included
	Shared Count // content that other refs keep as well
}

// RefUsage counts the content of a ref by the index alone: its manifest, all that it needs, its
// subjects with their needs, and the referrers that only the ref keeps.
//
// Errors: [ErrNotFound], [ErrInvalidReference] for a zero ref, [ErrCorruptIndex], [ErrIndexIO], and
// any error from ctx.
func (r *LocalRegistry) RefUsage(ctx context.Context, ref Reference) (_ Usage, err error) {
	defer addOp(&err, "count", ref.String(), "")
	end, err := r.begin(ctx)
	if err != nil {
		return Usage{}, err
	}
	defer end()
	if err := ref.checkGiven(); err != nil {
		return Usage{}, err
	}
	desc, err := found(r.index.resolve(ref.key()))
	if err != nil {
		return Usage{}, err
	}
	if d := ref.Digest(); d != "" && d != desc.Digest {
		return Usage{}, ErrNotFound
	}
	u := newUsage(ctx, r.index)
	u.others.name, u.others.reference = ref.key()
	u.Refs = 1
	return u.Usage, u.add(desc.Digest)
}

// RepositoryUsage counts the content of all refs of a repository together, by the index alone. name
// is registry/repository, as [Reference.Name] returns it. A name without refs has no content.
//
// Errors: [ErrInvalidArgument] for an invalid name, [ErrCorruptIndex], [ErrIndexIO], and any error
// from ctx.
func (r *LocalRegistry) RepositoryUsage(ctx context.Context, name string) (Usage, error) {
	u := newUsage(ctx, r.index)
	u.others.name = name
	if name == "" {
		return Usage{}, opError("count", name, "", fmt.Errorf("%w: repository name is empty", ErrInvalidArgument))
	}
	for ref, err := range r.Refs(ctx, &ListOptions{Name: name}) {
		if err == nil {
			u.Refs++
			err = r.within(ctx, func() error { return u.add(ref.Descriptor.Digest) })
		}
		if err != nil {
			return Usage{}, opError("count", name, "", err)
		}
	}
	return u.Usage, nil
}

// A usage computes a Usage. It goes down from the refs, each digest once, and asks for each whether
// another ref leads to it.
type usage struct {
	Usage
	descent
	index  *index
	others climb           // goes up to all refs except those whose usage is computed
	own    []digest.Digest // manifests among Own whose referrers are not counted yet
}

// newUsage returns an empty usage. The caller says in others which refs to leave out.
func newUsage(ctx context.Context, x *index) *usage {
	return &usage{descent: descent{q: x, subjects: true}, index: x, others: climb{ctx: ctx, q: x, ways: keptByDefault()}}
}

// keptByDefault are the relations by which a collection without options keeps content. Figures
// about orphans use them too, so that they agree with GC.
func keptByDefault() ways {
	return ways{subjects: true, referrers: true, heldSince: (&GCOptions{}).heldBefore(time.Now())}
}

// add counts a manifest, everything that it needs, its subjects, and the referrers of manifests
// among Own: they would be collected with these. Referrers of shared manifests are kept by the
// other refs, so they are not counted.
func (u *usage) add(d digest.Digest) error {
	ctx := u.others.ctx
	count := func(d digest.Digest) error {
		return u.each(ctx, ocispec.Descriptor{Digest: d, Size: -1}, func(d ocispec.Descriptor) error { return u.count(d.Digest) })
	}
	if err := count(d); err != nil {
		return err
	}
	for len(u.own) > 0 {
		subject := u.own[len(u.own)-1]
		u.own = u.own[:len(u.own)-1]
		for d, err := range inPages(0, referrersPage, func(last *ocispec.Descriptor, n int) ([]ocispec.Descriptor, error) {
			after := digest.Digest("")
			if last != nil {
				after = last.Digest
			}
			return u.index.referrers(subject, "", after, n)
		}) {
			if err == nil {
				err = count(d.Digest)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// count counts one digest as Own or Shared. A subject that is not in the registry does not count.
func (u *usage) count(d digest.Digest) error {
	q := u.q
	here, err := hasBlob(q, d)
	if !here || err != nil {
		return err
	}
	_, manifest, err := manifestRow(q, d)
	if err != nil {
		return err
	}
	size, err := blobSize(q, d)
	if err != nil {
		return err
	}
	shared, err := u.others.led(d)
	if err != nil {
		return err
	}
	if shared {
		u.Shared.add(manifest, size)
	} else {
		u.Own.add(manifest, size)
		if manifest {
			u.own = append(u.own, d)
		}
	}
	return nil
}
