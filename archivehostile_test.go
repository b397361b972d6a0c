package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A header is a tar header, field by field. It can have values that archive/tar does not write.
type header struct {
	name   string
	size   string // 12 bytes: octal and NUL, or base 256
	kind   byte
	gnu    bool
	prefix string // before the name, in POSIX's form
	body   string // padded to blocks
	holes  string // GNU's list of the parts that are not holes, and the real size
}

func octal(n int64) string { return fmt.Sprintf("%011o\x00", n) }

// base256 is GNU's form of sizes that are too large for octal, and of negative ones.
func base256(n int64) string {
	b := bytes.Repeat([]byte{byte(n >> 63)}, 12)
	binary.BigEndian.PutUint64(b[4:], uint64(n))
	b[0] |= 0x80
	return string(b)
}

func (h header) bytes() []byte {
	b := make([]byte, 512)
	copy(b, h.name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], h.size)
	copy(b[136:], octal(0))
	b[156] = h.kind
	if h.gnu {
		copy(b[257:], "ustar  \x00")
	} else {
		copy(b[257:], "ustar\x0000")
	}
	copy(b[345:], h.prefix)
	copy(b[386:], h.holes)
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	b = append(b, h.body...)
	return append(b, make([]byte, -len(b)&511)...)
}

// plainFile is a file of a tar whose header has the right size.
func plainFile(name, body string) []byte {
	return header{name: name, size: octal(int64(len(body))), kind: '0', body: body}.bytes()
}

// paxFor is a PAX header of kind 'x' or 'g' with records of keys and values, in turns.
func paxFor(kind byte, pairs ...string) []byte {
	var body strings.Builder
	for i := 0; i < len(pairs); i += 2 {
		rest := " " + pairs[i] + "=" + pairs[i+1] + "\n"
		n := len(rest) + 1
		for len(fmt.Sprint(n))+len(rest) != n {
			n++
		}
		fmt.Fprint(&body, n, rest)
	}
	return header{name: "pax", size: octal(int64(body.Len())), kind: kind, body: body.String()}.bytes()
}

