package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// tarFlavours are archives in the formats that programs write.
func tarFlavours(t testing.TB) map[string][]byte {
	long := strings.Repeat("d/", 120) + "name"
	flavours := map[string][]byte{}
	for name, format := range map[string]tar.Format{"ustar": tar.FormatUSTAR, "pax": tar.FormatPAX, "gnu": tar.FormatGNU} {
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		for _, h := range []*tar.Header{
			{Typeflag: tar.TypeDir, Name: "blobs/"},
			{Typeflag: tar.TypeReg, Name: "index.json", Size: 5},
			{Typeflag: tar.TypeReg, Name: strings.Repeat("a", 90) + "/" + strings.Repeat("b", 90), Size: 1},
			{Typeflag: tar.TypeReg, Name: long, Size: 1},
			{Typeflag: tar.TypeSymlink, Name: "link", Linkname: strings.Repeat("x", 90)},
			{Typeflag: tar.TypeChar, Name: "device", Devmajor: 1, Devminor: 3},
			{Typeflag: tar.TypeReg, Name: "empty"},
		} {
			h.Format, h.Mode = format, 0o644
			if format == tar.FormatUSTAR && h.Name == long {
				continue
			}
			if err := tw.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(tw, "bytes"[:h.Size]); err != nil {
				t.Fatal(err)
			}
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		flavours[name] = b.Bytes()
	}
	v7 := header{name: "index.json", size: octal(5), kind: 0, body: "bytes"}.bytes()
	copy(v7[257:265], make([]byte, 8))
	flavours["v7"] = join(checksummed(v7), make([]byte, 1024))
	return flavours
}

// checksummed puts the right checksum into a header.
func checksummed(b []byte) []byte {
	copy(b[148:], "        ")
	sum := int64(0)
	for _, c := range b[:512] {
		sum += int64(c)
	}
	copy(b[148:], octal(sum)[4:11]+"\x00")
	return b
}

// seenAlike checks that archive/tar and the library see the same entries in an archive, as far as
// archive/tar reads it. It reports whether the library reads the archive.
func seenAlike(t *testing.T, src []byte) bool {
	t.Helper()
	got, err := ocilocal.TarEntries(bytes.NewReader(src))
	if err != nil {
		return false
	}
	tr := tar.NewReader(bytes.NewReader(src))
	for _, e := range got {
		h, err := tr.Next()
		for err == nil && h.Typeflag == tar.TypeXGlobalHeader {
			h, err = tr.Next()
		}
		if err == io.EOF {
			t.Fatalf("archive/tar sees the end before %+v", e)
		}
		if err != nil {
			return true // it refuses the archive, and so sees nothing else in it
		}
		size := h.Size
		if e.Sparse {
			size = e.Size
		}
		if h.Name != e.Name && h.Name != e.Alias && !e.Odd || size != e.Size || h.Typeflag != e.Kind && !(e.Odd && e.Size == 0) {
			t.Fatalf("archive/tar sees %q, %d bytes, type %q instead of %+v", h.Name, h.Size, h.Typeflag, e)
		}
		if e.Sparse {
			continue
		}
		data, err := io.ReadAll(io.LimitReader(tr, 1<<10))
		if err == nil && string(data) != e.Data && e.Kind == tar.TypeReg {
			t.Fatalf("archive/tar reads %q instead of %q from %q", data, e.Data, e.Name)
		}
	}
	if h, err := tr.Next(); err == nil && h.Typeflag != tar.TypeXGlobalHeader {
		t.Fatalf("archive/tar sees %q after the end", h.Name)
	}
	return true
}

// TestTarFlavours reads archives in each format of tar and compares the entries with archive/tar.
func TestTarFlavours(t *testing.T) {
	for name, src := range tarFlavours(t) {
		if !seenAlike(t, src) {
			_, err := ocilocal.TarEntries(bytes.NewReader(src))
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTarTwoViews imports archives in which programs that are less strict, such as Python's
// tarfile, see another index.json than archive/tar. The library refuses each of them.
func TestTarTwoViews(t *testing.T) {
	manifest, config := image("layer")
	second, _ := image("LAYER")
	good, evil := layoutIndex(manifest, "example.com/good:v1").body, layoutIndex(second, "example.com/evil:v1").body
	hidden := plainFile("index.json", evil)
	parts := join(plainFile(blobEntry(manifest).name, manifest), plainFile(blobEntry(second).name, second), plainFile(blobEntry(config).name, config),
		plainFile("blobs/sha256/"+digest.FromString("layer").Encoded(), "layer"), plainFile("blobs/sha256/"+digest.FromString("LAYER").Encoded(), "LAYER"))
	for name, src := range map[string][]byte{
		"global size":     join(paxFor('g', "size", octal(int64(len(hidden)))), header{name: "readme", size: octal(0), kind: '0'}.bytes(), hidden),
		"two long names":  join(paxFor('x', "path", "index.json"), gnuName("notes"), plainFile("other", good)),
		"size of a link":  join(header{name: "x", size: octal(int64(len(hidden))), kind: '2'}.bytes(), hidden),
		"Solaris header":  join(paxFor('X', "path", "index.json"), plainFile("other", good)),
		"sparse by alias": join(paxFor('x', "GNU.sparse.name", "index.json"), plainFile("other", good)),
	} {
		r := openTemp(t, nil)
		got, err := r.ImportArchive(t.Context(), bytes.NewReader(join(parts, src, make([]byte, 1024))), nil)
		if !errors.Is(err, ocilocal.ErrInvalidLayout) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		nothingCame(t, r)
	}
}

// TestTarOfTools imports archives that tar and Python write on this machine, in each of their
// formats.
func TestTarOfTools(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	dir := layoutDir(t, layoutVersion, layoutIndex(manifest, "example.com/a:v1"), blobEntry(manifest), blobEntry(config), blobEntry("layer"))
	out := t.TempDir()
	ran := 0
	for name, cmd := range map[string][]string{
		"v7": {"tar", "--format=v7", "-cf"}, "oldgnu": {"tar", "--format=oldgnu", "-cf"}, "gnu": {"tar", "--format=gnu", "-cf"},
		"ustar": {"tar", "--format=ustar", "-cf"}, "posix": {"tar", "--format=posix", "-cf"}, "sparse": {"tar", "--format=posix", "--sparse", "-cf"},
		"incremental": {"tar", "--format=gnu", "--listed-incremental=/dev/null", "-cf"}, "times": {"tar", "--format=posix", "--atime-preserve", "-cf"},
		"python": {"python3", "-c", "import sys,tarfile; t=tarfile.open(sys.argv[1],'w'); t.add('.'); t.close()"},
	} {
		if _, err := exec.LookPath(cmd[0]); err != nil {
			continue
		}
		archive := filepath.Join(out, name)
		args := append(cmd[1:], archive)
		if cmd[0] == "tar" {
			args = append(args, ".")
		}
		c := exec.Command(cmd[0], args...)
		c.Dir = dir
		if text, err := c.CombinedOutput(); err != nil {
			t.Logf("%s: %v: %s", name, err, text)
			continue
		}
		ran++
		if got, err := openTemp(t, nil).ImportArchiveFile(t.Context(), archive, nil); err != nil || len(got.Artifacts) != 1 {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if ran == 0 {
		t.Skip("neither tar nor python3 is here")
	}
}

// FuzzTar compares the reader of archives with archive/tar: two programs must not see different
// files in an archive that the library accepts.
func FuzzTar(f *testing.F) {
	for _, src := range tarFlavours(f) {
		f.Add(src)
	}
	end := make([]byte, 1024)
	for _, src := range [][]byte{
		join(paxFor('x', "path", "index.json", "size", "3"), plainFile("other", "abc"), end),
		join(paxFor('g', "comment", "x"), paxFor('x', "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "x", "GNU.sparse.realsize", "9"), plainFile("map", "1\n0\n9\n"+strings.Repeat("\x00", 506)+"123456789"), end),
		join(gnuName(strings.Repeat("n", 300)), header{name: "x", size: base256(3), kind: '0', gnu: true, body: "abc"}.bytes(), end),
		join(header{name: "s", size: octal(512), kind: 'S', gnu: true, holes: octal(0) + octal(512) + strings.Repeat("\x00", 73) + octal(512), body: strings.Repeat("x", 512)}.bytes(), end),
		join(header{name: "index.json", size: octal(0), kind: '0', prefix: "a/b"}.bytes(), header{name: "d/", size: octal(0), kind: 0}.bytes(), end[:512]),
	} {
		f.Add(src)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		if bytes.HasPrefix(src, []byte("\x1f\x8b")) {
			return // archive/tar does not decompress
		}
		seenAlike(t, src)
	})
}
