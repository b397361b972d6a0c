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

// How an export is written. newExport collects a list; ExportArchive and ExportLayout write it:
//
//	oci-layout            {"imageLayoutVersion":"1.0.0"}
//	index.json            one entry for each ref, digest, subject and referrer; canonical JSON
//	blobs/<alg>/<hex>     manifests, then configs and layers; each list sorted by digest
//
// A tar has the files in this order: a reader knows all names before the first blob. In a
// directory, index.json is written last: until then, readers see the directory as it was.
//
// Equal content gives equal bytes. All lists are sorted by name and digest, JSON is canonical, and
// headers have no times or owners. Each blob is verified while it is written.

// ExportNames says how an export writes names to index.json.
type ExportNames int

const (
	// NamesFull writes the full name to org.opencontainers.image.ref.name, as skopeo and podman do.
	NamesFull ExportNames = iota
	// NamesTags writes only the tag to that annotation, as oras, umoci and kitops do. They find
	// entries by it. The repository is lost: [ImportOptions.Repository] can restore it.
	NamesTags
	// NamesContainerd writes the tag to that annotation and the full name to
	// io.containerd.image.name, as containerd and `docker save` do. Nothing is lost, and tools that
	// search for a tag find it.
	NamesContainerd
)

// annotations returns the annotations that name an entry ref. A ref without a tag is named by its
// digest.
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

// ExportOptions choose further content of an export besides the artifacts of its refs, and how it
// is written. Nil is the zero value.
//
// The OMMX SDKs read only archives that are not compressed and that list one manifest. For them,
// export one ref, without Lineage, Referrers, Digests and Gzip. The artifact must be an image
// manifest of an OMMX artifact type.
type ExportOptions struct {
	// Digests are further manifests to export, without names.
	Digests []digest.Digest
	// Lineage adds the subject of each artifact, the subject of that one, and so on to the end of
	// the chain, without names. The registry must have all of them.
	Lineage bool
	// Referrers adds every manifest whose subject is a manifest of the export, such as a signature
	// of an artifact, and their referrers in turn, each with everything that it needs. index.json
	// lists them without names, even if refs point at them.
	Referrers bool
	// Names is the form of names. Zero is [NamesFull]. With [NamesTags], two refs that have the
	// same tag are [ErrInvalidArgument].
	Names ExportNames
	// Gzip compresses an archive. A layout directory is never compressed.
	Gzip bool
	// Progress, if not nil, is called with the state of the export.
	Progress func(Progress)
	// Overwrite lets [LocalRegistry.ExportArchiveFile] replace a file. It lets
	// [LocalRegistry.ExportLayout] move a name that has another digest in the directory.
	Overwrite bool
}

// writeNew makes a file in dir. The order makes sure that the name never has an incomplete file,
// also after a power cut:
//
//	temp, O_EXCL → write → fsync → close → link (or rename, with overwrite) → remove temp → fsync dir
//
// Without overwrite, the link fails if another process has made the name meanwhile. A killed
// process leaves temp.
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

// An export is the list of the content of one export, each manifest and blob once. It has
// descriptors only: blobs are read when they are written.
type export struct {
	closure // sort orders its lists by digest
	opts    ExportOptions
	meter   *meter
	entries []exportEntry          // entries of index.json; sorted by sort
	entered map[digest.Digest]bool // the manifests that have an entry
	named   map[digest.Digest]bool // the manifests that have an entry with a name
}

// An exportEntry is an entry of index.json.
type exportEntry struct {
	ocispec.Descriptor
	named bool // it has the name of a ref
}

// newExport collects the content of an export, by reading and verifying its manifests. Each step is
// a separate short call, so Close does not wait for the whole export. A collection may delete
// content in between, if its ref is removed: the export then fails with [ErrNotFound].
func (r *LocalRegistry) newExport(ctx context.Context, refs []Reference, opts *ExportOptions, m *meter) (*export, error) {
	x := &export{closure: r.newClosure(), entered: map[digest.Digest]bool{}, named: map[digest.Digest]bool{}, meter: m}
	m.phase(PhasePlan)
	if opts != nil {
		x.opts = *opts
	}
	if len(refs) == 0 && len(x.opts.Digests) == 0 {
		return nil, fmt.Errorf("%w: no refs and no digests to export", ErrInvalidArgument)
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

// with returns the annotations of an entry that has a name: the facts, and the annotations of the
// name, which win. With NamesTags, a name of containerd that was imported is left out: its
// repository would contradict the choice.
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

// root adds an entry with its closure and, if ExportOptions.Lineage is set, the entries of its
// subjects. A manifest can have several entries with names, and one without. named says whether the
// entry has the name of a ref. The loop goes up the chain of subjects and stops at a manifest that
// has an entry already: its subjects have entries too.
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

// referrers adds the referrers of all manifests of the export, the added ones included.
func (x *export) referrers(ctx context.Context) error {
	for i := 0; i < len(x.manifests); i++ { // root appends to x.manifests
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

// sort orders the lists by content alone, so that the order of the caller's refs does not matter.
// An entry without a name is removed if the same manifest has one with a name: the manifest may
// have been added as a subject first.
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

// entryName returns the name of an entry of an index.json, to compare entries. A name of other
// content is not a name of the entry, and gives "".
func entryName(e ocispec.Descriptor) string {
	c := entryClaim(e)
	if c.isOther(e.Digest) {
		return ""
	}
	return c.String()
}

// layoutFile is the content of oci-layout (image-spec image-layout.md, "oci-layout file").
const layoutFile = `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`

// index returns the bytes of index.json. An import accepts at most MaxLayoutIndexSize, so an export
// does not write more.
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
		w.err = fmt.Errorf("%w: index.json of %d artifacts would have %d bytes, the limit is %d",
			ErrTooLarge, len(x.entries), len(w.buf), MaxLayoutIndexSize)
	}
	return w.buf, w.err
}
