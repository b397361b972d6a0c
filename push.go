package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PushOptions say where an artifact goes. Nil is the zero value.
type PushOptions struct {
	// Remote is the client to push with. Nil means [Options.Remote].
	Remote *Remote
	// As, if not zero, is what the artifact is called in the remote registry, which is As's. Otherwise it keeps its reference.
	As Reference
	// ChunkSize, if positive, uploads blobs larger than that in chunks of so many bytes. Otherwise
	// a blob goes in one request, unless the registry wants chunks.
	ChunkSize int64
	// Workers is how many blobs are sent at a time. Zero means 4.
	Workers int
}

// A PushResult tells what a push did.
type PushResult struct {
	Reference    Reference          // there
	Descriptor   ocispec.Descriptor // of the manifest or image index
	BlobsSent    int                // blobs that were uploaded
	BlobsMounted int                // blobs that the registry took from another of its repositories
	BlobsPresent int                // blobs that the repository had
	BytesSent    int64              // of blobs
}

// Push sends the artifact that ref names to its remote registry: blobs that the
// repository doesn't have first, several at a time, then the manifests, an
// image index after what it lists. A blob that another local ref says to be in
// another repository of that registry is mounted from there. Manifests keep their
// bytes. A manifest with a subject is added to the subject's referrers tag if the
// registry has no referrers API (distribution-spec, "Unavailable Referrers API").
//
// Pushing again sends what is missing. Damaged bytes are never sent whole. ctx governs the call.
//
// Errors: [ErrNotFound] or [ErrIncomplete] if something isn't here; [*RemoteError] for what the
// registry or the network did, with one of the sentinels that it lists;
// [ErrUnsupportedManifest] if the registry doesn't take an artifact manifest: build the artifact as an
// image manifest ([FormatImageManifest]) or [LocalRegistry.Convert] it;
// [ErrDigestMismatch], ctx's, and the file system's.
func (r *LocalRegistry) Push(ctx context.Context, ref Reference, opts *PushOptions) (*PushResult, error) {
	result, err := r.push(ctx, ref, opts)
	return result, opError("push", ref.String(), "", err)
}

func (r *LocalRegistry) push(ctx context.Context, ref Reference, opts *PushOptions) (*PushResult, error) {
	root, err := r.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	p := &pusher{closure: r.newClosure(), as: ref}
	if opts != nil {
		p.opts = *opts
	}
	if !p.opts.As.IsZero() {
		p.as = p.opts.As
	}
	if d := p.as.Digest(); d != "" && d != root.Digest {
		return nil, fmt.Errorf("%w: %s is to be pushed as %s", ErrDigestMismatch, root.Digest, p.as)
	}
	remote := p.opts.Remote
	if remote == nil {
		remote = r.remote
	}
	if p.repo, err = remote.repo(p.as); err != nil {
		return nil, err
	}
	return p.run(ctx, root)
}

// A pusher is one push.
type pusher struct {
	closure
	repo *remoteRepo
	as   Reference
	opts PushOptions

	// unsent holds the digests of blobs that the registry says it has, or has mounted.
	unsent                 sync.Map
	sent, mounted, present atomic.Int64
	bytes                  atomic.Int64
}

func (p *pusher) run(ctx context.Context, root ocispec.Descriptor) (*PushResult, error) {
	if err := p.collect(ctx, root); err != nil {
		return nil, err
	}
	if err := p.sendBlobs(ctx); err != nil {
		return nil, err
	}
	for _, desc := range p.manifests {
		m, err := p.registry.readVerified(ctx, desc)
		if err != nil {
			return nil, incomplete(err)
		}
		reference := string(desc.Digest)
		if desc.Digest == root.Digest {
			reference = cmp.Or(p.as.Tag(), reference)
		}
		if p.sent.Load() == 0 && p.there(ctx, reference, m.Descriptor()) {
			if m.doc.Subject == nil {
				continue
			}
			reference = string(m.Digest()) // only the answer tells whether it is to be listed
		}
		if err := p.putManifest(ctx, reference, m); err != nil {
			return nil, err
		}
	}
	return &PushResult{
		Reference: p.as, Descriptor: root,
		BlobsSent: int(p.sent.Load()), BlobsMounted: int(p.mounted.Load()), BlobsPresent: int(p.present.Load()),
		BytesSent: p.bytes.Load(),
	}, nil
}

// putManifest pushes a manifest. A registry, or a cache in front of it, may have said that blobs are there
// which aren't. The answer to the manifest says so. Then those that weren't sent are sent.
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

// there reports whether a tag or digest is what it is to be already. An error only means that it has to be written.
func (p *pusher) there(ctx context.Context, reference string, desc ocispec.Descriptor) bool {
	got, err := p.repo.head(ctx, reference)
	return err == nil && got.Digest == desc.Digest && got.Size == desc.Size && got.MediaType == desc.MediaType
}

// collect lists what the artifact needs, and looks that its blobs are there.
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

func (p *pusher) sendBlobs(ctx context.Context) error {
	t := newTasks(ctx, cmp.Or(max(p.opts.Workers, 0), 4))
	var err error
	for _, desc := range p.blobs {
		if err = t.start(func() error { return p.sendBlob(t.ctx, desc) }); err != nil {
			break
		}
	}
	return t.wait(err)
}

// sendBlob makes sure that the repository has a blob.
func (p *pusher) sendBlob(ctx context.Context, desc ocispec.Descriptor) error {
	has, err := p.repo.hasBlob(ctx, desc)
	if err != nil {
		return err
	}
	if has == present {
		p.unsent.Store(desc.Digest, present)
		p.present.Add(1)
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

// upload sends a blob.
func (p *pusher) upload(ctx context.Context, desc ocispec.Descriptor, session *uploadSession) error {
	u := &upload{repo: p.repo, desc: desc, store: p.registry.blobs, chunk: p.opts.ChunkSize}
	from := p.repo.remote.meter(Progress{Reference: p.as, Push: true, Descriptor: desc})
	defer func() { from(0) }() // waits for a Progress under way; what a transport goes on reading isn't told
	u.count = func(at int64) func(int) {
		report := from(at)
		if desc.Size == 0 { // nothing will be read
			report(0)
		}
		return func(n int) {
			p.bytes.Add(int64(n))
			report(n)
		}
	}
	if err := u.run(ctx, session); err != nil {
		return err
	}
	p.sent.Add(1)
	return nil
}
