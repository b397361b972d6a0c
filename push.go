package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PushOptions govern where an artifact goes, and what goes with it. Nil is the zero value.
type PushOptions struct {
	// Remote is the client to push with. Nil means [Options.Remote].
	Remote *Remote
	// As, if not zero, is the artifact's name in the remote registry, and names that registry.
	// Otherwise the artifact keeps its reference.
	As Reference
	// Tags are further tags that the artifact gets in the same repository.
	Tags []string
	// Expected, if not empty, is the digest that the remote tag must point at. A tag that points
	// elsewhere, or is absent, is a [*ConflictError]. The registry is asked just before the tag is
	// written. Registries offer no way to do both in one step, so a writer in between can be
	// overwritten. Expected does not concern Tags.
	Expected digest.Digest
	// Referrers also pushes the artifact's referrers, such as signatures, and the referrers of
	// these. They are pushed by digest, after the artifact. Referrers that are not here whole are
	// skipped: see PushResult.Skipped.
	Referrers bool
	// ReferrerTypes, if not empty, restricts Referrers to these artifact types.
	ReferrerTypes []string
	// ChunkSize, if positive, uploads larger blobs in chunks of so many bytes. Otherwise a blob
	// goes in one request, unless the registry asks for chunks.
	ChunkSize int64
	// Workers is how many blobs are sent at a time. Zero means 4.
	Workers int
	// Progress, if not nil, is called with reports on the push. Mounted blobs count as skipped.
	Progress func(Progress)
}

// A PushResult says what a push did.
type PushResult struct {
	Reference    Reference            // the name in the remote registry
	Descriptor   ocispec.Descriptor   // of the manifest or image index
	Referrers    []ocispec.Descriptor // the referrers that were pushed too
	Skipped      []ocispec.Descriptor // referrers that were not pushed, because they are not here whole
	BlobsSent    int                  // blobs that were uploaded
	BlobsMounted int                  // blobs that the registry took from another of its repositories
	BlobsPresent int                  // blobs that the repository had
	BytesSent    int64                // of blobs
}

// Push sends the artifact that ref names to its remote registry. It sends the blobs that the
// repository does not have, several at a time, and then the manifests, members before their image
// index. If another local ref says that a blob is in another repository of that registry, the blob
// is mounted from there. Manifests keep their bytes. If the registry has no referrers API, a
// manifest with a subject is added to the list under the subject's referrers tag
// (distribution-spec, "Unavailable Referrers API").
//
// Push overwrites the remote tag, wherever it points: see [PushOptions]. It returns nil only if the
// registry has everything. Pushing again sends only the missing parts. Damaged bytes are never sent
// whole.
//
// ctx governs the call. Errors:
//   - [ErrNotFound] or [ErrIncomplete] if the artifact is not here, or not whole
//   - [*RemoteError] for failures of the registry or the network, with one of the sentinels that it
//     lists
//   - [*ConflictError] if the remote tag is not at PushOptions.Expected
//   - [ErrUnsupportedManifest] if the registry refuses artifact manifests: build the artifact as an
//     image manifest ([FormatImageManifest]) or [LocalRegistry.Convert] it
//   - [ErrInvalidReference] for a malformed tag, [ErrTooLarge] for too many referrers
//   - [ErrDigestMismatch], and any error from ctx or the file system
func (r *LocalRegistry) Push(ctx context.Context, ref Reference, opts *PushOptions) (*PushResult, error) {
	if opts == nil {
		opts = &PushOptions{}
	}
	result, err := attend(ctx, opts.Progress, ref, func(ctx context.Context, m *meter) (*PushResult, error) {
		return r.push(ctx, ref, opts, m)
	})
	return result, opError("push", ref.String(), "", err)
}

func (r *LocalRegistry) push(ctx context.Context, ref Reference, opts *PushOptions, m *meter) (*PushResult, error) {
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	root, err := r.resolve(ref)
	if err != nil {
		return nil, err
	}
	p := &pusher{closure: r.newClosure(), as: ref, opts: *opts, meter: m}
	if !p.opts.As.IsZero() {
		p.as = p.opts.As
	}
	if d := p.as.Digest(); d != "" && d != root.Digest {
		return nil, fmt.Errorf("%w: manifest has digest %s, and is to be pushed as %s", ErrDigestMismatch, root.Digest, p.as)
	}
	for _, tag := range p.opts.Tags {
		if err := checkTag(tag); err != nil {
			return nil, err
		}
	}
	remote := p.opts.Remote
	if remote == nil {
		remote = r.remote
	}
	if p.repo, err = remote.repo(p.as); err != nil {
		return nil, err
	}
	m.phase(PhasePlan)
	result, err := p.run(ctx, root)
	if err == nil && p.opts.Referrers {
		m.phase(PhaseReferrers)
		err = p.pushReferrers(ctx, result)
		p.count(result)
	}
	return result, err
}

