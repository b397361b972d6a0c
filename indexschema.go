package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// indexAppID is PRAGMA application_id of our index files: "ocil".
const indexAppID = 0x6f63696c

// A schemaVersion is one version of the index's schema. PRAGMA user_version says which one an index
// has. A version that was released never changes, and a new one is appended.
type schemaVersion struct {
	// objects are the statements that make its tables, indexes and views. They have the exact text
	// that SQLite keeps, because checkSchema compares it.
	objects []string
	// upgrade brings an index of the version before to this one. It leaves exactly objects.
	upgrade []string
}

// schemas are all versions, from version 1 on.
var schemas = [...]schemaVersion{{objects: schema1[:]}, {objects: schema2[:], upgrade: upgradeTo2[:]}}

// schema1 named everything by the text of its digest.
var schema1 = [...]string{
	`CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE blobs (digest TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL, kind TEXT NOT NULL, created INTEGER NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE manifests (digest TEXT NOT NULL PRIMARY KEY REFERENCES blobs (digest), media_type TEXT NOT NULL, artifact_type TEXT NOT NULL, size INTEGER NOT NULL, config TEXT NOT NULL, subject TEXT NOT NULL, annotations TEXT NOT NULL, created INTEGER NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE INDEX manifests_by_subject ON manifests (subject) WHERE subject <> ''`,
	`CREATE TABLE members (manifest TEXT NOT NULL REFERENCES manifests (digest) ON DELETE CASCADE, position INTEGER NOT NULL, role TEXT NOT NULL, digest TEXT NOT NULL REFERENCES blobs (digest), media_type TEXT NOT NULL, size INTEGER NOT NULL, annotations TEXT NOT NULL, PRIMARY KEY (manifest, position)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX members_by_digest ON members (digest)`,
	`CREATE TABLE refs (name TEXT NOT NULL, reference TEXT NOT NULL, manifest TEXT NOT NULL REFERENCES manifests (digest), media_type TEXT NOT NULL, artifact_type TEXT NOT NULL, size INTEGER NOT NULL, updated INTEGER NOT NULL, PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX refs_by_manifest ON refs (manifest)`,
}

// schema2 stores a digest as bytes (see [digestBytes]), and names it by an integer elsewhere. Only
// manifests and refs repeat the bytes, for listings. All times are microseconds since 1970; 0 means
// "not known".
//
//	meta       facts about the index: see the constants metaID, …
//	types      media types and artifact types. A row never changes and is never deleted, so a
//	           handle may remember it
//	content    a row for each blob and each manifest that is here, or that a manifest which is here
//	           names. kind is the role in which it was first seen, or manifest since it was recorded as
//	           one. created is when it was first seen, and unneeded since when nothing needs it.
//	           present is 0 for an absent member, and for a subject that is not here. The size of
//	           such a subject is -1, because nothing vouches for it
//	manifests  a row for each manifest that is here. It repeats the parts of the document that
//	           queries need, and the digest, which is the order of a subject's referrers
//	members    the descriptors that a manifest needs, in its order: config, layers, or manifests
//	refs       the refs, each with the descriptor that it points at, so that a listing is one scan.
//	           created is when the ref was made, moved when it began to point where it does, used
//	           when it was last asked for. entry is what else an index.json said of it: canonical
//	           JSON, '' for nothing
//	unnamed    manifests that were imported by digest, without a ref
//	holds      content that a repository keeps for a while without a ref, by the repository's name
//
// Nothing deletes from types: there are few, and a collection that looked for unused ones would
// read all members.
//
// The views are for people who look at an index with the program sqlite3. No statement of the
// package uses them.
var schema2 = [...]string{
	`CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE types (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE) STRICT`,
	`CREATE TABLE content (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE CHECK (length(digest) IN (33, 49, 65)), size INTEGER NOT NULL, kind INTEGER NOT NULL, created INTEGER NOT NULL, present INTEGER NOT NULL DEFAULT 1 CHECK (present IN (0, 1)), unneeded INTEGER NOT NULL DEFAULT 0, CHECK (size >= 0 OR size = -1 AND present = 0)) STRICT`,
	`CREATE TABLE manifests (id INTEGER PRIMARY KEY REFERENCES content (id), digest BLOB NOT NULL, media_type INTEGER NOT NULL REFERENCES types (id), artifact_type INTEGER NOT NULL REFERENCES types (id), subject INTEGER REFERENCES content (id), annotations TEXT NOT NULL, created INTEGER NOT NULL) STRICT`,
	`CREATE INDEX manifests_by_subject ON manifests (subject, digest) WHERE subject IS NOT NULL`,
	`CREATE INDEX manifests_by_type ON manifests (subject, artifact_type, digest) WHERE subject IS NOT NULL`,
	`CREATE TABLE members (manifest INTEGER NOT NULL REFERENCES manifests (id) ON DELETE CASCADE, position INTEGER NOT NULL, role INTEGER NOT NULL, content INTEGER NOT NULL REFERENCES content (id), media_type INTEGER NOT NULL REFERENCES types (id), size INTEGER NOT NULL, annotations TEXT NOT NULL, PRIMARY KEY (manifest, position)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX members_by_content ON members (content)`,
	`CREATE TABLE refs (name TEXT NOT NULL, reference TEXT NOT NULL, manifest INTEGER NOT NULL REFERENCES manifests (id), digest BLOB NOT NULL, size INTEGER NOT NULL, media_type INTEGER NOT NULL REFERENCES types (id), artifact_type INTEGER NOT NULL REFERENCES types (id), created INTEGER NOT NULL, moved INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0, entry TEXT NOT NULL DEFAULT '', PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX refs_by_manifest ON refs (manifest)`,
	`CREATE INDEX refs_by_entry ON refs (manifest) WHERE entry <> ''`,
	`CREATE TABLE unnamed (manifest INTEGER PRIMARY KEY REFERENCES manifests (id) ON DELETE CASCADE, since INTEGER NOT NULL, entry TEXT NOT NULL DEFAULT '') STRICT`,
	`CREATE TABLE holds (name TEXT NOT NULL, content INTEGER NOT NULL REFERENCES content (id), since INTEGER NOT NULL, PRIMARY KEY (name, content)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX holds_by_content ON holds (content)`,
	`CREATE VIEW readable_refs AS SELECT name, reference, ` + readableDigest + ` AS manifest, size, (SELECT text FROM types WHERE id = media_type) AS media_type, (SELECT text FROM types WHERE id = artifact_type) AS artifact_type, datetime(created / 1000000, 'unixepoch') AS created, datetime(moved / 1000000, 'unixepoch') AS moved, entry FROM refs`,
	`CREATE VIEW readable_content AS SELECT id, ` + readableDigest + ` AS digest, size, CASE kind WHEN 1 THEN 'config' WHEN 2 THEN 'layer' WHEN 3 THEN 'manifest' END AS kind, present, datetime(created / 1000000, 'unixepoch') AS created FROM content`,
}

