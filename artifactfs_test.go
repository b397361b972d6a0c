package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// titled builds an artifact with layers, given as pairs of title and content. "" means no title.
func titled(t testing.TB, r *ocilocal.LocalRegistry, ref string, pairs ...string) *ocilocal.LocalArtifact {
	t.Helper()
	b, err := r.NewBuilder(ocilocal.MustParseReference(ref), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	for p := range slices.Chunk(pairs, 2) {
		var annotations map[string]string
		if p[0] != "" {
			annotations = map[string]string{ocispec.AnnotationTitle: p[0]}
		}
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte(p[1]), annotations); err != nil {
			t.Fatal(err)
		}
	}
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func viewOf(t testing.TB, a *ocilocal.LocalArtifact) fs.FS {
	t.Helper()
	view, err := a.FS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return view
}

// files returns "path=content" for each file of the tree.
func files(t testing.TB, view fs.FS) (all []string) {
	t.Helper()
	err := fs.WalkDir(view, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(view, name)
		all = append(all, name+"="+string(b))
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return all
}

// TestFS reads the tree of an artifact's layers: by their titles, and by digest without one.
func TestFS(t *testing.T) {
	r := openTemp(t, nil)
	a := titled(t, r, "example.com/app:v1", "config.json", "{}", "bin/tool", "run", "bin/lib/one.so", "1", "bin-two", "2", "", "untitled")
	view := viewOf(t, a)
	untitled := digest.FromString("untitled").String()
	if err := fstest.TestFS(view, "config.json", "bin/tool", "bin/lib/one.so", "bin-two", untitled); err != nil {
		t.Error(err)
	}
	want := []string{"bin/lib/one.so=1", "bin/tool=run", "bin-two=2", "config.json={}", untitled + "=untitled"}
	got := files(t, view)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	info, err := fs.Stat(view, "config.json")
	if err != nil {
		t.Fatal(err)
	}
	if desc, ok := info.Sys().(ocispec.Descriptor); !ok || desc.Digest != digest.FromString("{}") || info.Mode() != 0o444 || info.Size() != 2 {
		t.Errorf("config.json is %v %v", info, info.Sys())
	}
	for _, name := range []string{"none", "config.json/none", "bin/none", "conf", "bi", untitled + "/x"} {
		if _, err := view.Open(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"/bin", "../x", "bin/", "", "bin//tool"} {
		if _, err := view.Open(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := fs.ReadDir(view, "config.json"); err == nil {
		t.Error("a file is listed")
	}
	if _, err := fs.ReadFile(view, "bin"); err == nil {
		t.Error("a directory is read")
	}
}

// TestFSTitles: with any titles, each layer is in the tree, and no name occurs twice.
func TestFSTitles(t *testing.T) {
	r := openTemp(t, nil)
	d := func(s string) string { return digest.FromString(s).String() }
	for i, test := range []struct{ pairs, want []string }{
		{[]string{"same", "1", "same", "2"}, []string{"same=1", d("2") + "=2"}},
		{[]string{"a", "1", "a/b", "2"}, []string{d("1") + "=1", "a/b=2"}},
		{[]string{"a/b", "2", "a", "1"}, []string{d("1") + "=1", "a/b=2"}},
		{[]string{"a/b/c", "3", "a", "1", "a/b", "2"}, []string{"a/b/c=3", d("1") + "=1", d("2") + "=2"}},
		{[]string{"../up", "1", "/abs", "2", ".", "3", "a/../b", "4", "a//b", "5", "dir/", "6"}, []string{
			d("1") + "=1", d("2") + "=2", d("3") + "=3", d("4") + "=4", d("5") + "=5", d("6") + "=6"}},
		{[]string{`a\b`, "1", "a\x00b", "2", "a\nb", "3", "\u202eevil", "4", strings.Repeat("a/", 4000) + "a", "5"}, []string{
			d("1") + "=1", d("2") + "=2", d("3") + "=3", d("4") + "=4", d("5") + "=5"}},
		{[]string{"with space.txt", "1", "表.csv", "2", "C:", "3"}, []string{"with space.txt=1", "表.csv=2", "C:=3"}},
		// A title can't be the digest of another layer.
		{[]string{d("2"), "1", "", "2"}, []string{d("1") + "=1", d("2") + "=2"}},
		{[]string{d("2") + "/x", "1", "", "2"}, []string{d("1") + "=1", d("2") + "=2"}},
		{[]string{"x", "1", "", "1", "", "1"}, []string{"x=1", d("1") + "=1"}},
		{nil, []string{ocilocal.EmptyJSON.Digest.String() + "={}"}}, // an image manifest has a layer at least
	} {
		view := viewOf(t, titled(t, r, fmt.Sprintf("example.com/titles:%d", i), test.pairs...))
		got := files(t, view)
		slices.Sort(got)
		slices.Sort(test.want)
		if !slices.Equal(got, test.want) {
			t.Errorf("%.100q: got %q, want %q", test.pairs, got, test.want)
		}
		var names []string
		for _, f := range got {
			name, _, _ := strings.Cut(f, "=")
			names = append(names, name)
		}
		if err := fstest.TestFS(view, names...); err != nil {
			t.Errorf("%.100q: %v", test.pairs, err)
		}
	}
}

// TestFSOfManyDirectories: directories are not stored, so a manifest of 4 MiB can't make millions
// of them.
func TestFSOfManyDirectories(t *testing.T) {
	r := openTemp(t, nil)
	var pairs []string
	for i := range 900 {
		pairs = append(pairs, fmt.Sprintf("%d/%s", i, strings.Repeat("d/", 1900)+"f"), "x")
	}
	view := viewOf(t, titled(t, r, "example.com/deep:v1", pairs...))
	if got, err := fs.ReadDir(view, "."); err != nil || len(got) != 900 {
		t.Error(len(got), err)
	}
	if b, err := fs.ReadFile(view, pairs[0]); string(b) != "x" {
		t.Error(b, err)
	}
}

// TestFSFile reads, seeks in and closes a file of the tree. Damage is found in each way.
func TestFSFile(t *testing.T) {
	r := openTemp(t, nil)
	content := strings.Repeat("0123456789", 50_000)
	a := titled(t, r, "example.com/app:v1", "numbers", content)
	view := viewOf(t, a)
	open := func() fs.File {
		t.Helper()
		f, err := view.Open("numbers")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	// Reading goes on at the same place when the stream becomes a file.
	f := open()
	first := make([]byte, 13)
	if _, err := io.ReadFull(f, first); err != nil {
		t.Error(err)
	}
	at := make([]byte, 5)
	if n, err := f.(io.ReaderAt).ReadAt(at, 499_998); n != 2 || err != io.EOF || string(at[:n]) != "89" {
		t.Error(n, err, at)
	}
	if rest, err := io.ReadAll(f); err != nil || string(first)+string(rest) != content {
		t.Error(len(rest), err)
	}
	if n, err := f.(io.Seeker).Seek(-3, io.SeekEnd); n != 499_997 || err != nil {
		t.Error(n, err)
	}
	if rest, err := io.ReadAll(f); err != nil || string(rest) != "789" {
		t.Error(rest, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	for _, err := range []error{f.Close(), readErr(f), seekErr(f)} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Error("after Close:", err)
		}
	}
	// A damaged file is never read as the layer.
	rewrite(t, blobFile(r, digest.FromString(content)), flipBit)
	if _, err := io.ReadAll(open()); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Error(err)
	}
	if err := seekErr(open()); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Error(err)
	}
	if _, err := fs.ReadFile(view, "numbers"); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Error(err)
	}
}

func readErr(f fs.File) error { _, err := f.Read(make([]byte, 1)); return err }
func seekErr(f fs.File) error { _, err := f.(io.Seeker).Seek(0, io.SeekStart); return err }

// TestRegistryFS walks the tree of a whole registry. The path of an artifact is its reference.
func TestRegistryFS(t *testing.T) {
	r := openTemp(t, nil)
	view := r.FS(t.Context())
	if err := fstest.TestFS(view); err != nil {
		t.Error("empty:", err)
	}
	titled(t, r, "example.com/app:v1", "a/b", "1")
	a := titled(t, r, "example.com/app:v2", "c", "2")
	titled(t, r, "example.com/app/part:v1", "d", "3")
	titled(t, r, "example.com/app-two:v1", "e", "4")
	titled(t, r, "example.com/deep/er/app:v1", "f", "5")
	titled(t, r, "localhost:5000/app:v1", "g", "6")
	byDigest := "example.com/app@" + a.Digest().String()
	if _, err := r.Tag(t.Context(), a.Digest(), ocilocal.MustParseReference(byDigest), nil); err != nil {
		t.Fatal(err)
	}
	want := []string{"example.com/app-two:v1/e=4", "example.com/app/part:v1/d=3", "example.com/app:v1/a/b=1", "example.com/app:v2/c=2",
		byDigest + "/c=2", "example.com/deep/er/app:v1/f=5", "localhost:5000/app:v1/g=6"}
	got := files(t, view)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if err := fstest.TestFS(view, "example.com/app:v1/a/b", byDigest+"/c"); err != nil {
		t.Error(err)
	}
	sub, err := fs.Sub(view, "example.com/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fs.ReadFile(sub, "a/b"); string(b) != "1" {
		t.Error(b, err)
	}
	for _, name := range []string{"none", "example.com/none", "example.com/app:none", "example.com/app:v1/none", "example.com/ap", "example.co",
		"EXAMPLE.com/app:v1", "example.com/app:v2@" + a.Digest().String(), "example.com/deep@" + a.Digest().String(), "example.com/app:", "example.com/:v1", "é/x", "\x80"} {
		if _, err := fs.Stat(view, name); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	// Each call sees the index as it is at that moment.
	if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/app:v1")); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Stat(view, "example.com/app:v1"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := fs.ReadDir(r.FS(ctx), "."); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestRegistryFSCost: reading all layers of an artifact reads its manifest once. Reading it for
// each layer would cost the square of their number.
func TestRegistryFSCost(t *testing.T) {
	r := openTemp(t, nil)
	var refs []string
	var manifests []digest.Digest
	for i := range 3 { // walked in turns, too
		var pairs []string
		for j := range 40 {
			pairs = append(pairs, fmt.Sprintf("dir%d/file%d", j%5, j), fmt.Sprint("layer ", i, j))
		}
		a := titled(t, r, fmt.Sprintf("example.com/fs/cost:v%d", i), pairs...)
		refs = append(refs, a.Reference().String())
		manifests = append(manifests, a.Digest())
	}
	var mu sync.Mutex
	opened := map[string]int{}
	ocilocal.SetFault(r, func(op, name string) error {
		mu.Lock()
		defer mu.Unlock()
		if op == "open" {
			opened[name]++
		}
		return nil
	})
	defer ocilocal.SetFault(r, nil)
	fsys := r.FS(t.Context())
	for j := range 40 {
		for i, ref := range refs {
			b, err := fs.ReadFile(fsys, fmt.Sprintf("%s/dir%d/file%d", ref, j%5, j))
			if err != nil || string(b) != fmt.Sprint("layer ", i, j) {
				t.Fatalf("%q, %v", b, err)
			}
		}
	}
	if err := fstest.TestFS(fsys, refs[0]+"/dir0/file0", refs[2]+"/dir4/file39"); err != nil {
		t.Error(err)
	}
	for _, d := range manifests {
		if n := opened["blobs/sha256/"+d.Encoded()]; n != 1 {
			t.Errorf("manifest %s was opened %d times", d, n)
		}
	}

	// A ref that is moved shows its new artifact at once.
	moved := titled(t, r, "example.com/fs/other:v1", "new", "new")
	if _, err := r.Tag(t.Context(), moved.Digest(), ref(refs[0]), &ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil {
		t.Fatal(err)
	}
	if b, err := fs.ReadFile(fsys, refs[0]+"/new"); err != nil || string(b) != "new" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := fs.Stat(fsys, refs[0]+"/dir0"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestFSOfIndex: the tree of an image index is empty, since it has no layers.
func TestFSOfIndex(t *testing.T) {
	r := openTemp(t, nil)
	top := imageIndex(ocispec.MediaTypeImageIndex)
	if _, err := r.ImportArchive(t.Context(), bytes.NewReader(archiveOf(t, ocispec.MediaTypeImageIndex, top)), nil); err != nil {
		t.Fatal(err)
	}
	a, err := r.LoadDigest(t.Context(), digest.FromString(top))
	if err != nil {
		t.Fatal(err)
	}
	if got := files(t, viewOf(t, a)); len(got) != 0 {
		t.Error(got)
	}
}

// TestFSOverHTTP serves the tree by http.FileServerFS.
func TestFSOverHTTP(t *testing.T) {
	r := openTemp(t, nil)
	titled(t, r, "example.com/app:v1", "dir/page.html", "<p>hello")
	srv := httptest.NewServer(http.FileServerFS(r.FS(t.Context())))
	defer srv.Close()
	for path, want := range map[string]string{"/example.com/app:v1/dir/page.html": "<p>hello", "/example.com/app:v1/dir/": "page.html"} {
		res, err := http.Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != 200 || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s %q %v", path, res.Status, body, err)
		}
	}
}
