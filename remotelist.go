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
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Resolve asks ref's registry for the descriptor of the manifest that ref names:
// media type, digest and size. Nothing is stored. Errors are those of [LocalRegistry.Pull]
// that a remote registry causes.
func (r *Remote) Resolve(ctx context.Context, ref Reference) (ocispec.Descriptor, error) {
	p, err := r.repo(ref)
	if err != nil {
		return ocispec.Descriptor{}, opError("resolve remotely", ref.String(), "", err)
	}
	desc, err := p.head(ctx, p.reference())
	return desc, opError("resolve remotely", ref.String(), "", err)
}

// Manifest fetches and verifies a manifest without storing it. Errors are
// those of [Remote.Resolve].
func (r *Remote) Manifest(ctx context.Context, ref Reference) (*Manifest, error) {
	p, err := r.repo(ref)
	if err != nil {
		return nil, opError("fetch manifest", ref.String(), "", err)
	}
	m, err := p.manifest(ctx, p.reference(), "")
	return m, opError("fetch manifest", ref.String(), "", err)
}

// Delete deletes a tag, or, if ref has a digest, a manifest with all tags that point at
// it. A manifest with a subject is taken out of the subject's referrers tag if the registry
// has no referrers API. Registries may refuse either: [errors.ErrUnsupported]. Further errors are
// those of [Remote.Resolve].
func (r *Remote) Delete(ctx context.Context, ref Reference) error {
	p, err := r.repo(ref)
	if err == nil {
		err = p.delete(ctx, p.reference())
	}
	return opError("delete remotely", ref.String(), "", err)
}

