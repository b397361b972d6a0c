package ocilocal_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func TestRepositories(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	for i := range 1030 { // more than two pages
		if i < 1027 {
			if _, err := build(t, r, fmt.Sprintf("example.com/many/r%04d:v1", i), nil, "layer"); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, ref := range []string{"example.com/a:v1", "example.com/a:v2", "example.com/a-b:v1", "example.net/z:v"} {
		if _, err := build(t, r, ref, nil, "layer"); err != nil {
			t.Fatal(err)
		}
	}
	list := func(o *ocilocal.ListOptions) []string {
		t.Helper()
		var names []string
		for name, err := range r.Repositories(t.Context(), o) {
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
		}
		return names
	}
	if all := list(nil); len(all) != 1030 || !slices.IsSorted(all) || len(slices.Compact(slices.Clone(all))) != 1030 {
		t.Errorf("%d names", len(all))
	}
	for _, c := range []struct {
		o    ocilocal.ListOptions
		want []string
	}{
		{ocilocal.ListOptions{Limit: 2}, []string{"example.com/a", "example.com/a-b"}},
		{ocilocal.ListOptions{Prefix: "example.net/"}, []string{"example.net/z"}},
		{ocilocal.ListOptions{Prefix: "example.com/a"}, []string{"example.com/a", "example.com/a-b"}},
		{ocilocal.ListOptions{Name: "example.com/a"}, []string{"example.com/a"}},
		{ocilocal.ListOptions{Name: "example.com/none"}, nil},
		{ocilocal.ListOptions{After: ocilocal.MustParseReference("example.com/a:v1"), Limit: 1}, []string{"example.com/a-b"}},
		{ocilocal.ListOptions{After: ocilocal.MustParseReference("example.com/many/r1026:v1")}, []string{"example.net/z"}},
	} {
		if got := list(&c.o); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %q, want %q", c.o, got, c.want)
		}
	}
	for range r.Repositories(t.Context(), nil) {
		break
	}
}
