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

// How content comes in. Every import and pull goes through the importer of this file. Its doors are
// ImportArchive, ImportLayout, ImportRegistry, ImportLegacy, ImportOMMX and Pull. They differ only
// in the functions of importer that read the source. A pull has one manifest already, so it starts
// at collect. The phases of importer.run:
//
//	choose    entries of index.json, by ImportOptions.Select and Platform
//	name      a reference for each entry: see importname.go
//	collect   manifests: staged, parsed, and followed to all that they need
//	          then configs and layers: reused from the registry, or fetched from the source
//	keepOnly  staged blobs that no chosen entry needs are dropped, before they are synced
//	publish   all entries in one transaction
//
// Manifests come before other blobs for two reasons. An import that must fail, because a type is
// refused or a limit is exceeded, fails before it has moved large blobs. And the totals of the
// progress are known before the first of them.
//
// Nothing is visible before publish: a killed import leaves only files below tmp/, which the next
// writing process removes, or blobs that no row names, which the next collection deletes.

// ImportOptions choose the entries to import and their names. Nil is the zero value.
//
// A name in content is a claim: the writer of the archive or layout chose it, and nothing proves
// that the name is theirs. With the zero value, an import sets each ref that the content claims and
// that does not exist yet, on any host, and a later [LocalRegistry.Load] serves it. For content
// from somebody who is not trusted with all names, set Name to restrict them, Reference to choose
// one, or IgnoreNames.
type ImportOptions struct {
	// Select, if not empty, chooses one entry of the layout's index by its name, by its
	// io.containerd.image.name, by its digest, or by the text of [InspectedEntry.Reference]. The
	// digest may also be that of a manifest in an image index that is an entry, or in an index in
	// that one. If Select is empty, every entry is imported that is a manifest or an image index.
	// The others are in ImportResult.Skipped.
	Select string
	// Platform, if not nil, chooses only entries for this platform, and entries that name no
	// platform. From an image index, it chooses the one manifest for the platform. The index is not
	// imported, and the manifest gets its name. As in a pull, indexes in that index are not searched.
	Platform *ocispec.Platform
	// AsIndex imports index.json itself, as one image index of all its entries. Some tools write
	// multi-platform images in this form. The index gets Reference, or no name.
	AsIndex bool
	// Reference, if not zero, is the name for the one imported entry.
	// It must agree with the entry's own name, if it has one, unless Rename is set.
	Reference Reference
	// Rename lets Reference differ from the entry's own name.
	Rename bool
	// Repository, such as "example.com/team/model", names entries whose own name is only a tag, as
	// oras, skopeo and umoci write it: v1 becomes example.com/team/model:v1. Without it, such an
	// entry fails the import with [ErrBareName], unless another option decides its name. An entry
	// whose own name is only its digest is named by this digest. Without Repository, it has no name.
	Repository string
	// Name, if not nil, decides the reference of each entry. Its argument's Reference is the name
	// that the content claims, completed by Repository if that is set, and zero if there is none.
	// Name returns the reference to set, or zero for none. It can return [SkipEntry] to leave the
	// entry out. Any other error ends the import and is returned. Name must not call the registry.
	Name func(InspectedEntry) (Reference, error)
	// IgnoreNames treats all entries as if they had no names.
	IgnoreNames bool
	// Anonymous is for entries that have no full name (host, repository, and tag or digest) and get
	// none by another option. Each gets a new reference, as [LocalRegistry.NewAnonymousBuilder]
	// makes it. Without Anonymous, such content is stored by digest only: see
	// [ImportResult.Unnamed].
	Anonymous bool
	// Referrers imports the referrers of the entry that Select chooses, such as signatures, and
	// their referrers in turn. An entry is one if its subject is a manifest that is imported.
	// Referrers get no refs, whatever their names in index.json are. A collection keeps them with
	// their subject, unless [GCOptions.DropReferrers] is set. To find them, the manifest of every
	// entry is read: one that is missing or damaged fails the import.
	Referrers bool
	// MaxBytes bounds the bytes that the import may add to the registry: those of the manifests and
	// blobs that it does not have. With an archive, blobs that no chosen entry needs count too,
	// because they may be written before index.json is read. Zero means no limit. An import that
	// would add more fails with [ErrTooLarge] before it writes the bytes beyond the limit.
	MaxBytes int64
	// Progress, if not nil, is called with the state of the import. The totals of an archive are
	// known after it was read.
	Progress func(Progress)
	// PublishOptions say what happens if a ref exists. With one entry, a conflict is an error. With
	// several, the entries without a conflict are imported, and the others have the outcome
	// [Conflicted]: see [ImportResult.Conflicts].
	PublishOptions

	one      bool // the caller can use one entry only: several are an error
	mustName bool // as Anonymous, for callers that return an artifact under a reference
}

