package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
)

// Statements of garbage collection.
const (
	// The table itself is read, and not its index, which may lack a row when it is damaged.
	sqlRefTargets   = `SELECT name, reference, manifest FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`
	sqlManifestRows = `SELECT digest, subject FROM manifests WHERE digest > ? ORDER BY digest LIMIT ?`
	sqlMemberRows   = `SELECT manifest, position, role, digest FROM members WHERE (manifest, position) > (?, ?) ORDER BY manifest, position LIMIT ?`
	sqlBlobRows     = `SELECT digest, size, kind, created FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?`

	// Each looks in one statement, so that no commit comes in between.
	sqlDangling     = `SELECT manifest FROM refs r NOT INDEXED WHERE NOT EXISTS (SELECT 1 FROM manifests m WHERE m.digest = r.manifest)`
	sqlLostManifest = `SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM manifests WHERE digest = ?1)
		AND (EXISTS (SELECT 1 FROM blobs WHERE digest = ?1 AND kind = ?2) OR EXISTS (SELECT 1 FROM members WHERE digest = ?1 AND role = ?2))`

	sqlDeleteManifest = `DELETE FROM manifests WHERE digest = ?`
	sqlDeleteBlob     = `DELETE FROM blobs WHERE digest = ?`
)

// refTargets visits the manifest of each ref.
func (x *index) refTargets(ctx context.Context, visit func(digest.Digest)) error {
	type row struct {
		name, reference string
		target          digest.Digest
	}
	p := paging[row]{text: sqlRefTargets, size: gcPage, scan: func(rows *sql.Rows) (r row, err error) {
		var s string
		if err = rows.Scan(&r.name, &r.reference, &s); err == nil {
			r.target, err = rowDigest(s)
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

// lostManifest reports whether d has no row among the manifests although its own
// blob's row, or that of an index above it, says that it is one.
func lostManifest(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlLostManifest, string(d), string(roleManifest))
}

// dangling returns the manifests that refs point at and that have no row.
func (x *index) dangling(ctx context.Context) ([]digest.Digest, error) {
	return readRows(ctx, x, sqlDangling, 0, nil, scanDigest)
}

// manifestRows visits every manifest with its subject.
func (x *index) manifestRows(ctx context.Context, visit func(d, subject digest.Digest)) error {
	type row struct{ d, subject digest.Digest }
	p := paging[row]{text: sqlManifestRows, size: gcPage, scan: func(rows *sql.Rows) (r row, err error) {
		var s, subject string
		if err = rows.Scan(&s, &subject); err == nil {
			r.d, err = rowDigest(s)
		}
		if err == nil && subject != "" {
			r.subject, err = rowDigest(subject)
		}
		return r, err
	}, after: func(r row) []any { return []any{string(r.d)} }}
	return p.each(ctx, x, []any{""}, func(r row) error {
		visit(r.d, r.subject)
		return nil
	})
}

// memberRows visits every pair of a manifest and what it needs, a manifest's one after the other.
func (x *index) memberRows(ctx context.Context, visit func(manifest digest.Digest, kind role, d digest.Digest)) error {
	type row struct {
		manifest, d digest.Digest
		position    int
		kind        role
	}
	p := paging[row]{text: sqlMemberRows, size: gcPage, scan: func(rows *sql.Rows) (r row, err error) {
		var manifest, kind, s string
		if err = rows.Scan(&manifest, &r.position, &kind, &s); err == nil {
			r.kind = role(kind)
			r.d, err = rowDigest(s)
		}
		if err == nil {
			r.manifest, err = rowDigest(manifest)
		}
		return r, err
	}, after: func(r row) []any { return []any{string(r.manifest), r.position} }}
	return p.each(ctx, x, []any{"", -1}, func(r row) error {
		visit(r.manifest, r.kind, r.d)
		return nil
	})
}

// A blobRow is what the index says of a blob.
type blobRow struct {
	digest  digest.Digest
	size    int64
	kind    role
	created time.Time
}

// blobRows visits every blob's row, manifests' too.
func (x *index) blobRows(ctx context.Context, visit func(blobRow) error) error {
	p := paging[blobRow]{text: sqlBlobRows, size: gcPage, scan: func(rows *sql.Rows) (r blobRow, err error) {
		var s, kind string
		var micro int64
		if err = rows.Scan(&s, &r.size, &kind, &micro); err == nil {
			r.kind, r.created = role(kind), time.UnixMicro(micro)
			r.digest, err = rowDigest(s)
		}
		return r, err
	}, after: func(r blobRow) []any { return []any{string(r.digest)} }}
	return p.each(ctx, x, []any{""}, visit)
}

// delete removes the rows of a manifest with its members, or of a blob.
func (t *indexTx) delete(d digest.Digest) error {
	if _, err := t.exec(sqlDeleteManifest, string(d)); err != nil {
		return err
	}
	_, err := t.exec(sqlDeleteBlob, string(d))
	return err
}

// Statements of displace, and of nextFrame.
const (
	sqlSmallCache  = `PRAGMA cache_size = 1`
	sqlFill        = `INSERT INTO meta (key, value) VALUES ('displace', '')`
	sqlEmptyCache  = `PRAGMA shrink_memory`
	sqlOtherPages  = `SELECT EXISTS (SELECT 1 FROM members), EXISTS (SELECT 1 FROM blobs)`
	sqlUnfill      = `DELETE FROM meta WHERE key = 'displace'`
	sqlWriterCache = `PRAGMA cache_size = -16000`

	sqlLog      = `PRAGMA wal_checkpoint(NOOP)`
	sqlPageSize = `PRAGMA page_size`
)

// displace makes sure that a commit which nobody has seen yet can never come to light.
//
// A process that dies in the last moment of a commit leaves it whole in the write-ahead log, but
// not in the memory that SQLite's processes share. The others do not see it, and the next one to
// write puts its own frames in its place. If none writes, the commit appears when the log is read
// again from the file. So a transaction that does something final because of what it sees must
// write first. The write at its commit is too late, since the process may die before that too.
//
// SQLite writes a changed page to the log before the commit if its cache has no room for another
// page. So this changes a page, empties the cache, which then may hold one page, and reads others.
// Exactly one frame is written. Where there is a commit to displace, the log's file need not grow
// for that: so it succeeds on a full disk too.
func (t *indexTx) displace() error {
	var err error
	for _, text := range []string{sqlSmallCache, sqlFill, sqlEmptyCache} {
		if err == nil {
			_, err = t.exec(text)
		}
	}
	if err == nil {
		var members, blobs bool
		_, err = t.row(sqlOtherPages, nil, &members, &blobs)
	}
	if err == nil {
		_, err = t.exec(sqlUnfill)
	}
	_, always := t.exec(sqlWriterCache)
	return errors.Join(err, always)
}

// nextFrame returns where in the log's file the frame ends that is written next, while tx is open
// and has written nothing. It reads no rows: SQLite takes the figure from the memory that its
// processes share.
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
