package ocilocal

import (
	"bytes"
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
	sqlManifestColumns = `SELECT m.digest, (SELECT text FROM types WHERE id = m.media_type), (SELECT text FROM types WHERE id = m.artifact_type),
		c.size, s.digest, m.annotations FROM content c JOIN manifests m ON m.id = c.id LEFT JOIN content s ON s.id = m.subject WHERE c.digest = ?`
	sqlMemberColumns = `SELECT m.position, m.role, c.digest, (SELECT text FROM types WHERE id = m.media_type), m.size, m.annotations
		FROM members m LEFT JOIN content c ON c.id = m.content
		WHERE m.manifest = (SELECT id FROM content WHERE digest = ?) AND m.position >= ? ORDER BY m.position LIMIT ?`
	sqlBlobsAfter = `SELECT c.digest, c.size, c.kind = ?1 OR m.id IS NOT NULL, coalesce(m.digest <> c.digest, 0)
		FROM content c LEFT JOIN manifests m ON m.id = c.id WHERE c.digest > ?2 AND c.present ORDER BY c.digest LIMIT ?3`
	sqlCheckRefs = `SELECT r.name, r.reference, r.digest, m.id IS NULL OR c.id IS NULL OR r.media_type <> m.media_type OR r.artifact_type <> m.artifact_type
		OR r.size <> c.size, coalesce(r.digest <> m.digest, 0)
		FROM refs r LEFT JOIN manifests m ON m.id = r.manifest LEFT JOIN content c ON c.id = r.manifest
		WHERE (r.name, r.reference) > (?, ?) ORDER BY r.name, r.reference LIMIT ?`
)

// Verify compares the rows of the index with the blobs: blobsAfter says which blobs there should
// be, rowsDiffer compares a manifest's rows with its document, badRefs checks the refs, and
// integrity lets SQLite check its own file. A value in a damaged row may be anything, so it is
// compared and reported, but never used as a size, a path or a key.

// A checkedBlob is the row of a blob as verification takes it.
type checkedBlob struct {
	digest   digest.Digest // not checked
	recorded bool          // its row says that it is here
	size     int64         // by its row, and so any number
	manifest bool          // its own row, or a row of manifests, says that it is one
	torn     bool          // its row among the manifests has another digest
}

// blobsAfter visits the blobs that are here in the order of their digests, after one of them. By
// that order a verification can go on where an earlier one was stopped. Rows that are out of order
// are an error, since a damaged index could otherwise repeat rows for ever.
func (x *index) blobsAfter(ctx context.Context, after digest.Digest, visit func(checkedBlob) error) error {
	last := digestBytes(after)
	kind := roleNumber(roleManifest)
	p := paging[checkedBlob]{text: sqlBlobsAfter, size: 1000, scan: func(rows *sql.Rows) (b checkedBlob, err error) {
		var id []byte
		if err = rows.Scan(&id, &b.size, &b.manifest, &b.torn); err == nil && bytes.Compare(id, last) <= 0 {
			err = errOutOfOrder
		}
		last, b.recorded, b.digest = id, true, digest.Digest(columnText(id))
		return b, err
	}, after: func(checkedBlob) []any { return []any{kind, last} }}
	return p.each(ctx, x, []any{kind, last}, visit)
}