// gnuName is GNU's header with a long name for the next entry.
func gnuName(name string) []byte {
	return header{name: "././@LongLink", size: octal(int64(len(name) + 1)), kind: 'L', gnu: true, body: name + "\x00"}.bytes()
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// nothingCame checks that a failed import left nothing in the registry.
func nothingCame(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	for ref, err := range r.Refs(t.Context(), nil) {
		t.Error("visible after a failed import:", ref, err)
	}
	for d, err := range r.Blobs(t.Context()) {
		t.Error("blob kept after a failed import:", d.Digest, err)
	}
	staged, err := filepath.Glob(filepath.Join(r.Root(), "tmp", "*", "*"))
	if err != nil || len(staged) > 0 {
		t.Error("left in tmp/:", staged, err)
	}
}

// TestImportArchiveHeaders imports archives whose headers contradict themselves or each other, and
// archives with sparse files.
func TestImportArchiveHeaders(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	blob := func(body string) []byte { return plainFile("blobs/sha256/"+digest.FromString(body).Encoded(), body) }
	c, l, m := blob(config), blob("layer"), blob(manifest)
	idx := plainFile("index.json", layoutIndex(manifest, "example.com/a:v1").body)
	end := make([]byte, 1024)
	rest := join(c, l, m, idx, end)
	zeros := "blobs/sha256/" + strings.Repeat("0", 64)
	long := strings.Repeat("x", 2<<20)
	layer := "blobs/sha256/" + digest.FromString("layer").Encoded()
	sparse := func(name string) []byte { // a hole of 1 GiB
		holes := octal(1<<30) + octal(0) + strings.Repeat("\x00", 73) + octal(1<<30)
		return header{name: name, size: octal(0), kind: 'S', gnu: true, holes: holes}.bytes()
	}
	for name, c := range map[string]struct {
		src  []byte
		want error // nil: the import succeeds
	}{
		"as a start":              {rest, nil},
		"size 8 EiB":              {join(header{name: zeros, size: base256(math.MaxInt64), kind: '0'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"size 8 EiB, unknown":     {join(header{name: "other", size: base256(math.MaxInt64), kind: '0'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"size negative":           {join(header{name: zeros, size: base256(-1), kind: '0'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"size no number":          {join(header{name: zeros, size: "12345678z\x00", kind: '0'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"index of 8 EiB":          {join(header{name: "index.json", size: base256(math.MaxInt64), kind: '0'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"PAX size larger":         {join(paxFor('x', "size", "1000000"), l, c, m, idx, end), ocilocal.ErrInvalidLayout},
		"PAX size smaller":        {join(paxFor('x', "size", "1"), l, c, m, idx, end), ocilocal.ErrDigestMismatch},
		"PAX size negative":       {join(paxFor('x', "size", "-1"), rest), ocilocal.ErrInvalidLayout},
		"PAX size too large":      {join(paxFor('x', "size", "99999999999999999999"), rest), ocilocal.ErrInvalidLayout},
		"PAX path traverses":      {join(paxFor('x', "path", "../../etc/passwd"), rest), ocilocal.ErrIncomplete}, // the config is not a blob then
		"PAX path empty":          {join(paxFor('x', "path", ""), rest), ocilocal.ErrInvalidLayout},
		"PAX size empty":          {join(paxFor('x', "size", ""), rest), ocilocal.ErrInvalidLayout},
		"PAX header without file": {join(c, l, m, idx, paxFor('x', "comment", "x"), end), ocilocal.ErrInvalidLayout},
		"PAX header twice":        {join(paxFor('x', "comment", "x"), paxFor('x', "path", "other"), rest), ocilocal.ErrInvalidLayout},
		"PAX then GNU name":       {join(paxFor('x', "path", layer), gnuName("notes"), plainFile("other", "layer"), rest), ocilocal.ErrInvalidLayout},
		"GNU name then PAX":       {join(gnuName("notes"), paxFor('x', "path", layer), plainFile("other", "layer"), rest), ocilocal.ErrInvalidLayout},
		"GNU name twice":          {join(gnuName("notes"), gnuName(layer), plainFile("other", "layer"), rest), ocilocal.ErrInvalidLayout},
		"GNU name":                {join(c, gnuName(layer), plainFile("other", "layer"), m, idx, end), nil},
		"GNU name empty":          {join(gnuName(""), rest), ocilocal.ErrInvalidLayout},
		"PAX, global between":     {join(paxFor('x', "path", "notes"), paxFor('g', "comment", "x"), rest), ocilocal.ErrInvalidLayout},
		"PAX global size":         {join(paxFor('g', "size", "1"), rest), ocilocal.ErrInvalidLayout},
		"PAX global sparse name":  {join(paxFor('g', "GNU.sparse.name", "index.json"), rest), ocilocal.ErrInvalidLayout},
		"Solaris header":          {join(paxFor('X', "path", "index.json"), rest), ocilocal.ErrInvalidLayout},
		"directory with a size":   {join(header{name: "x/", size: octal(512), kind: '5'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"link with a size":        {join(header{name: "x", size: octal(512), kind: '1'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"size with NUL before":    {join(header{name: "x", size: "\x000000000010\x00"[:12], kind: '0'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"GNU prefix":              {join(header{name: "index.json", size: octal(0), kind: '0', gnu: true, prefix: "x"}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"PAX sparse by its name":  {join(paxFor('x', "GNU.sparse.name", "index.json"), plainFile("other", "{}"), rest), ocilocal.ErrInvalidLayout},
		"PAX path absolute":       {join(paxFor('x', "path", "/"+layer), rest), ocilocal.ErrInvalidLayout},
		"PAX path with NUL":       {join(paxFor('x', "path", "a\x00b"), rest), ocilocal.ErrInvalidLayout},
		"PAX path of a blob":      {join(paxFor('x', "path", layer), plainFile("harmless", "other"), rest), ocilocal.ErrDigestMismatch},
		"PAX path is right":       {join(paxFor('x', "path", layer), plainFile("harmless", "layer"), blob(config), m, idx, end), nil},
		"PAX record of 2 MiB":     {join(paxFor('x', "path", long), rest), ocilocal.ErrInvalidLayout},
		"PAX record cut":          {join(header{name: "pax", size: octal(9), kind: 'x', body: "99 path=a"}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"PAX global path":         {join(paxFor('g', "path", zeros), rest), ocilocal.ErrInvalidLayout},
		"PAX global comment":      {join(paxFor('g', "comment", "as git archive writes it"), rest), nil},
		"PAX unknown records":     {join(paxFor('x', "comment", "hello", "VENDOR.key", "x"), rest), nil},
		"GNU name of 2 MiB":       {join(header{name: "././@LongLink", size: octal(2 << 20), kind: 'L', gnu: true, body: long}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"GNU sparse":              {join(sparse(zeros), rest), ocilocal.ErrInvalidLayout},
		"GNU sparse, no name":     {join(sparse("other"), rest), nil},
		"PAX sparse, no name":     {join(paxFor('x', "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", "1099511627776", "GNU.sparse.name", "other"), plainFile("map", "1\n1099511627776\n0\n"), rest), nil},
		"blobs by other names":    {join(plainFile("blobs/sha256/._x", "x"), plainFile("blobs/.DS_Store", "x"), plainFile("blobs/md5/"+strings.Repeat("a", 32), "x"), plainFile("blobs/sha256/"+strings.Repeat("A", 64), "x"), header{name: "blobs/sha256/.lock", size: octal(0), kind: '2'}.bytes(), rest), nil},
		"names that lead out":     {join(plainFile("/etc/x", "x"), plainFile("blobs/../../x", "x"), plainFile(`a\b`, "x"), rest), nil},
		"a blob cut short":        {join(plainFile(zeros, "half"), rest), nil},
		"PAX sparse 0.0":          {join(paxFor('x', "GNU.sparse.size", "1099511627776", "GNU.sparse.numblocks", "1", "GNU.sparse.offset", "1099511627776", "GNU.sparse.numbytes", "0"), l, rest), ocilocal.ErrInvalidLayout},
		"PAX sparse 0.1":          {join(paxFor('x', "GNU.sparse.size", "1099511627776", "GNU.sparse.numblocks", "1", "GNU.sparse.map", "1099511627771,5", "GNU.sparse.name", layer), l, rest), ocilocal.ErrInvalidLayout},
		"PAX sparse 1.0":          {join(paxFor('x', "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", "1099511627776", "GNU.sparse.name", layer), plainFile("map", "1\n1099511627776\n0\n"), rest), ocilocal.ErrInvalidLayout},
		"checksum wrong":          {join(bytes.Replace(l, []byte("0000644"), []byte("0000777"), 1), rest), ocilocal.ErrInvalidLayout},
		"names twice, same bytes": {join(l, l, rest), nil},
		"dots and slashes":        {join(plainFile("./"+layer, "layer"), plainFile(".//blobs//sha256//"+digest.FromString(config).Encoded(), config), m, plainFile(".//index.json", layoutIndex(manifest, "example.com/a:v1").body), end), nil},
		"index by two spellings":  {join(idx, plainFile("./index.json", layoutIndex(manifest, "example.com/b:v1").body), rest), ocilocal.ErrInvalidLayout},
		"names in upper case":     {join(plainFile("INDEX.JSON", "{}"), rest), nil},
		"layout twice":            {join(plainFile("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), plainFile("oci-layout", `{"imageLayoutVersion":"9"}`), rest), ocilocal.ErrInvalidLayout},
		"index is a directory":    {join(header{name: "index.json", size: octal(0), kind: '5'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"blobs is a link":         {join(header{name: "blobs", size: octal(0), kind: '2'}.bytes(), rest), ocilocal.ErrInvalidLayout},
		"garbage after the end":   {join(rest, bytes.Repeat([]byte("garbage"), 1000)), nil},
		"gzip in gzip":            {gzipped(gzipped(rest)), ocilocal.ErrInvalidLayout},
		"gzip, zeros behind":      {join(gzipped(rest), make([]byte, 5000)), nil},
		"gzip, zeros, garbage":    {join(gzipped(rest), make([]byte, 5000), []byte("garbage")), ocilocal.ErrInvalidLayout},
		"gzip, garbage behind":    {join(gzipped(rest), []byte("garbage")), ocilocal.ErrInvalidLayout},
		"gzip in two members":     {join(gzipped(rest[:700]), gzipped(rest[700:])), nil},
		"gzip, a long name":       {longGzipName(rest, 64<<20), ocilocal.ErrInvalidLayout},
		"gzip, 200,000 members":   {join(gzipped(rest[:700]), bytes.Repeat(gzipped(nil), 200_000), gzipped(rest[700:])), nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			got, err := r.ImportArchive(t.Context(), bytes.NewReader(c.src), nil)
			if c.want == nil {
				if err != nil || len(got.Artifacts) != 1 || got.Artifacts[0].Name != "example.com/a:v1" || got.Artifacts[0].Descriptor.Digest != digest.FromString(manifest) {
					t.Errorf("%+v, %v", got, err)
				}
				checkSound(t, r)
				return
			}
			if !errors.Is(err, c.want) || len(err.Error()) > 1000 {
				t.Errorf("%+v, error %.1000v; want %v", got, err, c.want)
			}
			nothingCame(t, r)
		})
	}
}

// longGzipName has a file name of n bytes in gzip's header, which must not be kept in memory.
func longGzipName(b []byte, n int) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Name = "x"
	z.Write(b)
	z.Close()
	return bytes.Replace(out.Bytes(), []byte("x\x00"), append(bytes.Repeat([]byte("x"), n), 0), 1)
}

// TestImportArchiveCut cuts an archive at every place. Each import publishes the whole artifact or
// nothing.
func TestImportArchiveCut(t *testing.T) {
	manifest, config := image(strings.Repeat("layer", 300))
	whole := tarOf(t, blobEntry(config), blobEntry(strings.Repeat("layer", 300)), blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1"))
	var cuts []int
	for at := 0; at <= len(whole); at += 512 {
		cuts = append(cuts, at-1, at, at+1)
	}
	compressed := gzipped(whole)
	r := openTemp(t, nil)
	for _, src := range [][]byte{whole, compressed} {
		came := 0
		if len(src) == len(compressed) {
			cuts = cuts[:0]
			for at := range len(compressed) + 1 {
				cuts = append(cuts, at)
			}
		}
		for _, at := range cuts {
			if at < 0 || at > len(src) {
				continue
			}
			_, err := r.ImportArchive(t.Context(), bytes.NewReader(src[:at]), nil)
			if err == nil {
				came++
				checkSound(t, r)
				if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/a:v1")); err != nil {
					t.Error(err)
				}
				if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
					t.Error(err)
				}
			} else if !errors.Is(err, ocilocal.ErrInvalidLayout) {
				t.Errorf("cut at %d of %d: %v", at, len(src), err)
			}
			nothingCame(t, r)
		}
		// Any part of the two empty blocks at the end of a tar may be missing. A gzip stream must
		// be complete.
		if len(src) == len(compressed) && came != 1 || came < 1 || came > 8 {
			t.Errorf("%d of %d cuts came in", came, len(cuts))
		}
	}
}

// A stream is a reader of n chunks that a function makes.
type stream struct {
	next func(i int) []byte
	n, i int
	rest []byte
	read int64
}

func (s *stream) Read(p []byte) (int, error) {
	for len(s.rest) == 0 {
		if s.i == s.n {
			return 0, io.EOF
		}
		s.rest = s.next(s.i)
		s.i++
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	s.read += int64(n)
	return n, nil
}

// heapGrowth returns the growth of the heap while fn runs. Garbage of fn may be included.
func heapGrowth(fn func()) int64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return int64(after.HeapAlloc) - int64(before.HeapAlloc)
}

// TestImportArchiveManyEntries: an import skips almost a million entries that a layout does not
// use. One more than MaxArchiveEntries fails.
func TestImportArchiveManyEntries(t *testing.T) {
	needsDeep(t, "a million entries take seconds")
	manifest, config := image("layer")
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range []entry{blobEntry(config), blobEntry("layer"), blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1")} {
		if err := tw.WriteHeader(&tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.body)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Flush(); err != nil {
		t.Fatal(err)
	}
	tiny := plainFile("tiny", "x")
	for n, want := range map[int]error{ocilocal.MaxArchiveEntries - 4: nil, ocilocal.MaxArchiveEntries - 3: ocilocal.ErrTooLarge} {
		r := openTemp(t, nil)
		src := &stream{n: n, next: func(int) []byte { return tiny }}
		var err error
		grown := heapGrowth(func() {
			_, err = r.ImportArchive(t.Context(), io.MultiReader(bytes.NewReader(b.Bytes()), src, bytes.NewReader(make([]byte, 1024))), nil)
		})
		if !errors.Is(err, want) {
			t.Errorf("%d entries: %v, want %v", n+4, err, want)
		}
		if grown > 64<<20 {
			t.Errorf("the heap has grown by %d bytes", grown)
		}
		if want != nil {
			nothingCame(t, r)
		}
	}
}

// cancelAfter is a layer of the given size that calls cancel after at bytes were read.
func cancelAfter(cancel func(), at, size int64) *stream {
	const chunk = 1 << 20
	b := bytes.Repeat([]byte("0123456789abcdef"), chunk/16)
	s := &stream{n: int(size / chunk)}
	s.next = func(i int) []byte {
		if int64(i)*chunk == at {
			cancel()
		}
		binary.BigEndian.PutUint64(b, uint64(i))
		return b
	}
	return s
}

// TestImportCancelled: an import or build of a large layer that is cancelled ends soon, and leaves
// nothing.
func TestImportCancelled(t *testing.T) {
	t.Parallel()
	const size, at, soon = 1 << 30, 64 << 20, 8 << 20
	r := openTemp(t, nil)
	check := func(what string, src *stream, err error) {
		t.Helper()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
		if src != nil && (src.read < at || src.read > at+soon) {
			t.Errorf("%s: %d bytes were read", what, src.read)
		}
		nothingCame(t, r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	src := cancelAfter(cancel, at, size)
	head := header{name: "blobs/sha256/" + strings.Repeat("0", 64), size: octal(size), kind: '0'}.bytes()
	_, err := r.ImportArchive(ctx, io.MultiReader(bytes.NewReader(head), src), nil)
	check("archive", src, err)

	ctx, cancel = context.WithCancel(t.Context())
	src = cancelAfter(cancel, at, size)
	head = header{name: "passed over", size: octal(size), kind: '0'}.bytes()
	_, err = r.ImportArchive(ctx, io.MultiReader(bytes.NewReader(head), src), nil)
	check("archive, another entry", src, err)

	ctx, cancel = context.WithCancel(t.Context())
	src = cancelAfter(cancel, at, size)
	b, err := r.NewBuilder(ocilocal.MustParseReference("example.com/a:v1"), &ocilocal.BuilderOptions{ArtifactType: testType})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.AddLayer(ctx, "text/plain", src, nil)
	b.Cancel()
	check("builder", src, err)

	// The layer of a layout is a sparse file. The fault hook cancels while the layer is being
	// copied.
	dir := t.TempDir()
	layer := "sha256:" + strings.Repeat("0", 64)
	config := "{}"
	manifest := fmt.Sprintf(`{"schemaVersion":2,"artifactType":"x/y","config":%s,"layers":[{"mediaType":"text/plain","digest":%q,"size":%d}]}`,
		desc("application/vnd.oci.empty.v1+json", config), layer, size)
	for _, e := range []entry{layoutVersion, blobEntry(config), blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1"), {name: "blobs/sha256/" + strings.Repeat("0", 64)}} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, e.name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, e.name), []byte(e.body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(filepath.Join(dir, "blobs", "sha256", strings.Repeat("0", 64)), size); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	var writes atomic.Int64
	ocilocal.SetFault(r, func(op, _ string) error {
		if op == "write" && writes.Add(1) == at/(4<<20) {
			cancel()
		}
		return nil
	})
	_, err = r.ImportLayout(ctx, dir, nil)
	ocilocal.SetFault(r, nil)
	check("layout", nil, err)
	if n := writes.Load(); n < at/(4<<20) || n > at/(4<<20)+2 {
		t.Errorf("layout: %d writes", n)
	}

	if _, err := r.ImportArchive(t.Context(), bytes.NewReader(tarOf(t, blobEntry(manifest), layoutIndex(manifest, "example.com/a:v1"), blobEntry(config))), nil); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Error(err)
	}
	small, config := image("layer")
	if _, err := r.ImportArchive(t.Context(), bytes.NewReader(tarOf(t, blobEntry(config), blobEntry("layer"), blobEntry(small), layoutIndex(small, "example.com/a:v1"))), nil); err != nil {
		t.Error(err)
	}
	checkSound(t, r)
}

// FuzzLayoutIndex imports any index.json and oci-layout, from a directory and from an archive. Both
// must give the same artifacts or the same error. After an error, the registry has nothing.
func FuzzLayoutIndex(f *testing.F) {
	manifest, config := image("layer")
	index := layoutIndex(manifest, "example.com/a:v1").body
	version := layoutVersion.body
	for _, s := range []string{index, `{}`, `null`, ``, `{"schemaVersion":2,"manifests":[]}`, strings.Replace(index, "a:v1", "A:v1", 1), strings.Replace(index, `"size":`, `"size":-`, 1),
		strings.Replace(index, "sha256", "sha512", 1), strings.Replace(index, `{"schema`, `{"subject":{},"schema`, 1), strings.Replace(index, `"manifests"`, `"Manifests"`, 1),
		strings.Replace(index, `]}`, `,null]}`, 1), strings.Replace(index, imageType, ocispec.MediaTypeImageIndex, 1), index + index, strings.Repeat("[", 100)} {
		f.Add([]byte(s), []byte(version))
	}
	for _, s := range []string{`{}`, `{"imageLayoutVersion":"2.0.0"}`, `{"imageLayoutVersion":1}`, ``, `null`} {
		f.Add([]byte(index), []byte(s))
	}
	root := f.TempDir()
	r, err := ocilocal.Open(f.Context(), root, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { r.Close() })
	sentinels := []error{ocilocal.ErrInvalidLayout, ocilocal.ErrInvalidManifest, ocilocal.ErrIncomplete, ocilocal.ErrUnsupportedMediaType, ocilocal.ErrTooLarge,
		ocilocal.ErrInvalidDigest, ocilocal.ErrSizeMismatch, ocilocal.ErrDigestMismatch, ocilocal.ErrInvalidReference, ocilocal.ErrBareName, ocilocal.ErrInvalidArgument}
	kinds := func(err error) (all string) {
		for i, s := range sentinels {
			if errors.Is(err, s) {
				all += fmt.Sprint(i, " ")
			}
		}
		return all
	}
	f.Fuzz(func(t *testing.T, index, version []byte) {
		entries := []entry{{name: "oci-layout", body: string(version)}, {name: "index.json", body: string(index)}, blobEntry(manifest), blobEntry(config), blobEntry("layer")}
		fromDir, errDir := r.ImportLayout(t.Context(), layoutDir(t, entries...), nil)
		if errDir == nil {
			empty(t, r)
		} else if kinds(errDir) == "" {
			t.Errorf("an error that matches no sentinel: %v", errDir)
		}
		nothingCame(t, r)
		fromTar, errTar := r.ImportArchive(t.Context(), bytes.NewReader(tarOf(t, entries...)), nil)
		if errTar == nil {
			empty(t, r)
		}
		nothingCame(t, r)
		if kinds(errDir) != kinds(errTar) {
			t.Errorf("the directory says %v, the archive %v", errDir, errTar)
		}
		if errDir == nil && errTar == nil && fmt.Sprint(fromDir.Artifacts) != fmt.Sprint(fromTar.Artifacts) {
			t.Errorf("from the directory %v, from the archive %v", fromDir.Artifacts, fromTar.Artifacts)
		}
		if in, err := ocilocal.InspectArchive(t.Context(), bytes.NewReader(tarOf(t, entries...))); err == nil && errTar == nil && len(in.Entries) != len(fromTar.Artifacts)+len(fromTar.Skipped) {
			t.Errorf("%d entries, %d artifacts", len(in.Entries), len(fromTar.Artifacts))
		}
	})
}

// empty checks and empties a registry.
func empty(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	checkSound(t, r)
	for ref, err := range r.Refs(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Remove(t.Context(), ref.Reference); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Error(err)
	}
}
