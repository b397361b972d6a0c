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
	sqlMakeLeftOut        = `CREATE TABLE left_out (name TEXT NOT NULL, reference TEXT NOT NULL, PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`
	sqlMakeLeftOutContent = `CREATE TABLE left_out_content (digest BLOB NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID`
	sqlLeaveOutContent    = `INSERT OR IGNORE INTO left_out_content VALUES (?)`
	sqlLeaveOut           = `INSERT OR IGNORE INTO left_out SELECT name, reference FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?)`
	sqlUnref              = `DELETE FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?)`
	sqlUnhold             = `DELETE FROM holds WHERE content = (SELECT id FROM content WHERE digest = ?)`

	sqlOtherBlobs = `SELECT id, digest, size FROM other.content WHERE id > ? AND present ORDER BY id LIMIT ?`

	// The ids of the two databases have nothing to do with each other. So each id is replaced by
	// that of the same digest, or text, in main. If either database says that a blob is here, or
	// that it is a manifest (role 3), the row in main says so afterwards.
	//
	// A row of a damaged snapshot that points at nothing must break a constraint. Otherwise the
	// backup would silently lack the content that the row pointed at. So OR IGNORE, which ignores
	// NOT NULL too, is only for types. Where NULL means something, a lost id becomes -1, which no
	// row has.
	sqlMergeTypes   = `INSERT OR IGNORE INTO main.types (text) SELECT text FROM other.types ORDER BY id`
	sqlMergeContent = `INSERT INTO main.content (digest, size, kind, created, present, unneeded) SELECT digest, size, kind, created, present, unneeded FROM other.content WHERE true ORDER BY id
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size, kind = excluded.kind, created = iif(present, created, excluded.created), present = excluded.present
		WHERE iif(present, excluded.present AND excluded.kind = 3 AND kind <> 3, excluded.present OR size = -1 AND excluded.size <> -1)`
	sqlMergeManifests = `INSERT INTO main.manifests (id, digest, media_type, artifact_type, subject, annotations, created)
		SELECT coalesce((SELECT id FROM main.content WHERE digest = m.digest), -1), m.digest,
		(SELECT id FROM main.types WHERE text = (SELECT text FROM other.types WHERE id = m.media_type)),
		(SELECT id FROM main.types WHERE text = (SELECT text FROM other.types WHERE id = m.artifact_type)),
		iif(m.subject IS NULL, NULL, coalesce((SELECT id FROM main.content WHERE digest = (SELECT digest FROM other.content WHERE id = m.subject)), -1)),
		m.annotations, m.created FROM other.manifests m WHERE true ORDER BY m.id ON CONFLICT (id) DO NOTHING`
	sqlMergeMembers = `INSERT INTO main.members (manifest, position, role, content, media_type, size, annotations)
		SELECT (SELECT id FROM main.content WHERE digest = (SELECT digest FROM other.content WHERE id = m.manifest)), m.position, m.role,
		(SELECT id FROM main.content WHERE digest = (SELECT digest FROM other.content WHERE id = m.content)),
		(SELECT id FROM main.types WHERE text = (SELECT text FROM other.types WHERE id = m.media_type)), m.size, m.annotations
		FROM other.members m WHERE true ORDER BY m.manifest, m.position ON CONFLICT (manifest, position) DO NOTHING`
	sqlMergeGone = `DELETE FROM main.refs AS r WHERE NOT EXISTS (SELECT 1 FROM other.refs o WHERE o.name = r.name AND o.reference = r.reference)
		AND NOT EXISTS (SELECT 1 FROM other.left_out o WHERE o.name = r.name AND o.reference = r.reference)`
	// The next two set refs. A ref of which only the time of its last use differs is updated by the
	// second, and not counted as set.
	sqlMergeRefs = `INSERT OR REPLACE INTO main.refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved, used, entry)
		SELECT o.name, o.reference, (SELECT id FROM main.content WHERE digest = o.digest), o.digest, o.size,
		(SELECT id FROM main.types WHERE text = (SELECT text FROM other.types WHERE id = o.media_type)),
		(SELECT id FROM main.types WHERE text = (SELECT text FROM other.types WHERE id = o.artifact_type)), o.created, o.moved, o.used, o.entry
		FROM other.refs o WHERE NOT EXISTS (SELECT 1 FROM main.refs r WHERE r.name = o.name AND r.reference = o.reference AND r.digest = o.digest
		AND r.created = o.created AND r.moved = o.moved AND r.entry = o.entry)`
	sqlMergeUsed = `UPDATE main.refs SET used = o.used FROM other.refs o WHERE o.name = refs.name AND o.reference = refs.reference AND o.used <> refs.used`
	// The same for manifests and blobs that are kept without a ref.
	sqlMergeGoneUnnamed = `DELETE FROM main.unnamed AS u WHERE NOT EXISTS (SELECT 1 FROM other.content o WHERE o.digest = (SELECT digest FROM main.content WHERE id = u.manifest)
		AND o.id IN (SELECT manifest FROM other.unnamed)) AND (SELECT digest FROM main.content WHERE id = u.manifest) NOT IN (SELECT digest FROM other.left_out_content)`
	sqlMergeUnnamed = `INSERT OR REPLACE INTO main.unnamed (manifest, since, entry)
		SELECT coalesce((SELECT id FROM main.content WHERE digest = (SELECT digest FROM other.content WHERE id = u.manifest)), -1), u.since, u.entry FROM other.unnamed u`
	sqlMergeGoneHolds = `DELETE FROM main.holds AS h WHERE NOT EXISTS (SELECT 1 FROM other.content o WHERE o.digest = (SELECT digest FROM main.content WHERE id = h.content)
		AND EXISTS (SELECT 1 FROM other.holds WHERE name = h.name AND content = o.id)) AND (SELECT digest FROM main.content WHERE id = h.content) NOT IN (SELECT digest FROM other.left_out_content)`
	sqlMergeHolds = `INSERT OR REPLACE INTO main.holds (name, content, since)
		SELECT h.name, (SELECT id FROM main.content WHERE digest = (SELECT digest FROM other.content WHERE id = h.content)), h.since FROM other.holds h`

	// The sum includes the time of each ref's last move, so nearly every change of a ref changes
	// it.
	sqlRefsMark = `SELECT count(*), coalesce(sum(moved % 1000000007 + length(entry)), 0),
		coalesce((SELECT value FROM main.meta WHERE key = ?), '') FROM main.refs`
)

