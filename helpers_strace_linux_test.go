// The syncs of a process as strace sees them.

package ocilocal_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// syncCall is a line of strace: a sync of a file, with the path that its descriptor has.
var syncCall = regexp.MustCompile(`f(?:data)?sync\(\d+<([^>]*)>`)

// TestRealSyncs sees with strace which files a process syncs. The seam of other tests sees only that
// a sync was asked for. Files come first, then the directory that names them, then SQLite's journal.
func TestRealSyncs(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed: nobody sees from outside what is synced")
	}
	for i := range flows {
		f := &flows[i]
		want := map[string]struct{ tmp, blobs int }{
			"publish new":           {3, 0}, // two layers and the manifest
			"publish dedup":         {1, 0}, // the manifest; the layers and the config have rows
			"publish without links": {2, 0},
			"put":                   {2, 0}, // the new layer and the manifest; the layer and the config have rows
			"first open":            {5, 0}, // the id, which is made beside tmp/, the index, a layer, the config, the manifest
		}[f.name]
		if want.tmp == 0 {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			root := f.prepare(t)
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			trace := filepath.Join(t.TempDir(), "trace")
			w := startCommand(t, "step", exec.Command(strace, "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", trace, exe, root, strconv.Itoa(i)))
			for w.out.Scan() {
			}
			if end := w.end(); !w.cmd.ProcessState.Success() {
				t.Skipf("strace can't trace here: %s", end)
			}
			b, err := os.ReadFile(trace)
			if err != nil {
				t.Fatal(err)
			}
			tmp, blobs, lastFile, dir, journal := map[string]bool{}, map[string]bool{}, -1, -1, -1
			for n, m := range syncCall.FindAllStringSubmatch(string(b), -1) {
				name, err := filepath.Rel(root, m[1])
				switch parts := strings.Split(name, "/"); {
				case err != nil:
				case name == ".ocilocal-id":
					tmp[name], lastFile = true, n
				case len(parts) == 3 && parts[0] == "tmp" && !strings.HasSuffix(name, "-journal") && !strings.HasSuffix(name, "-wal"):
					tmp[name], lastFile = true, n
				case len(parts) == 3 && parts[0] == "blobs":
					blobs[name], lastFile = true, n
				case name == "blobs/sha256":
					dir = n
				case name == "index.sqlite3-wal":
					journal = max(journal, n)
				}
			}
			if len(tmp) != want.tmp || len(blobs) != want.blobs || lastFile > dir || dir > journal || dir < 0 {
				t.Errorf("%d new files and %d that were there are synced, want %d and %d; the last at %d, their directory at %d, the journal at %d\n%s",
					len(tmp), len(blobs), want.tmp, want.blobs, lastFile, dir, journal, b)
			}
		})
	}
}
