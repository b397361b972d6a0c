package ocilocal_test

import (
	"bufio"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// gcWorker collects garbage at grace 0 until it is killed, and says "ran" each time.
func gcWorker(in *bufio.Scanner, args []string) error {
	go func() {
		for in.Scan() {
		}
		os.Exit(3)
	}()
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err != nil {
		return err
	}
	for {
		if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
			return err
		}
		say("ran")
	}
}

// TestCollectorAgainstAll lets processes build, tag, replace, remove, export and
// import while two others collect garbage at grace 0. All are killed at moments
// that chance picks, again and again. Nothing acknowledged may be lost, no ref
// may lack a blob, and after a last collection nothing else may be left.
func TestCollectorAgainstAll(t *testing.T) {
	const writers, collectors = 3, 2
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	root := filepath.Join(t.TempDir(), "root")
	m := newCrashModel(writers)
	acks, collections := 0, 0
	for round := range scaled(3, 8, 150) {
		ws := make([]*worker, writers+collectors)
		said := make([][]string, len(ws))
		for i := range ws {
			if i < writers {
				ws[i] = startWorker(t, "crash", root, strconv.Itoa(i), strconv.Itoa(round), strconv.FormatUint(rng.Uint64(), 10), "gc")
			} else {
				ws[i] = startWorker(t, "gc", root)
			}
		}
		// Everybody is listened to, so that nobody stops for want of a listener.
		var wg sync.WaitGroup
		enough := make(chan struct{}, 2*len(ws))
		lines := 50 + rng.IntN(150)
		for i := range ws {
			wg.Go(func() {
				for ws[i].out.Scan() {
					if said[i] = append(said[i], ws[i].out.Text()); len(said[i]) == lines && i < writers {
						enough <- struct{}{}
					}
				}
				enough <- struct{}{} // ended by itself: found out below
			})
		}
		<-enough
		for _, i := range rng.Perm(len(ws)) {
			time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond) // where in an operation the kill falls
			if err := ws[i].cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		for i, w := range ws {
			if s := w.end(); w.stderr.Len() > 0 {
				t.Fatalf("round %d: worker %d ended by itself: %s", round, i, s)
			}
			if i >= writers {
				collections += len(said[i])
				continue
			}
			if err := m.replay(said[i]); err != nil {
				t.Fatalf("round %d: worker %d: %v", round, i, err)
			}
			acks += len(said[i]) / 2
		}
		r, err := ocilocal.Open(t.Context(), root, nil)
		if err != nil {
			t.Fatal(err)
		}
		collect(t, r, atOnce)
		if again := collect(t, r, atOnce); again.Deleted != (ocilocal.Count{}) || again.Orphans != (ocilocal.Count{}) {
			t.Errorf("a collection leaves %+v to the next", again)
		}
		mustClose(t, r)
		m.settled(checkCollected(t, root, m.model()))
		if t.Failed() {
			t.Fatalf("round %d of seed %d", round, seed)
		}
	}
	t.Logf("%d acknowledged calls, %d collections", acks, collections)
}
