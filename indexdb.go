package ocilocal

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// index is the SQLite index of one root. It knows digests and rows, no files.
// It is safe for concurrent use.
//
// Every statement is short and runs to its end: a context is looked at between
// statements, never inside one, because the driver pays for a cancelable query
// with a goroutine and for a cancelled one with the connection.
type index struct {
	readers *sql.DB
	writer  *sql.DB // one connection; nil in a read-only registry
	busy    time.Duration
	schema  [][]string // migrations, but for tests
	db      database

	// conn is writer's connection, with the statements prepared on it. They
	// belong to the goroutine that leads: see write.
	conn      *sql.Conn
	connStmts map[string]*sql.Stmt
	changes   int64 // rows that conn had changed when it last committed

	damaged atomic.Bool // explain has found the index damaged

	mu      sync.Mutex           // guards what follows
	stmts   map[string]*sql.Stmt // on readers
	queue   []*writeRequest
	leading bool // some goroutine is committing, and will look at queue when done
}

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
	// private is set while this process makes the database in a directory of its own: in
	// rollback mode, so that a journal beside it is its own.
	private bool
	// anyOwner lets the files of the database belong to different users.
	anyOwner bool
	// same, which may be nil, decides before each connection is made, and after it has opened
	// the files, whether path leads to the database that is meant.
	same func() error
}

// dsn names the database by URL, since a plain path would be cut at ?, # and %. The path must
// be absolute; on Windows a slash comes before the drive.
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

// A connector opens the connections of a pool, after a look at the files.
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

// check decides whether SQLite may open the database, and is asked again when it has.
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
	// One row: the annotations of a manifest, twice as long at most when they are written canonically.
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

// prepareConn sets the limits of a new connection, and has it open its files. The driver sets
// limits only for an [sql.Conn], so the connection is lent to a pool for that.
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

// A lender hands out one connection, which its pool cannot close.
type lender struct{ conn driver.Conn }

func (l lender) Connect(context.Context) (driver.Conn, error) { return lent{l.conn}, nil }
func (l lender) Driver() driver.Driver                        { return nil }

type lent struct{ driver.Conn }

func (lent) Close() error          { return nil }
func (l lent) Unwrap() driver.Conn { return l.Conn }

// openUnchecked opens a database that may be damaged, or another's.
func openUnchecked(db database, busy time.Duration, schema [][]string) (*index, error) {
	x := &index{busy: busy, schema: schema, db: db, stmts: map[string]*sql.Stmt{}, connStmts: map[string]*sql.Stmt{}}
	var err error
	if x.readers, err = x.readerPool("query_only(1)"); err != nil {
		return nil, err
	}
	x.readers.SetMaxOpenConns(max(2, runtime.NumCPU()))
	x.readers.SetMaxIdleConns(max(2, runtime.NumCPU()))
	if db.mode == indexReadWrite {
		if x.writer, err = db.pool("rw", fmt.Sprintf("busy_timeout(%d)", busyPoll.Milliseconds()), "cache_size(-16000)"); err != nil {
			return nil, errors.Join(err, x.close())
		}
		x.writer.SetMaxOpenConns(1)
	}
	return x, nil
}

// readerPool returns a pool of connections in the mode of the index, which wait for locks.
func (x *index) readerPool(pragmas ...string) (*sql.DB, error) {
	access := "rw"
	if x.db.mode >= indexReadOnly {
		access = "ro"
	}
	return x.db.pool(access, append(pragmas, "busy_timeout(5000)")...)
}

func (x *index) close() error {
	err := x.readers.Close()
	if x.writer != nil {
		// Last, so that SQLite's checkpoint at the end can delete the -wal.
		// database/sql closes neither the statements of a Conn with it, nor
		// the connection before its statements.
		for _, s := range x.connStmts {
			err = errors.Join(err, s.Close())
		}
		if x.conn != nil {
			err = errors.Join(err, x.conn.Close())
		}
		err = errors.Join(err, x.writer.Close())
	}
	return indexError(err)
}

// openError is explain for the first look at a file: what is no database isn't ours.
func (x *index) openError(err error) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_NOTADB {
		return fmt.Errorf("%w: %w", ErrForeignIndex, err)
	}
	return x.explain(err)
}

