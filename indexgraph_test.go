package ocilocal_test

import (
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestRepositoryPredecessors: an image index and referrers lead to a manifest, as far as the
// repository shows them. A referrer that was built without a name is shown with its subject.
func TestRepositoryPredecessors(t *testing.T) {
	r := openTemp(t, nil)
	p, other := repository(t, r, "localhost/app"), repository(t, r, "localhost/other")
	desc := pushImage(t, p, "v1", "layer")
	pushImage(t, other, "v1", "layer")
	index := push(t, p, imageIndexOf(jsonOf(desc)))
	manifest, config := image("signature")
	signature := push(t, p, referring(manifest, desc), config, "signature")
	b, err := r.NewReferrerBuilder(desc, &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	built, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	check := func(p *ocilocal.Repository, d ocispec.Descriptor, want ...digest.Digest) {
		t.Helper()
		found, err := p.Predecessors(t.Context(), d)
		var got []digest.Digest
		for _, d := range found {
			got = append(got, d.Digest)
		}
		slices.Sort(got)
		slices.Sort(want)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v, want %q", p.Name(), got, err, want)
		}
	}
	check(p, desc, index.Digest, signature.Digest, built.Digest())
	check(other, desc, built.Digest())
	check(p, blobOf("layer"), desc.Digest)
	check(p, index)
	mustFail(t, p.DeleteManifest(t.Context(), desc.Digest), ocilocal.ErrInUse)
	// A collection keeps referrers, so DeleteManifest must do more than remove refs.
	if err := p.DeleteManifest(t.Context(), signature.Digest); err != nil {
		t.Fatal(err)
	}
	check(p, desc, index.Digest, built.Digest())
	if err := p.DeleteManifest(t.Context(), built.Digest()); err != nil {
		t.Fatal(err)
	}
	check(other, desc)
	if err := p.DeleteManifest(t.Context(), index.Digest); err != nil {
		t.Fatal(err)
	}
	check(p, desc)
	if _, err := p.Resolve(t.Context(), "v1"); err != nil {
		t.Error(err)
	}
}
