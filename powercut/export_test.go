package powercut

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestExports cuts the power while artifacts are exported, one after the other, into one layout directory
// and into an archive each. What an export that returned has written must be there, whole, and
// what the layout's index.json or a file's name shows must be whole in any case.
func TestExports(t *testing.T) {
	m := boot(t)
	first := m.mark()
	ctx := t.Context()
	reg, err := ocilocal.Open(ctx, t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	w := &worker{ctx: ctx, reg: reg, rng: rand.New(rand.NewPCG(*seed, 0))}
	var layouts, archives = map[string]change{}, map[string]change{}
	for i := range 25 {
		name := fmt.Sprintf("example.com/export/a%d:v", i)
		ref, err := ocilocal.ParseReference(name)
		if err != nil {
			t.Fatal(err)
		}
		a, err := w.build(ref, fmt.Appendf(nil, "export %d ", i))
		if err != nil {
			t.Fatal(err)
		}
		begun := m.mark()
		if err := reg.ExportLayout(ctx, filepath.Join(m.dir, "layout"), []ocilocal.Reference{ref}, nil); err != nil {
			t.Fatal(err)
		}
		between := m.mark()
		if err := reg.ExportArchiveFile(ctx, filepath.Join(m.dir, archiveName(i)), []ocilocal.Reference{ref}, nil); err != nil {
			t.Fatal(err)
		}
		layouts[name] = change{begun, between, a.Digest()}
		archives[archiveName(i)] = change{between, m.mark(), a.Digest()}
	}
	m.eachCut(t, first, func(t *testing.T, dir string, moment int) {
		examineLayout(t, filepath.Join(dir, "layout"), layouts, moment)
		examineArchives(t, dir, archives, moment)
	})
}

func archiveName(i int) string { return fmt.Sprintf("a%d.tar", i) }

// examineLayout imports what the layout in dir names.
func examineLayout(t *testing.T, dir string, exports map[string]change, moment int) {
	imported := map[string]digest.Digest{}
	_, err := os.Stat(filepath.Join(dir, "index.json"))
	if err == nil {
		reg, openErr := ocilocal.Open(t.Context(), filepath.Join(t.TempDir(), "r"), nil)
		if openErr != nil {
			t.Fatal(openErr)
		}
		defer reg.Close()
		result, importErr := reg.ImportLayout(t.Context(), dir, nil)
		if importErr != nil {
			t.Errorf("the layout: %v", importErr)
			return
		}
		for _, a := range result.Artifacts {
			imported[a.Name] = a.Descriptor.Digest
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for name, c := range exports {
		c.check(t, "in the layout, "+name, imported[name], moment)
	}
}

// examineArchives imports each archive.
func examineArchives(t *testing.T, dir string, exports map[string]change, moment int) {
	reg, err := ocilocal.Open(t.Context(), filepath.Join(t.TempDir(), "r"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	for name, c := range exports {
		var got digest.Digest
		result, err := reg.ImportArchiveFile(t.Context(), filepath.Join(dir, name), nil)
		if err == nil {
			got = result.Artifacts[0].Descriptor.Digest
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
		c.check(t, name, got, moment)
	}
}

// check complains unless got, "" for nothing, may be what is there when the power is cut at a moment.
func (c change) check(t *testing.T, what string, got digest.Digest, moment int) {
	t.Helper()
	if may := (history{c}).at(moment); !slices.Contains(may, got) {
		t.Errorf("%s is %q, may be any of %q: it was written from %d to %d", what, got, may, c.begun, c.done)
	}
}
