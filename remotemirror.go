package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Mirror is a registry that has copies of another registry's content: see [Remote.Mirrors].
type Mirror struct {
	// Location is the mirror's host, with its port, and the path below which it has the
	// repositories. "mirror.example.com:5000/hub" has docker.io/library/alpine under the name
	// hub/library/alpine. It has no scheme: [Remote.PlainHTTP] decides on that.
	Location string
	// Tags lets the mirror say where tags point. No digest proves such an answer: it may be old, or
	// wrong. Otherwise tags are resolved by the registry itself, at the cost of one request.
	Tags bool
}

// How mirrors are used.
//
// The problem: a mirror may be down, behind, incomplete or bad, and a pull must be as good as
// without it. A 404 of a cache says nothing about the registry. A mirror that gives no answer can
// take half a minute to fail, for each of many blobs.
//
// The rule: only requests that read manifests and blobs go to mirrors, and only if the digest
// proves the answer, or the mirror may answer for tags. Everything else asks the registry: whether
// something is there, lists, and all that a push does. Each mirror is asked once. After any failure
// the next one is asked, and last the registry, with retries; its answer is the answer of the call.
// A mirror that fails by itself rests for a minute, in which no call of the Remote asks it.
//
// It is safe because each mirror is a separate [remoteRepo]. Credentials, tokens, redirects and the
// addresses that it may lead to are judged by the mirror's host, so nothing of the registry reaches
// it.

// mirrorRest is how long a mirror is not asked after it has failed.
const mirrorRest = time.Minute

// source returns a repository for calls that read. Its mirrors are asked before it.
func (r *Remote) source(ref Reference) (*remoteRepo, error) {
	p, err := r.repo(ref)
	if err != nil {
		return nil, err
	}
	for _, m := range r.Mirrors[ref.Registry()] {
		at, err := m.of(ref)
		if err != nil {
			return nil, err
		}
		if at.Name() == ref.Name() {
			continue
		}
		p.mirrors = append(p.mirrors, &remoteRepo{remote: r, host: r.host(at.Registry()), ref: at, name: at.Repository(),
			mirrorOf: ref.Registry(), tags: m.Tags})
	}
	return p, nil
}

// limit has p and its mirrors parse large manifests and lists only in this turn.
func (p *remoteRepo) limit(turn *manifestTurn) {
	p.turn = turn
	for _, m := range p.mirrors {
		m.turn = turn
	}
}

// of returns the name that ref's repository has in the mirror, with the default tag, which is not
// used.
func (m Mirror) of(ref Reference) (Reference, error) {
	host, _, _ := strings.Cut(m.Location, "/")
	at, err := ParseReference(m.Location + "/" + ref.Repository() + ":" + defaultTag)
	if err == nil && at.Registry() != host {
		err = fmt.Errorf("host %s has no dot and no port", printable(host))
	}
	if err != nil {
		return at, fmt.Errorf("%w: mirror of %s: %s is not a host with a path: %w", ErrInvalidArgument, ref.Registry(), printable(m.Location), err)
	}
	return at, nil
}

// viaMirrors calls ask with one mirror after the other until one has answered. It returns false if
// none has: then the registry must be asked. tag says that no digest proves the answer. The error
// is one for which no mirror is to blame, such as the end of ctx or a full disk.
func (p *remoteRepo) viaMirrors(ctx context.Context, tag bool, ask func(m *remoteRepo) error) (answered bool, err error) {
	for _, m := range p.mirrors {
		if tag && !m.tags || m.host.rests() {
			continue
		}
		err := ask(m)
		if err == nil {
			return true, nil
		}
		e, ok := errors.AsType[*RemoteError](err)
		if !ok || ctx.Err() != nil {
			return false, err
		}
		if refused := e.Status >= 400 && e.Status < 500 && e.Status != http.StatusTooManyRequests; !refused {
			m.host.rest(max(e.RetryAfter, mirrorRest))
		}
		m.mu.Lock()
		m.failure = err.Error()
		m.mu.Unlock()
		if log := p.remote.Logger; log != nil {
			log.WarnContext(ctx, "remote mirror is passed over", slog.String("mirror", m.host.name), slog.String("error", err.Error()))
		}
	}
	return false, nil
}

// despiteMirrors adds the failures of the mirrors to an error of the registry. It adds only their
// texts: a mirror's 404, for example, does not make the error [ErrNotFound].
func (p *remoteRepo) despiteMirrors(err error) error {
	if _, ok := errors.AsType[*RemoteError](err); !ok {
		return err
	}
	for _, m := range p.mirrors {
		m.mu.Lock()
		failure := m.failure
		m.mu.Unlock()
		if failure == "" && m.host.rests() {
			failure = "it has failed before, and rests"
		}
		if failure != "" {
			err = fmt.Errorf("%w (mirror %s: %s)", err, m.host.name, failure)
		}
	}
	return err
}

// again is [Remote.again]. A mirror is not asked again: the next one is.
func (p *remoteRepo) again(ctx context.Context, attempt int, err error) error {
	if p.mirrorOf != "" && ctx.Err() == nil {
		return err
	}
	return p.remote.again(ctx, attempt, err)
}

// rests reports whether a mirror is not to be asked now.
func (h *remoteHost) rests() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Before(h.resting)
}

// rest keeps a mirror from being asked for a time.
func (h *remoteHost) rest(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resting = time.Now().Add(d)
}

// isTag reports whether what stands behind manifests/ is a tag, and not a digest.
func isTag(reference string) bool { return checkDigest(digest.Digest(reference)) != nil }
