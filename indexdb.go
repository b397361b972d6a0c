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
	"slices"
	"strings"
	"sync"
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
	schema  [][]string                     // migrations, but for tests
	name    func(pragmas ...string) string // of the database, as readers open it

	// conn is writer's connection, with the statements prepared on it. They
	// belong to the goroutine that leads: see write.
	conn      *sql.Conn
	connStmts map[string]*sql.Stmt

	mu      sync.Mutex           // guards what follows
	stmts   map[string]*sql.Stmt // on readers
	queue   []*writeRequest
	leading bool // some goroutine is committing, and will look at queue when done
}

// dsn names a database by URL, since a plain path would be cut at ?, # and %.
func dsn(path, mode string, pragmas ...string) string {
	path = filepath.ToSlash(path)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	q := url.Values{
		"mode":    {mode},
		"_txlock": {"immediate"},
		"_dqs":    {"0"},
		"_pragma": append([]string{"foreign_keys(1)", "synchronous(FULL)", "trusted_schema(0)", "journal_size_limit(16777216)"}, pragmas...),
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

// createIndex makes a complete index at path, a private place where no other
// process looks. The caller links it to its name: so nobody ever sees half of
// one, nor takes part in the switch to WAL, which busy_timeout doesn't cover.
func createIndex(ctx context.Context, path, id string, schema [][]string, unreconciled bool) (err error) {
	db, err := sql.Open("sqlite", dsn(path, "rwc"))
	if err != nil {
		return indexError(err)
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

// indexMode is what a handle may do with the index's files.
type indexMode int

const (
	indexReadWrite indexMode = iota
	indexQueryOnly           // no changes, but SQLite may make its -wal and -shm
	indexReadOnly            // no file is made
	indexImmutable           // nor is a -wal looked at, or a lock taken: right only while nobody writes
)

func setVersion(n int) string { return fmt.Sprintf("PRAGMA user_version = %d", n) }

// openIndex opens the index at path, which must exist, and brings an older one up to date.
func openIndex(ctx context.Context, path string, mode indexMode, busy time.Duration, schema [][]string) (*index, error) {
	x, err := openUnchecked(path, mode, busy, schema)
	if err != nil {
		return nil, err
	}
	version, err := x.checkSchema(ctx)
	if err == nil && version < len(schema) {
		if mode == indexReadWrite {
			err = x.migrate(ctx)
		} else {
			err = fmt.Errorf("%w: its index has schema version %d, and this program needs %d (Open brings it up to date)", ErrReadOnly, version, len(schema))
		}
	}
	if err != nil {
		return nil, errors.Join(err, x.close())
	}
	return x, nil
}

// migrate gives the index what it lacks, unless another process was faster.
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

// version returns the index's schema version, and an error if this program doesn't know it.
func (t *indexTx) version() (version int, err error) {
	if _, err = t.row("PRAGMA user_version", nil, &version); err == nil && version > len(t.schema) {
		err = &SchemaError{Found: version, Supported: len(t.schema)}
	}
	return version, err
}

// busyPoll is how long SQLite itself waits for the write lock. It looks again after 1 ms,
// then after twice as long, and so on; being short, it looks often, and begin can look at contexts in between.
const busyPoll = 5 * time.Millisecond

// openUnchecked opens a database that may be damaged, or another's.
func openUnchecked(path string, mode indexMode, busy time.Duration, schema [][]string) (*index, error) {
	x := &index{busy: busy, schema: schema, stmts: map[string]*sql.Stmt{}, connStmts: map[string]*sql.Stmt{}}
	access := "rw"
	if mode >= indexReadOnly {
		access = "ro"
	}
	x.name = func(pragmas ...string) string {
		name := dsn(path, access, append(pragmas, "busy_timeout(5000)")...)
		if mode == indexImmutable {
			name += "&immutable=1"
		}
		return name
	}
	var err error
	if x.readers, err = sql.Open("sqlite", x.name("query_only(1)")); err != nil {
		return nil, indexError(err)
	}
	x.readers.SetMaxOpenConns(max(2, runtime.NumCPU()))
	x.readers.SetMaxIdleConns(max(2, runtime.NumCPU()))
	if mode == indexReadWrite {
		if x.writer, err = sql.Open("sqlite", dsn(path, "rw", fmt.Sprintf("busy_timeout(%d)", busyPoll.Milliseconds()), "cache_size(-16000)")); err != nil {
			return nil, errors.Join(indexError(err), x.close())
		}
		x.writer.SetMaxOpenConns(1)
	}
	return x, nil
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

// checkSchema refuses a database that isn't ours, is newer, or holds any
// object that the migrations didn't make (a planted trigger could change what
// our statements do). It returns the schema's version.
func (x *index) checkSchema(ctx context.Context) (version int, err error) {
	conn, err := x.readers.Conn(ctx)
	if err != nil {
		return 0, openError(err)
	}
	defer conn.Close()
	var app int
	if err := conn.QueryRowContext(ctx, "PRAGMA application_id").Scan(&app); err != nil {
		return 0, openError(err)
	}
	if app != indexAppID {
		return 0, fmt.Errorf("%w: application id is %#x, not %#x", ErrForeignIndex, app, indexAppID)
	}
	if err := conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return 0, openError(err)
	}
	if version > len(x.schema) {
		return 0, &SchemaError{Found: version, Supported: len(x.schema)}
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
		return 0, openError(err)
	}
	defer rows.Close()
	for rows.Next() {
		var kind, name, table, text string
		if err := rows.Scan(&kind, &name, &table, &text); err != nil {
			return 0, openError(err)
		}
		switch { // SQLite's own
		case kind == "index" && text == "" && strings.HasPrefix(name, "sqlite_autoindex_"),
			kind == "table" && strings.HasPrefix(name, "sqlite_stat"):
			continue
		}
		if !want[text] {
			return 0, fmt.Errorf("%w: its schema has %q, which ocilocal did not make", ErrForeignIndex, clip(name))
		}
		words := strings.Fields(text) // CREATE TABLE name …, or CREATE INDEX name ON table …
		on := words[2]
		if kind == "index" {
			on = words[4]
		}
		// SQLite goes by these columns too, and not always by all of them.
		if name != words[2] || table != on || kind != strings.ToLower(words[1]) {
			return 0, fmt.Errorf("%w: its schema calls %s %s of %s %q of %q, a %q", ErrCorruptIndex, words[1], words[2], on, clip(name), clip(table), clip(kind))
		}
		delete(want, text)
	}
	if err := rows.Err(); err != nil {
		return 0, openError(err)
	}
	if len(want) > 0 {
		return 0, fmt.Errorf("%w: its schema lacks %d of version %d's objects", ErrForeignIndex, len(want), version)
	}
	return version, nil
}

// openError is indexError for the first look at a file: what is no database isn't ours.
func openError(err error) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_NOTADB {
		return fmt.Errorf("%w: %w", ErrForeignIndex, err)
	}
	return indexError(err)
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
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		kind = ErrCorruptIndex
	}
	if e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE { // its shared memory, a file, can't grow
		kind = ErrNoSpace
	}
	return fmt.Errorf("%w: %w", kind, err)
}

// stmt returns the prepared form of a constant statement for readers.
func (x *index) stmt(text string) (*sql.Stmt, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if s := x.stmts[text]; s != nil {
		return s, nil
	}
	s, err := x.readers.Prepare(text)
	if err != nil {
		return nil, indexError(err)
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
		return nil, indexError(err)
	}
	t.connStmts[text] = s
	return s, nil
}

// A writeRequest is one caller's part of a write transaction.
type writeRequest struct {
	ctx      context.Context
	fn       func(*indexTx) error
	alone    bool          // shares its transaction with nobody
	deadline time.Time     // when it has waited long enough for other processes
	done     chan error    // buffered; the outcome
	lead     chan struct{} // buffered; the caller shall commit the queue itself
}

// write runs fn in a write transaction and returns once that is durable.
// Callers that come while another is committing share the next commit, each in
// a savepoint of its own: an error of fn undoes and fails that fn alone.
func (x *index) write(ctx context.Context, fn func(*indexTx) error) error {
	return x.request(&writeRequest{ctx: ctx, fn: fn})
}

// writeAlone is write in a transaction that nobody shares: all that fn reads is
// committed. What fn does outside the index can't be undone by another's failure.
func (x *index) writeAlone(ctx context.Context, fn func(*indexTx) error) error {
	return x.request(&writeRequest{ctx: ctx, fn: fn, alone: true})
}

func (x *index) request(req *writeRequest) error {
	if x.writer == nil {
		return ErrReadOnly
	}
	ctx := req.ctx
	req.deadline, req.done, req.lead = time.Now().Add(x.busy), make(chan error, 1), make(chan struct{}, 1)
	x.mu.Lock()
	x.queue = append(x.queue, req)
	if !x.leading {
		x.leading = true
		req.lead <- struct{}{}
	}
	x.mu.Unlock()
	select {
	case err := <-req.done:
		return err
	case <-req.lead:
	case <-ctx.Done():
		if x.withdraw(req) {
			return ctx.Err()
		}
		select {
		case err := <-req.done: // a leader has it, so its word counts
			return err
		case <-req.lead:
		}
	}
	x.lead(req)
	return <-req.done
}

// lead commits what is queued, and then lets somebody else lead.
func (x *index) lead(self *writeRequest) {
	x.mu.Lock()
	n := 1
	for !x.queue[0].alone && n < len(x.queue) && !x.queue[n].alone {
		n++
	}
	batch := slices.Clone(x.queue[:n])
	x.queue = slices.Delete(x.queue, 0, n)
	x.mu.Unlock()
	var rest []*writeRequest
	defer func() { // after a panic as well: the others must not wait for ever
		x.mu.Lock()
		defer x.mu.Unlock()
		x.queue = append(rest, x.queue...)
		if len(x.queue) > 0 {
			x.queue[0].lead <- struct{}{}
		} else {
			x.leading = false
		}
	}()
	rest = x.commit(batch, self)
}

// withdraw takes a request out of the queue, unless a leader has taken it or it is to lead.
func (x *index) withdraw(req *writeRequest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	i := slices.Index(x.queue, req)
	if i < 0 || len(req.lead) > 0 {
		return false
	}
	x.queue = slices.Delete(x.queue, i, i+1)
	return true
}

// commit runs a batch in one transaction and answers each of its requests. It
// returns those that are left to do because self, which leads, has its answer.
func (x *index) commit(batch []*writeRequest, self *writeRequest) (rest []*writeRequest) {
	batch = x.begin(batch, self)
	if !slices.Contains(batch, self) {
		return batch
	}
	tx := &indexTx{x}
	err := errors.New("a call that shared the transaction ended in a panic")
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.rollback())
		}
		for _, r := range batch {
			r.answer(err)
		}
	}()
	err = tx.runAll(batch)
	return nil
}

