package ocilocal_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// ranks say which file may use which: only names of files with the same or a
// lower rank. A file must have one here.
var ranks = map[string]int{
	"doc.go": 0, "errors.go": 0, "digest.go": 0, "json.go": 0, "manifest.go": 0, "canonical.go": 0, "reference.go": 0,
	"root.go": 0, "fs_unix.go": 0, "fs_windows.go": 0, "fs_linux.go": 0, "fs_notlinux.go": 0, "writeback_linux.go": 0, "writeback_other.go": 0,
	"blob.go": 1, "stage.go": 1, "sqlite.go": 1, "index.go": 1, "partial.go": 1, "tasks.go": 1,
	"remoteerror.go": 1, "challenge.go": 1, "remote.go": 1, "transport.go": 1, "auth.go": 1, "realm.go": 1, "credentials.go": 1, "remoteread.go": 1, "remotelist.go": 2, "remotewrite.go": 2,
	"registry.go": 2, "publish.go": 2, "read.go": 2, "artifact.go": 2, "builder.go": 2, "gcmark.go": 3, "gc.go": 3, "verify.go": 3,
	"import.go": 3, "archive.go": 4, "importoci.go": 4, "importlegacy.go": 5, "importommx.go": 6, "load.go": 6, "repair.go": 6, "repairremote.go": 6, "rebuild.go": 7, "export.go": 5, "exportlayout.go": 5, "upload.go": 2, "pull.go": 5, "push.go": 5,
	"lineage.go": 3, "convert.go": 3, "anonymous.go": 3, "stats.go": 3, "backup.go": 4, "fsview.go": 4,
}

// strangers may not use each other's names though their ranks would let them.
var strangers = map[string][]string{
	"blob.go":   {"sqlite.go", "index.go"},
	"stage.go":  {"sqlite.go", "index.go"},
	"sqlite.go": {"blob.go", "stage.go"},
	"index.go":  {"blob.go", "stage.go"},
}

// exceptions are uses against the ranks, each with its reason.
var exceptions = map[string]string{
	"index.go Ref": "a row of a listing is made in one place, without a copy",
}

// common are methods that types of the standard library have too, so that
// their name says nothing about whose is meant.
var common = []string{"Close", "Delete", "IsDir", "Load", "ModTime", "Mode", "Open", "ReadDir", "Remove", "Root", "Seek", "Stat", "Write"}

// owners say which files alone may import a package.
var owners = map[string][]string{
	"database/sql":           {"sqlite.go", "index.go"},
	"database/sql/driver":    {"sqlite.go"},
	"modernc.org/sqlite":     {"sqlite.go"},
	"modernc.org/sqlite/lib": {"sqlite.go"},
	"archive/tar":            {"archive.go", "export.go"},
	"compress/gzip":          {"archive.go", "export.go"},
	"net/http":               {"remote.go", "remoteerror.go", "transport.go", "auth.go", "realm.go", "remoteread.go", "remotelist.go", "remotewrite.go", "upload.go"},
	"os/exec":                {"credentials.go"},
	"unsafe":                 {},
}

func TestLayering(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	parsed := map[string]*ast.File{}
	declared := map[string]string{}  // top-level name → file
	methods := map[string][]string{} // method name → files that declare one
	fields := map[string]bool{}      // names of struct fields, which a selector may mean as well
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if _, ok := ranks[name]; !ok {
			t.Errorf("%s has no rank: give it one in layering_test.go", name)
		}
		f, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		parsed[name] = f
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil {
					declared[d.Name.Name] = name
				} else {
					methods[d.Name.Name] = append(methods[d.Name.Name], name)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						declared[s.Name.Name] = name
					case *ast.ValueSpec:
						for _, n := range s.Names {
							declared[n.Name] = name
						}
					}
				}
			}
		}
	}
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			if s, ok := n.(*ast.StructType); ok {
				for _, field := range s.Fields.List {
					for _, id := range field.Names {
						fields[id.Name] = true
					}
				}
			}
			return true
		})
	}
	above := func(name, from string) bool {
		return ranks[from] > ranks[name] || slices.Contains(strangers[name], from)
	}
	for name := range ranks {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("%s has a rank and is not there", name)
		}
	}
	for name, f := range parsed {
		for _, imp := range f.Imports {
			path, _ := strconv.Unquote(imp.Path.Value)
			if allowed, ok := owners[path]; ok && !slices.Contains(allowed, name) {
				t.Errorf("%s imports %s, which is for %v alone", name, path, allowed)
			}
		}
		for _, id := range f.Unresolved { // what the file itself doesn't declare
			from := declared[id.Name]
			if from == "" || exceptions[name+" "+id.Name] != "" {
				continue
			}
			if above(name, from) {
				t.Errorf("%s uses %s of %s, which stands above it", fset.Position(id.Pos()), id.Name, from)
			}
		}
		// Methods go by name, without types: a use counts only when every
		// method of that name stands above.
		ast.Inspect(f, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok || fields[s.Sel.Name] || slices.Contains(common, s.Sel.Name) || exceptions[name+" "+s.Sel.Name] != "" {
				return true
			}
			from := methods[s.Sel.Name]
			if len(from) > 0 && !slices.ContainsFunc(from, func(o string) bool { return !above(name, o) }) {
				t.Errorf("%s calls %s of %v, which stands above it", fset.Position(s.Pos()), s.Sel.Name, from)
			}
			return true
		})
	}
}
