package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Upstream makes a [LocalRegistry.Handler] a mirror of another registry. Each manifest and each
// blob is fetched when a client first asks for it, once for all requests that ask meanwhile, and is
// kept. So an image index costs only the platforms that clients want. A client gets a blob of 1 MiB
// or more while it arrives.
//
//   - Manifests: a tag is kept as a ref. A digest that nothing in the repository leads to is kept
//     as a ref by digest. Refs stay until they are deleted, and collections keep what they lead to.
//     What was deleted here is fetched again when a client asks for it.
//   - Blobs: what a manifest of the repository names is fetched; other blobs are 404. HEAD answers
//     with the size that the manifest states and fetches nothing. The last byte of a range is sent
//     after the whole blob has been fetched and verified. So a client must wait for a few bytes of
//     a large blob as long as for all of it; below 1 MiB it hears nothing meanwhile. If all clients
//     of a blob leave, its transfer ends. The bytes of a blob of 1 MiB or more are kept, and the
//     next request resumes it.
//   - A file that is damaged or lost here is fetched again when a client asks for it. The damaged
//     file stays until good bytes replace it. If a blob of more than 256 KiB turns out to be
//     damaged while it is sent, the answer breaks off when the blob has been fetched again. What
//     the upstream does not have stays damaged until [LocalRegistry.Repair]. An answer to HEAD
//     reads no content.
//   - A tag that is here is served for Revalidate, and then asked for again. If the upstream fails,
//     does not answer within ten seconds, or has the tag no more, the tag is served as it is here.
//   - Lists of tags and referrers have what the upstream lists and what is here. If the upstream
//     fails, they have what is here, and a Warning header says so.
//   - Manifests have at most [MaxManifestSize] bytes. The referrers of one manifest that the
//     upstream lists are at most 10,000, of at most 16 MiB; beyond that it counts as failing.
//   - What neither has is 404, if the upstream itself says so. It is asked twice if a proxy may
//     have answered. If the upstream fails, refuses access or sends other bytes than the digest
//     says, the answer is 502: a 404 would say that the content does not exist. Clients of mirrors
//     then ask the upstream themselves. If a blob is already being sent, the answer breaks off
//     before its last byte.
//
// An artifact that clients have fetched only in part is here with absent members: reading one is
// [ErrAbsent], and [LocalRegistry.Pull] fetches them. If a config or layer is absent, tagging,
// exporting, copying or pushing the artifact is an error that matches [ErrNotFound].
//
// Pushes to the handler stay here: see HandlerOptions.ReadOnly. Before a pushed manifest is
// acknowledged, what it needs and what is absent here is fetched, so that PUT may take as long as
// the transfer. The next revalidation of a tag replaces what was pushed under it, if the upstream
// has the tag.
//
// With [Options.SeparateRegistries] a manifest is pulled with all that it needs before it is
// served. Meanwhile all its manifests are in memory, of which [MaxImportManifests] bounds the
// bytes.
//
// A mirror removes nothing by itself. To make room, remove its refs with [LocalRegistry.Remove], or
// let clients delete them, and call [LocalRegistry.GC]. A registry that is open read-only fetches
// nothing.
type Upstream struct {
	// Remote is the client to pull with. Nil means [Options.Remote].
	Remote *Remote
	// Host is the registry to pull from, in which a repository has the name that it has here. Empty
	// means the host of the local name. Then HandlerOptions must have a Host or a Name: the server
	// itself is not at localhost.
	Host string
	// Name, if not nil, returns the name in the upstream of a repository here, in place of Host. Both
	// names have the registry and the repository, as docker.io/library/alpine. An error means that
	// the repository is not mirrored.
	Name func(name string) (string, error)
	// MaxBytes, if positive, is how large a manifest or blob may be. A larger one is answered with
	// 502. With [Options.SeparateRegistries] it bounds all that one miss adds.
	MaxBytes int64
	// Revalidate is for how long a tag is served before the registry is asked again. Zero means one
	// minute. A negative value asks each time.
	Revalidate time.Duration
}

const (
	defaultRevalidate = time.Minute
	maxAskedTags      = 10_000
	// maxRevalidation is how long a client waits for news of a tag that is here.
	maxRevalidation = 10 * time.Second
)

// An upstream is an [Upstream] of a handler, with what the requests share.
type upstream struct {
	Upstream
	registry *LocalRegistry
	turns    manifestTurns // those of the handler

	mu      sync.Mutex              // guards what follows
	asked   map[Reference]time.Time // when the upstream was last asked for a tag
	fetches map[string]*sharedFetch
}