// rowsDiffer describes the first difference between a manifest and its rows, and returns "" if
// there is none. A manifest without rows does not differ. The caller has verified the bytes of m,
// so in a difference the row is wrong. It compares the manifest's columns, then each member in
// order, then their number. At last it looks at members that are manifests: one of them may have
// lost its row, and then nothing says what it needs.
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
			found := columnText(got[i])
			if want := fmt.Sprint(want[i]); found != want {
				return fmt.Sprintf("%s is %s, should be %s", names[i], printable(found), printable(want)), nil
			}
		}
		return "", nil
	}
	annotations, err := canonicalAnnotations(m.doc.Annotations)
	if err != nil {
		return "", err
	}
	subject, _ := m.Subject()
	want := []any{m.Digest(), m.MediaType(), m.ArtifactType(), m.Size(), subject.Digest, annotations}
	id := digestBytes(m.Digest())
	found, err := readRows(ctx, q, sqlManifestColumns, 1, []any{id}, func(rows *sql.Rows) (string, error) {
		return compare(rows, want, "digest", "media type", "artifact type", "size", "subject", "annotations")
	})
	if err != nil || len(found) == 0 || found[0] != "" {
		return strings.Join(found, ""), err
	}
	differ := ""
	n := 0
	// The rows are counted as they are read, since a position in a damaged row may be any number.
	p := paging[string]{text: sqlMemberColumns, size: 1000, scan: func(rows *sql.Rows) (string, error) {
		if n++; n > len(m.children()) {
			return fmt.Sprintf("more than %d members", len(m.children())), nil
		}
		c := m.children()[n-1]
		annotations, err := canonicalAnnotations(c.Annotations)
		if err != nil {
			return "", err
		}
		want := []any{n - 1, roleNumber(m.childRole(n - 1)), c.Digest, c.MediaType, c.Size, annotations}
		differ, err := compare(rows, want, "position", "number of its role", "digest", "media type", "size", "annotations")
		if differ != "" {
			differ = fmt.Sprintf("member %d: %s", n-1, differ)
		}
		return differ, err
	}, after: func(string) []any { return []any{id, n} }}
	err = p.each(ctx, q, []any{id, 0}, func(text string) error {
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

// columnText returns a column's value as text, for a comparison and for messages. A BLOB is a
// digest, or its hexadecimal digits if it is not one. NULL is "".
func columnText(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case []byte:
		if d, err := digestFromBytes(v); err == nil {
			return string(d)
		}
		return fmt.Sprintf("%x", v)
	}
	return fmt.Sprint(v)
}

// badRefs visits the refs whose rows are wrong: with a name or digest that is not one, without a
// row of their manifest, or with other columns than that row. visit gets the zero Reference where
// the row does not say for certain which ref and digest belong together.
func (x *index) badRefs(ctx context.Context, visit func(Reference, digest.Digest, error) error) error {
	type row struct {
		name, reference string
		digest          []byte
		bad, torn       bool
	}
	p := paging[row]{text: sqlCheckRefs, size: 1000, scan: func(rows *sql.Rows) (r row, err error) {
		err = rows.Scan(&r.name, &r.reference, &r.digest, &r.bad, &r.torn)
		return r, err
	}, after: func(r row) []any { return []any{r.name, r.reference} }}
	return p.each(ctx, x, []any{"", ""}, func(r row) error {
		ref, bad := referenceFromKey(r.name, r.reference)
		d, invalid := digestFromBytes(r.digest)
		switch {
		case bad == nil && invalid != nil:
			ref, bad = Reference{}, fmt.Errorf("row of ref %s: %w", printable(r.name+":"+r.reference), invalid)
		case bad != nil:
			bad = fmt.Errorf("%w: row of ref %s: %w", ErrCorruptIndex, printable(r.name+":"+r.reference), bad)
		case r.torn:
			ref, bad = Reference{}, fmt.Errorf("%w: row of ref %s: it points at one manifest, and has the digest of another", ErrCorruptIndex, printable(r.name+":"+r.reference))
		case r.bad:
			bad = fmt.Errorf("%w: the index has no manifest %s, or has it with other columns", ErrCorruptIndex, d)
		default:
			return nil
		}
		return visit(ref, d, bad)
	})
}

// integrity visits the damage that SQLite finds in the index. Like [index.explain], it tells a page
// that can't be read from a damaged one. A finding of the first check counts only if all pages can
// be read, and if a second check has the same finding. If the two checks find different things,
// reads fail now and then, which is an [ErrIndexIO].
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

// damage returns the findings of SQLite's own checks: of its pages and indexes, and of rows that
// point at nothing. With quick it does not compare indexes with their tables.
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
