package ocilocal_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestEntryFactsOfRef: the facts belong to the content of a ref. A ref that moves loses them. A ref
// without facts takes those of an import of the same content.
func TestEntryFactsOfRef(t *testing.T) {
	from, r := openTemp(t, nil), openTemp(t, nil)
	a := published(t, from, "example.com/a:v1", "one", nil)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := from.ExportLayout(t.Context(), plain, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	annotated := func(value string) string {
		dir := filepath.Join(t.TempDir(), value)
		if err := os.CopyFS(dir, os.DirFS(plain)); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, "index.json")
		index, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(t, name, string(bytes.Replace(index, []byte(`"annotations":{`), fmt.Appendf(nil, `"annotations":{"k":%q,`, value), 1)))
		return dir
	}
	check := func(when, want string) {
		t.Helper()
		if _, _, _, d, _, err := ocilocal.RefDetails(r, a.Reference()); err != nil || d != want {
			t.Errorf("%s: %q, %v, want %q", when, d, err, want)
		}
	}
	load := func(dir string, policy ocilocal.Policy) {
		t.Helper()
		if _, err := r.ImportLayout(t.Context(), dir, &ocilocal.ImportOptions{PublishOptions: ocilocal.PublishOptions{Policy: policy}}); err != nil {
			t.Fatal(err)
		}
	}
	load(plain, ocilocal.KeepExisting)
	check("without facts", "")
	load(annotated("first"), ocilocal.KeepExisting)
	check("the same content with facts", `{"annotations":{"k":"first"}}`)
	load(annotated("second"), ocilocal.KeepExisting)
	load(plain, ocilocal.Replace)
	check("other facts, kept", `{"annotations":{"k":"first"}}`)
	load(annotated("second"), ocilocal.Replace)
	check("other facts, replaced", `{"annotations":{"k":"second"}}`)
	if _, err := build(t, r, "example.com/a:v1", &ocilocal.BuilderOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}, "other"); err != nil {
		t.Fatal(err)
	}
	check("other content", "")
}
