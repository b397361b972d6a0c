package ocilocal

import (
	"context"
	"io"
	"slices"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Progress tells how far a call is. Calls that can take long have an option of type func(Progress).
//
// The function is called on the goroutine that made the call, so never twice at a time, and never
// after the call has returned. It must not block: some calls wait for it. A panic in it reaches the
// caller. Nil means no reports, which cost nothing then.
//
// There is a report when a phase begins and when an item is done. While an item is under way, there
// is one for each MiB or, if that takes longer, every 200 ms in which bytes arrived. So a blob of
// 10 GiB makes about 10,000 reports, and one of 1 KiB makes one. Reports that the function is too
// slow for are left out, except those of items that are done.
//
// All counts are of the whole call. A progress bar shows Bytes of TotalBytes, or Items of
// TotalItems if TotalBytes is 0. Bytes − SkippedBytes is what the call itself transferred, read or
// wrote. A call that returns no error ends with a report in [PhaseDone], in which all items and
// bytes are done. A call that fails has no such report.
//
// A call may join a transfer that another call has begun. It gets no reports on the items that were
// done by then, but they count.
type Progress struct {
	// Phase is the part of the call that is under way.
	Phase Phase
	// Reference is the one that the call was given. It is zero for calls on any number of
	// artifacts.
	Reference Reference

	// Item is the blob or manifest whose bytes caused the report. Only the digest and the size are
	// certain to be set. It is zero in a report that a phase begins.
	Item ocispec.Descriptor
	// ItemBytes is how many bytes of Item are done. Item is done if ItemDone is set: then its bytes
	// are verified and stored, or the registry has them.
	ItemBytes int64
	ItemDone  bool
	// ItemSkipped is set with ItemDone if Item was there already.
	ItemSkipped bool

	// Items is how many items are done, those that were there already included. TotalItems is how
	// many there are, and −1 in [PhaseRead] and [PhasePlan], when that is not known.
	Items, TotalItems int
	// Bytes is how many bytes of items are done. It falls back when an item has to start again.
	// TotalBytes is the size of all items, and −1 like TotalItems.
	Bytes, TotalBytes int64
	// SkippedItems and SkippedBytes are the parts of Items and Bytes that were there already. The
	// bytes that an interrupted call left of an item count as skipped, too.
	SkippedItems int
	SkippedBytes int64
}

// A Phase is a part of a call. A call goes through its phases in the order of this list, and leaves
// out those in which it has nothing to do. If content was collected while the call needed it, the
// call starts again, and its phases and counts with it.
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

// Between two reports on an item under way, one of these must pass.
const (
	progressBytes = 1 << 20
	progressTime  = 200 * time.Millisecond
)

// A meter counts what one call does, and passes it on as reports. Its methods are safe for
// concurrent use. On a nil meter they do nothing, so a call without a Progress function has none.
type meter struct {
	mu    sync.Mutex // guards what follows; held while sinks are called
	now   Progress
	items int   // planned so far
	bytes int64 // likewise
	told  time.Time
	sinks []*progressSink
}

// A progressSink takes the reports of a meter. It must not use that meter.
type progressSink struct{ take func(Progress) }

// newMeter returns a meter for a function of the caller, and nil if there is none. The function may
// then be called by whichever goroutine uses the meter: see [attend] for calls that have several.
func newMeter(fn func(Progress), ref Reference) *meter {
	if fn == nil {
		return nil
	}
	m := newCount()
	m.now.Reference = ref
	m.sinks = []*progressSink{{fn}}
	return m
}

// newCount returns a meter that reports to nobody yet.
func newCount() *meter {
	return &meter{now: Progress{TotalItems: -1, TotalBytes: -1}, told: time.Now()}
}

// subscribe has take called with the state of the meter, and then with each report until end is
// called.
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

// follow makes m report the counts and phases of another meter until end is called.
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

// tell passes the state on. m.mu is held.
func (m *meter) tell() {
	if len(m.sinks) == 0 {
		return
	}
	m.told = time.Now()
	for _, s := range m.sinks {
		s.take(m.now)
	}
}

// phase begins a phase, unless the call is in a later one. Referrers are transferred like
// artifacts, but all in one phase.
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

// plan adds items to those that the call has to do.
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

// left replaces the plan: so much is to be done from now on.
func (m *meter) left(items int, bytes int64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	m.items, m.bytes = m.now.Items, m.now.Bytes
	m.mu.Unlock()
	m.plan(items, bytes)
}

// planAll is plan for each of the descriptors.
func (m *meter) planAll(descs []ocispec.Descriptor) {
	for _, d := range descs {
		m.plan(1, d.Size)
	}
}

// planned begins a phase in which the totals are known: everything was planned.
func (m *meter) planned(p Phase) {
	if m == nil {
		return
	}
	m.mu.Lock()
	m.now.TotalItems, m.now.TotalBytes = m.items, m.bytes
	m.mu.Unlock()
	m.phase(p)
}

// restart makes the counts zero and the totals unknown: the call does everything again.
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

// skip reports an item that is there already.
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

// done reports an item whose bytes nobody has counted.
func (m *meter) done(desc ocispec.Descriptor) {
	m.item(desc).end()
}

// item begins an item that was planned. A nil item does nothing.
func (m *meter) item(desc ocispec.Descriptor) *meteredItem {
	if m == nil {
		return nil
	}
	return &meteredItem{meter: m, desc: desc}
}

// A meteredItem is an item under way.
type meteredItem struct {
	meter   *meter
	desc    ocispec.Descriptor
	attempt int
	at      int64 // bytes that are done, and counted
	kept    int64 // of these, those that were there before
	told    int64 // at of the last report
	skipped bool
}

// resume says that the first n bytes were there before.
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

// from begins an attempt at byte at. The attempts before are not listened to any more. What it
// returns is called with each number of bytes.
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
	if at < i.kept { // they were no good
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
		// The last byte may be the wrong one. That an item is done is for end to say.
		if len(m.sinks) == 0 || i.at == i.desc.Size || i.at-i.told < progressBytes && time.Since(m.told) < progressTime {
			return
		}
		i.told = i.at
		m.about(i.desc, i.at, false, false)
		m.tell()
	}
}

