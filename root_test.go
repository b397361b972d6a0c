package ocilocal_test

import (
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestDurableRoot: before the index of a new root gets its name, the entries of the root and of
// each new parent directory are synced. So is the entry of a root that existed: its maker may have
// been killed before it came to that.
func TestDurableRoot(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not sync directories")
	}
	for name, made := range map[string][]string{"made": {"a", "a/b", "a/b/root"}, "there": {"."}} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			rec := &record{}
			r, err := ocilocal.OpenFaulty(t.Context(), filepath.Join(top, made[len(made)-1]), rec.fault)
			if err != nil {
				t.Fatal(err)
			}
			mustClose(t, r)
			named := slices.Index(rec.ops, "link index.sqlite3")
			for _, dir := range made {
				dir = filepath.Join(top, dir)
				at, synced := slices.Index(rec.ops, "mkdir "+dir), false // at is −1 if dir existed
				for i := at + 1; i < named; i++ {
					synced = synced || rec.ops[i] == "open "+filepath.Dir(dir) && rec.ops[i+1] == "fsyncdir ."
				}
				if !synced || (at >= 0) != (name == "made") {
					t.Errorf("%s: made at %d, its entry synced before %d: %v\n%s", dir, at, named, synced, strings.Join(rec.ops, "\n"))
				}
			}
			for _, dir := range []string{"blobs", "tmp"} {
				if made := slices.Index(rec.ops, "mkdir "+dir); made < 0 || rec.last("fsyncdir .", named) < made {
					t.Errorf("%s: made at %d, its entry not synced before %d", dir, made, named)
				}
			}
			if !slices.Contains(rec.ops[named:], "fsyncdir .") {
				t.Error("the name of the index isn't synced")
			}
		})
	}
}
