package ocilocal

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Rebuild reads a damaged index with these functions, for the facts that no blob says: refs,
// manifests that were imported by digest, absent members and holds. Everything is hostile here.
// The index may be another program's or made to mislead, so each table is checked before it is
// read, and each value before it is used. Each scan ends at the damage, and keeps the rows before
// it. A row is used only if blobs/ has a file that hashes to the digest in the row.

const (
	sqlSalvage1 = `SELECT name, reference, manifest, '' FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`
	sqlSalvage2 = `SELECT name, reference, digest, entry FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`

	sqlSalvageUnnamed = `SELECT u.manifest, c.digest, u.since, u.entry FROM unnamed u CROSS JOIN content c WHERE u.manifest > ? AND c.id = u.manifest ORDER BY u.manifest LIMIT ?`

	sqlSalvageAbsent = `SELECT id, digest FROM content WHERE id > ? AND NOT present AND size >= 0 ORDER BY id LIMIT ?`
	// Absent members of image indexes (role 3) whose bytes are a blob here.
	sqlSalvageOnlyBlobs = `SELECT id, digest FROM content c WHERE id > ? AND present AND NOT ` + manifestHere + `
		AND EXISTS (SELECT 1 FROM members WHERE content = c.id AND role = 3) ORDER BY id LIMIT ?`

	// A virtual table and a view have no root page.
	sqlTableText   = `SELECT count(*), coalesce(min(type = 'table' AND rootpage > 0 AND substr(sql, 1, 13) = 'CREATE TABLE '), 0) FROM sqlite_schema WHERE name = ? COLLATE NOCASE`
	sqlTableColumn = `SELECT name, hidden FROM pragma_table_xinfo(?) ORDER BY cid LIMIT 100`
)

// checkTable returns an [ErrCorruptIndex] unless name is a table in which rows are stored, with
// exactly these columns. It is for databases that anybody may have made: a view, a virtual table or
// a generated column would let the database's maker decide what a query does, and for how long.
func (x *index) checkTable(ctx context.Context, name string, columns ...string) error {
	var found []string
	var tables, plain int
	err := eachRow(ctx, x, sqlTableText, []any{name}, func(rows *sql.Rows) error { return rows.Scan(&tables, &plain) })
	if err == nil && tables == 1 && plain == 1 {
		found, err = readRows(ctx, x, sqlTableColumn, len(columns), []any{name}, func(rows *sql.Rows) (column string, err error) {
			var hidden int
			if err = rows.Scan(&column, &hidden); hidden != 0 {
				column += " (generated)"
			}
			return column, err
		})
	}
	if err == nil && !slices.Equal(found, columns) {
		err = fmt.Errorf("%w: %s is not a table with the columns %q but %d objects, with the columns %q", ErrCorruptIndex, name, columns, tables, found)
	}
	return err
}

// salvages are the columns of refs in each schema version, and the query that reads them. The
// version number in the index may be damaged, so the columns tell the versions apart.
var salvages = [...]struct {
	columns []string
	text    string
}{
	{[]string{"name", "reference", "manifest", "media_type", "artifact_type", "size", "updated"}, sqlSalvage1},
	{[]string{"name", "reference", "manifest", "digest", "size", "media_type", "artifact_type", "created", "moved", "used", "entry"}, sqlSalvage2},
}

// A salvagedRef is a ref that can still be read from a damaged index.
type salvagedRef struct {
	Reference
	manifest digest.Digest
	entry    string // JSON, "" for none
}

// salvage opens a damaged index of any schema version, and calls read with it. The index at path
// must exist, and may be anybody's. Damage is not an error: read has got the rows before it.
//
// Errors: those of read, and those of opening the index, except [ErrCorruptIndex].
func salvage(path string, read func(*index) error) (err error) {
	x, err := openUnchecked(database{path: path, mode: indexQueryOnly}, 0, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, x.close()) }()
	if err = read(x); errors.Is(err, ErrCorruptIndex) {
		return nil
	}
	return err
}

