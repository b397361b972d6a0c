package ocilocal

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Statements of backup.go. The snapshot is a copy of the source's index that
// nobody else sees, and is attached to the backup's as "other".
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

	// The time of a ref's last change is in it, so that any change of a ref shows.
	sqlRefsMark = `SELECT count(*), coalesce(sum(updated % 1000000007), 0) FROM main.refs`
)

// refsMark returns a text that tells whether refs have changed.
func refsMark(q rowReader) (mark string, refs int, err error) {
	var sum int64
	_, err = q.row(sqlRefsMark, nil, &refs, &sum)
	return fmt.Sprintf("%d.%d", refs, sum), refs, err
}

// leaveOut takes a blob and all that needs it out of a snapshot, with the refs to these, which it returns.
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
	return pages(ctx, t, sqlOtherBlobs, []any{""}, func(rows *sql.Rows) ([]any, error) {
		var s string
		var size int64
		if err := rows.Scan(&s, &size); err != nil {
			return nil, err
		}
		d, err := rowDigest(s)
		if err == nil {
			err = visit(d, size)
		}
		return []any{s}, err
	})
}

// merge takes all rows of the attached snapshot in, so that the refs are those of the
// snapshot, and returns how many refs it set and removed.
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
