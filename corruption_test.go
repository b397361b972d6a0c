package ocilocal_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A damagedRoot is a root whose files are put back between two damages.
type damagedRoot struct {
	root  string
	index []byte
	refs  []string // each with itself as label
}

func newDamagedRoot(t *testing.T) *damagedRoot {
	t.Helper()
	d := &damagedRoot{root: filepath.Join(t.TempDir(), "root")}
	r := mustOpen(t, d.root)
	for i := range 12 {
		ref := fmt.Sprintf("example.com/damage/n%d:v%d", i%3, i)
		if _, err := publishLabelled(r, ref, ref, ocilocal.KeepExisting, []byte(ref), []byte("shared")); err != nil {
			t.Fatal(err)
		}
		d.refs = append(d.refs, ref)
	}
	mustClose(t, r)
	dontWatch(d.root)
	var err error
	if d.index, err = os.ReadFile(filepath.Join(d.root, "index.sqlite3")); err != nil {
		t.Fatal(err)
	}
	return d
}

// putIndex gives the root an index file, and nothing beside it.
func (d *damagedRoot) putIndex(t *testing.T, index []byte) {
	t.Helper()
	name := filepath.Join(d.root, "index.sqlite3")
	os.Remove(name + "-wal")
	os.Remove(name + "-shm")
	if err := os.WriteFile(name, index, 0o600); err != nil {
		t.Fatal(err)
	}
}

// use does everything with the root that reads its index. It may fail in any
// typed way; what it reads must be right.
func (d *damagedRoot) use(t *testing.T) (failed bool) {
	t.Helper()
	ctx := t.Context()
	check := func(call string, err error) bool {
		if err == nil {
			return true
		}
		failed = true
		if _, ok := errors.AsType[*ocilocal.Error](err); !ok {
			t.Errorf("%s: untyped error %T %v", call, err, err)
		}
		return false
	}
	r, err := ocilocal.Open(ctx, d.root, nil)
	if !check("open", err) {
		return failed
	}
	defer func() { check("close", r.Close()) }()
	for _, err := range r.Refs(ctx, nil) {
		check("list", err)
	}
	for _, ref := range d.refs {
		// What is read was verified: if it can be read, it is the right one.
		if label, err := readLabelled(r, ref); check(ref, err) && label != ref {
			t.Errorf("%s reads %q", ref, label)
		}
	}
	for _, policy := range []ocilocal.Policy{ocilocal.KeepExisting, ocilocal.Replace} {
		_, err := publishLabelled(r, d.refs[1], d.refs[1], policy, []byte(d.refs[1]), []byte("shared"))
		check("publish", err)
	}
	parsed := ocilocal.MustParseReference(d.refs[0])
	if desc, err := r.Resolve(ctx, parsed); check("resolve", err) {
		_, err := r.Tag(ctx, desc.Digest, ocilocal.MustParseReference("example.com/damage/tagged:v1"), nil)
		check("tag", err)
	}
	_, err = r.Remove(ctx, parsed)
	check("remove", err)
	_, err = r.Stats(ctx)
	check("stats", err)
	_, err = r.GCReport(ctx, nil)
	check("report", err)
	for p, err := range r.Verify(ctx, &ocilocal.VerifyOptions{Quick: true}) {
		failed = failed || p.Kind != ""
		check("verify", err)
	}
	return failed
}

// TestIndexBitFlips flips one bit in each region of the index in turn. Every call fails with a
// typed error or returns right values.
func TestIndexBitFlips(t *testing.T) {
	t.Parallel()
	d := newDamagedRoot(t)
	flips := scaled(30, 200, 4000)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	noticed := 0
	for i := range flips {
		region := len(d.index) / flips
		at, bit := i*region+rng.IntN(max(1, region)), rng.IntN(8)
		index := slices.Clone(d.index)
		index[at] ^= 1 << bit
		d.putIndex(t, index)
		if d.use(t) {
			noticed++
		}
		if t.Failed() {
			t.Fatalf("seed %d: bit %d of byte %d flipped", seed, bit, at)
		}
	}
	t.Logf("%d of %d flips noticed in %d bytes", noticed, flips, len(d.index))
	d.putIndex(t, d.index)
	if d.use(t) {
		t.Error("the undamaged index is found damaged")
	}
	if noticed == 0 {
		t.Error("no flip was noticed")
	}
}

