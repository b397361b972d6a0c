package interop_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/ocilocal/ocilocal"
)

// A repository view is all that oras-go asks of a target, without importing it.
var (
	_ oras.GraphTarget             = (*ocilocal.Repository)(nil)
	_ content.GraphStorage         = (*ocilocal.Repository)(nil)
	_ content.Deleter              = (*ocilocal.Repository)(nil)
	_ content.Untagger             = (*ocilocal.Repository)(nil)
	_ registry.TagLister           = (*ocilocal.Repository)(nil)
	_ content.TagResolver          = (*ocilocal.Repository)(nil)
	_ oras.ReadOnlyGraphTarget     = (*ocilocal.Repository)(nil)
	_ content.PredecessorFinder    = (*ocilocal.Repository)(nil)
	_ content.ReadOnlyGraphStorage = (*ocilocal.Repository)(nil)
)

func view(t *testing.T, name string) *ocilocal.Repository {
	t.Helper()
	p, err := newRegistry(t).Repository(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// orasTargets are what oras copies from and to.
var orasTargets = map[string]func(t *testing.T) oras.GraphTarget{
	"view":   func(t *testing.T) oras.GraphTarget { return view(t, "localhost/org/app") },
	"memory": func(*testing.T) oras.GraphTarget { return memory.New() },
	"layout": func(t *testing.T) oras.GraphTarget {
		s, err := oci.New(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		return s
	},
	"olareg": func(t *testing.T) oras.GraphTarget {
		repo, err := remote.NewRepository(servers["olareg"](t).host + "/org/app")
		if err != nil {
			t.Fatal(err)
		}
		repo.PlainHTTP = true
		return repo
	},
}

// orasGraph makes an artifact, an image index over it, and two referrers, one of which refers to the
// other, and returns the root and the last referrer.
func orasGraph(t *testing.T, to oras.Target) (root, stamp ocispec.Descriptor) {
	t.Helper()
	ctx := t.Context()
	pack := func(text string, subject *ocispec.Descriptor) ocispec.Descriptor {
		layer, err := oras.PushBytes(ctx, to, "text/plain", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		d, err := oras.PackManifest(ctx, to, oras.PackManifestVersion1_1, artifactType, oras.PackManifestOptions{
			Subject: subject, Layers: []ocispec.Descriptor{layer},
			ManifestAnnotations: map[string]string{ocispec.AnnotationCreated: "2026-11-26T00:00:00Z"},
		})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	a := pack("one", nil)
	index := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"platform":{"architecture":"amd64","os":"linux"}}]}`,
		ocispec.MediaTypeImageIndex, a.MediaType, a.Digest, a.Size)
	root, err := oras.PushBytes(ctx, to, ocispec.MediaTypeImageIndex, []byte(index))
	if err != nil {
		t.Fatal(err)
	}
	signature := pack("signature", &root)
	return root, pack("stamp", &signature)
}

// TestORASCopy copies by every call of oras-go, from and to a view.
func TestORASCopy(t *testing.T) {
	for _, from := range []string{"view", "memory", "layout", "olareg"} {
		for _, to := range []string{"view", "memory", "layout", "olareg"} {
			if from != "view" && to != "view" {
				continue
			}
			t.Run(from+" to "+to, func(t *testing.T) {
				t.Parallel()
				ctx := t.Context()
				src := orasTargets[from](t)
				root, stamp := orasGraph(t, src)
				if err := src.Tag(ctx, root, "v1"); err != nil {
					t.Fatal(err)
				}
				has := func(dst oras.GraphTarget, tag string, referrers bool) {
					t.Helper()
					if tag != "" {
						if d, err := dst.Resolve(ctx, tag); err != nil || d.Digest != root.Digest {
							t.Errorf("%+v, %v", d, err)
						}
					}
					if err := oras.CopyGraph(ctx, dst, memory.New(), root, oras.CopyGraphOptions{}); err != nil {
						t.Error(err)
					}
					if ok, err := dst.Exists(ctx, stamp); ok != referrers || err != nil {
						t.Errorf("the referrer: %v, %v", ok, err)
					}
				}
				dst := orasTargets[to](t)
				for range 2 { // the second finds all of it there
					if d, err := oras.Copy(ctx, src, "v1", dst, "v2", oras.DefaultCopyOptions); err != nil || d.Digest != root.Digest {
						t.Fatalf("%+v, %v", d, err)
					}
					has(dst, "v2", false)
				}
				if _, err := oras.ExtendedCopy(ctx, src, "v1", dst, "v3", oras.DefaultExtendedCopyOptions); err != nil {
					t.Fatal(err)
				}
				has(dst, "v3", true)
				dst = orasTargets[to](t)
				if err := oras.CopyGraph(ctx, src, dst, root, oras.DefaultCopyGraphOptions); err != nil {
					t.Fatal(err)
				}
				has(dst, "", false)
				if from == "memory" { // it resolves tags only
					return
				}
				d, err := oras.Copy(ctx, src, root.Digest.String(), orasTargets[to](t), "", oras.DefaultCopyOptions)
				if err != nil || d.Digest != root.Digest {
					t.Errorf("by digest: %+v, %v", d, err)
				}
			})
		}
	}
}

// orasRefused are oras-go's own tests that a view fails, each with the promise that it contradicts.
var orasRefused = map[string]string{
	"Test_Pack_Artifact_NoOption":                  manifestFirst,
	"Test_Pack_Artifact_WithOptions":               manifestFirst,
	"Test_Pack_ImageV1_1_RC2":                      manifestFirst,
	"Test_Pack_ImageV1_1_RC2_WithOptions":          manifestFirst,
	"Test_PackManifest_ImageV1_0_WithOptions":      manifestFirst,
	"Test_PackManifest_ImageV1_0_InvalidMediaType": manifestFirst,
	"Test_PackManifest_ImageV1_1_WithOptions":      manifestFirst,
	"TestCopyGraph_WithOptions":                    manifestFirst,
	"TestFetch_Memory":                             taggedBlob,
	"TestFetchBytes_Memory":                        taggedBlob,
	"TestTagBytesN_Memory":                         taggedBlob,
	"TestTagBytes":                                 taggedBlob,
	"TestCopy_WithTargetPlatformOptions":           taggedBlob,
	"TestResolve_Memory":                           platformBack,
	"TestCopy_WithOptions":                         platformBack,
	"TestPushBytes_Memory":                         "it pushes equal bytes as two media types",
	"TestCopyGraph_CopyError":                      "a descriptor without a digest is an error of its own",
}

const (
	manifestFirst = "it pushes a manifest before its blobs, or without them"
	taggedBlob    = "it tags a blob"
	platformBack  = "it wants the platform of the descriptor that was tagged back"
)

// TestORASOwnTests runs the tests of oras-go's root package with views in the place of its stores in
// memory. Those that fail must be known, each with a reason.
func TestORASOwnTests(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds and tests another module")
	}
	dir := filepath.Join(t.TempDir(), "oras")
	source, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "oras.land/oras-go/v2").Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(strings.TrimSpace(string(source)))); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chmod(path, 0o755))
	}); err != nil {
		t.Fatal(err)
	}
	useViews(t, dir)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-vet=off", "-v", "-run", "Copy|Tag|Resolve|Fetch|Push|Pack", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	var failed []string
	for _, m := range regexp.MustCompile(`(?m)^--- FAIL: (\S+)`).FindAllSubmatch(out, -1) {
		failed = append(failed, string(m[1]))
	}
	passed := len(regexp.MustCompile(`(?m)^--- PASS: `).FindAll(out, -1))
	if passed < 50 {
		t.Fatalf("%d tests pass, %v:\n%s", passed, err, out)
	}
	for _, name := range failed {
		if orasRefused[name] == "" {
			t.Errorf("%s fails", name)
		}
	}
	for name := range orasRefused {
		if !slices.Contains(failed, name) {
			t.Errorf("%s does not fail any more", name)
		}
	}
	t.Logf("%d pass, %d fail", passed, len(failed))
	if t.Failed() {
		t.Logf("%s", out)
	}
}

// withArtifactTypes gives each artifact manifest in the text of a Go file a type, unless it has one.
func withArtifactTypes(text string) string {
	const artifact = "spec.Artifact{\n"
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, artifact)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		b.WriteString(artifact)
		depth := 1
		end := strings.IndexFunc(after, func(c rune) bool {
			switch c {
			case '{':
				depth++
			case '}':
				depth--
			}
			return depth == 0
		})
		if !strings.Contains(after[:end], "ArtifactType:") {
			b.WriteString("ArtifactType: \"test/none\",\n")
		}
		text = after
	}
}

// useViews replaces oras-go's stores in memory by views, in a copy of its module.
func useViews(t *testing.T, dir string) {
	t.Helper()
	here, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	uses := 0
	for _, name := range []string{"copy_test.go", "extendedcopy_test.go", "content_test.go", "pack_test.go", "copyerror_test.go"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		text := regexp.MustCompile(`\b(memory\.New|cas\.NewMemory)\(\)`).ReplaceAllStringFunc(string(b), func(string) string {
			uses++
			return "oraslocal.New()"
		})
		text = strings.ReplaceAll(text, "*memory.Store", "*oraslocal.Store")
		// Its manifests have no schemaVersion, and its artifacts no type, which the specs demand.
		text = withArtifactTypes(text)
		text = regexp.MustCompile(`\bocispec\.(Manifest|Index)\{\n`).ReplaceAllString(text, "${0}Versioned: orasspecs.Versioned{SchemaVersion: 2},\n")
		text = regexp.MustCompile(`\n(Versioned: orasspecs[^\n]*\n)(\s*)Versioned:`).ReplaceAllString(text, "\n${2}Versioned:")
		for path, use := range map[string]string{"oras.land/oras-go/v2/content/memory": "memory.", "oras.land/oras-go/v2/internal/cas": "cas."} {
			if !strings.Contains(text, use) {
				text = strings.Replace(text, "\t\""+path+"\"\n", "", 1)
			}
		}
		if strings.Contains(text, "orasspecs.") {
			text = strings.Replace(text, "import (\n", "import (\n\torasspecs \"github.com/opencontainers/image-spec/specs-go\"\n", 1)
		}
		if strings.Contains(text, "oraslocal.") {
			text = strings.Replace(text, "import (\n", "import (\n\t\"oras.land/oras-go/v2/internal/oraslocal\"\n", 1)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if uses < 100 {
		t.Fatalf("oras-go's tests make %d stores in memory", uses)
	}
	store := `package oraslocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/ocilocal/ocilocal"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/internal/descriptor"
)

// A Store is a view with oras-go's own errors. It remembers what was pushed to it, as oras-go's
// store does for its tests.
type Store struct {
	*ocilocal.Repository
	mu     sync.Mutex
	pushed map[descriptor.Descriptor][]byte
}

func (s *Store) Push(ctx context.Context, d ocispec.Descriptor, src io.Reader) error {
	if ok, err := s.Exists(ctx, d); ok || err != nil {
		return cmp.Or(err, errdef.ErrAlreadyExists)
	}
	err := s.Repository.Push(ctx, d, src)
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pushed[descriptor.FromOCI(d)] = nil
	}
	return err
}

func (s *Store) Fetch(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	rc, err := s.Repository.Fetch(ctx, d)
	return rc, notFound(err)
}

func (s *Store) Resolve(ctx context.Context, reference string) (ocispec.Descriptor, error) {
	d, err := s.Repository.Resolve(ctx, reference)
	return d, notFound(err)
}

func notFound(err error) error {
	if errors.Is(err, ocilocal.ErrNotFound) {
		err = fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
	}
	return err
}

func (s *Store) Map() map[descriptor.Descriptor][]byte {
	for d := range s.pushed {
		rc, err := s.Fetch(context.Background(), ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
		if err != nil {
			panic(err)
		}
		s.pushed[d], _ = io.ReadAll(rc)
		rc.Close()
	}
	return s.pushed
}

// New returns a view of a new registry.
func New() *Store {
	dir, err := os.MkdirTemp(os.Getenv("ORASLOCAL"), "")
	if err != nil {
		panic(err)
	}
	r, err := ocilocal.Open(context.Background(), dir, nil)
	if err != nil {
		panic(err)
	}
	p, err := r.Repository("localhost/app")
	if err != nil {
		panic(err)
	}
	return &Store{Repository: p, pushed: map[descriptor.Descriptor][]byte{}}
}
`
	t.Setenv("ORASLOCAL", t.TempDir())
	if err := os.MkdirAll(filepath.Join(dir, "internal", "oraslocal"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "internal", "oraslocal", "oraslocal.go"), []byte(store), 0o644); err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	mod = regexp.MustCompile(`(?m)^go .*$`).ReplaceAll(mod, []byte("go 1.26"))
	mod = fmt.Appendf(mod, "\nrequire github.com/ocilocal/ocilocal v0.0.0\nreplace github.com/ocilocal/ocilocal => %s\n", here)
	sum, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile(filepath.Join(dir, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.WriteFile(filepath.Join(dir, "go.mod"), mod, 0o644), os.WriteFile(filepath.Join(dir, "go.sum"), append(own, sum...), 0o644))
	if err != nil {
		t.Fatal(err)
	}
}
