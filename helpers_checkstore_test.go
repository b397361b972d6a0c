// Checks of a root that share no code with the library: its own SQL, its own reading and hashing of
// files, and a model of the refs that a test has been promised.

package ocilocal_test

import (
	"crypto/sha256"
	"crypto/sha512"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// A model lists for each reference the labels of the artifacts that it may point at. With "" among
// them, the reference may be absent.
type model map[string][]string

// checkStore judges a root that no process has open, and whose last writer was not killed. It shares
// no code with the library, so that a bug there cannot hide here. It reports every problem, and
// returns the references with their labels.
func checkStore(t *testing.T, root string, want model) map[string]string {
	t.Helper()
	return checkWith(t, &storeCheck{root: root, blobs: map[string]int64{}}, want)
}

// checkCollected is checkStore after a collection at grace 0 with no other process there.
func checkCollected(t *testing.T, root string, want model) map[string]string {
	t.Helper()
	return checkWith(t, &storeCheck{root: root, blobs: map[string]int64{}, collected: true}, want)
}

func checkWith(t *testing.T, c *storeCheck, want model) map[string]string {
	t.Helper()
	got := c.run(want)
	if len(c.problems) == 0 {
		c.verify(t)
	}
	for i, p := range c.problems {
		if i == 30 {
			t.Errorf("… and %d more", len(c.problems)-i)
			break
		}
		t.Error(p)
	}
	return got
}

type storeCheck struct {
	root      string
	collected bool             // nothing but what refs need may be there (I6)
	blobs     map[string]int64 // digest → size of every file that hashes to its name
	needed    map[string]bool  // what refs lead to
	kept      map[string]bool  // what their subjects and referrers lead to
	held      []fs.FileInfo    // the files below tmp/held/
	problems  []string
}

func (c *storeCheck) need(digest string) {
	if c.needed == nil {
		c.needed = map[string]bool{}
	}
	c.needed[digest] = true
}

func (c *storeCheck) bad(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

func (c *storeCheck) run(want model) map[string]string {
	c.files()
	return c.index(want)
}

// maxLog is the largest size of the index's log.
const maxLog = 64 << 20

// files checks I5 (every blob file hashes to its name, is read-only and has no other name), I7
// (the log is bounded), I8 (no other files) and that tmp/ is empty.
func (c *storeCheck) files() {
	c.findHeld()
	err := filepath.WalkDir(c.root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(c.root, p)
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		parts := strings.Split(filepath.ToSlash(rel), "/")
		switch {
		case rel == ".":
		case len(parts) == 1 && slices.Contains([]string{"blobs", "tmp"}, rel):
			if !fi.IsDir() {
				c.bad("I8: %s is no directory", rel)
			}
		case len(parts) == 1 && slices.Contains([]string{"id", "index.sqlite3", "index.sqlite3-wal", "index.sqlite3-shm"}, rel):
			if !fi.Mode().IsRegular() {
				c.bad("I8: %s is no file", rel)
			}
			if rel == "index.sqlite3-wal" && fi.Size() >= maxLog {
				c.bad("I7: %s has %d bytes", rel, fi.Size())
			}
		case parts[0] == "blobs" && len(parts) == 2 && fi.IsDir():
			if newCheckHash(parts[1]) == nil {
				c.bad("I8: directory of an unknown algorithm: %s", rel)
			}
		case parts[0] == "blobs" && len(parts) == 3 && fi.Mode().IsRegular():
			return c.blob(p, parts[1], parts[2], fi)
		case len(parts) > 1 && parts[1] == "held" && (len(parts) < 5 && fi.IsDir() || len(parts) == 5 && fi.Mode().IsRegular()):
		case len(parts) > 1 && parts[1] == "upload" && (len(parts) == 2 && fi.IsDir() || len(parts) == 3 && fi.Mode().IsRegular()): // they outlive processes too
		default:
			c.bad("I8: %s does not belong here", rel)
		}
		return nil
	})
	if err != nil {
		c.bad("walk: %v", err)
	}
}

// findHeld looks at the blobs below tmp/held/: they outlive processes, and are whole.
func (c *storeCheck) findHeld() {
	held, err := filepath.Glob(filepath.Join(c.root, "tmp", "held", "*", "*", "*"))
	if err != nil {
		c.bad("walk: %v", err)
	}
	for _, name := range held {
		algorithm, encoded, _ := strings.Cut(filepath.Base(name), "-")
		fi, err := os.Lstat(name)
		content, readErr := os.ReadFile(name)
		if err := errors.Join(err, readErr); err != nil {
			c.bad("held blob: %v", err)
			continue
		}
		c.held = append(c.held, fi)
		h := newCheckHash(algorithm)
		if h == nil || fi.Mode().Perm() != 0o444 {
			c.bad("held blob: %s with mode %v", name, fi.Mode())
			continue
		}
		h.Write(content)
		if got := hex.EncodeToString(h.Sum(nil)); got != encoded {
			c.bad("held blob: %s hashes to %s", name, got)
		}
	}
}

func newCheckHash(algorithm string) hash.Hash {
	switch algorithm {
	case "sha256":
		return sha256.New()
	case "sha384":
		return sha512.New384()
	case "sha512":
		return sha512.New()
	}
	return nil
}

func (c *storeCheck) blob(path, algorithm, encoded string, fi fs.FileInfo) error {
	h := newCheckHash(algorithm)
	if h == nil {
		return nil // reported with its directory
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(h, f)
	if err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != encoded {
		c.bad("I5: blob %s:%s (%d bytes) hashes to %s", algorithm, encoded, n, got)
		return nil
	}
	if fi.Mode().Perm() != 0o444 {
		c.bad("I5: blob %s:%s has mode %v, want 0444", algorithm, encoded, fi.Mode())
	}
	names := uint64(1)
	for _, held := range c.held {
		if os.SameFile(held, fi) {
			names++
		}
	}
	if n := links(fi); n != names {
		c.bad("I5: blob %s:%s has %d names", algorithm, encoded, n)
	}
	c.blobs[algorithm+":"+encoded] = n
	return nil
}

// links returns how many names a file has, and 1 where the system does not say.
func links(fi fs.FileInfo) uint64 {
	n := reflect.Indirect(reflect.ValueOf(fi.Sys())).FieldByName("Nlink")
	if !n.IsValid() || !n.CanUint() {
		return 1
	}
	return n.Uint()
}

// verify checks I9: the library finds nothing wrong where the checker found nothing. What a
// killed collector or publisher has left, and no ref needs, is garbage and not damage.
func (c *storeCheck) verify(t *testing.T) {
	t.Helper()
	r, err := ocilocal.Open(t.Context(), c.root, nil)
	if err != nil {
		c.bad("I9: open: %v", err)
		return
	}
	for p, err := range r.Verify(t.Context(), nil) {
		if err != nil || p.Kind != ocilocal.ProblemUnrecorded && p.Kind != ocilocal.ProblemCollected && p.Kind != ocilocal.ProblemMissing || c.needed[string(p.Digest)] {
			c.bad("I9: Verify: %v, %v", p, err)
		}
	}
	if err := r.Close(); err != nil {
		c.bad("I9: close: %v", err)
	}
}

// query runs text and calls row for each row with its columns as text.
func (c *storeCheck) query(db *sql.DB, text string, row func(cols []string)) {
	rows, err := db.Query(text)
	if err != nil {
		c.bad("I1: %s: %v", text, err)
		return
	}
	defer rows.Close()
	names, err := rows.Columns()
	if err != nil {
		c.bad("I1: %s: %v", text, err)
		return
	}
	for rows.Next() {
		vals := make([]sql.NullString, len(names))
		dest := make([]any, len(names))
		for i := range vals {
			dest[i] = &vals[i]
		}
		if err := rows.Scan(dest...); err != nil {
			c.bad("I1: %s: %v", text, err)
			return
		}
		cols := make([]string, len(names))
		for i := range vals {
			cols[i] = vals[i].String
		}
		row(cols)
	}
	if err := rows.Err(); err != nil {
		c.bad("I1: %s: %v", text, err)
	}
}

// index checks I1 to I4.
func (c *storeCheck) index(want model) map[string]string {
	path := filepath.ToSlash(filepath.Join(c.root, "index.sqlite3"))
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	q := url.Values{"mode": {"rw"}, "_pragma": {"busy_timeout(10000)", "query_only(1)"}}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String())
	if err != nil {
		c.bad("I1: %v", err)
		return nil
	}
	defer db.Close()

	// I1: SQLite finds its file sound.
	c.query(db, "PRAGMA integrity_check", func(cols []string) {
		if cols[0] != "ok" {
			c.bad("I1: integrity_check: %s", cols[0])
		}
	})
	c.query(db, "PRAGMA foreign_key_check", func(cols []string) {
		c.bad("I1: foreign_key_check: %q", cols)
	})

	// The rows of blobs and manifests agree with the files.
	sizes := map[string]string{}
	const text = "CASE hex(substr(c.digest, 1, 1)) WHEN '01' THEN 'sha256:' WHEN '02' THEN 'sha384:' WHEN '03' THEN 'sha512:' END || lower(hex(substr(c.digest, 2)))"
	c.query(db, "SELECT "+text+", c.size FROM content c WHERE c.present", func(cols []string) { sizes[cols[0]] = cols[1] })
	rows := map[string][]string{}
	c.query(db, "SELECT "+strings.ReplaceAll(text, "c.", "p.")+", "+text+", t.text, m.size FROM members m JOIN content p ON p.id = m.manifest JOIN content c ON c.id = m.content JOIN types t ON t.id = m.media_type ORDER BY m.manifest, m.position", func(cols []string) {
		rows[cols[0]] = append(rows[cols[0]], strings.Join(cols[1:], " "))
	})
	types := map[string]string{}
	c.query(db, "SELECT "+text+", t.text, m.digest = c.digest AND c.present FROM manifests m JOIN content c ON c.id = m.id JOIN types t ON t.id = m.media_type", func(cols []string) {
		types[cols[0]] = cols[1]
		if cols[2] != "1" {
			c.bad("I1: manifest %s has another digest among the manifests, or is not here", cols[0])
		}
	})

	// I2: the content of every ref is there, with the right hashes. I4: no ref has a value that no
	// call tried to give it.
	got := map[string]string{}
	seen := map[string]bool{}
	c.query(db, "SELECT c.name, c.reference, "+text+" FROM refs c ORDER BY c.name, c.reference", func(cols []string) {
		ref := cols[0] + ":" + cols[1]
		if strings.Contains(cols[1], ":") {
			ref = cols[0] + "@" + cols[1]
		}
		if _, known := types[cols[2]]; !known {
			c.bad("I2: %s: manifest %s has no row", ref, cols[2])
		}
		label := c.closure(ref, cols[2], sizes, rows, seen)
		got[ref] = label
		switch allowed, known := want[ref]; {
		case !known:
			c.bad("I4: %s (%s) is there, and nobody ever attempted it", ref, label)
		case !slices.Contains(allowed, label):
			c.bad("I3/I4: %s points at %q, allowed are %.20q", ref, label, allowed)
		}
	})

	// I6: after a collection there is nothing else.
	if c.collected {
		c.keepReferrers(types, sizes, rows, seen)
		for d := range c.blobs {
			if !c.needed[d] && !c.kept[d] {
				c.bad("I6: blob %s is there and nothing needs it", d)
			}
		}
		for d := range sizes {
			if !c.needed[d] && !c.kept[d] {
				c.bad("I6: row of %s is there and nothing needs it", d)
			}
		}
	}

	// I3: every acknowledged ref is there.
	for ref, allowed := range want {
		if _, there := got[ref]; !there && !slices.Contains(allowed, "") {
			c.bad("I3: %s is lost; it should point at one of %.20q", ref, allowed)
		}
	}
	return got
}

// closure checks a manifest and all that it needs, and returns its label.
func (c *storeCheck) closure(ref, digest string, sizes map[string]string, rows map[string][]string, seen map[string]bool) string {
	type descriptor struct {
		MediaType string
		Digest    string
		Size      int64
	}
	var m struct {
		Config, Subject          *descriptor
		Layers, Blobs, Manifests []descriptor
		Annotations              map[string]string
	}
	if _, ok := c.blobs[digest]; !ok {
		c.bad("I2: %s: manifest %s is missing or damaged", ref, digest)
		return ""
	}
	algorithm, encoded, _ := strings.Cut(digest, ":")
	raw, err := os.ReadFile(filepath.Join(c.root, "blobs", algorithm, encoded))
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	if err != nil {
		c.bad("I2: %s: manifest %s: %v", ref, digest, err)
		return ""
	}
	if seen[digest] {
		return m.Annotations[labelKey]
	}
	seen[digest] = true
	c.need(digest)
	needs := slices.Concat(m.Layers, m.Blobs, m.Manifests)
	if m.Config != nil {
		needs = append([]descriptor{*m.Config}, needs...)
	}
	for i, d := range needs {
		c.need(d.Digest)
		switch size, ok := c.blobs[d.Digest]; {
		case !ok:
			c.bad("I2: %s: %s, which manifest %s needs, is missing or damaged", ref, d.Digest, digest)
		case size != d.Size:
			c.bad("I2: %s: %s has %d bytes, manifest %s says %d", ref, d.Digest, size, digest, d.Size)
		case sizes[d.Digest] != fmt.Sprint(size):
			c.bad("I2: %s: row of blob %s has size %q, file has %d", ref, d.Digest, sizes[d.Digest], size)
		}
		if row := fmt.Sprintf("%s %s %d", d.Digest, d.MediaType, d.Size); i >= len(rows[digest]) || rows[digest][i] != row {
			c.bad("I2: %s: member rows of %s are %q; its number %d should be %q", ref, digest, rows[digest], i, row)
		}
	}
	if len(rows[digest]) != len(needs) {
		c.bad("I2: %s: %d member rows for the %d of manifest %s", ref, len(rows[digest]), len(needs), digest)
	}
	for _, d := range m.Manifests {
		c.closure(ref, d.Digest, sizes, rows, seen)
	}
	if m.Subject != nil { // it may be absent, but a collection keeps one that is there
		if _, there := c.blobs[m.Subject.Digest]; there {
			c.keep(ref, m.Subject.Digest, sizes, rows, seen)
		}
	}
	return m.Annotations[labelKey]
}

// keep adds a manifest that no ref leads to, and its closure, to what a collection keeps. A killed
// collector may have left a part of it, with or without rows.
func (c *storeCheck) keep(ref, digest string, sizes map[string]string, rows map[string][]string, seen map[string]bool) {
	n, needed := len(c.problems), c.needed
	if c.kept == nil {
		c.kept = map[string]bool{}
	}
	c.needed = c.kept
	c.closure(ref, digest, sizes, rows, seen)
	c.problems, c.needed = c.problems[:n], needed
}

// keepReferrers keeps the manifests whose subject is kept, and theirs in turn.
func (c *storeCheck) keepReferrers(types, sizes map[string]string, rows map[string][]string, seen map[string]bool) {
	stays := func(digest string) bool { return c.needed[digest] || c.kept[digest] }
	for more := true; more; {
		more = false
		for digest := range types {
			if _, there := c.blobs[digest]; !there || stays(digest) {
				continue
			}
			algorithm, encoded, _ := strings.Cut(digest, ":")
			var m struct{ Subject struct{ Digest string } }
			raw, err := os.ReadFile(filepath.Join(c.root, "blobs", algorithm, encoded))
			if err := errors.Join(err, json.Unmarshal(raw, &m)); err != nil {
				c.bad("I1: manifest %s: %v", digest, err)
			} else if stays(m.Subject.Digest) {
				c.keep("a referrer", digest, sizes, rows, seen)
				more = true
			}
		}
	}
}

// tmpEntries lists the entries of root/tmp.
func tmpEntries(t *testing.T, root string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, "tmp"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestCheckStoreFinds damages a good root in each way that checkStore must find.
func TestCheckStoreFinds(t *testing.T) {
	t.Parallel()
	const ref = "example.com/check/one:v1"
	good := model{ref: {"first"}}
	exec := func(text string) func(t *testing.T, root string) {
		return func(t *testing.T, root string) {
			db, err := sql.Open("sqlite", filepath.Join(root, "index.sqlite3"))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	firstBlob := func(t *testing.T, root string) string {
		names, err := filepath.Glob(filepath.Join(root, "blobs", "*", "*"))
		if err != nil || len(names) == 0 {
			t.Fatal("no blobs", err)
		}
		return names[0]
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, root string)
		want   model
		find   string // "" = nothing
	}{
		{"sound", func(*testing.T, string) {}, good, ""},
		{"ref lost", exec("DELETE FROM refs"), good, "I3"},
		{"ref never attempted", func(*testing.T, string) {}, model{}, "I4"},
		{"other artifact", func(*testing.T, string) {}, model{ref: {"second"}}, "I3"},
		{"ref to nowhere", exec("UPDATE refs SET manifest = 1000"), good, "I1"},
		{"member lost", exec("DELETE FROM members WHERE position = 0"), good, "I2"},
		{"size changed", exec("UPDATE content SET size = size + 1"), good, "I2"},
		{"blob lost", func(t *testing.T, root string) {
			if err := os.Remove(firstBlob(t, root)); err != nil {
				t.Fatal(err)
			}
		}, good, "I2"},
		{"blob changed", func(t *testing.T, root string) {
			name := firstBlob(t, root)
			os.Chmod(name, 0o600)
			if err := os.WriteFile(name, []byte("x"), 0o444); err != nil {
				t.Fatal(err)
			}
		}, good, "I5"},
		{"blob writable", func(t *testing.T, root string) {
			if err := os.Chmod(firstBlob(t, root), 0o644); err != nil {
				t.Fatal(err)
			}
		}, good, "I5"},
		{"blob with two names", func(t *testing.T, root string) {
			if err := os.Link(firstBlob(t, root), filepath.Join(t.TempDir(), "other")); err != nil {
				t.Fatal(err)
			}
		}, good, "I5"},
		{"large log", func(t *testing.T, root string) {
			if err := errors.Join(os.WriteFile(filepath.Join(root, "index.sqlite3-wal"), nil, 0o600), os.Truncate(filepath.Join(root, "index.sqlite3-wal"), maxLog)); err != nil {
				t.Fatal(err)
			}
		}, good, "I7"},
		{"leftover in tmp", func(t *testing.T, root string) {
			if err := os.Mkdir(filepath.Join(root, "tmp", "old"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, good, "I8"},
		{"stray file", func(t *testing.T, root string) {
			if err := os.WriteFile(filepath.Join(root, "stray"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, good, "I8"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			r := mustOpen(t, root)
			if _, err := publishLabelled(r, ref, "first", ocilocal.KeepExisting, []byte("one"), []byte("two")); err != nil {
				t.Fatal(err)
			}
			mustClose(t, r)
			dontWatch(root)
			c.damage(t, root)
			check := &storeCheck{root: root, blobs: map[string]int64{}}
			check.run(c.want)
			found := strings.Join(check.problems, "\n")
			if c.find == "" && found != "" || c.find != "" && !strings.Contains(found, c.find) {
				t.Errorf("found %q, want a mention of %q", found, c.find)
			}
		})
	}
}
