package ocilocal

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// indexMode is what a handle may do with the index's files.
type indexMode int

const (
	indexReadWrite indexMode = iota
	indexQueryOnly           // no changes, but SQLite may make its -wal and -shm
	indexReadOnly            // no file is made
	indexImmutable           // nor is a -wal looked at, or a lock taken: right only while nobody writes
)

// A database says how SQLite is to open one. All connections of this package, to whatever
// database, are made by its pool method.
type database struct {
	path string // absolute
	mode indexMode
	// private is set while this process makes the database in a place that no other one looks
	// at. It is in rollback mode, so a journal beside it is this process's.
	private bool
	// anyOwner lets the files of the database belong to different users.
	anyOwner bool
	// same, which may be nil, decides before each connection is made, and after it has opened
	// the files, whether path leads to the database that is meant.
	same func() error
	// sameFile, which may be nil, decides for each read on an open connection whether path still names
	// the same file. It is cheaper than same.
	sameFile func() error
}

// dsn names the database by URL, since a plain path would be cut at ?, # and %. The path must
// be absolute; on Windows a slash comes before the drive. Each setting is in the DSN, because a
// PRAGMA that is executed reaches only one connection of a pool:
//
//	_txlock=immediate    a transaction takes the write lock when it begins. One that reads first
//	                     and writes later can fail without waiting (SQLITE_BUSY_SNAPSHOT)
//	_dqs=0               "x" is never a text, so a misspelt column is an error
//	_defensive=1         no statement can damage the database's own structures
//	foreign_keys         no row points at nothing
//	synchronous(FULL)    a commit is durable when it returns
//	trusted_schema(0)    a planted schema can't call functions with side effects
//	cell_size_check      a damaged page is noticed when it is read
//	journal_size_limit   the log does not stay large for ever after one large transaction
func (d *database) dsn(access string, pragmas ...string) string {
	path := filepath.ToSlash(d.path)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	q := url.Values{
		"mode":       {access},
		"_txlock":    {"immediate"},
		"_dqs":       {"0"},
		"_defensive": {"1"},
		"_pragma": append([]string{"foreign_keys(1)", "synchronous(FULL)", "trusted_schema(0)", "cell_size_check(1)",
			"journal_size_limit(16777216)"}, pragmas...),
	}
	if d.mode == indexImmutable {
		q.Set("immutable", "1")
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

// pool returns a pool of connections. It opens none yet.
func (d *database) pool(access string, pragmas ...string) (*sql.DB, error) {
	if !filepath.IsAbs(d.path) {
		return nil, fmt.Errorf("%w: path of database %q is not absolute", ErrInvalidArgument, d.path)
	}
	base, err := sqlite.NewConnector(d.dsn(access, pragmas...))
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(&connector{Connector: base, database: d}), nil
}

// A connector opens the connections of a pool. It checks the files before SQLite opens them, since
// opening alone can change or block something. It checks again when they are open: files that were
// exchanged between the two steps are found then, before any row is read.
type connector struct {
	driver.Connector
	database *database
}

func (c *connector) Connect(ctx context.Context) (_ driver.Conn, err error) {
	if err := c.database.check(); err != nil {
		return nil, err
	}
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if err = prepareConn(ctx, conn); err == nil {
		err = c.database.check()
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// check decides whether SQLite may open the database: see checkDatabase and the field same.
func (d *database) check() error {
	if err := checkDatabase(d.path, d.private, d.anyOwner); err != nil {
		return err
	}
	if d.same == nil {
		return nil
	}
	return d.same()
}

// sqliteLimits bound what a database may make SQLite do, where ours needs less than SQLite allows.
// See https://www.sqlite.org/security.html.
var sqliteLimits = [...]struct{ id, most int }{
	// One row: the annotations of a manifest, twice as long at most when they are written
	// canonically.
	{sqlite3.SQLITE_LIMIT_LENGTH, 4 * MaxManifestSize},
	{sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000},
	{sqlite3.SQLITE_LIMIT_COLUMN, 100},
	{sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100},
	{sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 10},
	{sqlite3.SQLITE_LIMIT_VDBE_OP, 25_000},
	{sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 8},
	{sqlite3.SQLITE_LIMIT_ATTACHED, 1}, // a backup's snapshot
	{sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 50},
	{sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 100},
	{sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1},
	{sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0},
}

// prepareConn sets the limits of a new connection, and makes it open its files, which SQLite does
// only with the first query. The driver sets limits only for an [sql.Conn], so the connection is
// lent to a pool for that.
func prepareConn(ctx context.Context, conn driver.Conn) error {
	db := sql.OpenDB(lender{conn})
	defer db.Close()
	c, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, l := range sqliteLimits {
		if _, err := sqlite.Limit(c, l.id, l.most); err != nil {
			return err
		}
	}
	var version int
	return c.QueryRowContext(ctx, "PRAGMA schema_version").Scan(&version)
}

// A lender is a connector that gives out one connection, which its pool cannot close.
type lender struct{ conn driver.Conn }

func (l lender) Connect(context.Context) (driver.Conn, error) { return lent{l.conn}, nil }
func (l lender) Driver() driver.Driver                        { return nil }

type lent struct{ driver.Conn }

func (lent) Close() error          { return nil }
func (l lent) Unwrap() driver.Conn { return l.Conn }

// indexError gives an error of SQLite its sentinel, by its code and never by its text. Other
// errors, such as that of a context, stay as they are.
func indexError(err error) error {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return err
	}
	kind := ErrIndexIO
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		kind = ErrBusy
	case sqlite3.SQLITE_FULL:
		kind = ErrNoSpace
	case sqlite3.SQLITE_READONLY:
		kind = ErrReadOnly
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH,
		sqlite3.SQLITE_ERROR: // the statements are constant and tested, so the schema does not fit
		kind = ErrCorruptIndex
	}
	if e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE { // its shared memory, a file, can't grow
		kind = ErrNoSpace
	}
	return fmt.Errorf("%w: %w", kind, err)
}
