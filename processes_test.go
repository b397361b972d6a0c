package ocilocal_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// publishWorker publishes a number of refs when its parent sends a line.
func publishWorker(in *bufio.Scanner, args []string) error {
	root, name := args[0], args[1]
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	r, err := ocilocal.Open(context.Background(), root, nil)
	if err != nil {
		return err
	}
	say("ready")
	in.Scan()
	for i := range count {
		label := fmt.Sprintf("%s.%d", name, i)
		if _, err := publishLabelled(r, manyRef(name, i), label, ocilocal.KeepExisting, []byte(label), []byte("in all of them")); err != nil {
			return err
		}
	}
	say("done")
	return r.Close()
}

func manyRef(name string, i int) string { return fmt.Sprintf("example.com/many/%s:r%d", name, i) }

// TestManyWriters: four processes publish refs, each under its own names, and no ref is lost.
func TestManyWriters(t *testing.T) {
	t.Parallel()
	const processes = 4
	count := scaled(50, 250, 1000)
	root := filepath.Join(t.TempDir(), "root")
	want := model{}
	var ws []*worker
	for p := range processes {
		name := fmt.Sprint("p", p)
		ws = append(ws, startWorker(t, "publish", root, name, strconv.Itoa(count)))
		for i := range count {
			want[manyRef(name, i)] = []string{fmt.Sprintf("%s.%d", name, i)}
		}
	}
	runTogether(ws, "done")

	r, err := ocilocal.OpenReadOnly(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	listed := 0
	for _, err := range r.Refs(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		listed++
	}
	if listed != processes*count {
		t.Errorf("%d refs are listed, want %d", listed, processes*count)
	}
	mustClose(t, r)
	if got := checkStore(t, root, want); len(got) != processes*count {
		t.Errorf("%d refs survived, want %d", len(got), processes*count)
	}
}

// raceWorker publishes its own artifact under each ref that its parent sends:
// "REF POLICY" → "OUTCOME INCOMING EXISTING".
func raceWorker(in *bufio.Scanner, args []string) error {
	root, name := args[0], args[1]
	r, err := ocilocal.Open(context.Background(), root, nil)
	if err != nil {
		return err
	}
	say("ready")
	for in.Scan() {
		var ref string
		var policy ocilocal.Policy
		if _, err := fmt.Sscan(in.Text(), &ref, &policy); err != nil {
			return err
		}
		u, err := publishLabelled(r, ref, name, policy, []byte(name+ref))
		if conflict, ok := errors.AsType[*ocilocal.ConflictError](err); ok {
			if u.Outcome != ocilocal.Conflicted || !errors.Is(err, ocilocal.ErrConflict) {
				return fmt.Errorf("outcome %v with error %w", u.Outcome, err)
			}
			say("conflict", conflict.Incoming, conflict.Existing)
			continue
		}
		if err != nil {
			return err
		}
		say(u.Outcome, u.Descriptor.Digest, "x"+u.Existing)
	}
	return r.Close()
}

// race lets eight processes publish under one ref, and returns their replies.
func race(ws []*worker, ref string, policy ocilocal.Policy) [][]string {
	for _, w := range ws {
		w.send(ref, strconv.Itoa(int(policy)))
	}
	var replies [][]string
	for _, w := range ws {
		replies = append(replies, w.line())
	}
	return replies
}

// TestRaceForOneRef: eight processes publish eight different artifacts under one ref at once.
func TestRaceForOneRef(t *testing.T) {
	t.Parallel()
	const processes = 8
	rounds := scaled(5, 20, 200)
	root := filepath.Join(t.TempDir(), "root")
	var ws []*worker
	var names []string
	for p := range processes {
		names = append(names, fmt.Sprint("p", p))
		ws = append(ws, startWorker(t, "race", root, names[p]))
	}
	for _, w := range ws {
		w.expect("ready")
	}
	want := model{}
	for round := range rounds {
		// KeepExisting: one process wins, and all others report its digest.
		ref := fmt.Sprintf("example.com/race/keep:r%d", round)
		var winner string
		var losers []string
		for i, reply := range race(ws, ref, ocilocal.KeepExisting) {
			switch reply[0] {
			case "inserted":
				if winner != "" {
					t.Fatalf("%s: two winners", ref)
				}
				winner = reply[1]
				want[ref] = []string{names[i]}
			case "conflict":
				losers = append(losers, reply[2])
			default:
				t.Fatalf("%s: reply %q", ref, reply)
			}
		}
		if winner == "" || len(losers) != processes-1 {
			t.Fatalf("%s: winner %q, %d losers", ref, winner, len(losers))
		}
		for _, existing := range losers {
			if existing != winner {
				t.Errorf("%s: a loser was told of %s, the winner is %s", ref, existing, winner)
			}
		}

		// Replace: all succeed, one after the other. The replaced digests form one chain.
		ref = fmt.Sprintf("example.com/race/replace:r%d", round)
		want[ref] = names
		next := map[string]string{}
		for _, reply := range race(ws, ref, ocilocal.Replace) {
			before := reply[2][len("x"):]
			if after, taken := next[before]; taken {
				t.Fatalf("%s: both %s and %s came after %q", ref, after, reply[1], before)
			}
			next[before] = reply[1]
			if (reply[0] == "inserted") != (before == "") || (reply[0] == "replaced") != (before != "") {
				t.Fatalf("%s: reply %q", ref, reply)
			}
		}
		last := ""
		for range processes {
			last = next[last]
		}
		r, err := ocilocal.OpenReadOnly(t.Context(), root, nil)
		if err != nil {
			t.Fatal(err)
		}
		desc, err := r.Resolve(t.Context(), ocilocal.MustParseReference(ref))
		if err != nil || desc.Digest.String() != last {
			t.Errorf("%s: resolves to %s, %v; the last of the chain is %q", ref, desc.Digest, err, last)
		}
		mustClose(t, r)
	}
	for _, w := range ws {
		w.finish()
	}
	checkStore(t, root, want)
}

// openWorker opens, writes to and closes each root that its parent sends: "ROOT" → "opened ID".
func openWorker(in *bufio.Scanner, args []string) error {
	say("ready")
	for in.Scan() {
		r, err := ocilocal.Open(context.Background(), in.Text(), nil)
		if err != nil {
			return err
		}
		if _, err := publishLabelled(r, "example.com/open/"+args[0]+":v1", args[0], ocilocal.KeepExisting, []byte("the same for all")); err != nil {
			return err
		}
		id := r.ID()
		if err := r.Close(); err != nil {
			return err
		}
		say("opened", id)
	}
	return nil
}

// TestFirstOpenRace: eight processes open a root that does not exist yet.
func TestFirstOpenRace(t *testing.T) {
	t.Parallel()
	const processes = 8
	rounds := scaled(15, 50, 400)
	dir := t.TempDir()
	var ws []*worker
	want := model{}
	for p := range processes {
		name := fmt.Sprint("p", p)
		ws = append(ws, startWorker(t, "open", name))
		want["example.com/open/"+name+":v1"] = []string{name}
	}
	for _, w := range ws {
		w.expect("ready")
	}
	for round := range rounds {
		root := filepath.Join(dir, fmt.Sprint("parent", round), "root")
		for _, w := range ws {
			w.send(root)
		}
		ids := map[string]bool{}
		for _, w := range ws {
			ids[w.expect("opened")[0]] = true
		}
		if len(ids) != 1 {
			t.Errorf("round %d: ids %v, want one for all", round, ids)
		}
		checkStore(t, root, want)
		if t.Failed() {
			t.FailNow()
		}
	}
	for _, w := range ws {
		w.finish()
	}
}

// TestFirstOpenRaceInProcess is the same race between goroutines, which keep their handles open.
func TestFirstOpenRaceInProcess(t *testing.T) {
	t.Parallel()
	const openers = 8
	for range scaled(5, 15, 200) {
		root := filepath.Join(t.TempDir(), "root")
		rs := make([]*ocilocal.LocalRegistry, openers)
		errs := make([]error, openers)
		var wg sync.WaitGroup
		for i := range openers {
			wg.Go(func() { rs[i], errs[i] = ocilocal.Open(t.Context(), root, nil) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		want := model{}
		for i, r := range rs {
			ref := fmt.Sprintf("example.com/open/g%d:v1", i)
			if _, err := publishLabelled(r, ref, "g", ocilocal.KeepExisting, []byte("g")); err != nil {
				t.Fatal(err)
			}
			want[ref] = []string{"g"}
			// The open handles see it. The Close of another handle took nothing from them.
			for _, later := range rs[i:] {
				if label, err := readLabelled(later, ref); err != nil || label != "g" {
					t.Fatalf("%s reads %q, %v", ref, label, err)
				}
			}
			mustClose(t, r)
		}
		checkStore(t, root, want)
	}
}

// TestKeepExistingGoroutines: goroutines of one handle race for a ref. Their writes share commits,
// and exactly one wins.
func TestKeepExistingGoroutines(t *testing.T) {
	const goroutines = 16
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	want := model{}
	for round := range scaled(5, 20, 200) {
		ref := fmt.Sprintf("example.com/race/goroutines:r%d", round)
		updates := make([]ocilocal.RefUpdate, goroutines)
		errs := make([]error, goroutines)
		start := make(chan struct{})
		var wg sync.WaitGroup
		for i := range goroutines {
			wg.Go(func() {
				<-start
				updates[i], errs[i] = publishLabelled(r, ref, fmt.Sprint("g", i), ocilocal.KeepExisting, []byte(fmt.Sprint(round, i)))
			})
		}
		close(start)
		wg.Wait()
		var winner digest.Digest
		for i, u := range updates {
			if u.Outcome == ocilocal.Inserted {
				if winner != "" {
					t.Fatalf("%s: two winners", ref)
				}
				winner = u.Descriptor.Digest
				want[ref] = []string{fmt.Sprint("g", i)}
			}
		}
		for i, err := range errs {
			if updates[i].Outcome == ocilocal.Inserted && err == nil {
				continue
			}
			conflict, ok := errors.AsType[*ocilocal.ConflictError](err)
			if !ok || updates[i].Outcome != ocilocal.Conflicted || conflict.Existing != winner || conflict.Incoming == winner {
				t.Errorf("%s: goroutine %d: %v, %v; winner is %s", ref, i, updates[i].Outcome, err, winner)
			}
		}
	}
	mustClose(t, r)
	checkStore(t, root, want)
}

// TestLiveSessionKept: an open or a publish keeps the session of a live process or handle in tmp/,
// and sweeps the session of a dead one.
func TestLiveSessionKept(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	w := startWorker(t, "hold", root)
	w.expect("half")
	live := liveFiles(t, root)
	if len(live) < 2 {
		t.Fatalf("the worker has %q in tmp/, want two layers", live)
	}

	// The same in this process, with a second handle.
	mine := mustOpen(t, root)
	b, err := mine.NewBuilder(ocilocal.MustParseReference("example.com/hold/mine:v1"), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.SetAnnotation(labelKey, "mine"); err != nil {
		t.Fatal(err)
	}
	pr, pw := io.Pipe()
	t.Cleanup(func() { pw.Close() }) // before the handle's, which waits for the call
	added := make(chan error, 1)
	go func() {
		_, err := b.AddLayer(context.Background(), "application/octet-stream", pr, nil)
		added <- err
	}()
	if _, err := pw.Write([]byte("one half, ")); err != nil {
		t.Fatal(err)
	}
	live = liveFiles(t, root)

	want := model{}
	for i := range 5 {
		dead := filepath.Join(root, "tmp", rand.Text())
		if err := os.Mkdir(dead, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dead, rand.Text()), []byte("half a lay"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, root)
		ref := fmt.Sprintf("example.com/hold/other:r%d", i)
		want[ref] = []string{"other"}
		if _, err := publishLabelled(r, ref, "other", ocilocal.KeepExisting, []byte(ref)); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
		if _, err := os.Lstat(dead); err == nil {
			t.Error("what a dead session left is still there after a publish")
		}
		if now := liveFiles(t, root); !slices.Equal(now, live) {
			t.Fatalf("live files were %q, now %q", live, now)
		}
	}

	if _, err := pw.Write([]byte("the other half")); err != nil {
		t.Fatal(err)
	}
	pw.Close()
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustClose(t, mine)
	w.send("go on")
	w.expect("done")
	w.finish()
	want["example.com/hold/mine:v1"] = []string{"mine"}
	want[holdRef] = []string{"held"}
	checkStore(t, root, want)
}

// liveFiles lists the files two levels below tmp/.
func liveFiles(t *testing.T, root string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(root, "tmp", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}
