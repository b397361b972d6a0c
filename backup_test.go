package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// listed returns each ref with its digest and the time of its last change.
func listed(t testing.TB, r *ocilocal.LocalRegistry) map[string]string {
	t.Helper()
	all := map[string]string{}
	for ref, err := range r.Refs(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		all[ref.Reference.String()] = fmt.Sprint(ref.Descriptor, ref.Updated.UnixMicro())
	}
	return all
}

// checkBackup opens a backup, and checks that it has the same refs with everything that they need.
func checkBackup(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	r, err := ocilocal.OpenReadOnly(t.Context(), dir, nil)
	if err != nil {
		t.Error(err)
		return
	}
	defer mustClose(t, r)
	if got := listed(t, r); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the backup has\n%v\nwant\n%v", got, want)
	}
	checkSound(t, r)
}

func backUp(t *testing.T, r *ocilocal.LocalRegistry, dir string, want ocilocal.BackupReport) {
	t.Helper()
	report, err := r.Backup(t.Context(), dir, nil)
	if err != nil {
		t.Error(err)
		return
	}
	want.BytesCopied = report.BytesCopied
	if fmt.Sprint(*report) != fmt.Sprint(want) {
		t.Errorf("%+v\nwant %+v", *report, want)
	}
}

func TestBackup(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := openTemp(t, nil)
	dir := filepath.Join(t.TempDir(), "to", "be", "made")
	backUp(t, r, dir, ocilocal.BackupReport{})
	first := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, map[string]string{"k": "v"}, "shared", "one")
	child(t, r, "example.com/a:v2", ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest}, descOf(first), nil, "shared", "two")
	titled(t, r, "example.com/large:v1", "", strings.Repeat("large", 2<<20))
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 3, RefsSet: 3, BlobsCopied: 8})
	checkBackup(t, dir, listed(t, r))

	// Only new content is copied. Files that the backup had are not touched.
	before := tree(t, filepath.Join(dir, "blobs"))
	child(t, r, "example.com/a:v3", ocilocal.BuilderOptions{}, nil, nil, "shared", "three")
	if _, err := r.Remove(ctx, ocilocal.MustParseReference("example.com/a:v2")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Tag(ctx, first.Digest(), ocilocal.MustParseReference("example.com/a:v3"), &ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil {
		t.Fatal(err)
	}
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 3, RefsSet: 1, RefsRemoved: 1, BlobsCopied: 2, BlobsPresent: 8})
	checkBackup(t, dir, listed(t, r))
	after := tree(t, filepath.Join(dir, "blobs"))
	for name, info := range before {
		if fmt.Sprint(after[name]) != fmt.Sprint(info) {
			t.Errorf("%s was %v and is %v", name, info, after[name])
		}
	}
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 3, BlobsPresent: 10})

	// Content that was collected in the source stays in the backup until it is collected there.
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: true}); err != nil {
		t.Fatal(err)
	}
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 3, BlobsPresent: 6})
	restored, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if report, err := restored.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: true}); err != nil || report.Deleted.Blobs+report.Deleted.Manifests != 4 {
		t.Errorf("%+v, %v", report, err)
	}
	mustClose(t, restored)
	checkBackup(t, dir, listed(t, r))
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 3, BlobsPresent: 6}) // a collection of the backup changes no refs
}

// TestBackupReadOnly backs up a read-only registry, and makes a backup of a backup.
func TestBackupReadOnly(t *testing.T) {
	r := openTemp(t, artifactForm)
	child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	want := listed(t, r)
	readOnly, err := ocilocal.OpenReadOnly(t.Context(), r.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	backUp(t, readOnly, dir, ocilocal.BackupReport{Refs: 1, RefsSet: 1, BlobsCopied: 2})
	mustClose(t, readOnly)
	second, err := ocilocal.Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, second)
	third := t.TempDir()
	backUp(t, second, third, ocilocal.BackupReport{Refs: 1, RefsSet: 1, BlobsCopied: 2})
	checkBackup(t, third, want)
}

