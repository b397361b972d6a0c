package ocilocal

import (
	"context"
	"io"
	"slices"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Progress is the state of a call. Calls that can take long have an option of type func(Progress).
//
// The function is called on the goroutine that made the call. So it is never called twice at a
// time, and never after the call has returned. It must not block: some calls wait for it. A panic
// in it reaches the caller. Without a function, there are no reports, and no costs.
//
// There is a report when a phase begins and when an item is done. During an item there is one for
// each MiB or, if that takes longer, every 200 ms in which bytes arrived. So a blob of 10 GiB makes
// about 10,000 reports, and one of 1 KiB makes one. If the function is too slow, some reports are
// left out, but never the report that an item is done.
//
// All counts are for the whole call. A progress bar shows Bytes of TotalBytes, or Items of
// TotalItems if TotalBytes is 0. Bytes − SkippedBytes is the number of bytes that the call itself
// transferred, read or wrote. A call that returns no error ends with a report in [PhaseDone], in
// which all items and bytes are done. A call that fails has no such report.
//
// A call may join a transfer that another call has begun. Items that were done by then are counted,
// but have no reports.
type Progress struct {
	// Phase is the current part of the call.
	Phase Phase
	// Reference is the reference that the caller gave. It is zero for calls on any number of
	// artifacts.
	Reference Reference

	// Item is the blob or manifest whose bytes caused the report. Only its digest and size are
	// always set. It is zero in the report at the beginning of a phase.
	Item ocispec.Descriptor
	// ItemBytes is the number of bytes of Item that are done. ItemDone is set if Item is done: its
	// bytes are verified and stored, or the target had them already.
	ItemBytes int64
	ItemDone  bool
	// ItemSkipped is set with ItemDone if the target had Item already.
	ItemSkipped bool

	// Items is the number of items that are done, skipped ones included. TotalItems is the number
	// of all items. It is −1 in [PhaseRead] and [PhasePlan], when it is not known.
	Items, TotalItems int
	// Bytes is the number of bytes that are done. It decreases if an item has to start again.
	// TotalBytes is the size of all items, and −1 like TotalItems.
	Bytes, TotalBytes int64
	// SkippedItems and SkippedBytes are the parts of Items and Bytes that the target had already.
	// Bytes of an item that an interrupted call has left count as skipped, too.
	SkippedItems int
	SkippedBytes int64
}

// A Phase is a part of a call. A call goes through its phases in the order of this list, and skips
// phases in which it has nothing to do. If needed content was collected meanwhile, the call starts
// again, and so do its phases and counts.
type Phase string

const (
	// PhaseRead: an archive is read.
	PhaseRead Phase = "read"
	// PhasePlan: the call collects its items. It asks a remote registry, or reads manifests or the
	// index.
	PhasePlan Phase = "plan"
	// PhaseBlobs: blobs are transferred, copied or checked.
	PhaseBlobs Phase = "blobs"
	// PhaseRepair: a repair heals blobs and corrects rows.
	PhaseRepair Phase = "repair"
	// PhaseCheck: a repair checks everything again.
	PhaseCheck Phase = "check"
	// PhaseDelete: a collection deletes.
	PhaseDelete Phase = "delete"
	// PhasePublish: the result is made durable and visible: refs here, manifests in a remote
	// registry, index.json in a layout.
	PhasePublish Phase = "publish"
	// PhaseReferrers: referrers are transferred after the artifact. The totals grow with each.
	PhaseReferrers Phase = "referrers"
	// PhaseDone: the call has succeeded and is about to return.
	PhaseDone Phase = "done"
)

// phases are all phases, in order.
var phases = []Phase{PhaseRead, PhasePlan, PhaseBlobs, PhaseRepair, PhaseCheck, PhaseDelete, PhasePublish, PhaseReferrers, PhaseDone}

// Between two reports on one item, at least one of these must pass. They bound the cost of reports:
// a report per MiB is nothing beside hashing the MiB.
const (
	progressBytes = 1 << 20
	progressTime  = 200 * time.Millisecond
)

// A meter counts the work of one call, and passes it on as reports. Its methods are safe for
// concurrent use. On a nil meter they do nothing, so a call without a Progress function uses nil.
//
// The life of a count:
//
//	phase(PhasePlan)          totals unknown (−1)
//	plan(1, size) …           each item that is found
//	planned(PhaseBlobs)       totals known from here on
//	item(desc)                begins one of them
//	  from(at) → count(n) …   bytes of one attempt; a new attempt starts again at its own byte
//	  skip, drop              it was there already; it does not count after all
//	  end                     it is done: verified and stored
//	finish                    PhaseDone, with all counts equal to the totals
type meter struct {
	mu    sync.Mutex // guards what follows; held while sinks are called
	now   Progress
	items int       // items planned so far
	bytes int64     // bytes planned so far
	told  time.Time // of the last report
	sinks []*progressSink
}

// A progressSink takes the reports of a meter. take is called with the meter's mutex held, so it
// must not use that meter.
type progressSink struct{ take func(Progress) }

// newMeter returns a meter for a function of the caller, and nil if there is none. The function is
// called by the goroutine that uses the meter. For calls that use several goroutines, see [attend].
func newMeter(fn func(Progress), ref Reference) *meter {
	if fn == nil {
		return nil
	}
	m := newCount()
	m.now.Reference = ref
	m.sinks = []*progressSink{{fn}}
	return m
}

// newCount returns a meter without a sink. A transfer that several calls may join has such a meter,
// and each call subscribes to it.
func newCount() *meter {
	return &meter{now: Progress{TotalItems: -1, TotalBytes: -1}, told: time.Now()}
}

// subscribe calls take with the state of the meter, and then with each report until end is called.
func (m *meter) subscribe(take func(Progress)) (end func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &progressSink{take}
	m.sinks = append(m.sinks, s)
	if m.now.Phase != "" {
		take(m.now)
	}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.sinks = slices.DeleteFunc(m.sinks, func(other *progressSink) bool { return other == s })
	}
}

