package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// RepairOptions govern [LocalRegistry.Repair]. Nil is the zero value.
type RepairOptions struct {
	// Sources are archives and layout directories that may have blobs that
	// are damaged or missing here. They are searched in order and not changed.
	Sources []string
	// Remote, if not nil, is asked for what no source has. Nil asks nobody.
	Remote *Remote
	// From are references whose repositories Remote asks, in order. Nil means those of the refs
	// here that lead to what is wanted.
	From []Reference

	fault faultFunc // for the root that Rebuild opens
}

// A RepairReport tells what a repair did, by digest where that says it.
type RepairReport struct {
	Healed      []digest.Digest // damaged or missing, and taken from a source or registry
	Quarantined []digest.Digest // damaged, nowhere to be had, and moved away
	Recorded    []digest.Digest // manifests on disk that the index now has
	Rewritten   []digest.Digest // manifests of which the index said something else
	Recovered   []Ref           // refs made for manifests that lost theirs with the index
	Left        []Problem       // what could not be repaired
}

// Repair puts right what [LocalRegistry.Verify] finds, as far as that can be done
// from blobs/, opts.Sources and opts.Remote: it heals damaged and missing blobs, moves damaged ones that
// it can't heal to tmp/quarantine/, where a collection deletes them after
// its grace, and makes the index agree with the manifests. What can't be read stays where it is.
//
// Where the index was lost,
// it records every manifest on disk, and gives those that no other refers to a ref
// <id>.ocilocal.local/recovered:<algorithm>-<digits>, since their names are lost with the index.
// What a manifest lacks it looks for as well, in registries only if opts.From is set. As long as one lacks
// something, which Left then says, no collection deletes anything: Repair can be called again with
// other sources. To give such an artifact up, delete its manifest's file.
//
// Repairing what is sound changes nothing. Others may use the registry meanwhile.
// Errors: [ErrReadOnly], [ErrBusy], those of a source that can't be read, ctx's, those of the
// index and the file system's; the report says what was done by then. A [*RemoteError] comes
// last, after all else was done, if something that a registry could not be asked for is still wanted.
func (r *LocalRegistry) Repair(ctx context.Context, opts *RepairOptions) (*RepairReport, error) {
	p := newRepair(r, opts)
	return &p.report, opError("repair", "", "", p.run(ctx))
}

func newRepair(r *LocalRegistry, opts *RepairOptions) *repair {
	p := &repair{registry: r, wanted: map[digest.Digest]bool{}}
	if opts != nil {
		p.opts = *opts
	}
	return p
}

type repair struct {
	registry *LocalRegistry
	opts     RepairOptions
	report   RepairReport
	wanted   map[digest.Digest]bool // what is damaged or missing
	damaged  []digest.Digest        // of these, those that are there
	rows     []digest.Digest        // manifests whose rows are wrong
	salvage  string                 // the damaged index whose refs are kept; "" for none
	lacks    map[digest.Digest]lack // what unrecorded manifests need that isn't there

	remoteErr error // the first that kept a registry from helping
}

