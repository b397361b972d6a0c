package ocilocal_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// anonymous publishes an artifact without a name.
func anonymous(r *ocilocal.LocalRegistry, text string) (*ocilocal.LocalArtifact, error) {
	ctx := context.Background()
	b, err := r.NewAnonymousBuilder(&ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		return nil, err
	}
	defer b.Cancel()
	if _, err := b.AddLayerBytes(ctx, "text/plain", []byte(text), nil); err != nil {
		return nil, err
	}
	return b.Build(ctx)
}

func mustAnonymous(t *testing.T, r *ocilocal.LocalRegistry, text string) *ocilocal.LocalArtifact {
	t.Helper()
	a, err := anonymous(r, text)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// anonymousRefs returns what is listed.
func anonymousRefs(t *testing.T, r *ocilocal.LocalRegistry) (refs []ocilocal.Reference) {
	t.Helper()
	for ref, err := range r.AnonymousRefs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref.Reference)
	}
	return refs
}

func referencesOf(refs []ocilocal.Ref) (list []ocilocal.Reference) {
	for _, r := range refs {
		list = append(list, r.Reference)
	}
	return list
}

// aged gives the matching refs a time that is so long ago.
func aged(t *testing.T, r *ocilocal.LocalRegistry, by time.Duration, like string) {
	t.Helper()
	err := ocilocal.IndexWrite(t.Context(), r, func(exec func(string) error) error {
		return exec(fmt.Sprintf("UPDATE refs SET moved = moved - %d WHERE reference LIKE '%s'", by.Microseconds(), like))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAnonymous(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	form := regexp.MustCompile(`^` + r.ID() + `\.ocilocal\.local/anonymous:[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[a-z2-7]{13}$`)
	var want []ocilocal.Reference
	local := time.Local
	time.Local = time.FixedZone("elsewhere", 3600)
	t.Cleanup(func() { time.Local = local })
	before := time.Now().UTC().Truncate(time.Microsecond)
	for _, text := range []string{"same", "same", "other"} {
		a := mustAnonymous(t, r, text)
		if !form.MatchString(a.Reference().String()) {
			t.Errorf("%s is not of the form", a.Reference())
		}
		if again, err := r.Load(ctx, a.Reference()); err != nil || again.Digest() != a.Digest() {
			t.Error(again, err)
		}
		stamp, _, _ := strings.Cut(a.Reference().Tag(), "-")
		at, err := time.Parse("20060102T150405.000000Z", stamp)
		if err != nil || at.Before(before) || at.After(time.Now()) {
			t.Errorf("%s after %v: %v", stamp, before, err)
		}
		want = append(want, a.Reference())
		for start := time.Now(); time.Since(start) < 2*time.Microsecond; { // the names' next tick
		}
	}
	// Names that look much like it are others'.
	name := want[0].Name()
	for _, s := range []string{
		name + ":latest", name + "2:" + want[0].Tag(), name + "/x:" + want[0].Tag(), "x" + name + ":" + want[0].Tag(),
		name + ":" + want[0].Tag() + "x", name + ":" + want[0].Tag()[1:], name + ":20261399T000000.000000Z-aaaaaaaaaaaaa",
	} {
		child(t, r, s, ocilocal.BuilderOptions{}, nil, nil, "named")
	}
	if got := anonymousRefs(t, r); !slices.Equal(got, want) {
		t.Errorf("listed %v, want %v", got, want)
	}
	for ref, err := range r.AnonymousRefs(ctx) { // may be left early
		if err != nil || ref.Reference != want[0] {
			t.Error(ref, err)
		}
		break
	}
	if _, err := r.NewAnonymousBuilder(&ocilocal.BuilderOptions{PublishOptions: ocilocal.PublishOptions{Expected: manSHA}}); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Error(err)
	}
	// Pruned, only they go.
	removed, err := r.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace})
	if err != nil || !slices.Equal(referencesOf(removed), want) {
		t.Errorf("%v, want %v, %v", removed, want, err)
	}
	n := 0
	for _, err := range r.Refs(ctx, nil) {
		if n++; err != nil {
			t.Fatal(err)
		}
	}
	if n != 7 {
		t.Errorf("%d refs are left, want 7", n)
	}
}

