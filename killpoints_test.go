package ocilocal_test

import (
	"bufio"
	"context"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["step"] = stepWorker }

// killedAt is the exit status of a process that ended at a file operation.
const killedAt = 86

func killHere() error {
	os.Exit(killedAt)
	return nil
}

// stepWorker opens a root, does a flow, and closes: "opened", "done", "closed". Its arguments are
// the root, the flow's number, and a point at which it ends at once, as if it were killed there.
func stepWorker(_ *bufio.Scanner, args []string) error {
	root := args[0]
	f, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	seam := &pointSeam{always: flows[f].always, act: killHere}
	seam.base = filepath.Dir(root)
	if len(args) > 2 {
		if seam.at, err = pointFromArgs(args[2:]); err != nil {
			return err
		}
	}
	r, err := ocilocal.OpenFaulty(context.Background(), root, seam.fault)
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

// TestKillAtEveryOperation ends a process at each file operation of each flow in turn. The quick
// run takes every 20th, the deep run every third. All that the process has acknowledged is whole
// afterwards. Anything else is whole or absent. The next process can work at once.
func TestKillAtEveryOperation(t *testing.T) {
	step := scaled(20, 3, 1)
	for i := range flows {
		f := &flows[i]
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			acked := 0
			all := f.points(t)
			points := everyNth(all, step)
			for _, p := range points {
				killed, done := f.killAt(t, i, p)
				if !killed {
					t.Error("this recorded operation was not reached")
				}
				if t.Failed() {
					t.Fatalf("killed at %v", p)
				}
				if done {
					acked++
				}
			}
			if killed, _ := f.killAt(t, i, point{}); killed {
				t.Error("killed at no point")
			}
			t.Logf("%d of %d points, %d of them after the acknowledgement", len(points), len(all), acked)
			if step == 1 && (len(points) == 0 || acked == 0 && !f.exports && !strings.Contains(f.lacks, "create")) {
				t.Error("the kills don't reach from the first operation to Close")
			}
		})
	}
}

// killAt does the flow in a process that ends at a point, and then in this one.
func (f *flow) killAt(t *testing.T, number int, at point) (killed, done bool) {
	t.Helper()
	root := f.prepare(t)
	args := []string{root, strconv.Itoa(number)}
	if at != (point{}) {
		args = append(args, at.args()...)
	}
	w := startWorker(t, "step", args...)
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
