package interop_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

const imageName, artifactName = "ghcr.io/example/tools/image:v1", "ghcr.io/example/tools/artifact:v1"

// umociImages makes a layout "theirs" with umoci that has an image for each of
// two platforms, tagged amd64 and arm64.
func umociImages(b *box) string {
	b.t.Helper()
	need(b.t, "umoci")
	if err := os.MkdirAll(b.path("files"), 0o700); err != nil {
		b.t.Fatal(err)
	}
	b.run("umoci", "init", "--layout", "theirs")
	for _, arch := range []string{"amd64", "arm64"} {
		b.write("files/arch", arch+"\n")
		b.run("umoci", "new", "--image", "theirs:"+arch)
		b.run("umoci", "config", "--image", "theirs:"+arch, "--architecture", arch, "--os", "linux")
		b.run("umoci", "insert", "--rootless", "--image", "theirs:"+arch, "files", "/data")
	}
	return b.path("theirs")
}

// multiPlatform adds an image index tagged multi to the layout of umociImages,
// by regctl, and returns its digest.
func multiPlatform(b *box) string {
	b.t.Helper()
	args := []string{"index", "create", "ocidir://theirs:multi"}
	for _, arch := range []string{"amd64", "arm64"} {
		args = append(args, "--digest", b.run("regctl", "image", "digest", "ocidir://theirs:"+arch))
	}
	b.run("regctl", args...)
	return b.run("regctl", "image", "digest", "ocidir://theirs:multi")
}

func TestUmociWrites(t *testing.T) {
	b := newBox(t)
	dir := umociImages(b)
	for _, arch := range []string{"amd64", "arm64"} {
		name := "ghcr.io/example/umoci:" + arch
		opts := as(t, name)
		opts.Select = arch
		r, result := importLayout(t, dir, opts)
		want := b.run("skopeo", "inspect", "--format", "{{.Digest}}", "oci:theirs:"+arch)
		wantImported(t, r, result, name, want)
	}
}

func TestUmociReads(t *testing.T) {
	b := newBox(t)
	r := newRegistry(t)
	buildImage(t, r, imageName)
	dir := exportLayout(t, r, imageName)
	wantEqual(t, "umoci ls", b.run("umoci", "ls", "--layout", dir), imageName)
	b.run("umoci", "stat", "--image", dir+":"+imageName)
	b.run("umoci", "unpack", "--rootless", "--image", dir+":"+imageName, "bundle")
	got, err := os.ReadFile(b.path("bundle/rootfs/" + imageFile))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != imageContent {
		t.Errorf("unpacked %q, want %q", got, imageContent)
	}
}

func TestSkopeoWrites(t *testing.T) {
	b := newBox(t)
	umociImages(b)
	name := "ghcr.io/example/skopeo:v1"
	for _, target := range []string{"oci-archive:theirs.tar:" + name, "oci:copy:" + name} {
		b.run("skopeo", "copy", "oci:theirs:amd64", target)
		want := b.run("skopeo", "inspect", "--format", "{{.Digest}}", target)
		var r *ocilocal.LocalRegistry
		var result *ocilocal.ImportResult
		if strings.HasPrefix(target, "oci-archive:") {
			r, result = importArchive(t, b.path("theirs.tar"), nil)
		} else {
			r, result = importLayout(t, b.path("copy"), nil)
		}
		wantImported(t, r, result, name, want)
	}
}

func TestSkopeoReads(t *testing.T) {
	b := newBox(t)
	r := newRegistry(t)
	want := buildImage(t, r, imageName).Digest().String()
	archive, dir := export(t, r, imageName), exportLayout(t, r, imageName)
	for i, source := range []string{"oci-archive:" + archive, "oci-archive:" + archive + ":" + imageName, "oci:" + dir + ":" + imageName} {
		wantEqual(t, source, b.run("skopeo", "inspect", "--format", "{{.Digest}}", source), want)
		target := "oci-archive:copy" + string(rune('0'+i)) + ".tar"
		b.run("skopeo", "copy", source, target+":"+imageName)
		wantEqual(t, target, b.run("skopeo", "inspect", "--format", "{{.Digest}}", target), want)
		back, result := importArchive(t, b.path(strings.TrimPrefix(target, "oci-archive:")), nil)
		wantImported(t, back, result, imageName, want)
	}
}

// Of several names in one archive, skopeo finds each.
func TestSkopeoReadsOneOfMany(t *testing.T) {
	b := newBox(t)
	r := newRegistry(t)
	other := "docker.io/library/other:latest"
	buildImage(t, r, imageName)
	desc, err := r.Resolve(t.Context(), reference(t, imageName))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Tag(t.Context(), desc.Digest, reference(t, other), nil); err != nil {
		t.Fatal(err)
	}
	buildArtifact(t, r, artifactName, ocilocal.FormatImageManifest, nil)
	archive := "oci-archive:" + export(t, r, imageName, artifactName, other)
	for _, name := range []string{imageName, other} {
		wantEqual(t, name, b.run("skopeo", "inspect", "--format", "{{.Digest}}", archive+":"+name), desc.Digest.String())
	}
}

