package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func TestOpenBlobFile(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	body := noise(6, 2<<20)
	_, layer := oneLayer(t, r, "example.com/a:v1", body)
	f, err := r.OpenBlobFile(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Size() != int64(len(body)) {
		t.Errorf("size %d", f.Size())
	}
	if err := iotest.TestReader(f, body); err != nil {
		t.Error(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			p := make([]byte, 1000)
			off := int64(i * 200_000)
			if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, body[off:off+1000]) {
				t.Errorf("ReadAt %d: %v", off, err)
			}
		})
	}
	wg.Wait()
	if off, err := f.Seek(-10, io.SeekEnd); err != nil || off != f.Size()-10 {
		t.Error(off, err)
	}
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, body[len(body)-10:]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if n, err := f.ReadAt(make([]byte, 5), f.Size()-2); n != 2 || err != io.EOF {
		t.Error(n, err)
	}
}

func TestReaderOutlivesFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("an open file can't be deleted there")
	}
	r := openTemp(t, nil)
	body := noise(7, 3<<20)
	_, layer := oneLayer(t, r, "example.com/a:v1", body)
	src, err := r.OpenBlob(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	f, err := r.OpenBlobFile(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(blobFile(r, layer.Digest)); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	if b, err := io.ReadAll(src); err != nil || !bytes.Equal(b, body) {
		t.Errorf("OpenBlob: %d bytes, %v", len(b), err)
	}
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, body) {
		t.Errorf("OpenBlobFile: %d bytes, %v", len(b), err)
	}
}

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
