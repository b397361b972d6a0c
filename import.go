package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportOptions choose what is imported, and under which names. Nil is the zero value.
//
// A name in content is a claim: whoever wrote the archive or layout chose it, and nothing proves
// that it is theirs. With the zero value, an import sets each ref that the content claims and that
// does not exist yet, on any host, and a later [LocalRegistry.Load] serves it. For content from
// somebody who is not trusted with all names, set Name to restrict them, Reference to choose one,
// or IgnoreNames.
type ImportOptions struct {
	// Select, if not empty, chooses one entry of the layout's index by its name, by its
	// io.containerd.image.name, or by its digest. A digest may also be that of a manifest in an
	// image index that is an entry. Otherwise every entry is imported that is a manifest or image
	// index. The others are in ImportResult.Skipped.
	Select string
	// Platform, if not nil, takes only entries that are for this platform, or that name none. Of an
	// image index, it takes the one manifest for the platform, without the index, and calls it what
	// the index is called.
	Platform *ocispec.Platform
	// AsIndex imports index.json itself, as one image index of all its entries. Tools write
	// multi-platform images so. It gets Reference, or no name.
	AsIndex bool
	// Reference, if not zero, is the name for the one imported entry.
	// It must agree with the entry's own name, if it has one, unless Rename is set.
	Reference Reference
	// Rename lets Reference differ from the entry's own name.
	Rename bool
	// Repository, such as "example.com/team/model", names entries whose own name is only a tag, as
	// oras, skopeo and umoci write it: v1 becomes example.com/team/model:v1. Without it, such an
	// entry fails the import with [ErrBareName], unless another option decides its name.
	Repository string
	// Name, if not nil, decides what each entry is called here. Its argument's Reference is the
	// name that the content claims, or that Repository makes of it, and zero if there is none. It
	// returns the reference to set, or zero for none. It can return [SkipEntry] to leave the entry
	// out. Any other error ends the import and is returned. It must not call the registry.
	Name func(InspectedEntry) (Reference, error)
	// IgnoreNames treats all entries as if they had no names.
	IgnoreNames bool
	// Anonymous gives each entry that has no full name (host, repository, and tag or digest), and
	// gets none by another option, a new reference of the kind that
	// [LocalRegistry.NewAnonymousBuilder] makes. Otherwise content without a name is stored by
	// digest only: see [ImportResult.Unnamed].
	Anonymous bool
	// Referrers, where Select chooses one entry, brings the entries along whose subject is
	// a manifest that comes in, such as a signature of an artifact, then those
	// whose subject is one of these, and so on. They get no refs, whatever they are called
	// outside. A collection keeps them with their subject, unless [GCOptions.DropReferrers] is set.
	// To find them, the manifest of every entry is read: one that is missing or
	// damaged fails the import.
	Referrers bool
	// MaxBytes bounds the bytes that the import may add to the registry: those of the manifests and
	// blobs that it does not have. With an archive, blobs that no chosen entry needs count too,
	// since they are written before index.json may be known. Zero is no limit. Beyond it, the
	// import fails with [ErrTooLarge] before it has written more.
	MaxBytes int64
	// Progress, if not nil, is called with how far the import is. The totals of an archive are
	// known when it was read.
	Progress func(Progress)
	// PublishOptions say what happens if a ref exists. With one entry, a conflict is an error. With
	// several, those that don't conflict are imported, and the others have the outcome
	// [Conflicted]: see [ImportResult.Conflicts].
	PublishOptions

	one      bool // the caller has use for one entry only
	mustName bool // content without a name gets an anonymous one
}

// An ImportedArtifact is one entry that was imported.
type ImportedArtifact struct {
	// Name is the entry's org.opencontainers.image.ref.name as it stands.
	Name string
	// Descriptor is that of the manifest or image index, with the digest it had outside.
	Descriptor ocispec.Descriptor
	// Update says what became of the ref. Its Reference is the name that ImportOptions gave the
	// entry. Otherwise it is the entry's full name: its Name, or its io.containerd.image.name if
	// Name is empty or that one's tag or digest. Update is zero if the entry has no full name and
	// got none.
	Update RefUpdate
}

