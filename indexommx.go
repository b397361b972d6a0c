package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
)

// Statements that read the index of an OMMX v3 registry.
const (
	sqlOMMXVersion = `SELECT (SELECT application_id FROM pragma_application_id), (SELECT user_version FROM pragma_user_version)`
	sqlOMMXRefs    = `SELECT rowid, substr(name, 1, 1000), substr(reference, 1, 1000), substr(manifest_digest, 1, 1000), substr(updated_at, 1, 1000) FROM refs WHERE rowid > ? ORDER BY rowid LIMIT ?`
)

// ommxColumns are the columns of the table refs, by schema version. The last is the newest that
// sqlOMMXRefs reads.
var ommxColumns = [...][]string{
	1: {"name", "reference", "manifest_media_type", "manifest_digest", "manifest_size", "manifest_annotations_json", "updated_at"},
	2: {"name", "reference", "manifest_digest", "updated_at"},
}

// openOMMX opens the index of an OMMX v3 registry for reading only: the SDK's processes may be
// writing it. SQLite makes the -shm and an empty -wal if they do not exist, for the locks that
// readers take. If it may not make them and the log has no content (walEmpty), openOMMX reads the
// database alone, without locks. Nobody is writing then, since a writer would have made both files.
func openOMMX(ctx context.Context, path string, walEmpty bool) (*index, error) {
	x, err := openOMMXMode(ctx, path, indexReadOnly)
	if walEmpty && (errors.Is(err, ErrIndexIO) || errors.Is(err, ErrReadOnly)) {
		return openOMMXMode(ctx, path, indexImmutable)
	}
	return x, err
}

func openOMMXMode(ctx context.Context, path string, mode indexMode) (*index, error) {
	x, err := openUnchecked(database{path: path, mode: mode}, 0, nil)
	if err != nil {
		return nil, err
	}
	if err := x.checkOMMX(ctx); err != nil {
		return nil, errors.Join(err, x.close())
	}
	return x, nil
}

// checkOMMX refuses a database that is not the index of an OMMX v3 registry. Its maker is not
// trusted: a view or a virtual table in the place of a table is refused too (see checkTable).
func (x *index) checkOMMX(ctx context.Context) error {
	var app, version int
	err := eachRow(ctx, x, sqlOMMXVersion, nil, func(rows *sql.Rows) error { return rows.Scan(&app, &version) })
	switch newest := len(ommxColumns) - 1; {
	case err != nil:
	case app != 0 || version < 1:
		return fmt.Errorf("%w: it is not the index of an OMMX v3 registry (application id %#x, schema %d)", ErrForeignIndex, app, version)
	case version > newest:
		return &SchemaError{Found: version, Supported: newest}
	default:
		if err = x.checkTable(ctx, "refs", ommxColumns[version]...); err == nil {
			err = x.checkTable(ctx, "ommx_local_registry_metadata", "key", "value")
		}
	}
	if errors.Is(err, ErrCorruptIndex) {
		err = fmt.Errorf("%w: it is not the index of an OMMX v3 registry: %w", ErrForeignIndex, err)
	}
	return err
}

// ommxRef is one row of refs of an OMMX v3 registry. The values are unchecked, except that they are
// at most 1,000 characters long.
type ommxRef struct {
	row                       int64
	name, reference, manifest string
	updated                   any // RFC 3339
}

// ommxRefs visits the refs of an OMMX v3 registry, in pages: no lock is held while visit runs, so
// the SDK can go on writing.
func (x *index) ommxRefs(ctx context.Context, visit func(ommxRef) error) error {
	p := paging[ommxRef]{text: sqlOMMXRefs, size: 100, scan: func(rows *sql.Rows) (r ommxRef, err error) {
		err = rows.Scan(&r.row, &r.name, &r.reference, &r.manifest, &r.updated)
		return r, err
	}, after: func(r ommxRef) []any { return []any{r.row} }}
	return p.each(ctx, x, []any{int64(math.MinInt64)}, visit)
}
