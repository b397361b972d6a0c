package ocilocal_test

import (
	"go/ast"
	"go/doc"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// documentation parses the package's files, without tests.
func documentation(t *testing.T) *doc.Package {
	t.Helper()
	names, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, e := range names {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, e.Name(), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	pkg, err := doc.NewFromFiles(fset, files, "github.com/ocilocal/ocilocal")
	if err != nil {
		t.Fatal(err)
	}
	return pkg
}

// TestErrorsDocumented: the comment of every exported function that returns an error says which
// errors, or refers to another function.
func TestErrorsDocumented(t *testing.T) {
	pkg := documentation(t)
	funcs := pkg.Funcs
	for _, typ := range pkg.Types {
		funcs = append(append(funcs, typ.Funcs...), typ.Methods...)
	}
	n := 0
	says := regexp.MustCompile(`(?i)errors?\b|Err[A-Z]|^\w+ (is|implements) `) // "AddLayerFile is AddLayer for …"
	for _, f := range funcs {
		if strings.HasPrefix(f.Name, "Unwrap") || f.Decl.Type.Results == nil {
			continue
		}
		returns := false
		ast.Inspect(f.Decl.Type.Results, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			returns = returns || ok && id.Name == "error"
			return true
		})
		if !returns {
			continue
		}
		if n++; !says.MatchString(f.Doc) {
			t.Errorf("%s.%s says nothing of its errors:\n%s", f.Recv, f.Name, f.Doc)
		}
	}
	if n < 50 {
		t.Fatalf("only %d functions were looked at", n)
	}
}

// TestDocLinks: every name in brackets in a doc comment exists.
func TestDocLinks(t *testing.T) {
	pkg := documentation(t)
	p := pkg.Parser()
	unresolved := regexp.MustCompile(`\[\*?[A-Z][A-Za-z]*(\.[A-Za-z]+)?\]`)
	look := func(where, text string) {
		for _, block := range p.Parse(text).Content {
			if _, ok := block.(*comment.Code); ok {
				continue
			}
			plain := pkg.Printer().Text(&comment.Doc{Content: []comment.Block{block}})
			if found := unresolved.Find(plain); found != nil {
				t.Errorf("%s links to %s, which isn't there", where, found)
			}
		}
	}
	look("the package comment", pkg.Doc)
	for _, v := range append(pkg.Consts, pkg.Vars...) {
		look(strings.Join(v.Names, ", "), v.Doc)
	}
	for _, f := range pkg.Funcs {
		look(f.Name, f.Doc)
	}
	for _, typ := range pkg.Types {
		look(typ.Name, typ.Doc)
		for _, f := range append(typ.Funcs, typ.Methods...) {
			look(typ.Name+"."+f.Name, f.Doc)
		}
	}
}

// The README's program is the one that Example runs, and its table names what there is.
func TestReadme(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	readme := read("README.md")
	_, program, _ := strings.Cut(readme, "```go\n")
	program, _, ok := strings.Cut(program, "```")
	if !ok || program == "" {
		t.Fatal("README.md has no program")
	}
	if example := strings.ReplaceAll(read("example_program_test.go"), "\n\t", "\n"); !strings.Contains(example, program) {
		t.Error("the README's program isn't in example_program_test.go")
	}

	pkg := documentation(t)
	have := map[string]bool{}
	for _, v := range append(pkg.Consts, pkg.Vars...) {
		for _, name := range v.Names {
			have[name] = true
		}
	}
	for _, f := range pkg.Funcs {
		have[f.Name] = true
	}
	for _, typ := range pkg.Types {
		have[typ.Name] = true
		for _, v := range append(typ.Consts, typ.Vars...) {
			for _, name := range v.Names {
				have[name] = true
			}
		}
		for _, f := range append(typ.Funcs, typ.Methods...) {
			have[f.Name] = true
		}
		ast.Inspect(typ.Decl, func(n ast.Node) bool {
			if field, ok := n.(*ast.Field); ok {
				for _, id := range field.Names {
					have[id.Name] = true
				}
			}
			return true
		})
	}
	_, table, _ := strings.Cut(readme, "## Tasks")
	table, _, _ = strings.Cut(table, "\n##")
	for _, code := range regexp.MustCompile("`[^`]*`").FindAllString(table, -1) {
		if strings.Contains(code, `"`) || strings.Contains(code, "fs.") {
			continue
		}
		for _, name := range regexp.MustCompile(`\b[A-Z][A-Za-z]+`).FindAllString(code, -1) {
			if !have[name] {
				t.Errorf("README.md's table names %s, which isn't there", name)
			}
		}
	}
}

// TestMap compares CONTRIBUTING.md with the package: each source file has one room in the map, and
// each function that the map names is in the file that it names.
func TestMap(t *testing.T) {
	b, err := os.ReadFile("CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "| family |")
	text, _, _ = strings.Cut(text, "\n## Commands")
	rooms, rest, _ := strings.Cut(text, "\n\n")
	places, suites, _ := strings.Cut(rest, "| test file |")
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]string{} // file → patterns of the rooms
	for _, p := range quoted(rooms) {
		if !strings.HasSuffix(p, ".go") {
			continue
		}
		for _, name := range names {
			ok, _ := filepath.Match(p, name)
			if other := strings.HasPrefix(name, "reference") && p == "ref*.go"; ok && !other {
				found[name] = append(found[name], p)
			}
		}
	}
	for _, name := range names {
		if !strings.HasSuffix(name, "_test.go") && len(found[name]) != 1 {
			t.Errorf("%s is in %d rooms of the map: %q", name, len(found[name]), found[name])
		}
	}
	for _, p := range quoted(suites) {
		if matches, _ := filepath.Glob(p); len(matches) == 0 {
			t.Errorf("the map has the tests %s, which are not there", p)
		}
	}
	n := 0
	for line := range strings.Lines(places) {
		file := ""
		for _, word := range quoted(line) {
			if strings.HasSuffix(word, ".go") {
				file = word
				continue
			}
			if file == "" {
				continue
			}
			n++
			src, err := os.ReadFile(file)
			if defined := regexp.MustCompile(`(?m)^(func (\(.*\) )?|type |var |const |\t)` + word + `\b`); err != nil || !defined.Match(src) {
				t.Errorf("the map has %s in %s: %v", word, file, err)
			}
		}
	}
	if n < 10 {
		t.Errorf("only %d places were found in the map", n)
	}
}

// quoted returns what text has between backticks.
func quoted(text string) (words []string) {
	for i, word := range strings.Split(text, "`") {
		if i%2 == 1 {
			words = append(words, word)
		}
	}
	return words
}
