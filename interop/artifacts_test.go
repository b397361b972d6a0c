package interop_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func TestOrasWrites(t *testing.T) {
	b := newBox(t)
	b.write("a.txt", "one\n")
	b.write("b.txt", "two\n")
	b.run("oras", "push", "--oci-layout", "theirs:v1", "--artifact-type", artifactType, "a.txt:text/plain", "b.txt:text/plain")
	want := b.run("oras", "resolve", "--oci-layout", "theirs:v1")
	b.run("oras", "attach", "--oci-layout", "theirs:v1", "--artifact-type", "application/vnd.example.note", "b.txt:text/plain")
	name := "ghcr.io/example/oras:v1"
	opts := as(t, name)
	opts.Select = "v1"
	r, result := importLayout(t, b.path("theirs"), opts)
	wantImported(t, r, result, name, want)

	// Everything in the layout: what is attached has a digest only.
	r, result = importLayout(t, b.path("theirs"), byDigest)
	var referrers struct {
		Referrers []struct{ Digest string }
	}
	if err := json.Unmarshal([]byte(b.run("oras", "discover", "--oci-layout", "--format", "json", "theirs:v1")), &referrers); err != nil {
		t.Fatal(err)
	}
	if len(referrers.Referrers) != 1 {
		t.Fatalf("oras discover tells %+v", referrers)
	}
	wantImported(t, r, result, "", want)
	wantImported(t, r, result, "", referrers.Referrers[0].Digest)
	a, err := r.LoadDigest(t.Context(), digest.Digest(referrers.Referrers[0].Digest))
	if err != nil {
		t.Fatal(err)
	}
	subject, ok, err := a.Subject(t.Context())
	if err != nil || !ok || subject.Digest.String() != want {
		t.Errorf("the subject of what was attached is %v, %v, %v; want %s", subject, ok, err, want)
	}
}

func TestOrasReads(t *testing.T) {
	for _, format := range []ocilocal.ManifestFormat{ocilocal.FormatImageManifest, ocilocal.FormatArtifactManifest} {
		t.Run(format.String(), func(t *testing.T) {
			b := newBox(t)
			r := newRegistry(t)
			a := buildArtifact(t, r, artifactName, format, nil)
			want := a.Digest().String()
			dir, archive := exportLayout(t, r, artifactName), export(t, r, artifactName)
			wantEqual(t, "oras repo tags", b.run("oras", "repo", "tags", "--oci-layout", dir), artifactName)
			for _, source := range []string{dir, archive} {
				wantEqual(t, "oras resolve", b.run("oras", "resolve", "--oci-layout-path", source, artifactName), want)
				raw := b.run("oras", "manifest", "fetch", "--oci-layout", source+"@"+want)
				wantEqual(t, "oras manifest fetch", digest.FromString(raw).String(), want)
			}
			b.run("oras", "copy", "--from-oci-layout", archive+"@"+want, "--to-oci-layout", "copy:v1")
			back, result := importLayout(t, b.path("copy"), as(t, "ghcr.io/example/tools/artifact:v1"))
			wantImported(t, back, result, artifactName, want)

			b.run("oras", "pull", "--oci-layout", dir+"@"+want, "--output", "files")
			got, err := os.ReadFile(b.path("files/part-2.txt"))
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "pulled file", string(got), artifactName+" part 2")
		})
	}
}

func TestRegctlWrites(t *testing.T) {
	b := newBox(t)
	b.write("a.txt", "one\n")
	b.run("regctl", "artifact", "put", "--artifact-type", artifactType, "--file-media-type", "text/plain", "--file", "a.txt", "ocidir://theirs:v1")
	want := b.run("regctl", "manifest", "head", "ocidir://theirs:v1")
	name := "ghcr.io/example/regctl:v1"
	r, result := importLayout(t, b.path("theirs"), as(t, name))
	wantImported(t, r, result, name, want)

	b.run("regctl", "image", "export", "ocidir://theirs@"+want, "by-digest.tar") // its entry's name is not a reference
	r, result = importArchive(t, b.path("by-digest.tar"), byDigest)
	wantImported(t, r, result, "", want)
	b.run("regctl", "image", "export", "--compress", "ocidir://theirs:v1", "by-tag.tar.gz")
	r, result = importArchive(t, b.path("by-tag.tar.gz"), as(t, name))
	wantImported(t, r, result, name, want)
}

func TestRegctlReads(t *testing.T) {
	for _, format := range []ocilocal.ManifestFormat{ocilocal.FormatImageManifest, ocilocal.FormatArtifactManifest} {
		t.Run(format.String(), func(t *testing.T) {
			b := newBox(t)
			r := newRegistry(t)
			a := buildArtifact(t, r, artifactName, format, nil)
			want := a.Digest().String()
			dir := exportLayout(t, r, artifactName)
			wantEqual(t, "regctl tag ls", b.run("regctl", "tag", "ls", "ocidir://"+dir), "v1")
			wantEqual(t, "regctl manifest head", b.run("regctl", "manifest", "head", "ocidir://"+dir+":v1"), want)
			b.run("regctl", "image", "copy", "ocidir://"+dir+":v1", "ocidir://copy:v1")
			wantEqual(t, "regctl image copy", b.run("regctl", "manifest", "head", "ocidir://copy:v1"), want)
			back, result := importLayout(t, b.path("copy"), as(t, artifactName))
			wantImported(t, back, result, artifactName, want)
			wantEqual(t, "regctl artifact get", b.run("regctl", "artifact", "get", "--file", "part-1.txt", "ocidir://"+dir+":v1"), artifactName+" part 1")
			b.run("regctl", "image", "import", "--name", artifactName, "ocidir://imported:v1", export(t, r, artifactName))
			wantEqual(t, "regctl image import", b.run("regctl", "manifest", "head", "ocidir://imported:v1"), want)
		})
	}
}

// What is attached by us in a layout is found by oras and regctl.
func TestReferrersInLayout(t *testing.T) {
	b := newBox(t)
	r := newRegistry(t)
	subject := buildArtifact(t, r, artifactName, ocilocal.FormatImageManifest, nil).Descriptor()
	note := "ghcr.io/example/tools/artifact:note"
	want := buildArtifact(t, r, note, ocilocal.FormatImageManifest, &subject).Digest().String()
	dir := exportLayout(t, r, artifactName, note)
	got := b.run("oras", "discover", "--oci-layout", "--format", "go-template={{range .referrers}}{{.digest}}{{end}}", dir+"@"+subject.Digest.String())
	wantEqual(t, "oras discover", got, want)
}