func (p *repair) run(ctx context.Context) error {
	end, err := p.registry.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer end()
	unreconciled, err := p.registry.unreconciled(ctx)
	if err != nil {
		return err
	}
	if unreconciled { // until the end, should this be interrupted
		if err := p.registry.write(ctx, func(tx *indexTx) error { return tx.setMeta(metaUnreconciled, "1") }); err != nil {
			return err
		}
	}
	problems, err := p.verify(ctx)
	if err != nil {
		return err
	}
	if err := p.sort(ctx, problems); err != nil {
		return err
	}
	if err := p.quarantine(ctx, false); err != nil {
		return err
	}
	for more := true; more; { // what was healed may be a manifest that lacks something itself
		if unreconciled {
			if err := p.findLacks(ctx); err != nil {
				return err
			}
		}
		known := len(p.report.Healed)
		if err := p.heal(ctx); err != nil {
			return err
		}
		if err := p.healRemote(ctx); err != nil {
			return err
		}
		more = unreconciled && len(p.report.Healed) > known
	}
	if err := p.quarantine(ctx, true); err != nil {
		return err
	}
	for _, d := range p.rows {
		if err := p.rewrite(ctx, d); err != nil {
			return err
		}
	}
	if err := p.record(ctx); err != nil {
		return err
	}
	if p.salvage != "" {
		err := salvageRefs(ctx, p.salvage, func(ref Reference, d digest.Digest) error { return p.name(ctx, d, ref) })
		if err != nil {
			return fmt.Errorf("refs of the index that was set aside (%s): %w", p.salvage, err)
		}
	}
	if unreconciled {
		if err := p.findLacks(ctx); err != nil {
			return err
		}
		if err := p.reconcile(ctx); err != nil {
			return err
		}
	}
	left, err := p.verify(ctx)
	if err != nil {
		return err
	}
	p.report.Left = slices.DeleteFunc(left, func(b Problem) bool {
		return b.Kind == ProblemUnrecorded || b.Kind == ProblemCollected || b.Kind == ProblemForeign
	})
	for _, d := range slices.Sorted(maps.Keys(p.lacks)) {
		err := fmt.Errorf("%w: manifest %s needs it and so isn't recorded", ErrNotFound, p.lacks[d].by)
		p.report.Left = append(p.report.Left, Problem{Kind: ProblemMissing, Digest: d, Err: err})
	}
	if len(p.wanted) == 0 {
		return nil
	}
	return p.remoteErr
}

func (p *repair) verify(ctx context.Context) (problems []Problem, err error) {
	v := &verification{registry: p.registry}
	err = v.run(ctx, func(b Problem) error {
		problems = append(problems, b)
		return nil
	})
	return problems, err
}

// sort decides what each problem calls for.
func (p *repair) sort(ctx context.Context, problems []Problem) error {
	for _, b := range problems {
		switch b.Kind {
		case ProblemMissing:
			p.wanted[b.Digest] = true
			there, err := p.registry.blobs.present(b.Digest)
			if err != nil {
				return err
			}
			if there {
				p.damaged = append(p.damaged, b.Digest) // something else is in its place
			}
		case ProblemCollected: // a subject that can be healed may be welcome, and without it nothing is lost
			up := climb{ctx: ctx, q: p.registry.index, ways: ways{subjects: true}}
			led, err := up.led(b.Digest)
			if err != nil {
				return err
			}
			if led {
				p.wanted[b.Digest] = true
			}
		case ProblemDigest, ProblemUnreadable:
			err := p.registry.blobs.verify(ctx, b.Digest, -1)
			if processCondition(err) {
				return err
			}
			if err == nil {
				continue // readable since its permissions were repaired, or healed by another process
			}
			p.wanted[b.Digest] = true
			p.damaged = append(p.damaged, b.Digest)
		case ProblemSize:
			if err := p.resize(ctx, b.Digest); err != nil {
				return err
			}
		case ProblemMode:
			err := p.registry.root.Chmod(blobPath(b.Digest), 0o444)
			if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) { // another user's, or collected
				return err
			}
		case ProblemRows, ProblemRef:
			if !impossible(b) {
				p.rows = append(p.rows, b.Digest)
			}
		case ProblemUnrecorded: // if manifests need it, its row was lost
			if err := pointers(ctx, p.registry.index, b.Digest, true, func(d digest.Digest) error {
				p.rows = append(p.rows, d)
				return nil
			}); err != nil {
				return err
			}
		}
	}
	slices.Sort(p.rows)
	p.rows = slices.Compact(p.rows)
	return nil
}

// impossible reports whether a problem is one of rows that no program of ours has written.
func impossible(b Problem) bool {
	return b.Kind == ProblemIndex || b.Kind == ProblemRef && b.Reference.IsZero()
}

// resize makes a blob's row say the size of its file, if that is good.
func (p *repair) resize(ctx context.Context, d digest.Digest) error {
	size, err := p.registry.blobs.size(d)
	if err == nil {
		err = p.registry.blobs.verify(ctx, d, size)
	}
	if processCondition(err) {
		return err
	}
	if err != nil {
		return nil // damaged: it has a problem of its own
	}
	return p.registry.write(ctx, func(tx *indexTx) error {
		return tx.putBlob(d, size, roleManifest, time.Now()) // the row is there, so only its size changes
	})
}

