package ocilocal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PullOptions govern how an artifact is pulled, and when its ref may move. Nil is the zero value.
type PullOptions struct {
	// Remote is the client to pull with. Nil means [Options.Remote].
	Remote *Remote
	// As, if not zero, is the name that the artifact gets here. Otherwise it keeps its reference.
	As Reference
	// Platform, if not nil, chooses one manifest of an image index. That manifest is pulled without
	// the index. Empty fields match anything. A default variant of image-spec may be left out:
	// linux/arm64/v8 is linux/arm64. Content that is not an index is pulled as it is. If the
	// reference has a digest, that is the digest of the index, and As must name the manifest.
	Platform *ocispec.Platform
	// Verify hashes everything that the artifact needs and that is here, and fetches damaged blobs
	// again. Otherwise the size of a blob that is here is enough, unless other blobs have to be
	// fetched.
	Verify bool
	// Referrers also pulls the artifact's referrers, such as signatures, and the referrers of
	// these, as the remote registry lists them. They get no refs. Collections keep them with the
	// artifact: see [GCOptions]. A pull with Referrers asks for them even if nothing else has
	// changed.
	Referrers bool
	// ReferrerTypes, if not empty, restricts Referrers to these artifact types.
	ReferrerTypes []string
	// Workers is how many blobs are fetched at a time. Zero means 4.
	Workers int
	// MaxBytes, if positive, bounds how many bytes of manifests and blobs the pull may add to the
	// registry, by the sizes that manifests state. A pull that needs more fails with [ErrTooLarge].
	// It publishes nothing, and does not fetch the blob that passes the bound.
	MaxBytes int64
	// Progress, if not nil, is called with reports on the pull. Calls that share a transfer all get
	// reports on it, each with its own reference.
	Progress func(Progress)
	// PublishOptions say what happens if the ref is here and points elsewhere, because it has moved
	// in the remote registry for example. By default that is a conflict, and the ref stays. With
	// the policy Replace it moves.
	PublishOptions
}

// A PullResult says what a pull did.
type PullResult struct {
	// Artifact is the artifact that the ref names now; nil after a conflict.
	Artifact *LocalArtifact
	// Update says what happened to the ref.
	Update RefUpdate
	// Referrers are the referrers that are here now because of PullOptions.Referrers.
	Referrers []ocispec.Descriptor
	// Absent are the foreign layers that the remote registry does not have, and the members of image
	// indexes that neither registry has: see [ImportResult.Absent].
	Absent []ocispec.Descriptor
	// Shared is set if another call of this process fetched the content, and this call waited for
	// it. Then the counts are zero.
	Shared       bool
	BlobsWritten int   // blobs that the registry did not have
	BlobsReused  int   // blobs that it had
	BytesWritten int64 // size of the former
	// BytesReceived counts the bytes of blobs that came over the network. It is less than
	// BytesWritten if an interrupted pull was resumed, or if another process fetched a blob.
	BytesReceived int64
}

// Pull makes the registry hold the artifact that ref names in its remote registry, and points the
// ref at it. It asks the remote registry where a tag points now, while [LocalRegistry.Load] is
// content with a ref that is here. It fetches manifests first, then the missing blobs, several at a
// time. Each is verified while it is written. Manifests keep their bytes. Image indexes come in
// whole.
//
// If nothing has changed, a pull costs one request, and none for a reference with a digest. If the
// tag has moved, the policy decides: see [PublishOptions]. A conflict fetches nothing.
//
// An interrupted blob is resumed where it stopped. If a pull fails or is killed, the next one, also
// of another process, does not fetch the received bytes of a blob of 1 MiB or more again. It hashes
// them before they count. Nothing is visible before everything is here. Then the ref is set in one
// step, as by any other import. Content that the policy or [Options.ArtifactTypes] is certain to
// refuse is not fetched.
//
// Concurrent calls share transfers. Within a process, pulls of the same manifest from the same
// repository with the same Remote and options fetch it once. Different pulls and processes fetch a
// blob of 1 MiB or more once. A call whose ctx ends does not stop the others.
//
// ctx governs the call only. Errors:
//   - [*RemoteError] for failures of the remote registry or the network, with one of the sentinels
//     that it lists
//   - [*ConflictError] together with the result
//   - [ErrDigestMismatch], [ErrSizeMismatch], [ErrInvalidManifest], [ErrUnsupportedMediaType],
//     [ErrTooLarge], [ErrArtifactType] for content that is refused
//   - [ErrNotFound] if an image index has no manifest for the platform
//   - [ErrReadOnly], [ErrNoSpace], [ErrBusy], and any error from ctx or the file system
func (r *LocalRegistry) Pull(ctx context.Context, ref Reference, opts *PullOptions) (*PullResult, error) {
	if opts == nil {
		opts = &PullOptions{}
	}
	result, err := attend(ctx, opts.Progress, ref, func(ctx context.Context, m *meter) (*PullResult, error) {
		return r.pull(ctx, ref, opts, m)
	})
	return result, opError("pull", ref.String(), "", err)
}

