package ocilocal

import (
	"context"

	"github.com/opencontainers/go-digest"
)

const (
	// One statement, so that the numbers are of one moment.
	sqlTotals    = `SELECT count(*), coalesce(sum(size), 0), (SELECT count(*) FROM manifests) FROM content WHERE present`
	sqlRefTotals = `SELECT count(*), count(DISTINCT name) FROM refs`

	// Each query merges two scans, and then looks up each row that is left. The second query leaves
	// out manifests, because a manifest with a ref has no member row that names it. Without the
	// LIMIT, SQLite would drop the order of the subquery, and with it the merge.
	sqlNoRef     = `SELECT m.digest FROM (SELECT id FROM manifests EXCEPT SELECT manifest FROM refs ORDER BY 1 LIMIT -1) o CROSS JOIN manifests m WHERE m.id = o.id`
	sqlNoPointer = `SELECT c.digest FROM (SELECT id FROM content WHERE kind <> ?1 AND present EXCEPT SELECT content FROM members ORDER BY 1 LIMIT -1) o CROSS JOIN content c WHERE c.id = o.id`
)

// totals returns how many blobs there are, manifests included, their bytes, and how many manifests.
func (x *index) totals() (blobs int, bytes int64, manifests int, err error) {
	_, err = x.row(sqlTotals, nil, &blobs, &bytes, &manifests)
	return blobs, bytes, manifests, err
}

// refTotals returns how many refs there are, and how many names they have.
func (x *index) refTotals() (refs, names int, err error) {
	_, err = x.row(sqlRefTotals, nil, &refs, &names)
	return refs, names, err
}

// withoutRef returns the manifests that no ref points at.
func (x *index) withoutRef(ctx context.Context) ([]digest.Digest, error) {
	return readRows(ctx, x, sqlNoRef, 0, nil, scanDigest)
}

// withoutPointer returns the blobs, other than manifests, that no manifest needs.
func (x *index) withoutPointer(ctx context.Context) ([]digest.Digest, error) {
	return readRows(ctx, x, sqlNoPointer, 0, []any{roleNumber(roleManifest)}, scanDigest)
}
