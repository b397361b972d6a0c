package ocilocal_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestMigrateKilled kills a process that migrates an index at each system call that changes the
// index's files: at those of the transaction, and at those of the checkpoint after it. Each time
// the index is of version 1 or of version 2, whole, and the next process brings it up to date.
func TestMigrateKilled(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed: a process cannot be killed at a system call")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	step := scaled(9, 2, 1)
	versions := map[int]int{}
	for _, calls := range []string{"pwrite64", "fsync,fdatasync", "ftruncate,unlink,unlinkat"} {
		for n := 1; ; n += step {
			root, says := schema1Root(t)
			trace := filepath.Join(t.TempDir(), "trace")
			name := filepath.Join(root, "index.sqlite3")
			w := startCommand(t, "migrate", exec.Command(strace, "-f", "-P", name, "-P", name+"-wal", "-P", name+"-shm", "-e", "trace="+calls,
				"-e", "inject="+calls+":signal=SIGKILL:when="+strconv.Itoa(n), "-o", trace, exe, root))
			for w.out.Scan() {
			}
			w.end()
			b, err := os.ReadFile(trace)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(b), "killed by SIGKILL") {
				if n == 1 {
					t.Logf("no %s", calls)
				}
				break
			}
			version, after := indexSays(t, root)
			if versions[version]++; !slices.Equal(says, after) {
				t.Errorf("killed at the %d. of %s: version %d says %q", n, calls, version, after)
			}
			checkMigrated(t, root, says)
		}
	}
	t.Logf("killed before the commit %d times, after it %d times", versions[1], versions[2])
	if versions[1] == 0 || versions[2] == 0 {
		t.Error("it was killed only on one side of the commit")
	}
}

// TestMigrateFullDisk migrates an index on disks with more and more room. As long as there is too
// little, it fails with ErrNoSpace and the index is as it was.
func TestMigrateFullDisk(t *testing.T) {
	golden, says := largeSchema1Root(t, 500)
	mnt := mountTmpfs(t, "size=8m")
	root, filler := filepath.Join(mnt, "root"), filepath.Join(mnt, "filler")
	full := 0
	for room := 16 << 10; ; room += 128 << 10 / scaled(1, 4, 16) {
		if err := errors.Join(os.RemoveAll(root), os.RemoveAll(filler), os.CopyFS(root, os.DirFS(golden))); err != nil {
			t.Fatal(err)
		}
		dontWatch(root)
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 4096); err == nil; {
			_, err = f.Write(buf)
		}
		fi, err := f.Stat()
		if err == nil {
			err = errors.Join(f.Truncate(fi.Size()-int64(room)), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		r, err := ocilocal.Open(t.Context(), root, nil)
		if err == nil {
			mustClose(t, r)
			break
		}
		full++
		if !errors.Is(err, ocilocal.ErrNoSpace) {
			t.Fatalf("with %d bytes: %v, want ErrNoSpace", room, err)
		}
		os.Remove(filler)
		if version, after := indexSays(t, root); version != 1 || !slices.Equal(says, after) {
			t.Fatalf("with %d bytes: version %d says %.2000q", room, version, after)
		}
	}
	if full < 3 {
		t.Errorf("the disk was full %d times", full)
	}
	if version, after := indexSays(t, root); version != 2 || !slices.Equal(says, after) {
		t.Errorf("version %d says %.2000q", version, after)
	}
}
