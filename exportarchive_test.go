package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func TestExportArchiveFile(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	one := published(t, r, "example.com/a:v1", "one", nil)
	refs := []ocilocal.Reference{one.Reference()}
	dir := t.TempDir()
	name := filepath.Join(dir, "a.tar")
	if err := r.ExportArchiveFile(ctx, name, refs, nil); err != nil {
		t.Fatal(err)
	}
	first := tree(t, dir)
	if err := r.ExportArchiveFile(ctx, name, refs, nil); !errors.Is(err, ocilocal.ErrExists) || !errors.Is(err, fs.ErrExist) {
		t.Fatalf("over an existing file: %v", err)
	}
	if err := r.ExportArchiveFile(ctx, name, []ocilocal.Reference{ref("example.com/nothing:v1")}, &ocilocal.ExportOptions{Overwrite: true}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Fatal(err)
	}
	if !maps.Equal(first, tree(t, dir)) {
		t.Error("a failed export changed something")
	}
	// A link in its place is refused, or replaced, never followed.
	victim, link := filepath.Join(dir, "victim"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(victim, []byte("keep"), 0o644), os.Symlink(victim, link)); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(ctx, link, refs, nil); !errors.Is(err, ocilocal.ErrExists) {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(ctx, link, refs, &ocilocal.ExportOptions{Overwrite: true}); err != nil {
		t.Fatal(err)
	}
	got := tree(t, dir)
	if got["victim"] != "keep" || got["link"] != got["a.tar"] || len(got) != 3 {
		t.Errorf("%d files, victim %q", len(got), got["victim"])
	}
	// A blob that is damaged leaves no file.
	layer := filepath.Join(r.Root(), "blobs", "sha256", digest.FromString("one").Encoded())
	if err := errors.Join(os.Chmod(layer, 0o644), os.WriteFile(layer, []byte("eno"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(ctx, filepath.Join(dir, "b.tar"), refs, nil); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Fatal(err)
	}
	if !maps.Equal(got, tree(t, dir)) {
		t.Error("a failed export left something")
	}
}

// TestExportsCancelled cancels an export while it writes a large layer. It stops soon, and leaves
// no file.
func TestExportsCancelled(t *testing.T) {
	t.Parallel()
	const size = 64 << 20
	r := openTemp(t, nil)
	a := pushed(t, r, ref("example.com/large:v1"), nil, nil, make([]byte, size))
	refs := []ocilocal.Reference{a.Reference()}
	// Which write is in the midst of the layer, and how many more there may be, of 16, 64 and some
	// 300.
	writesOf := map[string]struct{ at, most int64 }{"layout": {6, 1}, "archive": {20, 1}, "gzip": {20, 40}}
	for name, export := range map[string]func(ctx context.Context, dir string) error{
		"layout": func(ctx context.Context, dir string) error {
			return r.ExportLayout(ctx, filepath.Join(dir, "layout"), refs, nil)
		},
		"archive": func(ctx context.Context, dir string) error {
			return r.ExportArchiveFile(ctx, filepath.Join(dir, "a.tar"), refs, nil)
		},
		"gzip": func(ctx context.Context, dir string) error {
			return r.ExportArchiveFile(ctx, filepath.Join(dir, "a.tar.gz"), refs, &ocilocal.ExportOptions{Gzip: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var writes, after atomic.Int64
			ocilocal.SetFault(r, func(op, _ string) error {
				switch {
				case op == "write" && ctx.Err() != nil:
					after.Add(1)
				case op == "write" && writes.Add(1) == writesOf[name].at:
					cancel()
				}
				return nil
			})
			defer ocilocal.SetFault(r, nil)
			if err := export(ctx, dir); !errors.Is(err, context.Canceled) {
				t.Errorf("%v, want context.Canceled", err)
			}
			if n := after.Load(); n > writesOf[name].most {
				t.Errorf("%d more writes", n)
			}
			for file := range tree(t, dir) {
				t.Errorf("left: %s", file)
			}
		})
	}
}

// TestArchiveBytes: the index comes before the blobs in an archive, and headers have no times,
// owners or paths of the machine. Other releases write the same bytes.
func TestArchiveBytes(t *testing.T) {
	r := openTemp(t, nil)
	a := pushed(t, r, ref("example.com/a:v1"), nil, nil, []byte("one"), []byte("two"))
	var out bytes.Buffer
	if err := r.ExportArchive(t.Context(), &out, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	const golden = "sha256:4974750d8a06d18f930be056e3a80ab5d39b3e968df3dde4a645852454a09f59"
	if d := digest.FromBytes(out.Bytes()); d != golden {
		t.Errorf("%s, want %s", d, golden)
	}
	checkHead := func(h *tar.Header, format tar.Format) {
		t.Helper()
		if h.Typeflag != tar.TypeReg || h.Mode != 0o444 || !h.ModTime.Equal(time.Unix(0, 0)) || !h.AccessTime.IsZero() || !h.ChangeTime.IsZero() ||
			h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || h.Format != format {
			t.Errorf("%+v", h)
		}
	}
	var names []string
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		checkHead(h, tar.FormatUSTAR)
		names = append(names, h.Name)
	}
	manifest := "blobs/sha256/" + a.Digest().Encoded()
	if len(names) != 6 || names[0] != "oci-layout" || names[1] != "index.json" || names[2] != manifest || !slices.IsSorted(names[3:]) {
		t.Errorf("%q", names)
	}
	// From 8 GiB on a size takes a PAX record.
	for size, format := range map[int64]tar.Format{8<<30 - 1: tar.FormatUSTAR, 8 << 30: tar.FormatPAX} {
		out.Reset()
		tw := tar.NewWriter(&out)
		if err := ocilocal.WriteEntry(tw, manifest, strings.NewReader("its beginning"), size); err != nil {
			t.Fatal(err)
		}
		h, err := tar.NewReader(&out).Next()
		if err != nil || h.Size != size || h.Name != manifest {
			t.Fatalf("%+v, %v", h, err)
		}
		checkHead(h, format)
	}
}

func TestExportLineage(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:v1", "one", nil)
	b := published(t, r, "example.com/a:v2", "two", a)
	c := published(t, r, "example.com/a:v3", "three", b)
	if _, err := r.Remove(ctx, b.Reference()); err != nil {
		t.Fatal(err)
	}
	for _, zip := range []bool{false, true} {
		var archives [2]bytes.Buffer
		for i, refs := range [][]ocilocal.Reference{{c.Reference(), a.Reference()}, {a.Reference(), c.Reference(), c.Reference()}} {
			if err := r.ExportArchive(ctx, &archives[i], refs, &ocilocal.ExportOptions{Lineage: true, Gzip: zip}); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(archives[0].Bytes(), archives[1].Bytes()) {
			t.Error("equal content, other bytes")
		}
		if zip != bytes.HasPrefix(archives[0].Bytes(), []byte{0x1f, 0x8b}) {
			t.Error("gzip or not is mixed up")
		}
		to := openTemp(t, nil)
		if _, err := to.ImportArchive(ctx, &archives[0], nil); err != nil {
			t.Fatal(err)
		}
		for _, want := range []*ocilocal.LocalArtifact{a, b, c} {
			if _, err := to.LoadDigest(ctx, want.Digest()); err != nil {
				t.Error(err)
			}
		}
		if ok, err := to.Exists(ctx, b.Reference()); ok || err != nil {
			t.Error("a name came from nowhere", err)
		}
	}
	// By digest, without a name, and without the lineage.
	var out bytes.Buffer
	if err := r.ExportArchive(ctx, &out, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{c.Digest()}}); err != nil {
		t.Fatal(err)
	}
	in, err := ocilocal.InspectArchive(ctx, &out)
	if err != nil || len(in.Entries) != 1 || in.Entries[0].Name != "" || in.Blobs != 3 {
		t.Errorf("%+v %v", in, err)
	}
	// A gap in the chain is an error.
	to := openTemp(t, nil)
	out.Reset()
	if err := r.ExportArchive(ctx, &out, []ocilocal.Reference{c.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := to.ImportArchive(ctx, &out, nil); err != nil {
		t.Fatal(err)
	}
	if err := to.ExportArchive(ctx, io.Discard, []ocilocal.Reference{c.Reference()}, &ocilocal.ExportOptions{Lineage: true}); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("lineage with a gap: %v", err)
	}
}

func TestArchiveRoundTrip(t *testing.T) {
	ctx := context.Background()
	from, to := openTemp(t, nil), openTemp(t, nil)
	var refs []ocilocal.Reference
	for _, s := range []string{"example.com/b:v1", "example.com/a:v1", "docker.io/library/c:v1"} {
		if _, err := build(t, from, s, &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest}, "shared", s); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ocilocal.MustParseReference(s))
	}
	var first, second bytes.Buffer
	if err := from.ExportArchive(ctx, &first, refs, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := to.ImportArchive(ctx, bytes.NewReader(first.Bytes()), nil); err != nil {
		t.Fatal(err)
	}
	refs[0], refs[2] = refs[2], refs[0]
	if err := to.ExportArchive(ctx, &second, refs, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("a round trip changed the archive")
	}
}
