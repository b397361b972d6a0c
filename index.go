package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// index is the SQLite index of one root. It knows digests and rows, and no files. It is safe for
// concurrent use.
//
// It has two handles on the database. readers is a pool of connections that can only query, about
// one for each core; a query sees the last commit. writer is a single connection, which only a
// write transaction uses (see [index.write]). A write reads the rows that it depends on through
// writer, inside the transaction. Through a reader it would not see its own changes, and another
// process could commit in between.
//
// All SQL of the package is in the files of this family:
//
//	indexdb.go         how SQLite opens a database, and what its errors mean
//	indexschema.go     tables, versions, and the check that a database is ours
//	indexrows.go       queries: one row, rows, pages
//	indexcommit.go     transactions, which callers share
//	indexrefs.go       rows of refs
//	indexmanifests.go  rows of blobs, manifests and their members
//	indexkept.go       rows of content that is kept without a ref
//
// and in the others, named for the feature that they serve.
type index struct {
	readers *sql.DB
	writer  *indexTx        // nil in a read-only registry; of the goroutine that leads, see write
	busy    time.Duration   // how long a write waits for other processes
	schema  []schemaVersion // schemas, except in tests
	db      database

	damaged atomic.Bool // explain has found the index damaged

	mu        sync.Mutex           // guards the fields below
	stmts     map[string]*sql.Stmt // on readers
	typeTexts map[int64]string     // rows of types, which never change
	queue     []*writeRequest
	leading   bool // some goroutine is committing, and will look at queue when done
}

// openIndex opens an index, which must exist, and brings an older one up to date.
func openIndex(ctx context.Context, db database, busy time.Duration, schema []schemaVersion) (*index, error) {
	x, err := openUnchecked(db, busy, schema)
	if err != nil {
		return nil, err
	}
	version, err := x.checkSchema(ctx)
	if err == nil && version < len(schema) {
		if db.mode == indexReadWrite {
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

// openUnchecked opens a database that may be damaged, or another program's. The caller must check
// it before it believes a row. No connection is made yet, so a missing file is found later.
func openUnchecked(db database, busy time.Duration, schema []schemaVersion) (*index, error) {
	x := &index{busy: busy, schema: schema, db: db, stmts: map[string]*sql.Stmt{}, typeTexts: map[int64]string{}}
	var err error
	if x.readers, err = x.readerPool("query_only(1)"); err != nil {
		return nil, err
	}
	x.readers.SetMaxOpenConns(max(2, runtime.NumCPU()))
	x.readers.SetMaxIdleConns(max(2, runtime.NumCPU()))
	if db.mode == indexReadWrite {
		pool, err := db.pool("rw", fmt.Sprintf("busy_timeout(%d)", busyPoll.Milliseconds()), "cache_size(-16000)")
		if err != nil {
			return nil, errors.Join(err, x.close())
		}
		pool.SetMaxOpenConns(1)
		x.writer = &indexTx{pool: pool, stmts: map[string]*sql.Stmt{}, newest: len(schema), explainer: x.explain,
			types: map[string]int64{}, newTypes: map[string]int64{}}
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

// close closes all connections. No call may be in progress: [LocalRegistry.Close] waits for them.
func (x *index) close() error {
	err := indexError(x.readers.Close())
	if x.writer != nil {
		err = errors.Join(err, x.writer.close()) // last, so that SQLite's checkpoint at the end can delete the -wal
	}
	return err
}

// stmt returns the prepared form of a constant statement for readers. It prepares each text once,
// so no text may contain a value: the map would grow without bound.
func (x *index) stmt(ctx context.Context, text string) (*sql.Stmt, error) {
	if x.db.sameFile != nil { // an open connection would go on reading a file that was replaced
		if err := x.db.sameFile(); err != nil {
			return nil, err
		}
	}
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

// row reads at most one row outside a transaction, and reports whether there was one. It takes no
// context: such a look-up takes microseconds.
func (x *index) row(text string, args []any, dest ...any) (bool, error) {
	s, err := x.stmt(context.Background(), text)
	if err != nil {
		return false, err
	}
	return scanned(x, s.QueryRow(args...).Scan(dest...))
}

// query runs a query on a connection of the pool. Its rows keep that connection until they are
// closed, so nothing else may be asked of the index meanwhile. ctx ends the query while it runs.
func (x *index) query(ctx context.Context, text string, args []any) (*sql.Rows, error) {
	s, err := x.stmt(ctx, text)
	if err != nil {
		return nil, err
	}
	rows, err := s.QueryContext(ctx, args...)
	return rows, x.explain(err)
}

// Keys of the table meta.
const (
	metaID = "id" // the id of the root that this index belongs to
	// metaUnreconciled is set while the index may not name all blobs, since it was created
	// beside them. Nothing may be collected then.
	metaUnreconciled = "unreconciled"
	// metaCommits counts the transactions that changed the index, for [indexTx.stamp].
	metaCommits = "commits"
	// metaBackup is refsMark after the last backup to this root.
	metaBackup = "backup"
)
const (
	sqlGetMeta    = `SELECT value FROM meta WHERE key = ?`
	sqlSetMeta    = `INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`
	sqlDeleteMeta = `DELETE FROM meta WHERE key = ?`
)

// meta returns a value of the table meta, "" if there is none.
func meta(q queryer, key string) (value string, err error) {
	_, err = q.row(sqlGetMeta, []any{key}, &value)
	return value, err
}

// setMeta sets a value of the table meta.
func (t *indexTx) setMeta(key, value string) error {
	_, err := t.exec(sqlSetMeta, key, value)
	return err
}

// deleteMeta removes a value of the table meta.
func (t *indexTx) deleteMeta(key string) error {
	_, err := t.exec(sqlDeleteMeta, key)
	return err
}
