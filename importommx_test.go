package ocilocal_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// The schemas of the SDK's index, by its versions 3.0.0a8 and 3.0.0b7.
var ommxSchemas = map[int]string{
	1: `CREATE TABLE ommx_local_registry_metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL);
		CREATE TABLE refs (name TEXT NOT NULL, reference TEXT NOT NULL, manifest_media_type TEXT NOT NULL, manifest_digest TEXT NOT NULL,
			manifest_size INTEGER NOT NULL CHECK(manifest_size >= 0), manifest_annotations_json TEXT NOT NULL DEFAULT '{}',
			updated_at TEXT NOT NULL, PRIMARY KEY(name, reference));
		CREATE INDEX idx_refs_name ON refs(name);`,
	2: `CREATE TABLE ommx_local_registry_metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL);
		CREATE TABLE refs (name TEXT NOT NULL, reference TEXT NOT NULL, manifest_digest TEXT NOT NULL, updated_at TEXT NOT NULL,
			PRIMARY KEY(name, reference));
		CREATE INDEX idx_refs_manifest_digest ON refs(manifest_digest);
		CREATE TABLE artifact_manifests (manifest_digest TEXT PRIMARY KEY, manifest_json BLOB NOT NULL, artifact_type TEXT NOT NULL, config_digest TEXT NOT NULL);
		CREATE INDEX idx_artifact_manifests_config_digest ON artifact_manifests(config_digest);
		CREATE TABLE experiment_configs (config_digest TEXT PRIMARY KEY, config_json BLOB NOT NULL);`,
}

// An ommxRoot is a root in the SDK's form. Its index is open, as a live process of the SDK keeps
// it.
type ommxRoot struct {
	t   testing.TB
	dir string
	db  *sql.DB
}

func newOMMXRoot(t testing.TB, schema int) *ommxRoot {
	t.Helper()
	o := &ommxRoot{t: t, dir: t.TempDir()}
	o.db = openOMMXDB(t, o.dir)
	o.exec("PRAGMA journal_mode = WAL")
	o.exec(fmt.Sprintf("PRAGMA user_version = %d", schema))
	if text, ok := ommxSchemas[schema]; ok {
		o.exec(text)
	}
	return o
}

func openOMMXDB(t testing.TB, dir string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { db.Close() })
	return db
}

func (o *ommxRoot) exec(text string, args ...any) {
	o.t.Helper()
	if _, err := o.db.Exec(text, args...); err != nil {
		o.t.Fatal(err)
	}
}

// ref adds a row of refs.
func (o *ommxRoot) ref(name, reference string, d digest.Digest) {
	o.t.Helper()
	var version int
	if err := o.db.QueryRow("PRAGMA user_version").Scan(&version); err != nil {
		o.t.Fatal(err)
	}
	if version == 1 {
		o.exec("INSERT INTO refs VALUES (?, ?, 'application/vnd.oci.image.manifest.v1+json', ?, 500, '{}', '2026-01-02T03:04:05.678+00:00')", name, reference, string(d))
	} else {
		o.exec("INSERT INTO refs VALUES (?, ?, ?, '2026-01-02T03:04:05.678+00:00')", name, reference, string(d))
	}
}

// add adds a ref with its manifest and blobs, which differ by text.
func (o *ommxRoot) add(name, reference, text string) digest.Digest {
	o.t.Helper()
	manifest, _ := ommxV2(text, ommxType, "")
	for _, b := range []string{manifest, "{}", text} {
		o.blob(digest.FromString(b), b)
	}
	d := digest.FromString(manifest)
	o.ref(name, reference, d)
	return d
}

func (o *ommxRoot) blob(d digest.Digest, content string) {
	o.t.Helper()
	name := filepath.Join(o.dir, "blobs", "sha256", d.Encoded())
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		o.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		o.t.Fatal(err)
	}
}

// files returns the content of every file except the -shm, in which readers take their locks.
func (o *ommxRoot) files() map[string]string {
	o.t.Helper()
	all := map[string]string{}
	err := fs.WalkDir(os.DirFS(o.dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(name, "-shm") {
			return err
		}
		b, err := os.ReadFile(filepath.Join(o.dir, name))
		all[name] = string(b)
		return err
	})
	if err != nil {
		o.t.Fatal(err)
	}
	return all
}

