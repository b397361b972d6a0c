package ocilocal_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// A mix is one set of conditions under which the processes of a round run.
type mix struct {
	name  string
	setUp func(t *testing.T, h *harnessRound)
}

// A harnessRound is a root and the processes that use it.
type harnessRound struct {
	root  string                                 // by the name that the parent uses
	each  func(c *harnessConfig, rng *rand.Rand) // changes what a process does; nil changes nothing
	start func(t *testing.T, off *rand.Rand, args string) *worker
	tick  func(n int) // is called for every eighth call of a process; nil does nothing
	calm  func()      // ends what makes calls fail; nil does nothing

	server  *server
	history *rootHistory
	clock   *stampClock
	rng     *rand.Rand
	kills   int
	stops   int
}

// serially makes fn run for one tick at a time.
func serially(fn func()) func(int) {
	var mu sync.Mutex
	return func(int) {
		mu.Lock()
		defer mu.Unlock()
		fn()
	}
}

// fullDisk makes a file system of 20 MB full and free by turns.
func (h *harnessRound) fullDisk(t *testing.T, mnt string) {
	h.root = filepath.Join(mnt, "root")
	disk := diskFiller{filepath.Join(mnt, "filler")}
	ticks := 0
	h.tick = serially(func() {
		var err error
		switch ticks++; ticks % 6 {
		case 2, 3:
			err = disk.fill()
		case 5:
			err = disk.free()
		}
		if err != nil {
			t.Error(err)
		}
	})
	h.calm = func() {
		if err := disk.free(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
	// A page of SQLite's shared memory that finds no block is an I/O error.
	h.each = func(c *harnessConfig, _ *rand.Rand) { c.Allow = []string{"space", "index"} }
}

// mixes are the conditions of TestHarness. The first one is that of the quick size.
var mixes = []mix{
	{"plain", func(*testing.T, *harnessRound) {}},
	{"stopped", func(_ *testing.T, h *harnessRound) { // longer than the others wait for the lock
		h.each = func(c *harnessConfig, rng *rand.Rand) {
			c.Busy, c.Allow = 200*time.Millisecond, []string{"busy"}
			if rng.IntN(2) == 0 {
				c.StopAt = 1 + rng.IntN(c.Ops)
			}
		}
	}},
	{"full tmpfs", func(t *testing.T, h *harnessRound) { h.fullDisk(t, mountTmpfs(t, "size=20m")) }},
	{"full ext4", func(t *testing.T, h *harnessRound) { h.fullDisk(t, mountExt4(t, 20<<20)) }},
	{"clocks", func(t *testing.T, h *harnessRound) {
		binary := clockBinary(t)
		h.start = func(t *testing.T, rng *rand.Rand, args string) *worker {
			off := clockEnv + "=" + strconv.FormatInt(daysOff(rng, 700), 10)
			return startCommand(t, "harness", exec.Command("env", off, binary, args))
		}
	}},
	{"descriptors", func(_ *testing.T, h *harnessRound) {
		h.each = func(c *harnessConfig, rng *rand.Rand) {
			c.NoFile, c.Routines, c.Allow = 32, 1+rng.IntN(8), []string{"files", "closed", "index"}
		}
	}},
	{"file size", func(_ *testing.T, h *harnessRound) {
		h.each = func(c *harnessConfig, rng *rand.Rand) {
			c.FileSize, c.Allow = uint64(64+rng.IntN(900))<<10, []string{"size", "index"}
		}
	}},
	{"names", func(t *testing.T, h *harnessRound) { // the root, a link to it, and a bind mount
		if err := os.Mkdir(h.root, 0o700); err != nil {
			t.Fatal(err)
		}
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(h.root, link); err != nil {
			t.Fatal(err)
		}
		names := []string{h.root, link, mountBind(t, h.root)}
		h.each = func(c *harnessConfig, rng *rand.Rand) { c.Root = names[rng.IntN(len(names))] }
	}},
	{"immutable", func(t *testing.T, h *harnessRound) { // blobs can't be removed for a while
		h.root = filepath.Join(mountExt4(t, 64<<20), "root")
		ticks := 0
		var held []string
		turn := func(on bool) {
			if on {
				names, err := filepath.Glob(filepath.Join(h.root, "blobs", "*", "*"))
				if err != nil {
					t.Error(err)
				}
				held = append(held, names[:len(names)/2]...)
			}
			if err := setImmutable(on, held...); err != nil {
				t.Error(err)
			}
			if !on {
				held = nil
			}
		}
		h.tick = serially(func() { ticks++; turn(ticks%4 < 2) })
		h.calm = func() { turn(false) }
		h.each = func(c *harnessConfig, _ *rand.Rand) { c.Allow = []string{"changed"} }
	}},
	{"closing", func(_ *testing.T, h *harnessRound) { // under calls
		h.each = func(c *harnessConfig, _ *rand.Rand) { c.Routines, c.Allow = 6, []string{"closed"} }
	}},
	{"cancelled", func(_ *testing.T, h *harnessRound) {
		h.each = func(c *harnessConfig, _ *rand.Rand) { c.Cancel, c.Allow = 60, []string{"canceled"} }
	}},
	{"collectors", func(_ *testing.T, h *harnessRound) {
		h.each = func(c *harnessConfig, _ *rand.Rand) { c.Collector = c.Worker%2 == 0 }
	}},
	{"upkeep", func(_ *testing.T, h *harnessRound) {
		h.each = func(c *harnessConfig, _ *rand.Rand) { c.Upkeep = c.Worker%2 == 0 }
	}},
	{"remote", func(t *testing.T, h *harnessRound) { // a registry whose answers break off
		h.server = remoteArtifacts(t)
		var n atomic.Int64
		h.server.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
			switch n.Add(1) % 13 {
			case 3:
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			case 7:
				panic(http.ErrAbortHandler)
			}
			return false
		})
		h.each = func(c *harnessConfig, _ *rand.Rand) { c.Server, c.Allow = h.server.host, []string{"remote"} }
	}},
	{"goroutines", func(_ *testing.T, h *harnessRound) { // that share commits, and everything at once
		h.each = func(c *harnessConfig, rng *rand.Rand) {
			c.Routines, c.Cancel, c.Allow = 16, 20, []string{"closed", "canceled"}
			c.Ops *= 4
		}
	}},
}

