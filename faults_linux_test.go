package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func init() { workers["readonly"] = readOnlyWorker }

// mountTmpfs mounts a small file system for the length of the test.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("a tmpfs can't be mounted here (%v): it takes root and the right to mount", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestFullDisk publishes until a real disk is full. Published artifacts stay, and publishing
// continues once there is space again. Large layers fill the disk with their bytes, small ones with
// rows of the index.
func TestFullDisk(t *testing.T) {
	for _, c := range []struct {
		name, options string
		layer         int
	}{
		{"large layers", "size=2m", 96 << 10},
		{"middle layers", "size=2m", 20 << 10},
		{"small layers", "size=2m", 10},
		{"no inodes", "size=16m,nr_inodes=100", 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			mnt := mountTmpfs(t, c.options)
			// These files give back space and inodes later.
			for i := range 40 {
				if err := os.WriteFile(filepath.Join(mnt, fmt.Sprint("filler", i)), make([]byte, 16<<10), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			root := filepath.Join(mnt, "root")
			r := mustOpen(t, root)
			want := model{}
			publish := func(i int) error {
				label := fmt.Sprint("label", i)
				_, err := publishLabelled(r, fmt.Sprintf("example.com/full/disk:r%d", i), label, ocilocal.KeepExisting, append([]byte(label), make([]byte, c.layer)...))
				return err
			}
			readAll := func() {
				t.Helper()
				for ref, labels := range want {
					if got, err := readLabelled(r, ref); got != labels[0] || err != nil {
						t.Errorf("%s reads %q, %v; want %q", ref, got, err, labels[0])
					}
				}
			}
			i := 0
			for ; ; i++ {
				if i > 5000 {
					t.Fatal("the disk doesn't get full")
				}
				if err := publish(i); err != nil {
					checkFull(t, err)
					break
				}
				want[fmt.Sprintf("example.com/full/disk:r%d", i)] = []string{fmt.Sprint("label", i)}
			}
			t.Logf("full after %d artifacts", i)
			if len(want) == 0 {
				t.Fatal("nothing could be published at all")
			}
			// Each further try fails in the same way, and the published artifacts can be read.
			for range 5 {
				if err := publish(i); err == nil {
					t.Log("a second attempt found space")
					want[fmt.Sprintf("example.com/full/disk:r%d", i)] = []string{fmt.Sprint("label", i)}
					i++
				} else {
					checkFull(t, err)
				}
			}
			ref := fmt.Sprintf("example.com/full/disk:r%d", i)
			if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(ref)); ok || err != nil {
				t.Errorf("%s exists (%v, %v), though its publish failed", ref, ok, err)
			}
			readAll()

			for i := range 40 {
				if err := os.Remove(filepath.Join(mnt, fmt.Sprint("filler", i))); err != nil {
					t.Fatal(err)
				}
			}
			if err := publish(i); err != nil {
				t.Fatalf("with space again: %v", err)
			}
			want[ref] = []string{fmt.Sprint("label", i)}
			readAll()
			mustClose(t, r)
			checkStore(t, root, want)
		})
	}
}

// TestFullDiskCollected: on full disks of many sizes, with large and small layers, a collection
// frees the garbage although it cannot get any space or file, and then publishing continues.
func TestFullDiskCollected(t *testing.T) {
	t.Parallel()
	kib := []int{48, 700, 8 << 10}
	if deepLevel() > 1 {
		for size := 50.0; size < 8<<10; size *= 1.09 {
			kib = append(kib, int(size))
		}
	}
	for i, size := range kib {
		for _, options := range []string{fmt.Sprintf("size=%dk", size), fmt.Sprintf("size=16m,nr_inodes=%d", 20+size/8)} {
			t.Run(options, func(t *testing.T) {
				collectFull(t, options, []int{100, 9 << 10, 90 << 10}[i%3])
			})
		}
	}
}

