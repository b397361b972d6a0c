package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A progressLog keeps the reports of one call, and checks the promises that hold for all calls. It
// has no lock: the reports come on the goroutine that made the call, so the race detector finds
// others.
type progressLog struct {
	t       testing.TB
	reports []ocilocal.Progress
	over    bool // the call has returned
	falls   bool // an item starts again, so counts of bytes may fall back
	joined  bool // the call may have missed the first items
	twice   bool // items may be done twice
	shrinks bool // totals may shrink after the last report on an item
}

var phaseOrder = []ocilocal.Phase{ocilocal.PhaseRead, ocilocal.PhasePlan, ocilocal.PhaseBlobs, ocilocal.PhaseRepair,
	ocilocal.PhaseCheck, ocilocal.PhaseDelete,
	ocilocal.PhasePublish, ocilocal.PhaseReferrers, ocilocal.PhaseDone}

func (l *progressLog) take(p ocilocal.Progress) {
	var last ocilocal.Progress
	if n := len(l.reports); n > 0 {
		last = l.reports[n-1]
	}
	known := slices.Index(phaseOrder, p.Phase) > slices.Index(phaseOrder, ocilocal.PhasePlan)
	for problem, bad := range map[string]bool{
		"after the call returned":      l.over,
		"a phase after a later one":    slices.Index(phaseOrder, p.Phase) < slices.Index(phaseOrder, last.Phase),
		"the first is not of a phase":  last.Phase == "" && p.Item.Digest != "",
		"totals":                       known != (p.TotalItems >= 0) || known != (p.TotalBytes >= 0),
		"more done than there is":      known && (p.Items > p.TotalItems || p.Bytes > p.TotalBytes),
		"more skipped than done":       p.SkippedItems > p.Items || p.SkippedBytes > p.Bytes || p.SkippedBytes < 0,
		"it falls back":                p.Items < last.Items || p.Bytes < last.Bytes && !l.falls,
		"the item":                     p.ItemBytes > p.Item.Size || p.ItemDone && p.ItemBytes != p.Item.Size,
		"an item skipped and not done": p.ItemSkipped && !p.ItemDone,
		"no news":                      p.Phase == last.Phase && p.Item.Digest == "",
	} {
		if bad {
			l.t.Errorf("%s: %+v after %+v", problem, p, last)
		}
	}
	l.reports = append(l.reports, p)
}

// ended checks the end of a call, and returns the last report.
func (l *progressLog) ended(err error) ocilocal.Progress {
	l.t.Helper()
	l.over = true
	var p, before ocilocal.Progress
	if n := len(l.reports); n > 1 {
		p, before = l.reports[n-1], l.reports[n-2]
	}
	switch {
	case (err == nil) != (p.Phase == ocilocal.PhaseDone):
		l.t.Errorf("after %v, the last report is %+v", err, p)
	case err == nil && (p.Items != p.TotalItems || p.Bytes != p.TotalBytes || !l.shrinks && p.TotalItems != max(0, before.TotalItems) || p.TotalBytes != max(0, before.TotalBytes)):
		l.t.Errorf("not everything is done: %+v after %+v", p, before)
	}
	done := map[digest.Digest]int{}
	for _, p := range l.reports {
		if p.ItemDone {
			done[p.Item.Digest]++
		}
	}
	for d, n := range done {
		if n != 1 && !l.twice && !slices.Contains(l.phases(), ocilocal.PhaseReferrers) {
			l.t.Errorf("%s is done %d times", d, n)
		}
	}
	reported := 0
	for _, n := range done {
		reported += n
	}
	if err == nil && reported != p.Items && !l.joined {
		l.t.Errorf("%d of %d items are reported as done", reported, p.Items)
	}
	return p
}

func (l *progressLog) phases() (list []ocilocal.Phase) {
	for _, p := range l.reports {
		list = append(list, p.Phase)
	}
	return slices.Compact(list)
}