// follow makes m report the counts and phases of another meter until end is called. m keeps its own
// Reference. It locks m.mu while other.mu is held. No code locks them in the other order, because
// the sinks of m do not use other.
func (m *meter) follow(other *meter) (end func()) {
	if m == nil {
		return func() {}
	}
	return other.subscribe(func(p Progress) {
		m.mu.Lock()
		defer m.mu.Unlock()
		begins := p.Phase != m.now.Phase
		p.Reference = m.now.Reference
		m.now = p
		m.items, m.bytes = max(p.TotalItems, 0), max(p.TotalBytes, 0)
		if begins || p.Item.Digest != "" {
			m.tell()
		}
	})
}

// tell passes the state to all sinks. m.mu is held.
func (m *meter) tell() {
	if len(m.sinks) == 0 {
		return
	}
	m.told = time.Now()
	for _, s := range m.sinks {
		s.take(m.now)
	}
}

// phase begins a phase, unless the call is in a later one already. So the phases of a referrer,
// which is transferred like an artifact, do not show: all of it is in [PhaseReferrers].
func (m *meter) phase(p Phase) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if slices.Index(phases, p) > slices.Index(phases, m.now.Phase) {
		m.now.Phase = p
		m.about(ocispec.Descriptor{}, 0, false, false)
		m.tell()
	}
}

// about sets the item of the next report. m.mu is held.
func (m *meter) about(desc ocispec.Descriptor, at int64, done, skipped bool) {
	m.now.Item = ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
	m.now.ItemBytes, m.now.ItemDone, m.now.ItemSkipped = at, done, skipped
}

// plan adds items to the totals. Negative numbers take items out.
func (m *meter) plan(items int, bytes int64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.items += items
	m.bytes += bytes
	if m.now.TotalItems >= 0 {
		m.now.TotalItems, m.now.TotalBytes = m.items, m.bytes
	}
}

// left replaces the plan: items and bytes are the work that is left from now on. Work that is done
// already stays counted.
func (m *meter) left(items int, bytes int64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	m.items, m.bytes = m.now.Items, m.now.Bytes
	m.mu.Unlock()
	m.plan(items, bytes)
}

// planAll calls plan for each descriptor.
func (m *meter) planAll(descs []ocispec.Descriptor) {
	for _, d := range descs {
		m.plan(1, d.Size)
	}
}

// planned begins a phase in which the totals are known, because everything was planned before.
func (m *meter) planned(p Phase) {
	if m == nil {
		return
	}
	m.mu.Lock()
	m.now.TotalItems, m.now.TotalBytes = m.items, m.bytes
	m.mu.Unlock()
	m.phase(p)
}