const ommxWAL = "index.sqlite3-wal"

func (o *ommxRoot) unchanged(before map[string]string) {
	o.t.Helper()
	after := o.files()
	if wal, ok := before[ommxWAL]; !ok && after[ommxWAL] == wal {
		delete(after, ommxWAL) // SQLite makes an empty one for readers
	}
	for name := range after {
		if after[name] != before[name] {
			o.t.Errorf("%s was changed, or made", name)
		}
	}
	if len(after) != len(before) {
		o.t.Errorf("of %d files %d are left", len(before), len(after))
	}
}

// noShm copies the root without its -shm, as some backups do.
func (o *ommxRoot) noShm() *ommxRoot {
	o.t.Helper()
	c := &ommxRoot{t: o.t, dir: o.t.TempDir()}
	for name, content := range o.files() {
		to := filepath.Join(c.dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			o.t.Fatal(err)
		}
		if err := os.WriteFile(to, []byte(content), 0o644); err != nil {
			o.t.Fatal(err)
		}
	}
	return c
}

// TestImportOMMX imports roots of each schema while the SDK has them open, twice. A second import
// sees refs that were added or replaced meanwhile. The root does not change.
func TestImportOMMX(t *testing.T) {
	ctx := t.Context()
	for schema := range ommxSchemas {
		t.Run(fmt.Sprintf("schema %d", schema), func(t *testing.T) {
			o := newOMMXRoot(t, schema)
			want := map[string]digest.Digest{
				"ghcr.io/example/demo:v1":   o.add("ghcr.io/example/demo", "v1", "one"),
				"ghcr.io/example/demo:v2":   o.add("ghcr.io/example/demo", "v2", "two"),
				"localhost:5000/demo:v1":    o.add("localhost:5000/demo", "v1", "three"),
				"docker.io/library/demo:v1": o.add("docker.io/library/demo", "v1", "four"),
			}
			d := o.add("ghcr.io/example/other", "v1", "five")
			o.ref("ghcr.io/example/demo", string(d), d)
			want["ghcr.io/example/other:v1"], want["ghcr.io/example/demo@"+string(d)] = d, d
			before := o.files()

			r := openTemp(t, nil)
			for run, counts := range []ocilocal.LegacyReport{{Scanned: 6, Imported: 6}, {Scanned: 6, Verified: 6}} {
				report, err := r.ImportOMMX(ctx, o.dir, nil)
				if err != nil || fmt.Sprint(*report) != fmt.Sprint(counts) {
					t.Errorf("run %d: %+v, %v", run, report, err)
				}
				for name, d := range want {
					a, err := r.Load(ctx, ocilocal.MustParseReference(name))
					if err != nil {
						t.Error(err)
					} else if a.Digest() != d || a.ArtifactType() != ommxType {
						t.Errorf("%s is %s of type %s", name, a.Digest(), a.ArtifactType())
					}
				}
			}
			o.unchanged(before)
			checkSound(t, r)
			checkNoTmp(t, r)

			// Refs that another process has written meanwhile are seen. A replaced ref is a
			// conflict, or it is moved.
			o.exec("UPDATE refs SET manifest_digest = ? WHERE reference = 'v2'", string(d))
			report, err := r.ImportOMMX(ctx, o.dir, nil)
			if err != nil || report.Verified != 5 || len(report.Conflicted) != 1 || report.Conflicted[0].Descriptor.Digest != d {
				t.Errorf("%+v, %v", report, err)
			}
			report, err = r.ImportOMMX(ctx, o.dir, &ocilocal.LegacyOptions{Policy: ocilocal.Replace})
			if err != nil || report.Verified != 5 || report.Replaced != 1 {
				t.Errorf("%+v, %v", report, err)
			}
		})
	}
}

// TestImportOMMXAtRest imports roots that no process has open: closed in order, or left by a killed
// process, with or without the -shm.
func TestImportOMMXAtRest(t *testing.T) {
	live := newOMMXRoot(t, 2)
	live.add("ghcr.io/example/demo", "v1", "one")
	r := openTemp(t, nil)
	killed := live.noShm()
	before := killed.files()
	if before[ommxWAL] == "" {
		t.Fatal("the log is empty")
	}
	if report, err := r.ImportOMMX(t.Context(), killed.dir, nil); err != nil || report.Imported != 1 {
		t.Errorf("%+v, %v", report, err)
	}
	killed.unchanged(before)
	if err := live.db.Close(); err != nil {
		t.Fatal(err)
	}
	before = live.files()
	if _, ok := before[ommxWAL]; ok {
		t.Fatal("the log is still there")
	}
	if report, err := r.ImportOMMX(t.Context(), live.dir, nil); err != nil || report.Verified != 1 {
		t.Errorf("%+v, %v", report, err)
	}
	live.unchanged(before)
}

