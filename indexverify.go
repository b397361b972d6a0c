package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// What verification and repair read and write.
const (
	sqlManifestColumns = `SELECT digest, media_type, artifact_type, size, config, subject, annotations FROM manifests WHERE digest = ?`
	sqlMemberColumns   = `SELECT manifest, position, role, digest, media_type, size, annotations FROM members
		WHERE manifest = ? AND position >= ? ORDER BY position LIMIT ?`
	sqlBlobsAfter = `SELECT digest, size, kind = ?3 OR EXISTS (SELECT 1 FROM manifests m WHERE m.digest = b.digest)
		FROM blobs b WHERE digest > ?1 ORDER BY digest LIMIT ?2`
	sqlCheckRefs = `SELECT r.name, r.reference, r.manifest, m.digest IS NULL OR r.media_type <> m.media_type OR r.artifact_type <> m.artifact_type OR r.size <> m.size
		FROM refs r LEFT JOIN manifests m ON m.digest = r.manifest WHERE (r.name, r.reference) > (?, ?) ORDER BY r.name, r.reference LIMIT ?`

	sqlUpdateManifest = `UPDATE manifests SET media_type = ?2, artifact_type = ?3, size = ?4, config = ?5, subject = ?6, annotations = ?7 WHERE digest = ?1`
	sqlDeleteMembers  = `DELETE FROM members WHERE manifest = ?`
	sqlUpdateRefs     = `UPDATE refs SET media_type = m.media_type, artifact_type = m.artifact_type, size = m.size
		FROM manifests m WHERE m.digest = ?1 AND refs.manifest = ?1`
	sqlDeleteMeta = `DELETE FROM meta WHERE key = ?`
)

// A blobRow is what the index says of a blob.
type blobRow struct {
	digest   digest.Digest // not checked
	size     int64
	manifest bool // by its own row, or by that among the manifests
}

// blobsAfter returns one page of blobs in the order of their digests, after one of them.
func (x *index) blobsAfter(after digest.Digest, n int) ([]blobRow, error) {
	return scanAll(context.Background(), x, sqlBlobsAfter, n, []any{string(after), n, string(roleManifest)}, func(rows *sql.Rows) (b blobRow, err error) {
		if err := rows.Scan(&b.digest, &b.size, &b.manifest); err != nil {
			return b, err
		}
		if b.digest <= after {
			return b, errOutOfOrder
		}
		after = b.digest
		return b, nil
	})
}

// setMeta sets a value of the table meta.
func (t *indexTx) setMeta(key, value string) error {
	_, err := t.exec(sqlSetMeta, key, value)
	return err
}

// deleteMeta removes a value of the table meta.
func (t *indexTx) deleteMeta(key string) error {
	_, err := t.exec(sqlDeleteMeta, key)
	return err
}

// rowsDiffer says in what the rows of a manifest contradict it, "" if in nothing, or if there are none.
func rowsDiffer(ctx context.Context, q queryer, m *Manifest) (string, error) {
	compare := func(rows *sql.Rows, want []any, names ...string) (string, error) {
		got := make([]any, len(want))
		dest := make([]any, len(want))
		for i := range got {
			dest[i] = &got[i]
		}
		if err := rows.Scan(dest...); err != nil {
			return "", err
		}
		for i := range got {
			if fmt.Sprint(got[i]) != fmt.Sprint(want[i]) {
				return fmt.Sprintf("%s is %s, should be %s", names[i], clip(fmt.Sprintf("%q", got[i])), clip(fmt.Sprintf("%q", want[i]))), nil
			}
		}
		return "", nil
	}
	differ := ""
	want, err := manifestColumns(m)
	if err != nil {
		return "", err
	}
	found, err := scanAll(ctx, q, sqlManifestColumns, 1, []any{string(m.Digest())}, func(rows *sql.Rows) (struct{}, error) {
		differ, err = compare(rows, want, "digest", "media type", "artifact type", "size", "config", "subject", "annotations")
		return struct{}{}, err
	})
	if err != nil || differ != "" || len(found) == 0 {
		return differ, err
	}
	n := 0
	err = pages(ctx, q, sqlMemberColumns, []any{string(m.Digest()), 0}, func(rows *sql.Rows) ([]any, error) {
		if n++; n > len(m.children()) {
			differ = fmt.Sprintf("more than %d members", len(m.children()))
			return nil, errStop
		}
		want, err := memberColumns(m, n-1)
		if err == nil {
			differ, err = compare(rows, want, "manifest", "position", "role", "digest", "media type", "size", "annotations")
		}
		if err == nil && differ != "" {
			differ = fmt.Sprintf("member %d: %s", n-1, differ)
			err = errStop
		}
		return []any{string(m.Digest()), n}, err
	})
	if err != nil && !errors.Is(err, errStop) {
		return "", err
	}
	if differ == "" && n < len(m.children()) {
		differ = fmt.Sprintf("%d members of %d", n, len(m.children()))
	}
	for i, c := range m.children() {
		if differ == "" && m.childRole(i) == roleManifest {
			lost, err := lostManifest(q, c.Digest)
			if err != nil {
				return "", err
			}
			if lost {
				differ = fmt.Sprintf("member %d: no row says what manifest %s needs", i, c.Digest)
			}
		}
	}
	return differ, nil
}

