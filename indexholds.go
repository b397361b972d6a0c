package ocilocal

import (
	"context"
	"database/sql"

	"github.com/opencontainers/go-digest"
)

const (
	// Whether a ref of the name ?2 leads to ?1: through the manifests that need it, and with ?3 from
	// a manifest without a ref that no manifest needs to its subject. The rows come one by one, so
	// the first ref ends the search.
	sqlShown = `WITH RECURSIVE up (id) AS (SELECT id FROM content WHERE digest = ?1
		UNION SELECT m.manifest FROM up CROSS JOIN members m WHERE m.content = up.id
		UNION SELECT m.subject FROM up CROSS JOIN manifests m WHERE ?3 AND m.id = up.id AND m.subject IS NOT NULL
			AND NOT EXISTS (SELECT 1 FROM refs WHERE manifest = up.id) AND NOT EXISTS (SELECT 1 FROM members WHERE content = up.id))
		SELECT 1 FROM up WHERE EXISTS (SELECT 1 FROM refs WHERE manifest = up.id AND name = ?2) LIMIT 1`

	sqlNamesOf = `SELECT reference FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?1) AND name = ?2`
)

// shown reports whether a ref of a name leads to d. With subjects, a manifest that nothing names is
// led to by its subject.
func shown(q queryer, name string, d digest.Digest, subjects bool) (bool, error) {
	return exists(q, sqlShown, digestBytes(d), name, subjects)
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
