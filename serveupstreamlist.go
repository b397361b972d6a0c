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

// maxUpstreamReferrers bounds the referrers of one manifest that a mirror lists.
const maxUpstreamReferrers = 10_000

// list asks the upstream for a list. If that fails, the answer has a warning that the list may be
// incomplete, and the error is logged and returned. [ErrNotFound] means that the upstream has none.
func (x *exchange) list(what string, ask func(context.Context, *remoteRepo) error) error {
	ctx, cancel := context.WithTimeout(x.r.Context(), maxRevalidation)
	defer cancel()
	src, err := x.upstream.source(x.repo, defaultTag)
	if err == nil {
		err = fetchFrom(src, func() error { return ask(ctx, src) })
	}
	if err != nil && !errors.Is(err, ErrNotFound) && x.r.Context().Err() == nil {
		x.w.Header().Set("Warning", `299 - "the upstream registry failed: this list has only what is here"`)
		x.registry.opts.Logger.Warn("ocilocal: the upstream registry does not list "+what, "repository", x.repo.name, "error", err)
	}
	return err
}

// upstreamTags returns at most n tags of the upstream after last, in order. Errors are those of list.
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
		return src.referrers(ctx, x.digest, opts.ArtifactType, func(d ocispec.Descriptor) error {
			if len(there) == maxUpstreamReferrers {
				return fmt.Errorf("%w: more than %d referrers", ErrTooLarge, maxUpstreamReferrers)
			}
			if opts.After == "" || compareDigests(d.Digest, opts.After) > 0 {
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