// readableDigest is the text of the column digest.
const readableDigest = `CASE hex(substr(digest, 1, 1)) WHEN '01' THEN 'sha256' WHEN '02' THEN 'sha384' WHEN '03' THEN 'sha512' END || ':' || lower(hex(substr(digest, 2)))`

// createIndex makes a complete index at path, in a directory of this process. The caller then links
// it to its name. So no process ever sees half of an index. The switch to a write-ahead log is made
// here as well: SQLite does not wait for it as busy_timeout says, so with others it could fail.
func createIndex(ctx context.Context, path, id string, schema []schemaVersion, unreconciled bool) (err error) {
	db, err := (&database{path: path, private: true}).pool("rwc")
	if err != nil {
		return err
	}
	db.SetMaxOpenConns(1)
	defer func() { err = errors.Join(err, indexError(db.Close())) }()
	stmts := []string{fmt.Sprintf("PRAGMA application_id = %d", indexAppID)}
	stmts = append(stmts, schema[len(schema)-1].objects...)
	stmts = append(stmts, setVersion(len(schema)))
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return indexError(err)
	}
	defer tx.Rollback()
	for _, s := range stmts {
		if _, err := tx.ExecContext(ctx, s); err != nil {
			return indexError(err)
		}
	}
	meta := map[string]string{metaID: id}
	if unreconciled {
		meta[metaUnreconciled] = "1"
	}
	for k, v := range meta {
		if _, err := tx.ExecContext(ctx, sqlSetMeta, k, v); err != nil {
			return indexError(err)
		}
	}
	if err := tx.Commit(); err != nil {
		return indexError(err)
	}
	_, err = db.ExecContext(ctx, "PRAGMA journal_mode = WAL")
	return indexError(err)
}

// The last column is false for a row with a value of another type. A flipped bit can turn a text
// into a blob of the same bytes. SQLite still reads the schema then, but a copy of the index would
// lack the object.
const sqlSchemaRows = `SELECT type, name, tbl_name, coalesce(sql, ''), typeof(type) = 'text' AND typeof(name) = 'text' AND typeof(tbl_name) = 'text'
	AND typeof(rootpage) = 'integer' AND typeof(sql) IN ('text', 'null') FROM sqlite_schema`

func setVersion(n int) string { return fmt.Sprintf("PRAGMA user_version = %d", n) }

// version returns the index's schema version, and a [*SchemaError] if this program does not know
// it.
func (t *indexTx) version() (version int, err error) {
	if _, err = t.row("PRAGMA user_version", nil, &version); err == nil && version > t.newest {
		err = &SchemaError{Found: version, Supported: t.newest}
	}
	return version, err
}