func TestBackupRefused(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, artifactForm)
	a := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	refused := func(dir string, want error) {
		t.Helper()
		if _, err := r.Backup(ctx, dir, nil); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	refused(r.Root(), ocilocal.ErrInvalidArgument)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(r.Root(), link); err != nil {
		t.Fatal(err)
	}
	refused(link, ocilocal.ErrInvalidArgument)
	other := openTemp(t, artifactForm)
	child(t, other, "example.com/other:v1", ocilocal.BuilderOptions{}, nil, nil, "theirs")
	theirs := listed(t, other)
	refused(other.Root(), ocilocal.ErrConflict)
	if got := listed(t, other); fmt.Sprint(got) != fmt.Sprint(theirs) {
		t.Errorf("another registry has %v", got)
	}
	theirBackup := t.TempDir()
	if _, err := other.Backup(ctx, theirBackup, nil); err != nil {
		t.Fatal(err)
	}
	refused(theirBackup, ocilocal.ErrConflict)
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "index.sqlite3"), []byte("not ours"), 0o644); err != nil {
		t.Fatal(err)
	}
	refused(foreign, ocilocal.ErrForeignIndex)
	file := filepath.Join(foreign, "index.sqlite3")
	if _, err := r.Backup(ctx, file, nil); err == nil {
		t.Error("a file is a directory")
	}

	// A change of the backup's refs is kept, unless Overwrite is set.
	dir := t.TempDir()
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 1, RefsSet: 1, BlobsCopied: 2})
	for name, change := range map[string]func(*ocilocal.LocalRegistry) error{
		"tag": func(b *ocilocal.LocalRegistry) error {
			_, err := b.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/own:v1"), nil)
			return err
		},
		"remove": func(b *ocilocal.LocalRegistry) error {
			_, err := b.Remove(ctx, ocilocal.MustParseReference("example.com/a:v1"))
			if err == nil {
				_, err = b.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/own:v1"), nil)
			}
			return err
		},
		"move": func(b *ocilocal.LocalRegistry) error {
			moved := child(t, b, "example.com/b:v1", ocilocal.BuilderOptions{}, nil, nil, "two")
			_, err := b.Tag(ctx, moved.Digest(), ocilocal.MustParseReference("example.com/a:v1"), &ocilocal.PublishOptions{Policy: ocilocal.Replace})
			if err == nil {
				_, err = b.Remove(ctx, ocilocal.MustParseReference("example.com/b:v1"))
			}
			return err
		},
	} {
		b, err := ocilocal.Open(ctx, dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := change(b); err != nil {
			t.Fatal(name, err)
		}
		changed := listed(t, b)
		mustClose(t, b)
		refused(dir, ocilocal.ErrConflict)
		checkBackup(t, dir, changed)
		if _, err := r.Backup(ctx, dir, &ocilocal.BackupOptions{Overwrite: true}); err != nil {
			t.Error(name, err)
		}
		checkBackup(t, dir, listed(t, r))
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.Backup(cancelled, dir, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestBackupOfDamage: damage in the registry does not get into the backup, and does not stop it.
func TestBackupOfDamage(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, artifactForm)
	dir := t.TempDir()
	child(t, r, "example.com/kept:v1", ocilocal.BuilderOptions{}, nil, nil, "kept")
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 1, RefsSet: 1, BlobsCopied: 2})
	kept := listed(t, r)["example.com/kept:v1"]

	harmed := child(t, r, "example.com/kept:v1", ocilocal.BuilderOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}, nil, nil, "missing", "damaged", "good")
	child(t, r, "example.com/referrer:v1", ocilocal.BuilderOptions{}, descOf(harmed), nil, "of something damaged")
	child(t, r, "example.com/new:v1", ocilocal.BuilderOptions{}, nil, nil, "damaged")
	child(t, r, "example.com/gone:v1", ocilocal.BuilderOptions{}, nil, nil, "an orphan's")
	if _, err := r.Remove(ctx, ocilocal.MustParseReference("example.com/gone:v1")); err != nil {
		t.Fatal(err)
	}
	lost := blobFile(r, digest.FromString("missing"))
	if err := errors.Join(os.Remove(lost), os.Remove(blobFile(r, digest.FromString("an orphan's")))); err != nil {
		t.Fatal(err)
	}
	rewrite(t, blobFile(r, digest.FromString("damaged")), flipBit)

	report, err := r.Backup(ctx, dir, nil)
	if !errors.Is(err, ocilocal.ErrIncomplete) || report == nil {
		t.Fatal(report, err)
	}
	byDigest := map[digest.Digest]ocilocal.BackupFailure{}
	var refs []string
	for _, f := range report.Failed {
		byDigest[f.Digest] = f
		for _, ref := range f.Refs {
			refs = append(refs, ref.String())
		}
	}
	slices.Sort(refs)
	if len(byDigest) != 2 || !errors.Is(byDigest[digest.FromString("missing")].Err, ocilocal.ErrNotFound) ||
		!errors.Is(byDigest[digest.FromString("damaged")].Err, ocilocal.ErrDigestMismatch) || fmt.Sprint(refs) != "[example.com/kept:v1 example.com/new:v1]" {
		t.Errorf("%+v", report.Failed)
	}
	want := listed(t, r)
	want["example.com/kept:v1"] = kept
	delete(want, "example.com/new:v1")
	checkBackup(t, dir, want)

	// After the repair, the next backup is complete.
	if err := os.WriteFile(lost, []byte("missing"), 0o444); err != nil {
		t.Fatal(err)
	}
	rewrite(t, blobFile(r, digest.FromString("damaged")), flipBit)
	backUp(t, r, dir, ocilocal.BackupReport{Refs: 3, RefsSet: 2, BlobsCopied: 2, BlobsPresent: 8})
	checkBackup(t, dir, listed(t, r))
}

