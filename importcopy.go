package ocilocal

import (
	"cmp"
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportRegistry copies the artifact that ref names in another local registry into this one, with
// everything that it needs. The artifact keeps its reference, unless opts name another one. The
// kernel copies files where it can, and each copy is verified. With [ImportOptions.Referrers], the
// artifact's referrers in src are copied too. Referrers that are incomplete in src are in
// ImportResult.Skipped. Both registries must stay open. ctx governs the call.
//
// Errors:
//   - [ErrNotFound]: src does not have the ref
//   - [ErrIncomplete]: src lacks something that the artifact needs
//   - [ErrDigestMismatch], [ErrSizeMismatch]: content of src is damaged
//   - those of [LocalRegistry.ImportLayout]
func (r *LocalRegistry) ImportRegistry(ctx context.Context, src *LocalRegistry, ref Reference, opts *ImportOptions) (*ImportResult, error) {
	if opts == nil {
		opts = &ImportOptions{}
	}
	result, err := attend(ctx, opts.Progress, ref, func(ctx context.Context, m *meter) (*ImportResult, error) {
		return r.importRegistry(ctx, src, ref, opts, m)
	})
	return result, opError("import", ref.String(), "", err)
}

// importRegistry runs an importer over an index.json that it makes itself: the manifest of ref,
// under the name of ref, and its referrers. So all options of imports work as for a layout.
//
// Both registries have a call in progress, so neither can be closed meanwhile. A collection of src
// can still delete content that its refs no longer need. The import then fails with
// [ErrIncomplete]. Only members that src records as absent may be absent here.
func (r *LocalRegistry) importRegistry(ctx context.Context, src *LocalRegistry, ref Reference, opts *ImportOptions, m *meter) (*ImportResult, error) {
	end, err := r.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	endToo, err := src.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer endToo()
	root, err := src.resolve(ref)
	if err != nil {
		return nil, err
	}
	o := *opts
	o.one, o.Rename, o.Select = true, true, string(root.Digest)
	facts, err := src.knownFacts(ref, root.Digest)
	if err != nil {
		return nil, err
	}
	root.Platform, root.Annotations = facts.Platform, facts.Annotations
	if root.Annotations == nil {
		root.Annotations = map[string]string{}
	}
	root.Annotations[ocispec.AnnotationRefName] = ref.String()
	entries, skipped := []ocispec.Descriptor{root}, []ocispec.Descriptor(nil)
	if o.Referrers {
		if entries, skipped, err = src.withReferrers(ctx, root); err != nil {
			return nil, err
		}
	}
	im := r.newImporter(&o)
	im.meter = m
	defer func() { r.logDiscard(im.stage.discard()) }()
	im.workers = diskWorkers
	im.look = src.blobs.openDescriptor
	im.mayLack = func(d digest.Digest) (bool, error) { return isAbsent(src.index, d, roleManifest) }
	im.fetch = func(ctx context.Context, desc ocispec.Descriptor, as role, item *meteredItem) error {
		if as == roleManifest { // a blob with its bytes is not the member
			if only, err := isOnlyBlob(src.index, desc.Digest); only || err != nil {
				return cmp.Or(err, fmt.Errorf("%w: manifest %s", ErrIncomplete, desc.Digest))
			}
		}
		f, _, err := src.blobs.openFile(desc.Digest, desc.Size)
		if err != nil {
			return incomplete(err)
		}
		defer f.Close()
		if err := im.stage.putFile(ctx, f, desc.Digest, desc.Size, item.from(0)); err != nil {
			return fmt.Errorf("blob %s: %w", desc.Digest, err)
		}
		return nil
	}
	im.mayRepeat(im.fetchAgain)
	result, err := im.run(ctx, &layoutIndex{entries: entries})
	if result != nil {
		result.Skipped = append(result.Skipped, skipped...)
	}
	return result, err
}

// openDescriptor is open for the digest and size of a descriptor.
func (s *blobStore) openDescriptor(ctx context.Context, desc ocispec.Descriptor) (*verifier, error) {
	return s.open(ctx, desc.Digest, desc.Size)
}

// withReferrers returns a manifest, the referrers of all manifests that it needs, and their
// referrers in turn. Referrers that are incomplete here are returned as skipped: a collector that
// was killed may have left them so, and no ref needs them. The list is bounded by MaxReferrers,
// because anybody who can push may have added referrers.
func (r *LocalRegistry) withReferrers(ctx context.Context, root ocispec.Descriptor) (list, skipped []ocispec.Descriptor, err error) {
	needs := r.newClosure()
	if _, err := needs.add(ctx, root); err != nil {
		return nil, nil, incomplete(err)
	}
	list = []ocispec.Descriptor{root}
	for i := 0; i < len(needs.manifests); i++ { // addReferrer appends to needs.manifests
		var found []ocispec.Descriptor
		for d, err := range r.Referrers(ctx, needs.manifests[i].Digest, nil) {
			if err != nil {
				return nil, nil, err
			}
			if found = append(found, d); len(list)+len(found) > MaxReferrers+1 {
				return nil, nil, fmt.Errorf("%w: more than %d referrers", ErrTooLarge, MaxReferrers)
			}
		}
		for _, d := range found {
			if needs.seen[d.Digest] {
				continue
			}
			here, err := needs.addReferrer(ctx, d)
			switch {
			case err != nil:
				return nil, nil, fmt.Errorf("referrer %s: %w", d.Digest, err)
			case here:
				list = append(list, d)
			default:
				skipped = append(skipped, d)
			}
		}
	}
	return list, skipped, nil
}
