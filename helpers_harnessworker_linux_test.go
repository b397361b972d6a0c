// The processes of TestHarness: each makes calls that chance picks, writes its history, and dies in
// the middle of a call.

package ocilocal_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
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

// damage are errors that no condition explains, whatever else an error matches.
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
	go func() { // the parent is gone when its end of the pipe is
		for in.Scan() {
		}
		os.Exit(3)
	}()
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

func (w *harnessWorker) newLabel(kind string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids++
	return fmt.Sprintf("%s%d.%d.%d", kind, w.Worker, w.Life, w.ids)
}

// fillBuilder adds what the artifact with a label has.
func (w *harnessWorker) fillBuilder(ctx context.Context, b *ocilocal.Builder, label string, subject *ocispec.Descriptor) error {
	if err := b.SetAnnotation(labelKey, label); err != nil {
		return err
	}
	if subject != nil {
		if err := b.SetSubject(*subject); err != nil {
			return err
		}
	}
	for i, l := range harnessLayers(label) {
		if i > 0 { // what others have too: taken over if it is there
			desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(l), Size: int64(len(l))}
			err := b.AddExistingLayer(ctx, desc)
			if err == nil {
				continue
			}
			if !errors.Is(err, ocilocal.ErrNotFound) {
				return err
			}
		}
		if _, err := b.AddLayer(ctx, "application/octet-stream", bytes.NewReader(l), nil); err != nil {
			return err
		}
	}
	return nil
}

func (w *harnessWorker) build(rng *rand.Rand) {
	ref, label := harnessRef(rng.IntN(harnessRefs)), w.newLabel("w")
	opts := &ocilocal.BuilderOptions{ArtifactType: testType, Format: harnessFormat(label)}
	opts.Policy = ocilocal.Policy(rng.IntN(2))
	var subject *ocispec.Descriptor
	if e, ok := w.earlier(rng); ok && rng.IntN(4) == 0 {
		subject = &e.desc
	}
	swap := rng.IntN(6) == 0
	w.change(rng, "build", ref, label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		if swap {
			d, err := r.Resolve(ctx, ref)
			if err != nil && !errors.Is(err, ocilocal.ErrNotFound) {
				return err
			}
			opts.Expected = d.Digest
		}
		b, err := r.NewBuilder(ref, opts)
		if err != nil {
			return err
		}
		defer b.Cancel()
		if err := w.fillBuilder(ctx, b, label, subject); err != nil {
			return err
		}
		a, err := b.Build(ctx)
		if err == nil {
			w.built(label, a.Descriptor())
		}
		return err
	}, ocilocal.ErrConflict)
}

func (w *harnessWorker) anonymous(rng *rand.Rand) {
	if rng.IntN(4) == 0 {
		w.call(rng, "prune", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
			_, err := r.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace})
			return err
		})
		return
	}
	label := w.newLabel("a")
	w.record(logLine{Kind: "anonymous", Label: label})
	w.call(rng, "anonymous", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		b, err := r.NewAnonymousBuilder(&ocilocal.BuilderOptions{ArtifactType: testType, Format: harnessFormat(label)})
		if err != nil {
			return err
		}
		defer b.Cancel()
		if err := w.fillBuilder(ctx, b, label, nil); err != nil {
			return err
		}
		_, err = b.Build(ctx)
		return err
	})
}

func (w *harnessWorker) giveUp(rng *rand.Rand) {
	w.call(rng, "give up", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		b, err := r.NewBuilder(harnessRef(0), &ocilocal.BuilderOptions{ArtifactType: testType})
		if err != nil {
			return err
		}
		if err := w.fillBuilder(ctx, b, w.newLabel("g"), nil); err != nil {
			b.Cancel()
			return err
		}
		return b.Cancel()
	})
}