// newUpstream returns nil without an upstream, and for a registry that can keep nothing.
func newUpstream(r *LocalRegistry, opts *Upstream, turns manifestTurns) *upstream {
	if opts == nil || r.blobs.readOnly {
		return nil
	}
	u := &upstream{Upstream: *opts, registry: r, turns: turns, asked: map[Reference]time.Time{}, fetches: map[string]*sharedFetch{}}
	u.Remote = cmp.Or(u.Remote, r.remote)
	u.Revalidate = cmp.Or(u.Revalidate, defaultRevalidate)
	return u
}

// source returns the repository of the upstream for a tag or digest of a repository here. It takes
// a turn for each large manifest or list that it parses. The caller must end the turn of the last
// one.
//
// Errors: [ErrNotFound] for a repository that is not mirrored, [ErrInvalidReference].
func (u *upstream) source(p *Repository, reference string) (*remoteRepo, error) {
	from, err := u.reference(p, reference)
	if err != nil {
		return nil, err
	}
	src, err := u.Remote.source(from)
	if err == nil {
		src.limit(u.turns.newTurn())
	}
	return src, err
}

func (u *upstream) reference(p *Repository, reference string) (from Reference, err error) {
	name := p.name
	switch {
	case u.Name != nil:
		if name, err = u.Name(name); err != nil {
			return from, fmt.Errorf("%w: %s is not mirrored: %w", ErrNotFound, p.name, err)
		}
	case u.Host != "":
		local, err := p.reference(reference)
		if err != nil {
			return from, err
		}
		name = u.Host + "/" + local.Repository()
	}
	if name, err = canonicalName(name); err != nil {
		return from, err
	}
	return referenceFromKey(name, reference)
}

// resolve returns the descriptor of the manifest of the path. It asks the upstream if there is one,
// and returns the bytes too if they have just come from there.
func (x *exchange) resolve() (ocispec.Descriptor, []byte, error) {
	desc, err := x.repo.Resolve(x.r.Context(), x.reference())
	u := x.upstream
	if u == nil || err != nil && !errors.Is(err, ErrNotFound) {
		return desc, nil, err
	}
	local, invalid := x.repo.reference(x.reference())
	if invalid != nil || err == nil && (x.tag == "" || u.askedLately(local)) {
		return desc, nil, err
	}
	ctx := x.r.Context()
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, maxRevalidation)
		defer cancel()
		ctx = limited
	}
	fetched, raw, failed := x.pullManifest(ctx, local, desc.Digest)
	if err == nil && failed != nil {
		x.registry.opts.Logger.Warn("ocilocal: a tag could not be asked for again", "reference", local.String(), "error", failed)
		failed = x.r.Context().Err()
	}
	if failed != nil {
		return desc, nil, x.upstreamError(failed)
	}
	u.noteAsked(local) // after a failure, too: not every request waits for a registry that is down
	if raw != nil {
		desc = fetched
	} else if err != nil { // pulled with all that it needs
		desc, err = x.repo.Resolve(x.r.Context(), x.reference())
		return desc, nil, err
	}
	return desc, raw, nil
}

// pullManifest brings a manifest from the upstream, under its name here. known is the digest that
// the name has here, "" for none. The bytes are nil if the upstream has the same.
func (x *exchange) pullManifest(ctx context.Context, local Reference, known digest.Digest) (desc ocispec.Descriptor, raw []byte, err error) {
	u := x.upstream
	if u.registry.opts.SeparateRegistries {
		return desc, nil, x.pullWhole(ctx, local)
	}
	f, err := u.join(ctx, "manifest "+local.String(), func(ctx context.Context, f *sharedFetch) (err error) {
		f.manifest, f.content, err = u.fetchManifest(ctx, x.repo, local, known)
		return err
	})
	if err != nil {
		return desc, nil, err
	}
	defer f.leave()
	if err := f.wait(ctx); err != nil {
		return desc, nil, err
	}
	return f.manifest, f.content, nil
}

// pullWhole brings a manifest with all that it needs. It asks for the manifest alone first: that
// this is absent is a 404, and that a blob of it is absent is not.
func (x *exchange) pullWhole(ctx context.Context, local Reference) error {
	u := x.upstream
	_, key := local.key()
	from, err := u.reference(x.repo, key)
	if err != nil {
		return err
	}
	src, err := u.source(x.repo, key)
	if err != nil {
		return err
	}
	err = fetchFrom(src, func() error {
		_, err := src.head(ctx, key)
		return err
	})
	src.turn.end()
	if err != nil {
		return err
	}
	opts := &PullOptions{Remote: u.Remote, As: local, MaxBytes: u.MaxBytes, PublishOptions: PublishOptions{Policy: Replace}}
	_, err = x.registry.Pull(ctx, from, opts)
	return err
}

