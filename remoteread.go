package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// acceptManifests is the Accept header for manifests. Without it some registries convert a manifest
// to an older form, whose digest is another one.
var acceptManifests = strings.Join([]string{
	ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, MediaTypeArtifactManifest,
	MediaTypeDockerManifest, MediaTypeDockerManifestList,
}, ", ")

// manifestCall returns a request for a manifest by tag or digest.
func (p *remoteRepo) manifestCall(method, reference string) *remoteCall {
	return &remoteCall{
		method: method, url: p.url("manifests", reference), header: http.Header{"Accept": {acceptManifests}},
		actions: []string{"pull"}, ok: []int{http.StatusOK},
	}
}

// manifest fetches and verifies a manifest by tag or digest. mediaType is the type that it must
// have, or "" for any type. A manifest by digest has the bytes of that digest, whoever sent them. If
// p has a turn, the caller ends it when it has dropped the manifest.
func (p *remoteRepo) manifest(ctx context.Context, reference, mediaType string) (m *Manifest, err error) {
	answered, err := p.viaMirrors(ctx, isTag(reference), func(mirror *remoteRepo) error {
		m, err = mirror.ownManifest(ctx, reference, mediaType)
		return err
	})
	if answered || err != nil {
		return m, err
	}
	m, err = p.ownManifest(ctx, reference, mediaType)
	return m, p.despiteMirrors(err)
}

// ownManifest is manifest without mirrors.
func (p *remoteRepo) ownManifest(ctx context.Context, reference, mediaType string) (*Manifest, error) {
	c := p.manifestCall(http.MethodGet, reference)
	raw, res, err := p.doSmall(ctx, c, MaxManifestSize)
	if err != nil {
		return nil, err
	}
	d, err := manifestDigest(reference, res.Header, raw)
	if err != nil {
		return nil, answerProblem(c, res, err)
	}
	given, err := manifestType(res.Header, mediaType)
	if err != nil {
		return nil, answerProblem(c, res, err)
	}
	if err := p.turn.begin(ctx, len(raw)); err != nil {
		return nil, err
	}
	m, err := parseManifest(given, raw)
	if err != nil {
		p.turn.end()
		return nil, answerProblem(c, res, err)
	}
	m.digest = d
	return m, nil
}

// ownAnswer reports whether the registry itself gave the answer that e describes, and not a token
// server or the target of a redirect.
func (p *remoteRepo) ownAnswer(e *RemoteError) bool {
	u, err := url.Parse(e.URL)
	return err == nil && e.Status != 0 && !e.TokenServer && sameOrigin(u, p.host.base)
}

// saysAbsent reports whether err is the registry's answer that something does not exist. The answer
// is certain if it has the form of the specification. Otherwise it may come from a proxy, and
// callers ask a second time. A wrong absence does damage: an artifact would be published without a
// member, or a list of referrers would be overwritten.
func (p *remoteRepo) saysAbsent(err error) (absent, certain bool) {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || !errors.Is(e, ErrNotFound) || !p.ownAnswer(e) {
		return false, false
	}
	return true, e.has("MANIFEST_UNKNOWN", "NAME_UNKNOWN", "BLOB_UNKNOWN", "MANIFEST_BLOB_UNKNOWN", "NOT_FOUND")
}

// manifestDigest hashes a manifest. The digest must be the one that was asked for. For a tag it
// must be the one in the answer's header, if there is one. The header only finds damage then: a
// registry that lies can lie in both.
func manifestDigest(reference string, h http.Header, raw []byte) (digest.Digest, error) {
	want := digest.Digest(reference)
	if checkDigest(want) != nil {
		var err error
		if want, err = headerDigest(h); err != nil {
			return "", err
		}
	}
	if want == "" {
		return digest.FromBytes(raw), nil
	}
	if got := digestOf(want.Algorithm(), raw); got != want {
		return "", fmt.Errorf("%w: bytes hash to %s, want %s", ErrDigestMismatch, got, want)
	}
	return want, nil
}