// TestImportOMMXBadEntries has refs with bad names, digests and content among good ones. The report
// lists each bad one.
func TestImportOMMXBadEntries(t *testing.T) {
	o := newOMMXRoot(t, 2)
	good := o.add("ghcr.io/example/good", "v1", "good")
	bad := func(reference string, d digest.Digest, content string) {
		o.ref("ghcr.io/example/bad", reference, d)
		if content != "" {
			o.blob(d, content)
		}
	}
	bad("missing", digest.FromString("missing"), "")
	bad("damaged", digest.FromString("damaged"), "something else")
	bad("no-manifest", digest.FromString("text"), "text")
	bad("no-digest", "../../etc/passwd", "")
	bad("empty", "", "")
	manifest, _ := ommxV2("layer is missing", ommxType, "")
	bad("incomplete", digest.FromString(manifest), manifest)
	manifest, _ = ommxV2("harmed", ommxType, "")
	bad("harmed", digest.FromString(manifest), manifest)
	o.blob(digest.FromString("harmed"), "hurmed")
	manifest = `{"schemaVersion":2,"config":` + desc("application/vnd.oci.empty.v1+json", "{}") + `,"layers":[` + strings.Repeat(" ", ocilocal.MaxManifestSize) + `]}`
	bad("giant", digest.FromString(manifest), manifest)
	o.ref("ghcr.io/example/BAD", "v1", good)
	o.ref("../../x", "v1", good)
	o.ref("ghcr.io/example/bad@sha256", "v1", good)
	o.ref(strings.Repeat("x", 1<<20), "v1", good)
	o.ref("ghcr.io/example/bad", "a b", good)
	o.ref("", "", good)
	if err := os.Symlink("/etc/hostname", filepath.Join(o.dir, "blobs", "sha256", digest.FromString("link").Encoded())); err != nil {
		t.Fatal(err)
	}
	bad("link", digest.FromString("link"), "")

	r := openTemp(t, nil)
	report, err := r.ImportOMMX(t.Context(), o.dir, nil)
	if err != nil || report.Imported != 1 || report.Scanned != 16 || len(report.Failed) != 15 {
		t.Errorf("%d of %d, %d failed, %v", report.Imported, report.Scanned, len(report.Failed), err)
	}
	want := map[string]error{
		"missing": ocilocal.ErrIncomplete, "damaged": ocilocal.ErrInvalidManifest, "no-manifest": ocilocal.ErrInvalidManifest,
		"no-digest": ocilocal.ErrInvalidDigest, "empty": ocilocal.ErrInvalidDigest, "incomplete": ocilocal.ErrIncomplete,
		"harmed": ocilocal.ErrDigestMismatch, "giant": ocilocal.ErrTooLarge, "link": ocilocal.ErrInvalidLayout,
	}
	for _, f := range report.Failed {
		wanted := ocilocal.ErrInvalidReference
		if _, reference, _ := strings.Cut(f.Entry, "ghcr.io/example/bad:"); want[reference] != nil {
			wanted = want[reference]
			delete(want, reference)
		}
		if !errors.Is(f.Err, wanted) {
			t.Errorf("%.100s: %v, want %v", f.Entry, f.Err, wanted)
		}
		if len(f.Entry) > 1000 || len(f.Err.Error()) > 2000 {
			t.Errorf("a text of %d and an error of %d bytes", len(f.Entry), len(f.Err.Error()))
		}
	}
	if len(want) != 0 {
		t.Errorf("not reported: %v", want)
	}
	checkSound(t, r)
	checkNoTmp(t, r)
}