// refsMark returns a text that changes with the refs, the text at the last backup to this root, and
// how many refs there are. If the two texts differ, somebody has changed the refs of the backup
// since. One statement reads all: between two statements, another backup could commit, and would
// look like such a change.
func refsMark(q queryer) (mark, last string, refs int, err error) {
	var sum int64
	_, err = q.row(sqlRefsMark, []any{metaBackup}, &refs, &sum, &last)
	return fmt.Sprintf("%d.%d", refs, sum), last, refs, err
}

// makeLeftOut makes two tables in a snapshot, for the refs and the digests that leaveOut takes out.
// merge reads them: a ref that was left out is not removed from an earlier backup.
func (t *indexTx) makeLeftOut() error {
	_, err := t.exec(sqlMakeLeftOut)
	if err == nil {
		_, err = t.exec(sqlMakeLeftOutContent)
	}
	return err
}

// leaveOut takes a blob and all manifests that need it out of a snapshot, because the blob could
// not be copied. It also takes out the refs to these manifests, and returns them. all has the blob
// itself and every manifest that leads to it.
func (t *indexTx) leaveOut(all []digest.Digest) (refs []Reference, err error) {
	for _, m := range all {
		named, err := refsTo(t, m)
		if err != nil {
			return nil, err
		}
		refs = append(refs, named...)
	}
	for _, text := range []string{sqlLeaveOut, sqlLeaveOutContent, sqlUnref, sqlUnhold} {
		for _, m := range all {
			if _, err := t.exec(text, digestBytes(m)); err != nil {
				return nil, err
			}
		}
	}
	for _, remove := range []func(digest.Digest) error{t.deleteManifest, t.deleteBlob} { // manifests first: their rows point at blobs
		for _, m := range all {
			if err := remove(m); err != nil {
				return nil, err
			}
		}
	}
	return refs, nil
}

// otherBlobs visits the blobs of the attached snapshot.
func (t *indexTx) otherBlobs(ctx context.Context, visit func(d digest.Digest, size int64) error) error {
	type row struct {
		id     int64
		digest digest.Digest
		size   int64
	}
	p := paging[row]{text: sqlOtherBlobs, size: 1000, scan: func(rows *sql.Rows) (r row, err error) {
		var b sql.RawBytes
		if err = rows.Scan(&r.id, &b, &r.size); err == nil {
			r.digest, err = digestFromBytes(b)
		}
		return r, err
	}, after: func(r row) []any { return []any{r.id} }}
	return p.each(ctx, t, []any{int64(0)}, func(r row) error { return visit(r.digest, r.size) })
}

// merge copies all rows of the attached snapshot, and makes the refs those of the snapshot. It
// returns how many refs it set and removed. The order of the steps follows the foreign keys: types
// and content come before the rows that point at them. The caller has copied all blobs before, and
// runs merge in one transaction, so a backup that is cut off leaves the one before it whole.
func (t *indexTx) merge(ctx context.Context) (set, removed int64, err error) {
	for _, step := range []struct {
		text string
		rows *int64
	}{
		{sqlMergeTypes, new(int64)}, {sqlMergeContent, new(int64)}, {sqlMergeManifests, new(int64)}, {sqlMergeMembers, new(int64)},
		{sqlMergeGone, &removed}, {sqlMergeRefs, &set}, {sqlMergeUsed, new(int64)},
		{sqlMergeGoneUnnamed, new(int64)}, {sqlMergeUnnamed, new(int64)}, {sqlMergeGoneHolds, new(int64)}, {sqlMergeHolds, new(int64)},
	} {
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		if *step.rows, err = t.exec(step.text); brokenConstraint(err) {
			err = fmt.Errorf("%w: not all rows of the index can be copied (see Verify): %v", ErrCorruptIndex, err)
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return set, removed, nil
}

// snapshot writes the index as it is at one moment to a new file, in one read transaction. Copying
// the file instead would be wrong in two ways: a commit could tear the copy, and closing the file
// after reading it would drop the locks that SQLite has on it (POSIX).
func (x *index) snapshot(ctx context.Context, path string) error {
	if err := checkDatabase(path, false, x.db.anyOwner); err != nil {
		return err
	}
	db, err := x.readerPool() // without query_only, which would forbid VACUUM INTO
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, "VACUUM INTO ?", path)
	return errors.Join(x.explain(err), indexError(db.Close()))
}

// attach lets the transactions of x use another database by the name other. It must be called
// before the first transaction, because SQLite does not attach a database inside one.
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
