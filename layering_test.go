package ocilocal_test

import (
	"go/ast"
	gobuild "go/build"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A family is the files whose names begin with one word. CONTRIBUTING.md has the map.
type family struct {
	rank int
	// part names the way in or out to which the family belongs. The ways do not know each
	// other, and the families on which they are built do not know them.
	part string
}

// families gives each family its rank: a file may use only names from files of the same rank or a
// lower one. The longest matching prefix decides.
var families = map[string]family{
	"doc": {0, ""}, "errors": {0, ""}, "digest": {0, ""}, "reference": {0, ""}, "json": {0, ""}, "manifest": {0, ""}, "ommx": {0, ""}, "progress": {0, ""}, "tasks": {0, ""}, "root": {0, ""},
	"blob": {1, ""}, "index": {1, ""},
	"registry": {2, ""}, "publish": {2, ""}, "ref": {2, ""}, "artifact": {2, ""}, "builder": {2, ""},
	"graph": {2, ""}, "gc": {3, ""}, "repository": {3, ""}, "verify": {3, ""}, "stats": {3, ""}, "lineage": {3, ""}, "convert": {3, ""}, "backup": {4, ""},
	"import": {4, ""}, "importoci": {4, "oci"}, "archive": {4, "archive"}, "importlegacy": {5, "ommx"}, "importommx": {6, "ommx"},
	"export": {5, "export"}, "importload": {6, ""},
	"remote": {2, "remote"}, "pull": {5, "remote"}, "push": {5, "remote"},
	"repair": {7, ""}, "serve": {6, ""},
}

// lowestPart is the highest rank on which the ways in and out are built.
const lowestPart = 3

// familyOf returns the family of a file, by the longest matching prefix of its name.
func familyOf(file string) (f family, ok bool) {
	longest := ""
	for prefix := range families {
		if strings.HasPrefix(file, prefix) && len(prefix) > len(longest) {
			longest = prefix
		}
	}
	f, ok = families[longest]
	return f, ok
}

// strangers are families that may not use each other's names, although their ranks would allow it.
var strangers = map[string]string{"blob": "index", "index": "blob"}

func areStrangers(a, b string) bool {
	for one, other := range strangers {
		if strings.HasPrefix(a, one) && strings.HasPrefix(b, other) {
			return true
		}
	}
	return false
}

// exceptions are uses against these rules, each with its reason.
var exceptions = map[string]string{
	"indexrefs.go Ref":                      "a row of a listing is made in one place, without a copy",
	"indexrefs.go Reference":                "as Ref",
	"indexrefs.go Descriptor":               "as Ref",
	"indexrefs.go Updated":                  "as Ref",
	"registry.go Remote":                    "a registry keeps the client that it was given, or its own",
	"registrycalls.go CloseIdleConnections": "as Remote",
}

// owners say which files alone may import a package, by prefixes of their names.
var owners = map[string][]string{
	"database/sql":           {"index"},
	"database/sql/driver":    {"index"},
	"modernc.org/sqlite":     {"index"},
	"modernc.org/sqlite/lib": {"index"},
	"archive/tar":            {"archive", "export"},
	"compress/gzip":          {"archive", "export"},
	"net/http":               {"remote", "serve"},
	"net":                    {"remote"},
	"os/exec":                {"remotecredential"},
	"os": {"root", "blob", "registry", "publish", "ref", "repair", "backup", "remotecredential",
		"import", "export", "builder", "archive", "serve"},
	"unsafe": {"rootshortcut"},
}

// TestLayering resolves every name in the package by its type. Files for other systems are looked at for their imports only.
func TestLayering(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if _, ok := familyOf(name); !ok {
			t.Errorf("%s belongs to no family of layering_test.go", name)
		}
		f, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range f.Imports {
			path, _ := strconv.Unquote(imp.Path.Value)
			if allowed, ok := owners[path]; ok && !slices.ContainsFunc(allowed, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
				t.Errorf("%s imports %s, which is for %v alone", name, path, allowed)
			}
		}
		if here, err := gobuild.Default.MatchFile(".", name); err != nil {
			t.Fatal(err)
		} else if here {
			files = append(files, f)
		}
	}
	list, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	compiled := map[string]string{} // import path → file of what it exports
	for line := range strings.Lines(string(list)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		compiled[path] = file
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(compiled[path]) })}
	pkg, err := config.Check("ocilocal", fset, files, info)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for id, o := range info.Uses {
		if o.Pkg() == nil {
			continue
		}
		at := fset.Position(id.Pos())
		if o.Pkg().Path() == "database/sql" && strings.HasPrefix(o.Name(), "Open") && at.Filename != "indexdb.go" {
			t.Errorf("%s opens a database, which is for indexdb.go alone", at)
		}
		name, from := at.Filename, fset.Position(o.Pos()).Filename
		if o.Pkg() == pkg && strings.HasPrefix(from, "index") && strings.HasPrefix(o.Name(), "sql") && !strings.HasPrefix(name, "index") {
			t.Errorf("%s uses the statement %s, which is for the family index alone", at, o.Name())
		}
		if o.Pkg() != pkg || name == from {
			continue
		}
		user, _ := familyOf(name)
		owner, _ := familyOf(from)
		problem := ""
		switch {
		case owner.rank > user.rank:
			problem = "stands above it"
		case areStrangers(name, from):
			problem = "it may not know"
		case owner.part != "" && owner.part != user.part && (user.part != "" || user.rank <= lowestPart):
			problem = "is a way in or out that it may not know"
		default:
			continue
		}
		if key := name + " " + o.Name(); exceptions[key] != "" {
			used[key] = true
		} else {
			t.Errorf("%s uses %s of %s, which %s", at, o.Name(), from, problem)
		}
	}
	for key := range exceptions {
		if !used[key] {
			t.Errorf("the exception %q is not needed", key)
		}
	}
}
