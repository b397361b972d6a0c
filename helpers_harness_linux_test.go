// Helpers of TestHarness: a clock that all processes share, the history of each ref, and the
// conditions under which the processes run. helpers_harnessworker_linux_test.go has the processes.

package ocilocal_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"
)

// A stampClock orders events of several processes: a counter in memory that they share.
type stampClock struct{ mem []byte }

func openClock(name string) (*stampClock, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(8); err != nil {
		return nil, err
	}
	mem, err := syscall.Mmap(int(f.Fd()), 0, 8, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	return &stampClock{mem}, err
}

// next returns a number above all that it has returned before, in any process.
func (c *stampClock) next() uint64 { return atomic.AddUint64((*uint64)(unsafe.Pointer(&c.mem[0])), 1) }

func (c *stampClock) close() error { return syscall.Munmap(c.mem) }

// A refEvent points a ref at a label ("" removes it) at some moment between two stamps. If it is
// not sure, it may not have happened: its call failed, or its process was killed in it.
type refEvent struct {
	start, end uint64
	label      string
	sure       bool
	call       string // the operation, its process, and its outcome
}

// A refRead has seen a ref at a label at some moment between two stamps.
type refRead struct {
	start, end uint64
	ref, label string
}

// A rootHistory has the events that the processes of a round have reported, by ref.
type rootHistory struct {
	events    map[string][]refEvent
	undone    map[string][]refEvent // calls that said they changed nothing, for messages
	reads     []refRead
	anonymous map[string]bool // labels of artifacts that were to have an anonymous name
	faults    []string        // what a worker found wrong
	ops       map[string]int  // calls by name and outcome
}

func newHistory() *rootHistory {
	return &rootHistory{events: map[string][]refEvent{}, undone: map[string][]refEvent{}, anonymous: map[string]bool{}, ops: map[string]int{}}
}

// A logLine is one line of a worker's log. Each is written by one system call, so that a kill
// leaves whole lines.
type logLine struct {
	Kind  string // "try", "end", "read", "anonymous", "fault", "op"
	ID    int    `json:",omitempty"` // joins the end to its try
	Start uint64 `json:",omitempty"`
	End   uint64 `json:",omitempty"`
	Ref   string `json:",omitempty"`
	Label string `json:",omitempty"`
	Text  string `json:",omitempty"` // the outcome, the fault, or the operation
}

// replay takes in the log of a worker that was dead at the stamp death.
func (h *rootHistory) replay(name string, death uint64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	open := map[int]logLine{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r logLine
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("%s: %q: %w", name, lines.Text(), err)
		}
		switch r.Kind {
		case "try":
			open[r.ID] = r
		case "end":
			t := open[r.ID]
			delete(open, r.ID)
			e := refEvent{t.Start, r.End, t.Label, r.Text == "ok", t.Text + ", " + r.Text + " " + r.Label}
			if r.Text != "no" {
				h.events[t.Ref] = append(h.events[t.Ref], e)
			} else {
				h.undone[t.Ref] = append(h.undone[t.Ref], e)
			}
		case "read":
			h.reads = append(h.reads, refRead{r.Start, r.End, r.Ref, r.Label})
		case "anonymous":
			h.anonymous[r.Label] = true
		case "fault":
			h.faults = append(h.faults, r.Text)
		case "op":
			h.ops[r.Text]++
		}
	}
	for _, t := range open {
		h.events[t.Ref] = append(h.events[t.Ref], refEvent{t.Start, death, t.Label, false, t.Text + ", killed"})
	}
	return lines.Err()
}

// possible returns what a read of ref between two stamps may see: each event that had begun,
// unless one that surely happened lies wholly between it and the read.
func (h *rootHistory) possible(ref string, start, end uint64) []string {
	all := append([]refEvent{{label: "", sure: true}}, h.events[ref]...)
	var labels []string
	for _, e := range all {
		hidden := slices.ContainsFunc(all, func(later refEvent) bool {
			return later.sure && later.start > e.end && later.end < start
		})
		if e.start <= end && !hidden && !slices.Contains(labels, e.label) {
			labels = append(labels, e.label)
		}
	}
	return labels
}

// problems returns the faults that workers found, and the reads that nothing explains.
func (h *rootHistory) problems() []string {
	found := slices.Clone(h.faults)
	for _, r := range h.reads {
		if p := h.possible(r.ref, r.start, r.end); !slices.Contains(p, r.label) {
			found = append(found, fmt.Sprintf("between %d and %d %s read as %q, possible were %.20q%s", r.start, r.end, r.ref, r.label, p, h.around(r)))
		}
	}
	return found
}

// around says what happened to the ref of a read near to it, and all calls with its label.
func (h *rootHistory) around(r refRead) string {
	var b strings.Builder
	for _, e := range slices.Concat(h.events[r.ref], h.undone[r.ref]) {
		if e.label == r.label || e.start <= r.end && e.end+200 >= r.start {
			fmt.Fprintf(&b, "\n\t%d to %d: %q by %s", e.start, e.end, e.label, e.call)
		}
	}
	return b.String()
}

// model returns what each ref may be at the end.
func (h *rootHistory) model(end uint64) model {
	want := model{}
	for ref := range h.events {
		want[ref] = h.possible(ref, end, end)
	}
	return want
}

