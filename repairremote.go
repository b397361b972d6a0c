package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// healRemote asks registries for the wanted blobs. If a registry cannot be reached or sends other
// bytes, the next one is asked, and the first such error is kept in p.remoteErr. A "not found" is
// not kept, since a registry need not have the blob. Any other error is one of this registry or the
// process, and ends the repair.
//
// The bytes must hash to the digest, so it does not matter that nobody knows whether a repository
// is the one from which the blob came.
func (p *repair) healRemote(ctx context.Context) error {
	if p.opts.Remote == nil {
		return nil
	}
	for _, d := range slices.Sorted(maps.Keys(p.wanted)) {
		desc, as, err := p.describe(d)
		if err != nil {
			return err
		}
		if desc.Digest == "" {
			continue
		}
		names, err := p.repositories(ctx, d)
		if err != nil {
			return err
		}
		for _, ref := range names {
			err := p.healFromRepository(ctx, ref, desc, as)
			if err == nil {
				delete(p.wanted, d)
				p.report.Healed = append(p.report.Healed, d)
				break
			}
			if remote, ok := errors.AsType[*RemoteError](err); ctx.Err() != nil || !ok && !errors.Is(err, ErrDigestMismatch) {
				return err
			} else if p.remoteErr == nil && !(ok && errors.Is(remote, ErrNotFound)) {
				p.remoteErr = fmt.Errorf("%s: %w", ref.Name(), err)
			}
		}
	}
	return nil
}

// describe returns the descriptor of a blob, from the index or from an unrecorded manifest that
// needs it. It is empty if neither knows the blob. The role decides by which API a registry is
// asked: manifests have another endpoint than blobs.
func (p *repair) describe(d digest.Digest) (ocispec.Descriptor, role, error) {
	x := p.registry.index
	desc, ok, err := x.resolveDigest(d)
	if ok || err != nil {
		return desc, roleManifest, err
	}
	if l, ok := p.lacks[d]; ok {
		return l.desc, l.role, nil
	}
	known, err := hasBlob(x, d)
	if !known || err != nil {
		return ocispec.Descriptor{}, "", err
	}
	size, err := blobSize(x, d)
	return ocispec.Descriptor{Digest: d, Size: size}, roleLayer, err
}

// repositories returns one reference for each repository to ask for d: those of RepairOptions.From,
// or those of refs that lead to d. Names that a registry of this package made up are left out,
// because no server has their host. The limits keep a blob that very many artifacts share, such as
// the empty config, from causing a request to each of their repositories.
func (p *repair) repositories(ctx context.Context, d digest.Digest) ([]Reference, error) {
	const most = 10
	if p.opts.From != nil {
		return p.opts.From, nil
	}
	_, named, err := (&climb{ctx: ctx, q: p.registry.index, ways: ways{subjects: true}}).all(d, 1000)
	if err != nil {
		return nil, err
	}
	var names []Reference
	for _, d := range named {
		refs, err := refsTo(p.registry.index, d)
		if err != nil {
			return nil, err
		}
		for _, ref := range refs {
			known := slices.ContainsFunc(names, func(n Reference) bool { return n.Name() == ref.Name() })
			if !known && !strings.HasSuffix(ref.Registry(), localHostSuffix) {
				names = append(names, ref)
			}
		}
		if len(names) >= most {
			return names[:most], nil
		}
	}
	return names, nil
}

// healFromRepository takes one blob or manifest from a repository, verifies it, and makes it
// durable under its name.
func (p *repair) healFromRepository(ctx context.Context, ref Reference, desc ocispec.Descriptor, as role) error {
	repo, err := p.opts.Remote.source(ref)
	if err != nil {
		return err
	}
	st := p.registry.blobs.newStage()
	defer func() { p.registry.logDiscard(st.discard()) }()
	from := &fetcher{registry: p.registry, repo: repo, ref: ref, stage: st}
	p.meter.plan(1, desc.Size)
	item := p.meter.item(desc)
	if err := from.fetch(ctx, desc, as, item); err != nil {
		item.drop()
		return err
	}
	item.end()
	return st.settle(ctx, nil)
}
