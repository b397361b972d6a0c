// Counts of goroutines and descriptors, and of the files that only an open handle may have.

package ocilocal_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// A census counts the resources of this process that a test must not leave behind.
type census struct {
	goroutines, descriptors int
	kind                    string // of the descriptors that are counted, such as "socket:"; "" for all
}

func takeCensus() census { return takeCensusOf("") }

func takeCensusOf(kind string) census {
	const dir = "/proc/self/fd" // where there is none, only goroutines are counted
	fds, _ := os.ReadDir(dir)
	files := 0
	for _, fd := range fds {
		// The runtime opens its poller (an anon_inode) on first use, for good.
		if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && !strings.HasPrefix(to, "anon_inode:") && strings.HasPrefix(to, kind) {
			files++
		}
	}
	return census{runtime.NumGoroutine(), files, kind}
}

// leftBehind describes what exists beyond before, after a time for everything to end.
func (before census) leftBehind() string {
	now := takeCensusOf(before.kind)
	for deadline := time.Now().Add(5 * time.Second); ; now = takeCensusOf(before.kind) {
		if now.goroutines <= before.goroutines && now.descriptors <= before.descriptors {
			return ""
		}
		if time.Now().After(deadline) {
			break
		}
		runtime.Gosched()
	}
	stacks := make([]byte, 1<<16)
	return fmt.Sprintf("%d goroutines and %d descriptors, were %d and %d\n%s", now.goroutines, now.descriptors,
		before.goroutines, before.descriptors, stacks[:runtime.Stack(stacks, true)])
}

// runChecked runs all tests, and fails if they leave goroutines or descriptors.
func runChecked(m *testing.M) int {
	before := takeCensus()
	code := m.Run()
	if f := flag.Lookup("test.fuzz"); f != nil && f.Value.String() != "" {
		return code
	}
	if left := before.leftBehind(); left != "" && code == 0 {
		fmt.Println("left behind by the tests:", left)
		return 1
	}
	return code
}

// openRoots counts the handles that tests have on each root.
var openRoots struct {
	sync.Mutex
	handles map[string]int
}

// watchRoot makes the last Close of a root check that no file is left which only an open handle may
// have.
func watchRoot(t testing.TB, root string) (closed func()) {
	openRoots.Lock()
	defer openRoots.Unlock()
	if openRoots.handles == nil {
		openRoots.handles = map[string]int{}
	}
	openRoots.handles[root]++
	return func() {
		openRoots.Lock()
		defer openRoots.Unlock()
		openRoots.handles[root]--
		if openRoots.handles[root] > 0 || t.Failed() {
			return
		}
		for _, pattern := range []string{"tmp/*", "index.sqlite3-*"} {
			left, _ := filepath.Glob(filepath.Join(root, pattern))
			left = slices.DeleteFunc(left, func(name string) bool {
				return filepath.Base(name) == "held" || filepath.Base(name) == "upload" // they outlive processes
			})
			if len(left) > 0 {
				t.Errorf("after the last Close there is %q", left)
			}
		}
	}
}

// dontWatch is for a test that leaves such files on purpose.
func dontWatch(root string) {
	openRoots.Lock()
	defer openRoots.Unlock()
	if openRoots.handles == nil {
		openRoots.handles = map[string]int{}
	}
	openRoots.handles[root] += 1000
}

// TestFaultsLeakNothing takes a census around each flow with a file operation failing: every 15th,
// in the deep run every third. The collector is off meanwhile, since it would close forgotten files.
func TestFaultsLeakNothing(t *testing.T) {
	if ranAlone(t) {
		return
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for i := range flows {
		f := &flows[i]
		for _, p := range everyNth(f.points(t), scaled(30, 3, 1)) {
			root := f.prepare(t)
			if f.seeded {
				dontWatch(root) // a session that can't be removed
			}
			runtime.GC()
			before := takeCensus()
			fa := f.newFault(root, p, syscall.EIO)
			r, err := ocilocal.OpenFaulty(t.Context(), root, fa.fault)
			if err == nil {
				f.run(r) // TestFaultAtEveryOperation looks at the outcome
				r.Close()
			}
			if !fa.hit.Load() {
				t.Fatalf("%s: the recorded operation %v was not reached", f.name, p)
			}
			if left := before.leftBehind(); left != "" {
				t.Fatalf("%s: EIO at %v leaves %s", f.name, p, left)
			}
		}
	}
}
