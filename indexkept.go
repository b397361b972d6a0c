package ocilocal

import (
	"context"
	"database/sql"
	"time"

	"github.com/opencontainers/go-digest"
)

// Some content has no ref. A hold keeps it for the repository that it was put into, until that
// repository drops the hold or it is too old. A row of unnamed keeps what an index.json said of a
// manifest that was imported by digest. These rows only say so: a collection decides what holds are
// worth.

const (
	sqlSetHold     = `INSERT INTO holds (name, content, since) SELECT ?1, id, ?3 FROM content WHERE digest = ?2 ON CONFLICT (name, content) DO UPDATE SET since = excluded.since`
	sqlDropHold    = `DELETE FROM holds WHERE name = ? AND content = (SELECT id FROM content WHERE digest = ?)`
	sqlExpireHolds = `DELETE FROM holds WHERE content = (SELECT id FROM content WHERE digest = ?) AND since <= ?`
	sqlHoldsIn     = `SELECT h.name, h.content, c.digest, h.since FROM holds h CROSS JOIN content c WHERE h.name = ? AND h.content > ? AND c.id = h.content ORDER BY h.content LIMIT ?`
	sqlHolds       = `SELECT h.name, h.content, c.digest, h.since FROM holds h CROSS JOIN content c WHERE (h.name, h.content) > (?, ?) AND c.id = h.content ORDER BY h.name, h.content LIMIT ?`

	sqlSetUnnamed  = `INSERT INTO unnamed (manifest, since, entry) SELECT id, ?2, ?3 FROM content WHERE digest = ?1 ON CONFLICT (manifest) DO UPDATE SET since = excluded.since, entry = excluded.entry`
	sqlTakeUnnamed = `DELETE FROM unnamed WHERE manifest = (SELECT id FROM content WHERE digest = ?) RETURNING entry`
	sqlUnnamedFact = `SELECT entry FROM unnamed WHERE manifest = (SELECT id FROM content WHERE digest = ?)`
)

// A holdRow says that a repository keeps content that no ref may lead to.
type holdRow struct {
	name   string // of the repository: registry/repository
	digest digest.Digest
	since  time.Time
	id     int64
}

func scanHold(rows *sql.Rows) (h holdRow, err error) {
	var b sql.RawBytes
	var micro int64
	if err = rows.Scan(&h.name, &h.id, &b, &micro); err == nil {
		h.since = time.UnixMicro(micro)
		h.digest, err = digestFromBytes(b)
	}
	return h, err
}

// setHold has a repository hold recorded content since a time, which replaces that of a hold which
// it has already. Errors: [ErrNotFound] for content without a row.
func (t *indexTx) setHold(name string, d digest.Digest, since time.Time) error {
	n, err := t.exec(sqlSetHold, name, digestBytes(d), since.UnixMicro())
	if n == 0 && err == nil {
		err = ErrNotFound
	}
	return err
}

// dropHold removes a repository's hold, and reports whether there was one.
func (t *indexTx) dropHold(name string, d digest.Digest) (bool, error) {
	n, err := t.exec(sqlDropHold, name, digestBytes(d))
	return n > 0, err
}

// expireHolds removes the holds of a digest that did not begin after a time.
func (t *indexTx) expireHolds(d digest.Digest, before time.Time) error {
	_, err := t.exec(sqlExpireHolds, digestBytes(d), before.UnixMicro())
	return err
}

// holdsIn visits a repository's holds.
func holdsIn(ctx context.Context, q queryer, name string, visit func(holdRow) error) error {
	p := paging[holdRow]{text: sqlHoldsIn, size: gcPage, scan: scanHold, after: func(h holdRow) []any { return []any{name, h.id} }}
	return p.each(ctx, q, []any{name, int64(0)}, visit)
}

// holds visits all holds.
func holds(ctx context.Context, q queryer, visit func(holdRow) error) error {
	p := paging[holdRow]{text: sqlHolds, size: gcPage, scan: scanHold, after: func(h holdRow) []any { return []any{h.name, h.id} }}
	return p.each(ctx, q, []any{"", int64(0)}, visit)
}

// setUnnamed records that a manifest, whose rows must exist, was imported by digest.
func (t *indexTx) setUnnamed(d digest.Digest, entry string, since time.Time) error {
	n, err := t.exec(sqlSetUnnamed, digestBytes(d), since.UnixMicro(), entry)
	if n == 0 && err == nil {
		err = ErrNotFound
	}
	return err
}

// takeUnnamed removes the record that a manifest was imported by digest, and returns what an index.json
// said of it, "" for nothing.
func (t *indexTx) takeUnnamed(d digest.Digest) (entry string, err error) {
	_, err = t.row(sqlTakeUnnamed, []any{digestBytes(d)}, &entry)
	return entry, err
}

// unnamedEntry returns what an index.json said of a manifest that was imported by digest, "" for
// nothing.
func unnamedEntry(q queryer, d digest.Digest) (entry string, err error) {
	_, err = q.row(sqlUnnamedFact, []any{digestBytes(d)}, &entry)
	return entry, err
}