func (w *harnessWorker) tag(rng *rand.Rand) {
	e, ok := w.earlier(rng)
	if !ok {
		return
	}
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "tag", ref, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Tag(ctx, e.desc.Digest, ref, &ocilocal.PublishOptions{Policy: ocilocal.Policy(rng.IntN(2))})
		return err
	}, ocilocal.ErrConflict, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
}

func (w *harnessWorker) remove(rng *rand.Rand) {
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "remove", ref, "", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Remove(ctx, ref)
		return err
	}, ocilocal.ErrNotFound)
}

// read reads all that a ref leads to. Between two steps it may be moved, and collected.
func (w *harnessWorker) read(rng *rand.Rand) {
	ref := harnessRef(rng.IntN(harnessRefs))
	if w.Server != "" && rng.IntN(2) == 0 {
		ref = ocilocal.MustParseReference(w.Server + "/" + remoteName(rng.IntN(remoteRefs)))
	}
	start := w.clock.next()
	w.call(rng, "read", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		desc, err := r.Resolve(ctx, ref)
		end := w.clock.next()
		if errors.Is(err, ocilocal.ErrNotFound) {
			w.record(logLine{Kind: "read", Start: start, End: end, Ref: ref.String()})
			return nil
		}
		if err != nil {
			return err
		}
		label, err := w.contents(ctx, r, desc, rng.IntN(2) == 0)
		if errors.Is(err, ocilocal.ErrNotFound) {
			now, resolveErr := r.Resolve(ctx, ref)
			if errors.Is(resolveErr, ocilocal.ErrNotFound) || resolveErr == nil && now.Digest != desc.Digest {
				return nil
			}
			if resolveErr == nil && w.movedSince(ctx, r, ref, desc) {
				return nil
			}
			w.fault("%s leads to %s, which is not whole: %v, %v", ref, desc.Digest, err, resolveErr)
			return nil
		}
		if err == nil {
			w.record(logLine{Kind: "read", Start: start, End: end, Ref: ref.String(), Label: label})
			w.built(label, desc)
		}
		return err
	})
}

// movedSince reports whether a ref has moved since a blob of its artifact was missing. It may also
// have moved away and back, with a collection in between; then the artifact is whole now.
func (w *harnessWorker) movedSince(ctx context.Context, r *ocilocal.LocalRegistry, ref ocilocal.Reference, desc ocispec.Descriptor) bool {
	for range 3 {
		if _, err := w.contents(ctx, r, desc, false); err == nil {
			return true
		}
		if now, err := r.Resolve(ctx, ref); err != nil || now.Digest != desc.Digest {
			return true
		}
	}
	return false
}

// contents reads an artifact, compares it with what its label says, and returns the label.
func (w *harnessWorker) contents(ctx context.Context, r *ocilocal.LocalRegistry, desc ocispec.Descriptor, viaFS bool) (string, error) {
	a, err := r.LoadDigest(ctx, desc.Digest)
	if err != nil {
		return "", err
	}
	annotations, err := a.Annotations(ctx)
	if err != nil {
		return "", err
	}
	label := annotations[labelKey]
	layers, err := a.Layers(ctx)
	if err != nil {
		return "", err
	}
	var want [][]byte
	if !strings.HasPrefix(label, "remote") {
		want = harnessLayers(label)
		if len(want) != len(layers) {
			w.fault("%s has %d layers, want %d", label, len(layers), len(want))
			return label, nil
		}
	}
	for i, l := range layers {
		var body []byte
		if viaFS {
			tree, err := a.FS(ctx)
			if err != nil {
				return "", err
			}
			body, err = fs.ReadFile(tree, l.Digest.String())
			if errors.Is(err, fs.ErrNotExist) {
				err = &ocilocal.Error{Op: "read", Err: ocilocal.ErrNotFound}
			}
			if err != nil {
				if cause := errors.Unwrap(err); cause != nil {
					err = &ocilocal.Error{Op: "read", Err: cause}
				}
				return "", err
			}
		} else if body, err = a.ReadLayer(ctx, l); err != nil {
			return "", err
		}
		if want != nil && !bytes.Equal(body, want[i]) {
			w.fault("layer %d of %s has %d wrong bytes", i, label, len(body))
		}
	}
	return label, nil
}

