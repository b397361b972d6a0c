package ocilocal

import (
	"context"
	"database/sql"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A repository shows the content to which its refs and holds lead. There are two ways to find out
// whether it shows a digest. Going up, from the digest to the manifests that need it, costs as
// much as there are such manifests: usually one or two, but every artifact without a config needs
// the blob "{}". Going down, from all that the repository has, costs as much as the repository is
// large. So a search goes up for maxShownUp rows, and then down.
//
// A recursive query puts all rows that one row leads to in its queue before it returns the next
// one, so a LIMIT of its rows does not bound its cost. So the way up takes only the first needers of
// each row. If it leaves one out, it has more rows than its limit, and the search goes down. The
// way down looks for a manifest with a ref first, and ends there if it finds one.
//
// The bytes of a manifest can be a blob too, which another manifest has as a layer. That shows the
// bytes, and not what the manifest needs: otherwise a client that knows the manifest of another
// repository could put it as a blob and read the rest. So a search asks for d as a blob, which any
// member leads to, or as a manifest, and then goes along image indexes (role 3) only.

const (
	// True if a ref or hold of the name ?2 points at the content c, or a ref at one of the first
	// manifests that need it, or if one of the first refs of the name points at such a manifest.
	nearby = `(EXISTS (SELECT 1 FROM refs WHERE manifest = c.id AND name = ?2)
		OR EXISTS (SELECT 1 FROM (SELECT manifest, role FROM members WHERE content = c.id LIMIT 4) m CROSS JOIN refs r
			WHERE r.manifest = m.manifest AND r.name = ?2 AND (?3 OR m.role = 3))
		OR EXISTS (SELECT 1 FROM holds WHERE content = c.id AND name = ?2)
		OR EXISTS (SELECT 1 FROM (SELECT manifest FROM refs WHERE name = ?2 LIMIT 4) r CROSS JOIN members m
			WHERE m.content = c.id AND m.manifest = r.manifest AND (?3 OR m.role = 3)))`

	// True for a row of members that leads from the content up.id to a manifest that shows it.
	leads = `content = up.id AND (role = 3 OR ?3 AND content = (SELECT id FROM content WHERE digest = ?1))`

	// The first row, if there is one, says that the name ?2 is nearby. Nearly all questions end
	// there, and the rest is not begun, which is half of the cost. The other rows, ?4 at most, are
	// those that lead to ?1, and ?1 itself: the first manifests that need it, and with ?5 the subject
	// of a manifest that nothing names. The column says whether a ref or hold of the name ?2 points at
	// the row.
	sqlShownUp = `WITH RECURSIVE up (id) AS (SELECT id FROM content WHERE digest = ?1
		UNION SELECT m.manifest FROM up CROSS JOIN members m WHERE ` + leads + ` AND m.manifest <=
			coalesce((SELECT DISTINCT manifest FROM members WHERE ` + leads + ` ORDER BY manifest LIMIT 1 OFFSET ?4), 9223372036854775807)
		UNION SELECT m.subject FROM up CROSS JOIN manifests m WHERE ?5 AND m.id = up.id AND m.subject IS NOT NULL AND ` + nameless + ` LIMIT ?4)
		SELECT 1 FROM content c WHERE digest = ?1 AND ` + nearby + `
		UNION ALL
		SELECT EXISTS (SELECT 1 FROM refs WHERE manifest = up.id AND name = ?2) OR EXISTS (SELECT 1 FROM holds WHERE content = up.id AND name = ?2) FROM up`

	// A row if ?1 is one of the manifests to which the name ?2 leads, or if one of them needs it. The
	// first query finds what those with a ref need, because most questions end there.
	sqlShownDown = `WITH RECURSIVE down (id) AS (SELECT manifest FROM refs WHERE name = ?2
		UNION SELECT content FROM holds WHERE name = ?2
		UNION SELECT m.content FROM down CROSS JOIN members m WHERE m.manifest = down.id AND m.role = 3
		UNION SELECT m.id FROM down CROSS JOIN manifests m WHERE ?4 AND m.subject = down.id AND ` + nameless + `)
		SELECT 1 FROM content c CROSS JOIN refs r CROSS JOIN members m
			WHERE c.digest = ?1 AND r.name = ?2 AND m.content = c.id AND m.manifest = r.manifest AND (?3 OR m.role = 3)
		UNION ALL
		SELECT 1 FROM content c CROSS JOIN down WHERE c.digest = ?1 AND (down.id = c.id
			OR EXISTS (SELECT 1 FROM members m WHERE m.content = c.id AND m.manifest = down.id AND (?3 OR m.role = 3))) LIMIT 1`

	// A manifest m that has no ref, that no repository holds, and that no other one needs.
	nameless = `NOT EXISTS (SELECT 1 FROM refs WHERE manifest = m.id)
		AND NOT EXISTS (SELECT 1 FROM members WHERE content = m.id) AND NOT EXISTS (SELECT 1 FROM holds WHERE content = m.id)`

	sqlManifestNearby = `SELECT ` + descriptorColumns + `, m.created, ` + nearby + `
		FROM content c JOIN manifests m ON m.id = c.id WHERE c.digest = ?1`

	sqlNamesOf = `SELECT reference FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?1) AND name = ?2`
)

// maxShownUp is how many rows a search goes up before it goes down.
const maxShownUp = 200

// shown reports whether a ref or hold of a name leads to d, as a manifest or also as a blob. With
// subjects, a subject leads to its referrers that nothing names. Other repositories' refs do not
// count, so nobody learns from one repository what another one has.
func shown(q queryer, name string, d digest.Digest, blob, subjects bool) (bool, error) {
	n, found := 0, false
	err := eachRow(context.Background(), q, sqlShownUp, []any{digestBytes(d), name, blob, maxShownUp, subjects}, func(rows *sql.Rows) error {
		n++
		err := rows.Scan(&found)
		if found {
			err = errStop
		}
		return err
	})
	if err != nil && err != errStop || found || n < maxShownUp {
		return found, ignoreStop(err)
	}
	return exists(q, sqlShownDown, digestBytes(d), name, blob, subjects)
}

// shownManifest returns the descriptor of a manifest, if a name shows it as one: see shown. Mostly it
// takes one query.
func shownManifest(q queryer, name string, d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	var row descriptorRow
	var near bool
	ok, err = q.row(sqlManifestNearby, []any{digestBytes(d), name, false}, append(row.dest(), &near)...)
	if !ok || err != nil {
		return desc, false, err
	}
	if desc, _, err = row.value(); err == nil {
		err = checkFound(d, desc.Digest)
	}
	if err == nil && !near {
		ok, err = shown(q, name, d, false, true)
	}
	return desc, ok && err == nil, err
}

// ignoreStop is err, unless that is [errStop].
func ignoreStop(err error) error {
	if err == errStop {
		return nil
	}
	return err
}

// referencesTo returns the tags and digests by which refs of a name point at d.
func referencesTo(q queryer, name string, d digest.Digest) ([]string, error) {
	return readRows(context.Background(), q, sqlNamesOf, 0, []any{digestBytes(d), name}, func(rows *sql.Rows) (reference string, err error) {
		if err = rows.Scan(&reference); err == nil {
			_, err = referenceFromKey(name, reference)
		}
		return reference, err
	})
}
