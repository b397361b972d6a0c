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

// ranks say which file may use which: only names of files with the same or a
// lower rank. A file must have one here.
var ranks = map[string]int{
	"doc.go": 0, "errors.go": 0, "digest.go": 0, "json.go": 0, "manifest.go": 0, "canonical.go": 0, "reference.go": 0,
	"root.go": 0, "fs_unix.go": 0, "fs_windows.go": 0, "fs_linux.go": 0, "fs_notlinux.go": 0, "writeback_linux.go": 0, "writeback_other.go": 0,
	"blob.go": 1, "stage.go": 1, "sqlite.go": 1, "index.go": 1, "indexgc.go": 1, "indexverify.go": 1, "indexstats.go": 1, "indexommx.go": 1, "indexbackup.go": 1, "partial.go": 1, "tasks.go": 1,
	"remoteerror.go": 1, "challenge.go": 1, "remote.go": 1, "transport.go": 1, "auth.go": 1, "realm.go": 1, "credentials.go": 1, "remoteread.go": 1, "remotelist.go": 2, "remotewrite.go": 2,
	"registry.go": 2, "publish.go": 2, "read.go": 2, "artifact.go": 2, "builder.go": 2, "gcmark.go": 3, "gc.go": 3, "verify.go": 3,
	"import.go": 3, "layout.go": 4, "archive.go": 4, "importoci.go": 4, "importlegacy.go": 5, "importommx.go": 6, "load.go": 6, "repair.go": 6, "repairremote.go": 6, "rebuild.go": 7, "export.go": 5, "exportlayout.go": 5, "upload.go": 2, "pull.go": 5, "push.go": 5,
	"lineage.go": 3, "convert.go": 3, "anonymous.go": 3, "stats.go": 3, "backup.go": 4, "fsview.go": 4,
}

// indexFiles have all SQL.
var indexFiles = []string{"index.go", "indexgc.go", "indexverify.go", "indexstats.go", "indexommx.go", "indexbackup.go"}

// strangers may not use each other's names though their ranks would let them.
var strangers = map[string][]string{
	"blob.go":        append([]string{"sqlite.go"}, indexFiles...),
	"stage.go":       append([]string{"sqlite.go"}, indexFiles...),
	"sqlite.go":      {"blob.go", "stage.go"},
	"index.go":       {"blob.go", "stage.go"},
	"indexgc.go":     {"blob.go", "stage.go"},
	"indexverify.go": {"blob.go", "stage.go"},
	"indexstats.go":  {"blob.go", "stage.go"},
	"indexommx.go":   {"blob.go", "stage.go"},
	"indexbackup.go": {"blob.go", "stage.go"},
}

// parts are the ways in and out. They don't know each other, and what they are built on doesn't know them.
var parts = map[string]string{
	"importoci.go": "oci", "importlegacy.go": "ommx", "importommx.go": "ommx", "archive.go": "archive", "export.go": "export", "exportlayout.go": "export",
	"remote.go": "remote", "remoteerror.go": "remote", "challenge.go": "remote", "transport.go": "remote", "auth.go": "remote", "realm.go": "remote", "credentials.go": "remote",
	"remoteread.go": "remote", "remotelist.go": "remote", "remotewrite.go": "remote", "upload.go": "remote", "pull.go": "remote", "push.go": "remote",
}

// below is the highest rank of what the parts are built on.
const below = 3

// exceptions are uses against these rules, each with its reason.
var exceptions = map[string]string{
	"index.go Ref":                     "a row of a listing is made in one place, without a copy",
	"index.go Reference":               "as Ref",
	"index.go Descriptor":              "as Ref",
	"index.go Updated":                 "as Ref",
	"registry.go Remote":               "a registry keeps the client that it was given, or its own",
	"registry.go CloseIdleConnections": "as Remote",
}

// owners say which files alone may import a package.
var owners = map[string][]string{
	"database/sql":           append([]string{"sqlite.go"}, indexFiles...),
	"database/sql/driver":    {"sqlite.go"},
	"modernc.org/sqlite":     {"sqlite.go"},
	"modernc.org/sqlite/lib": {"sqlite.go"},
	"archive/tar":            {"archive.go", "export.go"},
	"compress/gzip":          {"archive.go", "export.go"},
	"net/http":               {"remote.go", "remoteerror.go", "transport.go", "auth.go", "realm.go", "remoteread.go", "remotelist.go", "remotewrite.go", "upload.go"},
	"net":                    {"remote.go", "remoteerror.go", "realm.go"},
	"os/exec":                {"credentials.go"},
	"os": {"root.go", "fs_unix.go", "fs_windows.go", "fs_linux.go", "fs_notlinux.go", "writeback_linux.go", "writeback_other.go",
		"blob.go", "stage.go", "partial.go", "registry.go", "publish.go", "read.go", "rebuild.go", "backup.go", "repair.go",
		"credentials.go", "layout.go", "load.go", "importlegacy.go", "export.go", "builder.go", "archive.go"},
	"unsafe": {},
}

// TestLayering resolves every name in the package by its type. Files for other systems are looked at for their imports only.
func TestLayering(t *testing.T) {
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
		if _, ok := ranks[name]; !ok {
			t.Errorf("%s has no rank: give it one in layering_test.go", name)
		}
		f, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range f.Imports {
			path, _ := strconv.Unquote(imp.Path.Value)
			if allowed, ok := owners[path]; ok && !slices.Contains(allowed, name) {
				t.Errorf("%s imports %s, which is for %v alone", name, path, allowed)
			}
		}
		if here, err := gobuild.Default.MatchFile(".", name); err != nil {
			t.Fatal(err)
		} else if here {
			files = append(files, f)
		}
	}
	for name := range ranks {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("%s has a rank and is not there", name)
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
		if o.Pkg().Path() == "database/sql" && strings.HasPrefix(o.Name(), "Open") && at.Filename != "sqlite.go" {
			t.Errorf("%s opens a database, which is for sqlite.go alone", at)
		}
		name, from := at.Filename, fset.Position(o.Pos()).Filename
		if o.Pkg() != pkg || name == from {
			continue
		}
		problem := ""
		switch {
		case ranks[from] > ranks[name]:
			problem = "stands above it"
		case slices.Contains(strangers[name], from):
			problem = "it may not know"
		case parts[from] != "" && parts[from] != parts[name] && (parts[name] != "" || ranks[name] <= below):
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