// restart sets the counts to zero and the totals to unknown. The call then does everything again.
func (m *meter) restart() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = Progress{Reference: m.now.Reference, TotalItems: -1, TotalBytes: -1}
	m.items, m.bytes = 0, 0
}

// finish makes the last report of a call that succeeds.
func (m *meter) finish() {
	if m == nil {
		return
	}
	m.mu.Lock()
	m.now.TotalItems, m.now.TotalBytes = m.now.Items, m.now.Bytes
	m.mu.Unlock()
	m.phase(PhaseDone)
}

// skip reports an item that the target has already.
func (m *meter) skip(desc ocispec.Descriptor) {
	i := m.item(desc)
	i.skip()
	i.end()
}

// unskip takes back that an item was skipped.
func (m *meter) unskip(desc ocispec.Descriptor) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.Items--
	m.now.SkippedItems--
	m.now.Bytes -= desc.Size
	m.now.SkippedBytes -= desc.Size
}

// done reports an item whose bytes were not counted while they were transferred.
func (m *meter) done(desc ocispec.Descriptor) {
	m.item(desc).end()
}

// item begins an item that was planned. A nil meter returns a nil item, whose methods do nothing.
func (m *meter) item(desc ocispec.Descriptor) *meteredItem {
	if m == nil {
		return nil
	}
	return &meteredItem{meter: m, desc: desc}
}

// A meteredItem is an item that was begun and is not done. Its fields are guarded by the meter's
// mutex, except skipped, which the goroutine of the item uses.
type meteredItem struct {
	meter   *meter
	desc    ocispec.Descriptor
	attempt int   // the number of the attempt that counts
	at      int64 // bytes that are done, and counted
	kept    int64 // the part of at that an interrupted call has left
	told    int64 // at of the last report
	skipped bool
}

// resume records that an interrupted call has left the first n bytes.
func (i *meteredItem) resume(n int64) {
	if i == nil || n == 0 {
		return
	}
	i.from(n)
	i.meter.mu.Lock()
	defer i.meter.mu.Unlock()
	i.kept = n
	i.meter.now.SkippedBytes += n
	i.meter.about(i.desc, i.at, false, false)
	i.meter.tell()
}

// from begins an attempt at byte at, and returns the function that counts its bytes. Counts of
// earlier attempts are ignored from now on: a reader of one may still run when the next one begins.
func (i *meteredItem) from(at int64) func(n int) {
	if i == nil {
		return func(int) {}
	}
	m := i.meter
	m.mu.Lock()
	defer m.mu.Unlock()
	i.attempt++
	attempt := i.attempt
	i.move(at)
	i.told = at
	if at < i.kept { // the bytes that were left are not used
		m.now.SkippedBytes -= i.kept - at
		i.kept = at
	}
	return func(n int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if attempt != i.attempt || n <= 0 {
			return
		}
		i.move(min(i.at+int64(n), i.desc.Size))
		// The last byte is not reported here. The item is done only after it was verified, and then
		// end reports it.
		if len(m.sinks) == 0 || i.at == i.desc.Size || i.at-i.told < progressBytes && time.Since(m.told) < progressTime {
			return
		}
		i.told = i.at
		m.about(i.desc, i.at, false, false)
		m.tell()
	}
}

// reader returns a reader of src that counts its bytes as those of the item, from byte 0 on.
func (i *meteredItem) reader(src io.Reader) io.Reader {
	if i == nil {
		return src
	}
	return &countedReader{src, i.from(0)}
}

// writer returns a writer that counts its bytes as those of the item, from byte 0 on, and discards
// them.
func (i *meteredItem) writer() io.Writer {
	if i == nil {
		return io.Discard
	}
	return discardCounted(i.from(0))
}

// A discardCounted is [io.Discard] that counts.
type discardCounted func(n int)

// Write implements [io.Writer].
func (count discardCounted) Write(p []byte) (int, error) {
	count(len(p))
	return len(p), nil
}

// A countedReader calls count with the number of bytes of each read of src.
type countedReader struct {
	src   io.Reader
	count func(n int)
}

// Read implements [io.Reader].
func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.src.Read(p)
	r.count(n)
	return n, err
}

// move sets how far the item is. The meter's mu is held.
func (i *meteredItem) move(at int64) {
	i.meter.now.Bytes += at - i.at
	i.at = at
}

