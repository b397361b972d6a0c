package ocilocal

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Resolve asks a remote registry for the descriptor of the manifest that ref names: its media type,
// digest and size. Nothing is stored. The bytes of the manifest are not verified.
//
// ctx governs the call.
//
// Errors:
//   - [*RemoteError] for failures of the registry or the network, with one of the sentinels that it
//     lists
//   - [ErrInvalidReference] for a zero ref, [ErrInvalidArgument] for a malformed [Mirror]
//   - any error from ctx
func (r *Remote) Resolve(ctx context.Context, ref Reference) (_ ocispec.Descriptor, err error) {
	defer addOp(&err, "resolve remotely", ref.String(), "")
	p, err := r.source(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return p.head(ctx, p.reference())
}

// Manifest fetches and verifies a manifest without storing it. Its errors are those of
// [Remote.Resolve], and [ErrDigestMismatch], [ErrInvalidManifest], [ErrUnsupportedMediaType] or
// [ErrTooLarge] for a manifest that is refused.
func (r *Remote) Manifest(ctx context.Context, ref Reference) (_ *Manifest, err error) {
	defer addOp(&err, "fetch manifest", ref.String(), "")
	p, err := r.source(ref)
	if err != nil {
		return nil, err
	}
	return p.manifest(ctx, p.reference(), "")
}

// Delete deletes a tag. If ref has a digest, Delete deletes the manifest with all tags that point
// at it. If the registry has no referrers API, a manifest with a subject is also removed from the
// list under the subject's referrers tag.
//
// Errors are those of [Remote.Resolve], and [errors.ErrUnsupported] if the registry does not allow
// such deletions.
func (r *Remote) Delete(ctx context.Context, ref Reference) (err error) {
	defer addOp(&err, "delete remotely", ref.String(), "")
	p, err := r.repo(ref)
	if err != nil {
		return err
	}
	return p.delete(ctx, p.reference())
}

// delete deletes a tag, or a manifest by digest. Before it deletes a manifest it reads it, because
// only the manifest names the subject whose list of referrers must be corrected.
func (p *remoteRepo) delete(ctx context.Context, reference string) error {
	var subject *ocispec.Descriptor
	if checkDigest(digest.Digest(reference)) == nil {
		m, err := p.manifest(ctx, reference, "")
		if e, ok := errors.AsType[*RemoteError](err); err != nil && (!ok || e.Temporary()) {
			return err // the manifest could stay listed as a referrer
		}
		if err == nil { // otherwise the answer to DELETE is decisive
			subject = m.doc.Subject
		}
	}
	res, err := p.do(ctx, &remoteCall{
		method: http.MethodDelete, url: p.url("manifests", reference), actions: []string{"delete"},
		ok: any2xx,
	})
	if e, ok := errors.AsType[*RemoteError](err); ok && e.Status == http.StatusBadRequest {
		e.Err = fmt.Errorf("%w: %w", errors.ErrUnsupported, e.Err)
	}
	if err != nil {
		return err
	}
	res.Body.Close()
	if subject == nil {
		return nil
	}
	if err := p.removeReferrer(ctx, subject.Digest, digest.Digest(reference)); err != nil {
		return fmt.Errorf("manifest %s is deleted, but maybe still listed as a referrer of %s: %w", reference, subject.Digest, err)
	}
	return nil
}

// reference returns the last part of a manifest's address: the digest, or else the tag.
func (p *remoteRepo) reference() string { return cmp.Or(string(p.ref.Digest()), p.ref.Tag()) }

// maxListBody bounds one page of tags or referrers.
const maxListBody = MaxManifestSize

// maxListed bounds how many tags or referrers are listed in all.
const maxListed = 1_000_000

// pages asks for a list page by page, and calls visit with the body and the answer of each page.
// It ends when visit returns false or there is no next page. [errStop] of visit is returned as it
// is. The turn ends with each visit, because the next page may take long. A registry that leads in a
// circle, or on and on, is an [ErrProtocol]: no address is asked twice.
func (p *remoteRepo) pages(ctx context.Context, first *url.URL, header http.Header, visit func(body []byte, res *http.Response) (more bool, err error)) error {
	seen := map[string]bool{}
	for u := first; u != nil; {
		if seen[u.String()] || len(seen) >= maxPages {
			return p.conceal(protocolError(http.MethodGet, u, http.StatusOK, "list returns to an earlier page, or has more than %d pages", maxPages))
		}
		seen[u.String()] = true
		c := &remoteCall{method: http.MethodGet, url: u, header: header, actions: []string{"pull"}, ok: []int{http.StatusOK}}
		body, res, err := p.doSmall(ctx, c, maxListBody)
		if err != nil {
			return err
		}
		if err := p.turn.begin(ctx, len(body)); err != nil {
			return err
		}
		more, err := visit(body, res)
		p.turn.end()
		if errors.Is(err, errStop) {
			return err
		}
		if err != nil {
			return answerProblem(c, res, err)
		}
		if !more {
			return nil
		}
		if u, err = nextPage(u, res.Header); err != nil {
			return answerProblem(c, res, err)
		}
	}
	return nil
}

// Tags lists the tags of a remote repository in the registry's order. The tag and the digest of ref
// are not used. Tags that no [Reference] can have are left out.
//
// An error is yielded once, at the end. Errors are those of [Remote.Resolve].
func (r *Remote) Tags(ctx context.Context, ref Reference) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		p, err := r.repo(ref)
		if err == nil {
			err = p.tagPages(ctx, p.url("tags", "list"), func(page []string) bool {
				for _, tag := range page {
					if !yield(tag, nil) {
						return false
					}
				}
				return true
			})
		}
		if err != nil {
			yield("", opError("list tags of", ref.Name(), "", err))
		}
	}
}

// tagPages visits the pages of a list of tags that begins at u, until visit returns false.
func (p *remoteRepo) tagPages(ctx context.Context, u *url.URL, visit func(page []string) (more bool)) error {
	listed := 0
	return p.pages(ctx, u, nil, func(body []byte, _ *http.Response) (bool, error) {
		var doc struct {
			Tags []string `json:"tags"`
		}
		if err := json.Unmarshal(body, &doc); err != nil {
			return false, fmt.Errorf("%w: list of tags: %w", ErrProtocol, err)
		}
		if listed += len(doc.Tags); listed > maxListed {
			return false, fmt.Errorf("%w: more than %d tags", ErrTooLarge, maxListed)
		}
		return visit(slices.DeleteFunc(doc.Tags, func(tag string) bool { return checkTag(tag) != nil })), nil
	})
}
