package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportNames says how an export writes names to index.json.
type ExportNames int

const (
	// NamesFull writes the full name to org.opencontainers.image.ref.name, as skopeo and podman do.
	NamesFull ExportNames = iota
	// NamesTags writes only the tag there, as oras, umoci and kitops do, which find entries by it.
	// The repository is lost: [ImportOptions.Repository] gives it again.
	NamesTags
	// NamesContainerd writes the tag there and the full name to io.containerd.image.name, as
	// containerd and `docker save` do. Nothing is lost, and tools that look for a tag find it.
	NamesContainerd
)

// annotations returns the annotations of an entry that is called ref.
func (n ExportNames) annotations(ref Reference) map[string]string {
	tag := cmp.Or(ref.Tag(), string(ref.Digest()))
	switch n {
	case NamesTags:
		return map[string]string{ocispec.AnnotationRefName: tag}
	case NamesContainerd:
		return map[string]string{ocispec.AnnotationRefName: tag, annotationImageName: ref.String()}
	}
	return map[string]string{ocispec.AnnotationRefName: ref.String()}
}

// ExportOptions say what an export holds besides the artifacts of its refs, and
// how it is written. Nil is the zero value.
//
// The OMMX SDKs read only archives that are not compressed and that list one manifest. For them,
// export one ref, without Lineage, Referrers, Digests and Gzip. The artifact must be an image
// manifest of an OMMX artifact type.
type ExportOptions struct {
	// Digests are manifests to export as well, without a name.
	Digests []digest.Digest
	// Lineage adds the subject of each artifact, that one's subject, and so on
	// to the end of the chain, without a name. All of it must be there.
	Lineage bool
	// Referrers adds every manifest whose subject is a manifest of the export, such as a
	// signature of an artifact, then those whose subject is one of these, and
	// so on, each with all it needs. They are listed in index.json
	// without a name, even where refs point at them.
	Referrers bool
	// Names is how names are written. Zero is [NamesFull]. With [NamesTags], two refs that have the
	// same tag are [ErrInvalidArgument].
	Names ExportNames
	// Gzip compresses an archive. A layout directory is never compressed.
	Gzip bool
	// Progress, if not nil, is called with how far the export is.
	Progress func(Progress)
	// Overwrite lets [LocalRegistry.ExportArchiveFile] replace a file, and
	// [LocalRegistry.ExportLayout] a name that stands for another digest.
	Overwrite bool
}

// writeNew makes a file in dir that has its name only when it is complete and
// durable. Until then it is called temp.
func writeNew(dir *rootDir, temp, name string, overwrite bool, write func(io.Writer) error) (err error) {
	if _, err := dir.Lstat(name); err == nil && !overwrite {
		return ErrExists
	}
	f, err := dir.openFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.sync()
	}
	err = errors.Join(err, f.Close())
	switch {
	case err != nil:
	case overwrite:
		err = dir.Rename(temp, name)
	default:
		if _, err = dir.linkNew(temp, name); errors.Is(err, fs.ErrExist) {
			err = ErrExists
		}
	}
	if rm := dir.Remove(temp); !errors.Is(rm, fs.ErrNotExist) {
		err = errors.Join(err, rm)
	}
	if err != nil {
		return err
	}
	return dir.syncDir(".")
}

// export is the list of what one export holds, each manifest and blob once.
type export struct {
	closure // its lists are sorted by digest in the end
	opts    ExportOptions
	meter   *meter
	entries []exportEntry          // of index.json, sorted
	entered map[digest.Digest]bool // entries
	named   map[digest.Digest]bool // entries with a name
}

// An exportEntry is an entry of index.json.
type exportEntry struct {
	ocispec.Descriptor
	named bool // it has the name of a ref
}

// newExport gathers the closure of what is exported from the manifests.
func (r *LocalRegistry) newExport(ctx context.Context, refs []Reference, opts *ExportOptions, m *meter) (*export, error) {
	x := &export{closure: r.newClosure(), entered: map[digest.Digest]bool{}, named: map[digest.Digest]bool{}, meter: m}
	m.phase(PhasePlan)
	if opts != nil {
		x.opts = *opts
	}
	if len(refs) == 0 && len(x.opts.Digests) == 0 {
		return nil, fmt.Errorf("%w: nothing was chosen to be exported", ErrInvalidArgument)
	}
	tags := map[string]Reference{}
	for _, ref := range slices.Compact(slices.SortedFunc(slices.Values(refs), Reference.Compare)) {
		var desc ocispec.Descriptor
		err := r.within(ctx, func() (err error) {
			desc, err = r.resolve(ref)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ref, err)
		}
		facts, err := r.entryFacts(ctx, ref, desc.Digest)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ref, err)
		}
		name := x.opts.Names.annotations(ref)
		if x.opts.Names == NamesTags {
			if other, taken := tags[name[ocispec.AnnotationRefName]]; taken {
				return nil, fmt.Errorf("%w: %s and %s have the same tag (ExportOptions.Names)", ErrInvalidArgument, other, ref)
			}
			tags[name[ocispec.AnnotationRefName]] = ref
		}
		desc.Platform, desc.Annotations = facts.Platform, facts.with(x.opts.Names, name)
		if err := x.root(ctx, desc, true); err != nil {
			return nil, err
		}
	}
	for _, d := range slices.Compact(slices.Sorted(slices.Values(x.opts.Digests))) {
		desc, err := r.ResolveDigest(ctx, d)
		if err != nil {
			return nil, err
		}
		facts, err := r.entryFacts(ctx, Reference{}, d)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d, err)
		}
		desc.Platform, desc.Annotations = facts.Platform, facts.Annotations
		if err := x.root(ctx, desc, false); err != nil {
			return nil, err
		}
	}
	if x.opts.Referrers {
		if err := x.referrers(ctx); err != nil {
			return nil, err
		}
	}
	x.sort()
	m.planAll(x.manifests)
	m.planAll(x.blobs)
	return x, nil
}

