package interop

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

const name = "example.com/team/demo:v1"

// exported writes an artifact to a layout directory and to an archive.
func exported(t *testing.T) (a *ocilocal.LocalArtifact, layout, archive string) {
	r := open(t, nil)
	a = built(t, r, name, "one", strings.Repeat("two", 100_000))
	dir := t.TempDir()
	layout, archive = filepath.Join(dir, "layout"), filepath.Join(dir, "archive.tar")
	refs := []ocilocal.Reference{a.Reference()}
	if err := errors.Join(r.ExportLayout(t.Context(), layout, refs, nil), r.ExportArchiveFile(t.Context(), archive, refs, nil)); err != nil {
		t.Fatal(err)
	}
	return a, layout, archive
}

// comesIn imports what a tool wrote and compares its digest with what the tool says.
func comesIn(t *testing.T, path, want string) *ocilocal.LocalArtifact {
	t.Helper()
	r := open(t, nil)
	a, err := r.LoadPath(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a.Digest().String() != want {
		t.Fatalf("came in as %s, should be %s", a.Digest(), want)
	}
	m, err := a.Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if m.IsIndex() {
		return a
	}
	for _, l := range m.Layers() {
		if _, err := a.ReadLayer(t.Context(), l); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func TestSkopeo(t *testing.T) {
	skopeo := tool(t, "skopeo")
	a, layout, archive := exported(t)
	dir := t.TempDir()
	for _, src := range []string{"oci:" + layout + ":" + name, "oci-archive:" + archive + ":" + name} {
		raw := run(t, skopeo, "inspect", "--raw", src)
		if got := digest.FromString(raw); got != a.Digest() {
			t.Errorf("%s: skopeo reads %s, want %s", src, got, a.Digest())
		}
		// skopeo reads every blob and writes layouts and archives of its own.
		for _, dst := range []string{"oci:" + filepath.Join(dir, "layout"), "oci-archive:" + filepath.Join(dir, "archive")} {
			os.RemoveAll(filepath.Join(dir, "layout"))
			os.RemoveAll(filepath.Join(dir, "archive"))
			run(t, skopeo, "copy", "--preserve-digests", src, dst+":"+name)
			_, path, _ := strings.Cut(dst, ":")
			if got := comesIn(t, path, a.Digest().String()); got.Reference() != a.Reference() {
				t.Errorf("its name came in as %s", got.Reference())
			}
		}
	}
}

// TestSkopeoIndex carries an image of several platforms, which regctl makes, through skopeo.
func TestSkopeoIndex(t *testing.T) {
	skopeo, regctl := tool(t, "skopeo"), tool(t, "regctl")
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	var manifests []string
	for i, arch := range []string{"amd64", "arm64"} {
		r := open(t, nil)
		a := built(t, r, "example.com/arch:"+arch, strings.Repeat(arch, i+1))
		if err := r.ExportLayout(t.Context(), src, []ocilocal.Reference{a.Reference()}, nil); err != nil {
			t.Fatal(err)
		}
		manifests = append(manifests, a.Digest().String())
	}
	run(t, regctl, "index", "create", "ocidir://"+src+":multi", "--digest", manifests[0], "--desc-platform", "linux/amd64")
	run(t, regctl, "index", "add", "ocidir://"+src+":multi", "--digest", manifests[1], "--desc-platform", "linux/arm64")
	want := run(t, regctl, "manifest", "head", "ocidir://"+src+":multi")
	r := open(t, nil)
	result, err := r.ImportLayout(t.Context(), src, &ocilocal.ImportOptions{Select: "multi", Reference: ref("example.com/multi:v1"), Rename: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := result.Artifacts[0].Descriptor.Digest.String(); got != want {
		t.Fatalf("index came in as %s, want %s", got, want)
	}
	out := filepath.Join(dir, "out")
	if err := r.ExportLayout(t.Context(), out, []ocilocal.Reference{ref("example.com/multi:v1")}, nil); err != nil {
		t.Fatal(err)
	}
	// regctl copies the index as it is. skopeo 1.9 reads it, and copies each
	// platform unchanged, but can't copy any index without rewriting it.
	again := filepath.Join(dir, "again")
	run(t, regctl, "image", "copy", "ocidir://"+out+"@"+want, "ocidir://"+again+":again")
	comesIn(t, again, want)
	from := "oci:" + out + ":example.com/multi:v1"
	if got := digest.FromString(run(t, skopeo, "inspect", "--raw", from)).String(); got != want {
		t.Errorf("skopeo reads %s, want %s", got, want)
	}
	for i, arch := range []string{"amd64", "arm64"} {
		one := filepath.Join(dir, arch)
		run(t, skopeo, "--override-os", "linux", "--override-arch", arch, "copy", "--preserve-digests", from, "oci:"+one+":"+arch)
		if got := digestIn(t, one); got != manifests[i] {
			t.Errorf("skopeo copied %s for %s, want %s", got, arch, manifests[i])
		}
	}
}

func TestOras(t *testing.T) {
	oras := tool(t, "oras")
	a, layout, _ := exported(t)
	// In: oras writes a layout, with a tag for a name.
	dir := t.TempDir()
	file := filepath.Join(dir, "hello.txt")
	if err := os.WriteFile(file, []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	theirs := filepath.Join(dir, "theirs")
	t.Chdir(dir)
	run(t, oras, "push", "--oci-layout", theirs+":v1", "--artifact-type", "application/vnd.example.test", "hello.txt:text/plain")
	comesIn(t, theirs, run(t, oras, "resolve", "--oci-layout", theirs+":v1"))
	// Out: oras finds it by digest, fetches and copies it.
	if got := digest.FromString(run(t, oras, "manifest", "fetch", "--oci-layout", layout+"@"+a.Digest().String())); got != a.Digest() {
		t.Errorf("oras reads %s, want %s", got, a.Digest())
	}
	run(t, oras, "copy", "--from-oci-layout", layout+"@"+a.Digest().String(), "--to-oci-layout", filepath.Join(dir, "copy")+":v1")
	comesIn(t, filepath.Join(dir, "copy"), a.Digest().String())
	out := filepath.Join(dir, "out")
	run(t, oras, "pull", "--oci-layout", "--output", out, layout+"@"+a.Digest().String())
	if b, err := os.ReadFile(filepath.Join(out, "file0.txt")); err != nil || string(b) != "one" {
		t.Errorf("%q %v", b, err)
	}
}

func TestRegctl(t *testing.T) {
	regctl := tool(t, "regctl")
	a, layout, archive := exported(t)
	dir := t.TempDir()
	if got := run(t, regctl, "manifest", "head", "ocidir://"+layout+"@"+a.Digest().String()); got != a.Digest().String() {
		t.Errorf("regctl reads %s, want %s", got, a.Digest())
	}
	copied := filepath.Join(dir, "copy")
	run(t, regctl, "image", "copy", "ocidir://"+layout+"@"+a.Digest().String(), "ocidir://"+copied+":v1")
	comesIn(t, copied, a.Digest().String())
	// regctl reads our archive, and writes one that we read, gzipped too.
	imported := filepath.Join(dir, "imported")
	run(t, regctl, "image", "import", "ocidir://"+imported+":v1", archive)
	if got := run(t, regctl, "manifest", "head", "ocidir://"+imported+":v1"); got != a.Digest().String() {
		t.Errorf("regctl took %s from our archive, want %s", got, a.Digest())
	}
	for _, args := range [][]string{{}, {"--compress"}} {
		out := filepath.Join(dir, "out.tar")
		run(t, regctl, append(append([]string{"image", "export"}, args...), "ocidir://"+copied+":v1", out)...)
		comesIn(t, out, a.Digest().String())
	}
}

func TestUmoci(t *testing.T) {
	umoci := tool(t, "umoci")
	// In: an image with one layer made by umoci.
	dir := t.TempDir()
	layout := filepath.Join(dir, "layout")
	run(t, umoci, "init", "--layout", layout)
	run(t, umoci, "new", "--image", layout+":v1")
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, umoci, "insert", "--image", layout+":v1", file, "/file")
	want := digestIn(t, layout)
	r := open(t, nil)
	result, err := r.ImportLayout(t.Context(), layout, &ocilocal.ImportOptions{Reference: ref("example.com/umoci:v1")})
	if err != nil || result.Artifacts[0].Descriptor.Digest.String() != want {
		t.Fatal(err)
	}
	// Out: umoci lists and unpacks what we export beside what it has.
	if err := r.ExportLayout(t.Context(), layout, []ocilocal.Reference{ref("example.com/umoci:v1")}, nil); err != nil {
		t.Fatal(err)
	}
	if got := run(t, umoci, "ls", "--layout", layout); !strings.Contains(got, "example.com/umoci:v1") || !strings.Contains(got, "v1\n") && !strings.HasPrefix(got, "v1") {
		t.Errorf("umoci lists %q", got)
	}
	run(t, umoci, "unpack", "--rootless", "--image", layout+":v1", filepath.Join(dir, "bundle"))
	if b, err := os.ReadFile(filepath.Join(dir, "bundle", "rootfs", "file")); err != nil || string(b) != "content" {
		t.Errorf("%q %v", b, err)
	}
}

func TestOMMX(t *testing.T) {
	for _, sdk := range []string{"ommx2", "ommx3"} {
		t.Run(sdk, func(t *testing.T) {
			python := tool(t, sdk)
			dir := t.TempDir()
			archive := filepath.Join(dir, "a.ommx")
			theirs := filepath.Join(dir, "theirs")
			t.Setenv("OMMX_LOCAL_REGISTRY_ROOT", theirs)
			script := filepath.Join("testdata", sdk+".py")
			instance := run(t, python, script, "make", archive)
			r := open(t, nil)
			a, err := r.LoadPath(t.Context(), archive, nil)
			if err != nil {
				t.Fatal(err)
			}
			if a.ArtifactType() != ocilocal.ArtifactTypeOMMX {
				t.Errorf("artifact type %q", a.ArtifactType())
			}
			if sdk == "ommx2" {
				legacy(t, a)
			}
			// Out: the SDK loads what we export and finds the same instance.
			t.Setenv("OMMX_LOCAL_REGISTRY_ROOT", filepath.Join(dir, "fresh"))
			ours := filepath.Join(dir, "ours.ommx")
			if err := r.ExportArchiveFile(t.Context(), ours, []ocilocal.Reference{a.Reference()}, nil); err != nil {
				t.Fatal(err)
			}
			if got := run(t, python, script, "read", ours); got != instance {
				t.Errorf("the SDK reads another instance: %s, want %s", got, instance)
			}
			// And a layer that a native builder has put into an artifact of its own.
			layers, err := a.Layers(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			content, err := a.ReadLayer(t.Context(), layers[0])
			if err != nil {
				t.Fatal(err)
			}
			b, err := r.NewOMMXBuilder(ref("ghcr.io/example/native:v1"), &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Cancel()
			if _, err := b.AddLayer(t.Context(), layers[0].MediaType, bytes.NewReader(content), layers[0].Annotations); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Build(t.Context()); err != nil {
				t.Fatal(err)
			}
			native := filepath.Join(dir, "native.ommx")
			if err := r.ExportArchiveFile(t.Context(), native, []ocilocal.Reference{ref("ghcr.io/example/native:v1")}, nil); err != nil {
				t.Fatal(err)
			}
			if got := run(t, python, script, "read", native); got != instance {
				t.Errorf("the SDK reads another instance from a native artifact: %s", got)
			}
		})
	}
}

// legacy imports the tree that the SDK filled.
func legacy(t *testing.T, a *ocilocal.LocalArtifact) {
	root, err := ocilocal.DefaultLegacyRoot()
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, &ocilocal.Options{LegacyRoot: root})
	one, err := r.Load(t.Context(), ref("ghcr.io/example/demo:v1"))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := one.Layers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	same, err := a.Layers(t.Context())
	if err != nil || layers[0].Digest != same[0].Digest {
		t.Errorf("the tree has another instance than the archive: %v", err)
	}
	report, err := r.ImportLegacy(t.Context(), root, nil)
	if err != nil || report.Imported != 1 || report.Verified != 1 {
		t.Errorf("%+v %v", report, err)
	}
	if _, err := r.Resolve(t.Context(), ref("localhost:5000/odd__repo/demo:my__tag")); err != nil {
		t.Error(err)
	}
}
