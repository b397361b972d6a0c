package ocilocal_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// Every crash worker writes the sharedRefs. Each of the ownRefs has one writer.
const (
	sharedRefs = 3
	ownRefs    = 6
)

func ownRef(worker, n int) string { return fmt.Sprintf("example.com/crash/own%d:r%d", worker, n) }
func sharedRef(n int) string      { return fmt.Sprintf("example.com/crash/shared:r%d", n) }

// poolLayer returns one of a few layers that many artifacts have, so that workers share blobs.
func poolLayer(n int) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("shared layer %d\n", n)), 100+300*(n%6))
}

// crashWorker builds, tags, replaces and removes until it is killed. It says
//
//	try REF LABEL   before a call that points REF at LABEL ("-": removes it)
//	ack             after that call succeeded
//	nak             after it reported that it did nothing
func crashWorker(in *bufio.Scanner, args []string) error {
	root, generation := args[0], args[2]
	number, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	seed, err := strconv.ParseUint(args[3], 10, 64)
	if err != nil {
		return err
	}
	collected := len(args) > 4 // another process collects garbage at grace 0
	ops := 13
	if len(args) > 5 { // there is a remote registry
		ops++
	}
	endWithParent(in)
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, uint64(number)))
	r, err := ocilocal.Open(ctx, root, nil)
	if err != nil {
		return err
	}
	type built struct {
		label  string
		digest digest.Digest
	}
	pool := scaled(6, 6, 200) // layers that many artifacts share
	var builds []built
	remote := &ocilocal.Remote{}
	mine := map[string]string{} // the labels of own refs, as far as this process knows
	for seq := 0; ; seq++ {
		label := fmt.Sprintf("w%d.g%s.s%d", number, generation, seq)
		unique := append([]byte(label), make([]byte, rng.IntN(64<<10))...)
		layers := [][]byte{unique, poolLayer(rng.IntN(pool))}
		ref := ownRef(number, rng.IntN(ownRefs))
		switch op := rng.IntN(ops); op {
		case 0, 1, 2, 3: // build, replacing
			say("try", ref, label)
			u, err := publishLabelled(r, ref, label, ocilocal.Replace, layers...)
			if err != nil {
				return err
			}
			say("ack")
			mine[ref] = label
			builds = append(builds, built{label, u.Descriptor.Digest})
		case 4, 5: // build, keeping
			say("try", ref, label)
			_, err := publishLabelled(r, ref, label, ocilocal.KeepExisting, layers...)
			switch {
			case err == nil:
				say("ack")
				mine[ref] = label
			case errors.Is(err, ocilocal.ErrConflict):
				say("nak")
			default:
				return err
			}
		case 6: // point another ref at something built before
			if len(builds) == 0 {
				continue
			}
			b := builds[rng.IntN(len(builds))]
			say("try", ref, b.label)
			_, err := r.Tag(ctx, b.digest, ocilocal.MustParseReference(ref), &ocilocal.PublishOptions{Policy: ocilocal.Replace})
			switch {
			case err == nil:
				say("ack")
				mine[ref] = b.label
			case collected && errors.Is(err, ocilocal.ErrNotFound):
				say("nak")
			default:
				return err
			}
		case 7: // remove
			say("try", ref, "-")
			_, err := r.Remove(ctx, ocilocal.MustParseReference(ref))
			switch {
			case err == nil:
				say("ack")
			case errors.Is(err, ocilocal.ErrNotFound):
				say("nak")
			default:
				return err
			}
			delete(mine, ref)
		case 8: // a ref that the others write too
			ref := sharedRef(rng.IntN(sharedRefs))
			say("try", ref, label)
			if _, err := publishLabelled(r, ref, label, ocilocal.Replace, layers...); err != nil {
				return err
			}
			say("ack")
			_, err := readLabelled(r, ref)
			if collected && errors.Is(err, ocilocal.ErrNotFound) {
				err = nil // replaced by another and collected while it was being read
			}
			if err != nil {
				return err
			}
		case 9: // read back, now, what was acknowledged to this process
			for _, ref := range slices.Sorted(maps.Keys(mine)) {
				if got, err := readLabelled(r, ref); err != nil || got != mine[ref] {
					return fmt.Errorf("%s reads %q, %v; want %q", ref, got, err, mine[ref])
				}
			}
		case 10: // give up a build that has layers
			b, err := r.NewBuilder(ocilocal.MustParseReference(ref), &ocilocal.BuilderOptions{ArtifactType: testType})
			if err != nil {
				return err
			}
			if _, err := b.AddLayer(ctx, "application/octet-stream", bytes.NewReader(unique), nil); err != nil {
				return err
			}
			if err := b.Cancel(); err != nil {
				return err
			}
		case 11: // leave and come back
			if err := r.Close(); err != nil {
				return err
			}
			if r, err = ocilocal.Open(ctx, root, nil); err != nil {
				return err
			}
		case 12: // export one, and import it under another name
			from := ownRef(number, rng.IntN(ownRefs))
			if mine[from] == "" {
				continue
			}
			var archive bytes.Buffer
			if err := r.ExportArchive(ctx, &archive, []ocilocal.Reference{ocilocal.MustParseReference(from)}, nil); err != nil {
				return err
			}
			say("try", ref, mine[from])
			if _, err := r.ImportArchive(ctx, &archive, &ocilocal.ImportOptions{
				Reference: ocilocal.MustParseReference(ref), Rename: true, PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace},
			}); err != nil {
				return err
			}
			say("ack")
			mine[ref] = mine[from]
		case 13: // pull
			n := rng.IntN(remoteRefs)
			say("try", ref, remoteLabel(n))
			if _, err := r.Pull(ctx, ocilocal.MustParseReference(args[5]+"/"+remoteName(n)), &ocilocal.PullOptions{
				Remote: remote, As: ocilocal.MustParseReference(ref), PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace},
			}); err != nil {
				return err
			}
			say("ack")
			mine[ref] = remoteLabel(n)
		}
	}
}

