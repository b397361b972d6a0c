package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// Statements of garbage collection.
const (
	// The table itself is read, and not its index, which may lack a row when it is damaged.
	sqlRefTargets   = `SELECT name, reference, digest FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`
	sqlManifestRows = `SELECT m.id, m.digest, s.digest, coalesce(c.digest = m.digest, 0) FROM manifests m
		LEFT JOIN content c ON c.id = m.id LEFT JOIN content s ON s.id = m.subject WHERE m.id > ? ORDER BY m.id LIMIT ?`
	sqlMemberRows = `SELECT m.manifest, m.position, p.digest, c.digest FROM members m LEFT JOIN content p ON p.id = m.manifest LEFT JOIN content c ON c.id = m.content
		WHERE (m.manifest, m.position) > (?, ?) ORDER BY m.manifest, m.position LIMIT ?`
	sqlBlobRows = `SELECT id, digest, size, kind, created FROM content WHERE id > ? AND present ORDER BY id LIMIT ?`

	// Each of these reads all that it compares in one statement, so no commit comes in between.
	sqlDangling     = `SELECT digest FROM refs r NOT INDEXED WHERE NOT EXISTS (SELECT 1 FROM manifests m WHERE m.id = r.manifest AND m.digest = r.digest)`
	sqlLostManifest = `SELECT 1 FROM content c WHERE digest = ?1 AND present AND kind = ?2 AND NOT EXISTS (SELECT 1 FROM manifests WHERE id = c.id)`

	// The rows of absent content that only the manifest ?1 names. They are deleted with it.
	sqlOnlyNames = `SELECT c.id FROM (SELECT content FROM members WHERE manifest = ?1 UNION SELECT subject FROM manifests WHERE id = ?1) n
		CROSS JOIN content c WHERE c.id = n.content AND NOT c.present
		AND NOT EXISTS (SELECT 1 FROM members WHERE content = c.id AND manifest <> ?1) AND NOT EXISTS (SELECT 1 FROM manifests WHERE subject = c.id AND id <> ?1)
		AND NOT EXISTS (SELECT 1 FROM holds WHERE content = c.id)`
	sqlDeleteManifest = `DELETE FROM manifests WHERE id = ?`
	// A blob that is only named as a subject from now on is recorded as one that is not here.
	sqlKeepSubject = `UPDATE content SET present = 0, size = -1 WHERE id = ?1 AND EXISTS (SELECT 1 FROM manifests WHERE subject = ?1)
		AND NOT EXISTS (SELECT 1 FROM members WHERE content = ?1) AND NOT EXISTS (SELECT 1 FROM holds WHERE content = ?1)`
	sqlDeleteContent = `DELETE FROM content WHERE id = ?`
)

// A collection marks what is needed from these scans of whole tables, before it takes the write
// lock. Each is read in pages of gcPage rows, so a commit may come between two of them. That is
// safe: a step looks again at each file under the lock before it deletes it (see stillDead). The
// scans must not miss rows of a damaged index, because what they miss looks unneeded. So a row that
// lacks its counterpart is an error, and ends the collection.

// refTargets visits the manifest of each ref.
func (x *index) refTargets(ctx context.Context, visit func(digest.Digest)) error {
	type row struct {
		name, reference string
		target          digest.Digest
	}
	p := paging[row]{text: sqlRefTargets, size: gcPage, scan: func(rows *sql.Rows) (r row, err error) {
		var b sql.RawBytes
		if err = rows.Scan(&r.name, &r.reference, &b); err == nil {
			r.target, err = digestFromBytes(b)
		}
		return r, err
	}, after: func(r row) []any { return []any{r.name, r.reference} }}
	return p.each(ctx, x, []any{"", ""}, func(r row) error {
		visit(r.target)
		return nil
	})
}

// gcPage is how many rows the scans of whole tables read at once.
const gcPage = 1000