// heal takes what is wanted from the sources.
func (p *repair) heal(ctx context.Context) (err error) {
	for _, source := range p.opts.Sources {
		if len(p.wanted) == 0 {
			return nil
		}
		if err := p.healFrom(ctx, source); err != nil {
			return fmt.Errorf("source %s: %w", source, err)
		}
	}
	return nil
}

func (p *repair) healFrom(ctx context.Context, source string) (err error) {
	fi, err := os.Stat(source)
	if err != nil {
		return err
	}
	st := p.registry.blobs.newStage()
	defer func() { p.registry.logDiscard(st.discard()) }()
	var found []digest.Digest
	put := func(ctx context.Context, d digest.Digest, src io.Reader, size int64) error {
		if !p.wanted[d] {
			return nil
		}
		if ok, err := p.rightSize(d, size); !ok || err != nil {
			return err // this copy is damaged as well, and may be too large for the disk
		}
		_, _, err := st.put(ctx, src, "", d, size)
		if err == nil {
			found = append(found, d)
		}
		if errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch) {
			return nil // this copy is damaged as well
		}
		return err
	}
	if fi.IsDir() {
		err = p.fromLayout(ctx, source, put)
	} else {
		err = p.fromArchive(ctx, source, put)
	}
	if err == nil {
		err = st.settle(ctx)
	}
	if err != nil {
		return err
	}
	for _, d := range found {
		if p.wanted[d] {
			delete(p.wanted, d)
			p.report.Healed = append(p.report.Healed, d)
		}
	}
	return nil
}

// rightSize reports whether a source's copy of d may be it, by its size. Of what nothing names the size is not
// known: then the copy may be as large as a manifest, or as what is here under that name.
func (p *repair) rightSize(d digest.Digest, size int64) (bool, error) {
	desc, _, err := p.describe(d)
	if err != nil {
		return false, err
	}
	if desc.Digest != "" {
		return size == desc.Size, nil
	}
	here, err := p.registry.blobs.size(d)
	if processCondition(err) {
		return false, err
	}
	return size <= max(here, MaxManifestSize), nil
}

