package ocilocal_test

import (
	"errors"
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

// TestRepositoryManifestAsBlob: the bytes of another repository's manifest are a blob like any other.
// A client that puts them as one, and names them as a layer, gets nothing that the manifest needs, and
// cannot use it as a manifest.
func TestRepositoryManifestAsBlob(t *testing.T) {
	r := openTemp(t, nil)
	private, p := repository(t, r, "localhost/private"), repository(t, r, "localhost/app")
	inner, config := image("secret")
	push(t, private, inner, config, "secret")
	for i := range 250 { // for a search that goes down
		manifest, config := image(fmt.Sprint("layer ", i))
		if i == 1 {
			checkNotShared(t, p, inner)
		}
		push(t, private, manifest, config, fmt.Sprint("layer ", i), "secret")
	}
	checkNotShared(t, p, inner)
	// Put as a manifest, with all that it needs, it is one.
	push(t, p, inner, config, "secret")
	checkShown(t, p, true, inner, config, "secret")
	showsManifests(t, p, true, manifestOf(inner))
	// It can be deleted then, and is a blob again, which is still needed.
	if err := p.DeleteManifest(t.Context(), manifestOf(inner).Digest); err != nil {
		t.Error(err)
	}
	showsManifests(t, p, false, manifestOf(inner))
	mustFail(t, p.DeleteBlob(t.Context(), manifestOf(inner).Digest), ocilocal.ErrInUse)
	collect(t, r, atOnce)
	outer, _ := image(inner)
	checkShown(t, p, true, outer, config, inner)
}

// checkNotShared puts the bytes of a manifest into p as a blob. They must be a blob there and nothing
// else, and "secret", which the manifest needs, must not be there.
func checkNotShared(t *testing.T, p *ocilocal.Repository, inner string) {
	t.Helper()
	outer, config := image(inner)
	push(t, p, outer, config, inner)
	if text, err := fetched(p, blobOf(inner)); text != inner || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	if ok, err := p.Exists(t.Context(), blobOf("secret")); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	showsManifests(t, p, false, manifestOf(inner))
	mustFail(t, p.Tag(t.Context(), manifestOf(inner), "v1"), ocilocal.ErrNotFound)
	_, err := p.PutManifest(t.Context(), "", []byte(imageIndexOf(jsonOf(manifestOf(inner)))), nil)
	mustFail(t, err, ocilocal.ErrIncomplete)
	if _, err := p.Resolve(t.Context(), manifestOf(inner).Digest.String()); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	mustFail(t, p.DeleteManifest(t.Context(), manifestOf(inner).Digest), ocilocal.ErrNotFound)
}