// with returns the annotations of an entry that has a name.
func (f entryFacts) with(names ExportNames, name map[string]string) map[string]string {
	all := maps.Clone(f.Annotations)
	if all == nil {
		return name
	}
	if names == NamesTags {
		delete(all, annotationImageName)
	}
	maps.Copy(all, name)
	return all
}

// root adds an entry with its closure, and with its lineage if that is asked for. named says
// whether the entry has the name of a ref: of those without one, the first of each manifest counts.
func (x *export) root(ctx context.Context, desc ocispec.Descriptor, named bool) error {
	for {
		var m *Manifest
		if err := x.registry.within(ctx, func() (err error) {
			m, err = x.add(ctx, desc)
			return err
		}); err != nil {
			return err
		}
		walked := x.entered[desc.Digest]
		if named || !walked {
			x.entered[desc.Digest] = true
			x.named[desc.Digest] = x.named[desc.Digest] || named
			x.entries = append(x.entries, exportEntry{desc, named})
		}
		subject, ok := m.Subject()
		if !x.opts.Lineage || !ok || walked {
			return nil
		}
		parent, err := x.registry.ResolveDigest(ctx, subject.Digest)
		if errors.Is(err, ErrNotFound) {
			return fmt.Errorf("%w: %s, the subject of %s, is not in the registry", ErrIncomplete, subject.Digest, desc.Digest)
		}
		if err != nil {
			return err
		}
		desc, named = parent, false
	}
}

// referrers adds what refers to any of the manifests, these included.
func (x *export) referrers(ctx context.Context) error {
	for i := 0; i < len(x.manifests); i++ { // it grows
		subject := x.manifests[i].Digest
		for desc, err := range x.registry.Referrers(ctx, subject, nil) {
			if err == nil {
				desc.Annotations = nil // those of its manifest
				err = x.root(ctx, desc, false)
			}
			if err != nil {
				return fmt.Errorf("referrers of %s: %w", subject, err)
			}
		}
	}
	return nil
}

// sort puts the lists into the order that only the content decides.
func (x *export) sort() {
	x.entries = slices.DeleteFunc(x.entries, func(e exportEntry) bool { return !e.named && x.named[e.Digest] })
	byDigest := func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) }
	slices.SortFunc(x.manifests, byDigest)
	slices.SortFunc(x.blobs, byDigest)
	slices.SortStableFunc(x.entries, func(a, b exportEntry) int {
		if c := strings.Compare(entryName(a.Descriptor), entryName(b.Descriptor)); c != 0 {
			return c
		}
		return byDigest(a.Descriptor, b.Descriptor)
	})
}

// entryName returns the fullest name that an entry of an index.json has, to tell entries apart. The
// name of other content is none.
func entryName(e ocispec.Descriptor) string {
	if entryClaim(e).from != "" {
		return ""
	}
	return cmp.Or(e.Annotations[annotationImageName], e.Annotations[ocispec.AnnotationRefName])
}

const layoutFile = `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`

// index returns the bytes of index.json.
func (x *export) index() ([]byte, error) {
	var w canonicalWriter
	w.raw("{")
	entries := make([]ocispec.Descriptor, 0, len(x.entries))
	for _, e := range x.entries {
		entries = append(entries, e.Descriptor)
	}
	w.descriptors("manifests", entries)
	w.field("mediaType", ocispec.MediaTypeImageIndex)
	w.key("schemaVersion")
	w.int(2)
	w.raw("}")
	if w.err == nil && len(w.buf) > MaxLayoutIndexSize {
		w.err = fmt.Errorf("%w: index.json of %d artifacts would have %d bytes, at most %d are taken",
			ErrTooLarge, len(x.entries), len(w.buf), MaxLayoutIndexSize)
	}
	return w.buf, w.err
}
