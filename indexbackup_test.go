package ocilocal_test

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestBackupRows backs up to a root whose index has other ids for the same digests and types. Every
// row must be copied: those of absent members and subjects, of content without a ref, and of the
// entries of an index.json.
func TestBackupRows(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := openTemp(t, nil)
	dir := filepath.Join(t.TempDir(), "backup")
	first := published(t, r, "example.com/a:first", "first", nil)
	published(t, r, "example.com/a:second", "second", nil)
	mustBackUp := func() {
		t.Helper()
		if _, err := r.Backup(ctx, dir, nil); err != nil {
			t.Fatal(err)
		}
	}
	mustBackUp()
	if _, err := r.Remove(ctx, first.Reference()); err != nil {
		t.Fatal(err)
	}
	collect(t, r, atOnce) // the next rows get ids that other rows have in the backup
	held := child(t, r, "example.com/a:held", ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.held"}, nil, map[string]string{"k": "v"}, "held")
	m, _ := imageRows(t, "{}", "held", "not here")
	if err := ocilocal.PublishAbsent(ctx, r, ref("example.com/a:absent"), m, `{"annotations":{"k":"v"}}`, digest.FromString("{}"), digest.FromString("not here")); err != nil {
		t.Fatal(err)
	}
	again := published(t, r, "example.com/a:first", "third", held)
	if err := ocilocal.IndexWrite(ctx, r, func(exec func(string) error) error {
		return errors.Join(
			exec("UPDATE manifests SET subject = (SELECT min(id) FROM content WHERE NOT present) WHERE id = "+sqlID(again.Digest())),
			exec("INSERT INTO unnamed SELECT id, 7, '{}' FROM manifests WHERE id = "+sqlID(held.Digest())),
			exec("INSERT INTO holds VALUES ('example.com/a', "+sqlID(held.Digest())+", 8), ('example.com/b', "+sqlID(held.Digest())+", 9)"),
			exec("UPDATE refs SET used = 10 WHERE reference = 'second'"))
	}); err != nil {
		t.Fatal(err)
	}
	dontWatch(r.Root())
	compare := func(kinds ...string) {
		t.Helper()
		mustBackUp()
		_, source := indexSays(t, r.Root())
		_, target := indexSays(t, dir)
		for _, text := range source {
			if kind, _, _ := strings.Cut(text, " "); !slices.Contains(target, text) && kind != "meta" {
				t.Errorf("the backup lacks %s", text)
			}
		}
		for _, text := range target {
			if kind, _, _ := strings.Cut(text, " "); !slices.Contains(source, text) && slices.Contains(kinds, kind) {
				t.Errorf("the backup has also %s", text)
			}
		}
	}
	compare("ref", "unnamed", "hold")
	if err := ocilocal.IndexWrite(ctx, r, func(exec func(string) error) error {
		return errors.Join(exec("DELETE FROM unnamed"), exec("DELETE FROM holds WHERE name = 'example.com/a'"), exec("UPDATE holds SET since = 11"),
			exec("UPDATE refs SET used = 12, entry = '' WHERE reference = 'absent'"))
	}); err != nil {
		t.Fatal(err)
	}
	compare("ref", "unnamed", "hold")
}

// TestBackupDamagedIndex: rows that point at nothing stop a backup, because it would lack content
// and still look whole. An earlier backup stays as it was.
func TestBackupDamagedIndex(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for what, row := range map[string]func(a, subject *ocilocal.LocalArtifact) string{
		"layer": func(_, _ *ocilocal.LocalArtifact) string {
			return "content WHERE id = " + sqlID(digest.FromString("one"))
		},
		"manifest's blob":   func(a, _ *ocilocal.LocalArtifact) string { return "content WHERE id = " + sqlID(a.Digest()) },
		"subject's blob":    func(_, s *ocilocal.LocalArtifact) string { return "content WHERE id = " + sqlID(s.Digest()) },
		"manifest":          func(a, _ *ocilocal.LocalArtifact) string { return "manifests WHERE id = " + sqlID(a.Digest()) },
		"layer's type":      func(_, _ *ocilocal.LocalArtifact) string { return "types WHERE text = 'text/plain'" },
		"artifact's type":   func(_, _ *ocilocal.LocalArtifact) string { return "types WHERE text = 'application/vnd.example.test'" },
		"blob of unnamed":   func(a, _ *ocilocal.LocalArtifact) string { return "content WHERE id = (SELECT manifest FROM unnamed)" },
		"what is held here": func(a, _ *ocilocal.LocalArtifact) string { return "content WHERE id = (SELECT content FROM holds)" },
	} {
		r := openTemp(t, nil)
		subject := published(t, r, "example.com/a:0", "zero", nil)
		dir := filepath.Join(t.TempDir(), "backup")
		if _, err := r.Backup(ctx, dir, nil); err != nil {
			t.Fatal(err)
		}
		a := published(t, r, "example.com/a:1", "one", subject)
		kept := published(t, r, "example.com/kept:1", "kept", nil)
		if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error {
			return errors.Join(tx.SetUnnamed(kept.Digest(), "", time.Now()), tx.SetHold("example.com/kept", kept.Digest(), time.Now()))
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Remove(ctx, kept.Reference()); err != nil {
			t.Fatal(err)
		}
		execIndex(t, r.Root(), "DELETE FROM "+row(a, subject))
		if _, err := r.Backup(ctx, dir, nil); !errors.Is(err, ocilocal.ErrCorruptIndex) {
			t.Errorf("row of the %s is lost: %v", what, err)
		}
		backup := mustOpen(t, dir)
		if got := problems(t, backup, nil, nil); slices.ContainsFunc(got, func(s string) bool { return s != "blob is unrecorded" }) {
			t.Errorf("row of the %s is lost: the backup has %q", what, got)
		}
		if _, err := backup.Resolve(ctx, ref("example.com/a:1")); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("row of the %s is lost: the backup has the ref: %v", what, err)
		}
		mustClose(t, backup)
	}
}