// An ImportResult tells what an import did.
type ImportResult struct {
	Artifacts []ImportedArtifact
	Referrers []ocispec.Descriptor // what ImportOptions.Referrers brought along
	// Absent are the members of image indexes and the foreign layers that neither the source nor the
	// registry has. The registry records them as absent: reading one is [ErrAbsent]. A later import
	// or pull that has them fills them in.
	Absent []ocispec.Descriptor
	// Skipped are entries of other media types or digest algorithms, those that ImportOptions.Name
	// left out, and of [LocalRegistry.ImportRegistry] referrers that the source doesn't have whole.
	Skipped      []ocispec.Descriptor
	BlobsWritten int   // blobs that the registry did not have
	BlobsReused  int   // blobs that it had
	BytesWritten int64 // size of the former

	missingSubjects []ocispec.Descriptor // of the manifests that came in, those that are nowhere
}

// Conflicts returns the updates whose outcome is [Conflicted]. Of those entries nothing was
// imported. Where several entries were, this is the only sign of them: the import itself returns no
// error.
func (r *ImportResult) Conflicts() []RefUpdate {
	var conflicts []RefUpdate
	for _, a := range r.Artifacts {
		if a.Update.Outcome == Conflicted {
			conflicts = append(conflicts, a.Update)
		}
	}
	return conflicts
}

// Unnamed returns the artifacts that got no ref. The registry has them by digest only: the next
// collection deletes those that are older than its grace, unless [LocalRegistry.Tag] names them
// before.
func (r *ImportResult) Unnamed() []ImportedArtifact {
	var unnamed []ImportedArtifact
	for _, a := range r.Artifacts {
		if a.Update.Reference.IsZero() {
			unnamed = append(unnamed, a)
		}
	}
	return unnamed
}

// importer is the one pipeline by which content comes in: it takes the closure
// of each chosen entry from a source into a stage, and publishes them together.
type importer struct {
	registry *LocalRegistry
	opts     ImportOptions
	stage    *stage
	// accept, if not nil, may refuse the manifest of an entry.
	accept func(*Manifest) error
	// fetch stages a blob that neither the stage nor the registry has. Unless
	// workers is 0, configs and layers are fetched several at once.
	fetch   func(ctx context.Context, desc ocispec.Descriptor, as role, item *meteredItem) error
	workers int
	tasks   *tasks // under way; nil without workers
	// later are the blobs that are brought when all manifests are read. So the call fails, or knows
	// how much there is to do, before the first one comes.
	later []pendingBlob
	meter *meter
	// look opens a manifest of the source without staging it. Nil: what the source has is staged.
	look func(ctx context.Context, desc ocispec.Descriptor) (*verifier, error)
	// whole reports whether the source, or the registry, has a manifest and all that it needs. If
	// it is not nil, subjects come in with what refers to them: see [importer.subjects].
	whole func(ctx context.Context, desc ocispec.Descriptor) (bool, error)
	// moved is when the ref was moved where it comes from; zero for now.
	moved time.Time
	// reusable decides whether a blob that the registry has may be used. Nil: every one may.
	reusable  func(ctx context.Context, desc ocispec.Descriptor) (bool, error)
	sizes     map[digest.Digest]int64 // what the closures hold
	manifests int64                   // bytes of those that were read
	parsed    int64                   // bytes of those whose documents are in memory
	added     atomic.Int64            // bytes that the registry did not have
	maxBytes  int64                   // bounds added: see ImportOptions.MaxBytes
	damaged   map[digest.Digest]bool  // blobs that the source has with other bytes
	// mayLack reports whether a member of an image index that neither the source nor the registry
	// has may be absent. Nil: none may. Foreign layers always may.
	mayLack func(digest.Digest) (bool, error)
	absent  absentees

	most int // len(sizes) at which the entry under way has MaxClosure blobs of its own
}

// absentees are the blobs that an import has not found and that may be absent.
type absentees struct {
	mu        sync.Mutex // several tasks at once find that a layer is missing
	manifests map[digest.Digest]bool
	list      []ocispec.Descriptor
	// needed are blobs that the import has met more than once, and that may not be absent where it
	// met them again.
	needed map[digest.Digest]bool
}

