// TestMain, worker processes, the sizes of the tests, and the helpers that most tests need.

package ocilocal_test

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// workerEnv is the environment variable with the name of the worker that a process runs.
const workerEnv = "OCILOCAL_TEST_WORKER"

// workers are the programs that tests start as processes, by running the test binary again. in has
// the lines that the parent sends. Each reply is one write to standard output, so a kill never leaves
// half a line.
var workers = map[string]func(in *bufio.Scanner, args []string) error{
	"crash":     crashWorker,
	"publish":   publishWorker,
	"race":      raceWorker,
	"open":      openWorker,
	"hold":      holdWorker,
	"gc":        gcWorker,
	"verify":    verifyWorker,
	"pull":      pullWorker,
	"anonymous": anonymousWorker,
	"serve":     serveWorker,
}

func TestMain(m *testing.M) {
	if name := os.Getenv(workerEnv); name != "" {
		if err := workers[name](bufio.NewScanner(os.Stdin), os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "worker %s %q: %v\n", name, os.Args[1:], err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	fillProcessors()
	remove := tempInMemory()
	code := runChecked(m)
	remove()
	os.Exit(code)
}

// fillProcessors lets twice as many tests run beside each other as there are processors, because
// they wait for disks, processes and timers half of the time. The flag -parallel decides, if given.
// Fuzz runs take the same flag as their number of workers, and so keep its default.
func fillProcessors() {
	given := flag.Lookup("test.fuzz").Value.String() != ""
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0)))
	}
}

// tempInMemory lets the quick tests keep their files in memory, where a system allows it.
var tempInMemory = func() (remove func()) { return func() {} }

// A worker is a running child process.
type worker struct {
	t      *testing.T
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	stderr bytes.Buffer
	ended  bool
}

// startWorker starts a worker. It does not outlive the test.
func startWorker(t *testing.T, name string, args ...string) *worker {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return startCommand(t, name, exec.Command(exe, args...))
}

func startCommand(t *testing.T, name string, cmd *exec.Cmd) *worker {
	t.Helper()
	w := &worker{t: t, cmd: cmd}
	cmd.Env = append(os.Environ(), workerEnv+"="+name)
	cmd.Stderr = &w.stderr
	var err error
	if w.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.out = bufio.NewScanner(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.kill)
	return w
}

// endWithParent ends a worker when its parent has ended, because the pipe between them ends then.
func endWithParent(in *bufio.Scanner) {
	go func() {
		for in.Scan() {
		}
		os.Exit(3)
	}()
}

// runTogether lets workers that say "ready" go on at the same time. Each says end, and ends.
func runTogether(ws []*worker, end string) {
	for _, w := range ws {
		w.t.Helper()
		w.expect("ready")
	}
	for _, w := range ws {
		w.send("go")
	}
	for _, w := range ws {
		w.expect(end)
		w.finish()
	}
}

// send writes one line to the worker.
func (w *worker) send(words ...string) {
	w.t.Helper()
	if _, err := fmt.Fprintln(w.in, strings.Join(words, " ")); err != nil {
		w.t.Fatalf("worker is gone: %v\n%s", err, w.end())
	}
}

// line returns the worker's next line, cut into words.
func (w *worker) line() []string {
	w.t.Helper()
	if !w.out.Scan() {
		w.t.Fatalf("worker ended early\n%s", w.end())
	}
	return strings.Fields(w.out.Text())
}

// expect reads a line that must begin with word, and returns the rest.
func (w *worker) expect(word string) []string {
	w.t.Helper()
	got := w.line()
	if len(got) == 0 || got[0] != word {
		w.t.Fatalf("worker says %q, want %q", got, word)
	}
	return got[1:]
}

// kill ends the worker with SIGKILL, unless it has ended.
func (w *worker) kill() {
	if !w.ended {
		w.cmd.Process.Kill()
		w.end()
	}
}

// end waits for the worker, and returns its standard error and its exit status.
func (w *worker) end() string {
	w.ended = true
	w.in.Close()
	err := w.cmd.Wait()
	return fmt.Sprintf("%s%v", w.stderr.String(), err)
}

// finish lets the worker end by itself, and fails the test if it ends with an error.
func (w *worker) finish() {
	w.t.Helper()
	w.ended = true
	w.in.Close()
	if err := w.cmd.Wait(); err != nil {
		w.t.Errorf("worker: %v\n%s", err, w.stderr.String())
	}
}

// say prints a worker's reply in one write.
func say(words ...any) { os.Stdout.WriteString(fmt.Sprintln(words...)) }