func TestPruneAnonymous(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := openTemp(t, nil)
	const many = 230 // more than two pages
	var all []ocilocal.Reference
	for i := range many {
		all = append(all, mustAnonymous(t, r, fmt.Sprint(i%7)).Reference())
	}
	slices.SortFunc(all, ocilocal.Reference.Compare)
	kept := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "kept")
	prune := func(o *ocilocal.PruneOptions, want ...ocilocal.Reference) {
		t.Helper()
		got, err := r.PruneAnonymous(ctx, o)
		if err != nil || !slices.Equal(referencesOf(got), want) {
			t.Errorf("%d removed, want %d, %v", len(got), len(want), err)
		}
		for _, ref := range got {
			if ok, err := r.Exists(ctx, ref.Reference); ok || err != nil {
				t.Error(ref, err)
			}
		}
	}
	prune(nil)
	prune(&ocilocal.PruneOptions{OlderThan: time.Hour})
	aged(t, r, 23*time.Hour, "%-%")
	prune(nil)
	aged(t, r, 2*time.Hour, all[5].Tag())
	aged(t, r, 2*time.Hour, all[150].Tag())
	prune(nil, all[5], all[150])
	prune(nil)
	// One that was given another artifact isn't old any more.
	if _, err := r.Tag(ctx, kept.Digest(), all[7], &ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil {
		t.Fatal(err)
	}
	aged(t, r, -100*time.Hour, all[8].Tag()) // from the future, by a clock that was wrong
	rest := slices.DeleteFunc(slices.Clone(all), func(ref ocilocal.Reference) bool {
		return slices.Contains([]ocilocal.Reference{all[5], all[150], all[7], all[8]}, ref)
	})
	prune(&ocilocal.PruneOptions{OlderThan: time.Hour}, rest...)
	if got := anonymousRefs(t, r); !slices.Equal(got, all[7:9]) {
		t.Errorf("left: %v", got)
	}
	// What was removed can be restored, until it is collected.
	removed, err := r.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: -1})
	if err != nil || !slices.Equal(referencesOf(removed), all[7:9]) {
		t.Fatal(removed, err)
	}
	if _, err := r.Tag(ctx, removed[1].Descriptor.Digest, removed[1].Reference, nil); err != nil {
		t.Fatal(err)
	}
	prune(&ocilocal.PruneOptions{OlderThan: time.Hour})
	report, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace})
	if err != nil || report.Deleted.Manifests != 6 {
		t.Errorf("%+v %v", report, err)
	}
	for _, a := range []digest.Digest{kept.Digest(), removed[1].Descriptor.Digest} {
		if _, err := r.LoadDigest(ctx, a); err != nil {
			t.Error(err)
		}
	}
}

func TestPruneAnonymousRefused(t *testing.T) {
	r := openTemp(t, nil)
	a := mustAnonymous(t, r, "text")
	all := &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := r.PruneAnonymous(cancelled, all); got != nil || !errors.Is(err, context.Canceled) {
		t.Error(got, err)
	}
	reader, err := ocilocal.OpenReadOnly(t.Context(), r.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, reader)
	if got, err := reader.PruneAnonymous(t.Context(), nil); got != nil || !errors.Is(err, ocilocal.ErrReadOnly) {
		t.Error(got, err)
	}
	if _, err := reader.NewAnonymousBuilder(nil); !errors.Is(err, ocilocal.ErrReadOnly) {
		t.Error(err)
	}
	if got := anonymousRefs(t, reader); !slices.Equal(got, []ocilocal.Reference{a.Reference()}) {
		t.Error(got)
	}
}

// TestPruneAnonymousMoved: a ref that is moved after it was read and before it is removed stays.
func TestPruneAnonymousMoved(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	var refs []ocilocal.Reference
	for i := range 4 {
		refs = append(refs, mustAnonymous(t, r, fmt.Sprint(i)).Reference())
	}
	slices.SortFunc(refs, ocilocal.Reference.Compare)
	update := func(set string, ref ocilocal.Reference) string {
		return fmt.Sprintf("UPDATE refs SET %s WHERE reference = '%s'", set, ref.Tag())
	}
	holding, let := make(chan struct{}), make(chan struct{})
	leader := make(chan error, 1)
	go func() {
		leader <- ocilocal.IndexWrite(ctx, r, func(exec func(string) error) error {
			close(holding)
			<-let
			return errors.Join(
				exec(update("(manifest, digest) = (SELECT manifest, digest FROM refs ORDER BY reference LIMIT 1)", refs[1])),
				exec(update("moved = moved + 1", refs[2])),
				exec("DELETE FROM refs WHERE reference = '"+refs[3].Tag()+"'"))
		})
	}()
	<-holding
	var removed []ocilocal.Ref
	pruned := make(chan error, 1)
	queued := ocilocal.IndexQueue(r)
	go func() {
		var err error
		removed, err = r.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace})
		pruned <- err
	}()
	for ; ocilocal.IndexQueue(r) == queued; runtime.Gosched() {
		if len(pruned) > 0 {
			t.Fatal(<-pruned)
		}
	}
	close(let)
	if err := errors.Join(<-leader, <-pruned); err != nil {
		t.Fatal(err)
	}
	if got := referencesOf(removed); !slices.Equal(got, refs[:1]) {
		t.Errorf("removed %v, want %v", got, refs[:1])
	}
	if got := anonymousRefs(t, r); !slices.Equal(got, refs[1:3]) {
		t.Errorf("left %v, want %v", got, refs[1:3])
	}
}

