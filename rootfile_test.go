package ocilocal_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/ocilocal/ocilocal"
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

// TestBlobLinkedInside replaces a blob by a link to a copy of its bytes below the root. The link is
// damage, though the bytes are right: whoever made the copy may delete it. A publish replaces it.
func TestBlobLinkedInside(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no open without links")
	}
	r := openTemp(t, nil)
	a, err := build(t, r, "x:v1", nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	m, err := a.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	layer := m.Layers()[0]
	blob := blobFile(r, layer.Digest)
	if err := errors.Join(os.Rename(blob, filepath.Join(r.Root(), "copy")), os.Symlink("../../copy", blob)); err != nil {
		t.Fatal(err)
	}
	if f, err := r.OpenBlob(t.Context(), layer); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Errorf("the link is opened: %v, %v", f, err)
	}
	if f, err := r.OpenBlobFile(t.Context(), layer); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Errorf("the link is opened as a file: %v, %v", f, err)
	}
	if _, err := build(t, r, "x:v2", nil, "layer"); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(blob); err != nil || !fi.Mode().IsRegular() {
		t.Errorf("after a publish the blob is %v, %v", fi.Mode(), err)
	}
}