// labelKey is the annotation with which tests recognize an artifact.
const labelKey = "com.example.label"

const testType = "application/vnd.example.test"

// publishLabelled builds an artifact that carries label, with one layer for each of layers.
func publishLabelled(r *ocilocal.LocalRegistry, ref, label string, policy ocilocal.Policy, layers ...[]byte) (ocilocal.RefUpdate, error) {
	ctx := context.Background()
	parsed, err := ocilocal.ParseReference(ref)
	if err != nil {
		return ocilocal.RefUpdate{}, err
	}
	b, err := r.NewBuilder(parsed, &ocilocal.BuilderOptions{ArtifactType: testType, PublishOptions: ocilocal.PublishOptions{Policy: policy}})
	if err != nil {
		return ocilocal.RefUpdate{}, err
	}
	defer b.Cancel()
	if err := b.SetAnnotation(labelKey, label); err != nil {
		return ocilocal.RefUpdate{}, err
	}
	for _, l := range layers {
		if _, err := b.AddLayer(ctx, "application/octet-stream", bytes.NewReader(l), nil); err != nil {
			return ocilocal.RefUpdate{}, err
		}
	}
	_, err = b.Build(ctx)
	return b.Update(), err
}

// readLabelled reads all of the artifact under ref through the library and returns its label.
func readLabelled(r *ocilocal.LocalRegistry, ref string) (string, error) {
	ctx := context.Background()
	parsed, err := ocilocal.ParseReference(ref)
	if err != nil {
		return "", err
	}
	a, err := r.Load(ctx, parsed)
	if err != nil {
		return "", err
	}
	layers, err := a.Layers(ctx)
	if err != nil {
		return "", err
	}
	for _, l := range layers {
		if _, err := a.ReadLayer(ctx, l); err != nil {
			return "", err
		}
	}
	annotations, err := a.Annotations(ctx)
	return annotations[labelKey], err
}

// mustOpen opens root for the length of the test.
func mustOpen(t *testing.T, root string) *ocilocal.LocalRegistry {
	t.Helper()
	r, err := ocilocal.Open(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	closed := watchRoot(t, root)
	t.Cleanup(func() {
		r.Close()
		closed()
	})
	return r
}

func mustClose(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// deepEnv is the switch for the sizes of the tests; see deepLevel.
const deepEnv = "OCILOCAL_DEEP"

// deepLevel returns how deep the tests go: 0, the default, takes a minute; 1 is the gate's; 2 is
// the full form, which takes hours. Worker processes inherit it.
func deepLevel() int {
	switch v := os.Getenv(deepEnv); v {
	case "", "0":
		return 0
	case "1", "2":
		return int(v[0] - '0')
	default:
		panic(fmt.Sprintf("%s is %q: want 0, 1 or 2", deepEnv, v))
	}
}

// scaled picks a number of rounds by the level: quick, the gate's, or the full form's.
func scaled(quick, gate, full int) int { return []int{quick, gate, full}[deepLevel()] }

// aloneEnv is set in a process that runs one test for ranAlone.
const aloneEnv = "OCILOCAL_TEST_ALONE"

// ranAlone runs the calling test in a separate process, beside other tests, and then returns
// true. In that process it returns false. A test begins with it if it measures its process (memory,
// goroutines, descriptors) or changes it (environment, directory), and takes long: otherwise no
// test could run beside it.
func ranAlone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(aloneEnv) == t.Name() {
		return false
	}
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pattern := "^" + t.Name() + "$"
	if _, sub, ok := strings.Cut(flag.Lookup("test.run").Value.String(), "/"); ok {
		pattern += "/" + sub
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.v", "-test.run", pattern)
	if end, ok := t.Deadline(); ok {
		cmd.Args = append(cmd.Args, "-test.timeout", time.Until(end).String())
	}
	cmd.Env = append(os.Environ(), aloneEnv+"="+t.Name())
	out, err := cmd.CombinedOutput()
	switch {
	case err != nil:
		t.Errorf("in a separate process: %v\n%s", err, out)
	case !bytes.Contains(out, []byte("\n--- PASS: "+t.Name())):
		t.Skipf("in a separate process:\n%s", out)
	default:
		t.Logf("in a separate process:\n%s", out)
	}
	return true
}

// needsDeep skips a test that has no quick form.
func needsDeep(t *testing.T, why string) {
	t.Helper()
	if deepLevel() == 0 {
		t.Skipf("%s: runs with %s=1", why, deepEnv)
	}
}
