// The processes of TestHarness: each makes calls that chance picks, writes its history, and dies in
// the middle of a call.

package ocilocal_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["harness"] = harnessProcess }

// A harnessConfig says what one process of the harness does, and under which conditions.
type harnessConfig struct {
	Root      string // the root, by one of its names
	Dir       string // for the exports of this process
	Backup    string // the backup that all processes write to
	Log       string // where its history goes
	Clock     string // the file of the stampClock
	Server    string // a registry's host, or ""
	Worker    int
	Life      int
	Seed      uint64
	Ops       int  // after so many calls it kills itself
	StopAt    int  // after so many calls it asks to be stopped; 0 is never
	Routines  int  // goroutines that share one handle
	Cancel    int  // per cent of the calls that are cancelled
	Collector bool // it does little but collect
	Upkeep    bool // it does little but verify, repair and back up
	Busy      time.Duration
	NoFile    uint64   // limit of descriptors; 0 is none
	FileSize  uint64   // limit of a file's size; 0 is none
	Allow     []string // names in harnessAllowed
}

// harnessAllowed are the errors that the conditions of a mix explain. Any other error is a fault,
// above all an error that reports such a condition as damage.
var harnessAllowed = map[string][]error{
	"busy":     {ocilocal.ErrBusy},
	"space":    {ocilocal.ErrNoSpace},
	"files":    {syscall.EMFILE},
	"size":     {syscall.EFBIG, ocilocal.ErrNoSpace},
	"changed":  {syscall.EPERM, ocilocal.ErrIncomplete}, // a blob that can't be linked isn't held
	"closed":   {ocilocal.ErrClosed},
	"canceled": {context.Canceled},
	"remote":   {ocilocal.ErrTransport},
	"index":    {ocilocal.ErrIndexIO},
}

// damage are errors that no condition explains, even if they match other sentinels too.
var damage = []error{
	ocilocal.ErrCorruptIndex, ocilocal.ErrForeignIndex, ocilocal.ErrNewerSchema, ocilocal.ErrDigestMismatch,
	ocilocal.ErrSizeMismatch, ocilocal.ErrInvalidManifest, ocilocal.ErrInvalidLayout, ocilocal.ErrUnsafe,
}

func isAny(err error, targets []error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}

const harnessRefs = 24

// harnessRef returns one of the refs that all processes write to. Some are spelled so that an
// index could take them for others.
func harnessRef(n int) ocilocal.Reference {
	text := [...]string{
		"example.com/harness/r%d:v1", "example.com/harness:r%d", "localhost:5000/harness/r%d:V1", "[::1]:5000/r%d:v1",
		"docker.io/library/r%d:latest", "example.com/harness/r%d:sha256__0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
	}[n%6]
	return ocilocal.MustParseReference(fmt.Sprintf(text, n/6))
}

// harnessLayers returns the layers of the artifact with a label.
func harnessLayers(label string) [][]byte {
	h := sha256.Sum256([]byte(label))
	size := int(h[0]) * 16
	switch {
	case h[1] < 4:
		size = 700 << 10
	case h[1] < 24:
		size = 60 << 10
	}
	layers := [][]byte{append([]byte(label), noise(h[2], size)...)}
	for i := range int(h[3] % 3) {
		layers = append(layers, poolLayer(int(h[4+i]%8)))
	}
	return layers
}

func harnessFormat(label string) ocilocal.ManifestFormat {
	if sha256.Sum256([]byte(label))[8]%2 == 0 {
		return ocilocal.FormatImageManifest
	}
	return ocilocal.FormatArtifactManifest
}

// A harnessWorker is a process of the harness.
type harnessWorker struct {
	harnessConfig
	allowed []error
	clock   *stampClock
	remote  *ocilocal.Remote
	r       atomic.Pointer[ocilocal.LocalRegistry]
	calls   atomic.Int64

	mu     sync.Mutex // guards what follows
	log    *os.File
	ids    int
	builds []builtArtifact
}

type builtArtifact struct {
	label string
	desc  ocispec.Descriptor
}

func harnessProcess(in *bufio.Scanner, args []string) error {
	signal.Ignore(syscall.SIGXFSZ)
	w := &harnessWorker{}
	err := json.Unmarshal([]byte(args[0]), &w.harnessConfig)
	if err != nil {
		return err
	}
	if w.clock, err = openClock(w.Clock); err != nil {
		return err
	}
	if w.log, err = os.OpenFile(w.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return err
	}
	for _, name := range w.Allow {
		w.allowed = append(w.allowed, harnessAllowed[name]...)
	}
	if w.Server != "" {
		w.remote = &ocilocal.Remote{Retry: func(attempt int, err error) (time.Duration, bool) { return time.Millisecond, attempt < 4 }}
	}
	endWithParent(in)
	for which, limit := range map[int]uint64{syscall.RLIMIT_NOFILE: w.NoFile, syscall.RLIMIT_FSIZE: w.FileSize} {
		if limit == 0 {
			continue
		}
		if err := syscall.Setrlimit(which, &syscall.Rlimit{Cur: limit, Max: limit}); err != nil {
			return err
		}
	}
	for w.open() != nil {
	}
	for i := range w.Routines {
		go w.work(rand.New(rand.NewPCG(w.Seed, uint64(i))))
	}
	select {}
}