// answer tells a request's caller the outcome. The first answer counts.
func (r *writeRequest) answer(err error) {
	select {
	case r.done <- err:
	default:
	}
}

// runAll runs the requests, each in its savepoint, and commits. Those that fail
// by themselves are answered.
func (t *indexTx) runAll(batch []*writeRequest) error {
	// A newer program may have migrated the index since it was opened.
	if _, err := t.version(); err != nil {
		return err
	}
	for _, r := range batch {
		failed, err := t.run(r)
		if err != nil {
			return err // the transaction itself is in doubt
		}
		if failed != nil {
			r.answer(failed)
		}
	}
	_, err := t.exec("COMMIT")
	return err
}

// run runs one request in its savepoint. failed is the request's own error.
func (t *indexTx) run(r *writeRequest) (failed, err error) {
	if failed := r.ctx.Err(); failed != nil {
		return failed, nil
	}
	if _, err := t.exec("SAVEPOINT request"); err != nil {
		return nil, err
	}
	if failed = r.fn(t); failed != nil {
		if _, err := t.exec("ROLLBACK TO request"); err != nil {
			// SQLite has rolled back all of it, as it does on a full disk.
			return nil, errors.Join(failed, err)
		}
	}
	_, err = t.exec("RELEASE request")
	return failed, err
}

