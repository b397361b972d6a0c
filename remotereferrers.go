package ocilocal

import (
	"bytes"
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

// A registry lists the referrers of a manifest in one of two ways: by the referrers API, or by a
// list that its clients keep under a tag, which they make from the subject's digest
// (distribution-spec, "Referrers Tag Schema"). [remoteRepo.referrersAPI] decides which one counts,
// for listing, pushing and deleting. A change of the list is this loop:
//
//	referrersTag ──▶ list, ETag ──▶ change ─┬─ nil: the list is right ──▶ done
//	     ▲                                  └─ sendManifest, If-Match: ETag
//	     └────────── read it again ◀────────────────────┘
//
// All clients share the list, and a registry does not merge their writes. Three rules protect the
// entries of others:
//
//   - A list is created only if the registry itself has said that there is none. A proxy, the
//     target of a redirect or a token server can answer 404 too. A list written after such an
//     answer would replace the real one with all its entries.
//   - A write names the state that it is based on: If-Match with the ETag of the list that was
//     read, If-None-Match for a new list. A registry that honours both loses no entry.
//   - Not every registry does. So the list is read again after each write. If another client has
//     overwritten it, the change is made again, to that client's list.
//
// The third rule is not a guarantee. Suppose that a registry ignores conditions and two clients
// have read the same list. If the second one writes after the first one has read its own entry
// back, that entry is lost, and the first push has returned nil. The time between a client's read
// and its write is the only protection then. Pushing the first artifact again adds its entry again.

// Referrers lists the manifests in a remote repository whose subject is the manifest that ref names
// (distribution-spec, "Listing Referrers"). artifactType restricts the list, and "" means all
// types. A tag is resolved first. If the registry has no referrers API, the list under the
// referrers tag counts.
//
// An error is yielded once, at the end. Errors are those of [Remote.Resolve].
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

// referrers visits the referrers of a subject, by the API or else by the tag.
func (p *remoteRepo) referrers(ctx context.Context, subject digest.Digest, artifactType string, visit func(ocispec.Descriptor) error) error {
	// The server's filter is a courtesy: the answer is filtered here too.
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
	for look := 1; ; look++ {
		api, err := p.referrersAPI(ctx, subject, artifactType, each)
		if err != nil || api.has {
			return err
		}
		list, _, err := p.referrersTag(ctx, subject)
		if err != nil {
			return err
		}
		if list != nil {
			return each(list.doc.Manifests)
		}
		// There is neither the API nor the tag. A proxy may have answered for the API, so it is
		// asked once more.
		if api.certain || look > 1 {
			return api.denied
		}
	}
}

// A referrersAnswer says what a registry answered to a request of the referrers API.
type referrersAnswer struct {
	has     bool  // it has the API, and listed everything
	certain bool  // the answer is the registry's own, and not a proxy's
	denied  error // it may have the API, but refuses this user; nil otherwise
}

// referrersAPI lists the referrers of a subject by the referrers API, and passes them to each. It
// is the only place that decides whether a registry has that API.
//
// A registry has the API if its own first answer is an image index with a list. Registries without
// it answer with many statuses, pages of HTML, or a redirect to a login page. Those answers are not
// errors: they mean that the tag counts. A failure of the registry or of its token server is an
// error, because it says nothing about the API.
func (p *remoteRepo) referrersAPI(ctx context.Context, subject digest.Digest, artifactType string, each func([]ocispec.Descriptor) error) (referrersAnswer, error) {
	u := p.url("referrers", string(subject))
	if artifactType != "" {
		u.RawQuery = url.Values{"artifactType": {artifactType}}.Encode()
	}
	pages, listed, odd := 0, 0, false
	err := p.pages(ctx, u, http.Header{"Accept": {ocispec.MediaTypeImageIndex}}, func(body []byte, res *http.Response) (bool, error) {
		m, err := parseReferrers(body, res.Header)
		if pages == 0 && (err != nil || !hasList(body) || !sameOrigin(res.Request.URL, p.host.base)) {
			odd = true
			return false, nil
		}
		if err != nil {
			return false, err
		}
		pages++
		if listed += len(m.doc.Manifests); listed > maxListed {
			return false, fmt.Errorf("%w: more than %d referrers", ErrTooLarge, maxListed)
		}
		return true, each(m.doc.Manifests)
	})
	if odd {
		return referrersAnswer{}, nil
	}
	if err == nil || pages > 0 {
		return referrersAnswer{has: true}, err
	}
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || e.TokenServer || e.Status == 0 && !errors.Is(e, ErrProtocol) || e.Temporary() {
		return referrersAnswer{}, err
	}
	switch {
	case !p.ownAnswer(e), e.Status < 400: // it was redirected, or said something that is not a list
		return referrersAnswer{}, nil
	case e.Status == http.StatusUnauthorized, e.Status == http.StatusForbidden:
		return referrersAnswer{certain: true, denied: e}, nil
	case e.Status == http.StatusNotFound:
		_, certain := p.saysAbsent(e)
		return referrersAnswer{certain: certain}, nil
	}
	return referrersAnswer{certain: true}, nil
}

// hasList reports whether an image index has a list of manifests, which may be empty.
func hasList(index []byte) bool {
	var doc struct {
		Manifests json.RawMessage `json:"manifests"`
	}
	return json.Unmarshal(index, &doc) == nil && bytes.HasPrefix(bytes.TrimSpace(doc.Manifests), []byte("["))
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

// referrersTag fetches the list under the referrers tag, and its ETag. It returns nil if the
// registry says that there is none, in the specification's form or twice. If p has a turn, the
// caller ends it when it has dropped the list.
func (p *remoteRepo) referrersTag(ctx context.Context, subject digest.Digest) (*Manifest, string, error) {
	c := p.manifestCall(http.MethodGet, referrersTagName(subject))
	for look := 1; ; look++ {
		body, res, err := p.doSmall(ctx, c, MaxManifestSize)
		if err == nil {
			err = p.turn.begin(ctx, len(body))
		}
		if err == nil {
			m, err := parseReferrers(body, res.Header)
			if err != nil {
				p.turn.end()
				return nil, "", answerProblem(c, res, fmt.Errorf("tag %s: %w", referrersTagName(subject), err))
			}
			return m, res.Header.Get("ETag"), nil
		}
		absent, certain := p.saysAbsent(err)
		if !absent {
			return nil, "", err
		}
		if certain || look > 1 {
			return nil, "", nil
		}
	}
}

// lists reports whether the registry lists d as a referrer of a subject. An error means no: the
// caller then pushes again, which is harmless.
func (p *remoteRepo) lists(ctx context.Context, subject, d digest.Digest) bool {
	found := false
	p.referrers(ctx, subject, "", func(listed ocispec.Descriptor) error {
		if found = listed.Digest == d; found {
			return errStop
		}
		return nil
	})
	return found
}

// addReferrer makes sure that m is listed as a referrer of its subject. Callers use it if the
// answer to the push of m does not say that the registry lists it.
func (p *remoteRepo) addReferrer(ctx context.Context, subject digest.Digest, m *Manifest) error {
	listed := false
	_, err := p.referrersAPI(ctx, subject, "", func(ds []ocispec.Descriptor) error {
		listed = listed || slices.ContainsFunc(ds, func(d ocispec.Descriptor) bool { return d.Digest == m.Digest() })
		return nil
	})
	if listed || err != nil && !p.fails(err) {
		return err
	}
	return p.changeReferrers(ctx, subject, func(list *Manifest) (*Manifest, error) { return withReferrer(list, m) })
}

// removeReferrer removes d from the list under the referrers tag of its subject, unless the
// registry has the referrers API (distribution-spec, "Deleting Manifests").
func (p *remoteRepo) removeReferrer(ctx context.Context, subject, d digest.Digest) error {
	api, err := p.referrersAPI(ctx, subject, "", func([]ocispec.Descriptor) error { return nil })
	if api.has || err != nil && !p.fails(err) {
		return err
	}
	return p.changeReferrers(ctx, subject, func(list *Manifest) (*Manifest, error) { return withoutReferrer(list, d) })
}

// fails reports whether err is a failure of the registry itself. If the API fails, the tag is
// written nevertheless: a needless entry there does no harm, and a missing one does.
func (p *remoteRepo) fails(err error) bool {
	e, ok := errors.AsType[*RemoteError](err)
	return ok && p.ownAnswer(e) && e.Status >= 500
}

// changeReferrers writes the result of change to the referrers tag, and reads the list again, until
// change returns nil because the list is right. One goroutine of a host does so at a time.
func (p *remoteRepo) changeReferrers(ctx context.Context, subject digest.Digest, change func(*Manifest) (*Manifest, error)) error {
	select {
	case p.host.referrers <- struct{}{}:
		defer func() { <-p.host.referrers }()
	case <-ctx.Done():
		return ctx.Err()
	}
	conditional := true
	for attempt := 1; ; attempt++ {
		old, etag, err := p.referrersTag(ctx, subject)
		if err != nil {
			return err
		}
		list, err := change(old)
		if err != nil || list == nil {
			return err
		}
		if attempt > 2*maxRetries {
			return &RemoteError{Method: http.MethodPut, URL: publicURL(p.url("manifests", referrersTagName(subject))), givenUp: true,
				Err: fmt.Errorf("%w: other clients overwrite the list of referrers again and again", ErrTransport)}
		}
		header := http.Header{}
		switch {
		case !conditional:
		case old == nil:
			header.Set("If-None-Match", "*")
		case etag != "" && !strings.HasPrefix(etag, "W/"): // a weak one never matches (RFC 9110, section 13.1.1)
			header.Set("If-Match", etag)
		}
		_, _, err = p.sendManifest(ctx, referrersTagName(subject), list, header) // it is read again below
		if e, ok := errors.AsType[*RemoteError](err); ok {
			switch e.Status {
			case http.StatusPreconditionFailed, http.StatusConflict: // somebody else has just changed it
				e.again, e.givenUp = true, false
				err = p.remote.again(ctx, attempt, e)
			case http.StatusBadRequest, http.StatusNotImplemented: // perhaps it doesn't know the condition
				if len(header) > 0 {
					conditional, err = false, nil
				}
			}
		}
		if err != nil {
			return err
		}
	}
}

// withReferrer returns the list with m, and nil if m is in it already.
func withReferrer(list, m *Manifest) (*Manifest, error) {
	desc := m.Descriptor()
	var others []ocispec.Descriptor
	if list != nil {
		others = list.doc.Manifests
	}
	if slices.ContainsFunc(others, func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest }) {
		return nil, nil
	}
	return referrersList(list, append(slices.Clip(others), ocispec.Descriptor{
		MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size,
		ArtifactType: m.ArtifactType(), Annotations: m.doc.Annotations,
	}))
}

// withoutReferrer returns the list without a manifest, and nil if the manifest is not in it.
func withoutReferrer(list *Manifest, gone digest.Digest) (*Manifest, error) {
	if list == nil {
		return nil, nil
	}
	others := slices.DeleteFunc(slices.Clone(list.doc.Manifests), func(d ocispec.Descriptor) bool { return d.Digest == gone })
	if len(others) == len(list.doc.Manifests) {
		return nil, nil
	}
	return referrersList(list, others)
}

// referrersList returns a list of manifests with the annotations of an old list, which may be nil.
func referrersList(old *Manifest, manifests []ocispec.Descriptor) (*Manifest, error) {
	doc := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests}
	doc.SchemaVersion = 2
	if old != nil {
		doc.Annotations = old.doc.Annotations
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	return parseManifest(ocispec.MediaTypeImageIndex, raw)
}