func newProgressLog(t testing.TB) *progressLog { return &progressLog{t: t} }

// A pull and a push count what they do, blob by blob, and not too often. When they are made again,
// all is skipped.
func TestProgress(t *testing.T) {
	s := newServer(t)
	var layers [][]byte
	size := int64(2)
	for i := range 6 {
		layers = append(layers, noise(byte(i), 100+i*(1<<20)))
		size += int64(len(layers[i]))
	}
	d := s.put(t, "org/model", "v1", layers...)
	m := s.at("org/model", string(d))
	size += int64(len(m.body))
	r := openRemote(t, nil)
	check := func(what string, l *progressLog, err error, skippedItems int, skippedBytes int64, phases ...ocilocal.Phase) {
		t.Helper()
		p := l.ended(err)
		if p.Items != 8 || p.Bytes != size || p.SkippedItems != skippedItems || p.SkippedBytes != skippedBytes || !slices.Equal(l.phases(), phases) {
			t.Errorf("%s: %+v, phases %v", what, p, l.phases())
		}
		if n := len(l.reports); n > len(phases)+8+15 {
			t.Errorf("%s: %d reports", what, n)
		}
		for _, q := range l.reports {
			if q.Phase == ocilocal.PhasePlan == (q.TotalBytes == size) {
				t.Errorf("%s: %+v", what, q)
			}
		}
	}
	l := newProgressLog(t)
	pulled, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Workers: 6, Progress: l.take})
	check("pull", l, err, 0, 0, ocilocal.PhasePlan, ocilocal.PhaseBlobs, ocilocal.PhasePublish, ocilocal.PhaseDone)
	if pulled.BytesReceived+int64(len(m.body)) != size || l.reports[0].Reference != s.ref("org/model:v1") {
		t.Errorf("%+v, %+v", pulled, l.reports[0])
	}
	here := []ocilocal.Phase{ocilocal.PhasePlan, ocilocal.PhaseBlobs, ocilocal.PhaseDone}
	l = newProgressLog(t)
	_, err = r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Progress: l.take})
	check("second pull", l, err, 8, size, here...)
	l = newProgressLog(t)
	_, err = r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{As: s.ref("org/model:other"), Progress: l.take})
	check("pull under another name", l, err, 8, size, here...)
	l = newProgressLog(t)
	_, err = r.LoadWith(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Progress: l.take})
	check("load", l, err, 8, size, here...)

	push := []ocilocal.Phase{ocilocal.PhasePlan, ocilocal.PhaseBlobs, ocilocal.PhasePublish, ocilocal.PhaseDone}
	s.noMount = true
	to := &ocilocal.PushOptions{As: s.ref("org/other:v1"), Workers: 6}
	l = newProgressLog(t)
	to.Progress = l.take
	pushed, err := r.Push(t.Context(), s.ref("org/model:v1"), to)
	check("push", l, err, 0, 0, push...)
	if pushed.BytesSent+int64(len(m.body)) != size {
		t.Errorf("%+v", pushed)
	}
	l = newProgressLog(t)
	to.Progress = l.take
	_, err = r.Push(t.Context(), s.ref("org/model:v1"), to)
	check("second push", l, err, 8, size, push...)

	// Of an artifact that shares blobs with one that is here, these are skipped.
	s.put(t, "org/model", "v2", append(layers[:5:5], noise(99, 10))...)
	l = newProgressLog(t)
	_, err = r.Pull(t.Context(), s.ref("org/model:v2"), &ocilocal.PullOptions{Progress: l.take})
	if p := l.ended(err); p.Items != 8 || p.SkippedItems != 6 || p.Bytes-p.SkippedBytes > 10+int64(len(m.body)) {
		t.Errorf("%+v", p)
	}
}

