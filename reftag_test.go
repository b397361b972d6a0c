package ocilocal_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestRemoveTagAndDigest: a reference with a tag and a digest names the ref only while the ref
// points at that digest. Otherwise nothing is removed.
func TestRemoveTagAndDigest(t *testing.T) {
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/a:v1", nil, "one")
	if err != nil {
		t.Fatal(err)
	}
	other, err := build(t, r, "example.com/a:v2", nil, "two")
	if err != nil {
		t.Fatal(err)
	}
	both := []string{"example.com/a:v1", "example.com/a:v2"}
	for _, d := range []digest.Digest{other.Digest(), digest.FromString("absent")} {
		removed, err := r.Remove(t.Context(), ref("example.com/a:v1@"+d.String()))
		if !errors.Is(err, ocilocal.ErrNotFound) || !removed.Reference.IsZero() || removed.Descriptor.Digest != "" {
			t.Errorf("%+v, %v", removed, err)
		}
		if refs, err := refsOf(r); err != nil || !slices.Equal(refs, both) {
			t.Errorf("%q, %v", refs, err)
		}
		if got, err := r.Resolve(t.Context(), ref("example.com/a:v1")); err != nil || got.Digest != a.Digest() {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if removed, err := r.Remove(t.Context(), ref("example.com/a:v1@"+a.Digest().String())); err != nil || removed.Descriptor.Digest != a.Digest() {
		t.Errorf("%+v, %v", removed, err)
	}
	if refs, err := refsOf(r); err != nil || !slices.Equal(refs, both[1:]) {
		t.Errorf("%q, %v", refs, err)
	}
}

// TestExpectedAbsent: if Expected is set and the ref does not exist, that is a conflict under every
// policy and for every call that writes a ref. Nothing is published.
func TestExpectedAbsent(t *testing.T) {
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/a:v1", nil, "one")
	if err != nil {
		t.Fatal(err)
	}
	absent := ref("example.com/absent:v1")
	for _, policy := range []ocilocal.Policy{ocilocal.KeepExisting, ocilocal.Replace} {
		o := ocilocal.PublishOptions{Policy: policy, Expected: a.Digest()}
		check := func(call string, err error) {
			t.Helper()
			c, ok := errors.AsType[*ocilocal.ConflictError](err)
			if !ok || c.Existing != "" || c.Expected != a.Digest() || c.Reference.Compare(absent) != 0 {
				t.Errorf("%s: %v", call, err)
			}
			if refs, err := refsOf(r); err != nil || !slices.Equal(refs, []string{"example.com/a:v1"}) {
				t.Errorf("%s: %q, %v", call, refs, err)
			}
		}
		u, err := r.Tag(t.Context(), a.Digest(), absent, &o)
		if check("Tag", err); u.Outcome != ocilocal.Conflicted {
			t.Errorf("Tag: %+v", u)
		}
		b, err := r.NewBuilder(absent, &ocilocal.BuilderOptions{ArtifactType: testType, PublishOptions: o})
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Build(t.Context())
		if check("Build", err); b.Update().Outcome != ocilocal.Conflicted {
			t.Errorf("Build: %+v", b.Update())
		}
		if err := b.Cancel(); err != nil {
			t.Error(err)
		}
		_, err = r.Convert(t.Context(), a.Reference(), absent, &ocilocal.ConvertOptions{PublishOptions: o})
		check("Convert", err)
	}
}