func TestImportAnonymous(t *testing.T) {
	ctx := t.Context()
	manifest, config := image("layer")
	second, _ := image("more")
	parts := []entry{blobEntry(manifest), blobEntry(second), blobEntry(config), blobEntry("layer"), blobEntry("more"), layoutVersion}
	index := func(entries ...string) entry {
		return entry{name: "index.json", body: `{"schemaVersion":2,"manifests":[` + strings.Join(entries, ",") + `]}`}
	}
	named := func(body, name string) string {
		return strings.TrimSuffix(desc(imageType, body), "}") + fmt.Sprintf(`,"annotations":{"org.opencontainers.image.ref.name":%q}}`, name)
	}
	for _, c := range []struct {
		name  string
		index entry
		opts  ocilocal.ImportOptions
		made  []bool // for each artifact: its name is made up
		want  error
	}{
		{"unnamed", index(desc(imageType, manifest)), ocilocal.ImportOptions{Anonymous: true}, []bool{true}, nil},
		{"as OMMX v2 writes it", index(strings.TrimSuffix(desc(imageType, manifest), "}") + `,"annotations":{}}`), ocilocal.ImportOptions{Anonymous: true}, []bool{true}, nil},
		{"bare tag", index(named(manifest, "v1")), ocilocal.ImportOptions{Anonymous: true}, []bool{true}, nil},
		{"no name", index(named(manifest, "two words")), ocilocal.ImportOptions{Anonymous: true}, []bool{true}, nil},
		{"several", index(desc(imageType, manifest), named(second, "example.com/b:v1"), desc(imageType, second)), ocilocal.ImportOptions{Anonymous: true}, []bool{true, false, true}, nil},
		{"named", index(named(manifest, "example.com/a:v1")), ocilocal.ImportOptions{Anonymous: true}, []bool{false}, nil},
		{"reference given", index(desc(imageType, manifest)), ocilocal.ImportOptions{Anonymous: true, Reference: ref("example.com/a:v1")}, []bool{false}, nil},
		{"nothing expected", index(desc(imageType, manifest)), ocilocal.ImportOptions{Anonymous: true, PublishOptions: ocilocal.PublishOptions{Expected: manSHA}}, nil, ocilocal.ErrInvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := append(slices.Clone(parts), c.index)
			dir := layoutDir(t, all...)
			r := openTemp(t, nil)
			var made []ocilocal.Reference
			for _, load := range []func() (*ocilocal.ImportResult, error){
				func() (*ocilocal.ImportResult, error) { return r.ImportLayout(ctx, dir, &c.opts) },
				func() (*ocilocal.ImportResult, error) {
					return r.ImportArchive(ctx, bytes.NewReader(tarOf(t, all...)), &c.opts)
				},
			} {
				got, err := load()
				if !errors.Is(err, c.want) {
					t.Fatal(err)
				}
				if err != nil {
					checkNothingVisible(t, r)
					continue
				}
				for i, a := range got.Artifacts {
					own := a.Update.Reference.Name() == r.ID()+".ocilocal.local/anonymous"
					if own != c.made[i] || a.Update.Reference.IsZero() {
						t.Errorf("%d is called %s", i, a.Update.Reference)
					}
					if own {
						made = append(made, a.Update.Reference)
					}
					if d, err := r.Resolve(ctx, a.Update.Reference); err != nil || d.Digest != a.Descriptor.Digest {
						t.Error(d, err)
					}
				}
			}
			slices.SortFunc(made, ocilocal.Reference.Compare)
			if got := anonymousRefs(t, r); !slices.Equal(got, made) {
				t.Errorf("listed %v, want %v", got, made)
			}
		})
	}
	// LoadPath names what has no name, with the option and without.
	r := openTemp(t, nil)
	dir := layoutDir(t, append(slices.Clone(parts), index(desc(imageType, manifest)))...)
	a, err := r.LoadPath(ctx, dir, &ocilocal.ImportOptions{Anonymous: true})
	if err != nil || !slices.Equal(anonymousRefs(t, r), []ocilocal.Reference{a.Reference()}) {
		t.Error(a, err)
	}
	if b, err := r.LoadPath(ctx, dir, nil); err != nil || !slices.Equal(anonymousRefs(t, r), []ocilocal.Reference{a.Reference(), b.Reference()}) {
		t.Error(b, err)
	}
	// Another registry's anonymous artifacts keep their names, and aren't taken for one's own.
	archive := filepath.Join(t.TempDir(), "a.tar")
	if err := r.ExportArchiveFile(ctx, archive, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	to := openTemp(t, nil)
	got, err := to.ImportArchiveFile(ctx, archive, &ocilocal.ImportOptions{Anonymous: true})
	if err != nil || got.Artifacts[0].Update.Reference != a.Reference() {
		t.Error(got, err)
	}
	if refs := anonymousRefs(t, to); refs != nil {
		t.Error(refs)
	}
}