func init() { workers["backup"] = backupWorker }

// backupThrough opens the root with a fault hook, backs it up to dir, and closes it.
func backupThrough(seam *pointSeam, root, dir string) error {
	seam.base = filepath.Dir(dir) // its entries are opened too
	r, err := ocilocal.OpenFaulty(context.Background(), root, seam.fault)
	if err != nil {
		return err
	}
	_, err = r.Backup(context.Background(), dir, nil)
	return errors.Join(err, r.Close())
}

// backupWorker backs a root up to a directory, and ends at a point as if it were killed there.
func backupWorker(_ *bufio.Scanner, args []string) error {
	at, err := pointFromArgs(args[2:])
	if err != nil {
		return err
	}
	return backupThrough(&pointSeam{at: at, act: killHere}, args[0], args[1])
}

// A backupCase is a registry with two refs, and a backup of it from when it had one.
type backupCase struct {
	r         *ocilocal.LocalRegistry
	base      string
	last, now string // what the backup has, and what the registry has
}

func newBackupCase(t *testing.T) *backupCase {
	t.Helper()
	c := &backupCase{r: openTemp(t, nil), base: t.TempDir()}
	a := child(t, c.r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	if _, err := c.r.Backup(t.Context(), c.base, nil); err != nil {
		t.Fatal(err)
	}
	c.last = fmt.Sprint(listed(t, c.r))
	child(t, c.r, "example.com/a:v2", ocilocal.BuilderOptions{}, descOf(a), nil, "two")
	c.now = fmt.Sprint(listed(t, c.r))
	return c
}

// copy returns a new copy of the backup.
func (c *backupCase) copy(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(dir, os.DirFS(c.base)); err != nil {
		t.Fatal(err)
	}
	for name := range tree(t, filepath.Join(dir, "blobs")) {
		if err := os.Chmod(filepath.Join(dir, "blobs", name), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// points records the file operations of a backup to dir.
func (c *backupCase) points(t *testing.T, dir string) []point {
	t.Helper()
	seam := &pointSeam{}
	if err := backupThrough(seam, c.r.Root(), dir); err != nil {
		t.Fatal(err)
	}
	checkBackup(t, dir, listed(t, c.r))
	return seam.points
}

// TestBackupKilled kills a backup at each file operation. It leaves nothing, the last backup or the
// new one, and the next backup succeeds.
func TestBackupKilled(t *testing.T) {
	t.Parallel()
	c := newBackupCase(t)
	for _, first := range []bool{true, false} {
		target := func() string {
			if first {
				return filepath.Join(t.TempDir(), "backup")
			}
			return c.copy(t)
		}
		for _, p := range everyNth(c.points(t, target()), scaled(24, 5, 1)) {
			dir := target()
			w := startWorker(t, "backup", append([]string{c.r.Root(), dir}, p.args()...)...)
			end := w.end()
			if code := w.cmd.ProcessState.ExitCode(); code != killedAt {
				t.Fatalf("the recorded operation %v was not reached: %s", p, end)
			}
			got := ""
			b, err := ocilocal.OpenReadOnly(t.Context(), dir, nil)
			if err == nil {
				got = fmt.Sprint(listed(t, b))
				mustClose(t, b)
			} else if !first || !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("killed at %v: %v", p, err)
			}
			before := c.last
			if first && got != "" {
				before = fmt.Sprint(map[string]string{})
			}
			if got != c.now && got != before && got != "" {
				t.Errorf("killed at %v: the backup has %q", p, got)
			}
			if _, err := c.r.Backup(t.Context(), dir, nil); err != nil {
				t.Error(err)
			}
			checkBackup(t, dir, listed(t, c.r))
		}
	}
}

// TestBackupFaults fails each file operation of a backup. It leaves the last backup or is complete,
// and the next backup succeeds.
func TestBackupFaults(t *testing.T) {
	t.Parallel()
	c := newBackupCase(t)
	failed, changing := 0, 0
	points := everyNth(c.points(t, c.copy(t)), scaled(20, 1, 1))
	for _, p := range points {
		dir := c.copy(t)
		seam := &pointSeam{at: p, act: func() error { return os.ErrPermission }}
		err := backupThrough(seam, c.r.Root(), dir)
		if !seam.hit.Load() {
			t.Fatalf("the recorded operation %v was not reached", p)
		}
		if err != nil && !errors.Is(err, os.ErrPermission) {
			t.Errorf("failed at %v: %v", p, err)
		}
		if p.op != "stat" {
			changing++
			if err != nil {
				failed++
			}
		}
		b, openErr := ocilocal.OpenReadOnly(t.Context(), dir, nil)
		if openErr != nil {
			t.Fatal(openErr)
		}
		if got := fmt.Sprint(listed(t, b)); got != c.now && (err == nil || got != c.last) {
			t.Errorf("failed at %v: %v, and the backup has %s", p, err, got)
		}
		mustClose(t, b)
		if _, err := c.r.Backup(t.Context(), dir, nil); err != nil {
			t.Error(err)
		}
		checkBackup(t, dir, listed(t, c.r))
	}
	if failed < changing/2 {
		t.Errorf("only %d of %d operations failed", failed, changing)
	}
}

// TestBackupLive backs up a registry while others publish, move, remove and collect. The backup
// shows one moment: a writer moves "first" before "second", so "second" is never ahead.
func TestBackupLive(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	replace := ocilocal.BuilderOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}
	started := make(chan struct{})
	var once sync.Once
	wg.Go(func() {
		for n := 1; ctx.Err() == nil; n++ {
			for _, name := range []string{"first", "second"} {
				child(t, r, "example.com/"+name+":v1", replace, nil, map[string]string{"n": fmt.Sprintf("%08d", n)}, fmt.Sprint(name, n), "shared")
			}
			once.Do(func() { close(started) })
		}
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
				t.Error(err)
			}
		}
	})
	<-started
	rounds := scaled(5, 15, 50)
	busy := 0
	for range rounds {
		if _, err := r.Backup(t.Context(), dir, nil); errors.Is(err, ocilocal.ErrBusy) {
			busy++
			continue
		} else if err != nil {
			t.Error(err)
		}
		b, err := ocilocal.OpenReadOnly(t.Context(), dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		var n []string
		for _, name := range []string{"first", "second"} {
			a, err := b.Load(t.Context(), ocilocal.MustParseReference("example.com/"+name+":v1"))
			if err != nil {
				t.Fatal(err)
			}
			annotations, err := a.Annotations(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			n = append(n, annotations["n"])
		}
		if n[0] < n[1] {
			t.Errorf("first is %s and second is %s", n[0], n[1])
		}
		checkSound(t, b)
		mustClose(t, b)
	}
	if busy > rounds/2 {
		t.Errorf("%d of %d backups gave up", busy, rounds)
	}
	stop()
	wg.Wait()
	if _, err := r.Backup(t.Context(), dir, nil); err != nil {
		t.Error(err)
	}
	checkBackup(t, dir, listed(t, r))
}

// TestBackupBesideCollection: a collection in the backup deletes blobs that were copied and that no
// ref there needs yet. The backup starts again.
func TestBackupBesideCollection(t *testing.T) {
	r := openTemp(t, nil)
	child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	dir := t.TempDir()
	if _, err := r.Backup(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	child(t, r, "example.com/a:v2", ocilocal.BuilderOptions{}, nil, nil, "two")
	collector, err := ocilocal.Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, collector)
	deleted := -1
	faulty, err := ocilocal.OpenFaulty(t.Context(), r.Root(), func(op, name string) error {
		if op != "remove" || deleted >= 0 { // the names below tmp/, when those below blobs/ are there
			return nil
		}
		deleted = 0
		report, err := collector.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace})
		if err == nil {
			deleted = report.Deleted.Blobs
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, faulty)
	if report, err := faulty.Backup(t.Context(), dir, nil); err != nil || report.BlobsCopied != 4 {
		t.Errorf("%+v, %v", report, err)
	}
	if deleted != 2 {
		t.Errorf("the collection deleted %d blobs", deleted)
	}
	checkBackup(t, dir, listed(t, r))
}

// TestBackupTargetChanges: another program changes the backup's refs while blobs are being copied,
// after the first check of the refs. This backup fails, and so does the next one.
func TestBackupTargetChanges(t *testing.T) {
	root, dir := filepath.Join(t.TempDir(), "root"), t.TempDir()
	var hook func(op, name string)
	r, err := ocilocal.OpenFaulty(t.Context(), root, func(op, name string) error {
		if hook != nil {
			hook(op, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, r)
	first := child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	if _, err := r.Backup(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	second := child(t, r, "example.com/a:v2", ocilocal.BuilderOptions{}, nil, nil, "two")
	theirs := ocilocal.MustParseReference("example.com/theirs:v1")
	var changed map[string]string
	hook = func(op, name string) {
		if op != "link" || filepath.Base(name) != second.Digest().Encoded() {
			return
		}
		hook = nil
		target, err := ocilocal.Open(context.Background(), dir, nil)
		if err == nil {
			_, err = target.Tag(context.Background(), first.Digest(), theirs, nil)
			changed = listed(t, target)
			err = errors.Join(err, target.Close())
		}
		if err != nil {
			t.Error(err)
		}
	}
	if _, err := r.Backup(t.Context(), dir, nil); !errors.Is(err, ocilocal.ErrConflict) || changed == nil {
		t.Errorf("%v, want %v", err, ocilocal.ErrConflict)
	}
	checkBackup(t, dir, changed)
}