// list lists all refs. Each must have a name that a call gave.
func (w *harnessWorker) list(rng *rand.Rand) {
	w.call(rng, "list", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		for ref, err := range r.Refs(ctx, nil) {
			if err != nil {
				return err
			}
			known := strings.HasSuffix(ref.Reference.Name(), ".ocilocal.local/anonymous") || w.Server != "" && ref.Reference.Registry() == w.Server
			for n := range harnessRefs {
				known = known || ref.Reference == harnessRef(n)
			}
			if !known {
				w.fault("%s is listed, and no call made it", ref.Reference)
			}
		}
		return nil
	})
}

// source picks an artifact, reads it, and so knows its label.
func (w *harnessWorker) source(rng *rand.Rand) (e builtArtifact, ok bool) {
	ref := harnessRef(rng.IntN(harnessRefs))
	w.call(rng, "source", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		desc, err := r.Resolve(ctx, ref)
		if err != nil {
			return err
		}
		label, err := w.contents(ctx, r, desc, false)
		e, ok = builtArtifact{label, desc}, err == nil
		return err
	}, ocilocal.ErrNotFound)
	return e, ok
}

// archive exports an artifact to an archive, and imports that under another name.
func (w *harnessWorker) archive(rng *rand.Rand) {
	e, ok := w.source(rng)
	if !ok {
		return
	}
	opts := &ocilocal.ExportOptions{Digests: []digest.Digest{e.desc.Digest}, Gzip: rng.IntN(2) == 0, Overwrite: true}
	name := filepath.Join(w.Dir, "archive.tar")
	var buf bytes.Buffer
	toFile := rng.IntN(2) == 0
	outcome, _ := w.call(rng, "export archive", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		if toFile {
			return r.ExportArchiveFile(ctx, name, nil, opts)
		}
		return r.ExportArchive(ctx, &buf, nil, opts)
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
	if outcome != "ok" {
		return
	}
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "import archive", ref, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) (err error) {
		im := &ocilocal.ImportOptions{Select: e.desc.Digest.String(), Reference: ref, PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Policy(rng.IntN(2))}}
		if toFile {
			_, err = r.ImportArchiveFile(ctx, name, im)
		} else {
			_, err = r.ImportArchive(ctx, &buf, im)
		}
		return err
	}, ocilocal.ErrConflict, ocilocal.ErrNotFound) // another goroutine may have replaced the file
}

// layout does the same with a directory, to which one export after another adds.
func (w *harnessWorker) layout(rng *rand.Rand) {
	e, ok := w.source(rng)
	if !ok {
		return
	}
	dir := filepath.Join(w.Dir, "layout")
	outcome, _ := w.call(rng, "export layout", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		return r.ExportLayout(ctx, dir, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{e.desc.Digest}, Overwrite: true})
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
	if outcome != "ok" {
		return
	}
	ref := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "import layout", ref, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.ImportLayout(ctx, dir, &ocilocal.ImportOptions{Select: e.desc.Digest.String(), Reference: ref,
			PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Policy(rng.IntN(2))}})
		return err
	}, ocilocal.ErrConflict)
}

func (w *harnessWorker) convert(rng *rand.Rand) {
	e, ok := w.source(rng)
	if !ok {
		return
	}
	dst := harnessRef(rng.IntN(harnessRefs))
	w.change(rng, "convert", dst, e.label, func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		src, err := dst.WithDigest(e.desc.Digest)
		if err != nil {
			return err
		}
		_, err = r.Convert(ctx, src, dst, &ocilocal.ConvertOptions{Subject: ocilocal.SubjectNone,
			PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}})
		return err
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
}

