package ocilocal

import (
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// The rows that lead to ?1, and ?1 itself: the manifests that need it; with ?2 those that have
	// it as their subject; and with ?3 the subjects of these. ?4 is a JSON array of digests, in
	// hexadecimal digits of the bytes that the index stores. To a manifest in it, only manifests
	// that need it lead. A ref counts unless it is (?5, ?6), or of the name ?5 if ?6 is ''. A hold
	// counts if it is younger than ?7. At most ?8 needers of a row are followed, and all if ?8 is
	// negative. CROSS JOIN keeps SQLite's planner from another order: each row is found from up.
	sqlAbove = `WITH RECURSIVE missing (id) AS MATERIALIZED (SELECT c.id FROM json_each(?4) j CROSS JOIN content c WHERE c.digest = unhex(j.value)),
		up (id) AS (SELECT id FROM content WHERE digest = ?1
		UNION SELECT m.manifest FROM up CROSS JOIN members m WHERE m.content = up.id AND m.manifest <= CASE WHEN ?8 < 0 THEN 9223372036854775807
			ELSE coalesce((SELECT DISTINCT manifest FROM members WHERE content = up.id ORDER BY manifest LIMIT 1 OFFSET ?8), 9223372036854775807) END
		UNION SELECT m.id FROM up CROSS JOIN manifests m WHERE ?2 AND m.subject = up.id AND up.id NOT IN (SELECT id FROM missing)
		UNION SELECT m.subject FROM up CROSS JOIN manifests m WHERE ?3 AND m.id = up.id AND m.subject IS NOT NULL AND up.id NOT IN (SELECT id FROM missing))
		SELECT c.digest, EXISTS (SELECT 1 FROM refs WHERE manifest = up.id AND NOT (name = ?5 AND ?6 IN ('', reference)))
			OR EXISTS (SELECT 1 FROM holds WHERE content = up.id AND since > ?7) FROM up CROSS JOIN content c WHERE c.id = up.id`

	// True if a ref or hold that counts, as in sqlAbove, points at ?1, or a ref at one of the first
	// manifests that need it.
	sqlLedNear = `SELECT 1 FROM content c WHERE digest = ?1 AND (EXISTS (SELECT 1 FROM refs WHERE manifest = c.id AND NOT (name = ?2 AND ?3 IN ('', reference)))
		OR EXISTS (SELECT 1 FROM holds WHERE content = c.id AND since > ?4)
		OR EXISTS (SELECT 1 FROM (SELECT manifest FROM members WHERE content = c.id LIMIT 100) m CROSS JOIN refs r
			WHERE r.manifest = m.manifest AND NOT (r.name = ?2 AND ?3 IN ('', r.reference))))`

	// The manifests after ?2 that need ?1, and those that have it as their subject. Each query is
	// in the order of an index, so a page costs as much as its rows.
	sqlNeeders = `SELECT m.manifest, c.digest FROM members m CROSS JOIN content c
		WHERE m.content = (SELECT id FROM content WHERE digest = ?1) AND m.manifest > ?2 AND c.id = m.manifest ORDER BY m.manifest LIMIT ?3`
	sqlSubjectOf = `SELECT id, digest FROM manifests WHERE subject = (SELECT id FROM content WHERE digest = ?1) AND digest > ?2 ORDER BY digest LIMIT ?3`

	sqlHasRef  = `SELECT 1 FROM content c WHERE digest = ? AND (EXISTS (SELECT 1 FROM refs WHERE manifest = c.id) OR EXISTS (SELECT 1 FROM holds WHERE content = c.id))`
	sqlRefsTo  = `SELECT name, reference FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?)`
	sqlSubject = `SELECT s.digest FROM content c JOIN manifests m ON m.id = c.id JOIN content s ON s.id = m.subject WHERE c.digest = ?`
)

// ways say by which edges a climb goes up, and which refs and holds count at its top. An edge
// always leads from a manifest to its members.
type ways struct {
	subjects  bool // a manifest also leads to its subject
	referrers bool // and a subject to its referrers
	// name and reference are a ref to leave out, or all refs of a name if reference is "".
	name, reference string
	// heldSince is the time after which a hold must have begun to count as a ref does. Zero means
	// that all holds count.
	heldSince time.Time
	missing   []digest.Digest // manifests without a file: only what needs them leads to them
}

