package ocilocal

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// In a damaged index, whose rows are out of order, SQLite finds other rows than it is asked
	// for. So the keys are read back and compared.
	sqlGetRef    = `SELECT name, reference, manifest FROM refs WHERE name = ? AND reference = ?`
	sqlPutRef    = `INSERT OR REPLACE INTO refs (name, reference, manifest, media_type, artifact_type, size, updated) VALUES (?, ?, ?, ?, ?, ?, ?)`
	sqlDeleteRef = `DELETE FROM refs WHERE name = ? AND reference = ?`

	// A ref's row repeats the descriptor of its manifest, which cannot change. So a listing of
	// 100,000 refs is one scan, and not 100,000 look-ups by random digests.
	sqlResolve = `SELECT name, reference, media_type, manifest, size, artifact_type, updated FROM refs WHERE name = ? AND reference = ?`
	// A page starts after (?1, ?2) and stays below the upper bound ?3 of the names.
	sqlList = `SELECT name, reference, media_type, manifest, size, artifact_type, updated FROM refs
		WHERE (name, reference) > (?1, ?2) AND name < ?3 ORDER BY name, reference LIMIT ?4`
	sqlNames = `SELECT DISTINCT name FROM refs WHERE name >= ?1 AND name > ?2 AND name < ?3 ORDER BY name LIMIT ?4`

	// At most 1,000 manifests are looked at, since every manifest may need the same blob.
	sqlOtherName = `SELECT r.name FROM (SELECT manifest FROM members WHERE digest = ?1 LIMIT 1000) m JOIN refs r ON r.manifest = m.manifest
		WHERE r.name >= ?2 AND r.name < ?3 AND r.name <> ?4 LIMIT 1`
)

// ref returns the digest that a ref points at, "" if there is no such ref.
func (t *indexTx) ref(name, reference string) (d digest.Digest, err error) {
	var key refKey
	if _, err = t.row(sqlGetRef, []any{name, reference}, &key.name, &key.reference, &d); err == nil && d != "" {
		err = key.check(name, reference)
	}
	return d, err
}

// refKey is the key of a row of refs, as it was read.
type refKey struct{ name, reference string }

// check returns an [ErrCorruptIndex] unless the row has the key that was asked for.
func (k refKey) check(name, reference string) error {
	if k.name == name && k.reference == reference {
		return nil
	}
	return fmt.Errorf("%w: looking for ref %s finds %s", ErrCorruptIndex, printable(name+":"+reference), printable(k.name+":"+k.reference))
}

// putRef points a ref at a manifest, whose rows must exist.
func (t *indexTx) putRef(name, reference string, d ocispec.Descriptor, now time.Time) error {
	_, err := t.exec(sqlPutRef, name, reference, string(d.Digest), d.MediaType, d.ArtifactType, d.Size, now.UnixMicro())
	return err
}

// deleteRef removes a ref, if there is one.
func (t *indexTx) deleteRef(name, reference string) error {
	_, err := t.exec(sqlDeleteRef, name, reference)
	return err
}

// resolved returns the descriptor that a ref points at, and when the ref was last moved.
func (t *indexTx) resolved(name, reference string) (desc ocispec.Descriptor, updated time.Time, ok bool, err error) {
	return refRow(t, name, reference)
}

// resolve returns the descriptor that a ref points at.
func (x *index) resolve(name, reference string) (desc ocispec.Descriptor, ok bool, err error) {
	desc, _, ok, err = refRow(x, name, reference)
	return desc, ok, err
}

// list returns one page of n refs: after (name, reference), and with names below the last argument.
func (x *index) list(name, reference, below string, n int) ([]Ref, error) {
	var row descriptorRow
	var refName, refReference string
	dest := append([]any{&refName, &refReference}, row.dest()...)
	return readRows(context.Background(), x, sqlList, n, []any{name, reference, below, n}, func(rows *sql.Rows) (r Ref, err error) {
		if err := rows.Scan(dest...); err != nil {
			return r, err
		}
		if r.Reference, err = referenceFromKey(refName, refReference); err == nil {
			r.Descriptor, r.Updated, err = row.value()
		}
		if err == nil && cmp.Or(strings.Compare(refName, name), strings.Compare(refReference, reference)) <= 0 {
			err = errOutOfOrder
		}
		name, reference = refName, refReference
		if err != nil {
			err = fmt.Errorf("%w: row of ref %s: %w", ErrCorruptIndex, printable(refName+":"+refReference), err)
		}
		return r, err
	})
}

// refRow returns a ref's descriptor and when it was last changed.
func refRow(q queryer, name, reference string) (desc ocispec.Descriptor, updated time.Time, ok bool, err error) {
	var key refKey
	var row descriptorRow
	if ok, err = q.row(sqlResolve, []any{name, reference}, append([]any{&key.name, &key.reference}, row.dest()...)...); ok && err == nil {
		if err = key.check(name, reference); err == nil {
			desc, updated, err = row.value()
		}
	}
	return desc, updated, ok && err == nil, err
}

// names returns one page of n names that have refs: from the first argument on, after the second,
// below the third.
func (x *index) names(from, after, below string, n int) ([]string, error) {
	return readRows(context.Background(), x, sqlNames, n, []any{from, after, below, n}, func(rows *sql.Rows) (name string, err error) {
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

// otherName returns the name of a ref whose manifest needs d, "" if it finds none. The name begins
// with prefix, which ends with a '/', and is not the one in not.
func (x *index) otherName(d digest.Digest, prefix, not string) (name string, err error) {
	above := prefix[:len(prefix)-1] + "0" // the character after '/'
	_, err = x.row(sqlOtherName, []any{string(d), prefix, above, not}, &name)
	return name, err
}
