package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The mark decides what a collection keeps. It reads the whole index and the names in blobs/, in
// pages, without a lock and while others write. Then it spreads holds from the roots. Last, it
// reads every kept manifest and compares it with its rows, because deletion relies on rows:
//
//	graph  rows of the index        → nodes
//	walk   names in blobs/          → nodes
//	follow roots → needs, subjects, referrers: each node gets a hold, or is dead
//	check  bytes of kept manifests  → Missing, Invalid, unreliable
//
// The mark may be out of date when it is done. Content that it keeps may be unneeded by then; the
// next collection deletes it. Content that it calls dead may be in use again. So nothing is deleted
// because of the mark alone: each step checks again with the lock held (see gcstep.go). Refs are
// read first: a manifest that a ref pointed at then had all its rows by then.

// A gcNode is one digest that the index or blobs/ has. A registry of a million blobs has a million
// nodes, so edges are numbers of nodes and not pointers or digests.
type gcNode struct {
	digest    digest.Digest
	size      int64     // of the file; of the row until a file is seen
	age       time.Time // the younger of row and file
	manifest  bool      // the index has it as a manifest
	named     bool      // a ref, or its row in content, says that it is a manifest
	row       bool      // the index has it
	file      bool      // blobs/ has it
	absent    bool      // blobs/ does not have it, and no row says that it is a blob here
	bad       bool      // the file's size is not the row's
	ref       bool      // a ref points at it
	held      bool      // a repository holds it
	expired   bool      // a repository holds it, for too long
	protected bool      // GCOptions.Protect lists it
	hold      hold
	needs     []int32 // of a manifest, by its rows
	subject   int32   // of a manifest; −1 for none
}

// A hold is the reason for which a node is kept. Only holdNeeded promises that the node has a file:
// a publish has checked that. The other holds keep a file if there is one: see climb.
type hold uint8

const (
	holdNone     hold = iota // dead
	holdYoung                // it is younger than the grace, or something that leads to it is
	holdReferrer             // it refers to a kept manifest, or something that leads to it
	holdSubject              // it is protected or the subject of a kept manifest, or needed by such a node
	holdNeeded               // a ref points at it or a repository holds it, or something that needs it
)

// live reports whether a collection keeps n whatever its age.
func (n *gcNode) live() bool { return n.hold >= holdReferrer }

// count returns the arguments of [Count.add] for n. A node without a file takes no space.
func (n *gcNode) count() (manifest bool, size int64) {
	if n.file {
		size = n.size
	}
	return n.manifest, size
}

// descriptor returns the digest of n and the size of its file.
func (n *gcNode) descriptor() ocispec.Descriptor {
	_, size := n.count()
	return ocispec.Descriptor{Digest: n.digest, Size: size}
}

// A gcGraph is a mark: the nodes, by number, and the report.
type gcGraph struct {
	registry   *LocalRegistry
	opts       GCOptions
	meter      *meter
	began      time.Time
	heldSince  time.Time // holds that began later count
	nodes      []gcNode
	ids        map[digest.Digest]int32
	report     GCReport
	unreliable []InvalidManifest // manifests that stop the collection, at most maxGCList
}

// id returns the number of d's node, which it adds if there is none. Pointers into g.nodes are not
// valid after it.
func (g *gcGraph) id(d digest.Digest) int32 {
	i, ok := g.ids[d]
	if !ok {
		i = int32(len(g.nodes))
		g.nodes = append(g.nodes, gcNode{digest: d, subject: -1})
		g.ids[d] = i
	}
	return i
}

// mark decides what is kept. It fills all fields of the report except Deleted, Revived and
// Unreconciled.
func (r *LocalRegistry) mark(ctx context.Context, opts GCOptions) (*gcGraph, error) {
	g, err := r.graph(ctx, opts)
	if err != nil {
		return nil, err
	}
	if err := g.walk(ctx); err != nil {
		return nil, err
	}
	g.follow()
	if err := g.check(ctx); err != nil {
		return nil, err
	}
	g.count()
	return g, nil
}

