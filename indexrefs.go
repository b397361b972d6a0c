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
	// If the rows of a damaged index are out of order, SQLite may find another row than the one
	// that it is asked for. So the keys are read back and compared.
	sqlGetRef = `SELECT name, reference, digest FROM refs WHERE name = ? AND reference = ?`
	sqlPutRef = `INSERT INTO refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved, entry)
		VALUES (?1, ?2, (SELECT id FROM content WHERE digest = ?3), ?3, ?4, ?5, ?6, ?7, ?7, ?8)
		ON CONFLICT (name, reference) DO UPDATE SET manifest = excluded.manifest, digest = excluded.digest, size = excluded.size,
		media_type = excluded.media_type, artifact_type = excluded.artifact_type, moved = excluded.moved, entry = excluded.entry`
	sqlDeleteRef = `DELETE FROM refs WHERE name = ? AND reference = ?`

	// A ref's row repeats the descriptor of its manifest, which cannot change. So a listing of
	// 100,000 refs is one scan, and not 100,000 look-ups. The types are few: see [index.typeText].
	sqlResolve = `SELECT name, reference, (SELECT text FROM types WHERE id = media_type), digest, size, (SELECT text FROM types WHERE id = artifact_type), moved
		FROM refs WHERE name = ? AND reference = ?`
	sqlGetDescriptor = `SELECT name, reference, media_type, digest, size, artifact_type FROM refs WHERE name = ? AND reference = ?`
	// A page starts after (?1, ?2) and stays below the upper bound ?3 of the names.
	sqlList = `SELECT name, reference, media_type, digest, size, artifact_type, moved FROM refs
		WHERE (name, reference) > (?1, ?2) AND name < ?3 ORDER BY name, reference LIMIT ?4`
	// Each name is found from the one before, so the refs that a name has are not read.
	sqlNames = `WITH RECURSIVE n (name) AS (SELECT * FROM (SELECT name FROM refs WHERE name >= ?1 AND name < ?2 ORDER BY name LIMIT 1)
		UNION ALL SELECT (SELECT name FROM refs WHERE name > n.name AND name < ?2 ORDER BY name LIMIT 1) FROM n WHERE n.name IS NOT NULL)
		SELECT name FROM n WHERE name IS NOT NULL LIMIT ?3`

	sqlRefDetail   = `SELECT name, reference, created, moved, used, entry, digest FROM refs WHERE name = ? AND reference = ?`
	sqlEntryOf     = `SELECT entry FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?) AND entry <> '' ORDER BY name, reference LIMIT 1`
	sqlSetRefEntry = `UPDATE refs SET entry = ?3 WHERE name = ?1 AND reference = ?2`

	sqlRefBetween = `SELECT 1 FROM refs WHERE manifest = (SELECT id FROM content WHERE digest = ?1) AND name >= ?2 AND name < ?3 LIMIT 1`

	// At most 1,000 manifests are read: very many may need the same blob. Very many refs of the name
	// ?4 may point at one of them, so the names before and after it are two ranges.
	sqlOtherName = `SELECT * FROM (SELECT coalesce((SELECT name FROM refs WHERE manifest = m.manifest AND name >= ?2 AND name < ?4 LIMIT 1),
			(SELECT name FROM refs WHERE manifest = m.manifest AND name > max(?2, ?4) AND name < ?3 LIMIT 1)) AS name
		FROM (SELECT manifest FROM members WHERE content = (SELECT id FROM content WHERE digest = ?1) LIMIT 1000) m) WHERE name IS NOT NULL LIMIT 1`
)

