package ocilocal_test

import (
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// attached attaches a text to an artifact, as a referrer without a name.
func attached(t *testing.T, r *ocilocal.LocalRegistry, subject *ocilocal.LocalArtifact, text string) *ocilocal.LocalArtifact {
	t.Helper()
	b, err := r.NewReferrerBuilder(*descOf(subject), &ocilocal.BuilderOptions{ArtifactType: testType, Format: ocilocal.FormatImageManifest})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte(text), nil); err != nil {
		t.Fatal(err)
	}
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestReferrerBuilder attaches a referrer without a name to an artifact, lists it, and pushes it by
// digest and with its subject.
func TestReferrerBuilder(t *testing.T) {
	s := newServer(t)
	r := openRemote(t, nil)
	subject := pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 10))
	first, second := attached(t, r, subject, "one"), attached(t, r, subject, "two")
	if !first.Reference().IsZero() {
		t.Errorf("it is called %s", first.Reference())
	}
	n := 0
	for d, err := range r.Referrers(t.Context(), subject.Digest(), nil) {
		if err != nil || d.Digest != first.Digest() && d.Digest != second.Digest() {
			t.Errorf("%v, %v", d, err)
		}
		n++
	}
	if n != 2 {
		t.Errorf("%d referrers", n)
	}
	if _, err := r.Push(t.Context(), subject.Reference(), nil); err != nil {
		t.Fatal(err)
	}
	pinned, err := subject.Reference().WithDigest(first.Digest())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Push(t.Context(), pinned, nil); err != nil {
		t.Fatal(err)
	}
	if got, err := referrersOf(t, subject.Reference()); err != nil || len(got) != 1 || got[0] != first.Digest() {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true}); err != nil || len(got.Referrers) != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = r.NewReferrerBuilder(ocispec.Descriptor{}, nil)
	mustFail(t, err, ocilocal.ErrInvalidManifest)
	_, err = r.NewReferrerBuilder(*descOf(subject), &ocilocal.BuilderOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}})
	mustFail(t, err, ocilocal.ErrInvalidArgument)
}

// TestGCKeepsReferrers: a collection keeps a referrer that Build has acknowledged as long as its
// subject. An option drops it.
func TestGCKeepsReferrers(t *testing.T) {
	r := openTemp(t, nil)
	image := published(t, r, "example.com/image:v1", "image", nil)
	signature := attached(t, r, image, "signature")
	stamp := attached(t, r, signature, "stamp")
	kept := func(opts *ocilocal.GCOptions, want bool) {
		t.Helper()
		collect(t, r, opts)
		for _, a := range []*ocilocal.LocalArtifact{signature, stamp} {
			if _, err := r.LoadDigest(t.Context(), a.Digest()); (err == nil) != want {
				t.Errorf("%+v: %v", opts, err)
			}
		}
	}
	kept(atOnce, true)
	kept(&ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: true}, false)
	signature = attached(t, r, image, "signature")
	stamp = attached(t, r, signature, "stamp")
	if _, err := r.Remove(t.Context(), image.Reference()); err != nil {
		t.Fatal(err)
	}
	kept(atOnce, false)
	mustClose(t, r)
	checkCollected(t, r.Root(), model{})
}
