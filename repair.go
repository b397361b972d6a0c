package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// RepairOptions govern [LocalRegistry.Repair]. Nil is the zero value.
type RepairOptions struct {
	// Sources are archives and layout directories that may have good copies of blobs that are
	// damaged or missing here. They are searched in order and not changed. Only their blobs are
	// used, so an archive need not have a valid index.
	Sources []string
	// Remote is asked for blobs that no source has. If it is nil, no registry is asked.
	Remote *Remote
	// From are references whose repositories Remote asks, in order. Nil means the repositories of
	// the refs here that lead to a wanted blob.
	From []Reference
	// Progress, if not nil, is called with the state of the repair. Items are those of two
	// verifications, before and after, and the blobs that are healed.
	Progress func(Progress)
	// AllowOtherOwner is [Options.AllowOtherOwner] for the root that [Rebuild] opens. Repair
	// ignores it.
	AllowOtherOwner bool

	fault faultFunc // for the root that Rebuild opens
}

// A RepairReport is the result of a repair.
type RepairReport struct {
	Healed      []digest.Digest // damaged or missing blobs that were replaced by good copies
	Quarantined []digest.Digest // damaged blobs that could not be healed, and were moved away
	Recorded    []digest.Digest // manifests in blobs/ that were added to the index
	Rewritten   []digest.Digest // manifests whose rows were corrected
	Recovered   []Ref           // refs made for manifests that lost theirs with the index
	Left        []Problem       // problems that remain

	FailedSources []SourceFailure // sources that could not be read, or not to their end
}

// A SourceFailure is one of RepairOptions.Sources that could not be read, with the error.
type SourceFailure struct {
	Source string
	Err    error
}

// Repair corrects the problems that [LocalRegistry.Verify] finds, as far as blobs/, opts.Sources
// and opts.Remote allow. It heals damaged and missing blobs. It moves damaged blobs that it cannot
// heal to tmp/quarantine/, where a collection deletes them after its grace. It makes the index
// agree with the manifests. An unreadable file stays in its place. On a sound registry Repair
// changes nothing. Other processes may use the registry meanwhile.
//
// If the index was lost, Repair records every manifest in blobs/. A manifest that no other manifest
// refers to gets the ref <id>.ocilocal.local/recovered:<algorithm>-<digits>, since its names are
// lost. Repair then also looks for missing blobs that unrecorded manifests need. It asks registries
// for them only if opts.From is set. While one is missing, RepairReport.Left lists it, and no
// collection deletes anything. Repair can be called again with other sources. To give up such an
// artifact, delete the file of its manifest.
//
// The report is complete up to the error, if there is one.
//
// Errors:
//   - [ErrReadOnly], [ErrBusy], [ErrNoSpace]
//   - any other error from ctx, the index or the file system
//   - if a blob is still missing after everything was tried: the first error of a source, and the
//     first [*RemoteError] of a registry
func (r *LocalRegistry) Repair(ctx context.Context, opts *RepairOptions) (_ *RepairReport, err error) {
	defer addOp(&err, "repair", "", "")
	p := newRepair(r, opts)
	_, err = attend(ctx, p.opts.Progress, Reference{}, func(ctx context.Context, m *meter) (struct{}, error) {
		p.meter = m
		return struct{}{}, p.run(ctx)
	})
	return &p.report, err
}

// newRepair returns a repair with an empty report. Rebuild fills in more before it runs it.
func newRepair(r *LocalRegistry, opts *RepairOptions) *repair {
	p := &repair{registry: r, wanted: map[digest.Digest]bool{}}
	if opts != nil {
		p.opts = *opts
	}
	return p
}