// A pusher is one push. The order of its steps is what makes it safe to break off at any point:
//
//	collect        reads and verifies all manifests, and checks that all blobs are here
//	sendBlobs      asks for each blob (HEAD), then mounts or uploads it, several at a time
//	putManifest    members before the image index that needs them, the root last, under its tag
//	pushReferrers  the same for each referrer, by digest
//
// A registry never has a manifest without its content, and the tag moves last. Blobs that were sent
// before a failure stay there, and the next push finds them.
type pusher struct {
	closure
	repo  *remoteRepo
	as    Reference
	opts  PushOptions
	meter *meter

	// unsent holds the digests of blobs that the registry says it has, or has mounted.
	unsent                 sync.Map
	sent, mounted, present atomic.Int64
	bytes                  atomic.Int64
}

func (p *pusher) run(ctx context.Context, root ocispec.Descriptor) (*PushResult, error) {
	if err := p.collect(ctx, root); err != nil {
		return nil, err
	}
	if err := p.send(ctx, root, p.manifests, p.blobs, cmp.Or(p.as.Tag(), string(root.Digest)), p.opts.Tags); err != nil {
		return nil, err
	}
	result := &PushResult{Reference: p.as, Descriptor: root}
	p.count(result)
	return result, nil
}

// count sets the counts of a result.
func (p *pusher) count(result *PushResult) {
	result.BlobsSent, result.BlobsMounted, result.BlobsPresent = int(p.sent.Load()), int(p.mounted.Load()), int(p.present.Load())
	result.BytesSent = p.bytes.Load()
}

// send sends blobs, and then manifests, the last of which is root. It puts root under a tag or its
// digest, and under further tags.
func (p *pusher) send(ctx context.Context, root ocispec.Descriptor, manifests, blobs []ocispec.Descriptor, reference string, tags []string) error {
	p.meter.planAll(manifests)
	p.meter.planAll(blobs)
	isRoot := len(manifests) == len(p.manifests) // else it is a referrer
	if isRoot {
		p.meter.planned(PhaseBlobs)
	}
	before := p.sent.Load()
	if err := p.sendBlobs(ctx, blobs); err != nil {
		return err
	}
	if isRoot {
		p.meter.phase(PhasePublish)
	}
	for _, desc := range manifests {
		m, err := p.registry.readVerified(ctx, desc)
		if err != nil {
			return incomplete(err)
		}
		at := []string{string(desc.Digest)}
		if desc.Digest == root.Digest {
			at = append([]string{reference}, tags...)
			if err := p.checkExpected(ctx, desc); err != nil {
				return err
			}
		}
		skipped := true
		for i, reference := range at {
			if p.sent.Load() == before && p.there(ctx, reference, m.Descriptor()) {
				if m.doc.Subject == nil || i > 0 || p.repo.lists(ctx, m.doc.Subject.Digest, m.Digest()) {
					continue
				}
				reference = string(m.Digest()) // push it again: the answer says whether to add it to the list
			}
			if err := p.putManifest(ctx, reference, m); err != nil {
				return err
			}
			skipped = false
		}
		if skipped {
			p.meter.skip(desc)
		} else {
			p.meter.done(desc)
		}
	}
	return nil
}

// checkExpected compares the remote tag with PushOptions.Expected.
func (p *pusher) checkExpected(ctx context.Context, root ocispec.Descriptor) error {
	if p.opts.Expected == "" || p.as.Tag() == "" {
		return nil
	}
	got, err := p.repo.head(ctx, p.as.Tag())
	if absent, _ := p.repo.saysAbsent(err); err != nil && !absent {
		return err
	}
	if got.Digest != p.opts.Expected {
		return &ConflictError{Reference: p.as, Existing: got.Digest, Incoming: root.Digest, Expected: p.opts.Expected}
	}
	return nil
}

// pushReferrers sends the referrers of everything that was sent, and of the referrers.
func (p *pusher) pushReferrers(ctx context.Context, result *PushResult) error {
	p.opts.Expected = ""                    // it was about the artifact
	for i := 0; i < len(p.manifests); i++ { // addReferrer adds to it, so referrers of referrers follow
		var found []ocispec.Descriptor
		for d, err := range p.registry.Referrers(ctx, p.manifests[i].Digest, nil) {
			if err != nil {
				return err
			}
			if !p.seen[d.Digest] && ofType(d, p.opts.ReferrerTypes) {
				found = append(found, d)
			}
			if len(result.Referrers)+len(result.Skipped)+len(found) > MaxReferrers {
				return fmt.Errorf("%w: more than %d referrers", ErrTooLarge, MaxReferrers)
			}
		}
		for _, d := range found {
			if p.seen[d.Digest] {
				continue
			}
			manifests, blobs := len(p.manifests), len(p.blobs)
			here, err := p.addReferrer(ctx, d)
			if err == nil && !here {
				result.Skipped = append(result.Skipped, d)
				continue
			}
			if err == nil {
				err = p.send(ctx, d, p.manifests[manifests:], p.blobs[blobs:], string(d.Digest), nil)
			}
			if err != nil {
				return fmt.Errorf("referrer %s: %w", d.Digest, err)
			}
			result.Referrers = append(result.Referrers, d)
		}
	}
	return nil
}

