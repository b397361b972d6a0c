package ocilocal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A mirror lists what its upstream lists together with what is here: a tag that was pushed here, or
// that the upstream has deleted, can still be pulled here. Lists of the upstream are not kept.

// These bound the referrers of one manifest that a mirror lists, and the memory that they take, in
// bytes. It has all of them in memory, because the upstream may list them in any order.
const (
	maxUpstreamReferrers     = 10_000
	maxUpstreamReferrersSize = 16 << 20
)

// listedSize returns about how much memory a descriptor takes that was read from a list.
func listedSize(d ocispec.Descriptor) int {
	const fixed, each = 256, 64 // the structs and maps beside the texts
	size := fixed + len(d.MediaType) + len(d.Digest) + len(d.ArtifactType)
	for k, v := range d.Annotations {
		size += each + len(k) + len(v)
	}
	return size
}

// list asks the upstream for a list. If that fails, the answer has a warning that the list may be
// incomplete, and the error is logged and returned. [ErrNotFound] means that the upstream has none.
func (x *exchange) list(what string, ask func(context.Context, *remoteRepo) error) error {
	ctx, cancel := context.WithTimeout(x.r.Context(), maxRevalidation)
	defer cancel()
	src, err := x.upstream.source(x.repo, defaultTag)
	if err == nil {
		err = fetchFrom(src, func() error { return ask(ctx, src) })
		src.turn.end()
	}
	if err != nil && !errors.Is(err, ErrNotFound) && x.r.Context().Err() == nil {
		x.w.Header().Set("Warning", `299 - "the upstream registry failed: this list has only what is here"`)
		x.registry.opts.Logger.Warn("ocilocal: the upstream registry does not list "+what, "repository", x.repo.name, "error", err)
	}
	return err
}

// upstreamTags returns at most n tags of the upstream after last, in order. Errors are those of
// list.
func (x *exchange) upstreamTags(last string, n int) (tags []string, err error) {
	err = x.list("tags", func(ctx context.Context, src *remoteRepo) error {
		tags = nil
		u := src.url("tags", "list")
		u.RawQuery = url.Values{"n": {strconv.Itoa(n)}, "last": {last}}.Encode()
		return src.tagPages(ctx, u, func(page []string) bool {
			for _, tag := range page {
				if tag > last { // some registries ignore last
					tags = append(tags, tag)
				}
			}
			return len(tags) < n
		})
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(tags)
	return tags[:min(n, len(tags))], nil
}

// mergeTags merges two pages of at most n tags.
func mergeTags(a, b []string, n int) []string {
	all := append(a, b...)
	slices.Sort(all)
	all = slices.Compact(all)
	return all[:min(n, len(all))]
}

// compareDigests is the order of referrers.
func compareDigests(a, b digest.Digest) int { return bytes.Compare(digestBytes(a), digestBytes(b)) }

// allReferrers are the referrers of the upstream and those that are here, in order.
func (x *exchange) allReferrers(opts *ReferrersOptions) iter.Seq2[ocispec.Descriptor, error] {
	here := x.repo.Referrers(x.r.Context(), x.digest, opts)
	if x.upstream == nil {
		return here
	}
	var there []ocispec.Descriptor
	err := x.list("referrers", func(ctx context.Context, src *remoteRepo) error {
		there = nil
		size := 0
		return src.referrers(ctx, x.digest, opts.ArtifactType, func(d ocispec.Descriptor) error {
			if opts.After == "" || compareDigests(d.Digest, opts.After) > 0 {
				if size += listedSize(d); len(there) == maxUpstreamReferrers || size > maxUpstreamReferrersSize {
					return fmt.Errorf("%w: more than %d referrers, or more than %d bytes", ErrTooLarge, maxUpstreamReferrers, maxUpstreamReferrersSize)
				}
				there = append(there, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, ArtifactType: d.ArtifactType, Annotations: d.Annotations})
			}
			return nil
		})
	})
	if err != nil || len(there) == 0 {
		return here
	}
	slices.SortFunc(there, func(a, b ocispec.Descriptor) int { return compareDigests(a.Digest, b.Digest) })
	there = slices.CompactFunc(there, func(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest })
	return func(yield func(ocispec.Descriptor, error) bool) {
		for d, err := range here {
			for err == nil && len(there) > 0 && compareDigests(there[0].Digest, d.Digest) <= 0 {
				next := there[0]
				if there = there[1:]; next.Digest == d.Digest {
					break
				}
				if !yield(next, nil) {
					return
				}
			}
			if !yield(d, err) || err != nil {
				return
			}
		}
		for _, d := range there {
			if !yield(d, nil) {
				return
			}
		}
	}
}
