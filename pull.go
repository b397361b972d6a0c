package ocilocal

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PullOptions say what is pulled, and what happens to the ref. Nil is the zero value.
type PullOptions struct {
	// Remote is the client to pull with. Nil means [Options.Remote].
	Remote *Remote
	// As, if not zero, is what the artifact is called here. Otherwise it keeps its reference. What As
	// points at is not taken for what the registry has: unless the reference is here itself, or has a
	// digest, the registry is asked, as with Check.
	As Reference
	// Platform, if not nil, chooses one manifest of an image index, which is
	// then pulled without the index. What is no index is pulled as it is. A reference with a digest
	// names the index: then As must say what to call the manifest. What is here under the reference is
	// served without the network if it is that index, or a manifest whose config is for that platform.
	Platform *ocispec.Platform
	// Check asks the registry whether a ref that is here has moved. Otherwise
	// what is here is served without the network.
	Check bool
	// Workers is how many blobs are fetched at a time. Zero means 4.
	Workers int
	// MaxBytes, if positive, is how many bytes of manifests and blobs the pull may add to the registry,
	// by the sizes that manifests state. A pull that needs more fails with [ErrTooLarge]
	// before it fetches the blob that is too much, and publishes nothing.
	MaxBytes int64
	// PublishOptions say what happens if the ref is here and points at something else than what is
	// pulled. Without Check, a ref that is here is what is pulled, so that Replace doesn't move it;
	// Expected is compared in any case.
	PublishOptions
}

// A PullResult tells what a pull did.
type PullResult struct {
	// Artifact is what was pulled, or was here; nil after a conflict.
	Artifact *LocalArtifact
	// Update tells what became of the ref.
	Update       RefUpdate
	BlobsWritten int   // blobs that the registry did not have
	BlobsReused  int   // blobs that it had
	BytesWritten int64 // size of the former
	// BytesReceived counts bytes of blobs that came over the network. It is less than
	// BytesWritten when an interrupted pull was resumed.
	BytesReceived int64
}

// Pull makes sure that the registry has what ref names, and fetches from ref's
// remote registry what of it is missing: manifests first, then several blobs
// at a time, each verified while it is written. Manifests keep their bytes; image
// indexes come in whole.
//
// An interrupted blob is resumed where it stopped. Of blobs of 1 MiB or more, what a pull
// had that has failed, or was killed, is not fetched again by the next one, even by another process;
// its bytes are hashed anew before they count. Nothing is visible
// before all is here; then the ref is set in one step, as by any other import. What
// the policy or [Options.ArtifactTypes] is certain to refuse is not fetched.
//
// A ref that is here with all it needs is served without the network, whatever
// the policy, unless [PullOptions.Check] is set. ctx governs the call only.
//
// Errors: [*RemoteError] for what the registry or the network did, with one of the
// sentinels that it lists; [ErrDigestMismatch], [ErrSizeMismatch], [ErrInvalidManifest],
// [ErrUnsupportedMediaType], [ErrTooLarge], [ErrIncomplete]; [*ConflictError] together with the
// result; [ErrReadOnly], ctx's, and the file system's.
func (r *LocalRegistry) Pull(ctx context.Context, ref Reference, opts *PullOptions) (*PullResult, error) {
	result, err := r.pull(ctx, ref, opts)
	return result, opError("pull", ref.String(), "", err)
}

func (r *LocalRegistry) pull(ctx context.Context, ref Reference, opts *PullOptions) (*PullResult, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	p := &puller{registry: r, ref: ref}
	if opts != nil {
		p.opts = *opts
	}
	if p.as = p.opts.As; p.as.IsZero() {
		p.as = ref
	}
	if p.opts.Platform != nil && p.as == ref && ref.Digest() != "" {
		return nil, fmt.Errorf("%w: %s names the image index, not the platform's manifest (PullOptions.As names that)", ErrInvalidArgument, ref)
	}
	remote := p.opts.Remote
	if remote == nil {
		remote = r.remote
	}
	if p.repo, err = remote.repo(ref); err != nil {
		return nil, err
	}
	return p.run(ctx)
}

// fetchRemote pulls what Load doesn't have.
func (r *LocalRegistry) fetchRemote(ctx context.Context, ref Reference) (found bool, err error) {
	if r.opts.Remote == nil || r.blobs.readOnly {
		return false, nil
	}
	_, err = r.pull(ctx, ref, nil)
	return err == nil, err
}

