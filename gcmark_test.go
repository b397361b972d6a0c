package ocilocal_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestGCLineage collects a chain of subjects. Only the last artifact has a ref, and the first one
// has a referrer.
func TestGCLineage(t *testing.T) {
	ctx := t.Context()
	for _, keep := range []bool{false, true} {
		r := openTemp(t, artifactForm)
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
		opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: !keep, Protect: []digest.Digest{protect.Digest()}}
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
		collect(t, r, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: true})
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

// TestGCGrace collects an old layer and a young manifest that needs it. Nothing needs the manifest,
// and the grace keeps both.
func TestGCGrace(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, artifactForm)
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
	// Content that is published again is young again.
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

// age changes the time at which a blob was recorded, directly in the index.
func age(t testing.TB, r *ocilocal.LocalRegistry, d digest.Digest, at time.Time) {
	t.Helper()
	execIndex(t, r.Root(), "UPDATE content SET created = ? WHERE digest = "+sqlDigest(d), at.UnixMicro())
}

// TestGCUnsafe damages content that a root needs, each time in another way. The collection must not
// delete anything.
func TestGCUnsafe(t *testing.T) {
	t.Parallel()
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
			execIndex(t, r.Root(), "DELETE FROM members WHERE manifest = "+sqlID(a.Digest()))
		},
		"row of the subject lost": func(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
			execIndex(t, r.Root(), "UPDATE manifests SET subject = NULL WHERE id = "+sqlID(a.Digest()))
		},
		"ref without a manifest": func(t *testing.T, r *ocilocal.LocalRegistry, _ *ocilocal.LocalArtifact) {
			execIndex(t, r.Root(), "UPDATE refs SET manifest = 1000, digest = "+sqlDigest(digest.FromString("bits flipped"))+" WHERE reference = '1'")
		},
		"index empty beside blobs": func(t *testing.T, r *ocilocal.LocalRegistry, _ *ocilocal.LocalArtifact) {
			forgetAll(t, r, time.Now().Add(-2*time.Hour))
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
	// The collector cannot know to which manifests these rows belong.
	for name, damage := range map[string]func(a, first *ocilocal.LocalArtifact) string{
		"layer":    func(_, _ *ocilocal.LocalArtifact) string { return sqlID(digest.FromString("one")) },
		"manifest": func(a, _ *ocilocal.LocalArtifact) string { return sqlID(a.Digest()) },
		"subject":  func(_, first *ocilocal.LocalArtifact) string { return sqlID(first.Digest()) },
	} {
		r := openTemp(t, nil)
		first := published(t, r, "example.com/a:0", "zero", nil)
		a := published(t, r, "example.com/a:1", "one", first)
		execIndex(t, r.Root(), "DELETE FROM content WHERE id = "+damage(a, first))
		before := blobNames(t, r)
		if _, err := r.GC(t.Context(), atOnce); !errors.Is(err, ocilocal.ErrUnsafe) && !errors.Is(err, ocilocal.ErrCorruptIndex) {
			t.Errorf("row of the %s's content is lost: %v", name, err)
		}
		if !slices.Equal(before, blobNames(t, r)) {
			t.Errorf("row of the %s's content is lost: something was deleted", name)
		}
	}
	// Content that a killed first publish has left can be collected.
	r := openTemp(t, nil)
	published(t, r, "example.com/a:1", "one", nil)
	for _, table := range []string{"refs", "members", "manifests", "content"} {
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

// A referrer or a subject is kept, not needed. If a killed collector has half deleted one, no
// collection and no backup stops for it, Verify does not call it lost, and its rows are deleted.
func TestHalfCollected(t *testing.T) {
	t.Parallel()
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
			t.Run(fmt.Sprintf("%s, DropReferrers %v", what, !keep), func(t *testing.T) {
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
				opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: !keep}
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
				if report := collect(t, r, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: !keep}); report.Orphans != (ocilocal.Count{}) {
					t.Errorf("a second collection finds %+v", report.Orphans)
				}
				mustClose(t, r)
				checkCollected(t, r.Root(), model{"example.com/image:v1": {""}})
			})
		}
	}
}

