package ocilocal_test

import (
	"bufio"
	"context"
	"maps"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["step"] = stepWorker }

// killedAt is the exit status of a process that ended at a file operation.
const killedAt = 86

// stepWorker opens a root, does a flow, and closes: "opened", "done", "closed".
// At its n-th file operation it ends at once, as if it were killed there.
func stepWorker(_ *bufio.Scanner, args []string) error {
	root := args[0]
	f, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return err
	}
	var count atomic.Int64
	r, err := ocilocal.OpenFaulty(context.Background(), root, func(op, name string) error {
		if count.Add(1) == n {
			os.Exit(killedAt)
		}
		if flows[f].always != nil {
			return flows[f].always(op, name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	say("opened")
	if err := flows[f].run(r); err != nil {
		return err
	}
	say("done")
	if err := r.Close(); err != nil {
		return err
	}
	say("closed")
	return nil
}

// TestKillAtEveryOperation ends a process at each file operation of each flow
// in turn, until one comes through; by default at every third. What it has acknowledged is there whole; what
// it has not is there whole or not at all; and the next process goes on at once.
func TestKillAtEveryOperation(t *testing.T) {
	step := int64(scaled(15, 3, 1))
	for i := range flows {
		f := &flows[i]
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			acked, points := 0, 0
			first := 1 + rand.N(step) // other points in each run
			for n := first; ; n += step {
				if n > 200 {
					t.Fatal("more than 200 file operations")
				}
				killed, done := f.killAt(t, i, n)
				if t.Failed() {
					t.Fatalf("killed at operation %d", n)
				}
				if !killed {
					break
				}
				points++
				if done {
					acked++
				}
			}
			t.Logf("every %d. from %d: %d points, %d of them after the acknowledgement", step, first, points, acked)
			if step == 1 && (points == 0 || acked == 0 && !f.exports && !strings.Contains(f.lacks, "create")) {
				t.Error("the kills don't reach from the first operation to Close")
			}
		})
	}
}

// killAt does the flow in a process that ends at operation n, if it has so
// many, and then in this one.
func (f *flow) killAt(t *testing.T, number int, n int64) (killed, done bool) {
	t.Helper()
	root := f.prepare(t)
	w := startWorker(t, "step", root, strconv.Itoa(number), strconv.FormatInt(n, 10))
	last := ""
	for w.out.Scan() {
		last = w.out.Text()
	}
	end := w.end()
	killed, done = w.cmd.ProcessState.ExitCode() == killedAt, last == "done" || last == "closed"
	if !killed && (last != "closed" || !w.cmd.ProcessState.Success()) {
		t.Errorf("the worker ended by itself after %q: %s", last, end)
	}
	r, err := ocilocal.OpenFaulty(t.Context(), root, f.always)
	if err != nil {
		t.Errorf("open after a kill: %v", err)
		return killed, done
	}
	defer r.Close()
	got := f.labels(t, r)
	if !maps.Equal(got, f.after()) && (done || !maps.Equal(got, f.before())) {
		t.Errorf("after %q: %v", last, got)
	}
	f.checkBeside(t, root, done, "kill")
	if err := f.run(r); err != nil {
		t.Errorf("the next process: %v", err)
	}
	f.checkBeside(t, root, true, "kill")
	f.sweep(t, r)
	mustClose(t, r)
	f.check(t, root)
	return killed, done
}