// A puller is one pull.
type puller struct {
	registry *LocalRegistry
	repo     *remoteRepo
	ref, as  Reference
	opts     PullOptions
	stage    *stage
	received atomic.Int64
}

func (p *puller) run(ctx context.Context) (*PullResult, error) {
	if !p.opts.Check {
		if result, err := p.present(ctx); result != nil || err != nil {
			return result, err
		}
	}
	if p.registry.blobs.readOnly {
		return nil, ErrReadOnly
	}
	reference := cmp.Or(string(p.ref.Digest()), p.ref.Tag())
	if (p.opts.Check || p.as != p.ref && p.ref.Digest() == "") && p.opts.Platform == nil {
		desc, err := p.repo.head(ctx, reference)
		if err != nil {
			return nil, err
		}
		if result, err := p.unchanged(ctx, desc.Digest); result != nil || err != nil {
			return result, err
		}
		reference = string(desc.Digest) // should the tag move now
	}
	m, err := p.repo.manifest(ctx, reference, "")
	if err != nil {
		return nil, err
	}
	if p.opts.Platform != nil && m.IsIndex() {
		chosen, err := choosePlatform(m, p.opts.Platform)
		if err != nil {
			return nil, err
		}
		if result, err := p.refused(chosen); err != nil {
			return result, err
		}
		if m, err = p.repo.manifest(ctx, string(chosen.Digest), chosen.MediaType); err != nil {
			return nil, err
		}
	}
	if result, err := p.refused(m.Descriptor()); err != nil {
		return result, err
	}
	// A ref points at what is here only after the registry has sent the manifest itself. A digest
	// in a header proves nothing: it would let a registry name whatever is here.
	if !p.registry.opts.SeparateRegistries {
		if result, err := p.point(ctx, m.Digest()); result != nil || err != nil {
			return result, err
		}
	}
	return p.fetchAll(ctx, m)
}

// unchanged returns the result if the ref points at d already and d is here with all it needs.
func (p *puller) unchanged(ctx context.Context, d digest.Digest) (*PullResult, error) {
	desc, ok, err := p.registry.index.resolve(p.as.key())
	if err != nil || !ok || desc.Digest != d || p.opts.Expected != "" && p.opts.Expected != d || !p.whole(ctx, desc) {
		return nil, err
	}
	return p.result(RefUpdate{Reference: p.as, Descriptor: desc, Existing: d, Outcome: Unchanged}, nil)
}

// present returns what is here of what is asked for, or nil if that is nothing whole. What the
// ref is to point at is told by its digest, or else by what the reference of the remote registry points at here.
func (p *puller) present(ctx context.Context) (*PullResult, error) {
	desc, err := p.registry.lookUp(p.ref)
	if err != nil {
		if errors.Is(err, ErrNotFound) {
			err = nil
		}
		return nil, err
	}
	if p.registry.opts.SeparateRegistries {
		if owned, err := p.registry.ownedBy(ctx, p.ref.Registry(), desc.Digest); !owned || err != nil {
			return nil, err
		}
	}
	if p.opts.Platform != nil {
		// An image index that is here says which manifest is asked for. If there is none, the registry may know.
		m, err := p.registry.readVerified(ctx, desc)
		if err == nil && m.IsIndex() {
			if chosen, err := choosePlatform(m, p.opts.Platform); err == nil {
				return p.point(ctx, chosen.Digest)
			}
		}
		if err != nil || !p.configFits(ctx, m) {
			return nil, ctx.Err()
		}
	}
	return p.point(ctx, desc.Digest)
}

// configFits reports whether the config of a manifest that is here says that it is for the wanted platform
// (image-spec config.md). Otherwise only the image index can tell.
func (p *puller) configFits(ctx context.Context, m *Manifest) bool {
	config, ok := m.Config()
	if !ok || config.Size > MaxManifestSize {
		return false
	}
	src, err := p.registry.blobs.open(ctx, config.Digest, config.Size)
	if err != nil {
		return false
	}
	defer src.Close()
	var got ocispec.Platform
	return json.NewDecoder(src).Decode(&got) == nil && fitsPlatform(p.opts.Platform, &got)
}

// whole looks, as far as sizes go, that all is here that a manifest needs.
func (p *puller) whole(ctx context.Context, desc ocispec.Descriptor) bool {
	return p.registry.checkClosure(ctx, p.registry.index, desc) == nil
}

