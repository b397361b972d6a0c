package ocilocal_test

import (
	"crypto/rand"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestRebuildForeignTmp: Rebuild accepts a directory without an id if it has blobs. It refuses one
// whose tmp/ has anything that a registry does not make.
func TestRebuildForeignTmp(t *testing.T) {
	session := rand.Text()
	for _, c := range []struct {
		plant
		ok bool
	}{
		{planted("nothing"), true},
		{planted("empty", "tmp/"), true},
		{planted("marked", "tmp/"+session+"/"+rand.Text(), "tmp/partial/"+strings.Replace(digest.FromString("x").String(), ":", "-", 1)+"/data", "tmp/quarantine/"), true},
		{planted("file", "tmp/thesis.tex"), false},
		{planted("directory", "tmp/work/"), false},
		{planted("file in a session", "tmp/"+session+"/thesis.tex"), false},
		{planted("file in quarantine", "tmp/quarantine/thesis.tex"), false},
		{link("tmp"), false},
		{link("tmp/" + session), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			r := mustOpen(t, dir)
			if _, err := build(t, r, "example.com/a:v1", nil, "layer"); err != nil {
				t.Fatal(err)
			}
			mustClose(t, r)
			for _, name := range []string{"index.sqlite3", "id", "tmp"} {
				if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
			c.make(t, dir)
			before := listTree(t, dir)
			dontWatch(dir)
			report, err := ocilocal.Rebuild(t.Context(), dir, nil)
			if c.ok {
				if err != nil || len(report.Recovered) != 1 {
					t.Errorf("%+v, %v", report, err)
				}
				return
			}
			if !errors.Is(err, ocilocal.ErrForeignRoot) {
				t.Errorf("%+v, %v", report, err)
			}
			if after := listTree(t, dir); !maps.Equal(before, after) {
				t.Errorf("before %q\nafter  %q", before, after)
			}
		})
	}
}