// lostManifest reports whether d has no row among the manifests although its row in content says
// that it is one.
func lostManifest(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlLostManifest, digestBytes(d), roleNumber(roleManifest))
}

// dangling returns the manifests that refs point at and that have no row.
func (x *index) dangling(ctx context.Context) ([]digest.Digest, error) {
	return readRows(ctx, x, sqlDangling, 0, nil, scanDigest)
}

// manifestRows visits every manifest with its subject. It is an [ErrCorruptIndex] if a manifest's
// row in content is lost or has another digest: then its members are not found by its digest, and a
// collection would delete them.
func (x *index) manifestRows(ctx context.Context, visit func(d, subject digest.Digest)) error {
	type row struct {
		id         int64
		d, subject digest.Digest
	}
	p := paging[row]{text: sqlManifestRows, size: gcPage, scan: func(rows *sql.Rows) (r row, err error) {
		var b, subject sql.RawBytes
		var whole bool
		if err = rows.Scan(&r.id, &b, &subject, &whole); err == nil {
			r.d, err = digestFromBytes(b)
		}
		if err == nil && !whole {
			err = fmt.Errorf("%w: manifest %s has no row as a blob", ErrCorruptIndex, r.d)
		}
		if err == nil && subject != nil {
			r.subject, err = digestFromBytes(subject)
		}
		return r, err
	}, after: func(r row) []any { return []any{r.id} }}
	return p.each(ctx, x, []any{int64(0)}, func(r row) error {
		visit(r.d, r.subject)
		return nil
	})
}

// memberRows visits every pair of a manifest and a member, with all members of one manifest in a
// row. If the manifest or the member has lost its row in content, that is an [ErrCorruptIndex]:
// nothing says which digest it had.
func (x *index) memberRows(ctx context.Context, visit func(manifest, d digest.Digest)) error {
	type row struct {
		id          int64 // of manifest
		position    int
		manifest, d digest.Digest
	}
	var last row
	p := paging[row]{text: sqlMemberRows, size: gcPage, scan: func(rows *sql.Rows) (r row, err error) {
		var b, manifest sql.RawBytes
		if err = rows.Scan(&r.id, &r.position, &manifest, &b); err != nil {
			return r, err
		}
		if r.manifest = last.manifest; r.id != last.id {
			r.manifest, err = digestFromBytes(manifest)
		}
		if err == nil {
			r.d, err = digestFromBytes(b)
		}
		last = r
		return r, err
	}, after: func(r row) []any { return []any{r.id, r.position} }}
	return p.each(ctx, x, []any{int64(0), -1}, func(r row) error {
		visit(r.manifest, r.d)
		return nil
	})
}

// A blobRow is the row of a blob.
type blobRow struct {
	digest  digest.Digest
	size    int64
	kind    role
	created time.Time
	id      int64
}

// blobRows visits the row of every blob that is here, manifests' too.
func (x *index) blobRows(ctx context.Context, visit func(blobRow) error) error {
	p := paging[blobRow]{text: sqlBlobRows, size: gcPage, scan: func(rows *sql.Rows) (r blobRow, err error) {
		var b sql.RawBytes
		var kind int
		var micro int64
		if err = rows.Scan(&r.id, &b, &r.size, &kind, &micro); err == nil {
			r.kind, r.created = numberedRole(kind), time.UnixMicro(micro)
			r.digest, err = digestFromBytes(b)
		}
		return r, err
	}, after: func(r blobRow) []any { return []any{r.id} }}
	return p.each(ctx, x, []any{int64(0)}, visit)
}

// delete removes the rows of a manifest with its members, or of a blob. The caller has made sure
// that no manifest needs it and that no ref or hold points at it: else a foreign key fails.
func (t *indexTx) delete(d digest.Digest) error {
	if err := t.deleteManifest(d); err != nil {
		return err
	}
	return t.deleteBlob(d)
}

