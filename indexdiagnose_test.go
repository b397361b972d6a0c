//go:build linux

package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["readindex"] = readIndexWorker }

// readIndexWorker opens a registry and verifies all of it. It reports the kind of the error, and
// how many problems with the index were found.
func readIndexWorker(_ *bufio.Scanner, args []string) error {
	runtime.LockOSThread() // strace counts the reads of each thread
	ctx := context.Background()
	problems := 0
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err == nil {
		for p, bad := range r.Verify(ctx, nil) {
			if p.Kind != "" {
				problems++
			}
			err = errors.Join(err, bad)
		}
		err = errors.Join(err, r.Close())
	}
	switch {
	case err == nil:
		say("sound", problems)
	case errors.Is(err, ocilocal.ErrCorruptIndex):
		say("corrupt", problems, err)
	case errors.Is(err, ocilocal.ErrIndexIO):
		say("io", problems, err)
	default:
		say("else", problems, err)
	}
	return nil
}

// TestIndexReadErrors makes the kernel fail reads of the index with EIO: the n-th alone, or all
// from the n-th on. Each is reported as a failed read, and never as damage of the index.
//
// strace counts for each thread. If the n-th read of two threads fails, both may be of one page, and
// that looks like damage. So a run in which more than one read failed does not count as "alone".
func TestIndexReadErrors(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed: no read can be made to fail")
	}
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	for i := range 30 {
		ref := "example.com/read:v" + strconv.Itoa(i)
		if _, err := publishLabelled(r, ref, ref, ocilocal.KeepExisting, []byte(ref)); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, r)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(root, "index.sqlite3")
	for _, only := range []string{"", "+"} {
		step := scaled(9, 2, 1)
		judged := 0
		for n := 1; ; n += step {
			trace := filepath.Join(t.TempDir(), "trace")
			w := startCommand(t, "readindex", exec.Command(strace, "-f", "-P", name, "-e", "trace=pread64",
				"-e", "inject=pread64:error=EIO:when="+strconv.Itoa(n)+only, "-o", trace, exe, root))
			line := w.line()
			w.end()
			b, err := os.ReadFile(trace)
			if err != nil {
				t.Fatal(err)
			}
			hits := strings.Count(string(b), "(INJECTED)")
			if only == "" && hits > 1 {
				continue
			}
			judged++
			if len(line) < 2 || line[1] != "0" || line[0] != "sound" && line[0] != "io" {
				t.Errorf("reads fail from the %d. on%s: %q", n, only, line)
			}
			if hits == 0 {
				break
			}
		}
		if judged < 2 { // the last one has no failed read
			t.Errorf("no read failed alone%s", only)
		}
	}
}
