package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A sharedPull is one transfer of a manifest's closure, for which any number of calls may wait.
//
//	transfer ──join──▶ sharedPull ──▶ goroutine: fetch, then publish for one call that waits
//	   │                                  │
//	   └──◀── done, or ctx has ended ◀────┘   the other calls set their refs themselves
//
// The problem: the calls have contexts, refs and policies of their own. If the transfer ran in the
// first call, the end of its context would stop the others.
//
// The rule: the transfer belongs to no call. It runs until it is done, or until the last waiting
// call has left. So a call that is alone ends its transfer. The ref of one waiting call is set in
// the same step as the content is published. Whose ref that is depends on chance, but each call's
// own policy decides about its own ref. If that is a conflict, the transfer tries the next call's
// ref, since nothing of a conflict becomes visible.
//
// It is safe because calls share only what they could have fetched themselves. The key holds the
// client, and so the credentials, the repository, and the options that say what is fetched.
type sharedPull struct {
	registry *LocalRegistry
	key      string
	cancel   context.CancelFunc
	done     chan struct{}
	err      error         // set before done is closed
	stats    *ImportResult // likewise
	received int64         // likewise
	meter    *meter        // of the transfer; the calls follow it
	added    int64         // likewise: what counts for PullOptions.MaxBytes

	mu      sync.Mutex // guards what follows
	waiting []*puller
	ended   bool  // no call may join any more
	turn    *turn // the publication under way; nil for none
}

// A turn is the publication of a transfer for one call.
type turn struct {
	of     *puller
	cancel context.CancelFunc
	done   chan struct{}
}

// transfer fetches everything that a manifest needs, together with other calls that want the same,
// and sets the ref.
func (p *puller) transfer(ctx context.Context, m *Manifest) (*PullResult, error) {
	for range 3 {
		f, unfollow, err := p.join(ctx, m)
		if err != nil {
			return nil, err
		}
		p.transferred = true
		if err := f.wait(ctx, p, unfollow); err != nil {
			return nil, err
		}
		switch {
		case p.update != nil:
			result, err := p.result(*p.update, p.update.conflict(p.opts.Expected))
			if err == nil {
				result.Absent = f.stats.Absent
				result.BlobsWritten, result.BlobsReused, result.BytesWritten = f.stats.BlobsWritten, f.stats.BlobsReused, f.stats.BytesWritten
				result.BytesReceived = f.received
				p.added += f.added
			}
			return result, err
		case f.err != nil:
			raise(f.err)
			return nil, f.err
		}
		p.added += f.added
		result, err := p.point(ctx, m.Digest())
		if result != nil {
			result.Shared = true
		}
		if result != nil || err != nil {
			return result, err
		}
		// It was collected in between.
	}
	return nil, fmt.Errorf("%w: collections have deleted %s three times while it was pulled", ErrIncomplete, p.ref)
}

// join returns the transfer of a manifest that is under way, or starts one. The call gets reports
// on the transfer until it calls unfollow.
func (p *puller) join(ctx context.Context, m *Manifest) (_ *sharedPull, unfollow func(), err error) {
	r := p.registry
	key := fmt.Sprintf("%p %s %s %d %t", p.repo.remote, p.ref.Name(), m.Digest(), p.opts.MaxBytes, p.opts.Verify)
	for {
		f := &sharedPull{registry: r, key: key, done: make(chan struct{}), waiting: []*puller{p}, meter: newCount()}
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f.cancel = cancel
		if other, there := r.pulls.LoadOrStore(key, f); there {
			cancel()
			if f = other.(*sharedPull); f.enter(p) {
				return f, p.meter.follow(f.meter), nil
			}
			select { // it is about to end
			case <-f.done:
			case <-ctx.Done():
				return nil, nil, ctx.Err()
			}
			continue
		}
		end, err := r.begin(ctx)
		if err != nil {
			f.end(err)
			return nil, nil, err
		}
		unfollow := p.meter.follow(f.meter) // from the first report on
		go func() {
			defer end()
			settle(func() error { return f.run(own, p, m) }, f.end)
		}()
		return f, unfollow, nil
	}
}

// enter makes a call wait for f. It returns false if f is about to end.
func (f *sharedPull) enter(p *puller) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return false
	}
	f.waiting = append(f.waiting, p)
	return true
}