// TestHarnessHistory gives hand-made histories to the judge of TestHarness.
func TestHarnessHistory(t *testing.T) {
	h := newHistory()
	h.events["r"] = []refEvent{
		{1, 2, "a", true, ""},
		{3, 6, "b", true, ""},
		{4, 5, "c", false, "failed"},
		{7, 9, "d", true, ""},
		{8, 20, "e", false, "killed"},
	}
	for _, c := range []struct {
		start, end uint64
		want       string
	}{
		{0, 0, ","}, {0, 1, ",,a"}, {2, 2, ",,a"}, {3, 3, ",a,b"}, {4, 4, ",a,b,c"}, {7, 7, ",b,c,d"},
		{10, 10, ",d,e"}, {30, 30, ",d,e"}, {1, 30, ",,a,b,c,d,e"},
	} {
		if got := "," + strings.Join(h.possible("r", c.start, c.end), ","); got != c.want {
			t.Errorf("between %d and %d: %q, want %q", c.start, c.end, got, c.want)
		}
	}
	h.reads = []refRead{{10, 10, "r", "d"}, {10, 10, "r", "b"}}
	if got := h.problems(); len(got) != 1 {
		t.Errorf("problems are %q, want the read of b alone", got)
	}
}

// mountExt4 mounts a new ext4 file system of that size, in a file, until the test ends.
func mountExt4(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size), os.Mkdir(mnt, 0o755)); err != nil {
		t.Fatal(err)
	}
	path := "PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin"
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-F", "-m", "0", image}, {"mount", "-o", "loop", image, mnt}} {
		cmd := exec.Command("env", append([]string{path}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Skipf("an ext4 file system can't be mounted here (%v: %s): it takes root, e2fsprogs and a loop device", err, out)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(mnt, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return mnt
}

// mountBind makes dir visible under a second path until the test ends.
func mountBind(t *testing.T, dir string) string {
	t.Helper()
	other := filepath.Join(t.TempDir(), "bound")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(dir, other, "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("a bind mount can't be made here (%v): it takes root", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(other, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return other
}

// A diskFiller takes all space of a file system, and gives it back.
type diskFiller struct{ name string }

func (d diskFiller) fill() error {
	f, err := os.OpenFile(d.name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for size := 64 << 10; size > 0; size /= 2 {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			return err
		}
		err = nil
	}
	return nil
}

func (d diskFiller) free() error { return os.Truncate(d.name, 0) }

// setImmutable makes files unchangeable even by root (chattr +i), or changeable again. Files
// that are gone are left out.
func setImmutable(on bool, names ...string) error {
	const getFlags, setFlags, immutable = 0x80086601, 0x40086602, 0x10 // linux/fs.h
	for _, name := range names {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		var flags int
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), getFlags, uintptr(unsafe.Pointer(&flags)))
		if errno == 0 {
			flags &^= immutable
			if on {
				flags |= immutable
			}
			_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), setFlags, uintptr(unsafe.Pointer(&flags)))
		}
		f.Close()
		if errno != 0 {
			return errno
		}
	}
	return nil
}

// clockEnv holds the offset in seconds of the clock of a process that clockBinary has built.
const clockEnv = "OCILOCAL_TEST_CLOCK"

// lastClockBinary is the result of the last clockBinary, which may be deleted by now.
var lastClockBinary string

// clockBinary builds these tests with a standard library whose time.Now adds an offset, unless the
// running test has built them before. A Go program asks the kernel itself for the time, so a
// preloaded library that replaces functions of libc has no effect on it.
func clockBinary(t *testing.T) string {
	t.Helper()
	if _, err := os.Stat(lastClockBinary); err == nil {
		return lastClockBinary
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("there is no go command to build a process with another clock")
	}
	root, err := exec.Command(goTool, "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	std := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	src, err := os.ReadFile(filepath.Join(std, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const asked = "sec, nsec, mono := runtimeNow()\n"
	parts := strings.Split(string(src), asked)
	if len(parts) < 2 {
		t.Fatalf("time.go of %s has no line %q", root, asked)
	}
	dir := t.TempDir()
	patched, extra, overlay := filepath.Join(dir, "time.go"), filepath.Join(dir, "offset.go"), filepath.Join(dir, "overlay.json")
	write(t, patched, strings.Join(parts, asked+"\tsec += ocilocalOffset\n"))
	write(t, extra, `package time

import "syscall"

var ocilocalOffset = func() (sec int64) {
	text, _ := syscall.Getenv("`+clockEnv+`")
	sign := int64(1)
	for _, c := range text {
		if c == '-' {
			sign = -1
			continue
		}
		sec = sec*10 + int64(c-'0')
	}
	return sign * sec
}()
`)
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(std, "time.go"): patched, filepath.Join(std, "ocilocal_offset.go"): extra,
	}})
	if err != nil {
		t.Fatal(err)
	}
	write(t, overlay, string(replace))
	binary := filepath.Join(dir, "test")
	if out, err := exec.Command(goTool, "test", "-c", "-vet=off", "-overlay", overlay, "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lastClockBinary = binary
	return binary
}

// daysOff returns a random offset of a clock, in seconds.
func daysOff(rng *rand.Rand, maxDays int64) int64 {
	return rng.Int64N(2*maxDays*86400) - maxDays*86400
}