// An image index is read to its end before the first blob comes, so the totals are right from then
// on.
func TestProgressOfIndex(t *testing.T) {
	s := newServer(t)
	var list []string
	for i := range 3 {
		d := s.put(t, "org/multi", "", noise(byte(i), 1<<20), noise(100, 1000))
		list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ocispec.MediaTypeImageManifest, d, len(s.at("org/multi", string(d)).body)))
	}
	s.putRaw("org/multi", "v1", ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, strings.Join(list, ",")))
	l := newProgressLog(t)
	_, err := openRemote(t, nil).Pull(t.Context(), s.ref("org/multi:v1"), &ocilocal.PullOptions{Progress: l.take})
	p := l.ended(err)
	if p.Items != 4+1+1+3 {
		t.Errorf("%+v", p)
	}
	for _, q := range l.reports {
		if q.TotalBytes >= 0 && q.TotalBytes != p.TotalBytes {
			t.Errorf("%+v, and in the end %+v", q, p)
		}
	}
}

// Referrers add to the totals, in a phase of their own.
func TestProgressOfReferrers(t *testing.T) {
	s := newServer(t)
	s.noMount = true
	r := openRemote(t, nil)
	a := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 100))
	desc := a.Descriptor()
	pushed(t, r, s.ref("org/model:sig"), nil, &desc, noise(2, 100))
	for range 2 {
		l := newProgressLog(t)
		_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{Referrers: true, Progress: l.take})
		if p := l.ended(err); p.Items != 5 || !slices.Contains(l.phases(), ocilocal.PhaseReferrers) {
			t.Errorf("%+v", p)
		}
	}
	there := openRemote(t, nil)
	for i := range 2 {
		l := newProgressLog(t)
		_, err := there.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Referrers: true, Progress: l.take})
		if p := l.ended(err); p.Items < 5 || i == 1 && p.SkippedItems != p.Items || !slices.Contains(l.phases(), ocilocal.PhaseReferrers) {
			t.Errorf("%+v", p)
		}
	}
}

// Calls that share a transfer are each told of it under their own reference. A function that
// panics, ends its goroutine or is slow does that to its own call only.
func TestProgressShared(t *testing.T) {
	s := newServer(t)
	large := noise(1, 4<<20)
	s.put(t, "org/model", "v1", large)
	g := s.holdBack(large)
	r := openRemote(t, nil)
	var others sync.WaitGroup
	free := make(chan struct{})
	pull := func(i int, fn func(ocilocal.Progress)) error {
		o := &ocilocal.PullOptions{As: ocilocal.MustParseReference(fmt.Sprint("example.com/own:v", i)), Progress: fn}
		_, err := r.Pull(t.Context(), s.ref("org/model:v1"), o)
		return err
	}
	atBlob := func(do func()) func(ocilocal.Progress) {
		return func(p ocilocal.Progress) {
			if p.Item.Size == int64(len(large)) {
				do()
			}
		}
	}
	const good = 4
	var wg, bad sync.WaitGroup
	for i := range good {
		wg.Go(func() {
			l := newProgressLog(t)
			l.joined = true
			err := pull(i, l.take)
			if p := l.ended(err); p.Items != 3 || p.Bytes < int64(len(large)) || p.Reference != s.ref("org/model:v1") {
				t.Errorf("%+v", p)
			}
		})
	}
	bad.Go(func() {
		defer func() {
			if v := recover(); v != "the caller's" {
				t.Errorf("%v", v)
			}
		}()
		pull(good, atBlob(func() { panic("the caller's") }))
	})
	bad.Go(func() { // whose Goexit ends this goroutine
		defer func() {
			if v := recover(); v != nil {
				t.Error(v)
			}
		}()
		pull(good+1, atBlob(runtime.Goexit))
		t.Error("the call returned")
	})
	others.Go(func() {
		if err := pull(good+2, atBlob(func() { <-free })); err != nil {
			t.Error(err)
		}
	})
	g.openAfter(good + 3)
	wg.Wait()
	bad.Wait()
	close(free)
	others.Wait()
	if s.served() > int64(len(large))+100 {
		t.Errorf("%d bytes were served", s.served())
	}
}

