package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// explain gives an error of SQLite its sentinel, as [indexError] does. If the error says that the
// index is damaged, explain finds out whether that is true.
//
// When a read fails with EIO, a query ends with SQLITE_CORRUPT, and SQLite's integrity check
// reports the page as damaged. Nothing in the error tells the two apart. So all pages are read once
// more, by SQLite's backup, which does report a failed read as such, and the index is checked. It
// is damaged if every page can be read and the check finds something. Otherwise the error is
// [ErrIndexIO]: to set an index aside because a disk or a cable failed for a moment would lose its
// refs.
//
// This takes as long as reading the index, but a damaged index is diagnosed only once per handle.
func (x *index) explain(err error) error {
	kind := indexError(err)
	if errors.Is(kind, ErrCorruptIndex) {
		if newer := x.newer(); newer != nil {
			return newer
		}
	}
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok || e.Code()&0xff != sqlite3.SQLITE_CORRUPT || x.damaged.Load() {
		return kind
	}
	if unread := x.readAll(); unread != nil {
		return fmt.Errorf("%w (after: %w)", unread, err)
	}
	if sound, bad := x.sound(); sound && bad == nil {
		return fmt.Errorf("%w: the index is sound, and reading it failed for a moment: %w", ErrIndexIO, err)
	}
	x.damaged.Store(true)
	return kind
}

// newer returns a [*SchemaError] if a newer program has migrated the index since it was opened. A
// read then finds other tables than it expects, which looks like damage.
func (x *index) newer() error {
	if len(x.schema) == 0 { // it is another program's
		return nil
	}
	var version int
	err := x.aside(func(conn *sql.Conn) error {
		return conn.QueryRowContext(context.Background(), "PRAGMA user_version").Scan(&version)
	})
	if err == nil && version > len(x.schema) {
		return &SchemaError{Found: version, Supported: len(x.schema)}
	}
	return nil
}

// readAll reads every page of the index, by SQLite's backup, and drops what it reads. It returns an
// [ErrIndexIO] if a page can't be read. Any other failure is nil: it says nothing about the disk.
func (x *index) readAll() error {
	err := x.aside(func(conn *sql.Conn) error {
		return conn.Raw(func(c any) error {
			source, ok := c.(interface {
				NewBackup(to string) (*sqlite.Backup, error)
			})
			if !ok {
				return errors.ErrUnsupported
			}
			b, err := source.NewBackup("") // a temporary file, or memory if it is small
			if err != nil {
				return err
			}
			more := true
			for more && err == nil {
				more, err = b.Step(1000)
			}
			return errors.Join(err, b.Finish())
		})
	})
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_IOERR {
		return indexError(err)
	}
	return nil
}

// sound reports whether SQLite finds no damage. A read that fails for a moment looks like damage to
// SQLite, so a finding counts only if a second check finds the same.
func (x *index) sound() (bool, error) {
	var found [2]string
	for i := range found {
		err := x.aside(func(conn *sql.Conn) error {
			return conn.QueryRowContext(context.Background(), "PRAGMA integrity_check(1)").Scan(&found[i])
		})
		if err != nil || found[i] == "ok" {
			return err == nil, err
		}
	}
	return found[0] != found[1], nil
}

// aside runs do with a new connection, because all connections of the pool may be busy: explain is
// called while rows of one of them are open.
func (x *index) aside(do func(*sql.Conn) error) (err error) {
	db, err := x.readerPool("query_only(1)")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	conn, err := db.Conn(context.Background())
	if err != nil {
		return err
	}
	return errors.Join(do(conn), conn.Close())
}
