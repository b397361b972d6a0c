package ocilocal_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

var atOnce = &ocilocal.GCOptions{Grace: ocilocal.NoGrace}

func collect(t testing.TB, r *ocilocal.LocalRegistry, opts *ocilocal.GCOptions) *ocilocal.GCReport {
	t.Helper()
	report, err := r.GC(t.Context(), opts)
	if err != nil {
		t.Fatalf("%v\n%+v", err, report)
	}
	return report
}

// blobNames returns what is in blobs/sha256, sorted.
func blobNames(t testing.TB, r *ocilocal.LocalRegistry) (names []digest.Digest) {
	t.Helper()
	for d, err := range r.Blobs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, d.Digest)
	}
	slices.Sort(names)
	return names
}

func digests(texts ...digest.Digest) []digest.Digest {
	slices.Sort(texts)
	return texts
}

func TestGC(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	kept := published(t, r, "example.com/kept:v1", "shared", nil)
	removed := published(t, r, "example.com/removed:v1", "only here", nil)
	if _, err := r.Remove(ctx, removed.Reference()); err != nil {
		t.Fatal(err)
	}
	stray := digest.FromString("stray")
	if err := os.WriteFile(blobFile(r, stray), []byte("stray"), 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blobFile(r, "sha256:README"), []byte("foreign"), 0o444); err != nil {
		t.Fatal(err)
	}
	flying, err := r.NewBuilder(ref("example.com/flying:v1"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	defer flying.Cancel()
	// One blob of it is in the store already, and an orphan there.
	if _, err := flying.AddLayerBytes(ctx, "text/plain", []byte("only here"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := flying.AddLayerBytes(ctx, "text/plain", []byte("new"), nil); err != nil {
		t.Fatal(err)
	}

	dry, err := r.GCReport(ctx, atOnce)
	if err != nil {
		t.Fatal(err)
	}
	size := kept.Descriptor().Size + int64(len("shared"))
	if dry.Roots != 1 || dry.Reachable != (ocilocal.Count{Manifests: 1, Blobs: 1, Bytes: size}) ||
		dry.Orphans.Manifests != 1 || dry.Orphans.Blobs != 2 || dry.Deleted != (ocilocal.Count{}) ||
		!slices.Equal(dry.Foreign, []string{"blobs/sha256/README"}) {
		t.Errorf("%+v", dry)
	}
	// Everything is young, so the default grace keeps it.
	if report := collect(t, r, nil); report.Deleted != (ocilocal.Count{}) || report.Deferred.Blobs != 2 || report.Deferred.Manifests != 1 {
		t.Errorf("%+v", report)
	}
	report := collect(t, r, atOnce)
	if report.Deleted != dry.Orphans || report.Deleted.Bytes == 0 {
		t.Errorf("deleted %+v, announced %+v", report.Deleted, dry.Orphans)
	}
	if got := blobNames(t, r); !slices.Equal(got, digests(kept.Digest(), digest.FromString("shared"))) {
		t.Errorf("left: %v", got)
	}
	if _, err := r.LoadDigest(ctx, removed.Digest()); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("a collected manifest: %v", err)
	}
	if _, err := r.Tag(ctx, removed.Digest(), removed.Reference(), nil); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("tag of a collected manifest: %v", err)
	}
	// What was being built is whole.
	built, err := flying.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	checkArtifact(t, built, "only here")
	if report := collect(t, r, atOnce); report.Deleted.Manifests != 0 {
		t.Errorf("a second collection found %+v", report.Deleted)
	}
	mustClose(t, r)
	os.Remove(filepath.Join(r.Root(), "blobs", "sha256", "README"))
	checkStore(t, r.Root(), model{"example.com/kept:v1": {""}, "example.com/flying:v1": {""}})
}

// TestGCLineage has a chain of subjects, of which only the last has a ref, and a referrer of the first.
func TestGCLineage(t *testing.T) {
	ctx := t.Context()
	for _, keep := range []bool{false, true} {
		r := openTemp(t, nil)
		a := published(t, r, "example.com/a:1", "one", nil)
		b := published(t, r, "example.com/a:2", "two", a)
		c := published(t, r, "example.com/a:3", "three", b)
		side := published(t, r, "example.com/signature:1", "signature", a)
		dead := published(t, r, "example.com/dead:1", "dead", nil)
		deadSide := published(t, r, "example.com/dead:2", "dead signature", dead)
		for _, x := range []*ocilocal.LocalArtifact{a, b, side, dead, deadSide} {
			if _, err := r.Remove(ctx, x.Reference()); err != nil {
				t.Fatal(err)
			}
		}
		protect := published(t, r, "example.com/protected:1", "protected", nil)
		if _, err := r.Remove(ctx, protect.Reference()); err != nil {
			t.Fatal(err)
		}
		opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, KeepReferrers: keep, Protect: []digest.Digest{protect.Digest()}}
		reachable, orphans := 4, 3 // manifests: c, b, a and what is protected; the others
		if keep {
			reachable, orphans = 5, 2
		}
		for _, report := range []*ocilocal.GCReport{mustReport(t, r, opts), collect(t, r, opts)} {
			if report.Reachable.Manifests != reachable || report.Orphans.Manifests != orphans || report.Revived > 0 {
				t.Errorf("keep referrers %v: %+v", keep, report)
			}
		}
		for x, want := range map[*ocilocal.LocalArtifact]bool{a: true, b: true, c: true, side: keep, dead: false, deadSide: false, protect: true} {
			_, err := r.LoadDigest(ctx, x.Digest())
			if got := err == nil; got != want {
				t.Errorf("keep referrers %v: %s: %v", keep, x.Reference(), err)
			}
			if _, err := os.Stat(blobFile(r, x.Digest())); (err == nil) != want {
				t.Errorf("keep referrers %v: file of %s: %v", keep, x.Reference(), err)
			}
		}
		collect(t, r, atOnce)
		if want := 6; len(blobNames(t, r)) != want {
			t.Errorf("%d blobs, want %d", len(blobNames(t, r)), want)
		}
	}
}

func mustReport(t testing.TB, r *ocilocal.LocalRegistry, opts *ocilocal.GCOptions) *ocilocal.GCReport {
	t.Helper()
	report, err := r.GCReport(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// A ref to what refers to an orphan comes between the collector's look and its deletion.
func TestGCSubjectRevived(t *testing.T) {
	r := openTemp(t, nil)
	subject := published(t, r, "example.com/subject:v1", "subject", nil)
	if _, err := r.Remove(t.Context(), subject.Reference()); err != nil {
		t.Fatal(err)
	}
	once := false
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "readdir" && name == "blobs" && !once { // between the reading of the index and the deletion
			once = true
			published(t, r, "example.com/signature:v1", "signature", subject)
		}
		return nil
	})
	if report := collect(t, r, atOnce); report.Revived < 2 || report.Deleted != (ocilocal.Count{}) {
		t.Errorf("%+v", report)
	}
	ocilocal.SetFault(r, nil)
	again, err := r.LoadDigest(t.Context(), subject.Digest())
	if err != nil {
		t.Fatal(err)
	}
	checkArtifact(t, again, "subject")
}

// TestGCGrace has an old layer that a young manifest needs, which nothing needs.
func TestGCGrace(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:1", "layer", nil)
	old := time.Now().Add(-48 * time.Hour)
	layer := digest.FromString("layer")
	if err := os.Chtimes(blobFile(r, layer), old, old); err != nil {
		t.Fatal(err)
	}
	age(t, r, layer, old)
	if _, err := r.Remove(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	if report := collect(t, r, nil); report.Deferred.Manifests != 1 || report.Deferred.Blobs != 1 {
		t.Errorf("%+v", report)
	}
	if _, err := r.Tag(ctx, a.Digest(), a.Reference(), nil); err != nil {
		t.Error(err) // restored within the grace
	}
	if _, err := r.Remove(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(blobFile(r, a.Digest()), old, old); err != nil {
		t.Fatal(err)
	}
	age(t, r, a.Digest(), old)
	if report := collect(t, r, &ocilocal.GCOptions{Grace: 47 * time.Hour}); report.Deleted.Manifests != 1 || report.Deleted.Blobs != 1 {
		t.Errorf("%+v", report)
	}
	// What comes again is young again.
	stale := digest.FromString("stale")
	if err := os.WriteFile(blobFile(r, stale), []byte("stale"), 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(blobFile(r, stale), old, old); err != nil {
		t.Fatal(err)
	}
	b := published(t, r, "example.com/b:1", "stale", nil)
	if _, err := r.Remove(ctx, b.Reference()); err != nil {
		t.Fatal(err)
	}
	if report := collect(t, r, nil); report.Deleted != (ocilocal.Count{}) {
		t.Errorf("%+v", report)
	}
}

// age changes when a blob was recorded, behind the library's back.
func age(t testing.TB, r *ocilocal.LocalRegistry, d digest.Digest, at time.Time) {
	t.Helper()
	execIndex(t, r.Root(), "UPDATE blobs SET created = ? WHERE digest = ?", at.UnixMicro(), string(d))
}

func execIndex(t testing.TB, root, statement string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(root, "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(statement, args...); err != nil {
		t.Fatal(err)
	}
}

// TestGCUnsafe damages what a root needs, each time in another way. Nothing may be deleted.
func TestGCUnsafe(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact){
		"manifest damaged": func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
			name := blobFile(r, a.Digest())
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			b[10] ^= 1
			if err := errors.Join(os.Chmod(name, 0o644), os.WriteFile(name, b, 0o644)); err != nil {
				t.Fatal(err)
			}
		},
		"manifest missing": func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
			if err := os.Remove(blobFile(r, a.Digest())); err != nil {
				t.Fatal(err)
			}
		},
		"manifest cut": func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
			if err := os.Truncate(blobFile(r, a.Digest()), 5); err != nil {
				t.Fatal(err)
			}
		},
		"row of a layer lost": func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
			execIndex(t, r.Root(), "DELETE FROM members WHERE manifest = ?", string(a.Digest()))
		},
		"row of the subject lost": func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
			execIndex(t, r.Root(), "UPDATE manifests SET subject = '' WHERE digest = ?", string(a.Digest()))
		},
		"ref without a manifest": func(t *testing.T, r *ocilocal.LocalRegistry, _ *ocilocal.LocalArtifact) {
			execIndex(t, r.Root(), "UPDATE refs SET manifest = ? WHERE reference = '1'", string(digest.FromString("bits flipped")))
		},
		"index empty beside blobs": func(t *testing.T, r *ocilocal.LocalRegistry, _ *ocilocal.LocalArtifact) {
			for _, table := range []string{"refs", "members", "manifests", "blobs"} {
				execIndex(t, r.Root(), "DELETE FROM "+table)
			}
			for _, d := range blobNames(t, r) {
				old := time.Now().Add(-2 * time.Hour)
				if err := os.Chtimes(blobFile(r, d), old, old); err != nil {
					t.Fatal(err)
				}
			}
			if got := problems(t, r, nil, nil); !slices.Contains(got, "index is not reconciled") {
				t.Errorf("found %q", got)
			}
		},
		"index new beside blobs": func(t *testing.T, r *ocilocal.LocalRegistry, _ *ocilocal.LocalArtifact) {
			execIndex(t, r.Root(), "INSERT INTO meta VALUES ('unreconciled', '1')")
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			first := published(t, r, "example.com/a:0", "zero", nil)
			a := published(t, r, "example.com/a:1", "one", first)
			gone := published(t, r, "example.com/b:1", "two", nil)
			if _, err := r.Remove(t.Context(), gone.Reference()); err != nil {
				t.Fatal(err)
			}
			damage(t, r, a)
			before := blobNames(t, r)
			report, err := r.GC(t.Context(), atOnce)
			if !errors.Is(err, ocilocal.ErrUnsafe) || report == nil || report.Deleted != (ocilocal.Count{}) {
				t.Errorf("%v, %+v", err, report)
			}
			if !slices.Equal(before, blobNames(t, r)) {
				t.Error("something was deleted")
			}
			if report != nil && len(report.Invalid) == 0 && len(report.Missing) == 0 && !report.Unreconciled {
				t.Error("the report doesn't say why")
			}
			if _, err := r.GCReport(t.Context(), atOnce); err != nil {
				t.Errorf("a report alone: %v", err)
			}
		})
	}
	// What the first publish has left, if it was killed, can be collected.
	r := openTemp(t, nil)
	published(t, r, "example.com/a:1", "one", nil)
	for _, table := range []string{"refs", "members", "manifests", "blobs"} {
		execIndex(t, r.Root(), "DELETE FROM "+table)
	}
	collect(t, r, atOnce)
	if got := blobNames(t, r); len(got) != 0 {
		t.Errorf("%q are left", got)
	}
	// A layer that is missing is reported, but endangers nothing.
	r = openTemp(t, nil)
	published(t, r, "example.com/a:1", "one", nil)
	layer := digest.FromString("one")
	if err := os.Remove(blobFile(r, layer)); err != nil {
		t.Fatal(err)
	}
	if report := collect(t, r, atOnce); !slices.Equal(report.Missing, []digest.Digest{layer}) {
		t.Errorf("%+v", report)
	}
}

