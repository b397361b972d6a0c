package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["descriptors"] = descriptorsWorker }

// descriptorsWorker runs upkeep with fewer and fewer descriptors: "ran CALL LEFT" for each call
// that came through, "ended CALL LEFT" for each that ended with an error.
func descriptorsWorker(_ *bufio.Scanner, args []string) error {
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, name := range []string{"verify", "repair", "gc", "backup"} {
		for left := 160; left >= 0; left -= 1 + left/8 {
			entries, err := os.ReadDir("/proc/self/fd")
			if err != nil {
				return err
			}
			var was syscall.Rlimit
			if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
				return err
			}
			few := syscall.Rlimit{Cur: uint64(len(entries) - 1 + left), Max: was.Max}
			if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
				return err
			}
			damage, err := upkeep[name](ctx, r, filepath.Join(args[1], fmt.Sprint(left)))
			if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
				return err
			}
			if len(damage) > 0 {
				return fmt.Errorf("%s with %d descriptors left: %q, %w", name, left, damage, err)
			}
			switch {
			case err == nil:
				say("ran", name, left)
			case errors.Is(err, syscall.EMFILE) || errors.Is(err, ocilocal.ErrIndexIO):
				say("ended", name, left)
			default:
				return fmt.Errorf("%s with %d descriptors left: %w", name, left, err)
			}
		}
	}
	say("done")
	return nil
}

// TestFewDescriptors: a process without enough descriptors finds no damage, loses nothing in a
// backup, and moves nothing away.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	r := soundRegistry(t, scaled(20, 60, 200))
	root := r.Root()
	mustClose(t, r)
	w := startWorker(t, "descriptors", root, t.TempDir())
	count := map[string]int{}
	for words := w.line(); words[0] != "done"; words = w.line() {
		count[words[0]+" "+words[1]]++
	}
	w.finish()
	t.Log(count)
	for name := range upkeep {
		if count["ran "+name] == 0 || count["ended "+name] == 0 {
			t.Errorf("%s: %d calls came through and %d ended", name, count["ran "+name], count["ended "+name])
		}
	}
	checkSound(t, mustOpen(t, root))
}
