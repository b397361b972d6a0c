package ocilocal

import (
	"context"
	"database/sql"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

const (
	// All that leads to ?1, itself included: the manifests that need it; with ?2 those whose
	// subject it is; and with ?3 the subjects of these. A manifest of the JSON array ?4 is led to
	// only by what needs it. A ref counts unless it is (?5, ?6), or of the name ?5 if ?6 is ''.
	sqlAbove = `WITH RECURSIVE up (d) AS (SELECT ?1
		UNION SELECT m.manifest FROM up JOIN members m ON m.digest = up.d
		UNION SELECT m.digest FROM up JOIN manifests m ON m.subject = up.d AND m.subject <> '' WHERE ?2 AND up.d NOT IN (SELECT value FROM json_each(?4))
		UNION SELECT m.subject FROM up JOIN manifests m ON m.digest = up.d WHERE ?3 AND m.subject <> '' AND up.d NOT IN (SELECT value FROM json_each(?4)))
		SELECT d, EXISTS (SELECT 1 FROM refs WHERE manifest = d AND NOT (name = ?5 AND ?6 IN ('', reference))) FROM up`

	// The manifests after ?3 that need ?1, and with ?2 those whose subject it is.
	sqlPointers = `SELECT manifest FROM members WHERE digest = ?1 AND manifest > ?3
		UNION SELECT digest FROM manifests WHERE ?2 AND subject = ?1 AND subject <> '' AND digest > ?3 ORDER BY 1 LIMIT ?4`

	sqlHasRef  = `SELECT 1 FROM refs WHERE manifest = ? LIMIT 1`
	sqlRefsTo  = `SELECT name, reference FROM refs WHERE manifest = ?`
	sqlSubject = `SELECT subject FROM manifests WHERE digest = ?`
)

// ways are those by which a climb goes up.
type ways struct {
	subjects  bool // the subject of what a ref leads to is led to as well
	referrers bool // and so is what refers to it
	// name and reference are a ref to leave out, or all refs of a name if reference is "".
	name, reference string
	missing         []digest.Digest // manifests without a file, which only what needs them leads to
}

// above visits d and all that leads to it, and says of each whether a ref points at it.
// visit must not query: rows are open meanwhile. [errStop] ends it.
func above(ctx context.Context, q queryer, d digest.Digest, w *ways, visit func(d digest.Digest, ref bool) error) error {
	missing, err := json.Marshal(append([]digest.Digest{}, w.missing...))
	if err != nil {
		return err
	}
	args := []any{string(d), w.subjects, w.referrers, string(missing), w.name, w.reference}
	err = eachRow(ctx, q, sqlAbove, args, func(rows *sql.Rows) error {
		var s string
		var ref bool
		if err := rows.Scan(&s, &ref); err != nil {
			return err
		}
		d, err := rowDigest(s)
		if err == nil {
			err = visit(d, ref)
		}
		return err
	})
	if err == errStop {
		err = nil
	}
	return err
}

// pointers visits the manifests that need d, and with subjects those that have it as their subject.
// [errStop] ends it.
func pointers(ctx context.Context, q queryer, d digest.Digest, subjects bool, visit func(manifest digest.Digest) error) error {
	p := paging[digest.Digest]{text: sqlPointers, size: 100, scan: scanDigest, after: func(m digest.Digest) []any {
		return []any{string(d), subjects, string(m)}
	}}
	return p.each(ctx, q, []any{string(d), subjects, ""}, visit)
}

// hasRef reports whether a ref points at d.
func hasRef(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlHasRef, string(d))
}

// refsTo returns the refs that point at d.
func refsTo(q queryer, d digest.Digest) ([]Reference, error) {
	return readRows(context.Background(), q, sqlRefsTo, 0, []any{string(d)}, func(rows *sql.Rows) (Reference, error) {
		var name, reference string
		if err := rows.Scan(&name, &reference); err != nil {
			return Reference{}, err
		}
		return referenceFromKey(name, reference)
	})
}

// subjectOf returns the subject of a manifest, "" if it has none or isn't here.
func subjectOf(q queryer, d digest.Digest) (subject digest.Digest, err error) {
	_, err = q.row(sqlSubject, []any{string(d)}, &subject)
	return subject, err
}