func collectFull(t *testing.T, options string, layer int) {
	mnt := mountTmpfs(t, options)
	root := filepath.Join(mnt, "root")
	r, err := ocilocal.Open(t.Context(), root, nil)
	if err != nil {
		checkFull(t, err)
		t.Logf("an empty registry doesn't fit: %v", err)
		return
	}
	defer r.Close()
	want, orphans := model{}, map[string]bool{}
	publish := func(ref string) error {
		_, err := publishLabelled(r, ref, ref, ocilocal.KeepExisting, append([]byte(ref), noise(1, layer)...))
		return err
	}
	for i := 0; err == nil; i++ {
		if i > 5000 {
			t.Fatal("the disk doesn't get full")
		}
		ref := fmt.Sprintf("example.com/full/disk:r%d", i)
		if err = publish(ref); err != nil {
			break
		}
		want[ref] = []string{ref}
		if i%4 == 0 {
			continue
		}
		if _, err = r.Remove(t.Context(), ocilocal.MustParseReference(ref)); err == nil {
			delete(want, ref)
			orphans[string(digest.FromBytes(append([]byte(ref), noise(1, layer)...)))] = true
		}
	}
	checkFull(t, err)
	for kind, body := range [][]byte{make([]byte, 512<<10), nil} { // until no block is left, and then no inode
		for i := range 1500 {
			if err := os.WriteFile(filepath.Join(mnt, fmt.Sprint("filler", kind, i)), body, 0o600); err != nil {
				break
			}
		}
	}
	report, err := r.GC(t.Context(), atOnce)
	if err != nil {
		t.Errorf("a collection on a full disk: %v, %+v", err, report)
	}
	left := 0
	for _, d := range blobNames(t, r) {
		if orphans[string(d)] {
			left++
		}
	}
	t.Logf("%d artifacts stay, %d of %d orphans are left: %+v", len(want), left, len(orphans), report.Deleted)
	if left*20 > len(orphans) {
		t.Errorf("%d of %d orphans are still there", left, len(orphans))
	}
	if len(orphans) > 20 {
		const again = "example.com/full/disk:again"
		if err := publish(again); err != nil {
			t.Errorf("after the collection: %v", err)
		}
		want[again] = []string{again}
	}
	for ref := range want {
		if got, err := readLabelled(r, ref); got != ref || err != nil {
			t.Errorf("%s reads %q, %v", ref, got, err)
		}
	}
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", syscall.MS_REMOUNT, "size=32m,nr_inodes=5000"); err != nil {
		t.Fatal(err)
	}
	collect(t, r, atOnce) // rows may be left for which the log had no space
	mustClose(t, r)
	checkCollected(t, root, want)
}

// TestDevFull exports to /dev/full, which is always full.
func TestDevFull(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	r := openTemp(t, nil)
	a, _ := oneLayer(t, r, keptRef, noise(1, 100_000))
	for _, opts := range []*ocilocal.ExportOptions{nil, {Gzip: true}} {
		checkFull(t, r.ExportArchive(t.Context(), full, []ocilocal.Reference{a.Reference()}, opts))
	}
}

func checkFull(t *testing.T, err error) {
	t.Helper()
	if _, ok := errors.AsType[*ocilocal.Error](err); !ok || !errors.Is(err, ocilocal.ErrNoSpace) {
		t.Errorf("error on a full disk is %T %v; want ErrNoSpace in an *Error", err, err)
	}
}

// roRoot makes a registry with two refs, closed, below a directory that every user can enter.
func roRoot(t *testing.T, parent string) (root string, want map[string]string) {
	t.Helper()
	root = filepath.Join(parent, "root")
	r := mustOpen(t, root)
	want = map[string]string{"example.com/ro/one:v1": "one", "example.com/ro/two:v1": "two"}
	for ref, label := range want {
		if _, err := publishLabelled(r, ref, label, ocilocal.KeepExisting, []byte(label), []byte("shared")); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, r)
	// If Close left a connection open, these files would stay.
	for _, name := range []string{"index.sqlite3-wal", "index.sqlite3-shm"} {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("%s is still there after the last Close", name)
		}
	}
	return root, want
}

// lockTree makes a tree read-only for its owner, and readable for everybody.
func lockTree(t *testing.T, root string) {
	t.Helper()
	var dirs []string
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			dirs = append(dirs, p)
			return nil
		}
		return os.Chmod(p, 0o444)
	})
	for _, d := range slices.Backward(dirs) {
		err = errors.Join(err, os.Chmod(d, 0o555))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // TempDir's own cleanup must be able to delete it
		for _, d := range dirs {
			os.Chmod(d, 0o755)
		}
	})
}