// point gives the ref to a manifest that is here with all it needs, and
// returns nil if it isn't. Nothing is written if the ref has it already.
func (p *puller) point(ctx context.Context, d digest.Digest) (*PullResult, error) {
	r := p.registry
	desc, ok, err := r.index.resolveDigest(d)
	if err != nil || !ok || !p.whole(ctx, desc) {
		return nil, err
	}
	if result, err := p.unchanged(ctx, d); result != nil || err != nil {
		return result, err
	}
	if r.blobs.readOnly {
		return nil, nil
	}
	result, err := p.result(r.point(ctx, d, p.as, &p.opts.PublishOptions))
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrIncomplete) { // collected in between
		return nil, nil
	}
	return result, err
}

func (p *puller) result(u RefUpdate, err error) (*PullResult, error) {
	switch {
	case u.Outcome == Conflicted:
		return &PullResult{Update: u}, err
	case err != nil:
		return nil, err
	}
	return &PullResult{Artifact: p.registry.newArtifact(p.as, u.Descriptor, nil), Update: u}, nil
}

// refused returns the conflict that publishing root is certain to end in, before
// anything is fetched. The policy is applied again when it is published.
func (p *puller) refused(root ocispec.Descriptor) (*PullResult, error) {
	existing, _, err := p.registry.index.resolve(p.as.key())
	if err != nil {
		return nil, err
	}
	u := RefUpdate{Reference: p.as, Descriptor: root, Existing: existing.Digest, Outcome: p.opts.outcome(existing.Digest, root.Digest)}
	if u.Outcome != Conflicted {
		return nil, nil
	}
	return p.result(u, u.conflict(p.opts.Expected))
}

// fetchAll brings the closure of a manifest in and publishes it.
func (p *puller) fetchAll(ctx context.Context, m *Manifest) (*PullResult, error) {
	root := m.Descriptor()
	im := p.registry.newImporter(&ImportOptions{Reference: p.as, PublishOptions: p.opts.PublishOptions, one: true})
	defer func() { p.registry.logDiscard(im.stage.discard()) }()
	p.stage = im.stage
	im.fetch = p.fetch
	im.workers = cmp.Or(max(p.opts.Workers, 0), 4)
	im.maxBytes = p.opts.MaxBytes
	if p.registry.opts.SeparateRegistries {
		im.reusable = func(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
			return p.registry.ownedBy(ctx, p.ref.Registry(), desc.Digest)
		}
	}
	if _, err := im.stage.putBytes(ctx, m.raw, m.Digest().Algorithm()); err != nil {
		return nil, err
	}
	_, _, added := im.stage.counts()
	if err := im.charge(added); err != nil {
		return nil, err
	}
	entry := ocispec.Descriptor{MediaType: root.MediaType, Digest: root.Digest, Size: root.Size}
	imported, err := im.run(ctx, &layoutIndex{entries: []ocispec.Descriptor{entry}})
	if imported == nil {
		return nil, err
	}
	result, err := p.result(imported.Artifacts[0].Update, err)
	if result != nil {
		result.BlobsWritten, result.BlobsReused, result.BytesWritten = imported.BlobsWritten, imported.BlobsReused, imported.BytesWritten
		result.BytesReceived = p.received.Load()
	}
	return result, err
}

// fetch stages one blob or manifest.
func (p *puller) fetch(ctx context.Context, desc ocispec.Descriptor, as role) error {
	if err := checkDigest(desc.Digest); err != nil {
		return err
	}
	if as == roleManifest {
		m, err := p.repo.manifest(ctx, string(desc.Digest), desc.MediaType)
		if err != nil {
			return err
		}
		_, err = p.stage.putBytes(ctx, m.raw, desc.Digest.Algorithm())
		return err
	}
	if desc.Size >= keepPartial {
		part, err := p.stage.openPartial(ctx, desc.Digest, desc.Size)
		if err != nil {
			return err
		}
		if part != nil && part.kept > 0 && p.registry.opts.SeparateRegistries {
			// It is not known which registry sent these bytes, and this one must send all of them.
			err := p.fetchWhole(ctx, desc, p.meter(desc))
			if err == nil {
				part.have = 0 // close removes it
			}
			return errors.Join(err, part.close())
		}
		if part != nil {
			return errors.Join(p.resume(ctx, desc, part, p.meter(desc)), part.close())
		}
	}
	return p.fetchWhole(ctx, desc, p.meter(desc))
}

// keepPartial is from which size on a blob's bytes outlive an interrupted pull.
const keepPartial = 1 << 20

