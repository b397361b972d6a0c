package ocilocal_test

import (
	"os"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestClimb: the manifests that need a digest lead to it, and with the ways also subjects and
// referrers. To a manifest without a file only manifests that need it lead.
func TestClimb(t *testing.T) {
	r := openTemp(t, nil)
	base := published(t, r, "example.com/base:v1", "base", nil)
	image := published(t, r, "example.com/image:v1", "image", base)
	signature := published(t, r, "example.com/signature:v1", "signature", image)
	for _, a := range []*ocilocal.LocalArtifact{base, signature} {
		if _, err := r.Remove(t.Context(), a.Reference()); err != nil {
			t.Fatal(err)
		}
	}
	check := func(what string, d digest.Digest, o ocilocal.ClimbOptions, want bool) {
		t.Helper()
		if led, err := ocilocal.Led(t.Context(), r, d, o); err != nil || led != want {
			t.Errorf("%s: %v, %v, want %v", what, led, err, want)
		}
	}
	none, subjects, both := ocilocal.ClimbOptions{}, ocilocal.ClimbOptions{Subjects: true}, ocilocal.ClimbOptions{Subjects: true, Referrers: true}
	check("layer of what has a ref", digest.FromString("image"), none, true)
	check("layer of its subject, by needs", digest.FromString("base"), none, false)
	check("layer of its subject", digest.FromString("base"), subjects, true)
	check("layer of its referrer", digest.FromString("signature"), subjects, false)
	check("layer of its referrer, if these are kept", digest.FromString("signature"), both, true)
	check("what is not here", digest.FromString("none"), both, false)
	check("all but its ref", digest.FromString("image"), ocilocal.ClimbOptions{Name: "example.com/image", Reference: "v1"}, false)
	check("all but its name's refs", digest.FromString("image"), ocilocal.ClimbOptions{Name: "example.com/image"}, false)
	check("all but another ref", digest.FromString("image"), ocilocal.ClimbOptions{Name: "example.com/image", Reference: "v2"}, true)

	all, err := ocilocal.LeadTo(t.Context(), r, digest.FromString("base"), subjects)
	want := []digest.Digest{digest.FromString("base"), base.Digest(), image.Digest(), signature.Digest()}
	if err != nil || !slices.Equal(all, want) {
		t.Errorf("%v, %v, want %v", all, err, want)
	}

	files := ocilocal.ClimbOptions{Subjects: true, Referrers: true, Files: true}
	check("with all files there", digest.FromString("base"), files, true)
	for _, a := range []*ocilocal.LocalArtifact{base, signature} {
		if err := os.Remove(blobFile(r, a.Digest())); err != nil {
			t.Fatal(err)
		}
	}
	dontWatch(r.Root())
	check("subject without a file", base.Digest(), files, false)
	check("layer of a subject without a file", digest.FromString("base"), files, false)
	check("layer of a referrer without a file", digest.FromString("signature"), files, false)
	check("what needs no such manifest", digest.FromString("image"), files, true)
	check("without looking at files", digest.FromString("base"), both, true)
	if err := os.Remove(blobFile(r, image.Digest())); err != nil {
		t.Fatal(err)
	}
	check("layer of a manifest that has a ref and no file", digest.FromString("image"), files, true)
}
