package ocilocal_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

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

// blobNames returns the names in blobs/sha256, sorted.
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
	size := kept.Descriptor().Size + int64(len("shared")+len("{}"))
	if dry.Roots != 1 || dry.Reachable != (ocilocal.Count{Manifests: 1, Blobs: 2, Bytes: size}) ||
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
	if got := blobNames(t, r); !slices.Equal(got, digests(kept.Digest(), digest.FromString("shared"), ocilocal.EmptyJSON.Digest)) {
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

// sqlDigest is the SQL literal of a SHA-256 digest, as the index stores it.
func sqlDigest(d digest.Digest) string { return "x'01" + d.Encoded() + "'" }

// rowBytes returns a SHA-256 digest as the index stores it.
func rowBytes(d digest.Digest) []byte {
	b, err := hex.DecodeString("01" + d.Encoded())
	if err != nil {
		panic(err)
	}
	return b
}

// sqlID is the SQL for the id that a digest has in the index.
func sqlID(d digest.Digest) string {
	return "(SELECT id FROM content WHERE digest = " + sqlDigest(d) + ")"
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

// TestGCManyReferrers: a collection deletes an artifact that nothing needs with all its referrers.
// If one of them comes into use during the deletion, all stay.
func TestGCManyReferrers(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	dontWatch(r.Root())
	n := scaled(600, 3000, 3000)
	rows := fmt.Sprintf(`WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < %d),
		d (i, digest) AS (SELECT i, unhex(printf('01%%064d', i)) FROM n) `, n)
	execIndex(t, r.Root(), `INSERT INTO types VALUES (1, 'application/x')`)
	execIndex(t, r.Root(), rows+`INSERT INTO content (id, digest, size, kind, created) SELECT i + 1, digest, 1, 3, 0 FROM d`)
	execIndex(t, r.Root(), rows+`INSERT INTO manifests SELECT i + 1, digest, 1, 1, iif(i = 0, NULL, 1), '{}', 0 FROM d`)
	if err := os.MkdirAll(filepath.Join(r.Root(), "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range n + 1 {
		if err := os.WriteFile(blobFile(r, digest.Digest(fmt.Sprintf("sha256:%064d", i))), []byte("x"), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	used := false
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "readdir" && name == "blobs" && !used { // between the reading of the index and the deletion
			used = true
			execIndex(t, r.Root(), rows+`INSERT INTO refs SELECT 'example.com/a', 'v1', i + 1, digest, 1, 1, 1, 0, 0, 0, '' FROM d WHERE i = 500`)
		}
		return nil
	})
	opts := &ocilocal.GCOptions{Grace: ocilocal.NoGrace}
	if report := collect(t, r, opts); report.Revived != n+1 || report.Deleted.Manifests != 0 {
		t.Errorf("%+v", report)
	}
	ocilocal.SetFault(r, nil)
	execIndex(t, r.Root(), "DELETE FROM refs")
	if report := collect(t, r, opts); report.Deleted.Manifests != n+1 {
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

// TestGCSharedBlob collects many dead manifests that share one blob, such as the empty config, with
// a living one. The blob stays.
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
