// Package interop runs real tools and real registries against ocilocal: what
// they write must come in unchanged, and what ocilocal writes they must accept.
// The script setup beside it installs them.
package interop

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ocilocal/ocilocal"
)

var require = flag.Bool("require", false, "fail where a tool is missing, instead of skipping")

// skipped has the tools that were missed, for the end of the run.
var skipped = struct {
	sync.Mutex
	names map[string]bool
}{names: map[string]bool{}}

func TestMain(m *testing.M) {
	code := m.Run()
	if len(skipped.names) > 0 {
		fmt.Println("SKIPPED, not installed:", strings.Join(slices.Sorted(maps.Keys(skipped.names)), ", "))
	}
	os.Exit(code)
}

// home is where setup puts what isn't Debian's.
func home() string {
	if dir := os.Getenv("OCILOCAL_INTEROP"); dir != "" {
		return dir
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(cache, "ocilocal-interop")
}

// tool returns the path of a program, or skips the test.
func tool(t *testing.T, name string) string {
	t.Helper()
	for _, path := range []string{filepath.Join(home(), "bin", name), filepath.Join(home(), name, "bin", "python")} {
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() {
			return path
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		skipped.Lock()
		skipped.names[name] = true
		skipped.Unlock()
		if *require {
			t.Fatalf("%s is not installed (run ./setup)", name)
		}
		t.Skipf("SKIPPED: %s is not installed (run ./setup)", name)
	}
	return path
}

// run runs a command and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", filepath.Base(name), args, err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func open(t *testing.T, opts *ocilocal.Options) *ocilocal.LocalRegistry {
	t.Helper()
	r, err := ocilocal.Open(t.Context(), filepath.Join(t.TempDir(), "registry"), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func ref(s string) ocilocal.Reference { return ocilocal.MustParseReference(s) }

// built publishes an artifact in the form that all tools know.
func built(t *testing.T, r *ocilocal.LocalRegistry, name string, layers ...string) *ocilocal.LocalArtifact {
	t.Helper()
	b, err := r.NewBuilder(ref(name), &ocilocal.BuilderOptions{
		ArtifactType: "application/vnd.example.test", Format: ocilocal.FormatImageManifest})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	for i, l := range layers {
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte(l), map[string]string{"org.opencontainers.image.title": fmt.Sprintf("file%d.txt", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.SetAnnotation("org.example.note", "<&> \u2028 é"); err != nil {
		t.Fatal(err)
	}
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// digestIn returns the digest of the one entry of a layout's index.json.
func digestIn(t *testing.T, layout string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Manifests []struct{ Digest string } }
	if err := json.Unmarshal(b, &doc); err != nil || len(doc.Manifests) != 1 {
		t.Fatalf("%v: %s", err, b)
	}
	return doc.Manifests[0].Digest
}