// remoteRefs are on a remote registry.
const remoteRefs = 4

func remoteLabel(n int) string { return fmt.Sprintf("remote%d", n) }

// remoteName returns the name of an artifact on a remote registry, from which workers pull.
func remoteName(n int) string { return fmt.Sprintf("crash/remote:r%d", n) }

// A crashModel is the parent's knowledge of a root, from the replies of the workers.
type crashModel struct {
	refs   model               // own refs: what they may point at
	shared map[string][]string // shared refs: everything ever attempted
	acked  map[string]bool     // shared refs that must exist
}

func newCrashModel(workers int) *crashModel {
	m := &crashModel{refs: model{}, shared: map[string][]string{}, acked: map[string]bool{}}
	for w := range workers {
		for n := range ownRefs {
			m.refs[ownRef(w, n)] = []string{""}
		}
	}
	return m
}

// replay adds the replies of one worker up to its death.
func (m *crashModel) replay(lines []string) error {
	for len(lines) > 0 {
		words := strings.Fields(lines[0])
		if len(words) != 3 || words[0] != "try" {
			return fmt.Errorf("worker said %q", lines[0])
		}
		ref, label := words[1], words[2]
		if label == "-" {
			label = ""
		}
		_, own := m.refs[ref]
		if !own {
			m.shared[ref] = append(m.shared[ref], label)
		}
		if len(lines) == 1 { // killed in the call, which may have happened or not
			if own {
				m.refs[ref] = append(m.refs[ref], label)
			}
			return nil
		}
		switch {
		case lines[1] == "nak":
		case lines[1] != "ack":
			return fmt.Errorf("worker said %q after %q", lines[1], lines[0])
		case own:
			m.refs[ref] = []string{label}
		default:
			m.acked[ref] = true
		}
		lines = lines[2:]
	}
	return nil
}

func (m *crashModel) model() model {
	want := maps.Clone(m.refs)
	for ref, labels := range m.shared {
		want[ref] = slices.Clone(labels)
		if !m.acked[ref] {
			want[ref] = append(want[ref], "")
		}
	}
	return want
}

// settled narrows the model to the labels that a check has seen.
func (m *crashModel) settled(got map[string]string) {
	for ref := range m.refs {
		m.refs[ref] = []string{got[ref]}
	}
	for ref := range m.shared {
		m.acked[ref] = m.acked[ref] || got[ref] != ""
	}
}