// TestHarness lets processes make every kind of call of the public API on one root, and kills each
// process in the middle of a call. The conditions differ from mix to mix. The judge knows the calls
// from the processes' logs, and the root from its own SQL and hashing. After each round it checks
// that
//   - no acknowledged change is lost, and no read returned a value that the ref cannot have had;
//   - no ref dangles, and no ref has a name that no call gave;
//   - every blob file hashes to its name;
//   - a collection leaves exactly the closure of the refs;
//   - every error had a type and an explanation in the mix, and none reported damage.
func TestHarness(t *testing.T) {
	t.Parallel()
	processes, lives, run := scaled(4, 8, 8), scaled(1, 2, 2), mixes
	if deepLevel() == 0 {
		run = mixes[:1]
	}
	each := len(run) * processes * lives
	rounds := (scaled(each, 200, 10_000) + each - 1) / each
	all, calls, restored := 0, 0, 0
	for _, m := range run {
		t.Run(m.name, func(t *testing.T) {
			for range rounds {
				h := m.round(t, processes, lives)
				all += h.kills
				restored++
				n := 0
				for _, times := range h.history.ops {
					n += times
				}
				calls += n
				t.Logf("%d kills, %d stops, %d calls: %v", h.kills, h.stops, n, h.history.ops)
				if t.Failed() {
					return
				}
			}
		})
	}
	t.Logf("%d rounds, %d kills, %d calls", restored, all, calls)
}

