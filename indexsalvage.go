package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
)

const (
	sqlSalvage = `SELECT name, reference, manifest FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`

	// A virtual table and a view have no root page.
	sqlTableText   = `SELECT count(*), coalesce(min(type = 'table' AND rootpage > 0 AND substr(sql, 1, 13) = 'CREATE TABLE '), 0) FROM sqlite_schema WHERE name = ? COLLATE NOCASE`
	sqlTableColumn = `SELECT name, hidden FROM pragma_table_xinfo(?) ORDER BY cid LIMIT 100`
)

// checkTable makes sure that a table of a database that anybody may have made is a table in
// which rows are stored, with these columns. A view, a virtual table or a generated column
// would let the database's maker decide what a query does, and for how long. Otherwise [ErrCorruptIndex].
func (x *index) checkTable(ctx context.Context, name string, columns ...string) error {
	var found []string
	var tables, plain int
	_, err := scanAll(ctx, x, sqlTableText, 1, []any{name}, func(rows *sql.Rows) (struct{}, error) {
		return struct{}{}, rows.Scan(&tables, &plain)
	})
	if err == nil && tables == 1 && plain == 1 {
		found, err = scanAll(ctx, x, sqlTableColumn, len(columns), []any{name}, func(rows *sql.Rows) (column string, err error) {
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

// salvageRefs visits the refs that can still be read from a damaged index, until the damage.
// The index at path must exist, and may be anybody's.
//
// Errors: those of visit and ctx, and all that kept the index from being read, except damage.
func salvageRefs(ctx context.Context, path string, visit func(Reference, digest.Digest) error) (err error) {
	x, err := openUnchecked(database{path: path, mode: indexQueryOnly}, 0, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, x.close()) }()
	err = x.checkTable(ctx, "refs", "name", "reference", "manifest", "media_type", "artifact_type", "size", "updated")
	for name, reference, more := "", "", true; more && err == nil; {
		name, reference, more, err = x.salvagePage(ctx, name, reference, visit)
	}
	if errors.Is(err, ErrCorruptIndex) {
		return nil
	}
	return err
}

// salvagePage visits the refs of one page, and returns the key of its last row.
func (x *index) salvagePage(ctx context.Context, name, reference string, visit func(Reference, digest.Digest) error) (string, string, bool, error) {
	const page = 100
	type row struct{ name, reference, manifest string }
	batch, err := scanAll(ctx, x, sqlSalvage, page, []any{name, reference, page}, func(rows *sql.Rows) (r row, err error) {
		err = rows.Scan(&r.name, &r.reference, &r.manifest)
		return r, err
	})
	if err != nil {
		return "", "", false, err
	}
	for _, r := range batch {
		if !ascends([]any{name, reference}, []any{r.name, r.reference}) {
			return "", "", false, errOutOfOrder
		}
		name, reference = r.name, r.reference
		ref, err := referenceFromKey(name, reference)
		if d, bad := rowDigest(r.manifest); err == nil && bad == nil {
			if err := visit(ref, d); err != nil {
				return "", "", false, err
			}
		}
	}
	return name, reference, len(batch) == page, nil
}