// skip marks the item: the target had it already. end reports it so.
func (i *meteredItem) skip() {
	if i != nil {
		i.skipped = true
	}
}

// drop subtracts the item from the totals and takes back its bytes, because it is missing or
// damaged.
func (i *meteredItem) drop() {
	if i != nil {
		i.from(0)
		i.meter.plan(-1, -i.desc.Size)
	}
}

// end reports that the item is done.
func (i *meteredItem) end() {
	if i == nil {
		return
	}
	m := i.meter
	m.mu.Lock()
	defer m.mu.Unlock()
	i.attempt++
	skipped := i.skipped || i.kept > 0 && i.kept == i.desc.Size
	if skipped {
		m.now.SkippedBytes += i.desc.Size - i.kept
		m.now.SkippedItems++
	}
	i.move(i.desc.Size)
	m.now.Items++
	if m.now.TotalItems >= 0 { // an item that was not planned must not exceed the totals
		m.items, m.bytes = max(m.items, m.now.Items), max(m.bytes, m.now.Bytes)
		m.now.TotalItems, m.now.TotalBytes = m.items, m.bytes
	}
	m.about(i.desc, i.at, true, skipped)
	m.tell()
}

// attend runs do with a meter. The reports of the meter reach fn on the caller's goroutine,
// although do uses several goroutines. If fn is nil, do gets no meter and runs on the caller's
// goroutine.
//
// The problem: a worker must not call fn. Other calls may wait for the worker, and fn can panic,
// call runtime.Goexit, or be slow.
//
// The rule: do runs on a new goroutine and puts its reports into a queue. The caller's goroutine
// takes them out and calls fn.
//
// It is safe because fn runs on the caller's goroutine, and can end no other. Then the deferred
// function cancels do and waits until it has returned, so no goroutine of the call is left. A panic
// of do is passed on and raised on the caller's goroutine: see settle.
func attend[T any](ctx context.Context, fn func(Progress), ref Reference, do func(context.Context, *meter) (T, error)) (result T, err error) {
	if fn == nil {
		return do(ctx, nil)
	}
	ctx, cancel := context.WithCancel(ctx)
	q := newProgressQueue(fn)
	m := newMeter(q.put, ref)
	done := make(chan struct{})
	go settle(func() (err error) {
		result, err = do(ctx, m)
		return err
	}, func(e error) {
		err = e
		close(done)
	})
	defer func() {
		cancel()
		<-done
	}()
	for {
		select {
		case <-q.news():
			q.deliver()
			continue
		case <-done:
		}
		raise(err)
		if err == nil {
			m.finish()
			q.deliver()
		}
		return result, err
	}
}

// A progressQueue takes reports from any goroutine. The goroutine that made the call delivers them.
type progressQueue struct {
	fn    func(Progress)
	ready chan struct{} // has an element if there may be reports

	mu      sync.Mutex // guards reports
	reports []Progress
}

func newProgressQueue(fn func(Progress)) *progressQueue {
	return &progressQueue{fn: fn, ready: make(chan struct{}, 1)}
}

// put adds a report. If an item is not done, its report replaces an older one of the same item at
// the end of the queue. So a slow fn costs little memory: between the reports of two done items,
// the queue has at most one report for each item that is being transferred. put never blocks.
func (q *progressQueue) put(p Progress) {
	q.mu.Lock()
	last := len(q.reports)
	for i := last - 1; i >= 0 && !p.ItemDone && q.reports[i].Item.Digest != "" && !q.reports[i].ItemDone; i-- {
		if q.reports[i].Item.Digest == p.Item.Digest {
			q.reports = slices.Delete(q.reports, i, i+1)
			break
		}
	}
	q.reports = append(q.reports, p)
	q.mu.Unlock()
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

// news returns the channel that has an element if there may be reports; nil for a nil queue.
func (q *progressQueue) news() <-chan struct{} {
	if q == nil {
		return nil
	}
	return q.ready
}

// deliver calls fn with the reports in the queue. Only the caller's goroutine calls it. The mutex
// is not held meanwhile, so workers can put further reports. A nil queue has no reports.
func (q *progressQueue) deliver() {
	if q == nil {
		return
	}
	q.mu.Lock()
	reports := q.reports
	q.reports = nil
	q.mu.Unlock()
	for _, p := range reports {
		q.fn(p)
	}
}