// badRefs visits the refs that nobody could have made, whose manifest has no row, or
// other columns than they repeat. visit may query: no rows are open meanwhile.
func (x *index) badRefs(ctx context.Context, visit func(Reference, digest.Digest, error) error) error {
	const page = 1000
	type row struct {
		name, reference, manifest string
		bad                       bool
	}
	for last := (row{}); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch, err := scanAll(ctx, x, sqlCheckRefs, page, []any{last.name, last.reference, page}, func(rows *sql.Rows) (r row, err error) {
			err = rows.Scan(&r.name, &r.reference, &r.manifest, &r.bad)
			return r, err
		})
		if err != nil {
			return err
		}
		for _, r := range batch {
			ref, bad := referenceFromKey(r.name, r.reference)
			switch {
			case bad != nil:
				bad = fmt.Errorf("%w: row of ref %q: %w", ErrCorruptIndex, clip(r.name+":"+r.reference), bad)
			case r.bad:
				bad = fmt.Errorf("%w: its manifest is %s, which the index doesn't have, or otherwise", ErrCorruptIndex, clip(r.manifest))
			default:
				continue
			}
			if err := visit(ref, digest.Digest(r.manifest), bad); err != nil {
				return err
			}
		}
		if len(batch) < page {
			return nil
		}
		if r := batch[page-1]; !ascends([]any{last.name, last.reference}, []any{r.name, r.reference}) {
			return errOutOfOrder
		}
		last = batch[page-1]
	}
}

// integrity visits the damage that SQLite finds in the index. Like [index.explain], it does not take a page that
// cannot be read for a damaged one: what the first check finds only counts if all pages can be
// read, and if the check finds it again.
func (x *index) integrity(ctx context.Context, quick bool, visit func(string)) error {
	found, err := x.damage(ctx, quick)
	if err == nil && len(found) > 0 {
		if err = x.readAll(); err == nil {
			found, err = x.damage(ctx, quick)
		}
	}
	if err != nil && !errors.Is(err, ErrCorruptIndex) {
		return err
	}
	for _, text := range found {
		visit(text)
	}
	return err
}

// damage returns what SQLite's own checks find.
func (x *index) damage(ctx context.Context, quick bool) (found []string, err error) {
	check := "PRAGMA integrity_check(100)"
	if quick {
		check = "PRAGMA quick_check(100)"
	}
	_, err = scanAll(ctx, x, check, 1, nil, func(rows *sql.Rows) (struct{}, error) {
		var text string
		if err := rows.Scan(&text); err != nil {
			return struct{}{}, err
		}
		if text != "ok" {
			found = append(found, text)
		}
		return struct{}{}, nil
	})
	if err != nil {
		return found, err
	}
	_, err = scanAll(ctx, x, "PRAGMA foreign_key_check", 1, nil, func(rows *sql.Rows) (struct{}, error) {
		var table, row, parent, key any
		if err := rows.Scan(&table, &row, &parent, &key); err != nil {
			return struct{}{}, err
		}
		found = append(found, fmt.Sprintf("row %v of %v points at nothing in %v", row, table, parent))
		return struct{}{}, nil
	})
	return found, err
}

const (
	sqlHasBlob    = `SELECT 1 FROM blobs WHERE digest = ?`
	sqlHasAnyBlob = `SELECT 1 FROM blobs LIMIT 1`
)

// hasAnyBlob reports whether the index has a row for any blob.
func hasAnyBlob(q rowReader) (bool, error) {
	var one int
	return q.row(sqlHasAnyBlob, nil, &one)
}

// hasBlob reports whether the index has a row for a blob.
func hasBlob(q rowReader, d digest.Digest) (bool, error) {
	var one int
	return q.row(sqlHasBlob, []any{string(d)}, &one)
}