// anonymousWorker builds or prunes: "build N" → N references, "prune" → those that it removed.
func anonymousWorker(in *bufio.Scanner, args []string) error {
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err != nil {
		return err
	}
	say("ready")
	for in.Scan() {
		words := strings.Fields(in.Text())
		reply := []any{"done"}
		if words[0] == "build" {
			n, err := strconv.Atoi(words[1])
			if err != nil {
				return err
			}
			for range n {
				a, err := anonymous(r, "the same")
				if err != nil {
					return err
				}
				reply = append(reply, a.Reference())
			}
		} else {
			removed, err := r.PruneAnonymous(ctx, &ocilocal.PruneOptions{OlderThan: ocilocal.NoGrace})
			if err != nil {
				return err
			}
			if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
				return err
			}
			for _, ref := range removed {
				reply = append(reply, ref.Reference)
			}
		}
		say(reply...)
	}
	return r.Close()
}

// TestAnonymousProcesses builds and prunes in several processes at once. Each artifact is removed
// by exactly one of them, or it still exists.
func TestAnonymousProcesses(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	var builders, pruners []*worker
	for i := range 4 {
		w := startWorker(t, "anonymous", r.Root())
		w.expect("ready")
		if i < 2 {
			builders = append(builders, w)
		} else {
			pruners = append(pruners, w)
		}
	}
	seen := map[string]int{}
	for range scaled(5, 20, 200) {
		for _, w := range builders {
			w.send("build", "10")
		}
		for _, w := range pruners {
			w.send("prune")
		}
		for _, w := range builders {
			for _, ref := range w.expect("done") {
				seen[ref] += 1 // built
			}
		}
		for _, w := range pruners {
			for _, ref := range w.expect("done") {
				seen[ref] += 100 // removed
			}
		}
	}
	for _, ref := range anonymousRefs(t, r) {
		seen[ref.String()] += 100 // left
	}
	for ref, n := range seen {
		if n != 101 {
			t.Errorf("%s: built %d times, removed or left %d times", ref, n%100, n/100)
		}
	}
	for _, w := range slices.Concat(builders, pruners) {
		w.finish()
	}
	for p, err := range r.Verify(t.Context(), nil) {
		t.Error(p, err)
	}
}

// TestOtherAnonymousRefs: names that other registries made up are listed and pruned, and no others.
func TestOtherAnonymousRefs(t *testing.T) {
	r := openTemp(t, nil)
	own := mustAnonymous(t, r, "own")
	var others []string
	for i, name := range []string{
		"0123456789abcdef.ocilocal.local/anonymous:20260102T030405.000006Z-abcdefghij234",
		"1a2b3c4d.ommx.local/anonymous:1", "1a2b3c4d.ommx.local/checkpoint:7", "1a2b3c4d.ommx.local/experiment:x",
	} {
		published(t, r, name, fmt.Sprint(i), nil)
		others = append(others, name)
	}
	kept := []string{
		"example.com/anonymous:v1", "ommx.local/checkpoint:1", "a.b.ommx.local/checkpoint:1", "1a2b3c4d.ommx.local/model:v1",
		"1a2b3c4d.ommx.local.example/checkpoint:1", "0123456789abcdef.ocilocal.local/recovered:v1",
	}
	for _, name := range kept {
		published(t, r, name, "kept", nil)
	}
	var got []string
	for ref, err := range r.OtherAnonymousRefs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, ref.Reference.String())
	}
	if !slices.Equal(got, others) {
		t.Errorf("listed %q", got)
	}
	for range r.OtherAnonymousRefs(t.Context()) {
		break // may be left early
	}
	if removed, err := r.PruneAnonymous(t.Context(), &ocilocal.PruneOptions{Others: true}); err != nil || len(removed) > 0 {
		t.Errorf("young ones: %v, %v", removed, err)
	}
	removed, err := r.PruneAnonymous(t.Context(), &ocilocal.PruneOptions{Others: true, OlderThan: ocilocal.NoGrace})
	want := append(others, own.Reference().String())
	got = nil
	for _, ref := range removed {
		got = append(got, ref.Reference.String())
	}
	slices.Sort(got)
	slices.Sort(want)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("removed %q, %v", got, err)
	}
	for _, name := range kept {
		if ok, err := r.Exists(t.Context(), ref(name)); !ok || err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
