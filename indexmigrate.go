package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// upgradeTo2 brings an index from schema version 1 to version 2, in one transaction. After a kill
// or a power cut the index is of version 1, as before, and the next Open migrates it.
//
//	version 1                    version 2
//	blobs                   ──▶  content     and a row for each subject that had none
//	manifests               ──▶  manifests
//	members                 ──▶  members
//	refs                    ──▶  refs        created and moved are both the old updated
//	texts in the above      ──▶  types
//	                             unnamed, holds: empty
//	meta                         meta        as it was
//
// Everything is copied before the old tables are dropped, so the file may grow by the size of the
// new tables. SQLite uses the free pages for later rows. Only VACUUM would make the file smaller,
// and that needs a second copy of it.
//
// Rows are inserted in the order of their keys, and the indexes are made at the end: so pages are
// filled one after the other. The ids of content follow the order in which content was published.
//
// Each row of version 1 must become a row of version 2. A value that stands for none, because the
// index is damaged, breaks a constraint there: NOT NULL where a digest is not one or an id is not
// found; the foreign key where that id would be the row's own.
var upgradeTo2 = slices.Concat(
	[]string{
		`DROP INDEX manifests_by_subject`,
		`DROP INDEX members_by_digest`,
		`DROP INDEX refs_by_manifest`,
		`ALTER TABLE refs RENAME TO old_refs`,
		`ALTER TABLE members RENAME TO old_members`,
		`ALTER TABLE manifests RENAME TO old_manifests`,
	},
	objectsOf("TABLE"),
	[]string{
		`INSERT INTO types (text) SELECT media_type FROM old_manifests UNION SELECT artifact_type FROM old_manifests UNION SELECT media_type FROM old_members
			UNION SELECT media_type FROM old_refs UNION SELECT artifact_type FROM old_refs`,
		`INSERT INTO content (digest, size, kind, created) SELECT ` + bytesOf("o.digest") + `, size, ` + numberOf("o.kind") + `, created FROM blobs o ORDER BY o.created, o.digest`,
		// In version 1, a subject without a row was one that is not here.
		`INSERT INTO content (digest, size, kind, created, present) SELECT ` + bytesOf("o.subject") + `, -1, 3, min(created), 0 FROM old_manifests o WHERE subject <> ''
			GROUP BY subject ORDER BY 4, 1 ON CONFLICT (digest) DO NOTHING`,
		`INSERT INTO manifests (id, digest, media_type, artifact_type, subject, annotations, created)
			SELECT coalesce(` + idOf("o.digest") + `, -1) AS id, ` + bytesOf("o.digest") + `, ` + typeOf("o.media_type") + `, ` + typeOf("o.artifact_type") + `,
			iif(subject = '', NULL, coalesce(` + idOf("o.subject") + `, -1)), annotations, created FROM old_manifests o ORDER BY 1`,
		// In version 1, a manifest whose bytes had been a blob before stayed one.
		`UPDATE content SET kind = 3 WHERE kind <> 3 AND EXISTS (SELECT 1 FROM manifests WHERE id = content.id)`,
		`INSERT INTO members (manifest, position, role, content, media_type, size, annotations)
			SELECT ` + idOf("o.manifest") + `, position, ` + numberOf("o.role") + `, ` + idOf("o.digest") + `, ` + typeOf("o.media_type") + `, size, annotations FROM old_members o ORDER BY 1, 2`,
		`INSERT INTO refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved)
			SELECT name, reference, ` + idOf("o.manifest") + `, ` + bytesOf("o.manifest") + `, size, ` + typeOf("o.media_type") + `, ` + typeOf("o.artifact_type") + `, updated, updated
			FROM old_refs o ORDER BY name, reference`,
		`DROP TABLE old_refs`, // before the tables to which its rows point
		`DROP TABLE old_members`,
		`DROP TABLE old_manifests`,
		`DROP TABLE blobs`,
	},
	objectsOf("INDEX"),
	objectsOf("VIEW"),
)

// objectsOf returns the statements that make the objects of a kind in version 2, except meta, which
// is the same in version 1.
func objectsOf(kind string) (stmts []string) {
	for _, s := range schema2 {
		if strings.HasPrefix(s, "CREATE "+kind+" ") && !strings.HasPrefix(s, "CREATE TABLE meta ") {
			stmts = append(stmts, s)
		}
	}
	return stmts
}

// bytesOf is the SQL for the bytes of a digest in text: see [digestBytes].
func bytesOf(column string) string {
	return fmt.Sprintf(`unhex(CASE substr(%[1]s, 1, 7) WHEN 'sha256:' THEN '01' WHEN 'sha384:' THEN '02' WHEN 'sha512:' THEN '03' END || substr(%[1]s, 8))`, column)
}

// idOf is the SQL for the id in content of a digest in text.
func idOf(column string) string {
	return `(SELECT id FROM content c WHERE c.digest = ` + bytesOf(column) + `)`
}

// typeOf is the SQL for the id of a media type or artifact type.
func typeOf(column string) string { return `(SELECT id FROM types WHERE text = ` + column + `)` }

// numberOf is the SQL for the number of a role: see [roleNumber].
func numberOf(column string) string {
	return `CASE ` + column + ` WHEN 'config' THEN 1 WHEN 'layer' THEN 2 WHEN 'manifest' THEN 3 ELSE 0 END`
}

// In a large index, a migration looks up rows all over it. A cache of 128,000 KiB saves reading
// their pages again and again.
const sqlLargeCache = `PRAGMA cache_size = -128000`

// migrate brings the index to this program's schema version, unless another process was faster: the
// version is read again inside the transaction. It is one transaction, so if it fails or is killed,
// the index is as it was. After it, programs that know only the old version get a [*SchemaError],
// even those that have the index open.
//
// Errors: [ErrCorruptIndex] if the index has rows that cannot be brought over.
func (x *index) migrate(ctx context.Context) error {
	return x.writeAlone(ctx, func(tx *indexTx) (err error) {
		version, err := tx.version()
		if err != nil {
			return err
		}
		if _, err = tx.exec(sqlLargeCache); err != nil {
			return err
		}
		for n := version; n < len(x.schema); n++ {
			for _, s := range append(slices.Clone(x.schema[n].upgrade), setVersion(n+1)) {
				if err == nil {
					err = ctx.Err()
				}
				if err == nil {
					_, err = tx.exec(s)
				}
			}
		}
		_, always := tx.exec(sqlWriterCache)
		return errors.Join(migrationError(version, err), always)
	})
}

// migrationError explains a broken constraint: the index does not keep its own, so it is damaged.
func migrationError(version int, err error) error {
	if brokenConstraint(err) {
		err = fmt.Errorf("%w: its schema version is %d, and not all of its rows can be brought up to date (Rebuild makes a new index): %v", ErrCorruptIndex, version, err)
	}
	return err
}

// brokenConstraint reports whether SQLite refused a row. If the row was copied from an index, that
// index is damaged.
func brokenConstraint(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && e.Code()&0xff == sqlite3.SQLITE_CONSTRAINT
}
