package ocilocal_test

import (
	"fmt"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestRepositorySharedBlob: very many artifacts of another repository need the same blob. A
// repository shows it only if its own content needs it, through an image index or through a
// referrer without a name.
func TestRepositorySharedBlob(t *testing.T) {
	r := openTemp(t, nil)
	other, p, none := repository(t, r, "localhost/other"), repository(t, r, "localhost/app"), repository(t, r, "localhost/none")
	for i := range 250 {
		manifest, config := image(fmt.Sprint("layer ", i))
		push(t, other, manifest, config, fmt.Sprint("layer ", i))
	}
	desc := pushImage(t, p, "", "of this one")
	index := push(t, p, imageIndexOf(jsonOf(desc)))
	if err := p.Tag(t.Context(), index, "v1"); err != nil {
		t.Fatal(err)
	}
	collect(t, r, &ocilocal.GCOptions{Held: -1, Grace: 0}) // no blob is held any more
	execIndex(t, r.Root(), "DELETE FROM holds WHERE name = 'localhost/app'")
	for p, want := range map[*ocilocal.Repository]bool{p: true, none: false} {
		if ok, err := p.Exists(t.Context(), blobOf("{}")); ok != want || err != nil {
			t.Errorf("%s: %v, %v", p.Name(), ok, err)
		}
	}
	execIndex(t, r.Root(), "DELETE FROM refs WHERE name = 'localhost/app'")
	if ok, err := p.Exists(t.Context(), blobOf("{}")); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	subject, err := r.NewBuilder(ref("localhost/app:v2"), &ocilocal.BuilderOptions{ArtifactType: testType, Format: ocilocal.FormatArtifactManifest})
	if err != nil {
		t.Fatal(err)
	}
	built, err := subject.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	referrer, err := r.NewReferrerBuilder(built.Descriptor(), &ocilocal.BuilderOptions{ArtifactType: testType, Format: ocilocal.FormatImageManifest})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := referrer.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	if ok, err := p.Exists(t.Context(), blobOf("{}")); !ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
}

// TestRepositoryLongLineage: a chain of referrers without a name is longer than a search goes up. The
// repository shows the last one by its subject, like the first one. Another repository does not.
func TestRepositoryLongLineage(t *testing.T) {
	r := openTemp(t, nil)
	p, none := repository(t, r, "localhost/app"), repository(t, r, "localhost/none")
	last := pushImage(t, p, "v1", "image")
	manifest, config := image("layer")
	push(t, p, manifest, config, "layer")
	var chain []ocispec.Descriptor
	for range 210 {
		last = push(t, p, referring(manifest, last))
		chain = append(chain, last)
	}
	execIndex(t, r.Root(), "DELETE FROM holds")
	showsManifests(t, p, true, chain...)
	showsManifests(t, none, false, chain...)
	n := 0
	for _, err := range p.Referrers(t.Context(), chain[208].Digest, nil) {
		if n++; err != nil {
			t.Error(err)
		}
	}
	if n != 1 {
		t.Errorf("the last but one has %d referrers", n)
	}
}