// fetchManifest fetches a manifest and publishes it without what it needs. It returns the bytes and
// not the parsed document, which requests would keep in memory without a turn.
func (u *upstream) fetchManifest(ctx context.Context, p *Repository, local Reference, known digest.Digest) (desc ocispec.Descriptor, raw []byte, err error) {
	_, key := local.key()
	src, err := u.source(p, key)
	if err != nil {
		return desc, nil, err
	}
	defer src.turn.end()
	if known != "" {
		desc, err := src.head(ctx, key)
		src.turn.end()
		if err != nil || desc.Digest == known {
			return desc, nil, err // a tag that is here is served in any case
		}
		key = string(desc.Digest) // should the tag move now
	}
	var m *Manifest
	err = fetchFrom(src, func() (err error) {
		m, err = src.manifest(ctx, key, "")
		return err
	})
	if err != nil {
		return desc, nil, err
	}
	if err := u.charge(int64(len(m.raw))); err != nil {
		return desc, nil, err
	}
	return m.Descriptor(), m.raw, u.keep(ctx, p, local, m)
}

// keep publishes a manifest of the upstream under its name here. Whatever it names may be absent. A
// manifest by digest gets no ref if something in the repository leads to it already: an image
// index, or its subject.
func (u *upstream) keep(ctx context.Context, p *Repository, local Reference, m *Manifest) error {
	if local.Digest() != "" {
		led, err := p.showsManifest(u.registry.index, m.digest)
		if subject, ok := m.Subject(); ok && !led && err == nil {
			led, err = p.showsManifest(u.registry.index, subject.Digest)
		}
		if err != nil {
			return err
		}
		if led {
			local = Reference{}
		}
	}
	st := u.registry.blobs.newStage()
	defer func() { u.registry.logDiscard(st.discard()) }()
	if _, err := st.putBytes(ctx, m.raw, m.digest.Algorithm()); err != nil {
		return err
	}
	pub := onlyManifest(local, m, PublishOptions{Policy: Replace})
	pub.absent = map[digest.Digest]bool{}
	for _, c := range m.children() {
		pub.absent[c.Digest] = true
	}
	// Clients may be in the middle of the manifest that the tag leads to now.
	pub.also = func(tx *indexTx, existing digest.Digest) error { return p.holdReplaced(tx, existing, m.digest) }
	_, err := u.registry.publish(ctx, st, []publication{pub})
	return err
}

// charge refuses content that is larger than the limit.
func (u *upstream) charge(n int64) error {
	if u.MaxBytes > 0 && n > u.MaxBytes {
		return fmt.Errorf("%w: %d bytes, Upstream.MaxBytes is %d", ErrTooLarge, n, u.MaxBytes)
	}
	return nil
}

// fetchFrom calls fetch, which asks src for something. The answer that it does not exist becomes a
// plain [ErrNotFound]. If that answer may come from a proxy, src is asked a second time.
func fetchFrom(src *remoteRepo, fetch func() error) error {
	err := fetch()
	if absent, certain := src.saysAbsent(err); absent && !certain {
		err = fetch()
	}
	if absent, _ := src.saysAbsent(err); absent {
		return fmt.Errorf("%w: %v", ErrNotFound, err)
	}
	return err
}

// upstreamError is the answer to a client after a failed fetch. If the upstream is to blame, it is
// 502. The text of the error may be about the network of this server, so it goes to the log only.
func (x *exchange) upstreamError(err error) error {
	if x.r.Context().Err() != nil {
		return err
	}
	_, upstreams := errors.AsType[*RemoteError](err)
	for _, e := range clientErrors { // here the upstream is the client
		upstreams = upstreams || errors.Is(err, e.is)
	}
	if !upstreams {
		return err
	}
	return fmt.Errorf("%w: %w", serveErrorf(http.StatusBadGateway, codeUnknown, "the upstream registry failed"), err)
}

// askedLately reports whether the upstream need not be asked for a tag again.
func (u *upstream) askedLately(local Reference) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	at, ok := u.asked[local]
	return ok && time.Since(at) < u.Revalidate
}

// noteAsked remembers that the upstream was asked for a tag now.
func (u *upstream) noteAsked(local Reference) {
	if local.Tag() == "" {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.asked) >= maxAskedTags {
		clear(u.asked)
	}
	u.asked[local] = time.Now()
}