func (r *LocalRegistry) pull(ctx context.Context, ref Reference, opts *PullOptions, m *meter) (*PullResult, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	p, err := r.newPuller(ref, opts, m)
	if err != nil {
		return nil, err
	}
	result, err := p.run(ctx)
	if err == nil && !p.transferred {
		err = p.skipAll(ctx, result)
	}
	if err == nil && p.opts.Referrers {
		m.phase(PhaseReferrers)
		result.Referrers, err = p.pullReferrers(ctx, result)
	}
	return result, err
}

// A puller is one call of Pull.
type puller struct {
	registry *LocalRegistry
	repo     *remoteRepo
	ref, as  Reference
	opts     PullOptions
	meter    *meter
	update   *RefUpdate // set by the transfer that published for this call
	added    int64      // what counts for PullOptions.MaxBytes so far
	// transferred is set if the call has waited for a transfer.
	transferred bool
}

func (r *LocalRegistry) newPuller(ref Reference, opts *PullOptions, m *meter) (*puller, error) {
	p := &puller{registry: r, ref: ref, meter: m}
	m.phase(PhasePlan)
	if opts != nil {
		p.opts = *opts
	}
	if p.as = p.opts.As; p.as.IsZero() {
		p.as = ref
	}
	if p.opts.Platform != nil && p.as == ref && ref.Digest() != "" {
		return nil, fmt.Errorf("%w: %s names the image index, not the manifest for the platform (name that by PullOptions.As)", ErrInvalidArgument, ref)
	}
	remote := p.opts.Remote
	if remote == nil {
		remote = r.remote
	}
	var err error
	p.repo, err = remote.source(ref)
	return p, err
}

// pullHere is a pull that does not ask the remote registry. It returns nil if the registry lacks
// something.
func (r *LocalRegistry) pullHere(ctx context.Context, ref Reference, opts *PullOptions, m *meter) (*LocalArtifact, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	p, err := r.newPuller(ref, opts, m)
	if err != nil {
		return nil, err
	}
	verify := p.opts.Verify
	p.opts.Verify = false
	result, err := p.present(ctx)
	if result == nil || err != nil {
		return nil, err
	}
	if verify {
		if ok, err := p.intact(ctx, result.Update.Descriptor); !ok || err != nil {
			return nil, err
		}
	}
	return result.Artifact, p.skipAll(ctx, result)
}

// skipAll reports that everything that the artifact needs was here.
func (p *puller) skipAll(ctx context.Context, result *PullResult) error {
	if p.meter == nil {
		return nil
	}
	needs := p.registry.newClosure()
	if _, err := needs.add(ctx, result.Update.Descriptor); err != nil {
		return incomplete(err)
	}
	all := slices.Concat(needs.manifests, needs.blobs)
	p.meter.planAll(all)
	p.meter.planned(PhaseBlobs)
	for _, desc := range all {
		p.meter.skip(desc)
	}
	return nil
}

// intact reports whether the bytes of everything that a manifest needs are good.
func (p *puller) intact(ctx context.Context, root ocispec.Descriptor) (bool, error) {
	needs := p.registry.newClosure()
	_, err := needs.add(ctx, root)
	for _, d := range needs.blobs {
		if err == nil {
			err = p.registry.blobs.verify(ctx, d.Digest, d.Size)
		}
	}
	if ctx.Err() != nil || processCondition(err) {
		return false, err
	}
	return err == nil, nil
}

func (p *puller) run(ctx context.Context) (*PullResult, error) {
	reference := p.repo.reference()
	var looked digest.Digest // the manifest that settled was last asked about
	switch {
	case p.opts.Platform != nil: // the index has to be read anyway
	case p.ref.Digest() != "":
		if result, err := p.present(ctx); result != nil || err != nil {
			return result, err
		}
	default:
		desc, err := p.repo.head(ctx, reference)
		if err != nil {
			return nil, err
		}
		if result, err := p.settled(ctx, desc); result != nil || err != nil {
			return result, err
		}
		looked = desc.Digest
		reference = string(looked) // should the tag move now
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
		if result, err := p.settled(ctx, chosen); result != nil || err != nil {
			return result, err
		}
		looked = chosen.Digest
		if m, err = p.repo.manifest(ctx, string(chosen.Digest), chosen.MediaType); err != nil {
			return nil, err
		}
	}
	if m.Digest() != looked {
		if result, err := p.settled(ctx, m.Descriptor()); result != nil || err != nil {
			return result, err
		}
	}
	return p.bring(ctx, m)
}