// above visits d and all that leads to it. ref says that a ref or hold that counts points at it.
// visit must not query, because rows are open meanwhile. [errStop] ends it.
//
// A caller that wants at most limit rows says so, and otherwise gives -1. The query puts all needers
// of a row in its queue before it returns the next row, so it costs as much as there are, even if
// visit ends it soon. With a limit it follows that many needers of each row.
func above(ctx context.Context, q queryer, d digest.Digest, w *ways, limit int, visit func(d digest.Digest, ref bool) error) error {
	missing := make([]string, 0, len(w.missing))
	for _, d := range w.missing {
		missing = append(missing, hex.EncodeToString(digestBytes(d)))
	}
	list, err := json.Marshal(missing)
	if err != nil {
		return err
	}
	found := false
	args := []any{digestBytes(d), w.subjects, w.referrers, string(list), w.name, w.reference, w.since(), limit}
	err = eachRow(ctx, q, sqlAbove, args, func(rows *sql.Rows) error {
		found = true
		var b sql.RawBytes
		var ref bool
		if err := rows.Scan(&b, &ref); err != nil {
			return err
		}
		d, err := digestFromBytes(b)
		if err == nil {
			err = visit(d, ref)
		}
		return err
	})
	if err == nil && !found {
		err = visit(d, false) // it has no row, so nothing leads to it
	}
	if err == errStop {
		err = nil
	}
	return err
}

// since is heldSince as the index has times.
func (w *ways) since() int64 {
	if w.heldSince.IsZero() {
		return -1
	}
	return w.heldSince.UnixMicro()
}

// ledNear reports whether a ref or hold that counts points at d, or a ref at one of the first
// manifests that need it. That is cheap, and true for nearly all content that is in use. If it is
// false, above has the answer.
func ledNear(q queryer, d digest.Digest, w *ways) (bool, error) {
	return exists(q, sqlLedNear, digestBytes(d), w.name, w.reference, w.since())
}

// pointers visits the manifests that need d, and with subjects those that have it as their subject.
// A manifest that does both, or that names d twice, is visited twice. It reads in pages, so visit
// may query and write. [errStop] ends it.
func pointers(ctx context.Context, q queryer, d digest.Digest, subjects bool, visit func(manifest digest.Digest) error) error {
	type row struct {
		id int64
		d  digest.Digest
	}
	scan := func(rows *sql.Rows) (r row, err error) {
		r.id, r.d, err = scanIDDigest(rows)
		return r, err
	}
	stopped := false
	each := func(r row) error {
		err := visit(r.d)
		stopped = err == errStop
		return err
	}
	b := digestBytes(d)
	needers := paging[row]{text: sqlNeeders, size: 100, scan: scan, after: func(r row) []any { return []any{b, r.id} }}
	if err := needers.each(ctx, q, []any{b, int64(0)}, each); err != nil || stopped || !subjects {
		return err
	}
	referrers := paging[row]{text: sqlSubjectOf, size: 100, scan: scan, after: func(r row) []any { return []any{b, digestBytes(r.d)} }}
	return referrers.each(ctx, q, []any{b, []byte{}}, each)
}

// hasRef reports whether a ref points at d, or a repository holds it.
func hasRef(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlHasRef, digestBytes(d))
}

// refsTo returns the refs that point at d.
func refsTo(q queryer, d digest.Digest) ([]Reference, error) {
	return readRows(context.Background(), q, sqlRefsTo, 0, []any{digestBytes(d)}, func(rows *sql.Rows) (Reference, error) {
		var name, reference string
		if err := rows.Scan(&name, &reference); err != nil {
			return Reference{}, err
		}
		return referenceFromKey(name, reference)
	})
}

// subjectOf returns the subject of a manifest, "" if it has none or isn't here.
func subjectOf(q queryer, d digest.Digest) (digest.Digest, error) {
	var b []byte
	ok, err := q.row(sqlSubject, []any{digestBytes(d)}, &b)
	if !ok || err != nil {
		return "", err
	}
	return digestFromBytes(b)
}