// ofType reports whether a referrer has one of some artifact types. No types means all.
func ofType(d ocispec.Descriptor, types []string) bool {
	return len(types) == 0 || slices.Contains(types, d.ArtifactType)
}

// putManifest pushes a manifest. A registry, or a cache in front of it, may claim to have a blob
// that it lacks. The answer to the manifest then says that a blob is unknown. In that case the
// blobs that were not sent are sent, and the manifest is put once more.
func (p *pusher) putManifest(ctx context.Context, reference string, m *Manifest) error {
	err := p.repo.putManifest(ctx, reference, m)
	if e, ok := errors.AsType[*RemoteError](err); !ok || !e.unknownBlob() {
		return err
	}
	again := 0
	for i, c := range m.children() {
		has, unsent := p.unsent.LoadAndDelete(c.Digest)
		if m.childRole(i) == roleManifest || !unsent {
			continue
		}
		if has == present {
			p.present.Add(-1)
		} else {
			p.mounted.Add(-1)
		}
		p.meter.unskip(c)
		again++
		if err := p.upload(ctx, c, nil); err != nil {
			return err
		}
	}
	if again == 0 {
		return err
	}
	return p.repo.putManifest(ctx, reference, m)
}

// there reports whether a tag or digest of the remote repository has the manifest already. An error
// means no: then the manifest is written.
func (p *pusher) there(ctx context.Context, reference string, desc ocispec.Descriptor) bool {
	got, err := p.repo.head(ctx, reference)
	return err == nil && got.Digest == desc.Digest && got.Size == desc.Size && got.MediaType == desc.MediaType
}

// collect lists everything that the artifact needs, and checks that its blobs are here.
func (p *pusher) collect(ctx context.Context, root ocispec.Descriptor) error {
	if _, err := p.add(ctx, root); err != nil {
		return incomplete(err)
	}
	for _, b := range p.blobs {
		if err := p.registry.blobs.checkSize(b.Digest, b.Size); err != nil {
			return incomplete(err)
		}
	}
	return nil
}

// sendBlobs sends blobs, several at a time. The first error ends it.
func (p *pusher) sendBlobs(ctx context.Context, blobs []ocispec.Descriptor) error {
	t := newTasks(ctx, cmp.Or(max(p.opts.Workers, 0), 4))
	var err error
	for _, desc := range blobs {
		if err = t.start(func() error { return p.sendBlob(t.ctx, desc) }); err != nil {
			break
		}
	}
	return t.wait(err)
}

// sendBlob makes sure that the repository has a blob. If the registry says that it has it with
// another length, the blob is uploaded and its length checked afterwards.
func (p *pusher) sendBlob(ctx context.Context, desc ocispec.Descriptor) error {
	has, err := p.repo.hasBlob(ctx, desc)
	if err != nil {
		return err
	}
	if has == present {
		p.unsent.Store(desc.Digest, present)
		p.present.Add(1)
		p.meter.skip(desc)
		return nil
	}
	name, err := p.registry.index.otherName(desc.Digest, p.as.Registry()+"/", p.as.Name())
	if err != nil {
		return err
	}
	var session *uploadSession
	if name != "" && has != doubtful {
		other, err := ParseReference(name)
		if err != nil {
			return err
		}
		done, s, err := p.repo.mount(ctx, desc, other.Repository())
		if err != nil {
			return err
		}
		if done {
			p.unsent.Store(desc.Digest, unknown)
			p.mounted.Add(1)
			p.meter.skip(desc)
			return nil
		}
		session = s
	}
	if err := p.upload(ctx, desc, session); err != nil {
		return err
	}
	if has == doubtful {
		return p.repo.checkSize(ctx, desc)
	}
	return nil
}

// upload sends a blob, in an open session if there is one, and counts it.
func (p *pusher) upload(ctx context.Context, desc ocispec.Descriptor, session *uploadSession) error {
	u := &upload{repo: p.repo, desc: desc, store: p.registry.blobs, chunk: p.opts.ChunkSize, item: p.meter.item(desc)}
	u.sent = func(n int) { p.bytes.Add(int64(n)) }
	if err := u.run(ctx, session); err != nil {
		return err
	}
	u.item.end()
	p.sent.Add(1)
	return nil
}