// snapshot lists the files below root with their modes, sizes and times.
func snapshot(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			fmt.Fprintln(&b, p, fi.Mode(), fi.Size(), fi.ModTime())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// readOnlyWorker reads a root as a user who may not write to it. It says "ref REF LABEL" for each
// ref, and then "writes CALL" with the call for writing that failed.
func readOnlyWorker(_ *bufio.Scanner, args []string) error {
	ctx := context.Background()
	root := args[0]
	r, err := ocilocal.OpenReadOnly(ctx, root, nil)
	if err != nil {
		return err
	}
	for ref, err := range r.Refs(ctx, nil) {
		if err != nil {
			return err
		}
		label, err := readLabelled(r, ref.Reference.String())
		if err != nil {
			return err
		}
		say("ref", ref.Reference, label)
	}
	if _, err := r.Remove(ctx, ocilocal.MustParseReference("example.com/ro/one:v1")); !errors.Is(err, ocilocal.ErrReadOnly) {
		return fmt.Errorf("remove from a read-only registry: %w", err)
	}
	if _, err := publishLabelled(r, "example.com/ro/new:v1", "new", ocilocal.KeepExisting, []byte("x")); !errors.Is(err, ocilocal.ErrReadOnly) {
		return fmt.Errorf("build in a read-only registry: %w", err)
	}
	if err := r.Close(); err != nil {
		return err
	}

	// Open for writing may fail at once, or at the first write. Both errors are typed.
	r, err = ocilocal.Open(ctx, root, nil)
	at := "open"
	if err == nil {
		defer r.Close()
		at = "publish"
		_, err = publishLabelled(r, "example.com/ro/new:v1", "new", ocilocal.KeepExisting, []byte("x"))
	}
	_, typed := errors.AsType[*ocilocal.Error](err)
	if !typed || !errors.Is(err, ocilocal.ErrReadOnly) && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%s of a root that can't be written: %T %w", at, err, err)
	}
	say("writes", at)
	return nil
}

// checkReadOnly compares the refs that a readonly worker reports with want.
func checkReadOnly(t *testing.T, w *worker, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for {
		words := w.line()
		if words[0] == "writes" {
			if words[1] != "open" {
				t.Errorf("Open of a root that can't be written succeeds, and fails only at %s", words[1])
			}
			break
		}
		got[words[1]] = words[2]
	}
	w.finish()
	if !maps.Equal(got, want) {
		t.Errorf("read %v, want %v", got, want)
	}
}

// TestReadOnlyUser: a user who may not write a root lists and reads it.
func TestReadOnlyUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user takes root")
	}
	// t.TempDir lies in a directory that only its owner may enter.
	parent, err := os.MkdirTemp("", "ocilocal-readonly-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(parent) })
	if err := os.Chmod(parent, 0o755); err != nil {
		t.Fatal(err)
	}
	root, want := roRoot(t, parent)
	lockTree(t, root)
	before := snapshot(t, root)
	// That user cannot reach the binary by its path. This name needs no path.
	cmd := exec.Command("/proc/self/exe", root)
	cmd.Dir = parent
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	checkReadOnly(t, startCommand(t, "readonly", cmd), want)
	if after := snapshot(t, root); after != before {
		t.Errorf("the root was\n%s\nand is\n%s", before, after)
	}
}

// TestReadOnlyMode: a root without write permission, opened by its owner.
func TestReadOnlyMode(t *testing.T) {
	root, want := roRoot(t, t.TempDir())
	lockTree(t, root)
	before := snapshot(t, filepath.Join(root, "blobs")) + snapshot(t, filepath.Join(root, "tmp"))
	r, err := ocilocal.OpenReadOnly(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	for ref, label := range want {
		if got, err := readLabelled(r, ref); got != label || err != nil {
			t.Errorf("%s reads %q, %v; want %q", ref, got, err, label)
		}
	}
	mustClose(t, r)
	if after := snapshot(t, filepath.Join(root, "blobs")) + snapshot(t, filepath.Join(root, "tmp")); after != before {
		t.Errorf("the root was\n%s\nand is\n%s", before, after)
	}
}

// TestReadOnlyFileSystem: a root on a file system that is mounted read-only.
func TestReadOnlyFileSystem(t *testing.T) {
	mnt := mountTmpfs(t, "size=4m")
	root, want := roRoot(t, mnt)
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, root)
	checkReadOnly(t, startWorker(t, "readonly", root), want)
	if after := snapshot(t, root); after != before {
		t.Errorf("the root was\n%s\nand is\n%s", before, after)
	}
}

