package ocilocal

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"maps"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// An indexTx is the connection that writes, with the statements that are prepared on it. A function
// that is given to write gets it while the write lock is held, and must not keep it. One goroutine
// uses it at a time: the leader of a group commit (see indexcommit.go).
//
//	connect ──▶ begin ──▶ exec, row, query … ──▶ commit ──▶ begin of the next transaction
//	   ▲                                    └──▶ rollback ─┘
//	   └── after a rollback that failed
//
// It has no way to the index's readers, which would not see what the transaction has changed.
type indexTx struct {
	pool      *sql.DB              // of one connection
	conn      *sql.Conn            // nil before the first transaction, and after one that could not be ended
	stmts     map[string]*sql.Stmt // on conn
	changes   int64                // rows that conn had changed when it last committed
	types     map[string]int64     // ids of committed rows of types, which never change
	newTypes  map[string]int64     // those that this transaction has read or written
	newest    int                  // schema version that this program knows
	explainer func(error) error    // the index's
}

// connect makes the connection, unless there is one. No caller's context can end that: the
// connection is for all of them.
func (t *indexTx) connect() error {
	if t.conn != nil {
		return nil
	}
	conn, err := t.pool.Conn(context.Background())
	if err == nil {
		t.conn = conn
	}
	return indexError(err)
}

// begin takes the write lock, and waits for it as long as the connection's busy_timeout says.
func (t *indexTx) begin() error {
	if err := t.connect(); err != nil {
		return err
	}
	_, err := t.exec("BEGIN IMMEDIATE")
	clear(t.newTypes)
	return err
}

// maxTypes is how many types a handle remembers. Another program may use any number of them.
const maxTypes = 1000

// commit makes the transaction durable. Only then do the numbers of its types count for later
// transactions.
func (t *indexTx) commit() error {
	_, err := t.exec("COMMIT")
	if err != nil {
		return err
	}
	if len(t.types)+len(t.newTypes) > maxTypes {
		clear(t.types)
	}
	maps.Copy(t.types, t.newTypes)
	return nil
}

// rollback ends a transaction that can't be committed. If even that fails, it closes the
// connection, which ends the transaction for certain. The next begin makes a new one.
func (t *indexTx) rollback() error {
	_, err := t.exec("ROLLBACK")
	if err == nil {
		return nil
	}
	t.closeStmts()
	t.changes = 0
	t.conn.Raw(func(any) error { return driver.ErrBadConn })
	t.conn.Close()
	t.conn = nil
	if noTransaction(err) {
		return nil
	}
	return err
}

// closeStmts closes the statements. database/sql does not do that when it closes their connection.
func (t *indexTx) closeStmts() (err error) {
	for _, s := range t.stmts {
		err = errors.Join(err, s.Close())
	}
	clear(t.stmts)
	return err
}

// close closes the connection and the pool. No transaction may be open.
func (t *indexTx) close() error {
	err := t.closeStmts()
	if t.conn != nil {
		err = errors.Join(err, t.conn.Close())
	}
	return indexError(errors.Join(err, t.pool.Close()))
}

// stmt returns the prepared form of a constant statement inside the transaction.
func (t *indexTx) stmt(text string) (*sql.Stmt, error) {
	if s := t.stmts[text]; s != nil {
		return s, nil
	}
	s, err := t.conn.PrepareContext(context.Background(), text)
	if err != nil {
		return nil, t.explain(err)
	}
	t.stmts[text] = s
	return s, nil
}

// exec runs a statement and returns how many rows it has changed. No context can interrupt it: see
// query.
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

func (t *indexTx) explain(err error) error { return t.explainer(err) }

// scanned turns the error of a Scan of one row into the result of [queryer.row].
func scanned(q queryer, err error) (bool, error) {
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, q.explain(err)
}

// noTransaction reports whether a failed ROLLBACK or RELEASE says that SQLite has ended the
// transaction by itself, as it does on a full disk. SQLITE_ERROR can mean nothing else there.
func noTransaction(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && e.Code()&0xff == sqlite3.SQLITE_ERROR
}

// The count in the answer is of the changes before this one.
const sqlStamp = `INSERT INTO meta (key, value) SELECT ?1, '1' WHERE total_changes() <> ?2
	ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING total_changes()`

// stamp counts the transactions that change something. SQLite takes any log that lies beside an
// index for the log of this index. If it is another registry's, its pages hide ours. The counter is
// a row on the same page as the root's id. So each log has that page, and [LocalRegistry.checkID]
// finds the wrong id. It is a counter because an update that changes no byte would not write the
// page.
//
// Limit: nothing tells an old log of the same index from its present one.
func (t *indexTx) stamp() error {
	var changes int64
	stamped, err := t.row(sqlStamp, []any{metaCommits, t.changes}, &changes)
	if stamped {
		t.changes = changes + 1
	}
	return err
}