// indexError gives an error of SQLite its sentinel, by code.
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
		sqlite3.SQLITE_ERROR: // our statements are right, so it is the schema that does not fit them
		kind = ErrCorruptIndex
	}
	if e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE { // its shared memory, a file, can't grow
		kind = ErrNoSpace
	}
	return fmt.Errorf("%w: %w", kind, err)
}

// stmt returns the prepared form of a constant statement for readers.
func (x *index) stmt(ctx context.Context, text string) (*sql.Stmt, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if s := x.stmts[text]; s != nil {
		return s, nil
	}
	s, err := x.readers.PrepareContext(ctx, text)
	if err != nil {
		return nil, x.explain(err)
	}
	x.stmts[text] = s
	return s, nil
}

// stmt returns the prepared form of a constant statement inside the transaction.
func (t *indexTx) stmt(text string) (*sql.Stmt, error) {
	if s := t.connStmts[text]; s != nil {
		return s, nil
	}
	s, err := t.conn.PrepareContext(context.Background(), text)
	if err != nil {
		return nil, t.explain(err)
	}
	t.connStmts[text] = s
	return s, nil
}

func (t *indexTx) exec(text string, args ...any) (rows int64, err error) {
	s, err := t.stmt(text)
	if err != nil {
		return 0, err
	}
	r, err := s.Exec(args...)
	if err != nil {
		return 0, t.explain(err)
	}
	return r.RowsAffected()
}

func (t *indexTx) row(text string, args []any, dest ...any) (bool, error) {
	s, err := t.stmt(text)
	if err != nil {
		return false, err
	}
	return scanned(t, s.QueryRow(args...).Scan(dest...))
}

// row reads at most one row outside a transaction.
func (x *index) row(text string, args []any, dest ...any) (bool, error) {
	s, err := x.stmt(context.Background(), text)
	if err != nil {
		return false, err
	}
	return scanned(x, s.QueryRow(args...).Scan(dest...))
}

func scanned(q queryer, err error) (bool, error) {
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, q.explain(err)
}

// query runs a query on a connection of the pool. Its rows keep that connection until they
// are closed, so nothing else may be asked of the index meanwhile. ctx ends the query while it runs.
func (x *index) query(ctx context.Context, text string, args []any) (*sql.Rows, error) {
	s, err := x.stmt(ctx, text)
	if err != nil {
		return nil, err
	}
	rows, err := s.QueryContext(ctx, args...)
	return rows, x.explain(err)
}

// query runs a query in the transaction. It is not interrupted when ctx ends, since that
// could undo the whole transaction, which others share.
func (t *indexTx) query(_ context.Context, text string, args []any) (*sql.Rows, error) {
	s, err := t.stmt(text)
	if err != nil {
		return nil, err
	}
	rows, err := s.Query(args...)
	return rows, t.explain(err)
}

// scanAll reads all rows of a query whose own LIMIT is limit.
func scanAll[T any](ctx context.Context, q queryer, text string, limit int, args []any, scan func(*sql.Rows) (T, error)) ([]T, error) {
	rows, err := q.query(ctx, text, args)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := make([]T, 0, limit)
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, q.explain(err)
		}
		all = append(all, v)
	}
	return all, q.explain(rows.Err())
}

// snapshot writes the index as it is at one moment to a new file, in one read transaction.
func (x *index) snapshot(ctx context.Context, path string) error {
	if err := checkDatabase(path, false, x.db.anyOwner); err != nil {
		return err
	}
	db, err := x.readerPool() // query_only would forbid it
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, "VACUUM INTO ?", path)
	return errors.Join(x.explain(err), indexError(db.Close()))
}

// attach gives the transactions of x another database, by the name other. It
// must be called before the first of them, since SQLite attaches none within one.
func (x *index) attach(path string) error {
	if err := checkDatabase(path, false, x.db.anyOwner); err != nil {
		return err
	}
	if err := x.connect(); err != nil {
		return err
	}
	_, err := (&indexTx{x}).exec("ATTACH DATABASE ? AS other", path)
	return err
}
