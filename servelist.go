package ocilocal

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strconv"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The limits of one page. A client may ask for fewer entries by n, and gets no error if it asks for
// more: the distribution specification lets a server send fewer.
const (
	maxServedPage      = 1000 // names
	maxServedReferrers = 500
	// maxReferrersSize is how many bytes the descriptors of a page may have. Clients read an image
	// index of at most 4 MiB.
	maxReferrersSize = 3 << 20
)

// All lists are paged alike. The position is the last entry of the page before, never a number or a
// cursor that the server keeps, so any process can serve the next page, and entries that come or go
// in between shift nothing. One entry more than the page is read: if there is one, the answer has a
// Link header with rel="next". The client follows it as it is.

// pageSize returns how many entries the client wants, at most limit.
func pageSize(q url.Values, limit int) (int, error) {
	s := q.Get("n")
	if s == "" {
		return limit, nil
	}
	n, ok := parseCount(s)
	if !ok {
		return 0, serveErrorf(http.StatusBadRequest, codeUnsupported, "n is not a number")
	}
	return int(min(n, int64(limit))), nil
}

// next sets the link to the next page.
func (x *exchange) next(suffix string, query ...string) {
	x.w.Header().Set("Link", "<"+x.url(suffix, query...)+`>; rel="next"`)
}

// tags serves the list of a repository's tags, in the order of their bytes. A repository with
// content and without tags has an empty list. One without content is a 404.
func (x *exchange) tags() error {
	q := x.r.URL.Query()
	n, err := pageSize(q, maxServedPage)
	if err != nil {
		return err
	}
	last := q.Get("last")
	if len(last) > maxTagLen {
		last = last[:maxTagLen+1] // still after the same tags, since none is longer than maxTagLen
	}
	tags, lacks := []string{}, ErrNotFound // why there may be no tag
	if n > 0 {
		page, err := x.repo.TagList(x.r.Context(), last, n+1)
		if err != nil {
			return err
		}
		if tags = append(tags, page...); x.upstream != nil {
			page, lacks = x.upstreamTags(last, n+1)
			tags = mergeTags(tags, page, n+1)
		}
	}
	if len(tags) == 0 && lacks != nil {
		err := x.checkKnown()
		if errors.Is(err, ErrNotFound) {
			err = x.upstreamError(lacks)
		}
		if err != nil {
			return err
		}
	}
	if len(tags) > n {
		tags = tags[:n]
		x.next(x.name+"/tags/list", "n", strconv.Itoa(n), "last", tags[n-1])
	}
	return x.json(struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{x.name, tags})
}

// checkKnown returns [ErrNotFound] if the repository has no ref and holds no manifest.
func (x *exchange) checkKnown() error {
	ctx := x.r.Context()
	refs, err := x.registry.page(ctx, x.repo.name, "", x.repo.name+"\x00", 1)
	if err != nil || len(refs) > 0 {
		return err
	}
	known := false
	err = x.registry.within(ctx, func() error {
		return holdsIn(ctx, x.registry.index, x.repo.name, func(holdRow) error {
			known = true
			return errStop
		})
	})
	if known {
		return nil
	}
	return cmp.Or(err, ErrNotFound)
}

// catalog serves the list of repositories below the served host. Other repositories of the registry
// can't be reached by this handler. With HandlerOptions.Name there is no list: that function maps
// names in one direction only.
func (x *exchange) catalog() error {
	if x.opts.Name != nil {
		return serveErrorf(http.StatusNotFound, codeUnsupported, "there is no catalog")
	}
	q := x.r.URL.Query()
	n, err := pageSize(q, maxServedPage)
	if err != nil {
		return err
	}
	prefix, after := x.opts.Host+"/", ""
	if last := q.Get("last"); last != "" {
		if len(last) > maxNameLen || repositoryFault(last) >= 0 {
			return serveErrorf(http.StatusBadRequest, codeNameInvalid, "last is not a repository")
		}
		after = prefix + last // it need not exist, or be a canonical name
	}
	names := []string{}
	if n > 0 {
		err := x.registry.within(x.r.Context(), func() error {
			page, err := x.registry.index.names(prefix, after, prefixEnd(prefix), n+1)
			for _, name := range page {
				names = append(names, name[len(prefix):])
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if len(names) > n {
		names = names[:n]
		x.next("_catalog", "n", strconv.Itoa(n), "last", names[n-1])
	}
	return x.json(struct {
		Repositories []string `json:"repositories"`
	}{names})
}

// referrers serves the manifests of the repository whose subject is the digest of the path, as an
// image index, in pages by their digests. An unknown digest has an empty list, as the distribution
// specification demands: a referrer may come before its subject.
//
// A page ends at n entries or at maxReferrersSize bytes, whichever comes first. It has at least one
// entry, or a single large descriptor would end the list.
func (x *exchange) referrers() error {
	q := x.r.URL.Query()
	n, err := pageSize(q, maxServedReferrers)
	if err != nil {
		return err
	}
	opts := &ReferrersOptions{ArtifactType: q.Get("artifactType"), After: digest.Digest(q.Get("last"))}
	if opts.After != "" && checkDigest(opts.After) != nil {
		return serveErrorf(http.StatusBadRequest, codeDigestInvalid, "last is not a digest")
	}
	n = max(n, 1) // the next page begins after an entry of this one
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	size := 0
	for d, err := range x.allReferrers(opts) {
		if err != nil {
			return err
		}
		one, err := json.Marshal(d)
		if err != nil {
			return err
		}
		if size += len(one); len(index.Manifests) == n || size > maxReferrersSize && len(index.Manifests) > 0 {
			query := []string{"n", strconv.Itoa(n), "last", string(index.Manifests[len(index.Manifests)-1].Digest)}
			if opts.ArtifactType != "" {
				query = append(query, "artifactType", opts.ArtifactType)
			}
			x.next(x.name+"/referrers/"+string(x.digest), query...)
			break
		}
		index.Manifests = append(index.Manifests, d)
	}
	if opts.ArtifactType != "" {
		x.w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	body, err := json.Marshal(index)
	if err != nil {
		return err
	}
	x.respond(http.StatusOK, ocispec.MediaTypeImageIndex, body)
	return nil
}