// checkSchema refuses a database that is not ours, that is newer, or that has other objects than
// its version: a planted trigger could change what our statements do. It returns the schema's
// version.
//
// Errors: [ErrForeignIndex], [*SchemaError], [ErrCorruptIndex], [ErrIndexIO].
func (x *index) checkSchema(ctx context.Context) (version int, err error) {
	conn, err := x.readers.Conn(ctx)
	if err != nil {
		return 0, unrecognised(x.openError(err))
	}
	defer conn.Close()
	// All is read at one moment: another process may be bringing the index up to date.
	if _, err := conn.ExecContext(ctx, "BEGIN"); err != nil {
		return 0, unrecognised(x.openError(err))
	}
	defer conn.ExecContext(context.WithoutCancel(ctx), "ROLLBACK")
	var app int
	if err := conn.QueryRowContext(ctx, "PRAGMA application_id").Scan(&app); err != nil {
		return 0, unrecognised(x.openError(err))
	}
	if app != indexAppID {
		return 0, fmt.Errorf("%w: application id is %#x, not %#x", ErrForeignIndex, app, indexAppID)
	}
	if err := conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return 0, x.openError(err)
	}
	if version > len(x.schema) {
		return 0, &SchemaError{Found: version, Supported: len(x.schema)}
	}
	if err := x.checkJournalMode(ctx, conn); err != nil {
		return 0, err
	}
	if version < 1 {
		return 0, fmt.Errorf("%w: schema version is %d", ErrForeignIndex, version)
	}
	want := map[string]bool{}
	for _, s := range x.schema[version-1].objects {
		want[s] = true
	}
	rows, err := conn.QueryContext(ctx, sqlSchemaRows)
	if err != nil {
		return 0, x.openError(err)
	}
	defer rows.Close()
	for rows.Next() {
		var kind, name, table, text string
		var right bool
		if err := rows.Scan(&kind, &name, &table, &text, &right); err != nil {
			return 0, x.openError(err)
		}
		if !right {
			return 0, fmt.Errorf("%w: the row of %s in its schema has values of other types", ErrCorruptIndex, printable(name))
		}
		switch { // SQLite's own
		case kind == "index" && text == "" && strings.HasPrefix(name, "sqlite_autoindex_"),
			kind == "table" && strings.HasPrefix(name, "sqlite_stat"):
			continue
		}
		if !want[text] {
			return 0, fmt.Errorf("%w: its schema has %s, which ocilocal did not make", ErrForeignIndex, printable(name))
		}
		words := strings.Fields(text) // CREATE TABLE name …, CREATE VIEW name …, or CREATE INDEX name ON table …
		on := words[2]
		if kind == "index" {
			on = words[4]
		}
		// SQLite goes by these columns too, and not always by all of them.
		if name != words[2] || table != on || kind != strings.ToLower(words[1]) {
			return 0, fmt.Errorf("%w: its schema calls %s %s of %s %s of %s, a %s", ErrCorruptIndex, words[1], words[2], on, printable(name), printable(table), printable(kind))
		}
		delete(want, text)
	}
	if err := rows.Err(); err != nil {
		return 0, x.openError(err)
	}
	if len(want) > 0 {
		return 0, fmt.Errorf("%w: its schema lacks %d of version %d's objects", ErrForeignIndex, len(want), version)
	}
	return version, nil
}

// checkJournalMode refuses an index whose header does not say that it uses a write-ahead log.
// Processes that open it would lock each other out, and leave a journal.
func (x *index) checkJournalMode(ctx context.Context, conn *sql.Conn) error {
	if x.db.private || x.db.mode == indexImmutable {
		return nil
	}
	var mode string
	if err := conn.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode); err != nil {
		return x.openError(err)
	}
	if mode != "wal" {
		return fmt.Errorf("%w: its journal mode is %s, not wal", ErrCorruptIndex, printable(mode))
	}
	return nil
}

// errUnrecognised marks an [ErrCorruptIndex] of a database that is so damaged that it does not say
// whose it is. Rebuild sets such a database aside only beside an id of ours.
var errUnrecognised = errors.New("nothing in it says that it is this package's")

// unrecognised adds errUnrecognised to an [ErrCorruptIndex].
func unrecognised(err error) error {
	if errors.Is(err, ErrCorruptIndex) {
		err = fmt.Errorf("%w (%w)", err, errUnrecognised)
	}
	return err
}

// openError is explain for the first read of a file. A file that is not a database is not ours.
func (x *index) openError(err error) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_NOTADB {
		return fmt.Errorf("%w: %w", ErrForeignIndex, err)
	}
	return x.explain(err)
}