// TestGCRaces runs a step of another call at the moment when the collector is
// about to delete a file, without the lock and then with it.
func TestGCRaces(t *testing.T) {
	// Marked dead, then tagged again before anything is deleted.
	ctx := t.Context()
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:1", "one", nil)
	if _, err := r.Remove(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	once := false
	ocilocal.SetFault(r, func(op, name string) error {
		// The collector reads blobs/ before it takes the lock for the first time.
		if op == "readdir" && name == "blobs/sha256" && !once {
			once = true
			if _, err := r.Tag(ctx, a.Digest(), a.Reference(), nil); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	report := collect(t, r, atOnce)
	ocilocal.SetFault(r, nil)
	if !once || report.Revived != 2 || report.Deleted != (ocilocal.Count{}) {
		t.Errorf("%v %+v", once, report)
	}
	if _, err := r.Load(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	// A publish that has found its blobs in the store, and then loses them to a
	// collector before its transaction.
	if _, err := r.Remove(ctx, a.Reference()); err != nil {
		t.Fatal(err)
	}
	other := openAgain(t, r)
	once = false
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "fsyncdir" && name == "blobs/sha256" && !once {
			once = true
			if report := collect(t, other, atOnce); report.Deleted.Manifests != 1 || report.Deleted.Blobs != 1 {
				t.Errorf("%+v", report)
			}
		}
		return nil
	})
	again := published(t, r, "example.com/a:2", "one", nil)
	ocilocal.SetFault(r, nil)
	if !once || again.Digest() != a.Digest() {
		t.Fatal("the collector did not run in between")
	}
	mustClose(t, other)
	checkArtifact(t, again, "one")
	mustClose(t, r)
	checkStore(t, r.Root(), model{"example.com/a:2": {""}})
}

func openAgain(t testing.TB, r *ocilocal.LocalRegistry) *ocilocal.LocalRegistry {
	t.Helper()
	other, err := ocilocal.Open(t.Context(), r.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return other
}

func checkArtifact(t testing.TB, a *ocilocal.LocalArtifact, layer string) {
	t.Helper()
	layers, err := a.Layers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := a.ReadLayer(t.Context(), layers[0]); err != nil || string(b) != layer {
		t.Fatalf("%q %v", b, err)
	}
}

// The referrers of an artifact that nothing needs go with it, however many there
// are, and all stay if one of them comes into use while they are being deleted.
func TestGCManyReferrers(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	dontWatch(r.Root())
	const rows = `WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 3000),
		d (i, digest) AS (SELECT i, printf('sha256:%064d', i) FROM n) `
	execIndex(t, r.Root(), rows+`INSERT INTO blobs SELECT digest, 1, 'manifest', 0 FROM d`)
	execIndex(t, r.Root(), rows+`INSERT INTO manifests SELECT digest, 'application/x', 'application/x', 1, '', iif(i = 0, '', printf('sha256:%064d', 0)), '{}', 0 FROM d`)
	if err := os.MkdirAll(filepath.Join(r.Root(), "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 3001 {
		if err := os.WriteFile(blobFile(r, digest.Digest(fmt.Sprintf("sha256:%064d", i))), []byte("x"), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	used := false
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "readdir" && name == "blobs" && !used { // between the reading of the index and the deletion
			used = true
			execIndex(t, r.Root(), rows+`INSERT INTO refs SELECT 'example.com/a', 'v1', digest, 'application/x', 'application/x', 1, 0 FROM d WHERE i = 2000`)
		}
		return nil
	})
	opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, KeepReferrers: true}
	if report := collect(t, r, opts); report.Revived != 3001 || report.Deleted.Manifests != 0 {
		t.Errorf("%+v", report)
	}
	ocilocal.SetFault(r, nil)
	execIndex(t, r.Root(), "DELETE FROM refs")
	if report := collect(t, r, opts); report.Deleted.Manifests != 3001 {
		t.Errorf("%+v", report)
	}
}

func TestGCCancel(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:1", "one", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.GC(ctx, atOnce); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := r.GCReport(t.Context(), &ocilocal.GCOptions{Protect: []digest.Digest{"sha256:x"}}); !errors.Is(err, ocilocal.ErrInvalidDigest) {
		t.Error(err)
	}
}

// TestGCSharedBlob has many dead manifests that need one blob, as all image
// manifests need the empty config, and one that lives.
func TestGCSharedBlob(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := openTemp(t, &ocilocal.Options{Format: ocilocal.FormatImageManifest})
	for i := range 200 {
		a := published(t, r, fmt.Sprintf("example.com/a:%d", i), fmt.Sprint("layer", i), nil)
		if i > 0 {
			if _, err := r.Remove(ctx, a.Reference()); err != nil {
				t.Fatal(err)
			}
		}
	}
	report := collect(t, r, atOnce)
	if report.Deleted.Manifests != 199 || report.Deleted.Blobs != 199 || len(blobNames(t, r)) != 3 {
		t.Errorf("%+v", report)
	}
	if err := r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{ref("example.com/a:0")}, nil); err != nil {
		t.Error(err)
	}
	// An unnamed import is an orphan from the start.
	var out bytes.Buffer
	from := openTemp(t, nil)
	x := published(t, from, "example.com/x:1", "unnamed", nil)
	if err := from.ExportArchive(ctx, &out, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{x.Digest()}}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ImportArchive(ctx, &out, nil); err != nil {
		t.Fatal(err)
	}
	if report := collect(t, r, nil); report.Deferred.Manifests != 1 {
		t.Errorf("%+v", report)
	}
	if report := collect(t, r, atOnce); report.Deleted.Manifests != 1 || report.Deleted.Blobs != 1 {
		t.Errorf("%+v", report)
	}
}

// TestCollectorLetsWritersIn: another process that writes gets its turn between the steps of a collection.
func TestCollectorLetsWritersIn(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	a := published(t, r, "example.com/x:v1", "x", nil)
	orphans := scaled(2000, 6000, 20_000)
	if err := ocilocal.IndexWrite(ctx, r, func(exec func(string) error) error {
		var errs []error
		for i := range orphans {
			text := fmt.Sprint("orphan ", i)
			d := digest.FromString(text)
			errs = append(errs, os.WriteFile(blobFile(r, d), []byte(text), 0o444),
				exec(fmt.Sprintf("INSERT INTO blobs VALUES ('%s', %d, 'layer', 0)", d, len(text))))
		}
		return errors.Join(errs...)
	}); err != nil {
		t.Fatal(err)
	}
	other := openAgain(t, r)
	defer mustClose(t, other)
	var deleted, longest atomic.Int64 // longest: most that was deleted while one write waited
	begun, done := make(chan struct{}), make(chan struct{})
	var once sync.Once
	ocilocal.SetFault(r, func(op, _ string) error {
		if op == "remove" {
			deleted.Add(1)
			once.Do(func() { close(begun) })
		}
		return nil
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		<-begun
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			before := deleted.Load()
			if _, err := other.Tag(context.Background(), a.Digest(), ocilocal.MustParseReference(fmt.Sprintf("example.com/x:t%d", i)), nil); err != nil {
				t.Error(err)
				return
			}
			longest.Store(max(longest.Load(), deleted.Load()-before))
		}
	})
	report := collect(t, r, atOnce)
	close(done)
	wg.Wait()
	if report.Deleted.Blobs != orphans {
		t.Errorf("%+v", report)
	}
	if n := longest.Load(); n == 0 || n > int64(orphans)/3 {
		t.Errorf("one write waited for %d of %d deletions", n, orphans)
	}
}

// TestCollectLarge: of a large file only the name goes while the index is locked, and the rest after that.
func TestCollectLarge(t *testing.T) {
	r := openTemp(t, nil)
	published(t, r, "example.com/a:v1", "layer", nil)
	name := blobFile(r, digest.FromString("large"))
	write(t, name, "")
	if err := errors.Join(os.Chmod(name, 0o644), os.Truncate(name, 64<<20)); err != nil {
		t.Fatal(err)
	}
	var ops []string
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "rename" || op == "remove" {
			ops = append(ops, op)
		}
		return nil
	})
	report := collect(t, r, atOnce)
	if report.Deleted != (ocilocal.Count{Blobs: 1, Bytes: 64 << 20}) || len(ops) < 2 || ops[0] != "rename" || ops[1] != "remove" {
		t.Errorf("%+v, %q", report.Deleted, ops)
	}
	if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	ocilocal.SetFault(r, nil)
	checkNoTmp(t, r)
}