// A function that ends the call's context ends the call, and is not called afterwards.
func TestProgressCancels(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 3<<20), noise(2, 3<<20))
	r := openRemote(t, nil)
	dontWatch(r.Root()) // what was received is kept
	ctx, cancel := context.WithCancel(t.Context())
	l := newProgressLog(t)
	_, err := r.Pull(ctx, s.ref("org/model:v1"), &ocilocal.PullOptions{Workers: 1, Progress: func(p ocilocal.Progress) {
		l.take(p)
		if p.Bytes > 1<<20 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) && err != nil {
		t.Error(err)
	}
	l.ended(err)
	l = newProgressLog(t)
	_, err = r.Pull(t.Context(), s.ref("org/model:absent"), &ocilocal.PullOptions{Progress: l.take})
	if l.ended(err); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
}

// A blob that has to be sent again falls back; it is never further than it is large.
func TestProgressFallsBack(t *testing.T) {
	for _, chunk := range []int64{0, 1_000_000} {
		s := newServer(t)
		var fails atomic.Int64
		s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			if (r.Method == "PUT" || r.Method == "PATCH") && r.ContentLength >= 1_000_000 && fails.Add(1) == 3 {
				io.CopyN(io.Discard, r.Body, 999_999)
				panic(http.ErrAbortHandler)
			}
			// Before that, it fails when all has arrived.
			if r.Method == "PUT" && r.ContentLength >= 1_000_000 && fails.Load() < 3 {
				io.Copy(io.Discard, r.Body)
				status(500)(w, r)
				return true
			}
			return false
		})
		const size = 5_500_000
		r := openRemote(t, nil)
		pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, size))
		l := newProgressLog(t)
		l.falls = true
		_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: chunk, Progress: l.take})
		l.ended(err)
		if chunk == 0 && slices.IsSortedFunc(l.reports, func(a, b ocilocal.Progress) int { return int(a.Bytes - b.Bytes) }) {
			t.Error("it doesn't fall back")
		}
	}
}

// Progress goes on across attempts that bring little each. The bytes that a failed pull left count
// as skipped in the next one.
func TestProgressOfPieces(t *testing.T) {
	s := newServer(t)
	large, last := noise(1, 4<<20), noise(2, 100)
	s.put(t, "org/model", "v1", large, last, []byte{})
	s.cutAfter(700<<10, 5)
	r := openRemote(t, nil)
	cut := s.overrideNow()
	s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
		if strings.HasSuffix(q.URL.Path, string(digest.FromBytes(last))) {
			status(404)(w, q)
			return true
		}
		return cut(w, q)
	})
	l := newProgressLog(t)
	_, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Workers: 1, Progress: l.take})
	if l.ended(err); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Fatal(err)
	}
	s.behave()
	s.forget()
	l = newProgressLog(t)
	got, err := r.Pull(t.Context(), s.ref("org/model:v1"), &ocilocal.PullOptions{Progress: l.take})
	if p := l.ended(err); p.SkippedItems != 1 || p.SkippedBytes != int64(len(large)) || p.Items != 5 || got.BytesReceived != s.served() {
		t.Errorf("%+v, %+v", p, got)
	}
	s.noMount = true
	l = newProgressLog(t)
	_, err = r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{As: s.ref("org/other:v1"), Progress: l.take})
	if p := l.ended(err); p.Items != 5 {
		t.Errorf("%+v", p)
	}
}

