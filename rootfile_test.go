package ocilocal_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// TestModesUmask opens and publishes under two umasks, each in another process. The permissions of
// root, index and blobs do not depend on the umask.
func TestModesUmask(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no such permissions")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, umask := range []string{"077", "0"} {
		root := filepath.Join(t.TempDir(), "root")
		w := startCommand(t, "open", exec.Command("sh", "-c", `umask "$0"; exec "$@"`, umask, exe, "x"))
		w.expect("ready")
		w.send(root)
		w.expect("opened")
		w.finish()
		for name, want := range map[string]fs.FileMode{".": 0o700, "index.sqlite3": 0o600, "blobs/sha256/*": 0o444} {
			files, err := filepath.Glob(filepath.Join(root, name))
			if err != nil || len(files) == 0 {
				t.Fatal(name, files, err)
			}
			for _, f := range files {
				if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != want {
					t.Errorf("umask %s: %s: mode %v, %v, want %v", umask, f, fi.Mode(), err, want)
				}
			}
		}
	}
}
