package interop_test

import (
	"encoding/json"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// named exports an image with names of one form, into a layout and an archive.
func named(t *testing.T, names ocilocal.ExportNames) (dir, archive, want string) {
	t.Helper()
	r := newRegistry(t)
	want = buildImage(t, r, imageName).Digest().String()
	dir, archive = filepath.Join(t.TempDir(), "ours"), filepath.Join(t.TempDir(), "ours.tar")
	o := &ocilocal.ExportOptions{Names: names}
	if err := r.ExportLayout(t.Context(), dir, references(t, []string{imageName}), o); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(t.Context(), archive, references(t, []string{imageName}), o); err != nil {
		t.Fatal(err)
	}
	return dir, archive, want
}

// TestNamesByTag: tools that look for a tag find it in exports with tags, and in those with the pair
// of names of containerd.
func TestNamesByTag(t *testing.T) {
	s := inProcess(t, &server{}, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	for form, names := range map[string]ocilocal.ExportNames{"tags": ocilocal.NamesTags, "containerd": ocilocal.NamesContainerd} {
		for tool, read := range map[string]func(b *box, dir, archive, want string){
			"oras": func(b *box, dir, archive, want string) {
				raw, _, err := b.try("oras", "manifest", "fetch", "--oci-layout", dir+":v1")
				if err != nil {
					b.t.Fatal(err)
				}
				wantEqual(b.t, "oras manifest fetch", digest.FromString(raw).String(), want)
				wantEqual(b.t, "oras repo tags", b.run("oras", "repo", "tags", "--oci-layout", dir), "v1")
				b.run("oras", "restore", "--plain-http", "--input", archive, s.host+"/restored/"+form)
				wantEqual(b.t, "restored", b.run("oras", "resolve", "--plain-http", s.host+"/restored/"+form+":v1"), want)
			},
			"skopeo": func(b *box, dir, archive, want string) {
				for _, source := range []string{"oci:" + dir + ":v1", "oci-archive:" + archive + ":v1"} {
					wantEqual(b.t, source, b.run("skopeo", "inspect", "--format", "{{.Digest}}", source), want)
				}
			},
			"umoci": func(b *box, dir, _, _ string) {
				wantEqual(b.t, "umoci ls", b.run("umoci", "ls", "--layout", dir), "v1")
				b.run("umoci", "unpack", "--rootless", "--image", dir+":v1", "bundle")
			},
			"crane": func(b *box, dir, _, want string) {
				b.run("crane", "push", "--insecure", dir, s.host+"/crane/"+form+":v1")
				wantEqual(b.t, "crane digest", b.run("crane", "digest", "--insecure", s.host+"/crane/"+form+":v1"), want)
			},
			"regctl": func(b *box, dir, archive, want string) {
				wantEqual(b.t, "regctl image digest", b.run("regctl", "image", "digest", "ocidir://"+dir+":v1"), want)
				b.run("regctl", "image", "import", "ocidir://back:v1", archive)
				opts := as(b.t, imageName)
				opts.Select = "v1" // regctl keeps an entry with the name in the archive too
				back, result := importLayout(b.t, b.path("back"), opts)
				wantImported(b.t, back, result, imageName, want)
			},
			"podman": func(b *box, _, archive, _ string) {
				run, err := os.MkdirTemp("", "run") // podman takes no long name
				if err != nil {
					b.t.Fatal(err)
				}
				b.t.Cleanup(func() { os.RemoveAll(run) })
				store := []string{"--root", b.path("store"), "--runroot", run, "--storage-driver", "vfs"}
				out := b.run("podman", append(store, "load", "-i", archive)...)
				if !strings.Contains(out, "v1") {
					b.t.Errorf("podman loads %q", out)
				}
			},
			"ocilocal": func(b *box, dir, archive, want string) {
				opts := &ocilocal.ImportOptions{}
				if names == ocilocal.NamesTags {
					opts.Repository = strings.TrimSuffix(imageName, ":v1")
				}
				back, result := importLayout(b.t, dir, opts)
				wantImported(b.t, back, result, imageName, want)
				back, result = importArchive(b.t, archive, opts)
				wantImported(b.t, back, result, imageName, want)
			},
		} {
			t.Run(form+"/"+tool, func(t *testing.T) {
				if tool != "ocilocal" {
					need(t, tool)
				}
				dir, archive, want := named(t, names)
				read(newBox(t), dir, archive, want)
			})
		}
	}
}

// TestFlatIndexPlatforms: the platforms in a flat index.json without names survive import and export, so
// that crane finds each platform in what it pushes.
func TestFlatIndexPlatforms(t *testing.T) {
	need(t, "crane")
	s := inProcess(t, &server{}, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	b := newBox(t)
	dir := umociImages(b)
	name := filepath.Join(dir, "index.json")
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		t.Fatal(err)
	}
	want := map[string]digest.Digest{}
	o := &ocilocal.ExportOptions{}
	for i := range index.Manifests {
		e := &index.Manifests[i]
		arch := e.Annotations[ocispec.AnnotationRefName]
		e.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		e.Annotations = nil
		want[arch] = e.Digest
		o.Digests = append(o.Digests, e.Digest)
	}
	if raw, err = json.Marshal(index); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	r, _ := importLayout(t, dir, nil)
	out := filepath.Join(t.TempDir(), "out")
	if err := r.ExportLayout(t.Context(), out, nil, o); err != nil {
		t.Fatal(err)
	}
	b.run("crane", "push", "--insecure", "--index", out, s.host+"/flat/image:v1")
	for arch, d := range want {
		got := b.run("crane", "digest", "--insecure", "--platform", "linux/"+arch, s.host+"/flat/image:v1")
		wantEqual(t, arch, got, d.String())
		raw, _, err := b.try("crane", "manifest", "--insecure", "--platform", "linux/"+arch, s.host+"/flat/image:v1")
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, arch, digest.FromString(raw+"\n").String(), d.String()) // umoci ends its manifests so
	}
}