// TestReadOnlyLog: a root on a read-only file system has a log that its killed process never copied
// into the index. OpenReadOnly shows the changes of the log or fails. It never leaves them out.
func TestReadOnlyLog(t *testing.T) {
	mnt := mountTmpfs(t, "size=8m")
	live := openTemp(t, nil)
	a, _ := oneLayer(t, live, keptRef, []byte("body"))
	for _, withShm := range []bool{false, true} {
		root := filepath.Join(mnt, fmt.Sprint(withShm))
		if err := os.CopyFS(root, os.DirFS(live.Root())); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(filepath.Join(root, "index.sqlite3-wal")); err != nil || fi.Size() == 0 {
			t.Fatalf("the log: %v, %v", fi, err)
		}
		if !withShm {
			if err := os.Remove(filepath.Join(root, "index.sqlite3-shm")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, withShm := range []bool{false, true} {
		r, err := ocilocal.OpenReadOnly(t.Context(), filepath.Join(mnt, fmt.Sprint(withShm)), nil)
		if err != nil {
			t.Logf("with -shm %v: %v", withShm, err)
			continue
		}
		if d, err := r.Resolve(t.Context(), a.Reference()); err != nil || d.Digest != a.Digest() {
			t.Errorf("with -shm %v: %v, %v", withShm, d, err)
		}
		mustClose(t, r)
	}
}

// TestFIFOs puts named pipes in the place of files. No call waits for a writer.
func TestFIFOs(t *testing.T) {
	r := openTemp(t, nil)
	a, layer := oneLayer(t, r, keptRef, []byte("body"))
	fifo := func(name string) {
		t.Helper()
		if err := errors.Join(os.Remove(name), syscall.Mkfifo(name, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(what string, want error, call func() error) {
		t.Helper()
		done := make(chan error, 1)
		go func() { done <- call() }()
		if err := outcome(t, done); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	fifo(blobFile(r, layer.Digest))
	check("read a layer", nil, func() error { _, err := a.ReadLayer(t.Context(), layer); return err })
	check("its size", ocilocal.ErrDigestMismatch, func() error { _, err := r.HasBlob(t.Context(), layer.Digest); return err })
	check("tag", ocilocal.ErrDigestMismatch, func() error {
		_, err := r.Tag(t.Context(), a.Digest(), ocilocal.MustParseReference(newRef), nil)
		return err
	})
	if _, err := build(t, r, movedRef, nil, "body"); err != nil {
		t.Errorf("putting the same bytes: %v", err)
	}
	if got, err := a.ReadLayer(t.Context(), layer); err != nil || string(got) != "body" {
		t.Errorf("%q, %v", got, err)
	}
	source := filepath.Join(t.TempDir(), "source")
	write(t, source, "")
	fifo(source)
	check("add as a layer", nil, func() error {
		b, err := r.NewBuilder(ocilocal.MustParseReference(newRef), &ocilocal.BuilderOptions{ArtifactType: testType})
		if err != nil {
			return err
		}
		defer b.Cancel()
		_, err = b.AddLayerFile(t.Context(), "text/plain", source, nil)
		return err
	})
	mustClose(t, r)
	for _, name := range []string{"id", "index.sqlite3"} {
		fifo(filepath.Join(r.Root(), name))
		check(name, ocilocal.ErrForeignIndex, func() error { _, err := ocilocal.Open(t.Context(), r.Root(), nil); return err })
		check(name, ocilocal.ErrForeignIndex, func() error { _, err := ocilocal.OpenReadOnly(t.Context(), r.Root(), nil); return err })
	}
}

// TestImportOMMXReadOnlyFileSystem: an OMMX root on a read-only medium can be imported, unless its
// log holds changes that SQLite cannot read without writing.
func TestImportOMMXReadOnlyFileSystem(t *testing.T) {
	live := newOMMXRoot(t, 2)
	live.add("ghcr.io/example/demo", "v1", "one")
	live.exec("PRAGMA wal_checkpoint(TRUNCATE)")
	d := live.add("ghcr.io/example/demo", "v2", "two") // in the log
	killed := live.noShm()
	live.exec("DELETE FROM refs WHERE manifest_digest = ?", string(d))
	if err := live.db.Close(); err != nil {
		t.Fatal(err)
	}
	closed := live.noShm()
	mnt := mountTmpfs(t, "size=4m")
	for name, o := range map[string]*ommxRoot{"closed": closed, "killed": killed} {
		if err := os.CopyFS(filepath.Join(mnt, name), os.DirFS(o.dir)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	r := openTemp(t, nil)
	if report, err := r.ImportOMMX(t.Context(), filepath.Join(mnt, "killed"), nil); err == nil || report.Scanned != 0 {
		t.Errorf("a log that can't be read was left out: %+v", report)
	}
	if report, err := r.ImportOMMX(t.Context(), filepath.Join(mnt, "closed"), nil); err != nil || report.Imported != 1 {
		t.Errorf("%+v, %v", report, err)
	}
}

// TestBackupNoSpace: a backup to a full disk fails and keeps its state. Once there is space, it succeeds.
func TestBackupNoSpace(t *testing.T) {
	mnt := mountTmpfs(t, "size=1m")
	r := openTemp(t, nil)
	child(t, r, "example.com/a:v1", ocilocal.BuilderOptions{}, nil, nil, "one")
	dir := filepath.Join(mnt, "backup")
	if _, err := r.Backup(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	last := listed(t, r)
	titled(t, r, "example.com/large:v1", "", strings.Repeat("large", 1<<20))
	if _, err := r.Backup(t.Context(), dir, nil); !errors.Is(err, syscall.ENOSPC) { // the index's error matches it too
		t.Error(err)
	}
	checkBackup(t, dir, last)
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", syscall.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Backup(t.Context(), dir, nil); err != nil {
		t.Error(err)
	}
	checkBackup(t, dir, listed(t, r))
}
