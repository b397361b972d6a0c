package ocilocal_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// strace counts system calls by thread, so the worker stays on the one that the process began with.
func init() {
	if os.Getenv(workerEnv) == "migrate" {
		runtime.LockOSThread()
	}
	workers["migrate"] = migrateWorker
}

// migrateWorker opens the root in its argument, closes it, and reports the outcome.
func migrateWorker(in *bufio.Scanner, args []string) error {
	if len(args) > 1 { // wait for a line
		say("ready")
		in.Scan()
	}
	r, err := ocilocal.Open(context.Background(), args[0], nil)
	if err == nil {
		err = r.Close()
	}
	if err != nil {
		say("failed", err)
		return nil
	}
	say("opened")
	return nil
}

// digestText is the SQL for the text of the column digest of c.
const digestText = "CASE hex(substr(c.digest, 1, 1)) WHEN '01' THEN 'sha256:' WHEN '02' THEN 'sha384:' WHEN '03' THEN 'sha512:' END || lower(hex(substr(c.digest, 2)))"

// indexRows are queries that return all facts of an index as texts, one for each row, for each
// schema version. Queries at the same place return the same texts.
var indexRows = map[int][]string{
	1: {
		"SELECT 'meta', key, value FROM meta WHERE key <> 'commits'",
		"SELECT 'content', digest, size, kind, created, 1 FROM blobs",
		"SELECT DISTINCT 'content', subject, -1, 'manifest', '', 0 FROM manifests WHERE subject NOT IN (SELECT digest FROM blobs) AND subject <> ''",
		"SELECT 'manifest', digest, media_type, artifact_type, subject, annotations, created FROM manifests",
		"SELECT 'member', manifest, position, role, digest, media_type, size, annotations FROM members",
		"SELECT 'ref', name, reference, manifest, size, media_type, artifact_type, updated, updated, 0, '' FROM refs",
	},
	2: {
		"SELECT 'meta', key, value FROM meta WHERE key <> 'commits'",
		"SELECT 'content', " + digestText + ", size, CASE kind WHEN 1 THEN 'config' WHEN 2 THEN 'layer' WHEN 3 THEN 'manifest' END, iif(present OR size >= 0, created, ''), present FROM content c",
		"SELECT 'manifest', " + digestText + ", (SELECT text FROM types WHERE id = m.media_type), (SELECT text FROM types WHERE id = m.artifact_type), coalesce((SELECT " + digestText + " FROM content c WHERE id = m.subject), ''), annotations, m.created FROM manifests m JOIN content c ON c.id = m.id AND c.digest = m.digest",
		"SELECT 'member', (SELECT " + digestText + " FROM content c WHERE id = m.manifest), position, CASE role WHEN 1 THEN 'config' WHEN 2 THEN 'layer' WHEN 3 THEN 'manifest' END, " + digestText + ", (SELECT text FROM types WHERE id = m.media_type), m.size, annotations FROM members m JOIN content c ON c.id = m.content",
		"SELECT 'ref', name, reference, " + digestText + ", c.size, (SELECT text FROM types WHERE id = c.media_type), (SELECT text FROM types WHERE id = c.artifact_type), c.created, c.moved, c.used, c.entry FROM refs c JOIN content o ON o.id = c.manifest AND o.digest = c.digest",
		"SELECT 'unnamed', " + digestText + ", since, entry FROM unnamed u JOIN content c ON c.id = u.manifest",
		"SELECT 'hold', name, " + digestText + ", since FROM holds h JOIN content c ON c.id = h.content",
	},
}