// headerDigest returns the digest in the header of an answer. It returns "" if there is none, or if
// its algorithm is unknown to this package.
func headerDigest(h http.Header) (digest.Digest, error) {
	d := digest.Digest(h.Get("Docker-Content-Digest"))
	err := checkDigest(d)
	if d == "" || err != nil && errors.Is(d.Validate(), digest.ErrDigestUnsupported) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("%w: Docker-Content-Digest: %w", ErrProtocol, err)
	}
	return d, nil
}

// manifestType returns the media type of an answer. A general type counts as want. If want is "",
// the result is "" and the document itself must say what it is.
func manifestType(h http.Header, want string) (string, error) {
	text := h.Get("Content-Type")
	first, _, _ := strings.Cut(text, ",")
	given, _, err := mime.ParseMediaType(first)
	if err != nil && text != "" && !errors.Is(err, mime.ErrInvalidMediaParameter) {
		return "", fmt.Errorf("%w: Content-Type %s", ErrProtocol, printable(text))
	}
	general := slices.Contains(generalTypes, given)
	switch {
	case formOf(given) == 0 && !general:
		return "", fmt.Errorf("%w: Content-Type %s is not of a manifest", ErrUnsupportedMediaType, printable(given))
	case general:
		return want, nil
	case want != "" && given != want:
		return "", fmt.Errorf("%w: Content-Type is %s, its descriptor says %s", ErrInvalidManifest, printable(given), printable(want))
	}
	return given, nil
}

// generalTypes are the media types that servers give to files of which they know nothing, or only
// that they are JSON.
var generalTypes = []string{"", "application/json", "text/json", "text/plain", "application/octet-stream", "binary/octet-stream"}

// head asks for the descriptor of a tag or digest.
//
// The problem: registries, proxies and stores answer HEAD. Some of them leave out a part of the
// descriptor, state a length of 0, or refuse what they answer to GET. The rule: only a complete
// answer of the registry itself counts. After any other answer, even after a failure, head asks for
// the manifest, and repeats only that request. The answer to GET has a body, which says why it
// fails.
func (p *remoteRepo) head(ctx context.Context, reference string) (desc ocispec.Descriptor, err error) {
	answered, err := p.viaMirrors(ctx, true, func(mirror *remoteRepo) error {
		desc, err = mirror.ownHead(ctx, reference)
		return err
	})
	if answered || err != nil {
		return desc, err
	}
	desc, err = p.ownHead(ctx, reference)
	return desc, p.despiteMirrors(err)
}

// ownHead is head without mirrors.
func (p *remoteRepo) ownHead(ctx context.Context, reference string) (ocispec.Descriptor, error) {
	c := p.manifestCall(http.MethodHead, reference)
	res, err := p.try(ctx, c)
	for attempt := 1; err != nil; attempt++ {
		if e, ok := errors.AsType[*RemoteError](err); ok && e.Status != 0 && !e.TokenServer {
			break
		}
		if err := p.again(ctx, attempt, err); err != nil {
			return ocispec.Descriptor{}, err
		}
		res, err = p.try(ctx, c)
	}
	if err == nil {
		res.Body.Close()
	}
	if err == nil && sameOrigin(res.Request.URL, p.host.base) {
		d, err := headerDigest(res.Header)
		if err != nil {
			return ocispec.Descriptor{}, answerProblem(c, res, err)
		}
		if want := digest.Digest(reference); checkDigest(want) == nil {
			if d != "" && d.Algorithm() == want.Algorithm() && d != want {
				return ocispec.Descriptor{}, answerProblem(c, res, fmt.Errorf("%w: registry states digest %s, want %s", ErrDigestMismatch, d, want))
			}
			d = want
		}
		given, err := manifestType(res.Header, "")
		if err == nil && given != "" && d != "" && res.ContentLength > 0 && res.ContentLength <= MaxManifestSize {
			return ocispec.Descriptor{MediaType: given, Digest: d, Size: res.ContentLength}, nil
		}
	}
	m, err := p.ownManifest(ctx, reference, "")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := m.Descriptor()
	return ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, nil
}

