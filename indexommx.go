package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
)

// Statements that read the index of an OMMX v3 registry: schema 1 and 2 have these columns of refs.
const (
	sqlOMMXSchema = `SELECT (SELECT application_id FROM pragma_application_id), (SELECT user_version FROM pragma_user_version), count(*)
		FROM sqlite_schema WHERE type = 'table' AND rootpage > 0 AND name IN ('refs', 'ommx_local_registry_metadata')`
	sqlOMMXRefs = `SELECT rowid, substr(name, 1, 1000), substr(reference, 1, 1000), substr(manifest_digest, 1, 1000) FROM refs WHERE rowid > ? ORDER BY rowid LIMIT ?`
)

// ommxSchema is the newest schema of an OMMX v3 registry that sqlOMMXRefs reads.
const ommxSchema = 2

// openOMMX opens the index of an OMMX v3 registry for reading only: the SDK's
// processes may be writing it. SQLite makes the -shm and an empty -wal if they
// aren't there, for the locks that readers take, and without a right to do so nobody
// else is writing: then an empty or missing -wal can be done without.
func openOMMX(ctx context.Context, path string, walEmpty bool) (*index, error) {
	x, err := openOMMXMode(ctx, path, indexReadOnly)
	if walEmpty && (errors.Is(err, ErrIndexIO) || errors.Is(err, ErrReadOnly)) {
		return openOMMXMode(ctx, path, indexImmutable)
	}
	return x, err
}

func openOMMXMode(ctx context.Context, path string, mode indexMode) (*index, error) {
	x, err := openUnchecked(path, mode, 0, nil)
	if err != nil {
		return nil, err
	}
	var app, version, tables int
	if err = ctx.Err(); err == nil {
		_, err = x.row(sqlOMMXSchema, nil, &app, &version, &tables)
	}
	switch {
	case errors.Is(err, ErrCorruptIndex):
		err = fmt.Errorf("%w: %w", ErrForeignIndex, err)
	case err != nil:
	case app != 0 || version < 1 || tables != 2:
		err = fmt.Errorf("%w: this is no index of an OMMX v3 registry (application id %#x, schema %d)", ErrForeignIndex, app, version)
	case version > ommxSchema:
		err = &SchemaError{Found: version, Supported: ommxSchema}
	}
	if err != nil {
		return nil, errors.Join(err, x.close())
	}
	return x, nil
}

// ommxRef is one ref of an OMMX v3 registry, as it stands there.
type ommxRef struct{ name, reference, manifest string }

// ommxRefs visits the refs of an OMMX v3 registry.
func (x *index) ommxRefs(ctx context.Context, visit func(ommxRef) error) error {
	const page = 100
	s, err := x.stmt(sqlOMMXRefs)
	if err != nil {
		return err
	}
	for last := int64(math.MinInt64); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch, err := scanAll(s, page, []any{last, page}, func(rows *sql.Rows) (r ommxRef, err error) {
			err = rows.Scan(&last, &r.name, &r.reference, &r.manifest)
			return r, err
		})
		if err != nil {
			return err
		}
		for _, r := range batch {
			if err := visit(r); err != nil {
				return err
			}
		}
		if len(batch) < page {
			return nil
		}
	}
}