// A repair has these steps, and each relies on those before it:
//
//	mark      stop collections, because the index may lack content (only if it was lost)
//	verify    find the problems
//	sort      decide how each is repaired; correct modes and sizes
//	clear     move away entries that are not files, so that a good file can take the name
//	heal      take wanted blobs from the sources, then from registries; repeat this if it brought a
//	          manifest that needs more blobs (only if the index was lost)
//	clear     move away the damaged files that were not healed
//	rewrite   make rows agree with manifests; every blob that could be had is there now
//	record    record manifests without rows
//	name      give refs to manifests: those of a damaged index, then names that Repair makes up
//	unmark    if nothing is missing
//	verify    find the problems that are left
//
// A repair that is interrupted anywhere has lost nothing, and can be started again: a blob is only
// replaced by a good one or moved, and rows are only written for manifests that were read.
//
// Files are healed before rows, because rows are written only for artifacts that are whole. The
// mark is removed last, because a collection would delete the blobs of manifests without rows.
type repair struct {
	registry *LocalRegistry
	opts     RepairOptions
	report   RepairReport
	wanted   map[digest.Digest]bool // damaged and missing blobs that were not healed yet
	damaged  []digest.Digest        // blobs whose file is damaged, or whose name something else has
	rows     []digest.Digest        // manifests whose rows are wrong
	salvage  string                 // the damaged index whose refs are kept; "" for none
	absent   map[digest.Digest]bool // members that the index in salvage records as absent
	lacks    map[digest.Digest]lack // missing blobs that unrecorded manifests need
	meter    *meter

	sourceErr error // the first error of a source
	remoteErr error // the first error of a registry
}

// run does all steps. Problems that can remain after a good repair are not in the report's Left:
// unrecorded blobs, rows of collected blobs and foreign entries, which a collection deletes or
// which are not this package's.
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
	if unreconciled { // an interrupted repair leaves the mark, and the next one goes on
		if err := p.registry.write(ctx, func(tx *indexTx) error { return tx.setMeta(metaUnreconciled, "1") }); err != nil {
			return err
		}
	}
	if err := p.keepAbsent(ctx); err != nil {
		return err
	}
	problems, err := p.verify(ctx, 2)
	if err != nil {
		return err
	}
	p.meter.phase(PhaseRepair)
	if err := p.sort(ctx, problems); err != nil {
		return err
	}
	if err := p.quarantine(ctx, false); err != nil {
		return err
	}
	for more := true; more; { // a healed manifest may lack something itself
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
		if err := p.keep(ctx); err != nil {
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
	p.meter.phase(PhaseCheck)
	left, err := p.verify(ctx, 1)
	if err != nil {
		return err
	}
	p.report.Left = slices.DeleteFunc(left, func(b Problem) bool {
		return b.Kind == ProblemUnrecorded || b.Kind == ProblemCollected || b.Kind == ProblemForeign
	})
	for _, d := range slices.Sorted(maps.Keys(p.lacks)) {
		err := fmt.Errorf("%w: manifest %s needs it and is not recorded without it", ErrNotFound, p.lacks[d].by)
		p.report.Left = append(p.report.Left, Problem{Kind: ProblemMissing, Digest: d, Err: err})
	}
	if len(p.wanted) == 0 {
		return nil
	}
	return errors.Join(p.sourceErr, p.remoteErr)
}

// verify finds the problems. times is the number of verifications that are still to come, this one
// included: the totals of the progress count them all.
func (p *repair) verify(ctx context.Context, times int) (problems []Problem, err error) {
	v := &verification{registry: p.registry, meter: p.meter, times: times}
	err = v.run(ctx, func(b Problem) error {
		problems = append(problems, b)
		return nil
	})
	return problems, err
}

// sort decides how each problem is repaired. It adds to wanted, damaged and rows, and corrects
// modes and sizes at once, because that needs no blob.
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
		case ProblemCollected: // healed if it is a subject of something that a ref leads to
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
		case ProblemUnrecorded: // rewriting the rows of manifests that name it, or its own, records it
			if _, manifest, err := p.registry.index.resolveDigest(b.Digest); err != nil {
				return err
			} else if manifest {
				p.rows = append(p.rows, b.Digest)
			}
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

// impossible reports whether a problem is of rows that this package cannot have written. Repair
// cannot correct them. Rebuild makes a new index then.
func impossible(b Problem) bool {
	return b.Kind == ProblemIndex || b.Kind == ProblemRef && b.Reference.IsZero()
}

// resize corrects the size in a blob's row if the file is good. The digest is the identity of the
// content, so a file that hashes to its name has the right size and the row is wrong.
func (p *repair) resize(ctx context.Context, d digest.Digest) error {
	size, err := p.registry.blobs.size(d)
	if err == nil {
		err = p.registry.blobs.verify(ctx, d, size)
	}
	if processCondition(err) {
		return err
	}
	if err != nil {
		return nil // it is damaged, and sort has another problem for that
	}
	return p.registry.write(ctx, func(tx *indexTx) error {
		return tx.putBlob(d, size, roleLayer, time.Now()) // the row is there, so only its size changes
	})
}