// reader returns a reader of src, from byte 0 of the item on, that counts.
func (i *meteredItem) reader(src io.Reader) io.Reader {
	if i == nil {
		return src
	}
	return &countedReader{src, i.from(0)}
}

// writer returns a writer that counts what is written, from byte 0 of the item on, and discards it.
func (i *meteredItem) writer() io.Writer {
	if i == nil {
		return io.Discard
	}
	return discardCounted(i.from(0))
}

// A discardCounted is [io.Discard] that counts.
type discardCounted func(n int)

func (count discardCounted) Write(p []byte) (int, error) {
	count(len(p))
	return len(p), nil
}

// A countedReader calls count with each number of bytes that are read of src.
type countedReader struct {
	src   io.Reader
	count func(n int)
}

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

// skip says that the item was there already.
func (i *meteredItem) skip() {
	if i != nil {
		i.skipped = true
	}
}

// drop takes the item out of the plan: it is not there, or it is damaged.
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
	if m.now.TotalItems >= 0 { // something may have come that was not planned
		m.items, m.bytes = max(m.items, m.now.Items), max(m.bytes, m.now.Bytes)
		m.now.TotalItems, m.now.TotalBytes = m.items, m.bytes
	}
	m.about(i.desc, i.at, true, skipped)
	m.tell()
}

// attend runs do, which uses several goroutines, with a meter whose reports reach fn on the
// goroutine of the caller. Without fn, do gets no meter and runs on the caller's goroutine itself.
//
// The problem: if workers called fn, a panic in it, or a runtime.Goexit, would end a worker for
// which other calls may wait, and a slow fn would stop it.
//
// The rule: do runs on a goroutine, and the caller's goroutine takes the reports from a queue.
//
// It is safe because fn can end only the goroutine of its own caller. Then attend cancels do, and
// returns after do has. A panic of do is raised on the caller's goroutine, see settle.
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

// A progressQueue takes reports from any goroutine, and passes them on when the one that made the
// call comes to fetch them.
type progressQueue struct {
	fn    func(Progress)
	ready chan struct{} // has an element if there may be reports

	mu      sync.Mutex // guards reports
	reports []Progress
}

func newProgressQueue(fn func(Progress)) *progressQueue {
	return &progressQueue{fn: fn, ready: make(chan struct{}, 1)}
}

// put adds a report. On an item under way, it replaces one at the end of the queue, so the queue
// has at most a few reports for each item that is done.
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

// deliver passes on what is in the queue. The caller's goroutine calls it. A nil queue has nothing.
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
