package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/ocilocal/ocilocal"
)

const syscallsWorker = "syscalls"

// strace counts system calls by thread. So that a number means the same call in each run, the
// worker stays on the thread that the process began with.
func init() {
	if os.Getenv(workerEnv) == syscallsWorker {
		runtime.LockOSThread()
	}
	workers[syscallsWorker] = stepSyscalls
}

// sayApart prints a line by a system call that nothing else uses and no fault hits.
func sayApart(words ...any) {
	line := []byte(fmt.Sprintln(words...))
	v := syscall.Iovec{Base: &line[0]}
	v.SetLen(len(line))
	syscall.Syscall(syscall.SYS_WRITEV, 1, uintptr(unsafe.Pointer(&v)), 1)
}

// stepSyscalls opens a root, does a flow, and closes: "go", "opened", "done", "closed", and
// "error" with what is wrong with the error itself.
func stepSyscalls(_ *bufio.Scanner, args []string) error {
	number, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	sayApart("go")
	r, err := ocilocal.Open(context.Background(), args[0], nil)
	if err == nil {
		sayApart("opened")
		if err = flows[number].run(r); err == nil {
			sayApart("done")
			if err = r.Close(); err == nil {
				sayApart("closed")
			}
		} else {
			r.Close()
		}
	}
	if err != nil {
		wrong := "nothing"
		if _, typed := errors.AsType[*ocilocal.Error](err); !typed {
			wrong = "no type"
		} else if isAny(err, damage) {
			wrong = "it reports damage"
		}
		sayApart("error", wrong+":", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}

// A syscallPoint is one system call of a flow, and what happens to it.
type syscallPoint struct {
	flow  int
	call  string // "fsync"
	n     int    // the n-th of that name on the worker's thread after "go"
	fault string // "EIO", …, or "kill"
}

func (p syscallPoint) String() string {
	return fmt.Sprintf("%s, %s number %d: %s", flows[p.flow].name, p.call, p.n, p.fault)
}

// faultedCalls are the system calls with which this package and SQLite reach files.
var faultedCalls = strings.Split("openat openat2 read write pread64 pwrite64 fsync fdatasync ftruncate mkdirat linkat renameat unlinkat "+
	"fchmod fchmodat fcntl flock mmap newfstatat getdents64", " ")

var tracedCall = regexp.MustCompile(`^(\d+) +([a-z0-9]+)\((.*)`)

// A trace is what strace saw of a worker.
type trace struct {
	before   map[string]int // calls by name on the worker's thread before "go"
	after    map[string]int // and after it
	injected []string       // lines of calls that a fault has hit after "go", on any thread
	said     []string
	killed   bool
	exit     int
	text     string
}

// straced runs a flow under strace, and injects a fault unless inject is "".
func straced(t *testing.T, strace, root string, flow int, inject string) trace {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "trace")
	args := []string{"-f", "-y", "-o", log, "-e", "trace=writev," + strings.Join(faultedCalls, ",")}
	if !strings.Contains(inject, "signal") { // it would be lost
		args = append(args, "--seccomp-bpf")
	}
	if inject != "" {
		args = append(args, "-e", "inject="+inject)
	}
	w := startCommand(t, syscallsWorker, exec.Command(strace, append(args, exe, root, strconv.Itoa(flow))...))
	tr := trace{before: map[string]int{}, after: map[string]int{}}
	for w.out.Scan() {
		tr.said = append(tr.said, w.out.Text())
	}
	tr.text = w.end()
	tr.exit = w.cmd.ProcessState.ExitCode()
	raw, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	main, gone := "", false
	for line := range strings.Lines(string(raw)) {
		m := tracedCall.FindStringSubmatch(line)
		if m != nil && main == "" {
			main = m[1]
		}
		if m != nil && m[1] == main {
			switch {
			case m[2] == "writev" && strings.Contains(m[3], `"go\n"`):
				gone = true
			case gone:
				tr.after[m[2]]++
			default:
				tr.before[m[2]]++
			}
		}
		if gone && strings.Contains(line, "(INJECTED)") {
			tr.injected = append(tr.injected, line)
		}
		tr.killed = tr.killed || strings.Contains(line, "+++ killed by SIGKILL")
	}
	return tr
}

func (tr trace) last() string {
	if len(tr.said) == 0 {
		return ""
	}
	return tr.said[len(tr.said)-1]
}

// TestSyscallFaults makes one system call of a flow fail, or kills the process in it, from outside:
// a call of this package or of SQLite. The flow has done everything or nothing. Its error has a
// type and does not report damage. The next process can work at once. The log of strace proves that
// each fault was hit. The gate takes some points of each system call, and the full form takes all.
func TestSyscallFaults(t *testing.T) {
	needsDeep(t, "strace slows each run down")
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed: nothing makes system calls fail")
	}
	kinds := []string{"EIO", "ENOSPC", "EMFILE", "kill"}
	var points []syscallPoint
	before := map[int]map[string]int{}
	for i := range flows {
		f := &flows[i]
		if f.always != nil || strings.HasPrefix(f.name, "pull") { // needs the seam, or other threads
			continue
		}
		tr := straced(t, strace, f.prepare(t), i, "")
		if tr.last() != "closed" {
			t.Skipf("strace can't trace here: %s: %q, %s", f.name, tr.said, tr.text)
		}
		before[i] = tr.before
		for _, call := range faultedCalls {
			for n := 1; n <= tr.after[call]; n++ {
				for _, kind := range kinds {
					points = append(points, syscallPoint{i, call, n, kind})
				}
			}
		}
	}
	all := len(points)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	if deepLevel() == 1 { // as many of each system call, as far as there are so many
		byCall := map[string][]syscallPoint{}
		for _, p := range points {
			byCall[p.call] = append(byCall[p.call], p)
		}
		points = nil
		for _, call := range slices.Sorted(maps.Keys(byCall)) {
			for _, i := range rng.Perm(len(byCall[call]))[:min(6, len(byCall[call]))] {
				points = append(points, byCall[call][i])
			}
		}
	}
	hits := map[string]int{}
	failed, absent := 0, 0
	for _, p := range points {
		ok := t.Run(p.String(), func(t *testing.T) {
			for range 40 {
				// Where Go's runtime makes such calls too, their number before the flow differs.
				var tr trace
				var hit bool
				if hit, tr = p.hit(t, strace, before[p.flow][p.call]); hit {
					hits[p.call]++
					return
				}
				before[p.flow] = tr.before
				if tr.last() == "closed" && tr.after[p.call] < p.n { // a collection's steps depend on time
					absent++
					return
				}
			}
			t.Errorf("forty attempts have not hit it")
		})
		if !ok {
			if failed++; failed == 20 {
				t.Fatal("20 points have failed")
			}
		}
	}
	if absent > 2+len(points)/20 {
		t.Errorf("%d points were not there the second time", absent)
	}
	t.Logf("seed %d: %d of %d points, %d of them not there, hit by system call: %v", seed, len(points), all, absent, hits)
}