// TestImportOMMXRefused: a directory whose index is not that of an OMMX v3 registry is refused.
func TestImportOMMXRefused(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	other := openTemp(t, nil)
	newer := newOMMXRoot(t, 3)
	newer.exec(ommxSchemas[2])
	view := newOMMXRoot(t, 2)
	view.exec("ALTER TABLE refs RENAME TO other; CREATE VIEW refs AS SELECT * FROM other")
	noTable := newOMMXRoot(t, 2)
	noTable.exec("DROP TABLE refs")
	noise, link := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(noise, "index.sqlite3"), []byte(strings.Repeat("noise", 1000)), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(view.dir, "index.sqlite3"), filepath.Join(link, "index.sqlite3")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir  string
		want error
	}{
		"nothing there": {filepath.Join(noise, "none"), fs.ErrNotExist},
		"no index":      {t.TempDir(), fs.ErrNotExist},
		"ours":          {other.Root(), ocilocal.ErrForeignIndex},
		"no database":   {noise, ocilocal.ErrForeignIndex},
		"a link":        {link, ocilocal.ErrForeignIndex},
		"a view":        {view.dir, ocilocal.ErrForeignIndex},
		"no refs":       {noTable.dir, ocilocal.ErrForeignIndex},
		"newer":         {newer.dir, ocilocal.ErrNewerSchema},
	} {
		report, err := r.ImportOMMX(ctx, c.dir, nil)
		if !errors.Is(err, c.want) || report == nil || report.Scanned != 0 {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	o := newOMMXRoot(t, 2)
	o.add("ghcr.io/example/demo", "v1", "one")
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.ImportOMMX(cancelled, o.dir, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	readOnly, err := ocilocal.OpenReadOnly(ctx, other.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, readOnly)
	if _, err := readOnly.ImportOMMX(ctx, o.dir, nil); !errors.Is(err, ocilocal.ErrReadOnly) {
		t.Error(err)
	}
}

// TestOpenLeavesOMMXAlone: the index of an OMMX v3 registry has the same name as ours. Open refuses
// such a directory and does not change it.
func TestOpenLeavesOMMXAlone(t *testing.T) {
	for schema := range ommxSchemas {
		o := newOMMXRoot(t, schema)
		o.add("ghcr.io/example/demo", "v1", "one")
		o.exec("PRAGMA wal_checkpoint(TRUNCATE)")
		before := tree(t, o.dir)
		if _, err := ocilocal.Open(t.Context(), o.dir, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
			t.Errorf("schema %d: Open: %v", schema, err)
		}
		if _, err := ocilocal.OpenReadOnly(t.Context(), o.dir, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
			t.Errorf("schema %d: OpenReadOnly: %v", schema, err)
		}
		if _, err := ocilocal.Rebuild(t.Context(), o.dir, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
			t.Errorf("schema %d: Rebuild: %v", schema, err)
		}
		after := tree(t, o.dir)
		for _, files := range []map[string]string{before, after} {
			delete(files, "index.sqlite3-shm") // shared memory of the processes that have the index open
		}
		if !maps.Equal(before, after) {
			t.Errorf("schema %d: the root was %q and is %q", schema, slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
		}
	}
}

// checkSound verifies a registry. Unrecorded blobs are accepted: a call that started again leaves
// them.
func checkSound(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	for p, err := range r.Verify(t.Context(), nil) {
		if err != nil || p.Kind != ocilocal.ProblemUnrecorded {
			t.Errorf("%v, %v", p, err)
		}
	}
}

// withSubject is an OMMX manifest with a subject.
func withSubject(text, subject string) string {
	manifest, _ := ommxV2(text, ommxType, "")
	return strings.TrimSuffix(manifest, "}") + `,"subject":` + desc(imageType, subject) + "}"
}

// TestImportOMMXSubjects imports an artifact with a chain of subjects that have no names. The
// subjects that the source has are imported and survive a collection. The missing one is reported.
func TestImportOMMXSubjects(t *testing.T) {
	ctx := t.Context()
	o := newOMMXRoot(t, 2)
	lost, _ := ommxV2("lost", ommxType, "")
	grand := withSubject("grand", lost)
	parent := withSubject("parent", grand)
	childOf := withSubject("child", parent)
	for _, text := range []string{"{}", "grand", "parent", "child", grand, parent, childOf} {
		o.blob(digest.FromString(text), text)
	}
	// A subject that lacks a layer is not whole.
	torn, _ := ommxV2("torn", ommxType, "")
	other := withSubject("other", torn)
	for _, text := range []string{"other", torn, other} {
		o.blob(digest.FromString(text), text)
	}
	o.ref("ghcr.io/example/demo", "v1", digest.FromString(childOf))
	o.ref("ghcr.io/example/demo", "v2", digest.FromString(other))
	r := openTemp(t, nil)
	for range 2 {
		report, err := r.ImportOMMX(ctx, o.dir, nil)
		if err != nil || len(report.Failed) != 0 || report.Imported+report.Verified != 2 {
			t.Fatalf("%+v, %v", report, err)
		}
		want := []digest.Digest{digest.FromString(lost), digest.FromString(torn)}
		if !slices.Equal(sortedDigests(report.MissingSubjects...), sortedDigests(want...)) {
			t.Errorf("missing %v, want %v", report.MissingSubjects, want)
		}
	}
	if d, err := r.Resolve(ctx, ref("ghcr.io/example/demo:v1")); err != nil || d.Digest != digest.FromString(childOf) {
		t.Errorf("%v, %v", d, err)
	}
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{parent, grand} {
		a, err := r.LoadDigest(ctx, digest.FromString(text))
		if err != nil {
			t.Fatal(err)
		}
		if layers, err := a.Layers(ctx); err != nil {
			t.Error(err)
		} else if _, err := a.ReadLayer(ctx, layers[0]); err != nil {
			t.Error(err)
		}
	}
	checkSound(t, r)
}

// TestImportOMMXNames renames some refs and leaves others out. One of them is not a reference here.
func TestImportOMMXNames(t *testing.T) {
	ctx := t.Context()
	o := newOMMXRoot(t, 2)
	d := o.add("ghcr.io/example/demo", "v1", "one")
	o.ref("UPPER/Case", "v1", d)
	o.ref("x.ommx.local/checkpoint", "c1", d)
	r := openTemp(t, nil)
	report, err := r.ImportOMMX(ctx, o.dir, &ocilocal.LegacyOptions{Name: func(claimed string, named ocilocal.Reference) (ocilocal.Reference, error) {
		switch {
		case strings.Contains(claimed, "checkpoint"):
			return named, ocilocal.SkipEntry
		case named.IsZero():
			return ref("example.com/renamed:v1"), nil
		}
		return named, nil
	}})
	if err != nil || report.Imported != 2 || len(report.Failed) != 0 || !slices.Equal(report.Skipped, []string{"x.ommx.local/checkpoint:c1"}) {
		t.Errorf("%+v, %v", report, err)
	}
	for _, name := range []string{"ghcr.io/example/demo:v1", "example.com/renamed:v1"} {
		if got, err := r.Resolve(ctx, ref(name)); err != nil || got.Digest != d {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// TestImportOMMXUpdated: a ref keeps the time at which it was moved in the other registry. If that
// time cannot be read or is in the future, the ref gets the time of the import.
func TestImportOMMXUpdated(t *testing.T) {
	for _, schema := range []int{1, 2} {
		o := newOMMXRoot(t, schema)
		moved := time.Date(2026, 1, 2, 3, 4, 5, 678_000_000, time.UTC)
		want := map[string]bool{"kept": true}
		o.add("example.com/a", "kept", "kept")
		for tag, at := range map[string]any{"bad": "yesterday", "future": "2999-01-01T00:00:00Z", "blob": []byte("2026-01-02T03:04:05Z"), "ancient": "0001-01-01T00:00:00Z"} {
			o.add("example.com/a", tag, tag)
			o.exec("UPDATE refs SET updated_at = ? WHERE reference = ?", at, tag)
		}
		r := openTemp(t, nil)
		before := time.Now().Add(-time.Millisecond)
		for range 2 {
			if report, err := r.ImportOMMX(t.Context(), o.dir, nil); err != nil || len(report.Failed) > 0 {
				t.Fatal(report, err)
			}
		}
		n := 0
		for got, err := range r.Refs(t.Context(), nil) {
			if n++; err != nil {
				t.Fatal(err)
			}
			at := got.Updated
			if want[got.Reference.Tag()] != at.Equal(moved) || !at.Equal(moved) && (at.Before(before) || at.After(time.Now())) {
				t.Errorf("schema %d: %s was moved at %s", schema, got.Reference, at)
			}
		}
		if n != 5 {
			t.Errorf("%d refs", n)
		}
	}
}