// fetchWhole fetches a blob, from its beginning with each attempt.
func (p *puller) fetchWhole(ctx context.Context, desc ocispec.Descriptor, from meter) error {
	for attempt := 1; ; attempt++ {
		err := p.fetchOnce(ctx, desc, from)
		if err == nil {
			return nil
		}
		if err := p.repo.remote.again(ctx, attempt, err); err != nil {
			return err
		}
	}
}

func (p *puller) fetchOnce(ctx context.Context, desc ocispec.Descriptor, from meter) error {
	res, _, err := p.repo.blob(ctx, desc, 0)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body := &countedBody{src: res.Body, count: from(0)}
	_, _, err = p.stage.put(ctx, body, "", desc.Digest, desc.Size)
	return p.repo.blobError(ctx, desc, body, err)
}

// resume fetches a blob from where part is. Attempts count anew whenever
// the pull is a MiB further than it has ever been.
func (p *puller) resume(ctx context.Context, desc ocispec.Descriptor, part *partial, from meter) error {
	from(part.have)(0)
	furthest := part.have
	for attempt := 1; ; attempt++ {
		err := p.resumeOnce(ctx, desc, part, from)
		if err == nil {
			return nil
		}
		if part.have >= furthest+keepPartial {
			furthest, attempt = part.have, 1
		}
		if err := p.repo.remote.again(ctx, attempt, err); err != nil {
			return err
		}
	}
}

// resumeOnce makes one request for what is missing.
func (p *puller) resumeOnce(ctx context.Context, desc ocispec.Descriptor, part *partial, from meter) error {
	if part.have < part.size {
		if err := p.appendOnce(ctx, desc, part, from); err != nil {
			return err
		}
	}
	old := part.kept > 0
	err := part.finish(ctx)
	if old && errors.Is(err, ErrDigestMismatch) { // what an earlier pull left was no good
		return p.resumeOnce(ctx, desc, part, from)
	}
	if errors.Is(err, ErrDigestMismatch) {
		return p.repo.blobProblem(desc, err)
	}
	return err
}

func (p *puller) appendOnce(ctx context.Context, desc ocispec.Descriptor, part *partial, from meter) error {
	res, at, err := p.repo.blob(ctx, desc, part.have)
	if err != nil {
		return unsatisfied(part, err)
	}
	defer res.Body.Close()
	if at != part.have {
		if err := part.reset(); err != nil {
			return err
		}
	}
	body := &countedBody{src: res.Body, count: from(part.have)}
	err = part.append(ctx, body)
	if err == nil && part.have < part.size {
		err = io.ErrUnexpectedEOF
	}
	return p.repo.blobError(ctx, desc, body, err)
}

// unsatisfied starts over if a registry says that what is missing doesn't exist (RFC 9110, section 15.5.17).
func unsatisfied(part *partial, err error) error {
	if e, ok := errors.AsType[*RemoteError](err); ok && e.Status == 416 && part.have > 0 {
		return errors.Join(part.reset(), &RemoteError{Method: e.Method, URL: e.URL, Status: e.Status, again: true, Err: e.Err})
	}
	return err
}

// meter counts what comes of a blob.
func (p *puller) meter(desc ocispec.Descriptor) meter {
	from := p.repo.remote.meter(Progress{Reference: p.ref, Descriptor: desc})
	return func(done int64) func(int) {
		report := from(done)
		return func(n int) {
			p.received.Add(int64(n))
			report(n)
		}
	}
}

// blobError tells a body that broke off from what went wrong here.
func (p *remoteRepo) blobError(ctx context.Context, desc ocispec.Descriptor, body *countedBody, err error) error {
	u := p.url("blobs", string(desc.Digest))
	switch {
	case err == nil:
		return nil
	case body.err != nil:
		return p.conceal(bodyError(ctx, "GET", u, body.err))
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, ErrSizeMismatch) && body.n < desc.Size:
		return transportError("GET", u, io.ErrUnexpectedEOF) // a proxy may have cut it off
	case errors.Is(err, ErrSizeMismatch), errors.Is(err, ErrDigestMismatch):
		return p.blobProblem(desc, err)
	}
	return err
}

// blobProblem says that a blob's bytes are not what they should be.
func (p *remoteRepo) blobProblem(desc ocispec.Descriptor, err error) error {
	u := p.url("blobs", string(desc.Digest))
	return &RemoteError{Method: "GET", URL: publicURL(u), Status: 200, final: true, Err: fmt.Errorf("blob %s: %w", desc.Digest, err)}
}