// rollback ends a transaction that can't be committed. Should even that fail,
// the connection is given up, which ends the transaction for certain.
func (t *indexTx) rollback() error {
	_, err := t.exec("ROLLBACK")
	if err == nil {
		return nil
	}
	for _, s := range t.connStmts {
		s.Close()
	}
	clear(t.connStmts)
	t.conn.Raw(func(any) error { return driver.ErrBadConn })
	t.conn.Close()
	t.conn = nil
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_ERROR {
		return nil // SQLite had rolled back by itself
	}
	return err
}

// begin waits for the write lock. It answers the requests whose context ends or
// whose deadline passes meanwhile, and returns the others: with the lock held
// if self is among them, which otherwise has no reason to wait on.
func (x *index) begin(batch []*writeRequest, self *writeRequest) []*writeRequest {
	for {
		batch = slices.DeleteFunc(batch, func(r *writeRequest) bool {
			err := r.ctx.Err()
			if err != nil {
				r.answer(err)
			}
			return err != nil
		})
		if !slices.Contains(batch, self) {
			return batch
		}
		err := x.tryBegin()
		if err == nil {
			return batch
		}
		now := time.Now()
		batch = slices.DeleteFunc(batch, func(r *writeRequest) bool {
			late := !errors.Is(err, ErrBusy) || now.After(r.deadline)
			if late {
				r.answer(err)
			}
			return late
		})
	}
}

