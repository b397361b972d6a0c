package ocilocal_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func TestRefsPages(t *testing.T) {
	ctx := context.Background()
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/x/y:v0", nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"example.com/x/y:v1", "example.com/x/y-z:v1", "example.com/x/y/z:v1", "example.org/a:v1"} {
		if _, err := r.Tag(ctx, a.Digest(), ocilocal.MustParseReference(s), nil); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"example.com/x/y:v0", "example.com/x/y:v1", "example.com/x/y-z:v1", "example.com/x/y/z:v1", "example.org/a:v1"}
	for name, c := range map[string]struct {
		opts *ocilocal.ListOptions
		want []string
	}{
		"all":          {nil, want},
		"name":         {&ocilocal.ListOptions{Name: "example.com/x/y"}, want[:2]},
		"prefix":       {&ocilocal.ListOptions{Prefix: "example.com/x/"}, want[:4]},
		"prefix limit": {&ocilocal.ListOptions{Prefix: "example.com/x/", Limit: 3}, want[:3]},
		"after":        {&ocilocal.ListOptions{After: ocilocal.MustParseReference(want[1])}, want[2:]},
		"both":         {&ocilocal.ListOptions{Name: "example.com/x/y", Prefix: "example.org"}, nil},
		"none":         {&ocilocal.ListOptions{Name: "example.com/x"}, nil},

		"prefix that is a name":      {&ocilocal.ListOptions{Prefix: "example.com/x/y"}, want[:4]},
		"prefix with half a name":    {&ocilocal.ListOptions{Prefix: "exam"}, want},
		"prefix beyond all":          {&ocilocal.ListOptions{Prefix: "~"}, nil},
		"prefix in capitals":         {&ocilocal.ListOptions{Prefix: "EXAMPLE"}, nil},
		"prefix with a tag":          {&ocilocal.ListOptions{Prefix: "example.com/x/y:v"}, nil},
		"prefix with wild cards":     {&ocilocal.ListOptions{Prefix: "ex_mple%"}, nil},
		"prefix NUL":                 {&ocilocal.ListOptions{Prefix: "\x00"}, nil},
		"prefix not ASCII":           {&ocilocal.ListOptions{Prefix: "é"}, nil},
		"prefix not UTF-8":           {&ocilocal.ListOptions{Prefix: "\xff"}, nil},
		"prefix of a megabyte":       {&ocilocal.ListOptions{Prefix: strings.Repeat("e", 1<<20)}, nil},
		"name in its prefix":         {&ocilocal.ListOptions{Name: "example.com/x/y", Prefix: "example.com/"}, want[:2]},
		"after before the prefix":    {&ocilocal.ListOptions{Prefix: "example.org", After: ocilocal.MustParseReference("a.test/a:v1")}, want[4:]},
		"after beyond the prefix":    {&ocilocal.ListOptions{Prefix: "example.com", After: ocilocal.MustParseReference("example.net/a:v1")}, nil},
		"after within the prefix":    {&ocilocal.ListOptions{Prefix: "example.com/x/", After: ocilocal.MustParseReference(want[1])}, want[2:4]},
		"after, not there":           {&ocilocal.ListOptions{After: ocilocal.MustParseReference("example.com/x/y:v00")}, want[1:]},
		"after within the name":      {&ocilocal.ListOptions{Name: "example.com/x/y", After: ocilocal.MustParseReference(want[0])}, want[1:2]},
		"after beyond the name":      {&ocilocal.ListOptions{Name: "example.com/x/y", After: ocilocal.MustParseReference("example.com/x/y:zz")}, nil},
		"after a tag with digest":    {&ocilocal.ListOptions{After: ocilocal.MustParseReference(want[3] + "@" + a.Digest().String())}, want[4:]},
		"after a digest":             {&ocilocal.ListOptions{After: ocilocal.MustParseReference("example.com/x/y@" + a.Digest().String())}, want},
		"after the last":             {&ocilocal.ListOptions{After: ocilocal.MustParseReference(want[4])}, nil},
		"negative limit":             {&ocilocal.ListOptions{Limit: -1}, want},
		"limit beyond the end":       {&ocilocal.ListOptions{Limit: 6}, want},
		"prefix, name, after, limit": {&ocilocal.ListOptions{Prefix: "e", Name: "example.com/x/y", After: ocilocal.MustParseReference(want[0]), Limit: 5}, want[1:2]},
	} {
		var got []string
		for ref, err := range r.Refs(ctx, c.opts) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, ref.Reference.String())
		}
		if strings.Join(got, " ") != strings.Join(c.want, " ") {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestDigestReferences(t *testing.T) {
	ctx := context.Background()
	r := openTemp(t, nil)
	a, err := build(t, r, "example.com/a:v1", nil, "x")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"example.com/a@" + a.Digest().String(), "example.com/a:v1@" + a.Digest().String()} {
		if d, err := r.Resolve(ctx, ocilocal.MustParseReference(s)); err != nil || d.Digest != a.Digest() {
			t.Errorf("%s: %v, %v", s, d, err)
		}
	}
	none := digest.FromString("none")
	if _, err := r.Resolve(ctx, ocilocal.MustParseReference("example.com/a:v1@"+none.String())); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	if _, err := r.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/a@"+none.String()), nil); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Error(err)
	}
	if u, err := r.Tag(ctx, a.Digest(), ocilocal.MustParseReference("example.com/b@"+a.Digest().String()), nil); err != nil || u.Outcome != ocilocal.Inserted {
		t.Error(u, err)
	}
}