// ref returns the digest that a ref points at, and "" if the ref does not exist. A publish compares
// that digest with its own to decide whether to set the ref, so it reads inside the transaction.
func (t *indexTx) ref(name, reference string) (d digest.Digest, err error) {
	var key refKey
	var b []byte
	ok, err := t.row(sqlGetRef, []any{name, reference}, &key.name, &key.reference, &b)
	if !ok || err != nil {
		return "", err
	}
	if err := key.check(name, reference); err != nil {
		return "", err
	}
	return digestFromBytes(b)
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

// putRef points a ref at a manifest, whose rows must exist. entry is what else an index.json says
// of the ref, in canonical JSON, or "" for nothing. It describes the manifest under this ref, so
// moving the ref replaces it. now becomes the time of the move, and of a new ref's creation.
func (t *indexTx) putRef(name, reference string, d ocispec.Descriptor, entry string, now time.Time) error {
	mediaType, err := t.internType(d.MediaType)
	if err != nil {
		return err
	}
	artifactType, err := t.internType(d.ArtifactType)
	if err != nil {
		return err
	}
	_, err = t.exec(sqlPutRef, name, reference, digestBytes(d.Digest), d.Size, mediaType, artifactType, now.UnixMicro(), entry)
	return err
}

// setRefEntry replaces what else an index.json says of a ref.
func (t *indexTx) setRefEntry(name, reference, entry string) error {
	_, err := t.exec(sqlSetRefEntry, name, reference, entry)
	return err
}

// entryOf returns what an index.json said of the first ref that points at a manifest and of which one
// said anything, "" for nothing.
func entryOf(q queryer, d digest.Digest) (entry string, err error) {
	_, err = q.row(sqlEntryOf, []any{digestBytes(d)}, &entry)
	return entry, err
}

// A refDetail is the part of a ref's row that is not its descriptor.
type refDetail struct {
	created, moved time.Time
	used           time.Time // zero if not known
	entry          string
	digest         digest.Digest
}

// refDetails returns the refDetail of a ref, if there is such a ref.
func refDetails(q queryer, name, reference string) (detail refDetail, ok bool, err error) {
	var key refKey
	var created, moved, used int64
	var b []byte
	ok, err = q.row(sqlRefDetail, []any{name, reference}, &key.name, &key.reference, &created, &moved, &used, &detail.entry, &b)
	if !ok || err != nil {
		return refDetail{}, false, err
	}
	detail.created, detail.moved = time.UnixMicro(created), time.UnixMicro(moved)
	if used != 0 {
		detail.used = time.UnixMicro(used)
	}
	if err = key.check(name, reference); err == nil {
		detail.digest, err = digestFromBytes(b)
	}
	return detail, true, err
}

// deleteRef removes a ref, if there is one.
func (t *indexTx) deleteRef(name, reference string) error {
	_, err := t.exec(sqlDeleteRef, name, reference)
	return err
}

// resolved returns the descriptor that a ref points at, and when the ref was last moved.
func (t *indexTx) resolved(name, reference string) (desc ocispec.Descriptor, updated time.Time, ok bool, err error) {
	var key refKey
	var row descriptorRow
	if ok, err = t.row(sqlResolve, []any{name, reference}, append([]any{&key.name, &key.reference}, row.dest()...)...); ok && err == nil {
		if err = key.check(name, reference); err == nil {
			desc, updated, err = row.value()
		}
	}
	return desc, updated, ok && err == nil, err
}

// resolve returns the descriptor that a ref points at. Nothing is asked more often, so it reads only
// the columns that it needs, and the types as typeText remembers them.
func (x *index) resolve(name, reference string) (desc ocispec.Descriptor, ok bool, err error) {
	var key refKey
	var row descriptorRow
	ok, err = x.row(sqlGetDescriptor, []any{name, reference}, &key.name, &key.reference, &row.mediaType, &row.digest, &row.size, &row.artifactType)
	if !ok || err != nil {
		return desc, false, err
	}
	if err = key.check(name, reference); err == nil {
		desc, err = x.descriptor(&row)
	}
	return desc, err == nil, err
}

// list returns one page of at most n refs, in order: those after (name, reference) whose names are
// below an upper bound. Rows that are out of order are an error, or a damaged index could make a
// listing endless.
//
// typeText may query, and no query may run while rows are open. So the numbers of types are kept
// until the page is read, and replaced by their texts then.
func (x *index) list(name, reference, below string, n int) ([]Ref, error) {
	var row descriptorRow
	var refName, refReference string
	var b sql.RawBytes
	dest := append([]any{&refName, &refReference}, row.dest()...)
	dest[3] = &b
	type types struct{ media, artifact any }
	of := make([]types, 0, n) // their numbers, until the rows are closed
	failed := func(err error) error {
		return fmt.Errorf("%w: row of ref %s: %w", ErrCorruptIndex, printable(refName+":"+refReference), err)
	}
	page, err := readRows(context.Background(), x, sqlList, n, []any{name, reference, below, n}, func(rows *sql.Rows) (r Ref, err error) {
		if err := rows.Scan(dest...); err != nil {
			return r, err
		}
		of = append(of, types{row.mediaType, row.artifactType})
		row.digest, row.mediaType, row.artifactType = b, "", ""
		if r.Reference, err = referenceFromKey(refName, refReference); err == nil {
			r.Descriptor, r.Updated, err = row.value()
		}
		if err == nil && cmp.Or(strings.Compare(refName, name), strings.Compare(refReference, reference)) <= 0 {
			err = errOutOfOrder
		}
		name, reference = refName, refReference
		if err != nil {
			err = failed(err)
		}
		return r, err
	})
	for i := range page {
		d := &page[i].Descriptor
		if d.MediaType, err = x.typeText(of[i].media); err == nil {
			d.ArtifactType, err = x.typeText(of[i].artifact)
		}
		if err != nil {
			refName, refReference = page[i].Reference.key()
			return nil, failed(err)
		}
	}
	return page, err
}

// names returns one page of at most n names that have refs, in order. Each name is >= from, > after
// and < below.
func (x *index) names(from, after, below string, n int) ([]string, error) {
	if after >= from {
		from = after + "\x00" // the next possible name
	}
	return readRows(context.Background(), x, sqlNames, n, []any{from, below, n}, func(rows *sql.Rows) (name string, err error) {
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

// otherName returns the name of a ref whose manifest needs d, and "" if it finds none. The name
// begins with prefix, which ends with a '/'. It differs from not, which begins with prefix or is "".
// It looks at the first 1,000 manifests that need d. A push asks for it, to mount d from that
// repository: a wrong answer costs a request and nothing else.
func (x *index) otherName(d digest.Digest, prefix, not string) (name string, err error) {
	_, err = x.row(sqlOtherName, []any{digestBytes(d), prefix, prefixEnd(prefix), not}, &name)
	return name, err
}

// hasRefUnder reports whether a ref points at d whose name begins with prefix, which ends with a '/'.
func (x *index) hasRefUnder(d digest.Digest, prefix string) (bool, error) {
	return exists(x, sqlRefBetween, digestBytes(d), prefix, prefixEnd(prefix))
}

// prefixEnd returns the upper bound of the names that begin with a prefix that ends with a '/'.
func prefixEnd(prefix string) string { return prefix[:len(prefix)-1] + "0" } // the character after '/'