// tryBegin waits for the write lock for as long as the connection's busy_timeout says.
func (x *index) tryBegin() error {
	if err := x.connect(); err != nil {
		return err
	}
	_, err := (&indexTx{x}).exec("BEGIN IMMEDIATE")
	return err
}

// connect makes the writer's connection, unless there is one.
func (x *index) connect() error {
	if x.conn != nil {
		return nil
	}
	conn, err := x.writer.Conn(context.Background())
	if err == nil {
		x.conn = conn
	}
	return indexError(err)
}

// indexTx is what a function given to write may do with the index's write
// lock held. One goroutine uses it at a time.
type indexTx struct {
	*index
}

func (t *indexTx) exec(text string, args ...any) (rows int64, err error) {
	s, err := t.stmt(text)
	if err != nil {
		return 0, err
	}
	r, err := s.Exec(args...)
	if err != nil {
		return 0, indexError(err)
	}
	return r.RowsAffected()
}

func (t *indexTx) row(text string, args []any, dest ...any) (bool, error) {
	s, err := t.stmt(text)
	if err != nil {
		return false, err
	}
	return scanned(s.QueryRow(args...).Scan(dest...))
}

// row reads at most one row outside a transaction.
func (x *index) row(text string, args []any, dest ...any) (bool, error) {
	s, err := x.stmt(text)
	if err != nil {
		return false, err
	}
	return scanned(s.QueryRow(args...).Scan(dest...))
}

func scanned(err error) (bool, error) {
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, indexError(err)
}

// scanAll reads all rows of a query whose own LIMIT is limit.
func scanAll[T any](s *sql.Stmt, limit int, args []any, scan func(*sql.Rows) (T, error)) ([]T, error) {
	rows, err := s.Query(args...)
	if err != nil {
		return nil, indexError(err)
	}
	defer rows.Close()
	all := make([]T, 0, limit)
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, indexError(err)
		}
		all = append(all, v)
	}
	return all, indexError(rows.Err())
}

// snapshot writes the index as it is at one moment to a new file, in one read transaction.
func (x *index) snapshot(path string) error {
	db, err := sql.Open("sqlite", x.name()) // query_only would forbid it
	if err != nil {
		return indexError(err)
	}
	_, err = db.Exec("VACUUM INTO ?", path)
	return indexError(errors.Join(err, db.Close()))
}

// attach gives the transactions of x another database, by the name other. It
// must be called before the first of them, since SQLite attaches none within one.
func (x *index) attach(path string) error {
	if err := x.connect(); err != nil {
		return err
	}
	_, err := (&indexTx{x}).exec("ATTACH DATABASE ? AS other", path)
	return err
}
