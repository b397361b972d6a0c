package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["churn"] = churnWorker }

func churnRef(name string, i int) string { return fmt.Sprintf("example.com/churn/%s:r%d", name, i) }

// churnWorker opens, uses and closes a root many times.
func churnWorker(in *bufio.Scanner, args []string) error {
	ctx := context.Background()
	root, name := args[0], args[1]
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	say("ready")
	in.Scan()
	for i := range count {
		if i%3 == 2 { // some only read
			r, err := ocilocal.OpenReadOnly(ctx, root, nil)
			if err != nil {
				return err
			}
			if label, err := readLabelled(r, churnRef(name, i-1)); err != nil || label != name {
				return fmt.Errorf("%s reads %q, %w", churnRef(name, i-1), label, err)
			}
			if err := r.Close(); err != nil {
				return err
			}
			continue
		}
		r, err := ocilocal.Open(ctx, root, nil)
		if err != nil {
			return err
		}
		if _, err := publishLabelled(r, churnRef(name, i), name, ocilocal.KeepExisting, []byte(name), []byte("in all")); err != nil {
			return err
		}
		if err := r.Close(); err != nil {
			return err
		}
	}
	say("done")
	return nil
}

// TestOpenCloseChurn: eight processes open, write, read and close one root many times. Each Close
// may be the last one, and its checkpoint runs while others open the root.
func TestOpenCloseChurn(t *testing.T) {
	t.Parallel()
	const processes = 8
	count := scaled(9, 24, 150)
	root := filepath.Join(t.TempDir(), "root")
	want := model{}
	var ws []*worker
	for p := range processes {
		name := fmt.Sprint("p", p)
		ws = append(ws, startWorker(t, "churn", root, name, strconv.Itoa(count)))
		for i := range count {
			if i%3 != 2 {
				want[churnRef(name, i)] = []string{name}
			}
		}
	}
	runTogether(ws, "done")
	checkStore(t, root, want)
}

// TestFirstOpenRaceWithoutLinks is the race for a new root on a file system without hard links. One
// opener is held right before it renames its index to the free name. If another opener took the name
// then, the rename would replace its index, and its acknowledged refs would be lost.
func TestFirstOpenRaceWithoutLinks(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	open := func(ref string, fault func(op, name string) error) (done chan error) {
		done = make(chan error, 1)
		go func() {
			r, err := ocilocal.OpenFaulty(context.Background(), root, fault)
			if err == nil {
				err = errors.Join(publishing(r, ref, "x", ocilocal.KeepExisting)(), r.Close())
			}
			done <- err
		}()
		return done
	}
	reached, let := make(chan struct{}), make(chan struct{})
	first := open(newRef, func(op, name string) error {
		if op+" "+name == "rename index.sqlite3" {
			close(reached)
			<-let
		}
		return noLinks(op, name)
	})
	<-reached
	tries, waiting := 0, make(chan struct{})
	second := open(keptRef, func(op, name string) error {
		if op+" "+name == "lock ." {
			if tries++; tries == 3 {
				close(waiting)
			}
		}
		return noLinks(op, name)
	})
	select {
	case <-waiting:
	case err := <-second:
		t.Errorf("the second opener went ahead of the first: %v", err)
		second <- err
	}
	close(let)
	for _, done := range []chan error{first, second} {
		if err := outcome(t, done); err != nil {
			t.Error(err)
		}
	}
	checkStore(t, root, model{newRef: {"x"}, keptRef: {"x"}})
}
