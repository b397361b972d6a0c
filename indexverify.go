package ocilocal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Statements of verification.
const (
	sqlManifestColumns = `SELECT digest, media_type, artifact_type, size, config, subject, annotations FROM manifests WHERE digest = ?`
	sqlMemberColumns   = `SELECT manifest, position, role, digest, media_type, size, annotations FROM members
		WHERE manifest = ? AND position >= ? ORDER BY position LIMIT ?`
	sqlBlobsAfter = `SELECT digest, size, kind = ?1 OR EXISTS (SELECT 1 FROM manifests m WHERE m.digest = b.digest)
		FROM blobs b WHERE digest > ?2 ORDER BY digest LIMIT ?3`
	sqlCheckRefs = `SELECT r.name, r.reference, r.manifest, m.digest IS NULL OR r.media_type <> m.media_type OR r.artifact_type <> m.artifact_type OR r.size <> m.size
		FROM refs r LEFT JOIN manifests m ON m.digest = r.manifest WHERE (r.name, r.reference) > (?, ?) ORDER BY r.name, r.reference LIMIT ?`
)

// A checkedBlob is the row of a blob as verification takes it.
type checkedBlob struct {
	digest   digest.Digest // not checked
	recorded bool          // it has a row
	size     int64         // by its row, and so any number
	manifest bool          // by its own row, or by that among the manifests
}

// blobsAfter visits the blobs in the order of their digests, after one of them.
func (x *index) blobsAfter(ctx context.Context, after digest.Digest, visit func(checkedBlob) error) error {
	last := after
	kind := string(roleManifest)
	p := paging[checkedBlob]{text: sqlBlobsAfter, size: 1000, scan: func(rows *sql.Rows) (b checkedBlob, err error) {
		if err = rows.Scan(&b.digest, &b.size, &b.manifest); err == nil && b.digest <= last {
			err = errOutOfOrder
		}
		last, b.recorded = b.digest, true
		return b, err
	}, after: func(b checkedBlob) []any { return []any{kind, string(b.digest)} }}
	return p.each(ctx, x, []any{kind, string(after)}, visit)
}

// rowsDiffer describes the first difference between a manifest and its rows, "" if there is none. A
// manifest without rows does not differ.
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
				return fmt.Sprintf("%s is %s, should be %s", names[i], printable(fmt.Sprint(got[i])), printable(fmt.Sprint(want[i]))), nil
			}
		}
		return "", nil
	}
	want, err := manifestColumns(m)
	if err != nil {
		return "", err
	}
	found, err := readRows(ctx, q, sqlManifestColumns, 1, []any{string(m.Digest())}, func(rows *sql.Rows) (string, error) {
		return compare(rows, want, "digest", "media type", "artifact type", "size", "config", "subject", "annotations")
	})
	if err != nil || len(found) == 0 || found[0] != "" {
		return strings.Join(found, ""), err
	}
	differ := ""
	n := 0
	// The rows are counted as they are read, since a position may be anything.
	p := paging[string]{text: sqlMemberColumns, size: 1000, scan: func(rows *sql.Rows) (string, error) {
		if n++; n > len(m.children()) {
			return fmt.Sprintf("more than %d members", len(m.children())), nil
		}
		want, err := memberColumns(m, n-1)
		if err != nil {
			return "", err
		}
		differ, err := compare(rows, want, "manifest", "position", "role", "digest", "media type", "size", "annotations")
		if differ != "" {
			differ = fmt.Sprintf("member %d: %s", n-1, differ)
		}
		return differ, err
	}, after: func(string) []any { return []any{string(m.Digest()), n} }}
	err = p.each(ctx, q, []any{string(m.Digest()), 0}, func(text string) error {
		if differ = text; differ != "" {
			return errStop
		}
		return nil
	})
	if err != nil {
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
// whose columns differ from those of the manifest that they repeat.
func (x *index) badRefs(ctx context.Context, visit func(Reference, digest.Digest, error) error) error {
	type row struct {
		name, reference, manifest string
		bad                       bool
	}
	p := paging[row]{text: sqlCheckRefs, size: 1000, scan: func(rows *sql.Rows) (r row, err error) {
		err = rows.Scan(&r.name, &r.reference, &r.manifest, &r.bad)
		return r, err
	}, after: func(r row) []any { return []any{r.name, r.reference} }}
	return p.each(ctx, x, []any{"", ""}, func(r row) error {
		ref, bad := referenceFromKey(r.name, r.reference)
		switch {
		case bad != nil:
			bad = fmt.Errorf("%w: row of ref %s: %w", ErrCorruptIndex, printable(r.name+":"+r.reference), bad)
		case r.bad:
			bad = fmt.Errorf("%w: the index has no manifest %s, or has it with other columns", ErrCorruptIndex, printable(r.manifest))
		default:
			return nil
		}
		return visit(ref, digest.Digest(r.manifest), bad)
	})
}

// integrity visits the damage that SQLite finds in the index. Like [index.explain], it does not
// take a page that cannot be read for a damaged one: what the first check finds only counts if all
// pages can be read, and if the check finds the very same again. Two reads that fail for a moment,
// one in each check, leave different findings, and are [ErrIndexIO].
func (x *index) integrity(ctx context.Context, quick bool, visit func(string)) error {
	found, err := x.damage(ctx, quick)
	if err == nil && len(found) > 0 {
		var again []string
		if err = x.readAll(); err == nil {
			again, err = x.damage(ctx, quick)
		}
		once := found
		found = slices.DeleteFunc(slices.Clone(again), func(text string) bool { return !slices.Contains(once, text) })
		if err == nil && len(again) > 0 && len(found) == 0 {
			err = fmt.Errorf("%w: two checks of the index find different damage, so reads of it fail now and then", ErrIndexIO)
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
	err = eachRow(ctx, x, check, nil, func(rows *sql.Rows) error {
		var text string
		err := rows.Scan(&text)
		if err == nil && text != "ok" {
			found = append(found, text)
		}
		return err
	})
	if err != nil {
		return found, err
	}
	err = eachRow(ctx, x, "PRAGMA foreign_key_check", nil, func(rows *sql.Rows) error {
		var table, row, parent, key any
		if err := rows.Scan(&table, &row, &parent, &key); err != nil {
			return err
		}
		found = append(found, fmt.Sprintf("row %v of %v points at nothing in %v", row, table, parent))
		return nil
	})
	return found, err
}