// A subject that was never here is not kept. So a collection keeps nothing for referring to it,
// even if something that is kept refers to it too.
func TestGCAbsentSubject(t *testing.T) {
	r := openTemp(t, nil)
	elsewhere := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("elsewhere"), Size: 9}
	child(t, r, "example.com/image:v1", ocilocal.BuilderOptions{}, &elsewhere, nil, "image")
	signature := child(t, r, "example.com/signature:v1", ocilocal.BuilderOptions{}, &elsewhere, nil, "signature")
	stamp := published(t, r, "example.com/stamp:v1", "stamp", signature)
	for _, a := range []*ocilocal.LocalArtifact{signature, stamp} {
		if _, err := r.Remove(t.Context(), a.Reference()); err != nil {
			t.Fatal(err)
		}
	}
	report := collect(t, r, atOnce)
	if report.Deleted.Manifests != 2 || report.Deleted.Blobs != 2 || report.Revived > 0 {
		t.Errorf("deleted %+v, revived %d", report.Deleted, report.Revived)
	}
	mustClose(t, r)
	checkCollected(t, r.Root(), model{"example.com/image:v1": {""}})
}

// halfCollected leaves an artifact as a collector does that is killed after it has deleted the
// manifest's file: nothing else is gone yet, and the rows are there.
func halfCollected(t *testing.T, r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact) {
	t.Helper()
	if _, err := r.Remove(t.Context(), a.Reference()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(blobFile(r, a.Digest())); err != nil {
		t.Fatal(err)
	}
}

// The lists of a report are bounded. A needed manifest that is missing stops the collection also
// when the list of what is missing is full.
func TestGCUnsafeBeyondLists(t *testing.T) {
	needsDeep(t, "an artifact of 1,100 layers")
	r := openTemp(t, nil)
	dontWatch(r.Root())
	var texts []string
	for i := range 1100 {
		texts = append(texts, fmt.Sprint("layer ", i))
	}
	child(t, r, "example.com/large:v1", ocilocal.BuilderOptions{}, nil, nil, texts...)
	lost := published(t, r, "example.com/lost:v1", "lost", nil)
	gone := published(t, r, "example.com/gone:v1", "gone", nil)
	if _, err := r.Remove(t.Context(), gone.Reference()); err != nil {
		t.Fatal(err)
	}
	for _, text := range texts {
		if err := os.Remove(blobFile(r, digest.FromString(text))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(blobFile(r, lost.Digest())); err != nil {
		t.Fatal(err)
	}
	report, err := r.GC(t.Context(), atOnce)
	if !errors.Is(err, ocilocal.ErrUnsafe) || len(report.Missing) != 1000 || report.Deleted != (ocilocal.Count{}) {
		t.Errorf("%v, %d missing, %+v deleted", err, len(report.Missing), report.Deleted)
	}
}

// forgetAll empties the index, and gives the blobs a time.
func forgetAll(t *testing.T, r *ocilocal.LocalRegistry, at time.Time) {
	t.Helper()
	for _, table := range []string{"refs", "members", "manifests", "content"} {
		execIndex(t, r.Root(), "DELETE FROM "+table)
	}
	for _, d := range blobNames(t, r) {
		if err := os.Chtimes(blobFile(r, d), at, at); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGCOtherClock collects by clocks that are decades behind and ahead of the one that stamps the
// files. The bubble's clock begins in the year 2000.
func TestGCOtherClock(t *testing.T) {
	now := time.Now()
	for _, years := range []int{0, 50} {
		for _, old := range []bool{false, true} {
			root := filepath.Join(t.TempDir(), "root")
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Duration(years) * 365 * 24 * time.Hour)
				r := mustOpen(t, root)
				published(t, r, "example.com/a:1", "one", nil)
				at := now
				if old {
					at = now.Add(-2 * time.Hour)
				}
				forgetAll(t, r, at)
				if _, err := r.GC(t.Context(), atOnce); errors.Is(err, ocilocal.ErrUnsafe) != old || !old && err != nil {
					t.Errorf("in %s, old %v: %v", time.Now().Format("2006"), old, err)
				}
			})
		}
	}
}
