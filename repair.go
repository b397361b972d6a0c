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
	// damaged or missing here. They are searched in order and not changed. Only their blobs
	// count: an archive without a valid index serves as well.
	Sources []string
	// Remote is asked for blobs that no source has. Nil asks no registry.
	Remote *Remote
	// From are references whose repositories Remote asks, in order. Nil means the repositories of
	// the refs here that lead to a wanted blob.
	From []Reference
	// Progress, if not nil, is called with how far the repair is. Items are those of two
	// verifications, before and after, and the blobs that are healed.
	Progress func(Progress)
	// AllowOtherOwner is [Options.AllowOtherOwner] for the root that [Rebuild] opens. Repair has no
	// use for it.
	AllowOtherOwner bool

	fault faultFunc // for the root that Rebuild opens
}

// A RepairReport says what a repair did.
type RepairReport struct {
	Healed      []digest.Digest // damaged or missing blobs that a source or registry had
	Quarantined []digest.Digest // damaged blobs that nothing could heal, and that were moved away
	Recorded    []digest.Digest // manifests in blobs/ that the index has now
	Rewritten   []digest.Digest // manifests whose rows were corrected
	Recovered   []Ref           // refs made for manifests that lost theirs with the index
	Left        []Problem       // problems that remain

	FailedSources []SourceFailure // sources that could not be read, or not to their end
}

// A SourceFailure is one of RepairOptions.Sources and why it could not be read.
type SourceFailure struct {
	Source string
	Err    error
}

// Repair corrects what [LocalRegistry.Verify] finds, as far as blobs/, opts.Sources and opts.Remote
// allow. It heals damaged and missing blobs. It moves damaged blobs that it cannot heal to
// tmp/quarantine/, where a collection deletes them after its grace. It makes the index agree with
// the manifests. An unreadable file stays where it is. On a sound registry it changes nothing.
// Other processes may use the registry meanwhile.
//
// If the index was lost, Repair records every manifest in blobs/. A manifest that no other refers
// to gets the ref <id>.ocilocal.local/recovered:<algorithm>-<digits>, since its names are lost.
// Repair then also looks for blobs that unrecorded manifests lack, in registries only if opts.From
// is set. As long as one is missing, which Left says, no collection deletes anything. Repair can be
// called again with other sources. To give such an artifact up, delete its manifest's file.
//
// The report says what was done, after an error too. Errors:
//   - [ErrReadOnly], [ErrBusy], [ErrNoSpace]
//   - any other error from ctx, the index or the file system
//   - last, after all else was done, and only if a blob is still wanted: the first error of a
//     source, and a [*RemoteError] of a registry
func (r *LocalRegistry) Repair(ctx context.Context, opts *RepairOptions) (*RepairReport, error) {
	p := newRepair(r, opts)
	_, err := attend(ctx, p.opts.Progress, Reference{}, func(ctx context.Context, m *meter) (struct{}, error) {
		p.meter = m
		return struct{}{}, p.run(ctx)
	})
	return &p.report, opError("repair", "", "", err)
}

func newRepair(r *LocalRegistry, opts *RepairOptions) *repair {
	p := &repair{registry: r, wanted: map[digest.Digest]bool{}}
	if opts != nil {
		p.opts = *opts
	}
	return p
}

// A repair goes in this order, and each step relies on those before it:
//
//	mark      keep collections from deleting while the index may not know all (only if it was lost)
//	verify    find the problems
//	sort      decide what each calls for; correct modes and sizes
//	clear     move away what is not a file, so that a good file can take its name
//	heal      take wanted blobs from the sources, then from registries; again if that brought a
//	          manifest that lacks something
//	clear     move away the damaged files that were not healed
//	rewrite   make rows agree with manifests, now that all that can be there is there
//	record    record manifests without rows
//	name      give refs to manifests: those of a damaged index, then names that Repair makes up
//	unmark    if nothing is missing
//	verify    find what is left
//
// A repair that is interrupted anywhere has lost nothing, and can be started again: blobs are only
// replaced by good ones or moved, and rows only follow manifests that were read.
type repair struct {
	registry *LocalRegistry
	opts     RepairOptions
	report   RepairReport
	wanted   map[digest.Digest]bool // damaged and missing blobs
	damaged  []digest.Digest        // those of wanted under whose names something is
	rows     []digest.Digest        // manifests whose rows are wrong
	salvage  string                 // the damaged index whose refs are kept; "" for none
	absent   map[digest.Digest]bool // what that index records as absent
	lacks    map[digest.Digest]lack // missing blobs that unrecorded manifests need
	meter    *meter

	sourceErr error // the first of a source
	remoteErr error // the first of a registry
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
	if unreconciled { // the mark stays until the end, should the repair be interrupted
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
		err := fmt.Errorf("%w: manifest %s needs it and so isn't recorded", ErrNotFound, p.lacks[d].by)
		p.report.Left = append(p.report.Left, Problem{Kind: ProblemMissing, Digest: d, Err: err})
	}
	if len(p.wanted) == 0 {
		return nil
	}
	return errors.Join(p.sourceErr, p.remoteErr)
}

// verify finds the problems. times is how often that will be done, this time included.
func (p *repair) verify(ctx context.Context, times int) (problems []Problem, err error) {
	v := &verification{registry: p.registry, meter: p.meter, times: times}
	err = v.run(ctx, func(b Problem) error {
		problems = append(problems, b)
		return nil
	})
	return problems, err
}

// sort decides what to do about each problem, and does what needs no blob.
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
		case ProblemCollected: // a subject is worth healing, and without it nothing is lost
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
		case ProblemUnrecorded: // if manifests need it or it is one, its row was lost or says that it is not here
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

// impossible reports whether a problem is of rows that this package can't have written.
func impossible(b Problem) bool {
	return b.Kind == ProblemIndex || b.Kind == ProblemRef && b.Reference.IsZero()
}

// resize corrects the size in a blob's row, if the file is good.
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
		return tx.putBlob(d, size, roleManifest, time.Now()) // the row is there, so only its size changes
	})
}