func (a *absentees) add(desc ocispec.Descriptor, as role) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if as == roleManifest {
		a.manifests[desc.Digest] = true
	}
	a.list = append(a.list, desc)
}

// checkAbsent fails if what was found to be absent in one place may not be absent in another.
func (im *importer) checkAbsent() error {
	for _, desc := range im.absent.list {
		if im.absent.needed[desc.Digest] {
			return fmt.Errorf("%w: blob %s is neither in the source nor in the registry", ErrIncomplete, desc.Digest)
		}
	}
	return nil
}

// sorted returns the blobs in the order of their digests, once no task is under way.
func (a *absentees) sorted() []ocispec.Descriptor {
	slices.SortFunc(a.list, func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return a.list
}

// keepParsed bounds the bytes of the manifests that an import keeps parsed until it publishes them.
// Larger imports read manifests twice. Reading one again takes less time than writing its rows.
const keepParsed = 1 << 20

func (r *LocalRegistry) newImporter(opts *ImportOptions) *importer {
	im := &importer{registry: r, stage: r.blobs.newStage(), sizes: map[digest.Digest]int64{}, damaged: map[digest.Digest]bool{}, most: MaxClosure,
		absent: absentees{manifests: map[digest.Digest]bool{}, needed: map[digest.Digest]bool{}}}
	if opts != nil {
		im.opts, im.maxBytes = *opts, opts.MaxBytes
	}
	return im
}

// run imports the entries of a layout's index.
func (im *importer) run(ctx context.Context, index *layoutIndex) (*ImportResult, error) {
	if err := im.opts.checkNames(); err != nil {
		return nil, err
	}
	im.meter.phase(PhasePlan)
	if im.opts.AsIndex {
		var err error
		if index, err = im.stageIndex(ctx, index); err != nil {
			return nil, err
		}
	}
	chosen, skipped, err := im.choose(ctx, index.entries)
	if err != nil {
		return nil, err
	}
	named, left, err := im.name(chosen)
	if err != nil {
		return nil, err
	}
	pubs, result, err := im.collect(ctx, index.entries, named)
	if err != nil {
		return nil, err
	}
	if err := im.stage.keepOnly(im.sizes); err != nil {
		return nil, err
	}
	im.meter.phase(PhasePublish)
	updates, err := im.registry.publish(ctx, im.stage, pubs)
	if err != nil {
		return nil, err
	}
	result.Absent = im.absent.sorted()
	result.Skipped = append(skipped, left...)
	for i, u := range updates {
		result.Artifacts[i].Update = u
	}
	if len(updates) == 1 {
		err = updates[0].conflict(im.opts.Expected)
	}
	if err == nil {
		result.BlobsWritten, result.BlobsReused, result.BytesWritten = im.stage.counts()
	} else {
		result.Referrers = nil // they weren't published either
	}
	return result, err
}

// collect stages the closures of the chosen entries, and what is to come along.
func (im *importer) collect(ctx context.Context, entries []ocispec.Descriptor, chosen []namedEntry) (pubs []publication, result *ImportResult, err error) {
	defer func() {
		if err == nil {
			err = im.checkAbsent()
		}
	}()
	if im.workers > 0 {
		im.tasks = newTasks(ctx, im.workers)
		ctx = im.tasks.ctx
		defer func() { err = im.tasks.wait(err) }()
	}
	result = &ImportResult{}
	for _, e := range chosen {
		p := publication{ref: e.ref, byDigest: e.ref.IsZero(), entry: e.facts, moved: im.moved, PublishOptions: im.opts.PublishOptions}
		im.most = len(im.sizes) + MaxClosure
		if p.root, err = im.manifest(ctx, e.Descriptor, 0, map[digest.Digest]bool{}, &p.manifests); err != nil {
			return nil, nil, err
		}
		if im.whole != nil {
			if result.missingSubjects, err = im.subjects(ctx, &p); err != nil {
				return nil, nil, err
			}
		}
		result.Artifacts = append(result.Artifacts, ImportedArtifact{Name: e.Annotations[ocispec.AnnotationRefName], Descriptor: p.root})
		pubs = append(pubs, p)
	}
	if im.opts.Referrers && len(pubs) == 1 {
		result.Referrers, err = im.referrers(ctx, entries, &pubs[0])
	}
	if err == nil {
		err = im.bringLater(ctx)
	}
	for i := range pubs {
		pubs[i].absent = im.absent.manifests
	}
	return pubs, result, err
}

// A pendingBlob is a config or layer that is needed.
type pendingBlob struct {
	mediaType string
	digest    digest.Digest
	size      int64
	role      role
	data      []byte // of its descriptor: see keepParsed
}

// bringLater brings the blobs that the manifests need.
func (im *importer) bringLater(ctx context.Context) error {
	im.meter.planned(PhaseBlobs)
	later := im.later
	im.later = nil
	for _, b := range later {
		desc := ocispec.Descriptor{MediaType: b.mediaType, Digest: b.digest, Size: b.size, Data: b.data}
		if im.stage.has(b.digest) { // it is a manifest, too
			continue
		}
		bring := func() error { return im.bring(ctx, desc, b.role) }
		var err error
		if im.tasks != nil {
			err = im.tasks.start(bring)
		} else {
			err = bring()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// subjects adds to p the subjects of its manifests, the subjects of these, and so on, as far as
// the source or the registry has them whole. It returns the others.
func (im *importer) subjects(ctx context.Context, p *publication) (missing []ocispec.Descriptor, err error) {
	have := map[digest.Digest]bool{}
	for _, m := range p.manifests {
		have[m.Digest] = true
	}
	for i := 0; i < len(p.manifests); i++ { // it grows
		s := p.manifests[i].subject
		if s.Digest == "" || have[s.Digest] {
			continue
		}
		have[s.Digest] = true
		switch whole, err := im.whole(ctx, s); {
		case err != nil:
			return nil, err
		case !whole:
			missing = append(missing, s)
			continue
		}
		if _, err := im.manifest(ctx, s, 0, have, &p.manifests); err != nil {
			return nil, fmt.Errorf("subject %s: %w", s.Digest, err)
		}
	}
	return missing, nil
}

// referrers adds to p the entries that refer to any of its manifests, those that
// it adds included. They stand and fall with p.
func (im *importer) referrers(ctx context.Context, entries []ocispec.Descriptor, p *publication) (added []ocispec.Descriptor, err error) {
	have := map[digest.Digest]bool{}
	for _, m := range p.manifests {
		have[m.Digest] = true
	}
	bySubject, peeked := map[digest.Digest][]ocispec.Descriptor{}, map[digest.Digest]bool{}
	for _, e := range entries {
		if have[e.Digest] || peeked[e.Digest] || formOf(e.MediaType) == 0 || checkDescriptor(&e) != nil {
			continue
		}
		peeked[e.Digest] = true
		m, err := im.peek(ctx, e)
		if err != nil {
			return nil, fmt.Errorf("looking for referrers: %w", err)
		}
		if s := m.doc.Subject; s != nil {
			bySubject[s.Digest] = append(bySubject[s.Digest], e)
		}
	}
	for i := 0; i < len(p.manifests); i++ { // it grows
		for _, e := range bySubject[p.manifests[i].Digest] {
			if have[e.Digest] { // it lies in one that came before
				continue
			}
			m, err := im.manifest(ctx, e, 0, have, &p.manifests)
			if err != nil {
				return nil, fmt.Errorf("referrer %s: %w", e.Digest, err)
			}
			added = append(added, m)
		}
	}
	return added, nil
}

// peek reads a manifest that may turn out not to be needed.
func (im *importer) peek(ctx context.Context, desc ocispec.Descriptor) (*Manifest, error) {
	if desc.Size > MaxManifestSize {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, tooLargeManifest(int(desc.Size)))
	}
	if im.damaged[desc.Digest] {
		return nil, damagedSource(desc.Digest)
	}
	src, err := (*verifier)(nil), ErrIncomplete
	if im.look != nil {
		src, err = im.look(ctx, desc)
	}
	if errors.Is(err, ErrIncomplete) {
		src, err = im.stage.open(ctx, desc.Digest, desc.Size)
	}
	if err != nil {
		return nil, incomplete(err)
	}
	return readManifest(src, desc)
}

// manifest stages a manifest and all below it, and appends them to list, children first. It returns
// the manifest's own descriptor. depth is how many image indexes the manifest lies in. seen holds
// the manifests of list and those that are under way.
func (im *importer) manifest(ctx context.Context, desc ocispec.Descriptor, depth int, seen map[digest.Digest]bool, list *[]pendingManifest) (root ocispec.Descriptor, err error) {
	if depth > MaxIndexNesting {
		return root, fmt.Errorf("%w: image indexes nested more than %d deep", ErrTooLarge, MaxIndexNesting)
	}
	if desc.Size > MaxManifestSize {
		return root, fmt.Errorf("%w: manifest %s has %d bytes, at most %d are taken", ErrTooLarge, desc.Digest, desc.Size, MaxManifestSize)
	}
	if im.manifests += desc.Size; im.manifests > MaxImportManifests {
		return root, fmt.Errorf("%w: manifests of more than %d bytes together (import fewer entries at a time: ImportOptions.Select)", ErrTooLarge, MaxImportManifests)
	}
	if err := im.blob(ctx, desc, roleManifest); err != nil {
		return root, err
	}
	pending, children, err := im.read(ctx, desc, depth)
	if err != nil {
		return root, err
	}
	seen[desc.Digest] = true
	for _, c := range children {
		if c.role != roleManifest {
			err = im.blob(ctx, c.desc, c.role)
		} else if !seen[c.desc.Digest] {
			var absent bool
			if absent, err = im.lacks(ctx, c.desc); err == nil && !absent {
				_, err = im.manifest(ctx, c.desc, depth+1, seen, list)
			}
		}
		if err != nil {
			return root, err
		}
	}
	*list = append(*list, pending)
	return pending.Descriptor, nil
}

// lacks reports whether a member of an image index is one that may be absent and that neither the
// source nor the registry has. If they have it, it is staged.
func (im *importer) lacks(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if im.mayLack == nil || desc.Size > MaxManifestSize {
		return false, nil
	}
	if im.absent.manifests[desc.Digest] {
		return true, nil
	}
	err := im.blob(ctx, desc, roleManifest)
	if !errors.Is(err, ErrIncomplete) {
		return false, err
	}
	may, failed := im.mayLack(desc.Digest)
	if failed != nil || !may {
		return false, errors.Join(err, failed)
	}
	im.absent.add(desc, roleManifest)
	return true, nil
}

// A child is a member of a manifest's closure, by the part of its descriptor that an import needs.
type child struct {
	desc ocispec.Descriptor
	role role
}

// read parses a staged manifest, and refuses what must not come in before its blobs do. The
// document is not returned: up to [MaxIndexNesting] indexes are under way at once, and a
// hostile one takes many times the memory of its bytes.
func (im *importer) read(ctx context.Context, desc ocispec.Descriptor, depth int) (p pendingManifest, children []child, err error) {
	src, err := im.stage.open(ctx, desc.Digest, desc.Size)
	if err != nil {
		return p, nil, incomplete(err)
	}
	m, err := readManifest(src, desc)
	if err != nil {
		return p, nil, err
	}
	p.Descriptor = m.Descriptor()
	if err := im.registry.acceptType(p.Descriptor); err != nil {
		return p, nil, err
	}
	if im.accept != nil && depth == 0 {
		if err := im.accept(m); err != nil {
			return p, nil, err
		}
	}
	if im.parsed += desc.Size; im.parsed <= keepParsed {
		p.parsed = m
	}
	if s := m.doc.Subject; s != nil {
		p.subject = ocispec.Descriptor{MediaType: s.MediaType, Digest: s.Digest, Size: s.Size}
	}
	for i, c := range m.children() {
		children = append(children, child{ocispec.Descriptor{MediaType: c.MediaType, Digest: c.Digest, Size: c.Size, Data: c.Data}, m.childRole(i)})
	}
	return p, children, nil
}

// blob makes sure that the stage has a manifest, or will have a config or layer.
func (im *importer) blob(ctx context.Context, desc ocispec.Descriptor, as role) error {
	asked, err := im.claim(desc)
	if err != nil {
		return err
	}
	if asked && as != roleManifest && !foreignLayer(desc.MediaType) {
		im.absent.needed[desc.Digest] = true
	}
	if !asked {
		im.meter.plan(1, desc.Size)
	}
	switch {
	case asked && (as != roleManifest || im.stage.has(desc.Digest)):
		return nil
	case as != roleManifest && (desc.Data == nil || im.parsed+int64(len(desc.Data)) <= keepParsed):
		im.parsed += int64(len(desc.Data))
		im.later = append(im.later, pendingBlob{desc.MediaType, desc.Digest, desc.Size, as, desc.Data})
		return nil
	}
	return im.bring(ctx, desc, as)
}

// bring takes a blob from the registry if it can, and otherwise from the source.
func (im *importer) bring(ctx context.Context, desc ocispec.Descriptor, as role) error {
	item := im.meter.item(desc)
	ok, err := im.reuse(ctx, desc)
	if err != nil {
		return err
	}
	if ok {
		item.skip()
		item.end()
		return nil
	}
	if err := im.charge(desc.Size); err != nil {
		return err
	}
	err = im.fetch(ctx, desc, as, item)
	if errors.Is(err, ErrIncomplete) && desc.Data != nil { // checkDescriptor has compared it with the digest
		_, err = im.stage.putBytes(ctx, desc.Data, desc.Digest.Algorithm())
	}
	if errors.Is(err, ErrIncomplete) && as != roleManifest && foreignLayer(desc.MediaType) {
		im.absent.add(desc, as)
		err = nil
	}
	if err == nil {
		item.end()
	}
	return err
}

// reuse takes a blob into the stage that the registry has, if it is whole and may be used.
func (im *importer) reuse(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if im.reusable != nil && !im.stage.has(desc.Digest) {
		if ok, err := im.reusable(ctx, desc); !ok || err != nil {
			return false, err
		}
	}
	return im.stage.reuse(ctx, desc.Digest, desc.Size)
}

// charge counts n bytes that the registry does not have against maxBytes, before they come in.
func (im *importer) charge(n int64) error {
	if sum := im.added.Add(n); im.maxBytes > 0 && (n > im.maxBytes || sum > im.maxBytes) {
		return fmt.Errorf("%w: more than %d bytes to add (MaxBytes)", ErrTooLarge, im.maxBytes)
	}
	return nil
}

func damagedSource(d digest.Digest) error {
	return fmt.Errorf("blob %s: %w: the source has other bytes under this name", d, ErrDigestMismatch)
}

// claim notes that a blob is needed. It reports whether it is there, or was asked for, already.
func (im *importer) claim(desc ocispec.Descriptor) (asked bool, err error) {
	if size, ok := im.sizes[desc.Digest]; ok {
		if size != desc.Size {
			return true, fmt.Errorf("%w: two descriptors of blob %s have different sizes, %d and %d", ErrInvalidManifest, desc.Digest, size, desc.Size)
		}
		return true, nil
	}
	if len(im.sizes) >= im.most {
		return false, fmt.Errorf("%w: an artifact of more than %d blobs", ErrTooLarge, MaxClosure)
	}
	im.sizes[desc.Digest] = desc.Size
	if im.damaged[desc.Digest] {
		return false, damagedSource(desc.Digest)
	}
	size, ok := im.stage.size(desc.Digest)
	if ok && size != desc.Size {
		err = fmt.Errorf("blob %s: %w: has %d bytes, its descriptor says %d", desc.Digest, ErrSizeMismatch, size, desc.Size)
	}
	return ok, err
}

// checkLayoutFile reads the file oci-layout.
func checkLayoutFile(raw []byte) error {
	var doc struct {
		Version string `json:"imageLayoutVersion"`
	}
	if _, err := decodeStrict(raw, jsonLayout, &doc); err != nil {
		return fmt.Errorf("%w: oci-layout: %w", ErrInvalidLayout, err)
	}
	if doc.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%w: oci-layout has version %s, want %q", ErrInvalidLayout, printable(doc.Version), ocispec.ImageLayoutVersion)
	}
	return nil
}
