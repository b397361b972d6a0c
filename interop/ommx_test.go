package interop_test

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

const ommxName = "ghcr.io/example/demo:v1"

// ommx runs a command of the script for one version of the SDK, which prints an instance.
func ommx(b *box, sdk, command, arg string) string {
	b.t.Helper()
	return b.run(sdk, script(b.t, sdk), command, arg)
}

// script returns the script for a version of the SDK.
func script(t testing.TB, sdk string) string {
	t.Helper()
	name, err := filepath.Abs(filepath.Join("testdata", sdk+".py"))
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// onlyLayer returns the one layer of an artifact: its type, annotations and content.
func onlyLayer(t *testing.T, a *ocilocal.LocalArtifact) (mediaType string, annotations map[string]string, content []byte) {
	t.Helper()
	layers, err := a.Layers(t.Context())
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	content, err = a.ReadLayer(t.Context(), layers[0])
	if err != nil {
		t.Fatal(err)
	}
	return layers[0].MediaType, layers[0].Annotations, content
}

// Archives of the SDK come in, and it reads what goes out: the same artifact,
// and one that our Builder made of the same layer.
func TestOMMXArchive(t *testing.T) {
	for _, sdk := range []string{"ommx2", "ommx3"} {
		t.Run(sdk, func(t *testing.T) {
			b := newBox(t)
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			instance := ommx(b, sdk, "make", b.path("theirs.ommx"))
			r := newRegistry(t)
			a, err := r.LoadPath(t.Context(), b.path("theirs.ommx"), nil)
			if err != nil {
				t.Fatal(err)
			}
			hasWhole(t, r, a.Digest())
			if a.Reference() != reference(t, ommxName) || a.ArtifactType() != ocilocal.ArtifactTypeOMMX {
				t.Errorf("came in as %s of type %q", a.Reference(), a.ArtifactType())
			}
			if annotations, err := a.Annotations(t.Context()); err != nil || annotations["org.ommx.user.note"] != "kept" {
				t.Errorf("annotations %q, %v", annotations, err)
			}

			mediaType, annotations, content := onlyLayer(t, a)
			native := "ghcr.io/example/native:v1"
			builder, err := r.NewOMMXBuilder(reference(t, native), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer builder.Cancel()
			if _, err := builder.AddLayerBytes(t.Context(), mediaType, content, annotations); err != nil {
				t.Fatal(err)
			}
			build(t, builder)
			for _, name := range []string{ommxName, native} {
				for _, path := range []string{export(t, r, name), exportLayout(t, r, name)} {
					b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
					if got := ommx(b, sdk, "read", path); got != instance {
						t.Errorf("%s of %s: the SDK reads the instance %s, want %s", path, name, got, instance)
					}
				}
			}
		})
	}
}

// What version 2 made is read by version 3 after it has been through here.
func TestOMMXAcrossVersions(t *testing.T) {
	b := newBox(t)
	need(t, "ommx3")
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", b.path("tree"))
	instance := ommx(b, "ommx2", "make", b.path("theirs.ommx"))
	r := newRegistry(t)
	if _, err := r.LoadPath(t.Context(), b.path("theirs.ommx"), nil); err != nil {
		t.Fatal(err)
	}
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
	want := ommx(b, "ommx3", "read", b.path("theirs.ommx")) // its bytes need not be those of version 2
	if got := ommx(b, "ommx3", "read", export(t, r, ommxName)); got != want {
		t.Errorf("version 3 reads the instance %s from our archive, %s from the one of version 2, which was %s", got, want, instance)
	}
}

// An archive without a name has no ref, and every blob.
func TestOMMXUnnamed(t *testing.T) {
	b := newBox(t)
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
	ommx(b, "ommx2", "make", b.path("theirs.ommx"))
	r, result := importArchive(t, b.path("theirs.ommx.unnamed"), nil)
	if len(result.Artifacts) != 1 || !result.Artifacts[0].Update.Reference.IsZero() {
		t.Fatalf("%+v", result.Artifacts)
	}
	hasWhole(t, r, result.Artifacts[0].Descriptor.Digest)
}

// The tree of version 2 comes in, one entry by Load or all of it; and version 2
// finds what we export to the place where it looks.
func TestOMMXTree(t *testing.T) {
	b := newBox(t)
	tree := b.path("tree")
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", tree)
	instance := ommx(b, "ommx2", "make", b.path("theirs.ommx"))

	r, err := ocilocal.Open(t.Context(), b.path("root"), &ocilocal.Options{LegacyRoot: tree})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	a, err := r.Load(t.Context(), reference(t, ommxName))
	if err != nil {
		t.Fatal(err)
	}
	want := b.run("skopeo", "inspect", "--raw", "oci:"+filepath.Join(tree, "ghcr.io/example/demo/__v1")+":"+ommxName)
	wantEqual(t, "the tree's manifest", a.Digest().String(), digest.FromString(want).String())
	report, err := r.ImportLegacy(t.Context(), tree, nil)
	if err != nil {
		t.Fatal(err)
	}
	if report.Scanned != 2 || report.Imported != 1 || report.Verified != 1 || len(report.Failed) != 0 {
		t.Errorf("%+v", report)
	}
	odd := "localhost:5000/odd__repo/demo:my__tag"
	for _, name := range []string{ommxName, odd} {
		desc, err := r.Resolve(t.Context(), reference(t, name))
		if err != nil {
			t.Fatal(err)
		}
		hasWhole(t, r, desc.Digest)
	}

	ours := t.TempDir()
	place := filepath.Join(ours, "ghcr.io/example/demo/__v1")
	if err := os.MkdirAll(filepath.Dir(place), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(exportLayout(t, r, ommxName), place); err != nil {
		t.Fatal(err)
	}
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", ours)
	wantEqual(t, "the instance that version 2 loads", ommx(b, "ommx2", "load", ommxName), instance)
}

// The registry of version 3 comes in, of the schema that it has and of the one before;
// and the SDK reads what we export of it.
func TestOMMXLocalRegistry(t *testing.T) {
	for _, sdk := range []string{"ommx3", "ommx3a"} {
		t.Run(sdk, func(t *testing.T) {
			b := newBox(t)
			need(t, sdk)
			theirs := b.path("theirs")
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", theirs)
			instance := b.run(sdk, script(t, "ommx3"), "make", b.path("theirs.ommx"))
			names := []string{ommxName}
			if sdk == "ommx3" { // the older one has other names for it
				experiment := "ghcr.io/example/experiment:v1"
				ommx(b, sdk, "experiment", experiment)
				names = append(names, experiment)
			}
			r := newRegistry(t)
			report, err := r.ImportOMMX(t.Context(), theirs, nil)
			if err != nil || report.Imported < len(names) || report.Imported != report.Scanned {
				t.Fatalf("%+v, %v", report, err)
			}
			for _, name := range names {
				desc, err := r.Resolve(t.Context(), reference(t, name))
				if err != nil {
					t.Fatal(err)
				}
				hasWhole(t, r, desc.Digest)
			}
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			wantEqual(t, "the instance", b.run(sdk, script(t, "ommx3"), "read", export(t, r, ommxName)), instance)
			// It is no worse for it: the SDK goes on with its root, and we find what it does.
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", theirs)
			wantEqual(t, "the instance in its own registry", b.run(sdk, script(t, "ommx3"), "load", ommxName), instance)
			again, err := r.ImportOMMX(t.Context(), theirs, nil)
			if err != nil || again.Verified != report.Scanned {
				t.Errorf("%+v, %v", again, err)
			}
		})
	}
}

// The SDK sends what we exported to a registry, and loads it from there.
func TestOMMXRegistry(t *testing.T) {
	for _, sdk := range []string{"ommx2", "ommx3"} {
		t.Run(sdk, func(t *testing.T) {
			b := newBox(t)
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			instance := ommx(b, sdk, "make", b.path("theirs.ommx"))
			s := servers["distribution 3"](t)
			name := strings.Replace(s.host, "127.0.0.1", "localhost", 1) + "/ommx/demo:v1" // version 2 speaks plain HTTP to no other host
			r := newRegistry(t)
			a, err := r.LoadPath(t.Context(), b.path("theirs.ommx"), nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Tag(t.Context(), a.Digest(), reference(t, name), nil); err != nil {
				t.Fatal(err)
			}
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			wantEqual(t, "what is pushed", ommx(b, sdk, "push", export(t, r, name)), instance)
			wantEqual(t, "the digest in the registry", s.oras(b, "--plain-http", "resolve", name), a.Digest().String())
			b.setenv("OMMX_LOCAL_REGISTRY_ROOT", t.TempDir())
			wantEqual(t, "what is pulled", ommx(b, sdk, "load", name), instance)
		})
	}
}

// The SDK keeps a registry of its own form under the same file name. Pointed at a root of ours by mistake,
// it fails, and changes nothing there. (Its alpha versions add a table, which Open then refuses.)
func TestOMMXLeavesOurRoot(t *testing.T) {
	b := newBox(t)
	root := b.path("root")
	r, err := ocilocal.Open(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	a := buildArtifact(t, r, ommxName, ocilocal.FormatImageManifest, nil)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	before := contents(t, root)
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", root)
	for _, args := range [][]string{{"load", ommxName}, {"load", "ghcr.io/example/other:v1"}, {"make", b.path("theirs.ommx")}} {
		if out, _, err := b.try("ommx3", append([]string{script(t, "ommx3")}, args...)...); err == nil {
			t.Errorf("the SDK takes a root of ours for its own: %q says %s", args, out)
		}
	}
	if after := contents(t, root); !maps.Equal(after, before) {
		t.Errorf("the SDK has changed our root: it was\n%v\nand is\n%v", before, after)
	}
	r, err = ocilocal.Open(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if d, err := r.Resolve(t.Context(), reference(t, ommxName)); err != nil || d.Digest != a.Digest() {
		t.Errorf("%v, %v", d, err)
	}
}

// contents returns mode and digest of each file below a directory that no process uses.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		found[rel] = fi.Mode().String()
		if fi.Mode().IsRegular() {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			found[rel] += " " + digest.FromBytes(raw).String()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
