package ocilocal_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestLayoutSwapped replaces each file of a layout after it was checked and before it is opened, as
// another program can. The import must notice that.
func TestLayoutSwapped(t *testing.T) {
	manifest, config := image("layer")
	entries := []entry{layoutVersion, layoutIndex(manifest, "example.com/a:v1"), blobEntry(manifest), blobEntry(config), blobEntry("layer")}
	for _, e := range entries {
		t.Run(filepath.Base(e.name), func(t *testing.T) {
			dir := layoutDir(t, entries...)
			r := openTemp(t, nil)
			looked, swapped := false, false
			ocilocal.SetFault(r, func(op, name string) error {
				if name != e.name {
					return nil
				}
				if op == "open" && looked { // not the store, which opens without a stat
					other := filepath.Join(dir, "other")
					swapped = true
					return errors.Join(os.WriteFile(other, []byte(e.body), 0o600), os.Rename(other, filepath.Join(dir, filepath.FromSlash(name))))
				}
				looked = op == "stat"
				return nil
			})
			defer ocilocal.SetFault(r, nil)
			_, err := r.ImportLayout(t.Context(), dir, nil)
			if !swapped || !errors.Is(err, ocilocal.ErrInvalidLayout) {
				t.Errorf("swapped: %v; %v, want ErrInvalidLayout", swapped, err)
			}
			checkNothingVisible(t, r)
		})
	}
}

// TestLayoutIndexBounded: an index.json of 256 MiB is refused without reading all of it.
func TestLayoutIndexBounded(t *testing.T) {
	dir := layoutDir(t, layoutVersion, entry{name: "index.json"})
	if err := os.Truncate(filepath.Join(dir, "index.json"), 256<<20); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := ocilocal.InspectLayout(t.Context(), dir)
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ocilocal.ErrTooLarge) || got > 128<<20 {
		t.Errorf("%v, with %d MiB allocated", err, got>>20)
	}
}