func (p *repair) fromLayout(ctx context.Context, dir string, put func(context.Context, digest.Digest, io.Reader, int64) error) error {
	root, err := openRoot(dir, p.registry.root.fault)
	if err != nil {
		return err
	}
	defer root.Close()
	l := &layout{root: root}
	for d := range p.wanted {
		f, err := l.open(ocispec.Descriptor{Digest: d})
		if errors.Is(err, ErrIncomplete) {
			continue
		}
		if err != nil {
			return err
		}
		fi, err := f.Stat()
		if err == nil {
			err = put(ctx, d, f, fi.Size())
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (p *repair) fromArchive(ctx context.Context, name string, put func(context.Context, digest.Digest, io.Reader, int64) error) error {
	f, err := p.registry.openOther(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = readArchive(ctx, f, put)
	return err
}

// quarantine moves away what is no file, which can't be healed in its place,
// or the files that were not healed.
func (p *repair) quarantine(ctx context.Context, files bool) error {
	for _, d := range p.damaged {
		if files && !p.wanted[d] {
			continue
		}
		bad, err := p.inspect(ctx, d, files)
		if err == nil && bad != nil {
			err = p.moveAway(ctx, d, bad)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// inspect looks again at what was found to be damaged. It returns nil if that is good
// now or gone, and also if it can't be read: it may be good.
func (p *repair) inspect(ctx context.Context, d digest.Digest, files bool) (fs.FileInfo, error) {
	fi, err := p.registry.root.Lstat(blobPath(d))
	switch {
	case err != nil:
		return nil, ignoreNotExist(err)
	case fi.Mode().IsRegular() != files:
		return nil, nil
	case !files:
		return fi, nil
	}
	f, size, err := p.registry.blobs.openFile(d, -1)
	if processCondition(err) {
		return nil, err
	}
	if err != nil {
		return nil, nil
	}
	src := p.registry.blobs.verifier(ctx, f, d, size)
	defer src.Close()
	if fi, err = f.Stat(); err != nil {
		return nil, err
	}
	_, err = src.WriteTo(io.Discard)
	switch {
	case errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch):
		return fi, nil
	case processCondition(err):
		return nil, err
	case err == nil:
		delete(p.wanted, d)
	}
	return nil, nil
}

// moveAway moves a damaged file to quarantine, unless another process heals it meanwhile.
// Publishers look for their blobs with the index locked, and so not while one
// could be on its way there and back.
func (p *repair) moveAway(ctx context.Context, d digest.Digest, bad fs.FileInfo) error {
	root := p.registry.root
	dir := path.Join(tmpDir, quarantineDir)
	if err := root.makeDir(dir, 0o700); err != nil {
		return err
	}
	to := path.Join(dir, digestName(d))
	moved := false
	err := p.registry.writeAlone(ctx, func(*indexTx) error {
		moved = false
		fi, err := root.Lstat(blobPath(d))
		if err != nil || !os.SameFile(fi, bad) {
			return ignoreNotExist(err)
		}
		if err := root.Rename(blobPath(d), to); err != nil {
			return ignoreNotExist(err)
		}
		if fi, err = root.Lstat(to); err != nil {
			return err
		}
		if !os.SameFile(fi, bad) {
			return root.Rename(to, blobPath(d)) // healed between the two
		}
		moved = true
		return nil
	})
	if err != nil || !moved {
		return err
	}
	root.Chtimes(to, time.Now()) // its grace begins; on another user's file, it began when that was written
	p.report.Quarantined = append(p.report.Quarantined, d)
	return nil
}

// rewrite makes the rows of a recorded manifest agree with its bytes.
func (p *repair) rewrite(ctx context.Context, d digest.Digest) error {
	m, list, st, err := p.load(ctx, d)
	if st != nil {
		defer func() { p.registry.logDiscard(st.discard()) }()
	}
	if err != nil {
		return p.tolerate(ctx, err)
	}
	err = p.registry.write(ctx, func(tx *indexTx) error {
		if err := tx.deleteMembers(d); err != nil { // they may be there without their manifest's row
			return err
		}
		checked := map[digest.Digest]bool{}
		for _, pending := range list {
			if _, err := record(ctx, tx, st, pending, checked, time.Now()); err != nil {
				return err
			}
		}
		return tx.replaceManifest(m)
	})
	if err == nil {
		p.report.Rewritten = append(p.report.Rewritten, d)
	}
	return p.tolerate(ctx, err)
}

// load stages a manifest that is on disk, with all below it.
func (p *repair) load(ctx context.Context, d digest.Digest) (*Manifest, []pendingManifest, *stage, error) {
	m, err := p.registry.readVerified(ctx, ocispec.Descriptor{Digest: d, Size: -1})
	if err != nil {
		return nil, nil, nil, err
	}
	im := p.registry.newImporter(nil)
	im.fetch = func(_ context.Context, desc ocispec.Descriptor, _ role) error {
		return fmt.Errorf("%w: blob %s", ErrIncomplete, desc.Digest)
	}
	var list []pendingManifest
	_, err = im.manifest(ctx, m.Descriptor(), 0, map[digest.Digest]bool{}, &list)
	if err == nil {
		err = im.stage.settle(ctx)
	}
	return m, list, im.stage, err
}

// tolerate passes over what is wrong with one artifact: what is left of it the last verification finds.
func (p *repair) tolerate(ctx context.Context, err error) error {
	for _, e := range []error{ErrIncomplete, ErrNotFound, ErrInvalidDigest, ErrInvalidManifest, ErrUnsupportedMediaType, ErrTooLarge, ErrDigestMismatch, ErrSizeMismatch, ErrArtifactType} {
		if errors.Is(err, e) && !processCondition(err) && ctx.Err() == nil {
			return nil
		}
	}
	return err
}

// record gives rows to the manifests on disk that have none, if all they need is there.
func (p *repair) record(ctx context.Context) error {
	unknown, err := p.unrecorded(ctx)
	if err != nil {
		return err
	}
	for _, d := range unknown {
		if err := p.recordOne(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// unrecorded returns what may be manifests on disk without rows.
func (p *repair) unrecorded(ctx context.Context) (unknown []digest.Digest, err error) {
	err = p.registry.blobs.walk(ctx, func(e blobEntry) error {
		if e.digest == "" || e.info.Size() > MaxManifestSize {
			return nil
		}
		if _, ok, err := p.registry.index.resolveDigest(e.digest); ok || err != nil {
			return err
		}
		ok, err := p.registry.looksLikeManifest(e.digest)
		if ok {
			unknown = append(unknown, e.digest)
		}
		return err
	})
	slices.Sort(unknown)
	return unknown, err
}

// A lack is a blob that isn't there and that a manifest needs.
type lack struct {
	by   digest.Digest
	desc ocispec.Descriptor
	role role
}

// findLacks finds what the manifests on disk that aren't recorded need and isn't there, and wants it.
func (p *repair) findLacks(ctx context.Context) error {
	p.lacks = map[digest.Digest]lack{}
	unknown, err := p.unrecorded(ctx)
	if err != nil {
		return err
	}
	for _, d := range unknown {
		m, err := p.registry.readVerified(ctx, ocispec.Descriptor{Digest: d, Size: -1})
		if err != nil {
			if err := p.tolerate(ctx, err); err != nil {
				return err
			}
			continue
		}
		for i, c := range m.children() {
			_, err := p.registry.blobs.size(c.Digest)
			if errors.Is(err, ErrNotFound) {
				p.lacks[c.Digest] = lack{d, c, m.childRole(i)}
				p.wanted[c.Digest] = true
			} else if err := p.tolerate(ctx, err); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *repair) recordOne(ctx context.Context, d digest.Digest) error {
	if _, ok, err := p.registry.index.resolveDigest(d); ok || err != nil {
		return err // came with the index that needs it
	}
	m, list, st, err := p.load(ctx, d)
	if st != nil {
		defer func() { p.registry.logDiscard(st.discard()) }()
	}
	if err == nil {
		_, err = p.registry.publish(ctx, st, []publication{{root: m.Descriptor(), manifests: list}})
	}
	if err == nil {
		p.report.Recorded = append(p.report.Recorded, d)
	}
	return p.tolerate(ctx, err)
}

// reconcile names the manifests that have lost their refs, and trusts the index again
// if no manifest on disk lacks anything.
func (p *repair) reconcile(ctx context.Context) error {
	var tops []digest.Digest
	x := p.registry.index
	var all []digest.Digest
	if err := x.manifestRows(ctx, func(d, _ digest.Digest) { all = append(all, d) }); err != nil {
		return err
	}
	for _, d := range all {
		top := true
		if err := pointers(ctx, x, d, true, func(digest.Digest) error {
			top = false
			return errStop
		}); err != nil {
			return err
		}
		if top {
			top, err := hasRef(x, d)
			if err != nil {
				return err
			}
			if !top {
				tops = append(tops, d)
			}
		}
	}
	for _, d := range tops {
		ref, err := p.registry.recoveredName(d)
		if err != nil {
			return err
		}
		if err := p.name(ctx, d, ref); err != nil {
			return err
		}
	}
	if len(p.lacks) > 0 {
		return nil
	}
	return p.registry.write(ctx, func(tx *indexTx) error { return tx.deleteMeta(metaUnreconciled) })
}

// name gives a manifest a ref, unless it is not whole, or the ref has moved on.
func (p *repair) name(ctx context.Context, d digest.Digest, ref Reference) error {
	u, err := p.registry.point(ctx, d, ref, nil)
	if errors.Is(err, ErrConflict) || errors.Is(err, ErrDigestMismatch) {
		return nil
	}
	if err == nil {
		p.report.Recovered = append(p.report.Recovered, Ref{Reference: ref, Descriptor: u.Descriptor, Updated: time.Now()})
	}
	return p.tolerate(ctx, err)
}

// recoveredName is what a manifest is called whose names were lost.
func (r *LocalRegistry) recoveredName(d digest.Digest) (Reference, error) {
	encoded := d.Encoded()
	if len(encoded) > 64 {
		encoded = encoded[:64] // a tag has 128 characters at most
	}
	return ParseReference(fmt.Sprintf("%s/recovered:%s-%s", r.localHost(), d.Algorithm(), encoded))
}