// salvageRefs visits the refs, until the damage.
func (x *index) salvageRefs(ctx context.Context, visit func(salvagedRef) error) (err error) {
	for _, s := range salvages {
		if err = x.checkTable(ctx, "refs", s.columns...); err == nil {
			return x.salvagedRefs(ctx, s.text, visit)
		} else if !errors.Is(err, ErrCorruptIndex) {
			return err
		}
	}
	return err
}

// checkContent is checkTable for content, whose ids other tables have. An index of version 1 has no
// such table.
func (x *index) checkContent(ctx context.Context) error {
	return x.checkTable(ctx, "content", "id", "digest", "size", "kind", "created", "present", "unneeded")
}

// salvageUnnamed visits the manifests that were imported by digest, until the damage.
func (x *index) salvageUnnamed(ctx context.Context, visit func(d digest.Digest, since time.Time, entry string) error) error {
	err := x.checkContent(ctx)
	if err == nil {
		err = x.checkTable(ctx, "unnamed", "manifest", "since", "entry")
	}
	if err != nil {
		return err
	}
	type row struct {
		id, since int64
		digest    digest.Digest
		entry     string
	}
	p := paging[row]{text: sqlSalvageUnnamed, size: 100, scan: func(rows *sql.Rows) (r row, err error) {
		var b sql.RawBytes
		if err = rows.Scan(&r.id, &b, &r.since, &r.entry); err == nil {
			r.digest, err = digestFromBytes(b)
		}
		return r, err
	}, after: func(r row) []any { return []any{r.id} }}
	return p.each(ctx, x, []any{int64(0)}, func(r row) error {
		if r.entry != "" && !json.Valid([]byte(r.entry)) {
			return nil
		}
		return visit(r.digest, time.UnixMicro(r.since), r.entry)
	})
}

// salvageAbsent visits the digests that are recorded as absent, until the damage.
func (x *index) salvageAbsent(ctx context.Context, visit func(digest.Digest)) error {
	if err := x.checkContent(ctx); err != nil {
		return err
	}
	type row struct {
		id int64
		d  digest.Digest
	}
	for _, text := range []string{sqlSalvageAbsent, sqlSalvageOnlyBlobs} {
		p := paging[row]{text: text, size: 100, scan: func(rows *sql.Rows) (r row, err error) {
			r.id, r.d, err = scanIDDigest(rows)
			return r, err
		}, after: func(r row) []any { return []any{r.id} }}
		err := p.each(ctx, x, []any{int64(0)}, func(r row) error {
			visit(r.d)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// salvageHolds visits the holds, until the damage.
func (x *index) salvageHolds(ctx context.Context, visit func(holdRow) error) error {
	err := x.checkContent(ctx)
	if err == nil {
		err = x.checkTable(ctx, "holds", "name", "content", "since")
	}
	if err != nil {
		return err
	}
	return holds(ctx, x, func(h holdRow) error {
		if _, err := referenceFromKey(h.name, "latest"); err != nil {
			return nil
		}
		return visit(h)
	})
}

// salvagedRefs visits the rows of refs that have a valid name, reference and digest. It skips the
// others: one bad row must not hide the good ones after it.
func (x *index) salvagedRefs(ctx context.Context, text string, visit func(salvagedRef) error) error {
	type row struct {
		name, reference string
		manifest        any
		entry           string
	}
	p := paging[row]{text: text, size: 100, scan: func(rows *sql.Rows) (r row, err error) {
		err = rows.Scan(&r.name, &r.reference, &r.manifest, &r.entry)
		return r, err
	}, after: func(r row) []any { return []any{r.name, r.reference} }}
	return p.each(ctx, x, []any{"", ""}, func(r row) error {
		ref, err := referenceFromKey(r.name, r.reference)
		if err != nil {
			return nil
		}
		found := salvagedRef{Reference: ref}
		switch m := r.manifest.(type) {
		case string:
			found.manifest, err = rowDigest(m)
		case []byte:
			found.manifest, err = digestFromBytes(m)
		default:
			return nil
		}
		if err != nil {
			return nil
		}
		if json.Valid([]byte(r.entry)) {
			found.entry = r.entry
		}
		return visit(found)
	})
}