// blob asks once for a blob from byte from on. It returns the answer and the byte at which the
// answer begins, because a registry may send the whole blob instead (RFC 9110, section 14.2). A
// length that can't be right is refused before a byte is read.
func (p *remoteRepo) blob(ctx context.Context, desc ocispec.Descriptor, from int64) (*http.Response, int64, error) {
	c := &remoteCall{
		method: http.MethodGet, url: p.url("blobs", string(desc.Digest)),
		actions: []string{"pull"}, ok: []int{http.StatusOK},
	}
	if from > 0 {
		// The range has an end, because some registries do not accept one without.
		c.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", from, desc.Size-1)}}
		c.ok = append(c.ok, http.StatusPartialContent)
	}
	res, err := p.try(ctx, c)
	if err != nil {
		return nil, 0, err
	}
	if res.StatusCode == http.StatusOK {
		from = 0
	}
	end := desc.Size
	if res.StatusCode == http.StatusPartialContent {
		end, err = checkContentRange(res.Header.Get("Content-Range"), from, desc.Size)
	}
	if n := res.ContentLength; err == nil && n >= 0 && n != end-from {
		err = fmt.Errorf("%w: Content-Length is %d, want %d", ErrSizeMismatch, n, end-from)
	}
	if err != nil {
		res.Body.Close()
		return nil, 0, answerProblem(c, res, err)
	}
	return res, from, nil
}

// checkContentRange returns the end (exclusive) of a Content-Range. The range must begin at from in
// content of that size (RFC 9110, section 14.4).
func checkContentRange(text string, from, size int64) (end int64, err error) {
	bad := fmt.Errorf("%w: Content-Range %s for bytes %d to %d", ErrProtocol, printable(text), from, size-1)
	text, ok := strings.CutPrefix(text, "bytes ")
	span, total, ok2 := strings.Cut(text, "/")
	first, last, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, bad
	}
	a, err1 := parseDecimal(first)
	b, err2 := parseDecimal(last)
	t := size
	if total != "*" {
		t, err = parseDecimal(total)
	}
	if err != nil || err1 != nil || err2 != nil || a != from || b < a || b >= size || t != size {
		return 0, bad
	}
	return b + 1, nil
}

// parseDecimal reads digits only, unlike strconv, which accepts signs.
func parseDecimal(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}

// blobError explains the failure of storing a blob. A body that broke off is a failure of the
// network, and may be repeated. Wrong bytes are a failure of the registry. Any other error, such as
// a full disk, is returned as it is.
func (p *remoteRepo) blobError(ctx context.Context, desc ocispec.Descriptor, body *countedBody, err error) error {
	u := p.url("blobs", string(desc.Digest))
	switch {
	case err == nil:
		return nil
	case body.err != nil:
		return p.conceal(bodyError(ctx, "GET", u, body.err))
	case body.coding != "" && (errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrSizeMismatch)):
		return p.blobProblem(desc, coded(body.coding, err))
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, ErrSizeMismatch) && body.n < desc.Size:
		return transportError("GET", u, io.ErrUnexpectedEOF) // a proxy may have cut it off
	case errors.Is(err, ErrSizeMismatch), errors.Is(err, ErrDigestMismatch):
		return p.blobProblem(desc, coded(body.coding, err))
	}
	return err
}

// blobProblem returns the error for a blob with wrong bytes.
func (p *remoteRepo) blobProblem(desc ocispec.Descriptor, err error) error {
	u := p.url("blobs", string(desc.Digest))
	return &RemoteError{Method: "GET", URL: publicURL(u), Status: 200, final: true, Err: fmt.Errorf("blob %s: %w", desc.Digest, err)}
}