// record writes a line of the history.
func (w *harnessWorker) record(r logLine) {
	line, err := json.Marshal(r)
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		_, err = w.log.Write(append(line, '\n'))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "history:", err)
		os.Exit(4)
	}
}

func (w *harnessWorker) fault(format string, args ...any) {
	w.record(logLine{Kind: "fault", Text: fmt.Sprintf("worker %d.%d: ", w.Worker, w.Life) + fmt.Sprintf(format, args...)})
}

// counted is called after each call. It ends the process where the configuration says so: some
// time later, so that death comes in the middle of another call.
func (w *harnessWorker) counted(name, outcome string) {
	w.record(logLine{Kind: "op", Text: name + " " + outcome})
	n := int(w.calls.Add(1))
	if n%8 == 0 {
		say("tick")
	}
	if n == w.StopAt {
		say("stop")
	}
	if n == w.Ops {
		time.AfterFunc(time.Duration(rand.IntN(4000))*time.Microsecond, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
	}
}

// judge returns the outcome of a call that changes something: "ok", "no" for an error that says
// that nothing was changed, and "maybe". no are the errors of the first kind.
func (w *harnessWorker) judge(name string, err error, no ...error) string {
	_, typed := errors.AsType[*ocilocal.Error](err)
	switch {
	case err == nil:
		return "ok"
	case !typed:
		w.fault("%s: error without a type: %v", name, err)
	case isAny(err, no) || isAny(err, w.allowed) && errors.Is(err, ocilocal.ErrClosed):
		return "no"
	case isAny(err, damage) || !isAny(err, w.allowed):
		w.fault("%s: %v", name, err)
	}
	return "maybe"
}

// call makes one call, which may be cancelled, and judges its error.
func (w *harnessWorker) call(rng *rand.Rand, name string, fn func(ctx context.Context, r *ocilocal.LocalRegistry) error, no ...error) (string, error) {
	ctx := context.Background()
	if rng.IntN(100) < w.Cancel {
		c, cancel := context.WithCancel(ctx)
		defer cancel()
		if ctx = c; rng.IntN(8) == 0 {
			cancel()
		} else {
			defer time.AfterFunc(time.Duration(rng.ExpFloat64()*1500)*time.Microsecond, cancel).Stop()
		}
	}
	err := fn(ctx, w.r.Load())
	outcome := w.judge(name, err, no...)
	w.counted(name, outcome)
	return outcome, err
}

// change makes a call that is to point ref at a label.
func (w *harnessWorker) change(rng *rand.Rand, name string, ref ocilocal.Reference, label string, fn func(ctx context.Context, r *ocilocal.LocalRegistry) error, no ...error) bool {
	w.mu.Lock()
	w.ids++
	id := w.ids
	w.mu.Unlock()
	w.record(logLine{Kind: "try", ID: id, Start: w.clock.next(), Ref: ref.String(), Label: label, Text: fmt.Sprintf("%s of %d.%d", name, w.Worker, w.Life)})
	outcome, err := w.call(rng, name, fn, no...)
	end := logLine{Kind: "end", ID: id, End: w.clock.next(), Text: outcome}
	if err != nil {
		end.Label = err.Error()
	}
	w.record(end)
	return outcome == "ok"
}

// open opens the root and closes the handle before it, possibly under calls of other goroutines.
func (w *harnessWorker) open() error {
	r, err := ocilocal.Open(context.Background(), w.Root, &ocilocal.Options{BusyTimeout: w.Busy, Remote: w.remote})
	w.counted("open", w.judge("open", err))
	if err != nil {
		return err
	}
	if old := w.r.Swap(r); old != nil {
		err = old.Close()
		w.counted("close", w.judge("close", err))
	}
	return nil
}

func (w *harnessWorker) built(label string, desc ocispec.Descriptor) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.builds = append(w.builds, builtArtifact{label, desc})
}

// earlier returns an artifact that this process has seen before. It may be gone.
func (w *harnessWorker) earlier(rng *rand.Rand) (builtArtifact, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.builds) == 0 {
		return builtArtifact{}, false
	}
	return w.builds[rng.IntN(len(w.builds))], true
}

// work makes calls that chance picks until the process dies.
func (w *harnessWorker) work(rng *rand.Rand) {
	type step struct {
		weight int
		do     func(*rand.Rand)
	}
	steps := []step{
		{30, w.build}, {10, w.tag}, {8, w.remove}, {16, w.read}, {3, w.list}, {5, w.archive}, {4, w.layout}, {3, w.convert},
		{4, w.anonymous}, {3, w.giveUp}, {4, w.collect}, {2, w.look}, {2, w.verify}, {1, w.repair}, {1, w.backup},
		{3, func(*rand.Rand) { w.open() }}, {1, w.readOnly},
	}
	switch {
	case w.Collector:
		steps = []step{{20, w.collect}, {5, w.remove}, {2, w.tag}, {2, w.look}, {1, func(*rand.Rand) { w.open() }}}
	case w.Upkeep:
		steps = []step{{4, w.verify}, {4, w.repair}, {4, w.backup}, {3, w.look}, {2, w.build}, {1, w.collect}}
	}
	if w.Server != "" {
		steps = append(steps, step{20, w.pull}, step{10, w.push})
	}
	total := 0
	for _, s := range steps {
		total += s.weight
	}
	for {
		n := rng.IntN(total)
		for _, s := range steps {
			if n -= s.weight; n < 0 {
				s.do(rng)
				break
			}
		}
	}
}