// A registry answers before it has read a blob. The transport reads on, and the function is not
// called any more.
func TestPushProgressEnds(t *testing.T) {
	s := newServer(t)
	next := &http.Transport{DisableCompression: true}
	defer next.CloseIdleConnections()
	read, rest := make(chan struct{}), make(chan struct{})
	remote := &ocilocal.Remote{Client: &http.Client{Transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
		if r.Method != "PUT" || r.ContentLength < 1<<20 {
			return next.RoundTrip(r)
		}
		go func() {
			defer close(rest)
			defer r.Body.Close()
			io.CopyN(io.Discard, r.Body, 2<<20)
			close(read)
			io.Copy(io.Discard, r.Body)
		}()
		<-read
		return reply(r, 403, 0, http.NoBody), nil
	})}}
	r := openRemote(t, remote)
	pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(9, 8<<20))
	l := newProgressLog(t)
	_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{Progress: l.take})
	if l.ended(err); !errors.Is(err, ocilocal.ErrDenied) {
		t.Error(err)
	}
	<-rest
}

// While an item is under way, there is a report for each MiB or, at slower speeds, for each 200 ms.
func TestProgressThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, c := range map[string]struct {
			size, read int
			pause      time.Duration
			want       int
		}{
			"at once":      {64 << 20, 32 << 10, 0, 64},
			"10 KiB/s":     {100 << 10, 1 << 10, 100 * time.Millisecond, 50},
			"1 KiB/s":      {10 << 10, 1 << 10, time.Second, 10},
			"1 MiB/s":      {8 << 20, 1 << 20, time.Second, 8},
			"100 KiB once": {100 << 10, 100 << 10, 0, 1},
		} {
			reports := 0
			count, end := ocilocal.MeterItem(func(ocilocal.Progress) { reports++ }, ocispec.Descriptor{Digest: digest.FromString("x"), Size: int64(c.size)})
			for range c.size / c.read {
				time.Sleep(c.pause)
				count(c.read)
			}
			end()
			if reports != c.want {
				t.Errorf("%s: %d reports, want %d", name, reports, c.want)
			}
		}
	})
}