// indexSays returns the schema version of an index and all its facts, sorted. The index must be
// sound, and no other process may use it.
func indexSays(t *testing.T, root string) (version int, says []string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(root, "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var sound string
	if err := errors.Join(db.QueryRow("PRAGMA integrity_check").Scan(&sound), db.QueryRow("PRAGMA user_version").Scan(&version)); err != nil || sound != "ok" {
		t.Fatal(err, sound)
	}
	for _, text := range append(indexRows[version], "SELECT 'dangling', * FROM pragma_foreign_key_check") {
		rows, err := db.Query(text)
		if err != nil {
			t.Fatal(err)
		}
		columns, _ := rows.Columns()
		for rows.Next() {
			values := make([]any, len(columns))
			dest := make([]any, len(columns))
			for i := range values {
				dest[i] = &values[i]
			}
			if err := rows.Scan(dest...); err != nil {
				t.Fatal(err)
			}
			says = append(says, strings.TrimSpace(fmt.Sprintln(values...)))
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if len(says) == 0 {
		t.Fatal("nothing")
	}
	slices.Sort(says)
	return version, says
}

// checkMigrated opens a root, and makes sure that its index then has this program's version and the
// same facts as before.
func checkMigrated(t *testing.T, root string, before []string) {
	t.Helper()
	mustClose(t, mustOpen(t, root))
	if version, after := indexSays(t, root); version != 2 || !slices.Equal(before, after) {
		t.Errorf("version %d says\n%.3000s\nversion 1 said\n%.3000s", version, strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
}

// schema1Root unpacks the registry of schema version 1, and returns the facts of its index.
func schema1Root(t *testing.T) (root string, says []string) {
	t.Helper()
	root = unpackGolden(t, "ocilocal-schema1.tar.gz")
	dontWatch(root)
	version, says := indexSays(t, root)
	if version != 1 {
		t.Fatalf("its version is %d", version)
	}
	return root, says
}

// largeSchema1Root is schema1Root with n artifacts more, which have rows and no blobs.
func largeSchema1Root(t *testing.T, n int) (root string, says []string) {
	t.Helper()
	root, _ = schema1Root(t)
	rows := fmt.Sprintf(`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d),
		d (i, d, layer) AS (SELECT i, printf('sha256:%%064x', i * 7919 %% 1000003), printf('sha512:%%0128x', i)  FROM n) `, n)
	for _, text := range []string{
		`INSERT INTO blobs SELECT d, 1000, 'manifest', i FROM d`,
		`INSERT INTO blobs SELECT layer, i, 'layer', i FROM d`,
		`INSERT INTO manifests SELECT d, 'application/m', 'application/a' || i % 10, 1000, '', printf('sha384:%096x', i % 1000), '{"n":"' || i || '"}', i FROM d`,
		`INSERT INTO members SELECT d, 0, 'layer', layer, 'application/l', i, '{}' FROM d`,
		`INSERT INTO refs SELECT 'example.com/large/n' || i % 100, 'v' || i, d, 'application/m', 'application/a' || i % 10, 1000, i FROM d`,
	} {
		execIndex(t, root, rows+text)
	}
	_, says = indexSays(t, root)
	return root, says
}

// TestMigrateSchema1 brings indexes of version 1 up to date. The new index has the facts of the old
// one.
func TestMigrateSchema1(t *testing.T) {
	t.Parallel()
	root, says := schema1Root(t)
	checkMigrated(t, root, says)
	root, says = largeSchema1Root(t, scaled(2000, 20_000, 20_000))
	if _, err := ocilocal.OpenReadOnly(t.Context(), root, nil); !errors.Is(err, ocilocal.ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	checkMigrated(t, root, says)
}

// countdown is a context that is cancelled when its error was asked for so many times.
type countdown struct {
	context.Context
	left atomic.Int64
}

func newCountdown(ctx context.Context, n int) *countdown {
	c := &countdown{Context: ctx}
	c.left.Store(int64(n))
	return c
}

func (c *countdown) Err() error {
	if c.left.Add(-1) < 0 {
		return context.Canceled
	}
	return nil
}

// Done is nil, so that no goroutine of database/sql asks as well: see lookCtx.
func (c *countdown) Done() <-chan struct{} { return nil }

// TestMigrateCancelled ends the migration before each of its statements. The index stays as it was.
func TestMigrateCancelled(t *testing.T) {
	t.Parallel()
	root, says := schema1Root(t)
	for n := 0; ; n++ {
		r, err := ocilocal.Open(newCountdown(t.Context(), n), root, nil)
		if err == nil {
			mustClose(t, r)
			if n < 30 {
				t.Errorf("done after %d questions", n)
			}
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(n, err)
		}
		if version, after := indexSays(t, root); version != 1 || !slices.Equal(says, after) {
			t.Fatalf("after %d questions: version %d says %q", n, version, after)
		}
	}
	checkMigrated(t, root, says)
}

// TestMigrateTogether lets several processes open one index of version 1 at once. One of them
// migrates it, and the others wait.
func TestMigrateTogether(t *testing.T) {
	t.Parallel()
	for range scaled(1, 5, 20) {
		root, says := largeSchema1Root(t, 1000)
		var all []*worker
		for range 4 {
			all = append(all, startWorker(t, "migrate", root, "wait"))
		}
		runTogether(all, "opened")
		checkMigrated(t, root, says)
	}
}

// TestMigrateDuringRead: a process that reads an index of version 1 reads on while another process
// migrates it. Afterwards it can't write.
func TestMigrateDuringRead(t *testing.T) {
	t.Parallel()
	root, says := schema1Root(t)
	db, err := sql.Open("sqlite", filepath.Join(root, "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	old, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	count := func() (n int) {
		if err := old.QueryRowContext(t.Context(), "SELECT count(*) FROM blobs").Scan(&n); err != nil {
			t.Error(err)
		}
		return n
	}
	if _, err := old.ExecContext(t.Context(), "BEGIN"); err != nil {
		t.Fatal(err)
	}
	before := count()
	mustClose(t, mustOpen(t, root))
	if after := count(); after != before || after == 0 {
		t.Errorf("%d blobs, then %d", before, after)
	}
	if _, err := old.ExecContext(t.Context(), "DELETE FROM refs"); err == nil {
		t.Error("it writes")
	}
	if _, err := old.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	checkMigrated(t, root, says)
}

// TestMigrateDamaged: an index of version 1 whose rows can't all be migrated stays as it is.
// Rebuild keeps its refs.
func TestMigrateDamaged(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"UPDATE blobs SET digest = 'sha256:zz' WHERE digest = (SELECT max(digest) FROM blobs WHERE kind = 'layer')",
		"UPDATE blobs SET digest = 'md5:' || substr(digest, 8) WHERE kind = 'layer'",
		"UPDATE blobs SET size = -5 WHERE kind = 'layer'",
		"DELETE FROM blobs WHERE kind = 'layer'",
		"DELETE FROM blobs WHERE kind = 'manifest'",
		"DELETE FROM manifests",
		"UPDATE manifests SET subject = 'nonsense' WHERE subject <> ''",
		"UPDATE members SET digest = 'sha256:' || lower(hex(zeroblob(32)))",
		"UPDATE members SET manifest = '' WHERE (manifest, position) = (SELECT max(manifest), 1 FROM members WHERE position = 1)",
		"UPDATE refs SET manifest = 'sha256:' || lower(hex(zeroblob(32))) WHERE reference = 'V1'",
	} {
		root, _ := schema1Root(t)
		alterIndex(t, filepath.Join(root, "index.sqlite3"), text)
		_, before := indexSays(t, root)
		for range 2 {
			if r, err := ocilocal.Open(t.Context(), root, nil); !errors.Is(err, ocilocal.ErrCorruptIndex) {
				t.Errorf("%s: %v, want ErrCorruptIndex", text, err)
				if err == nil {
					mustClose(t, r)
				}
			}
		}
		if version, after := indexSays(t, root); version != 1 || !slices.Equal(before, after) {
			t.Errorf("%s: version %d says %q", text, version, after)
		}
		report, err := ocilocal.Rebuild(t.Context(), root, nil)
		if err != nil || len(report.Left) != 0 {
			t.Errorf("%s: %+v, %v", text, report, err)
			continue
		}
		r := mustOpen(t, root)
		n := 0
		for ref, err := range r.Refs(t.Context(), nil) {
			if want := schemaRefs[ref.Reference.String()]; err != nil || want != "" && want != ref.Descriptor.Digest.Encoded() {
				t.Errorf("%s: %s is at %s, %v", text, ref.Reference, ref.Descriptor.Digest, err)
			} else if want != "" {
				n++
			}
		}
		if n < len(schemaRefs)-1 { // the last statement loses one
			t.Errorf("%s: %d refs are kept", text, n)
		}
		if got := problems(t, r, nil, nil); len(got) != 0 {
			t.Errorf("%s: found %q", text, got)
		}
		mustClose(t, r)
	}
}