// An ImportedArtifact is one entry that was imported.
type ImportedArtifact struct {
	// Name is the entry's annotation org.opencontainers.image.ref.name, unchanged.
	Name string
	// Descriptor describes the manifest or image index, by the digest that it had in the source.
	Descriptor ocispec.Descriptor
	// Update is the outcome for the ref. Its Reference is the name that ImportOptions gave the
	// entry. Otherwise it is the entry's full name: its Name, or its io.containerd.image.name if
	// Name is empty or that one's tag or digest. Update is zero if the entry has no full name and
	// got none.
	Update RefUpdate
}

// An ImportResult is the outcome of an import.
type ImportResult struct {
	Artifacts []ImportedArtifact
	Referrers []ocispec.Descriptor // imported by ImportOptions.Referrers
	// Absent are the members of image indexes and the foreign layers that neither the source nor
	// the registry has. The registry records them as absent: reading one is [ErrAbsent]. A later
	// import or pull that has them fills them in.
	Absent []ocispec.Descriptor
	// Skipped are entries that were not imported: those of other media types or digest algorithms,
	// and those that ImportOptions.Name left out. After [LocalRegistry.ImportRegistry], they are
	// the referrers that are incomplete in the source.
	Skipped      []ocispec.Descriptor
	BlobsWritten int   // blobs that the registry did not have
	BlobsReused  int   // blobs that it had
	BytesWritten int64 // total size of the blobs that were written

	missingSubjects []ocispec.Descriptor // subjects that neither the source nor the registry has whole
}

// Conflicts returns the updates whose outcome is [Conflicted]. Nothing of these entries was
// imported. If several entries were chosen, the import returns no error for a conflict, so callers
// find conflicts only here.
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

// An importer is the pipeline of one import or pull. It takes the closure of each chosen entry from
// a source into a stage, and publishes all of them together. The functions of the source are set by
// the door, before run. Fields without a lock are used by the goroutine of run only; tasks, which
// fetch configs and layers, use stage, meter, added and absent, which are safe for that.
type importer struct {
	registry *LocalRegistry
	opts     ImportOptions
	stage    *stage
	// accept, if not nil, may refuse the manifest of an entry.
	accept func(*Manifest) error
	// fetch stages a blob that neither the stage nor the registry has, and returns [ErrIncomplete]
	// if the source does not have it either. Configs and layers are fetched by workers goroutines;
	// with 0 workers, by the goroutine of run.
	fetch   func(ctx context.Context, desc ocispec.Descriptor, as role, item *meteredItem) error
	workers int
	tasks   *tasks // of this run; nil without workers
	// later are the configs and layers of all manifests that were read. They are brought after the
	// last manifest: see the top of this file.
	later []pendingBlob
	meter *meter
	// again stages blobs from the source a second time. If it is not nil, the stage is loose: see
	// [importer.bringAgain].
	again func(ctx context.Context, blobs map[digest.Digest]int64) error
	// look opens a manifest of the source without staging it. If it is nil, all that the source has
	// is in the stage.
	look func(ctx context.Context, desc ocispec.Descriptor) (*verifier, error)
	// whole reports whether source and registry together have a manifest and all that it needs. If
	// it is not nil, an artifact's subjects are imported with it: see [importer.subjects].
	whole func(ctx context.Context, desc ocispec.Descriptor) (bool, error)
	// moved is the time at which the source moved the ref. Zero means now.
	moved time.Time
	// reusable reports whether a blob that the registry has may be used. A pull with
	// [Options.SeparateRegistries] refuses others. If it is nil, every blob may.
	reusable  func(ctx context.Context, desc ocispec.Descriptor) (bool, error)
	sizes     map[digest.Digest]int64 // each digest of the closures, with the size that its descriptor says
	manifests int64                   // bytes of the manifests that were read
	parsed    int64                   // bytes of manifests and data that stay in memory: see keepParsed
	added     atomic.Int64            // bytes that the registry did not have
	maxBytes  int64                   // bounds added: see ImportOptions.MaxBytes
	damaged   map[digest.Digest]bool  // blobs that the source has with other bytes
	// mayLack reports whether a member of an image index may be absent if neither the source nor
	// the registry has it. If mayLack is nil, none may. Foreign layers always may.
	mayLack func(digest.Digest) (bool, error)
	// refetched are members that only the source may give: see lacks.
	refetched map[digest.Digest]bool
	absent    absentees

	// most is the limit of len(sizes) while one entry is read. It is MaxClosure above the length
	// at which the entry began, because MaxClosure holds for each artifact and not for the sum.
	most int
}