func (w *harnessWorker) collect(rng *rand.Rand) {
	opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, KeepReferrers: rng.IntN(3) == 0}
	if rng.IntN(8) == 0 {
		opts.Grace = 0
	}
	if e, ok := w.earlier(rng); ok && rng.IntN(4) == 0 {
		opts.Protect = []digest.Digest{e.desc.Digest}
	}
	w.call(rng, "gc", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		report, err := r.GC(ctx, opts)
		if report != nil && (len(report.Invalid) > 0 || len(report.Foreign) > 0 || report.Unreconciled) {
			w.fault("gc: invalid %v, foreign %q, unreconciled %v", report.Invalid, report.Foreign, report.Unreconciled)
		}
		return err
	})
}

// look asks for all that is only counted.
func (w *harnessWorker) look(rng *rand.Rand) {
	w.call(rng, "stats", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Stats(ctx)
		return err
	})
	w.call(rng, "gc report", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.GCReport(ctx, nil)
		return err
	})
	w.call(rng, "history", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		a, err := r.Load(ctx, harnessRef(rng.IntN(harnessRefs)))
		if err != nil {
			return err
		}
		for _, err := range a.History(ctx) {
			if err != nil {
				return err
			}
		}
		return nil
	}, ocilocal.ErrNotFound)
}

func (w *harnessWorker) verify(rng *rand.Rand) {
	w.call(rng, "verify", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		for p, err := range r.Verify(ctx, &ocilocal.VerifyOptions{Quick: rng.IntN(2) == 0}) {
			if err != nil {
				return err
			}
			if p.Kind != ocilocal.ProblemUnrecorded && p.Kind != ocilocal.ProblemCollected && p.Kind != ocilocal.ProblemMissing {
				w.fault("verify: %v", p)
			}
		}
		return nil
	})
}

// repair finds no damage. It may record or rewrite what other processes are working on.
func (w *harnessWorker) repair(rng *rand.Rand) {
	w.call(rng, "repair", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		report, err := r.Repair(ctx, nil)
		if report != nil && len(report.Healed)+len(report.Quarantined)+len(report.Recovered) > 0 {
			w.fault("repair of a sound registry: %+v", report)
		}
		return err
	})
}

func (w *harnessWorker) backup(rng *rand.Rand) {
	w.call(rng, "backup", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		report, err := r.Backup(ctx, w.Backup, nil)
		if report != nil && len(report.Failed) > 0 {
			w.fault("backup: %v", report.Failed)
		}
		return err
	}, ocilocal.ErrBusy)
}

func (w *harnessWorker) readOnly(rng *rand.Rand) {
	w.call(rng, "read only", func(ctx context.Context, _ *ocilocal.LocalRegistry) error {
		r, err := ocilocal.OpenReadOnly(ctx, w.Root, nil)
		if err != nil {
			return err
		}
		defer r.Close()
		for _, err := range r.Refs(ctx, nil) {
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (w *harnessWorker) pull(rng *rand.Rand) {
	n := rng.IntN(remoteRefs)
	ref := ocilocal.MustParseReference(w.Server + "/" + remoteName(n))
	opts := &ocilocal.PullOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}
	as := ref
	if rng.IntN(2) == 0 {
		opts.As, as = harnessRef(rng.IntN(harnessRefs)), harnessRef(rng.IntN(harnessRefs))
		opts.As = as
	}
	w.change(rng, "pull", as, remoteLabel(n), func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Pull(ctx, ref, opts)
		return err
	})
}

func (w *harnessWorker) push(rng *rand.Rand) {
	ref := harnessRef(rng.IntN(harnessRefs))
	as := ocilocal.MustParseReference(fmt.Sprintf("%s/pushed/p%d:v1", w.Server, rng.IntN(4)))
	w.call(rng, "push", func(ctx context.Context, r *ocilocal.LocalRegistry) error {
		_, err := r.Push(ctx, ref, &ocilocal.PushOptions{As: as})
		return err
	}, ocilocal.ErrNotFound, ocilocal.ErrIncomplete)
}