// graph reads the index into a gcGraph. Its queries run one after the other, and other processes
// write between them. The order makes that safe:
//
//	refs, holds → manifests → members → blobs
//
// Refs come first. A manifest that a ref was seen to point at is then in the rows that are read
// next, unless it was collected since. Blobs come last. A blob whose members were not seen belongs
// to a publish after the mark began; the step finds its ref.
func (r *LocalRegistry) graph(ctx context.Context, opts GCOptions) (*gcGraph, error) {
	g := &gcGraph{registry: r, opts: opts, began: time.Now(), ids: map[digest.Digest]int32{}}
	g.heldSince = opts.heldBefore(g.began)
	x := r.index
	for _, d := range opts.Protect {
		if err := checkDigest(d); err != nil {
			return nil, err
		}
		g.nodes[g.id(d)].protected = true
	}
	if err := x.refTargets(ctx, func(d digest.Digest) {
		n := &g.nodes[g.id(d)]
		n.ref, n.named = true, true
	}); err != nil {
		return nil, err
	}
	if err := holds(ctx, x, func(h holdRow) error {
		n := &g.nodes[g.id(h.digest)]
		n.named = true
		if h.since.After(g.heldSince) {
			n.held = true
		} else {
			n.expired = true
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if err := x.manifestRows(ctx, func(d, subject digest.Digest) {
		i, s := g.id(d), int32(-1)
		if subject != "" {
			s = g.id(subject)
		}
		g.nodes[i].manifest, g.nodes[i].subject = true, s
	}); err != nil {
		return nil, err
	}
	if err := x.memberRows(ctx, func(manifest, d digest.Digest) {
		parent, child := g.id(manifest), g.id(d)
		g.nodes[parent].needs = append(g.nodes[parent].needs, child)
	}); err != nil {
		return nil, err
	}
	if err := x.blobRows(ctx, func(row blobRow) error {
		n := &g.nodes[g.id(row.digest)]
		n.row, n.size, n.age = true, row.size, row.created
		n.named = n.named || row.kind == roleManifest
		return nil
	}); err != nil {
		return nil, err
	}
	return g, nil
}

// walk adds the files in blobs/. It comes after the rows: a file whose row came later is young, and
// its step finds the row. A manifest whose file is not seen may have been collected, or it may be a
// subject that was never in the registry. It is marked as absent, so that follow does not keep
// other content because of it.
func (g *gcGraph) walk(ctx context.Context) error {
	err := g.registry.blobs.walk(ctx, func(e blobEntry) error {
		if e.digest == "" {
			if len(g.report.Foreign) < maxGCList {
				g.report.Foreign = append(g.report.Foreign, e.path)
			}
			return nil
		}
		n := &g.nodes[g.id(e.digest)]
		n.bad = n.row && n.size != e.info.Size()
		n.file, n.size = true, e.info.Size()
		if t := e.info.ModTime(); t.After(n.age) {
			n.age = t
		}
		return nil
	})
	for i := range g.nodes {
		n := &g.nodes[i]
		n.absent = !n.file && (n.manifest || !n.row)
	}
	return err
}

// follow gives each node its hold, the strongest first, by one walk for each hold:
//
//	hold          begins at                                       goes to
//	holdNeeded    refs, holds of repositories                     needs
//	holdSubject   nodes with a stronger hold, protected digests   needs, subjects
//	holdReferrer  nodes with a stronger hold                      needs, subjects, referrers
//	holdYoung     nodes younger than the grace                    needs, subjects, referrers
//
// A node keeps the first hold that it gets, so each walk visits a node once, and the whole is
// linear. A subject, referrer or protected manifest without a file gets no hold in these ways:
// nothing promises that it is in the registry. With GCOptions.DropReferrers, no walk goes to
// referrers.
func (g *gcGraph) follow() {
	referrers := map[int32][]int32{}
	if !g.opts.DropReferrers {
		for i := range g.nodes {
			if s := g.nodes[i].subject; s >= 0 {
				referrers[s] = append(referrers[s], int32(i))
			}
		}
	}
	for _, h := range []hold{holdNeeded, holdSubject, holdReferrer, holdYoung} {
		var todo []int32
		visit := func(i int32) {
			if n := &g.nodes[i]; n.hold == holdNone {
				n.hold = h
				todo = append(todo, i)
			}
		}
		for i := range g.nodes {
			n := &g.nodes[i]
			switch {
			case n.hold > h && h >= holdReferrer:
				todo = append(todo, int32(i)) // its subject and referrers were not visited yet
			case h == holdNeeded && (n.ref || n.held),
				h == holdSubject && n.protected && !n.absent,
				h == holdYoung && g.opts.young(n.age, g.began):
				visit(int32(i))
			}
		}
		for len(todo) > 0 {
			i := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			for _, c := range g.nodes[i].needs {
				visit(c)
			}
			if s := g.nodes[i].subject; h <= holdSubject && s >= 0 && !g.nodes[s].absent {
				visit(s)
			}
			for _, c := range referrers[i] {
				if h <= holdReferrer && !g.nodes[c].absent {
					visit(c)
				}
			}
		}
	}
}

// check reads every live manifest and compares it with its rows. It notes missing and invalid
// manifests, and which of these stop the collection. Several goroutines read, since this is most of
// the work of a mark. A node that only its age keeps is not read.
func (g *gcGraph) check(ctx context.Context) error {
	var mu sync.Mutex // guards failed and the lists of g
	var failed error
	live := func(yield func(int, *gcNode) bool) {
		for i := range g.nodes {
			if n := &g.nodes[i]; n.live() && (ctx.Err() != nil || !yield(i, n)) {
				return
			}
		}
	}
	parallel(runtime.GOMAXPROCS(0), live, func(_ int, n *gcNode) {
		missing, invalid, err := g.checkNode(ctx, n)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			failed = err
			return
		}
		g.note(n, missing, invalid)
	})
	byDigest := func(a, b InvalidManifest) int { return strings.Compare(string(a.Digest), string(b.Digest)) }
	slices.Sort(g.report.Missing)
	slices.SortFunc(g.report.Invalid, byDigest)
	slices.SortFunc(g.unreliable, byDigest)
	return cmp.Or(ctx.Err(), failed)
}

// note adds a finding of checkNode to the report. The lists of the report are bounded and hold
// harmless findings too, so they do not decide whether deletion is safe: g.unreliable does. A
// finding about a manifest that is kept only as a referrer does not stop the collection, because no
// ref needs it.
func (g *gcGraph) note(n *gcNode, missing bool, invalid error) {
	if missing && len(g.report.Missing) < maxGCList {
		g.report.Missing = append(g.report.Missing, n.digest)
	}
	if invalid != nil && len(g.report.Invalid) < maxGCList {
		g.report.Invalid = append(g.report.Invalid, InvalidManifest{n.digest, invalid})
	}
	if missing && n.manifest && n.hold == holdNeeded {
		invalid = ErrNotFound
	}
	if invalid != nil && n.hold > holdReferrer && len(g.unreliable) < maxGCList {
		g.unreliable = append(g.unreliable, InvalidManifest{n.digest, invalid})
	}
}

// checkNode reports whether a live node is missing, and why a manifest is invalid. err concerns the
// index or the process, and ends the collection. Other processes write meanwhile, so each finding
// is looked at again before it counts: see stillLive and lost.
func (g *gcGraph) checkNode(ctx context.Context, n *gcNode) (missing bool, invalid, err error) {
	if !n.manifest && n.named {
		// No row says what it needs, so a collection would delete that.
		if lost, err := g.lost(n); lost || err != nil {
			return false, fmt.Errorf("%w: no row says what this manifest needs", ErrCorruptIndex), err
		}
	}
	if !n.manifest {
		if n.bad {
			return n.hold > holdReferrer, nil, nil
		}
		if n.file || !n.row {
			return false, nil, nil // without a row it is a subject that was never in the registry
		}
		_, err := g.registry.blobs.size(n.digest) // it may have come after the walk
		if errors.Is(err, ErrNotFound) {
			return g.stillLive(ctx, n)
		}
		return false, nil, err
	}
	desc, ok, err := g.registry.index.resolveDigest(n.digest)
	if err != nil || !ok {
		return false, nil, err // collected meanwhile
	}
	m, err := g.registry.readVerified(ctx, desc)
	if errors.Is(err, ErrNotFound) {
		return g.stillLive(ctx, n)
	}
	if err == nil {
		err = g.sameRows(n, m)
	}
	if processCondition(err) {
		return false, nil, err
	}
	return false, err, nil
}

// stillLive reports whether a node without a file is still needed. Since its rows were read,
// another process may have removed the ref and collected the file. A referrer is never needed.
func (g *gcGraph) stillLive(ctx context.Context, n *gcNode) (missing bool, invalid, err error) {
	if n.hold == holdReferrer {
		return false, nil, nil
	}
	up := g.climb(ctx, g.registry.index)
	up.referrers = false
	missing, err = up.led(n.digest)
	return missing, nil, err
}

// lost reports whether a manifest that must have a row has none. It asks the index again, because
// the manifest may have been collected or published since the other rows were read.
func (g *gcGraph) lost(n *gcNode) (bool, error) {
	x := g.registry.index
	if lost, err := lostManifest(x, n.digest); lost || err != nil || !n.ref {
		return lost, err
	}
	dangling, err := x.dangling(context.Background())
	return slices.Contains(dangling, n.digest), err
}

// sameRows checks that the rows name everything that a manifest needs, and its subject. Rows that
// name more than the manifest are harmless here: they only keep more.
func (g *gcGraph) sameRows(n *gcNode, m *Manifest) error {
	rows := map[digest.Digest]bool{}
	for _, c := range n.needs {
		rows[g.nodes[c].digest] = true
	}
	for _, c := range m.children() {
		if !rows[c.Digest] {
			return fmt.Errorf("%w: no row says that it needs %s", ErrCorruptIndex, c.Digest)
		}
	}
	if s, ok := m.Subject(); ok && (n.subject < 0 || g.nodes[n.subject].digest != s.Digest) {
		return fmt.Errorf("%w: no row says that its subject is %s", ErrCorruptIndex, s.Digest)
	}
	return nil
}

// count fills the figures of the report. A node that the index only names, without a row or a file,
// is not content and is not counted.
func (g *gcGraph) count() {
	for i := range g.nodes {
		n := &g.nodes[i]
		if n.ref || n.held || n.protected {
			g.report.Roots++
		}
		switch {
		case !n.row && !n.file:
		case n.live():
			g.report.Reachable.add(n.count())
		case n.hold == holdYoung:
			g.report.Deferred.add(n.count())
		default:
			g.report.Orphans.add(n.count())
		}
	}
}

// orphans returns the dead nodes that have a row or a file, each manifest before its needs and its
// subject (a topological order). So no dead manifest points at a node by the time of its turn, and
// stillDead may take any manifest that does for a living one. It also means that a killed
// collection never leaves a manifest's file without the files that the manifest needs.
func (g *gcGraph) orphans() []int32 {
	dead := func(i int32) bool { return g.nodes[i].hold == holdNone }
	pointers := make([]int32, len(g.nodes))
	each := func(n *gcNode, visit func(int32)) {
		for _, c := range n.needs {
			visit(c)
		}
		if n.subject >= 0 {
			visit(n.subject)
		}
	}
	for i := range g.nodes {
		if dead(int32(i)) {
			each(&g.nodes[i], func(c int32) { pointers[c]++ })
		}
	}
	var order []int32
	for i := range g.nodes {
		if dead(int32(i)) && pointers[i] == 0 {
			order = append(order, int32(i))
		}
	}
	for k := 0; k < len(order); k++ {
		each(&g.nodes[order[k]], func(c int32) {
			if pointers[c]--; pointers[c] == 0 && dead(c) {
				order = append(order, c)
			}
		})
	}
	return slices.DeleteFunc(order, func(i int32) bool {
		return !g.nodes[i].row && !g.nodes[i].file
	})
}