func (p *remoteRepo) delete(ctx context.Context, reference string) error {
	var subject *ocispec.Descriptor
	if checkDigest(digest.Digest(reference)) == nil {
		if m, err := p.manifest(ctx, reference, ""); err == nil { // else the answer to DELETE is what counts
			subject = m.doc.Subject
		}
	}
	res, err := p.do(ctx, &remoteCall{
		method: http.MethodDelete, url: p.url("manifests", reference), actions: []string{"delete"},
		ok: []int{http.StatusAccepted, http.StatusOK, http.StatusNoContent},
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

// reference is what stands behind manifests/: the digest, or else the tag.
func (p *remoteRepo) reference() string { return cmp.Or(string(p.ref.Digest()), p.ref.Tag()) }

// maxListBody bounds one page of tags or referrers.
const maxListBody = MaxManifestSize

// maxListed bounds how many tags or referrers are listed in all.
const maxListed = 1_000_000

// pages asks for a list, page by page, and calls visit with each page's body and answer.
func (p *remoteRepo) pages(ctx context.Context, first *url.URL, header http.Header, visit func(body []byte, res *http.Response) (more bool, err error)) error {
	seen := map[string]bool{}
	for u := first; u != nil; {
		if seen[u.String()] || len(seen) >= maxPages {
			return p.conceal(protocolError(http.MethodGet, u, http.StatusOK, "list comes back to a page, or has more than %d", maxPages))
		}
		seen[u.String()] = true
		c := &remoteCall{method: http.MethodGet, url: u, header: header, actions: []string{"pull"}, ok: []int{http.StatusOK}}
		body, res, err := p.doSmall(ctx, c, maxListBody)
		if err != nil {
			return err
		}
		more, err := visit(body, res)
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

// nextPage returns the address in a Link of relation "next" (RFC 8288), nil if there is none.
// It must be on the origin that was asked.
func nextPage(at *url.URL, h http.Header) (*url.URL, error) {
	text, err := parseLink(h.Values("Link"))
	if err != nil || text == "" {
		return nil, err
	}
	u, err := redirected(at, "Link", text)
	if err != nil {
		return nil, err
	}
	if !sameOrigin(u, at) {
		return nil, fmt.Errorf("%w: Link leads to another host, %s", ErrProtocol, printable(u.Host))
	}
	return u, nil
}

// maxLinkLen bounds the address of a page.
const maxLinkLen = 8 << 10

// parseLink returns the target of the first link with relation "next", "" if
// there is none. A field that can't be read is an error: the list might go on.
func parseLink(fields []string) (string, error) {
	for _, f := range fields {
		s := challengeScanner{text: f}
		for s.skip(" \t,"); s.text != ""; s.skip(" \t,") {
			target, next, ok := s.link()
			switch {
			case !ok:
				return "", fmt.Errorf("%w: Link can't be read", ErrProtocol) // what it says may have a secret query
			case next && len(target) > maxLinkLen:
				return "", fmt.Errorf("%w: Link of %d bytes", ErrProtocol, len(target))
			case next:
				return target, nil
			}
		}
	}
	return "", nil
}

// link reads one link with its parameters, of which only the first "rel" counts.
func (s *challengeScanner) link() (target string, next, ok bool) {
	text, ok := strings.CutPrefix(s.text, "<")
	target, text, ok2 := strings.Cut(text, ">")
	if !ok || !ok2 {
		return "", false, false
	}
	s.text = text
	related := false
	for s.skip(" \t;"); s.text != "" && s.text[0] != ','; s.skip(" \t;") {
		name, value := strings.TrimSpace(s.until("=;,")), ""
		if strings.HasPrefix(s.text, "=") {
			s.skip("= \t")
			if strings.HasPrefix(s.text, `"`) {
				if value, ok = s.value(); !ok {
					return "", false, false
				}
			}
			value += s.until(";,")
		}
		if strings.EqualFold(name, "rel") && !related {
			related, next = true, slices.Contains(strings.Fields(strings.ToLower(value)), "next")
		}
	}
	return target, next, true
}

// until reads up to one of some characters, or all that is left.
func (s *challengeScanner) until(chars string) string {
	n := strings.IndexAny(s.text, chars)
	if n < 0 {
		n = len(s.text)
	}
	t := s.text[:n]
	s.text = s.text[n:]
	return t
}

// Tags lists the tags of ref's repository, in the registry's order; ref's own tag and
// digest don't matter. Tags that no reference could have are left out. An error is yielded once, at the end; errors are those of [Remote.Resolve].
func (r *Remote) Tags(ctx context.Context, ref Reference) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		p, err := r.repo(ref)
		if err == nil {
			listed := 0
			u := p.url("tags", "list")
			err = p.pages(ctx, u, nil, func(body []byte, _ *http.Response) (bool, error) {
				var doc struct {
					Tags []string `json:"tags"`
				}
				if err := json.Unmarshal(body, &doc); err != nil {
					return false, fmt.Errorf("%w: list of tags: %w", ErrProtocol, err)
				}
				if listed += len(doc.Tags); listed > maxListed {
					return false, fmt.Errorf("%w: more than %d tags", ErrTooLarge, maxListed)
				}
				for _, tag := range doc.Tags {
					if checkTag(tag) == nil && !yield(tag, nil) {
						return false, errStop
					}
				}
				return true, nil
			})
		}
		if err != nil && !errors.Is(err, errStop) {
			yield("", opError("list tags of", ref.Name(), "", err))
		}
	}
}

// Referrers lists the manifests in ref's repository whose subject is the one that ref
// names, of one artifact type or, if that is "", of all (distribution-spec,
// "Listing Referrers"). A tag is resolved first. A registry without that API is asked for the referrers tag.
// An error is yielded once, at the end; errors are those of [Remote.Resolve].
func (r *Remote) Referrers(ctx context.Context, ref Reference, artifactType string) iter.Seq2[ocispec.Descriptor, error] {
	return func(yield func(ocispec.Descriptor, error) bool) {
		p, err := r.repo(ref)
		subject := ref.Digest()
		if err == nil && subject == "" {
			var desc ocispec.Descriptor
			desc, err = p.head(ctx, ref.Tag())
			subject = desc.Digest
		}
		if err == nil {
			err = p.referrers(ctx, subject, artifactType, func(d ocispec.Descriptor) error {
				if !yield(d, nil) {
					return errStop
				}
				return nil
			})
		}
		if err != nil && !errors.Is(err, errStop) {
			yield(ocispec.Descriptor{}, opError("list referrers of", ref.String(), subject, err))
		}
	}
}

func (p *remoteRepo) referrers(ctx context.Context, subject digest.Digest, artifactType string, visit func(ocispec.Descriptor) error) error {
	// The server's filter is a courtesy: all that comes is filtered here too.
	each := func(ds []ocispec.Descriptor) error {
		for _, d := range ds {
			if artifactType != "" && d.ArtifactType != artifactType {
				continue
			}
			if err := visit(d); err != nil {
				return err
			}
		}
		return nil
	}
	u := p.url("referrers", string(subject))
	if artifactType != "" {
		u.RawQuery = url.Values{"artifactType": {artifactType}}.Encode()
	}
	listed := 0
	err := p.pages(ctx, u, http.Header{"Accept": {ocispec.MediaTypeImageIndex}}, func(body []byte, res *http.Response) (bool, error) {
		m, err := parseReferrers(body, res.Header)
		if err != nil {
			return false, err
		}
		if listed += len(m.doc.Manifests); listed > maxListed {
			return false, fmt.Errorf("%w: more than %d referrers", ErrTooLarge, maxListed)
		}
		return true, each(m.doc.Manifests)
	})
	if e, ok := errors.AsType[*RemoteError](err); !ok || listed > 0 || e.Status != http.StatusNotFound && e.Status != http.StatusMethodNotAllowed {
		return err
	}
	m, _, err := p.referrersTag(ctx, subject)
	if err != nil || m == nil {
		return err
	}
	return each(m.doc.Manifests)
}

// parseReferrers reads an image index that lists referrers.
func parseReferrers(body []byte, h http.Header) (*Manifest, error) {
	given, err := manifestType(h, "")
	if err == nil && given != "" && given != ocispec.MediaTypeImageIndex {
		err = fmt.Errorf("%w: list of referrers is a %s", ErrProtocol, given)
	}
	if err != nil {
		return nil, err
	}
	return parseManifest(ocispec.MediaTypeImageIndex, body)
}

// referrersTagName is the tag of the fallback (distribution-spec, "Referrers Tag Schema").
func referrersTagName(subject digest.Digest) string {
	enc := subject.Encoded()
	return string(subject.Algorithm()) + "-" + enc[:min(len(enc), 64)]
}

// referrersTag fetches the referrers tag and its ETag; nil if there is none.
func (p *remoteRepo) referrersTag(ctx context.Context, subject digest.Digest) (*Manifest, string, error) {
	c := p.manifestCall(http.MethodGet, referrersTagName(subject))
	body, res, err := p.doSmall(ctx, c, MaxManifestSize)
	if errors.Is(err, ErrNotFound) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	m, err := parseReferrers(body, res.Header)
	if err != nil {
		return nil, "", answerProblem(c, res, fmt.Errorf("tag %s: %w", referrersTagName(subject), err))
	}
	return m, res.Header.Get("ETag"), nil
}
