package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Statements of backups. The snapshot is a private copy of the source's index. It is attached to
// the target's index under the name other.
const (
	sqlMakeLeftOut = `CREATE TABLE left_out (name TEXT NOT NULL, reference TEXT NOT NULL, PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`
	sqlLeaveOut    = `INSERT OR IGNORE INTO left_out SELECT name, reference FROM refs WHERE manifest = ?`
	sqlUnref       = `DELETE FROM refs WHERE manifest = ?`

	sqlOtherBlobs = `SELECT digest, size FROM other.blobs WHERE digest > ? ORDER BY digest LIMIT ?`

	sqlMergeBlobs     = `INSERT OR IGNORE INTO main.blobs SELECT * FROM other.blobs`
	sqlMergeManifests = `INSERT OR IGNORE INTO main.manifests SELECT * FROM other.manifests`
	sqlMergeMembers   = `INSERT OR IGNORE INTO main.members SELECT * FROM other.members`
	sqlMergeGone      = `DELETE FROM main.refs AS r WHERE NOT EXISTS (SELECT 1 FROM other.refs o WHERE o.name = r.name AND o.reference = r.reference)
		AND NOT EXISTS (SELECT 1 FROM other.left_out o WHERE o.name = r.name AND o.reference = r.reference)`
	sqlMergeRefs = `INSERT OR REPLACE INTO main.refs SELECT * FROM (SELECT * FROM other.refs EXCEPT SELECT * FROM main.refs)`

	// The sum has the time of each ref's last change in it, so any change shows.
	sqlRefsMark = `SELECT count(*), coalesce(sum(updated % 1000000007), 0),
		coalesce((SELECT value FROM main.meta WHERE key = ?), '') FROM main.refs`
)

// refsMark returns a text that differs after any change of a ref, the text at the last backup to this
// root, and how many refs there are. One statement reads all: between two, another backup could commit
// and look like a change by somebody else.
func refsMark(q queryer) (mark, last string, refs int, err error) {
	var sum int64
	_, err = q.row(sqlRefsMark, []any{metaBackup}, &refs, &sum, &last)
	return fmt.Sprintf("%d.%d", refs, sum), last, refs, err
}

// makeLeftOut makes the table in which a snapshot keeps the refs that leaveOut takes out.
func (t *indexTx) makeLeftOut() error {
	_, err := t.exec(sqlMakeLeftOut)
	return err
}

// leaveOut takes a blob and all that needs it out of a snapshot, with the refs to these, which it
// returns.
func (t *indexTx) leaveOut(all []digest.Digest) (refs []Reference, err error) {
	for _, m := range all {
		named, err := refsTo(t, m)
		if err != nil {
			return nil, err
		}
		refs = append(refs, named...)
	}
	for _, text := range []string{sqlLeaveOut, sqlUnref, sqlDeleteManifest, sqlDeleteBlob} { // rows that point at others first
		for _, m := range all {
			if _, err := t.exec(text, string(m)); err != nil {
				return nil, err
			}
		}
	}
	return refs, nil
}

// otherBlobs visits the blobs of the attached snapshot.
func (t *indexTx) otherBlobs(ctx context.Context, visit func(d digest.Digest, size int64) error) error {
	type row struct {
		digest digest.Digest
		size   int64
	}
	p := paging[row]{text: sqlOtherBlobs, size: 1000, scan: func(rows *sql.Rows) (r row, err error) {
		var s string
		if err = rows.Scan(&s, &r.size); err == nil {
			r.digest, err = rowDigest(s)
		}
		return r, err
	}, after: func(r row) []any { return []any{string(r.digest)} }}
	return p.each(ctx, t, []any{""}, func(r row) error { return visit(r.digest, r.size) })
}

// merge copies all rows of the attached snapshot, and makes the refs those of the snapshot. It
// returns how many refs it set and removed.
func (t *indexTx) merge(ctx context.Context) (set, removed int64, err error) {
	for _, step := range []struct {
		text string
		rows *int64
	}{{sqlMergeBlobs, new(int64)}, {sqlMergeManifests, new(int64)}, {sqlMergeMembers, new(int64)}, {sqlMergeGone, &removed}, {sqlMergeRefs, &set}} {
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		if *step.rows, err = t.exec(step.text); err != nil {
			return 0, 0, err
		}
	}
	return set, removed, nil
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
	if err := x.writer.connect(); err != nil {
		return err
	}
	_, err := x.writer.exec("ATTACH DATABASE ? AS other", path)
	return err
}