// halfCollected has a manifest that has lost its file to a collector that was killed before it came to the rows.
func halfCollected(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
	t.Helper()
	if _, err := r.Remove(t.Context(), a.Reference()); err != nil {
		t.Fatal(err)
	}
	removed := false
	ocilocal.SetFault(r, func(op, name string) error {
		if removed {
			return syscall.EIO
		}
		removed = op == "remove" && strings.HasPrefix(name, "blobs/")
		return nil
	})
	if _, err := r.GC(t.Context(), atOnce); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	ocilocal.SetFault(r, nil)
	if _, err := os.Lstat(blobFile(r, a.Digest())); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("the manifest's file is there: ", err)
	}
	if _, err := r.LoadDigest(t.Context(), a.Digest()); err != nil {
		t.Fatal("the manifest's row is gone: ", err)
	}
}

// A referrer or a subject is kept, not needed. One that a killed collector has half deleted
// stops neither a collection nor a backup, and is no loss to Verify. Its rows go.
func TestHalfCollected(t *testing.T) {
	for what, leave := range map[string]func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalArtifact{
		"referrer": func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalArtifact {
			image := published(t, r, "example.com/image:v1", "image", nil)
			signature := published(t, r, "example.com/signature:v1", "signature", image)
			halfCollected(t, r, signature)
			return signature
		},
		"subject": func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalArtifact {
			base := published(t, r, "example.com/base:v1", "base", nil)
			halfCollected(t, r, base)
			published(t, r, "example.com/image:v1", "image", base)
			return base
		},
		"protected": func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalArtifact {
			published(t, r, "example.com/image:v1", "image", nil)
			base := published(t, r, "example.com/base:v1", "base", nil)
			halfCollected(t, r, base)
			return base
		},
		"referrer of a referrer": func(t *testing.T, r *ocilocal.LocalRegistry) *ocilocal.LocalArtifact {
			image := published(t, r, "example.com/image:v1", "image", nil)
			signature := published(t, r, "example.com/signature:v1", "signature", image)
			halfCollected(t, r, signature)
			stamp := published(t, r, "example.com/stamp:v1", "stamp", signature)
			if _, err := r.Remove(t.Context(), stamp.Reference()); err != nil {
				t.Fatal(err)
			}
			return signature
		},
	} {
		for _, keep := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, KeepReferrers %v", what, keep), func(t *testing.T) {
				r := openTemp(t, nil)
				dead := leave(t, r)
				if got := problems(t, r, nil, nil); slices.ContainsFunc(got, func(p string) bool {
					return !strings.HasPrefix(p, string(ocilocal.ProblemCollected)) && !strings.HasPrefix(p, string(ocilocal.ProblemUnrecorded))
				}) || len(got) == 0 {
					t.Errorf("Verify finds %q", got)
				}
				if report, err := r.Repair(t.Context(), nil); err != nil || len(report.Left) > 0 {
					t.Errorf("repair: %v, %+v", err, report)
				}
				if report, err := r.Backup(t.Context(), filepath.Join(t.TempDir(), "backup"), nil); err != nil {
					t.Errorf("backup: %v, %+v", err, report)
				}
				opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, KeepReferrers: keep}
				if what == "protected" {
					opts.Protect = []digest.Digest{dead.Digest()}
				}
				report := collect(t, r, opts)
				if len(report.Missing) > 0 || report.Revived > 0 {
					t.Errorf("%+v", report)
				}
				if _, err := r.LoadDigest(t.Context(), dead.Digest()); !errors.Is(err, ocilocal.ErrNotFound) {
					t.Errorf("its row is still there: %v", err)
				}
				if report := collect(t, r, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, KeepReferrers: keep}); report.Orphans != (ocilocal.Count{}) {
					t.Errorf("a second collection finds %+v", report.Orphans)
				}
				mustClose(t, r)
				checkCollected(t, r.Root(), model{"example.com/image:v1": {""}})
			})
		}
	}
}