// deleteManifest removes the rows that say that d is a manifest, if there are any. The row of its
// blob stays. The rows of absent members and subjects that only this manifest names are deleted
// too.
func (t *indexTx) deleteManifest(d digest.Digest) error {
	id, err := contentID(t, d)
	if id == 0 || err != nil {
		return err
	}
	named, err := readRows(context.Background(), t, sqlOnlyNames, 0, []any{id}, func(rows *sql.Rows) (id int64, err error) {
		return id, rows.Scan(&id)
	})
	if err != nil {
		return err
	}
	if _, err := t.exec(sqlDeleteManifest, id); err != nil {
		return err
	}
	for _, id := range named {
		if _, err := t.exec(sqlDeleteContent, id); err != nil {
			return err
		}
	}
	return nil
}

// deleteBlob removes the row of a blob, unless that is the subject of a manifest: then the row says
// from now on that the blob is not here.
func (t *indexTx) deleteBlob(d digest.Digest) error {
	id, err := contentID(t, d)
	if id == 0 || err != nil {
		return err
	}
	n, err := t.exec(sqlKeepSubject, id)
	if n == 0 && err == nil {
		_, err = t.exec(sqlDeleteContent, id)
	}
	return err
}

// Statements of displace, and of nextFrame.
const (
	sqlSmallCache  = `PRAGMA cache_size = 1`
	sqlFill        = `INSERT INTO meta (key, value) VALUES ('displace', '')`
	sqlEmptyCache  = `PRAGMA shrink_memory`
	sqlOtherPages  = `SELECT EXISTS (SELECT 1 FROM members), EXISTS (SELECT 1 FROM content)`
	sqlUnfill      = `DELETE FROM meta WHERE key = 'displace'`
	sqlWriterCache = `PRAGMA cache_size = -16000`

	sqlLog      = `PRAGMA wal_checkpoint(NOOP)`
	sqlPageSize = `PRAGMA page_size`
)

// displace makes sure that a hidden commit, which no process has seen yet, can never appear.
//
// A process that dies in the last moment of a commit leaves it whole in the write-ahead log, but
// not in the memory that SQLite's processes share. The others do not see it, and the next one to
// write puts its own frames in its place. If none writes, the commit appears when the log is read
// again from the file:
//
//	the log      … | seen commits | hidden commit |
//	shared memory: ends here ─────┘
//	displace     … | seen commits | one frame of this transaction, without a commit mark
//
// So a transaction that deletes files because of what it sees must write first. The write at its
// commit is too late, since the process may die before that too.
//
// SQLite writes a changed page to the log before the commit if its cache has no room for another
// page. So this changes a page, limits the cache to one page, empties it and reads other pages.
// Exactly one frame is written. If there is a commit to displace, the file of the log need not grow
// for that, so it succeeds on a full disk too.
func (t *indexTx) displace() error {
	var err error
	for _, text := range []string{sqlSmallCache, sqlFill, sqlEmptyCache} {
		if err == nil {
			_, err = t.exec(text)
		}
	}
	if err == nil {
		var members, content bool
		_, err = t.row(sqlOtherPages, nil, &members, &content)
	}
	if err == nil {
		_, err = t.exec(sqlUnfill)
	}
	_, always := t.exec(sqlWriterCache)
	return errors.Join(err, always)
}

// nextFrame returns the offset in the log's file at which the frame that is written next will end,
// while tx is open and has written nothing. If the file is shorter, no hidden commit is in it. The
// figure comes from the memory that SQLite's processes share, so it reads no rows.
func (x *index) nextFrame(tx *indexTx) (int64, error) {
	const header, frameHeader = 32, 24
	var page, busy, frames, done int64
	if _, err := tx.row(sqlPageSize, nil, &page); err != nil {
		return 0, err
	}
	if _, err := x.row(sqlLog, nil, &busy, &frames, &done); err != nil {
		return 0, err
	}
	return header + (frames+1)*(frameHeader+page), nil
}