// bring points the ref at a manifest that the remote registry has sent, after it has fetched
// everything that the manifest needs.
func (p *puller) bring(ctx context.Context, m *Manifest) (*PullResult, error) {
	if p.registry.blobs.readOnly {
		return nil, ErrReadOnly
	}
	if d := p.as.Digest(); d != "" && d != m.Digest() {
		return nil, fmt.Errorf("%w: %s does not name the manifest's digest, %s", ErrDigestMismatch, p.as, m.Digest())
	}
	if err := p.registry.acceptType(m.Descriptor()); err != nil {
		return nil, err
	}
	// A ref points at content that is here only after the registry has sent the manifest itself. A
	// digest in a header proves nothing: it would let a registry name whatever is here.
	if !p.registry.opts.SeparateRegistries && !p.opts.Verify && p.full(ctx, m.Descriptor()) {
		if result, err := p.point(ctx, m.Digest()); result != nil || err != nil {
			return result, err
		}
	}
	return p.transfer(ctx, m)
}

// settled returns the result if nothing has to be fetched for a manifest. There are two such cases:
// the ref points at it already and nothing is missing, or publishing it is certain to be a
// conflict. The policy is applied again when the manifest is published.
func (p *puller) settled(ctx context.Context, root ocispec.Descriptor) (*PullResult, error) {
	desc, ok, err := p.registry.index.resolve(p.as.key())
	if err != nil {
		return nil, err
	}
	u := RefUpdate{Reference: p.as, Descriptor: root, Existing: desc.Digest, Outcome: p.opts.outcome(desc.Digest, root.Digest)}
	if u.Outcome == Conflicted {
		return p.result(u, u.conflict(p.opts.Expected))
	}
	if !ok || u.Outcome != Unchanged || p.opts.Verify || !p.full(ctx, desc) {
		return nil, nil
	}
	u.Descriptor = desc
	return p.result(u, nil)
}

// present returns the artifact if it is here under its reference, and nil if it is not. Unless
// registries are kept apart, another reference with the same digest is enough. The remote registry
// is not asked.
func (p *puller) present(ctx context.Context) (*PullResult, error) {
	if p.opts.Verify {
		return nil, nil
	}
	desc, err := p.registry.resolve(p.ref)
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
		// An image index that is here says which manifest is asked for. If there is none, the
		// registry may know.
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

// configFits reports whether the config of a manifest that is here names the wanted platform
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

// whole reports whether everything that a manifest needs is here, judged by sizes.
func (p *puller) whole(ctx context.Context, desc ocispec.Descriptor) bool {
	return p.registry.checkClosure(ctx, p.registry.index, nil, desc) == nil
}

// full reports whether everything is here that a pull would bring: what whole looks for, and the
// members of image indexes that are absent, which the remote registry may have by now.
func (p *puller) full(ctx context.Context, desc ocispec.Descriptor) bool {
	all := descent{q: p.registry.index, lacked: func(c member) bool { return !foreignLayer(c.desc.MediaType) }}
	return all.each(ctx, desc, func(d ocispec.Descriptor) error {
		return p.registry.blobs.checkSize(d.Digest, d.Size)
	}) == nil
}

// point gives the ref to a manifest that is here with everything it needs. It returns nil if
// something is missing. If the ref points at the manifest already, nothing is written.
func (p *puller) point(ctx context.Context, d digest.Digest) (*PullResult, error) {
	r := p.registry
	desc, ok, err := r.index.resolveDigest(d)
	if err != nil || !ok || !p.whole(ctx, desc) {
		return nil, err
	}
	if at, ok, err := r.index.resolve(p.as.key()); err != nil || ok && at.Digest == d && p.opts.Expected == "" {
		return p.result(RefUpdate{Reference: p.as, Descriptor: desc, Existing: d, Outcome: Unchanged}, err)
	}
	if r.blobs.readOnly {
		return nil, nil
	}
	result, err := p.result(r.tag(ctx, d, p.as, &p.opts.PublishOptions))
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrIncomplete) { // collected in between
		return nil, nil
	}
	return result, err
}

// result returns the result for an update of the ref.
func (p *puller) result(u RefUpdate, err error) (*PullResult, error) {
	switch {
	case u.Outcome == Conflicted:
		return &PullResult{Update: u}, err
	case err != nil:
		return nil, err
	}
	return &PullResult{Artifact: p.registry.newArtifact(p.as, u.Descriptor, nil), Update: u}, nil
}