// TestKill kills four processes that write to one root, at random moments, and then checks the
// registry's promises. Every fifth round starts with a new root, so that kills also hit the first
// open.
func TestKill(t *testing.T) {
	t.Parallel()
	const workers = 4
	rounds := scaled(4, 20, 250)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	var root string
	var m *crashModel
	acks := 0
	for round := range rounds {
		if round%5 == 0 {
			root = filepath.Join(t.TempDir(), "root")
			m = newCrashModel(workers)
		}
		ws := make([]*worker, workers)
		said := make([][]string, workers)
		for i := range ws {
			ws[i] = startWorker(t, "crash", root, strconv.Itoa(i), strconv.Itoa(round), strconv.FormatUint(rng.Uint64(), 10))
		}
		for n, i := range rng.Perm(workers) {
			for range rng.IntN(80) {
				if !ws[i].out.Scan() {
					t.Fatalf("round %d: worker %d ended by itself: %s", round, i, ws[i].end())
				}
				said[i] = append(said[i], ws[i].out.Text())
			}
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond) // where in an operation the kill falls
			if err := ws[i].cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			for ws[i].out.Scan() {
				said[i] = append(said[i], ws[i].out.Text())
			}
			if s := ws[i].end(); ws[i].stderr.Len() > 0 {
				t.Fatalf("round %d: worker %d ended by itself: %s", round, i, s)
			}
			if err := m.replay(said[i]); err != nil {
				t.Fatalf("round %d: worker %d: %v", round, i, err)
			}
			acks += len(said[i]) / 2
			if n == 0 { // come in, and sweep, while the others are at work
				publishAlone(t, root, m)
			}
		}
		publishAlone(t, root, m)
		m.settled(checkStore(t, root, m.model()))
		if t.Failed() {
			t.Fatalf("round %d of seed %d", round, seed)
		}
	}
	t.Logf("%d rounds, %d acknowledged calls", rounds, acks)
}

// publishAlone opens root, publishes, which sweeps tmp/, and closes.
func publishAlone(t *testing.T, root string, m *crashModel) {
	t.Helper()
	const ref = "example.com/crash/parent:v1"
	label := fmt.Sprint("parent", len(m.refs[ref]))
	r := mustOpen(t, root)
	if _, err := publishLabelled(r, ref, label, ocilocal.Replace, poolLayer(0), []byte(label)); err != nil {
		t.Fatal(err)
	}
	if got, err := readLabelled(r, ref); err != nil || got != label {
		t.Fatalf("%s reads %q, %v; want %q", ref, got, err, label)
	}
	mustClose(t, r)
	m.refs[ref] = []string{label}
}

// TestKillDuringLayer kills a process in the middle of a layer. Only half a layer is left, in tmp/,
// and the next writer sweeps it.
func TestKillDuringLayer(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	w := startWorker(t, "hold", root)
	w.expect("half")
	if len(tmpEntries(t, root)) != 1 {
		t.Fatalf("tmp/ has %q, want the worker's session", tmpEntries(t, root))
	}
	w.kill()
	r := mustOpen(t, root)
	if _, err := publishLabelled(r, "example.com/hold/after:v1", "after", ocilocal.KeepExisting, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if len(tmpEntries(t, root)) != 1 {
		t.Errorf("tmp/ has %q, want this handle's session alone", tmpEntries(t, root))
	}
	mustClose(t, r)
	checkStore(t, root, model{"example.com/hold/after:v1": {"after"}})
}

// holdWorker stops in the middle of a layer, and continues when its parent sends a line.
func holdWorker(in *bufio.Scanner, args []string) error {
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err != nil {
		return err
	}
	b, err := r.NewBuilder(ocilocal.MustParseReference(holdRef), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		return err
	}
	if err := b.SetAnnotation(labelKey, "held"); err != nil {
		return err
	}
	// A whole layer waits in tmp/ as well.
	if _, err := b.AddLayer(ctx, "application/octet-stream", strings.NewReader("first"), nil); err != nil {
		return err
	}
	half := &waitReader{in: in}
	rest := bytes.NewReader(bytes.Repeat([]byte("b"), 1<<20))
	if _, err := b.AddLayer(ctx, "application/octet-stream", io.MultiReader(bytes.NewReader(make([]byte, 1<<20)), half, rest), nil); err != nil {
		return err
	}
	if _, err := b.Build(ctx); err != nil {
		return err
	}
	if err := r.Close(); err != nil {
		return err
	}
	say("done")
	return nil
}

const holdRef = "example.com/hold/live:v1"

// waitReader says "half", waits for a line, and is at its end.
type waitReader struct{ in *bufio.Scanner }

func (w *waitReader) Read([]byte) (int, error) {
	say("half")
	if !w.in.Scan() {
		return 0, errors.New("parent is gone")
	}
	return 0, io.EOF
}