// Artifacts that aren't container images pass skopeo as well.
func TestSkopeoCopiesArtifact(t *testing.T) {
	b := newBox(t)
	r := newRegistry(t)
	a := buildArtifact(t, r, artifactName, ocilocal.FormatImageManifest, nil)
	archive := "oci-archive:" + export(t, r, artifactName) + ":" + artifactName
	raw, _, err := b.try("skopeo", "inspect", "--raw", archive)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "skopeo inspect --raw", digest.FromString(raw).String(), a.Digest().String())
	b.run("skopeo", "copy", "--preserve-digests", archive, "oci-archive:theirs.tar:"+artifactName)
	back, result := importArchive(t, b.path("theirs.tar"), nil)
	wantImported(t, back, result, artifactName, a.Digest().String())
}

func TestMultiPlatformSkopeo(t *testing.T) {
	b := newBox(t)
	umociImages(b)
	want := multiPlatform(b)
	name := "ghcr.io/example/skopeo/multi:v1"
	b.run("skopeo", "copy", "--all", "oci:theirs:multi", "oci-archive:theirs.tar:"+name)
	r, result := importArchive(t, b.path("theirs.tar"), nil)
	wantImported(t, r, result, name, want)
	if n := hasWhole(t, r, digest.Digest(want)); n != 7 { // the index, and 2 manifests, configs and layers
		t.Errorf("%d manifests and blobs came in, want 7", n)
	}

	archive := "oci-archive:" + export(t, r, name) + ":" + name
	for _, arch := range []string{"amd64", "arm64"} {
		got := b.run("skopeo", "--override-os", "linux", "--override-arch", arch, "inspect", "--format", "{{.Architecture}}", archive)
		wantEqual(t, "architecture", got, arch)
	}
	b.run("skopeo", "copy", "--all", archive, "oci:back:multi")
	wantEqual(t, "skopeo copy --all", b.run("regctl", "image", "digest", "ocidir://back:multi"), want)
}

func TestMultiPlatformRegctl(t *testing.T) {
	b := newBox(t)
	umociImages(b)
	want := multiPlatform(b)
	name := "ghcr.io/example/regctl/multi:v1"
	b.run("regctl", "image", "export", "--name", name, "ocidir://theirs:multi", "theirs.tar")
	r, result := importArchive(t, b.path("theirs.tar"), as(t, name))
	wantImported(t, r, result, name, want)
	b.run("regctl", "image", "copy", "ocidir://theirs:multi", "ocidir://copy:multi")
	r, result = importLayout(t, b.path("copy"), as(t, "ghcr.io/example/regctl:multi"))
	wantImported(t, r, result, "ghcr.io/example/regctl:multi", want)

	dir := exportLayout(t, r, "ghcr.io/example/regctl:multi")
	wantEqual(t, "regctl tag ls", b.run("regctl", "tag", "ls", "ocidir://"+dir), "multi")
	b.run("regctl", "image", "copy", "ocidir://"+dir+":multi", "ocidir://back:multi")
	wantEqual(t, "regctl image copy", b.run("regctl", "image", "digest", "ocidir://back:multi"), want)
	for _, arch := range []string{"amd64", "arm64"} {
		b.run("umoci", "init", "--layout", "one-"+arch)
		b.run("regctl", "image", "copy", "--platform", "linux/"+arch, "ocidir://"+dir+":multi", "ocidir://one-"+arch+":it")
		b.run("umoci", "unpack", "--rootless", "--image", "one-"+arch+":it", "bundle-"+arch)
		got, err := os.ReadFile(filepath.Join(b.path("bundle-"+arch), "rootfs", "data", "arch"))
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "unpacked file", string(got), arch)
	}
}

// What we add to a layout of umoci's leaves what it has there.
func TestUmociKeepsItsEntries(t *testing.T) {
	b := newBox(t)
	dir := umociImages(b)
	r := newRegistry(t)
	buildImage(t, r, imageName)
	if err := r.ExportLayout(t.Context(), dir, references(t, []string{imageName}), nil); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "umoci ls", b.run("umoci", "ls", "--layout", dir), "amd64\narm64\n"+imageName)
	b.run("umoci", "unpack", "--rootless", "--image", dir+":amd64", "their-bundle")
	b.run("umoci", "unpack", "--rootless", "--image", dir+":"+imageName, "our-bundle")
}
