package ocilocal_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// gcWorker collects garbage with grace 0 until it is killed, and says "ran" each time.
func gcWorker(in *bufio.Scanner, args []string) error {
	endWithParent(in)
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

// verifyWorker verifies, and reads all refs, until it is killed, and says "ran" each time.
// A blob on its way in or out may be unrecorded, and a collector that was killed leaves rows
// without files. Any other problem is a broken promise.
func verifyWorker(in *bufio.Scanner, args []string) error {
	endWithParent(in)
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err != nil {
		return err
	}
	for {
		for p, err := range r.Verify(ctx, nil) {
			if err == nil && p.Kind != ocilocal.ProblemUnrecorded && p.Kind != ocilocal.ProblemCollected {
				err = fmt.Errorf("%v", p)
			}
			if err != nil {
				return err
			}
		}
		for ref, err := range r.Refs(ctx, nil) {
			if err != nil {
				return err
			}
			if _, err = readLabelled(r, ref.Reference.String()); err == nil {
				continue
			}
			// Unless it was moved, and collected while it was being read.
			now, resolveErr := r.Resolve(ctx, ref.Reference)
			if !errors.Is(resolveErr, ocilocal.ErrNotFound) && (resolveErr != nil || now.Digest == ref.Descriptor.Digest) {
				return fmt.Errorf("%s is not whole: %w", ref.Reference, errors.Join(err, resolveErr))
			}
		}
		say("ran")
	}
}

// remoteArtifacts serves the artifacts that workers pull: small ones, and one that is large enough
// for a kill to interrupt its transfer.
func remoteArtifacts(t *testing.T) *server {
	t.Helper()
	s := newServer(t)
	r := openTemp(t, nil)
	for n := range remoteRefs {
		ref := s.ref(remoteName(n))
		layers := [][]byte{[]byte(remoteLabel(n)), poolLayer(n)}
		if n == 0 {
			layers = append(layers, bytes.Repeat([]byte("large"), 1<<19))
		}
		if _, err := publishLabelled(r, ref.String(), remoteLabel(n), ocilocal.Replace, layers...); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{Remote: &ocilocal.Remote{}}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// suspend stops a process until it is resumed or killed. It is nil on systems that cannot.
var suspend func(p *os.Process) (resume func() error, err error)

// TestCollectorAgainstAll lets processes build, tag, replace, remove, export, import and pull,
// while two others collect garbage with grace 0 and one verifies. In each round one process is
// stopped for a while, and all are killed at random moments. No acknowledged change is lost, and no
// ref lacks a blob. A last collection leaves no file that no ref needs.
func TestCollectorAgainstAll(t *testing.T) {
	t.Parallel()
	const writers, collectors, verifiers = 3, 2, 1
	s := remoteArtifacts(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	root := filepath.Join(t.TempDir(), "root")
	m := newCrashModel(writers)
	acks, collections, verified := 0, 0, 0
	rounds := scaled(2, 8, 150)
	for round := 0; round < rounds || deepLevel() > 1 && (acks < 50_000 || collections < 1000); round++ {
		ws := make([]*worker, writers+collectors+verifiers)
		said := make([][]string, len(ws))
		for i := range ws {
			if i < writers {
				ws[i] = startWorker(t, "crash", root, strconv.Itoa(i), strconv.Itoa(round), strconv.FormatUint(rng.Uint64(), 10), "gc", s.host)
			} else if i >= writers+collectors {
				ws[i] = startWorker(t, "verify", root)
			} else {
				ws[i] = startWorker(t, "gc", root)
			}
		}
		// The parent reads all output, so that no worker blocks on a full pipe.
		var wg sync.WaitGroup
		enough := make(chan struct{}, 3*len(ws))
		lines := 50 + rng.IntN(150)
		for i := range ws {
			wg.Go(func() {
				for ws[i].out.Scan() {
					if said[i] = append(said[i], ws[i].out.Text()); len(said[i])%lines == 0 && len(said[i]) <= 2*lines && i < writers {
						enough <- struct{}{}
					}
				}
				enough <- struct{}{} // ended by itself: found out below
			})
		}
		<-enough
		order := rng.Perm(len(ws))
		resume := func() error { return nil }
		if last := ws[order[len(ws)-1]]; suspend != nil {
			var err error
			if resume, err = suspend(last.cmd.Process); err != nil {
				t.Fatal(err)
			}
			select { // the others go on, unless that one has the lock
			case <-enough:
			case <-time.After(500 * time.Millisecond):
			}
		}
		going := rng.IntN(2) == 0 // or it is killed where it was stopped
		for n, i := range order {
			if going && n == len(order)/2 {
				if err := resume(); err != nil {
					t.Fatal(err)
				}
			}
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
			if i >= writers+collectors {
				verified += len(said[i])
				continue
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
	t.Logf("%d acknowledged calls, %d collections, %d verifications, %d bytes pulled", acks, collections, verified, s.served())
}