// round starts processes on a new root until each has died so many times, and judges what is left.
func (m mix) round(t *testing.T, processes, lives int) *harnessRound {
	dir := t.TempDir()
	seed := rand.Uint64()
	h := &harnessRound{root: filepath.Join(dir, "root"), history: newHistory(), rng: rand.New(rand.NewPCG(seed, 0))}
	h.start = func(t *testing.T, _ *rand.Rand, args string) *worker { return startWorker(t, "harness", args) }
	m.setUp(t, h)
	clock := filepath.Join(dir, "clock")
	var err error
	if h.clock, err = openClock(clock); err != nil {
		t.Fatal(err)
	}
	defer h.clock.close()
	backup := filepath.Join(filepath.Dir(h.root), "backup")
	var mu sync.Mutex // guards h
	var wg sync.WaitGroup
	for i := range processes {
		rng := rand.New(rand.NewPCG(seed, uint64(i+1)))
		wg.Go(func() {
			for life := range lives {
				c := harnessConfig{
					Root: h.root, Dir: filepath.Join(filepath.Dir(h.root), fmt.Sprint("out", i)), Backup: backup, Clock: clock,
					Log: filepath.Join(dir, fmt.Sprintf("log.%d.%d", i, life)), Worker: i, Life: life,
					Seed: rng.Uint64(), Ops: 5 + rng.IntN(60), Routines: 1, Busy: 5 * time.Minute,
				}
				if err := os.MkdirAll(c.Dir, 0o755); err != nil && !errors.Is(err, syscall.ENOSPC) {
					t.Error(err)
					return
				}
				if h.each != nil {
					h.each(&c, rng)
				}
				args, err := json.Marshal(c)
				if err != nil {
					t.Error(err)
					return
				}
				stops := h.live(t, h.start(t, rng, string(args)), fmt.Sprintf("%d.%d", i, life))
				death := h.clock.next()
				mu.Lock()
				h.stops += stops
				h.kills++
				err = h.history.replay(c.Log, death)
				mu.Unlock()
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if h.calm != nil {
		h.calm()
	}
	h.judge(t, backup)
	if t.Failed() {
		t.Logf("mix %s, seed %d; calls %v", m.name, seed, h.history.ops)
	}
	return h
}

// live waits for the death of a process, and stops it for a while where it asks for that.
func (h *harnessRound) live(t *testing.T, w *worker, name string) (stops int) {
	limit := time.AfterFunc(5*time.Minute, func() {
		t.Errorf("worker %s hangs", name)
		w.cmd.Process.Signal(syscall.SIGQUIT)
	})
	defer limit.Stop()
	for n := 1; w.out.Scan(); {
		switch w.out.Text() {
		case "tick":
			if h.tick != nil {
				h.tick(n)
			}
			n++
		case "stop":
			stops++
			if err := w.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				continue // killed before
			}
			time.Sleep(500 * time.Millisecond) // more than others wait for what it may have locked
			w.cmd.Process.Signal(syscall.SIGCONT)
		}
	}
	said := w.end()
	if status, ok := w.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL || w.stderr.Len() > 0 {
		t.Errorf("worker %s ended by itself: %.4000s", name, said)
	}
	return stops
}

// judge looks at the root, which no process uses any more.
func (h *harnessRound) judge(t *testing.T, backup string) {
	t.Helper()
	for i, p := range h.history.problems() {
		if i == 20 {
			t.Errorf("… and %d more", len(h.history.problems())-i)
			break
		}
		t.Error(p)
	}
	end := h.clock.next()
	want := h.history.model(end)
	r := mustOpen(t, h.root)
	for ref, err := range r.AnonymousRefs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if label, err := readLabelled(r, ref.Reference.String()); err != nil || !h.history.anonymous[label] {
			t.Errorf("%s reads %q, %v", ref.Reference, label, err)
		}
	}
	if _, err := r.PruneAnonymous(t.Context(), &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	for _, ref := range slices.Sorted(maps.Keys(want)) {
		label, err := readLabelled(r, ref)
		if errors.Is(err, ocilocal.ErrNotFound) {
			if ok, existsErr := r.Exists(t.Context(), ocilocal.MustParseReference(ref)); !ok && existsErr == nil {
				label, err = "", nil
			}
		}
		if err != nil || !slices.Contains(want[ref], label) {
			t.Errorf("%s reads %q, %v; possible were %.20q", ref, label, err, want[ref])
		}
	}
	const last = "example.com/harness/last:v1" // sweeps what the dead have left in tmp/
	if _, err := publishLabelled(r, last, "last", ocilocal.Replace, []byte("last")); err != nil {
		t.Fatal(err)
	}
	want[last] = []string{"last"}
	mustClose(t, r)
	checkStore(t, h.root, want)

	for _, drop := range []bool{false, true} {
		r = mustOpen(t, h.root)
		opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: drop}
		if report, err := r.GC(t.Context(), opts); err != nil || len(report.Missing) > 0 {
			t.Errorf("the last collection: %v, missing %v", err, report.Missing)
		}
		if again, err := r.GC(t.Context(), opts); err != nil || again.Orphans != (ocilocal.Count{}) {
			t.Errorf("a collection leaves %+v, %v to the next", again.Orphans, err)
		}
		mustClose(t, r)
		checkCollected(t, h.root, want)
	}
	h.judgeBackup(t, backup)
}

// judgeBackup looks at the backup, which holds what the registry held at some moment.
func (h *harnessRound) judgeBackup(t *testing.T, backup string) {
	t.Helper()
	if _, err := os.Lstat(filepath.Join(backup, "index.sqlite3")); errors.Is(err, fs.ErrNotExist) {
		return
	}
	want := model{}
	for ref, events := range h.history.events {
		want[ref] = []string{""}
		for _, e := range events {
			want[ref] = append(want[ref], e.label)
		}
	}
	r := mustOpen(t, backup)
	if _, err := r.PruneAnonymous(t.Context(), &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	if report, err := r.GC(t.Context(), atOnce); err != nil || len(report.Missing) > 0 {
		t.Errorf("a collection in the backup: %v, missing %v", err, report.Missing)
	}
	mustClose(t, r)
	checkStore(t, backup, want)
}
