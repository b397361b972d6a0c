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

// migrations take the index from one schema version to the next. PRAGMA user_version is how many of
// them it has had. A list that was released never changes, and a new version appends one. The
// statements have the exact text that SQLite keeps, because checkSchema compares it.
//
//	meta       facts about the index: see the constants metaID, …
//	blobs      a row for each blob and each manifest. kind is the role in which it was first seen, created when
//	manifests  a row for each manifest, which repeats what queries need of the document
//	members    the descriptors that a manifest needs, in its order: config, layers, or other manifests
//	refs       the refs, each with the descriptor that it points at
var migrations = [...][]string{{
	`CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE blobs (digest TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL, kind TEXT NOT NULL, created INTEGER NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE manifests (digest TEXT NOT NULL PRIMARY KEY REFERENCES blobs (digest), media_type TEXT NOT NULL, artifact_type TEXT NOT NULL, size INTEGER NOT NULL, config TEXT NOT NULL, subject TEXT NOT NULL, annotations TEXT NOT NULL, created INTEGER NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE INDEX manifests_by_subject ON manifests (subject) WHERE subject <> ''`,
	`CREATE TABLE members (manifest TEXT NOT NULL REFERENCES manifests (digest) ON DELETE CASCADE, position INTEGER NOT NULL, role TEXT NOT NULL, digest TEXT NOT NULL REFERENCES blobs (digest), media_type TEXT NOT NULL, size INTEGER NOT NULL, annotations TEXT NOT NULL, PRIMARY KEY (manifest, position)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX members_by_digest ON members (digest)`,
	`CREATE TABLE refs (name TEXT NOT NULL, reference TEXT NOT NULL, manifest TEXT NOT NULL REFERENCES manifests (digest), media_type TEXT NOT NULL, artifact_type TEXT NOT NULL, size INTEGER NOT NULL, updated INTEGER NOT NULL, PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX refs_by_manifest ON refs (manifest)`,
}}

// createIndex makes a complete index at path, a private place that no other process looks at. The
// caller gives it its name. So nobody ever sees half of an index, and nobody else takes part in the
// switch to a write-ahead log, for which SQLite does not wait as busy_timeout says.
func createIndex(ctx context.Context, path, id string, schema [][]string, unreconciled bool) (err error) {
	db, err := (&database{path: path, private: true}).pool("rwc")
	if err != nil {
		return err
	}
	db.SetMaxOpenConns(1)
	defer func() { err = errors.Join(err, indexError(db.Close())) }()
	stmts := []string{fmt.Sprintf("PRAGMA application_id = %d", indexAppID)}
	for _, m := range schema {
		stmts = append(stmts, m...)
	}
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

func setVersion(n int) string { return fmt.Sprintf("PRAGMA user_version = %d", n) }

// migrate brings the index to this program's schema version, unless another process was faster.
func (x *index) migrate(ctx context.Context) error {
	return x.writeAlone(ctx, func(tx *indexTx) error {
		version, err := tx.version()
		if err != nil {
			return err
		}
		var stmts []string
		for _, m := range x.schema[version:] {
			stmts = append(stmts, m...)
		}
		for _, s := range append(stmts, setVersion(len(x.schema))) {
			if _, err := tx.exec(s); err != nil {
				return err
			}
		}
		return nil
	})
}

// version returns the index's schema version, and a [*SchemaError] if this program does not know
// it.
func (t *indexTx) version() (version int, err error) {
	if _, err = t.row("PRAGMA user_version", nil, &version); err == nil && version > t.newest {
		err = &SchemaError{Found: version, Supported: t.newest}
	}
	return version, err
}

// checkSchema refuses a database that is not ours, that is newer, or that holds an object which the
// migrations did not make: a planted trigger could change what our statements do. It
// returns the schema's version.
//
// Errors: [ErrForeignIndex], [*SchemaError], [ErrCorruptIndex], [ErrIndexIO].
func (x *index) checkSchema(ctx context.Context) (version int, err error) {
	conn, err := x.readers.Conn(ctx)
	if err != nil {
		return 0, unrecognised(x.openError(err))
	}
	defer conn.Close()
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
	for _, m := range x.schema[:version] {
		for _, s := range m {
			want[s] = true
		}
	}
	rows, err := conn.QueryContext(ctx, "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema")
	if err != nil {
		return 0, x.openError(err)
	}
	defer rows.Close()
	for rows.Next() {
		var kind, name, table, text string
		if err := rows.Scan(&kind, &name, &table, &text); err != nil {
			return 0, x.openError(err)
		}
		switch { // SQLite's own
		case kind == "index" && text == "" && strings.HasPrefix(name, "sqlite_autoindex_"),
			kind == "table" && strings.HasPrefix(name, "sqlite_stat"):
			continue
		}
		if !want[text] {
			return 0, fmt.Errorf("%w: its schema has %s, which ocilocal did not make", ErrForeignIndex, printable(name))
		}
		words := strings.Fields(text) // CREATE TABLE name …, or CREATE INDEX name ON table …
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

// checkJournalMode refuses an index that has lost its write-ahead log's mark: processes that
// open it would then lock each other out, and leave a journal.
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

// errUnrecognised is of a database so damaged that it does not say whose it is.
var errUnrecognised = errors.New("nothing in it says that it is this package's")

// unrecognised adds errUnrecognised to an [ErrCorruptIndex].
func unrecognised(err error) error {
	if errors.Is(err, ErrCorruptIndex) {
		err = fmt.Errorf("%w (%w)", err, errUnrecognised)
	}
	return err
}

// openError is explain for the first look at a file. A file that is not a database is not ours.
func (x *index) openError(err error) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_NOTADB {
		return fmt.Errorf("%w: %w", ErrForeignIndex, err)
	}
	return x.explain(err)
}