// unsynced matches the path of a blob, of a file that becomes one, or of their directory.
var unsynced = regexp.MustCompile(`<[^>]*/root/(?:tmp/[^/>]+/[^/>.]+|blobs/[^>]*)>`)

// hit does the flow with its fault, judges the outcome, and reports whether the fault came at all.
func (p syscallPoint) hit(t *testing.T, strace string, before int) (bool, trace) {
	f := &flows[p.flow]
	root := f.prepare(t)
	inject := fmt.Sprintf("%s:error=%s:when=%d", p.call, p.fault, before+p.n)
	if p.fault == "kill" {
		inject = fmt.Sprintf("%s:signal=KILL:when=%d", p.call, before+p.n)
	}
	tr := straced(t, strace, root, p.flow, inject)
	if !slices.Contains(tr.said, "go") || len(tr.injected) == 0 && !tr.killed {
		dontWatch(root)
		return false, tr
	}
	done := slices.Contains(tr.said, "done")
	wrong, _ := strings.CutPrefix(tr.last(), "error ")
	switch {
	case tr.killed && p.fault == "kill":
	case p.call == "mmap" && tr.exit == 2: // Go's own memory: the process ends
	case tr.exit != 0:
		t.Errorf("the worker ended by itself: %.2000s", tr.text)
	case tr.last() != "closed" && !strings.HasPrefix(wrong, "nothing: "):
		t.Errorf("the call says %q after %s", tr.last(), tr.injected)
	}
	// A blob whose sync failed is not on disk.
	if done && p.fault != "kill" && (p.call == "fsync" || p.call == "fdatasync") {
		for _, line := range tr.injected {
			if unsynced.MatchString(line) {
				t.Errorf("the call returned nil, though this failed: %s", line)
			}
		}
	}
	r, err := ocilocal.Open(t.Context(), root, nil)
	if err != nil {
		t.Fatalf("open after the fault: %v (%q)", err, tr.injected)
	}
	defer r.Close()
	if got := f.labels(t, r); !maps.Equal(got, f.after()) && (done || !maps.Equal(got, f.before())) {
		t.Errorf("after %q, done %v: %v", tr.injected, done, got)
	}
	f.checkBeside(t, root, done, "kill")
	if err := f.run(r); err != nil {
		t.Errorf("the next process: %v", err)
	}
	f.checkBeside(t, root, true, "kill")
	f.sweep(t, r)
	mustClose(t, r)
	f.check(t, root)
	if t.Failed() {
		t.Logf("said %q, injected %q", tr.said, tr.injected)
	}
	return true, tr
}