// Exports and imports count the manifests and blobs of what they are given. When they are made
// again, all is skipped where it can be.
func TestProgressOfFiles(t *testing.T) {
	r := openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/team/model:v1")
	a := pushed(t, r, ref, nil, nil, noise(1, 9<<20), noise(2, 1000), []byte{})
	size := a.Descriptor().Size + 9<<20 + 1000 + 2
	dir := t.TempDir()
	plan := []ocilocal.Phase{ocilocal.PhasePlan, ocilocal.PhaseBlobs, ocilocal.PhasePublish, ocilocal.PhaseDone}
	read := append([]ocilocal.Phase{ocilocal.PhaseRead}, plan...)
	archive := plan[:2:2]
	archive = append(archive, ocilocal.PhaseDone)
	layout, tar := filepath.Join(dir, "layout"), filepath.Join(dir, "a.tar")
	into := openTemp(t, nil)
	for _, c := range []struct {
		name    string
		do      func(fn func(ocilocal.Progress)) error
		skipped int
		phases  []ocilocal.Phase
	}{
		{"export layout", func(fn func(ocilocal.Progress)) error {
			return r.ExportLayout(t.Context(), layout, []ocilocal.Reference{ref}, &ocilocal.ExportOptions{Progress: fn})
		}, 0, plan},
		{"export layout again", func(fn func(ocilocal.Progress)) error {
			return r.ExportLayout(t.Context(), layout, []ocilocal.Reference{ref}, &ocilocal.ExportOptions{Progress: fn})
		}, 5, plan},
		{"export archive", func(fn func(ocilocal.Progress)) error {
			return r.ExportArchive(t.Context(), io.Discard, []ocilocal.Reference{ref}, &ocilocal.ExportOptions{Progress: fn, Gzip: true})
		}, 0, archive},
		{"export archive file", func(fn func(ocilocal.Progress)) error {
			return r.ExportArchiveFile(t.Context(), tar, []ocilocal.Reference{ref}, &ocilocal.ExportOptions{Progress: fn})
		}, 0, plan},
		{"import archive", func(fn func(ocilocal.Progress)) error {
			_, err := openTemp(t, nil).ImportPath(t.Context(), tar, &ocilocal.ImportOptions{Progress: fn})
			return err
		}, 0, read},
		{"import layout", func(fn func(ocilocal.Progress)) error {
			_, err := openTemp(t, nil).ImportLayout(t.Context(), layout, &ocilocal.ImportOptions{Progress: fn})
			return err
		}, 0, plan},
		{"copy", func(fn func(ocilocal.Progress)) error {
			_, err := into.ImportRegistry(t.Context(), r, ref, &ocilocal.ImportOptions{Progress: fn})
			return err
		}, 0, plan},
		{"copy again", func(fn func(ocilocal.Progress)) error {
			_, err := into.ImportRegistry(t.Context(), r, ref, &ocilocal.ImportOptions{Progress: fn})
			return err
		}, 5, plan},
		{"import layout again", func(fn func(ocilocal.Progress)) error {
			_, err := into.LoadPath(t.Context(), layout, &ocilocal.ImportOptions{Progress: fn})
			return err
		}, 5, plan},
		{"import archive again", func(fn func(ocilocal.Progress)) error {
			_, err := into.ImportArchiveFile(t.Context(), tar, &ocilocal.ImportOptions{Progress: fn})
			return err
		}, 5, read},
	} {
		l := newProgressLog(t)
		err := c.do(l.take)
		p := l.ended(err)
		if p.Items != 5 || p.Bytes != size || p.SkippedItems != c.skipped || c.skipped == 5 && p.SkippedBytes != size || c.skipped == 0 && p.SkippedBytes != 0 || !slices.Equal(l.phases(), c.phases) {
			t.Errorf("%s: %+v, %v, phases %v", c.name, p, err, l.phases())
		}
		under := 0
		for _, q := range l.reports {
			if q.Item.Size == 9<<20 && !q.ItemDone {
				under++
			}
		}
		if c.skipped == 0 && under == 0 {
			t.Errorf("%s: no report on the large blob under way", c.name)
		}
	}
	// What fails says so last.
	l := newProgressLog(t)
	_, err := into.ImportArchive(t.Context(), strings.NewReader("not an archive"), &ocilocal.ImportOptions{Progress: l.take})
	if l.ended(err); err == nil {
		t.Error("it was imported")
	}
}