// TestHostileLayouts imports layouts that are malformed or unsafe: links, files for directories,
// wrong sizes and digests. Each fails with its error, and nothing becomes visible.
func TestHostileLayouts(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	m, c, l, idx := blobEntry(manifest), blobEntry(config), blobEntry("layer"), layoutIndex(manifest, "example.com/a:v1")
	with := func(name, body string) entry { return entry{name: name, body: body} }
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("layer"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		dir  string
		want error
	}{
		"no oci-layout":              {layoutDir(t, m, c, l, idx), nil},
		"oci-layout 2.0.0":           {layoutDir(t, m, c, l, idx, with("oci-layout", `{"imageLayoutVersion":"2.0.0"}`)), ocilocal.ErrInvalidLayout},
		"oci-layout in other case":   {layoutDir(t, m, c, l, idx, with("oci-layout", `{"IMAGELAYOUTVERSION":"1.0.0"}`)), ocilocal.ErrInvalidLayout},
		"oci-layout of two versions": {layoutDir(t, m, c, l, idx, with("oci-layout", `{"imageLayoutVersion":"2.0.0","imageLayoutVersion":"1.0.0"}`)), ocilocal.ErrInvalidLayout},
		"oci-layout not JSON":        {layoutDir(t, m, c, l, idx, with("oci-layout", "1.0.0")), ocilocal.ErrInvalidLayout},
		"oci-layout a directory":     {layoutDir(t, m, c, l, idx, entry{name: "oci-layout", head: tar.Header{Typeflag: tar.TypeDir}}), ocilocal.ErrInvalidLayout},
		"oci-layout a link":          {layoutDir(t, m, c, l, idx, with("real", layoutVersion.body), symlink("oci-layout", "real")), ocilocal.ErrInvalidLayout},
		"no index.json":              {layoutDir(t, layoutVersion, m, c, l), ocilocal.ErrInvalidLayout},
		"index.json of 33 MiB":       {layoutDir(t, layoutVersion, m, c, l, with("index.json", strings.Repeat(" ", 33<<20))), ocilocal.ErrTooLarge},
		"index.json a link":          {layoutDir(t, layoutVersion, m, c, l, with("real", idx.body), symlink("index.json", "real")), ocilocal.ErrInvalidLayout},
		"index.json not JSON":        {layoutDir(t, layoutVersion, m, c, l, with("index.json", "{")), ocilocal.ErrInvalidLayout},
		"index.json twice manifests": {layoutDir(t, layoutVersion, m, c, l, with("index.json", `{"schemaVersion":2,"manifests":[],"manifests":[]}`)), ocilocal.ErrInvalidLayout},
		"blobs a file":               {layoutDir(t, layoutVersion, idx, with("blobs", "")), ocilocal.ErrInvalidLayout},
		"sha256 a file":              {layoutDir(t, layoutVersion, idx, with("blobs/sha256", "")), ocilocal.ErrInvalidLayout},
		"name of 10 MiB":             {layoutDir(t, layoutVersion, m, c, l, layoutIndex(manifest, strings.Repeat("x", 10<<20))), ocilocal.ErrBareName},
		"a file":                     {filepath.Join(outside, "secret"), syscall.ENOTDIR},
		"blobs a link":               {layoutDir(t, layoutVersion, idx, with("real/x", ""), symlink("blobs", "real")), ocilocal.ErrInvalidLayout},
		"sha256 a link outside":      {layoutDir(t, layoutVersion, idx, entry{name: "blobs/x"}, symlink("blobs/sha256", outside)), ocilocal.ErrInvalidLayout},
		"blob a link outside":        {layoutDir(t, layoutVersion, idx, m, c, symlink(l.name, filepath.Join(outside, "secret"))), ocilocal.ErrInvalidLayout},
		"blob a link inside":         {layoutDir(t, layoutVersion, idx, m, c, with("real", "layer"), symlink(l.name, "../../real")), ocilocal.ErrInvalidLayout},
		"blob a directory":           {layoutDir(t, layoutVersion, idx, m, c, entry{name: l.name, head: tar.Header{Typeflag: tar.TypeDir}}), ocilocal.ErrInvalidLayout},
		"layer missing":              {layoutDir(t, layoutVersion, idx, m, c), ocilocal.ErrIncomplete},
		"config missing":             {layoutDir(t, layoutVersion, idx, m, l), ocilocal.ErrIncomplete},
		"manifest missing":           {layoutDir(t, layoutVersion, idx, c, l), ocilocal.ErrIncomplete},
		"layer too short":            {layoutDir(t, layoutVersion, idx, m, c, with(l.name, "lay")), ocilocal.ErrSizeMismatch},
		"layer too long":             {layoutDir(t, layoutVersion, idx, m, c, with(l.name, "layer and more")), ocilocal.ErrSizeMismatch},
		"layer other bytes":          {layoutDir(t, layoutVersion, idx, m, c, with(l.name, "LAYER")), ocilocal.ErrDigestMismatch},
		"manifest other bytes":       {layoutDir(t, layoutVersion, idx, with(m.name, strings.Replace(manifest, "test", "tset", 1)), c, l), ocilocal.ErrDigestMismatch},
		"digest with ..":             {layoutDir(t, layoutVersion, with("index.json", strings.Replace(idx.body, digest.FromString(manifest).String(), "sha256:../../../../etc/passwd", 1)), m, c, l), ocilocal.ErrInvalidLayout},
		"digest unknown":             {layoutDir(t, layoutVersion, with("index.json", strings.Replace(idx.body, "sha256:", "md5:", 1)), m, c, l), ocilocal.ErrInvalidLayout},
		"not there":                  {filepath.Join(outside, "nothing"), fs.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			_, err := r.ImportLayout(t.Context(), tc.dir, nil)
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if tc.want == nil {
				return
			}
			checkNothingVisible(t, r)
		})
	}
}

// TestLayoutChangesMeanwhile makes a blob of the source shorter or longer while it is being copied,
// for both ways of copying.
func TestLayoutChangesMeanwhile(t *testing.T) {
	for _, size := range []int{1000, 8 << 20} {
		layer := strings.Repeat("layer", size/5)
		manifest, config := image(layer)
		for _, to := range []int64{int64(len(layer)) / 2, int64(len(layer)) + 1} {
			t.Run(fmt.Sprintf("%d to %d bytes", len(layer), to), func(t *testing.T) {
				dir := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry(layer), layoutIndex(manifest, "example.com/a:v1"))
				source := filepath.Join(dir, filepath.FromSlash(blobEntry(layer).name))
				r := openTemp(t, nil)
				other, _ := image("another layer") // so that the registry has the config
				if _, err := r.ImportLayout(t.Context(), layoutDir(t, layoutVersion, blobEntry(other), blobEntry(config),
					blobEntry("another layer"), layoutIndex(other, "example.com/other:v1")), nil); err != nil {
					t.Fatal(err)
				}
				if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/other:v1")); err != nil {
					t.Fatal(err)
				}
				var copies atomic.Int64
				ocilocal.SetFault(r, func(op, _ string) error {
					if op != "create" || copies.Add(1) != 2 { // the manifest comes before the layer
						return nil
					}
					return os.Truncate(source, to) // the import has opened it by now
				})
				_, err := r.ImportLayout(t.Context(), dir, nil)
				ocilocal.SetFault(r, nil)
				if !errors.Is(err, ocilocal.ErrSizeMismatch) {
					t.Errorf("%v, want ErrSizeMismatch", err)
				}
				checkNothingVisible(t, r)
			})
		}
	}
}