// wait returns when the transfer is done. If ctx ends before that, wait returns its error.
func (f *sharedPull) wait(ctx context.Context, p *puller, unfollow func()) error {
	defer f.leave(p)
	defer unfollow()
	select {
	case <-f.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leave ends the waiting of a call. The last call to leave ends the transfer, and waits until it
// has cleaned up. A call for which the transfer is publishing ends that, and waits for the end: no
// ref is set for a call that has returned.
func (f *sharedPull) leave(p *puller) {
	f.mu.Lock()
	f.waiting = slices.DeleteFunc(f.waiting, func(other *puller) bool { return other == p })
	last := len(f.waiting) == 0
	f.ended = f.ended || last
	t := f.turn
	f.mu.Unlock()
	switch {
	case last:
		f.cancel()
		<-f.done
	case t != nil && t.of == p:
		t.cancel()
		<-t.done
	}
}

// end wakes the calls that wait.
func (f *sharedPull) end(err error) {
	f.mu.Lock()
	f.ended = true
	f.mu.Unlock()
	f.err = err
	f.registry.pulls.CompareAndDelete(f.key, f)
	f.cancel()
	close(f.done)
}

// next begins the turn of the first waiting call that was not tried before, and returns the context
// of the turn. If there is none, no call may join any more.
func (f *sharedPull) next(ctx context.Context, tried []*puller) (context.Context, *turn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.waiting {
		if !slices.Contains(tried, p) {
			own, cancel := context.WithCancel(ctx)
			f.turn = &turn{of: p, cancel: cancel, done: make(chan struct{})}
			return own, f.turn
		}
	}
	f.ended = true
	return ctx, nil
}

// over ends a turn.
func (f *sharedPull) over(t *turn) {
	f.mu.Lock()
	f.turn = nil
	f.mu.Unlock()
	t.cancel()
	close(t.done)
}

// run fetches the closure and publishes it. The first call decides on the repository and the number
// of workers. Its error is the error of every waiting call, except those for which it has
// published.
func (f *sharedPull) run(ctx context.Context, first *puller, m *Manifest) error {
	r := f.registry
	im := r.newImporter(&ImportOptions{MaxBytes: first.opts.MaxBytes, one: true})
	defer func() { r.logDiscard(im.stage.discard()) }()
	im.meter = f.meter
	f.meter.phase(PhasePlan)
	pubs, stats, received, err := first.stageClosure(ctx, im, m)
	if err != nil {
		return err
	}
	f.stats, f.received, f.added = stats, received, im.added.Load()
	f.meter.phase(PhasePublish)
	for tried := []*puller(nil); ; {
		own, t := f.next(ctx, tried)
		if t == nil { // all calls have left, or have a conflict
			return cmp.Or(ctx.Err(), errNobodyWaits)
		}
		p := t.of
		tried = append(tried, p)
		pubs[0].ref, pubs[0].PublishOptions = p.as, p.opts.PublishOptions
		updates, left, err := f.publish(own, t, im.stage, pubs)
		if err != nil && left && ctx.Err() == nil { // the others go on
			continue
		}
		if err != nil {
			return err
		}
		p.update = &updates[0]
		if updates[0].Outcome != Conflicted {
			stats.Absent = im.absent.sorted()
			stats.BlobsWritten, stats.BlobsReused, stats.BytesWritten = im.stage.counts()
			return nil
		}
	}
}

// publish publishes for the call whose turn it is, and ends the turn. left says that the call has
// left meanwhile.
func (f *sharedPull) publish(ctx context.Context, t *turn, s *stage, pubs []publication) (updates []RefUpdate, left bool, err error) {
	defer f.over(t)
	updates, err = f.registry.publish(ctx, s, pubs)
	return updates, ctx.Err() != nil, err
}

// errNobodyWaits ends a transfer for which no call waits any more. No call gets it.
var errNobodyWaits = errors.New("no call waits for the transfer")

// stageClosure stages a manifest that the remote registry has sent, with everything that it needs,
// and returns the publication of it.
func (p *puller) stageClosure(ctx context.Context, im *importer, m *Manifest) (pubs []publication, stats *ImportResult, received int64, err error) {
	r := p.registry
	from := &fetcher{registry: r, repo: p.repo, ref: p.ref, stage: im.stage}
	// Members that are absent here already may be absent there too.
	im.mayLack = func(d digest.Digest) (bool, error) { return isAbsent(r.index, d, roleManifest) }
	im.fetch, im.workers = from.fetch, cmp.Or(max(p.opts.Workers, 0), 4)
	if r.opts.SeparateRegistries {
		im.reusable = func(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
			return r.ownedBy(ctx, p.ref.Registry(), desc.Digest)
		}
	}
	if _, err := im.stage.putBytes(ctx, m.raw, m.Digest().Algorithm()); err != nil {
		return nil, nil, 0, err
	}
	written, _, added := im.stage.counts()
	if err := im.charge(added); err != nil {
		return nil, nil, 0, err
	}
	desc := m.Descriptor()
	im.meter.plan(1, desc.Size)
	if written > 0 {
		im.meter.done(desc)
	} else {
		im.meter.skip(desc)
	}
	entries := []ocispec.Descriptor{{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}}
	pubs, stats, err = im.collect(ctx, entries, []namedEntry{{Descriptor: entries[0]}})
	if err == nil {
		err = im.stage.keepOnly(im.sizes)
	}
	return pubs, stats, from.received.Load(), err
}
