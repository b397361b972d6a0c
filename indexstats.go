package ocilocal

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Statements of lineage.go.
const (
	// A page of referrers starts after the digest ?3. The second condition lets
	// SQLite use the partial index, which is in the order asked for.
	sqlReferrers = `SELECT media_type, digest, size, artifact_type, annotations FROM manifests
		WHERE subject = ?1 AND subject <> '' AND (?2 = '' OR artifact_type = ?2) AND digest > ?3 ORDER BY digest LIMIT ?4`
)

// referrers returns one page of the manifests with that subject, after a digest.
func (x *index) referrers(subject digest.Digest, artifactType string, after digest.Digest, n int) ([]ocispec.Descriptor, error) {
	return scanAll(context.Background(), x, sqlReferrers, n, []any{string(subject), artifactType, string(after), n}, func(rows *sql.Rows) (d ocispec.Descriptor, err error) {
		var annotations []byte
		if err := rows.Scan(&d.MediaType, &d.Digest, &d.Size, &d.ArtifactType, &annotations); err != nil {
			return d, err
		}
		if err = checkDigest(d.Digest); err == nil {
			err = json.Unmarshal(annotations, &d.Annotations)
		}
		if err != nil {
			err = fmt.Errorf("%w: row of manifest %q: %w", ErrCorruptIndex, clip(string(d.Digest)), err)
		}
		return d, err
	})
}

// Statements of push.go.
const (
	// At most 1,000 manifests are looked at: there are blobs that all have.
	sqlOtherName = `SELECT r.name FROM (SELECT manifest FROM members WHERE digest = ?1 LIMIT 1000) m JOIN refs r ON r.manifest = m.manifest
		WHERE r.name >= ?2 AND r.name < ?3 AND r.name <> ?4 LIMIT 1`
)

// otherName returns the name, other than not and beginning with prefix, of a ref whose
// manifest has d; "" if none is found. The prefix ends with a '/'.
func (x *index) otherName(d digest.Digest, prefix, not string) (name string, err error) {
	above := prefix[:len(prefix)-1] + "0" // the character after '/'
	_, err = scanAll(context.Background(), x, sqlOtherName, 1, []any{string(d), prefix, above, not}, func(rows *sql.Rows) (struct{}, error) {
		return struct{}{}, rows.Scan(&name)
	})
	return name, err
}

// Statements of stats.go.
const (
	sqlTotals    = `SELECT count(*), coalesce(sum(size), 0), (SELECT count(*) FROM manifests) FROM blobs` // of one moment
	sqlRefTotals = `SELECT count(*), count(DISTINCT name) FROM refs`

	// Both are merges of two scans. A manifest's own row in blobs is left out
	// of the second: where it has a ref, no member names it.
	sqlNoRef     = `SELECT digest FROM manifests EXCEPT SELECT manifest FROM refs ORDER BY 1`
	sqlNoPointer = `SELECT digest FROM blobs WHERE kind <> ?1 EXCEPT SELECT digest FROM members ORDER BY 1`

	sqlBlobSize = `SELECT size FROM blobs WHERE digest = ?`
	// A ref that is not (?2, ?3), or not of the name ?2 if ?3 is ''.
	sqlOtherRef = `SELECT 1 FROM refs WHERE manifest = ?1 AND NOT (name = ?2 AND ?3 IN ('', reference)) LIMIT 1`
	sqlNames    = `SELECT DISTINCT name FROM refs WHERE name >= ?1 AND name > ?2 AND name < ?3 ORDER BY name LIMIT ?4`
)

// digests reads a column of digests.
func (x *index) digests(text string, args ...any) ([]digest.Digest, error) {
	return scanAll(context.Background(), x, text, 0, args, func(rows *sql.Rows) (d digest.Digest, err error) {
		var s string
		if err := rows.Scan(&s); err != nil {
			return "", err
		}
		return rowDigest(s)
	})
}

// names returns one page of the names that have refs: at least from, after a name and below another.
func (x *index) names(from, after, below string, n int) ([]string, error) {
	return scanAll(context.Background(), x, sqlNames, n, []any{from, after, below, n}, func(rows *sql.Rows) (name string, err error) {
		if err = rows.Scan(&name); err == nil {
			_, err = referenceFromKey(name, "latest")
		}
		if err == nil && name <= after {
			err = errOutOfOrder
		}
		after = name
		if err != nil {
			err = fmt.Errorf("%w: a ref's name: %w", ErrCorruptIndex, err)
		}
		return name, err
	})
}

// hasOtherRef reports whether a ref points at d, other than the one, or than all of a name if reference is "".
func hasOtherRef(q rowReader, d digest.Digest, name, reference string) (bool, error) {
	var one int
	return q.row(sqlOtherRef, []any{string(d), name, reference}, &one)
}

// blobSize returns the size that a blob's row says, 0 if it has none.
func blobSize(q rowReader, d digest.Digest) (size int64, err error) {
	_, err = q.row(sqlBlobSize, []any{string(d)}, &size)
	return size, err
}