// TestCollectWithDamagedIndex flips bits in the whole index, and one in every digest in it. Then it
// collects. All artifacts that could be read before can be read after it.
func TestCollectWithDamagedIndex(t *testing.T) {
	t.Parallel()
	d := newDamagedRoot(t)
	blobs := map[string][]byte{}
	names, err := filepath.Glob(filepath.Join(d.root, "blobs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if blobs[name], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	var flips []int // byte offsets
	for name := range blobs {
		id := rowBytes(digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(name)))
		for at := range len(d.index) - len(id) {
			if bytes.HasPrefix(d.index[at:], id) {
				flips = append(flips, at+1+at%32)
			}
		}
	}
	if len(flips) < 70 { // in content and its index, in manifests, and in refs
		t.Fatalf("%d digests", len(flips))
	}
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range scaled(25, 300, 4000) {
		flips = append(flips, rng.IntN(len(d.index)))
	}
	ran := 0
	for _, at := range flips {
		index := slices.Clone(d.index)
		index[at] ^= 1
		d.putIndex(t, index)
		for name, b := range blobs {
			if _, err := os.Stat(name); err != nil {
				write(t, name, string(b))
			}
		}
		r, err := ocilocal.Open(t.Context(), d.root, nil)
		if err != nil {
			continue
		}
		var readable []string
		for _, name := range d.refs {
			if _, err := readLabelled(r, name); err == nil {
				readable = append(readable, name)
			}
		}
		if _, err := r.GC(t.Context(), atOnce); err == nil {
			ran++
		}
		for _, name := range readable {
			if _, err := readLabelled(r, name); err != nil {
				t.Errorf("seed %d: byte %d: %s: %v", seed, at, name, err)
			}
		}
		r.Close() // which may say that the index is damaged
	}
	if ran == 0 || ran == len(flips) {
		t.Errorf("%d of %d collections ran", ran, len(flips))
	}
}

// ids returns the manifest of each ref of the undamaged index.
func (d *damagedRoot) ids(t *testing.T) map[string]digest.Digest {
	t.Helper()
	r := mustOpen(t, d.root)
	defer mustClose(t, r)
	ids := map[string]digest.Digest{}
	for _, name := range d.refs {
		desc, err := r.Resolve(t.Context(), ref(name))
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = desc.Digest
	}
	return ids
}

// rebuild rebuilds the root from whatever index it has. The result must be sound, and have every
// artifact, under its name or, where that was lost, another. It must not know a name by another
// artifact.
func (d *damagedRoot) rebuild(t *testing.T, ids map[string]digest.Digest) {
	t.Helper()
	report, err := ocilocal.Rebuild(t.Context(), d.root, nil)
	if errors.Is(err, ocilocal.ErrNewerSchema) {
		return // nobody can know that it is damage
	}
	if err != nil || len(report.Left)+len(report.Quarantined) != 0 {
		t.Errorf("%v, %+v", err, report)
		return
	}
	r := mustOpen(t, d.root)
	collect(t, r, atOnce)
	for name, id := range ids {
		if _, err := r.LoadDigest(t.Context(), id); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if desc, err := r.Resolve(t.Context(), ref(name)); err == nil && desc.Digest != id {
			t.Errorf("%s is another's name now", name)
		}
	}
	if got := problems(t, r, nil, nil); len(got) != 0 {
		t.Errorf("found %q", got)
	}
	if _, err := r.Backup(t.Context(), filepath.Join(t.TempDir(), "backup"), nil); err != nil {
		t.Error(err)
	}
	mustClose(t, r)
	broken, _ := filepath.Glob(filepath.Join(d.root, "index.sqlite3.broken*"))
	for _, name := range broken {
		os.Remove(name)
	}
}

// TestRebuildDamagedIndex flips bits in the index. For all of them, Rebuild ends with a sound
// registry that has every artifact.
func TestRebuildDamagedIndex(t *testing.T) {
	t.Parallel()
	d := newDamagedRoot(t)
	ids := d.ids(t)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range scaled(10, 60, 2000) {
		at, bit := rng.IntN(len(d.index)), rng.IntN(8)
		index := slices.Clone(d.index)
		index[at] ^= 1 << bit
		d.putIndex(t, index)
		if d.rebuild(t, ids); t.Failed() {
			t.Fatalf("seed %d: bit %d of byte %d", seed, bit, at)
		}
	}
}

// TestRebuildDamagedRows gives each column of each table other values, in a row of each kind. A
// flipped bit may do that, and SQLite's own checks then find the index sound.
//
// A ref that points at another manifest is left out: nothing tells it from a ref that was moved.
func TestRebuildDamagedRows(t *testing.T) {
	t.Parallel()
	d := newDamagedRoot(t)
	ids := d.ids(t)
	values := map[string][]string{ // the likeliest to matter first
		"INTEGER": {"-32321", "3", "0", "446", "9223372036854775807", "-1", "1", "2", "447", "-9223372036854775808"},
		"TEXT":    {"''", "'x'", "'{}'", "'application/vnd.oci.image.layer.v1.tar'"},
		"BLOB":    {"x''", "unhex(printf('01%064d', 0))", "unhex(printf('02%096d', 0))", "x'01ff'"},
	}
	kinds := map[string][]string{
		"types":     {"true"},
		"content":   {"kind = 1", "kind = 2", "kind = 3"},
		"manifests": {"true"},
		"members":   {"role = 1", "role = 2"},
		"refs":      {"true"},
		"unnamed":   {}, // without rows
		"holds":     {},
	}
	keys := map[string]string{"types": "id", "content": "id", "manifests": "id", "members": "manifest, position", "refs": "name, reference"}
	db, err := sql.Open("sqlite", filepath.Join(d.root, "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	type column struct{ table, name, kind string }
	var columns []column
	rows, err := db.Query(`SELECT t.name, c.name, c.type FROM sqlite_schema t, pragma_table_info(t.name) c WHERE t.type = 'table' AND t.name <> 'meta'`)
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var c column
		if err := rows.Scan(&c.table, &c.name, &c.kind); err != nil {
			t.Fatal(err)
		}
		columns = append(columns, c)
	}
	if err := errors.Join(rows.Err(), rows.Close(), db.Close()); err != nil {
		t.Fatal(err)
	}
	for _, c := range columns {
		if kinds[c.table] == nil || values[c.kind] == nil {
			t.Fatalf("no rows or values for %+v", c)
		}
		for _, row := range kinds[c.table] {
			for _, value := range values[c.kind][:min(scaled(2, 20, 20), len(values[c.kind]))] {
				d.putIndex(t, d.index)
				execIndex(t, d.root, fmt.Sprintf(`PRAGMA ignore_check_constraints = ON; UPDATE OR IGNORE %[1]s SET %[2]s = %[3]s WHERE (%[4]s) = (SELECT %[4]s FROM %[1]s WHERE %[5]s LIMIT 1)`,
					c.table, c.name, value, keys[c.table], row))
				if d.rebuild(t, ids); t.Failed() {
					t.Fatalf("%s.%s is %s where %s", c.table, c.name, value, row)
				}
			}
		}
	}
}

// TestIndexOutOfOrder changes the names in the rows of refs. The rows are out of order then, and
// SQLite finds other rows than those that it is asked for.
func TestIndexOutOfOrder(t *testing.T) {
	t.Parallel()
	d := newDamagedRoot(t)
	for _, ref := range d.refs {
		key := regexp.MustCompile(strings.Replace(ref, ":", "", 1) + `(?s:.?)\x01`) // as the values stand in the row: a small id, 1 in no byte, and a digest
		where := key.FindIndex(d.index)
		if where == nil {
			t.Fatalf("the index has no row %q", key)
		}
		at := where[0]
		for bit := range 3 {
			index := slices.Clone(d.index)
			index[at+len("example.com/damage/n")] ^= 1 << bit
			d.putIndex(t, index)
			if !d.use(t) {
				t.Errorf("bit %d of the name of %s: not noticed", bit, ref)
			}
		}
	}
}

// TestIndexOutOfOrderPages changes the last row of a page so that it sorts before all others. The
// next page would begin there, so a listing could go in circles. It must end with an error.
func TestIndexOutOfOrderPages(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	r := mustOpen(t, root)
	const rows = `WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500),
		d (i, digest, name) AS (SELECT i, unhex(printf('01f%063d', i)), printf('example.com/in/order/n%04d', i) FROM n) `
	execIndex(t, root, `INSERT INTO types VALUES (1, 'application/x')`)
	execIndex(t, root, rows+`INSERT INTO content (id, digest, size, kind, created) SELECT i, digest, 1, 3, 0 FROM d`)
	execIndex(t, root, rows+`INSERT INTO manifests SELECT i, digest, 1, 1, NULL, '{}', 0 FROM d`)
	execIndex(t, root, rows+`INSERT INTO members SELECT i, 0, 2, i, 1, 1, '{"a":"b"}' FROM d`)
	execIndex(t, root, rows+`INSERT INTO refs SELECT name, 'v1', i, digest, 1, 1, 1, 0, 0, 0, '' FROM d`)
	mustClose(t, r)
	dontWatch(root)
	name := filepath.Join(root, "index.sqlite3")
	sound, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	digestOf := func(first byte, i int) []byte {
		b, _ := hex.DecodeString(fmt.Sprintf("01%c%063d", first, i))
		return b
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	calls := map[string]func(r *ocilocal.LocalRegistry) error{
		"GCReport": func(r *ocilocal.LocalRegistry) error { _, err := r.GCReport(ctx, nil); return err },
		"Verify": func(r *ocilocal.LocalRegistry) error {
			return last(r.Verify(ctx, &ocilocal.VerifyOptions{Quick: true}))
		},
		"Refs":  func(r *ocilocal.LocalRegistry) error { return last(r.Refs(ctx, nil)) },
		"Names": func(r *ocilocal.LocalRegistry) error { return last(r.Repositories(ctx, nil)) },
	}
	for what, c := range map[string]struct {
		from, to func(i int) []byte // in the i-th row
		tables   int                // that have these bytes
		notice   []string           // calls that must; others need only end
	}{
		"names": {
			func(i int) []byte { return fmt.Appendf(nil, "example.com/in/order/n%04d", i) },
			func(i int) []byte { return fmt.Appendf(nil, "example.com/in/order/a%04d", i) }, 2, // and the index of refs
			[]string{"Refs"}, // Names seeks each name from the one before, and so may pass a row by
		},
		"digests": {
			func(i int) []byte { return digestOf('f', i) },
			func(i int) []byte { return digestOf('0', i) }, 4, // and the index of content
			[]string{"Verify"},
		},
		// A row begins with its id, the length of its header, and the types of an id and a digest.
		"ids of content and manifests": {
			func(i int) []byte { return append(rowID(i), 8, 0, 78) },
			func(i int) []byte { return append(rowID(0), 8, 0, 78) }, 2,
			[]string{"GCReport"},
		},
		"ids of members": {
			func(i int) []byte { return []byte{8, 2, 8, 1, 2, 9, 9, 31, byte(i >> 8), byte(i), 2} },
			func(i int) []byte { return []byte{8, 2, 8, 1, 2, 9, 9, 31, 0, 0, 2} }, 1,
			nil,
		},
	} {
		index := slices.Clone(sound)
		for _, i := range []int{500, 1000, 2000} { // pages have 500 or 1,000 rows. None of these may be in an inner node
			if n := bytes.Count(index, c.from(i)); n < c.tables {
				t.Fatalf("%s: row %d is there %d times", what, i, n)
			}
			index = bytes.ReplaceAll(index, c.from(i), c.to(i))
		}
		if err := os.WriteFile(name, index, 0o600); err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, root)
		for call, run := range calls {
			if err := run(r); !errors.Is(err, ocilocal.ErrCorruptIndex) && (err != nil || slices.Contains(c.notice, call)) {
				t.Errorf("%s: %s: %v", what, call, err)
			}
		}
		r.Close() // which may say that the index is damaged
	}
}

// rowID returns the id of a row as SQLite writes it, in two bytes.
func rowID(i int) []byte { return []byte{0x80 | byte(i>>7), byte(i & 0x7f)} }

// last returns the error that ends a listing.
func last[T any](listing iter.Seq2[T, error]) (err error) {
	for _, err = range listing {
		continue
	}
	return err
}

// TestIndexCutOff cuts the index off at the boundaries of its pages and near them.
func TestIndexCutOff(t *testing.T) {
	d := newDamagedRoot(t)
	const page = 4096
	for at := 0; at <= len(d.index); at += page * scaled(4, 2, 1) {
		for _, n := range []int{at - 1, at, at + 1} {
			if n < 0 || n > len(d.index) {
				continue
			}
			d.putIndex(t, d.index[:n])
			if failed := d.use(t); !failed && n < len(d.index)-page {
				t.Errorf("cut off at %d of %d bytes: not noticed", n, len(d.index))
			}
		}
	}
}

// TestIndexJournals puts files beside the index under the names that SQLite uses there.
func TestIndexJournals(t *testing.T) {
	d := newDamagedRoot(t)
	for name, c := range map[string]struct {
		file    string
		content []byte
		refused bool // otherwise it must not matter
	}{
		"empty -wal":         {"-wal", nil, false},
		"noise as -wal":      {"-wal", noise(1, 40_000), false},
		"empty -shm":         {"-shm", nil, false},
		"noise as -shm":      {"-shm", noise(2, 32<<10), false},
		"short -shm":         {"-shm", noise(3, 100), false},
		"empty -journal":     {"-journal", nil, true},
		"noise as a journal": {"-journal", noise(4, 4096), true},
	} {
		t.Run(name, func(t *testing.T) {
			d.putIndex(t, d.index)
			if err := os.WriteFile(filepath.Join(d.root, "index.sqlite3"+c.file), c.content, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.refused {
				for what, open := range openers {
					if r, err := open(t.Context(), d.root, nil); !errors.Is(err, ocilocal.ErrForeignIndex) {
						t.Errorf("%s: %v, want ErrForeignIndex", what, err)
						if err == nil {
							mustClose(t, r)
						}
					}
				}
			} else if d.use(t) {
				t.Error("a file beside the index is taken for a part of it")
			}
			os.Remove(filepath.Join(d.root, "index.sqlite3-journal"))
		})
	}
}

// openers are the two ways to open a registry.
var openers = map[string]func(context.Context, string, *ocilocal.Options) (*ocilocal.LocalRegistry, error){
	"Open": ocilocal.Open, "OpenReadOnly": ocilocal.OpenReadOnly,
}

// TestBlobBitFlips flips bits in all parts of each blob. Every way to read finds each of them.
func TestBlobBitFlips(t *testing.T) {
	d := newDamagedRoot(t)
	r, err := ocilocal.OpenReadOnly(t.Context(), d.root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got := problems(t, r, nil, nil); len(got) != 0 {
		t.Fatalf("found %q", got)
	}
	flips := scaled(20, 200, 4000)
	for i := range flips {
		ref := d.refs[i%len(d.refs)]
		a, err := r.Load(t.Context(), ocilocal.MustParseReference(ref))
		if err != nil {
			t.Fatal(err)
		}
		var d digest.Digest
		if i%2 == 0 {
			d = a.Digest()
		} else {
			d = digest.FromString(ref)
		}
		at := -1
		flip := func(b []byte) []byte {
			if at < 0 {
				at = rand.IntN(len(b) * 8)
			}
			b[at/8] ^= 1 << (at % 8)
			return b
		}
		rewrite(t, blobFile(r, d), flip)
		if label, err := readLabelled(r, ref); !errors.Is(err, ocilocal.ErrDigestMismatch) {
			t.Fatalf("%s with bit %d of %s flipped reads %q, %v", ref, at, d, label, err)
		}
		if got := problems(t, r, nil, map[digest.Digest]string{d: ref}); !slices.Contains(got, "blob is damaged "+ref) {
			t.Fatalf("%s with bit %d of %s flipped: found %q", ref, at, d, got)
		}
		rewrite(t, blobFile(r, d), flip) // back
		if label, err := readLabelled(r, ref); label != ref || err != nil {
			t.Fatalf("%s reads %q, %v", ref, label, err)
		}
	}
}