// absentees are the blobs that an import has not found and that may be absent.
//
// One blob can be needed in two places: as a foreign layer, which may be absent, and as an ordinary
// layer, which may not. The first place decides how the blob is brought, and a second one only
// finds that it was asked for. So the second place notes in needed that it does not allow absence,
// and checkAbsent compares the two when all blobs were brought.
type absentees struct {
	mu        sync.Mutex // guards manifests and list: several tasks add to them
	manifests map[digest.Digest]bool
	list      []ocispec.Descriptor
	needed    map[digest.Digest]bool // used by the goroutine of run only
}

// add records that a blob is absent.
func (a *absentees) add(desc ocispec.Descriptor, as role) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if as == roleManifest {
		a.manifests[desc.Digest] = true
	}
	a.list = append(a.list, desc)
}

// checkAbsent fails if a blob is absent that may not be absent in another place. It is called when
// no task is running.
func (im *importer) checkAbsent() error {
	for _, desc := range im.absent.list {
		if im.absent.needed[desc.Digest] {
			return fmt.Errorf("%w: blob %s is neither in the source nor in the registry", ErrIncomplete, desc.Digest)
		}
	}
	return nil
}

// sorted returns the blobs in the order of their digests, because tasks add them in any order. It
// is called when no task is running.
func (a *absentees) sorted() []ocispec.Descriptor {
	slices.SortFunc(a.list, func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return a.list
}

// keepParsed bounds the bytes of manifests, and of the data of descriptors, that an import keeps in
// memory until it publishes them. A parsed document can take twenty times the memory of its bytes.
// Larger imports read manifests twice. Reading one again takes less time than writing its rows.
const keepParsed = 1 << 20

// newImporter returns an importer without a source. The caller sets the functions of the source,
// and discards the stage in the end, whether or not run succeeds.
func (r *LocalRegistry) newImporter(opts *ImportOptions) *importer {
	im := &importer{registry: r, stage: r.blobs.newStage(), sizes: map[digest.Digest]int64{}, damaged: map[digest.Digest]bool{}, refetched: map[digest.Digest]bool{},
		most: MaxClosure, absent: absentees{manifests: map[digest.Digest]bool{}, needed: map[digest.Digest]bool{}}}
	if opts != nil {
		im.opts, im.maxBytes = *opts, opts.MaxBytes
	}
	return im
}

// run imports the entries of a layout's index: see the top of this file for its phases.
//
// An import of one entry returns a conflict as an error together with the result, as Build and Tag
// do. With several entries, a conflict is an outcome: the caller asked for many refs, and the
// others were set in the same transaction.
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
	if errors.Is(err, errGone) {
		if err = im.bringAgain(ctx); err == nil {
			updates, err = im.registry.publish(ctx, im.stage, pubs)
		}
	}
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

// collect stages the closures of the chosen entries and, if they are asked for, their subjects or
// referrers. It returns a publication for each entry.
//
// The deferred functions run in the opposite order of their definition: first wait, which ends the
// tasks and brings their first error, then checkAbsent, which reads absent.list without its mutex.
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

// bringAgain stages blobs again that a collection has deleted.
//
// The problem: a second import of the same content finds all blobs in the registry. A link below
// tmp/ for each of them, which protects it from collections, is then most of the work.
//
// The rule: an importer whose source can be read again makes no such links (a loose stage). If a
// collection deletes one of the blobs, reading it or publishing fails with errGone. Then bringAgain
// makes the stage an ordinary one, takes the blobs with links or from the source, and the failed
// step is repeated.
//
// It is safe because publish checks each blob with the index locked, whether or not it has a link.
// No collection can delete blobs of an ordinary stage, so bringAgain is called once at most.
func (im *importer) bringAgain(ctx context.Context) error {
	blobs := im.stage.tighten()
	for d, size := range blobs {
		had, err := im.stage.reuse(ctx, d, size)
		if had {
			delete(blobs, d)
		} else if err == nil {
			err = im.charge(size)
		}
		if err != nil {
			return err
		}
	}
	return im.again(ctx, blobs)
}

// fetchAgain is importer.again for a source that has one file for each blob.
func (im *importer) fetchAgain(ctx context.Context, blobs map[digest.Digest]int64) error {
	for d, size := range blobs {
		if err := im.fetch(ctx, ocispec.Descriptor{MediaType: mediaTypeBlob, Digest: d, Size: size}, roleLayer, nil); err != nil {
			return err
		}
	}
	return nil
}

// mayRepeat is called by a door whose source can be read again. It makes the stage loose: see
// bringAgain.
func (im *importer) mayRepeat(again func(context.Context, map[digest.Digest]int64) error) {
	im.again, im.stage.loose = again, true
}

// A pendingBlob is a config or layer that is needed and not yet brought. It has only the parts of a
// descriptor that bring needs: an import of 100,000 layers has as many of them in memory.
type pendingBlob struct {
	mediaType string
	digest    digest.Digest
	size      int64
	role      role
	data      []byte // of its descriptor: see keepParsed
}

// bringLater brings the configs and layers of all manifests, side by side if the source has
// workers. A blob can be in the stage already, because another manifest of the import has the same
// digest as a layer of this one.
func (im *importer) bringLater(ctx context.Context) error {
	im.meter.planned(PhaseBlobs)
	later := im.later
	im.later = nil
	for _, b := range later {
		desc := ocispec.Descriptor{MediaType: b.mediaType, Digest: b.digest, Size: b.size, Data: b.data}
		if im.stage.has(b.digest) {
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

// subjects adds to p the subjects of its manifests, the subjects of these, and so on, as far as the
// source and the registry have them whole. It returns the other subjects. A subject need not exist
// (image-spec manifest.md, "subject"), so a missing one does not fail the import. whole is asked
// before anything is staged, because an importer cannot take back a manifest that it has begun.
func (im *importer) subjects(ctx context.Context, p *publication) (missing []ocispec.Descriptor, err error) {
	have := map[digest.Digest]bool{}
	for _, m := range p.manifests {
		have[m.Digest] = true
	}
	for i := 0; i < len(p.manifests); i++ { // the loop appends to p.manifests
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

// referrers adds to p the entries that refer to any of its manifests, the added ones included. They
// are published in the same transaction as p, and not at all if p conflicts.
//
// The subject of an entry is only in its manifest, so every manifest of index.json is read once.
// Then the loop over p.manifests finds referrers of referrers without reading any of them again.
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
	for i := 0; i < len(p.manifests); i++ { // the loop appends to p.manifests
		for _, e := range bySubject[p.manifests[i].Digest] {
			if have[e.Digest] { // as a member of a manifest that was added before
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

// peek reads a manifest that may turn out not to be needed, and so does not stage it. A manifest
// that the source lacks is read from the stage, the registry, or the descriptor's data.
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
	if err == nil {
		return readManifest(src, desc)
	}
	if err = incomplete(err); errors.Is(err, ErrIncomplete) && desc.Data != nil { // checkDescriptor has verified it
		return verifiedManifest(desc.Data, desc)
	}
	return nil, err
}

// manifest stages a manifest and all that it needs, and appends the manifests to list, children
// first, which is the order in which publish writes rows. Configs and layers are only noted in
// later. It returns the manifest's own descriptor. depth is the number of image indexes above the
// manifest. seen has the manifests of list and those that are being read. So a manifest that is a
// member of several indexes is read once. A cycle cannot exist, since each index holds the digests
// of its members.
//
// The limits hold before anything is read: depth bounds the recursion, the size bounds one
// document, and MaxImportManifests bounds all of them.
func (im *importer) manifest(ctx context.Context, desc ocispec.Descriptor, depth int, seen map[digest.Digest]bool, list *[]pendingManifest) (root ocispec.Descriptor, err error) {
	if depth > MaxIndexNesting {
		return root, fmt.Errorf("%w: image indexes nested more than %d deep", ErrTooLarge, MaxIndexNesting)
	}
	if desc.Size > MaxManifestSize {
		return root, fmt.Errorf("%w: manifest %s has %d bytes, the limit is %d", ErrTooLarge, desc.Digest, desc.Size, MaxManifestSize)
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

// lacks reports whether a member of an image index is absent: neither the source nor the registry
// has it, and mayLack allows that. If one of them has it, lacks stages it. A member whose bytes the
// registry has only as a blob is not taken from there, because what it needs may be nowhere. A
// member that is too large is not absent: manifest refuses it.
func (im *importer) lacks(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if im.mayLack == nil || desc.Size > MaxManifestSize {
		return false, nil
	}
	if im.absent.manifests[desc.Digest] {
		return true, nil
	}
	// A mirror may fetch the member at any time. Asked after the look, mayLack could find it here.
	may, err := im.mayLack(desc.Digest)
	if err != nil {
		return false, err
	}
	if may {
		only, err := isOnlyBlob(im.registry.index, desc.Digest)
		if err != nil {
			return false, err
		}
		im.refetched[desc.Digest] = only || im.refetched[desc.Digest]
	}
	if err := im.blob(ctx, desc, roleManifest); !may || !errors.Is(err, ErrIncomplete) {
		return false, err
	}
	im.absent.add(desc, roleManifest)
	return true, nil
}

// A child is what a manifest needs directly, with the part of its descriptor that an import uses.
type child struct {
	desc ocispec.Descriptor
	role role
}

// read parses a staged manifest. It refuses a manifest of a type that the registry or the door does
// not accept, before any of its blobs is fetched. The document is not returned, unless it is small:
// up to [MaxIndexNesting] indexes are being read at once, and a hostile one takes many times the
// memory of its bytes.
func (im *importer) read(ctx context.Context, desc ocispec.Descriptor, depth int) (p pendingManifest, children []child, err error) {
	src, err := im.stage.open(ctx, desc.Digest, desc.Size)
	if errors.Is(err, errGone) {
		if err = im.bringAgain(ctx); err == nil {
			src, err = im.stage.open(ctx, desc.Digest, desc.Size)
		}
	}
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

// blob makes sure that the stage has a manifest now, or gets a config or layer later. A manifest is
// brought at once, because its children are needed next. A config or layer with data in its
// descriptor is brought at once if the data no longer fits into keepParsed.
//
// A blob that was asked for before is not brought a second time. One case needs care: a blob that
// was first noted as a layer and is now needed as a manifest is brought at once, and bringLater
// skips it.
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

// bring stages a blob from the first of these that has it:
//
//	registry   verified; costs no copy and no MaxBytes
//	source     fetch
//	data       the descriptor's own copy (image-spec descriptor.md, "data")
//
// A foreign layer that none of them has is absent. Any other blob is [ErrIncomplete] then. Several
// tasks call bring at once, for different digests.
func (im *importer) bring(ctx context.Context, desc ocispec.Descriptor, as role) error {
	item := im.meter.item(desc)
	ok, err := im.reuse(ctx, desc, as)
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
	if errors.Is(err, ErrIncomplete) && desc.Data != nil { // checkDescriptor has verified it
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

// reuse takes a blob of the registry into the stage, if it is whole and reusable and refetched
// allow it. They are not asked about a blob that the stage has: they have allowed it before, or it
// came from the source in this call.
func (im *importer) reuse(ctx context.Context, desc ocispec.Descriptor, as role) (bool, error) {
	if !im.stage.has(desc.Digest) {
		if as == roleManifest && im.refetched[desc.Digest] {
			return false, nil
		}
		if im.reusable != nil {
			if ok, err := im.reusable(ctx, desc); !ok || err != nil {
				return false, err
			}
		}
	}
	return im.stage.reuse(ctx, desc.Digest, desc.Size)
}

// charge counts n bytes that the registry does not have against maxBytes, before they are written.
// n is compared by itself too, because a hostile size could overflow the sum.
func (im *importer) charge(n int64) error {
	if sum := im.added.Add(n); im.maxBytes > 0 && (n > im.maxBytes || sum > im.maxBytes) {
		return fmt.Errorf("%w: more than %d bytes to add (MaxBytes)", ErrTooLarge, im.maxBytes)
	}
	return nil
}

// damagedSource is the error for a blob whose copy in the source does not hash to its name.
func damagedSource(d digest.Digest) error {
	return fmt.Errorf("blob %s: %w: the source has other bytes under this name", d, ErrDigestMismatch)
}

// claim notes that a blob is needed, and reports whether it was asked for before or is in the stage
// already. It enforces three rules where each digest is first met: all descriptors of one digest
// have the same size, an artifact has at most MaxClosure blobs, and a blob with other bytes in the
// source is an error, even if the registry has a good one.
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

// checkLayoutFile parses the file oci-layout and compares its version (image-spec image-layout.md,
// "oci-layout file").
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