// A lookCtx runs a function each time its error is looked at, which a collection does
// before and after it takes the index's lock.
type lookCtx struct {
	context.Context
	look func()
}

func (c *lookCtx) Err() error {
	c.look()
	return c.Context.Err()
}

// The index is marked as not reconciled at any moment of a collection: nothing is deleted from then on.
func TestGCUnreconciledMeanwhile(t *testing.T) {
	unsafe := 0
	for n := 1; ; n++ {
		r := openTemp(t, nil)
		published(t, r, "example.com/kept:v1", "kept", nil)
		gone := published(t, r, "example.com/gone:v1", "gone", nil)
		if _, err := r.Remove(t.Context(), gone.Reference()); err != nil {
			t.Fatal(err)
		}
		db, err := sql.Open("sqlite", filepath.Join(r.Root(), "index.sqlite3"))
		if err != nil {
			t.Fatal(err)
		}
		looks, marked, deleted := 0, false, false
		ctx := &lookCtx{t.Context(), func() {
			if looks++; looks == n {
				_, err := db.Exec("INSERT INTO meta VALUES ('unreconciled', '1')") // fails while the collector has the lock
				marked = err == nil
			}
		}}
		ocilocal.SetFault(r, func(op, name string) error {
			deleted = deleted || marked && op == "remove" && strings.HasPrefix(name, "blobs/")
			return nil
		})
		_, err = r.GC(ctx, atOnce)
		ocilocal.SetFault(r, nil)
		if deleted {
			t.Errorf("marked at look %d: something was deleted after that", n)
		}
		switch {
		case marked && errors.Is(err, ocilocal.ErrUnsafe):
			unsafe++
		case err != nil:
			t.Error(err)
		}
		if err := errors.Join(db.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
		if looks < n {
			break
		}
	}
	if unsafe < 5 {
		t.Errorf("%d collections refused", unsafe)
	}
}