// The calls of upkeep count what they read, copy, delete and heal.
func TestProgressOfUpkeep(t *testing.T) {
	r := openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/team/model:v1")
	a := pushed(t, r, ref, nil, nil, noise(1, 9<<20), noise(2, 1000))
	size := a.Descriptor().Size + 9<<20 + 1000 + 2
	old := pushed(t, r, ocilocal.MustParseReference("example.com/team/model:old"), nil, nil, noise(3, 5000))
	if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/team/model:old")); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "backup")
	good := filepath.Join(t.TempDir(), "good")
	if err := r.ExportLayout(t.Context(), good, []ocilocal.Reference{ref}, nil); err != nil {
		t.Fatal(err)
	}
	phases := func(more ...ocilocal.Phase) []ocilocal.Phase {
		return append(append([]ocilocal.Phase{ocilocal.PhasePlan}, more...), ocilocal.PhaseDone)
	}
	check := func(what string, l *progressLog, err error, items, skipped int, bytes int64, want []ocilocal.Phase) {
		t.Helper()
		if p := l.ended(err); p.Items != items || p.SkippedItems != skipped || p.Bytes != bytes || !slices.Equal(l.phases(), want) {
			t.Errorf("%s: %+v, %v, phases %v", what, p, err, l.phases())
		}
	}
	verify := func(r *ocilocal.LocalRegistry, o *ocilocal.VerifyOptions) (err error) {
		for _, err = range r.Verify(t.Context(), o) {
		}
		return err
	}
	l := newProgressLog(t)
	_, err := r.GCReport(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Progress: l.take})
	check("report", l, err, 0, 0, 0, phases())
	l = newProgressLog(t)
	report, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Progress: l.take})
	check("collection", l, err, 2, 0, old.Descriptor().Size+5000, phases(ocilocal.PhaseDelete))
	if n := report.Deleted.Manifests + report.Deleted.Blobs; n != 2 {
		t.Errorf("%+v", report)
	}
	l = newProgressLog(t)
	_, err = r.Backup(t.Context(), dir, &ocilocal.BackupOptions{Progress: l.take})
	check("backup", l, err, 4, 0, size, phases(ocilocal.PhaseBlobs, ocilocal.PhasePublish))
	l = newProgressLog(t)
	_, err = r.Backup(t.Context(), dir, &ocilocal.BackupOptions{Progress: l.take})
	check("second backup", l, err, 4, 4, size, phases(ocilocal.PhaseBlobs, ocilocal.PhasePublish))

	l = newProgressLog(t)
	err = verify(r, &ocilocal.VerifyOptions{Progress: l.take})
	check("verification", l, err, 4, 0, size, phases(ocilocal.PhaseBlobs))
	if !slices.ContainsFunc(l.reports, func(p ocilocal.Progress) bool { return p.ItemBytes > 0 && !p.ItemDone }) {
		t.Errorf("no report on the large blob under way: %+v", l.reports)
	}
	l = newProgressLog(t)
	err = verify(r, &ocilocal.VerifyOptions{Quick: true, Progress: l.take})
	check("quick verification", l, err, 4, 0, 0, phases(ocilocal.PhaseBlobs))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l = newProgressLog(t)
	for _, err = range r.Verify(ctx, &ocilocal.VerifyOptions{Progress: l.take}) {
	}
	l.ended(err)

	repaired := phases(ocilocal.PhaseBlobs, ocilocal.PhaseRepair, ocilocal.PhaseCheck)
	l = newProgressLog(t)
	l.twice = true
	_, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Progress: l.take})
	check("repair of nothing", l, err, 8, 0, 2*size, repaired)
	if err := os.Remove(blobFile(r, digest.FromBytes(noise(1, 9<<20)))); err != nil {
		t.Fatal(err)
	}
	l = newProgressLog(t)
	l.twice = true
	healed, err := r.Repair(t.Context(), &ocilocal.RepairOptions{Sources: []string{good}, Progress: l.take})
	check("repair", l, err, 9, 0, 2*size, repaired) // a missing blob is checked, healed, and checked again
	if len(healed.Healed) != 1 {
		t.Errorf("%+v", healed)
	}
}

// Imports of older registries count entries. Those that cannot be imported leave the totals.
func TestProgressOfOlderRegistries(t *testing.T) {
	o := newOMMXRoot(t, 2)
	o.add("ghcr.io/example/demo", "v1", "one")
	o.add("ghcr.io/example/demo", "v2", "two")
	o.ref("ghcr.io/example/demo", "missing", digest.FromString("missing"))
	legacy := legacyTree(t, map[string]string{"example.com/a/__v1": "", "example.com/a/__v2": "", "example.com/a/__v3": "example.com/other:v1"})
	r := openTemp(t, nil)
	for run := range 2 {
		for name, do := range map[string]func(context.Context, string, *ocilocal.LegacyOptions) (*ocilocal.LegacyReport, error){
			o.dir: r.ImportOMMX, legacy: r.ImportLegacy,
		} {
			l := newProgressLog(t)
			l.shrinks = true
			report, err := do(t.Context(), name, &ocilocal.LegacyOptions{Progress: l.take})
			if p := l.ended(err); p.Items != 2 || p.SkippedItems != 2*run || p.Bytes != 0 || report.Scanned != 3 || len(report.Failed) != 1 {
				t.Errorf("%s, run %d: %+v, %+v", name, run, p, report)
			}
		}
	}
}
