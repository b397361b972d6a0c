package ocilocal

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// indexAppID is PRAGMA application_id of our index files: "ocil".
const indexAppID = 0x6f63696c

// migrations take the index from one schema version to the next: PRAGMA user_version
// is how many of them it has had. A list that was released never changes; a new version
// appends one. The statements stand here exactly as SQLite keeps them: checkSchema compares the text.
var migrations = [...][]string{{
	`CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE blobs (digest TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL, kind TEXT NOT NULL, created INTEGER NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE TABLE manifests (digest TEXT NOT NULL PRIMARY KEY REFERENCES blobs (digest), media_type TEXT NOT NULL, artifact_type TEXT NOT NULL, size INTEGER NOT NULL, config TEXT NOT NULL, subject TEXT NOT NULL, annotations TEXT NOT NULL, created INTEGER NOT NULL) STRICT, WITHOUT ROWID`,
	`CREATE INDEX manifests_by_subject ON manifests (subject) WHERE subject <> ''`,
	`CREATE TABLE members (manifest TEXT NOT NULL REFERENCES manifests (digest) ON DELETE CASCADE, position INTEGER NOT NULL, role TEXT NOT NULL, digest TEXT NOT NULL REFERENCES blobs (digest), media_type TEXT NOT NULL, size INTEGER NOT NULL, annotations TEXT NOT NULL, PRIMARY KEY (manifest, position)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX members_by_digest ON members (digest)`,
	`CREATE TABLE refs (name TEXT NOT NULL, reference TEXT NOT NULL, manifest TEXT NOT NULL REFERENCES manifests (digest), media_type TEXT NOT NULL, artifact_type TEXT NOT NULL, size INTEGER NOT NULL, updated INTEGER NOT NULL, PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`,
	`CREATE INDEX refs_by_manifest ON refs (manifest)`,
}}

// Keys of the table meta.
const (
	metaID = "id" // the id of the root that this index belongs to
	// metaUnreconciled is set while the index is not known to name all that
	// blobs/ holds: it was made new beside blobs. Nothing may be collected then.
	metaUnreconciled = "unreconciled"
	// metaCommits counts the transactions that changed the index, for [indexTx.stamp].
	metaCommits = "commits"
	// metaBackup is refsMark as the last backup to this root left it.
	metaBackup = "backup"
)
const (
	sqlGetMeta = `SELECT value FROM meta WHERE key = ?`
	sqlSetMeta = `INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`

	sqlPutBlob = `INSERT INTO blobs (digest, size, kind, created) VALUES (?, ?, ?, ?)
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size WHERE size <> excluded.size`
	sqlPutManifest = `INSERT INTO manifests (digest, media_type, artifact_type, size, config, subject, annotations, created)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING`
	sqlPutMember = `INSERT INTO members (manifest, position, role, digest, media_type, size, annotations) VALUES (?, ?, ?, ?, ?, ?, ?)`

	// In a damaged index, whose rows are out of order, SQLite finds other rows
	// than those that were asked for: so the keys are read back and compared.
	sqlGetRef    = `SELECT name, reference, manifest FROM refs WHERE name = ? AND reference = ?`
	sqlPutRef    = `INSERT OR REPLACE INTO refs (name, reference, manifest, media_type, artifact_type, size, updated) VALUES (?, ?, ?, ?, ?, ?, ?)`
	sqlDeleteRef = `DELETE FROM refs WHERE name = ? AND reference = ?`

	// A ref's row repeats its manifest's descriptor, which can't change: a
	// listing of 100,000 is then one scan, not as many look-ups by random digests.
	sqlResolve       = `SELECT name, reference, media_type, manifest, size, artifact_type, updated FROM refs WHERE name = ? AND reference = ?`
	sqlResolveDigest = `SELECT media_type, digest, size, artifact_type, created FROM manifests WHERE digest = ?`
	sqlMembers       = `SELECT role, digest, media_type, size FROM members WHERE manifest = ? AND position >= ? ORDER BY position LIMIT ?`
	// A page starts after (?1, ?2) and stays below the upper bound ?3 of the names.
	sqlList = `SELECT name, reference, media_type, manifest, size, artifact_type, updated FROM refs
		WHERE (name, reference) > (?1, ?2) AND name < ?3 ORDER BY name, reference LIMIT ?4`
)

// meta returns a value of the table meta, "" when there is none.
func meta(q rowReader, key string) (value string, err error) {
	_, err = q.row(sqlGetMeta, []any{key}, &value)
	return value, err
}

// ref returns what a ref points at, "" when there is none.
func (t *indexTx) ref(name, reference string) (d digest.Digest, err error) {
	var key refKey
	if _, err = t.row(sqlGetRef, []any{name, reference}, &key.name, &key.reference, &d); err == nil && d != "" {
		err = key.check(name, reference)
	}
	return d, err
}

// refKey is the key of a row of refs, as it was read.
type refKey struct{ name, reference string }

// check is an [ErrCorruptIndex] unless the row has the key that was asked for.
func (k refKey) check(name, reference string) error {
	if k.name == name && k.reference == reference {
		return nil
	}
	return fmt.Errorf("%w: looking for ref %q finds %q", ErrCorruptIndex, clip(name+":"+reference), clip(k.name+":"+k.reference))
}

// checkFound is an [ErrCorruptIndex] unless a manifest's row is that of the digest that was asked for.
func checkFound(asked, found digest.Digest) error {
	if asked == found {
		return nil
	}
	return fmt.Errorf("%w: looking for manifest %s finds %q", ErrCorruptIndex, asked, clip(string(found)))
}

func (t *indexTx) putRef(name, reference string, d ocispec.Descriptor, now time.Time) error {
	_, err := t.exec(sqlPutRef, name, reference, string(d.Digest), d.MediaType, d.ArtifactType, d.Size, now.UnixMicro())
	return err
}

func (t *indexTx) deleteRef(name, reference string) error {
	_, err := t.exec(sqlDeleteRef, name, reference)
	return err
}

// manifest returns the descriptor of a manifest row.
func (t *indexTx) manifest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	desc, ok, err = manifestRow(t, d)
	return desc, ok, err
}

// resolved returns a ref's row with its manifest's.
func (t *indexTx) resolved(name, reference string) (desc ocispec.Descriptor, updated time.Time, ok bool, err error) {
	return refRow(t, name, reference)
}

// putBlob records a blob. kind is the role it was first seen in.
func (t *indexTx) putBlob(d digest.Digest, size int64, kind string, now time.Time) error {
	_, err := t.exec(sqlPutBlob, string(d), size, kind, now.UnixMicro())
	return err
}

// putManifest records a manifest and its members, unless it is there, and returns its
// recorded descriptor. Blobs must be recorded before.
func (t *indexTx) putManifest(m *Manifest, now time.Time) (desc ocispec.Descriptor, err error) {
	row, err := manifestColumns(m)
	if err != nil {
		return desc, err
	}
	n, err := t.exec(sqlPutManifest, append(row, now.UnixMicro())...)
	if err != nil {
		return desc, err
	}
	if n == 0 {
		desc, _, err = manifestRow(t, m.Digest())
		return desc, err
	}
	return m.Descriptor(), t.putMembers(m)
}

func (t *indexTx) putMembers(m *Manifest) error {
	for i := range m.children() {
		row, err := memberColumns(m, i)
		if err != nil {
			return err
		}
		if _, err := t.exec(sqlPutMember, row...); err != nil {
			return err
		}
	}
	return nil
}

// manifestColumns are the columns of a manifest's row but for its time.
func manifestColumns(m *Manifest) ([]any, error) {
	annotations, err := canonicalAnnotations(m.doc.Annotations)
	config, _ := m.Config()
	subject, _ := m.Subject()
	return []any{string(m.Digest()), m.MediaType(), m.ArtifactType(), m.Size(), string(config.Digest), string(subject.Digest), annotations}, err
}

// memberColumns are the columns of the row for a manifest's i-th child.
func memberColumns(m *Manifest, i int) ([]any, error) {
	c := m.children()[i]
	annotations, err := canonicalAnnotations(c.Annotations)
	return []any{string(m.Digest()), i, string(m.childRole(i)), string(c.Digest), c.MediaType, c.Size, annotations}, err
}

// A member is one row of what a manifest needs.
type member struct {
	role string
	desc ocispec.Descriptor
}

// members calls visit with what a manifest directly needs.
func members(q queryer, d digest.Digest, visit func(member) error) error {
	const page = 100
	for from := 0; ; from += page {
		batch, err := scanAll(context.Background(), q, sqlMembers, page, []any{string(d), from, page}, func(rows *sql.Rows) (m member, err error) {
			err = rows.Scan(&m.role, &m.desc.Digest, &m.desc.MediaType, &m.desc.Size)
			return m, err
		})
		if err != nil {
			return err
		}
		for _, m := range batch {
			if err := visit(m); err != nil {
				return err
			}
		}
		if len(batch) < page {
			return nil
		}
	}
}

// resolve returns a ref's manifest descriptor.
func (x *index) resolve(name, reference string) (desc ocispec.Descriptor, ok bool, err error) {
	desc, _, ok, err = refRow(x, name, reference)
	return desc, ok, err
}

// resolveDigest returns a manifest's descriptor.
func (x *index) resolveDigest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	desc, ok, err = manifestRow(x, d)
	return desc, ok, err
}

// list returns one page of refs: after (name, reference), names below limit.
func (x *index) list(name, reference, below string, n int) ([]Ref, error) {
	var row descriptorRow
	var refName, refReference string
	dest := append([]any{&refName, &refReference}, row.dest()...)
	return scanAll(context.Background(), x, sqlList, n, []any{name, reference, below, n}, func(rows *sql.Rows) (r Ref, err error) {
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
			err = fmt.Errorf("%w: row of ref %s: %w", ErrCorruptIndex, strconv.Quote(clip(refName+":"+refReference)), err)
		}
		return r, err
	})
}

// A descriptorRow takes the five columns that make a manifest's descriptor, the
// last a time. Its fields are what database/sql fills without reflection.
type descriptorRow struct {
	mediaType, digest, artifactType string
	size, micro                     any
}

func (d *descriptorRow) dest() []any {
	return []any{&d.mediaType, &d.digest, &d.size, &d.artifactType, &d.micro}
}

func (d *descriptorRow) value() (desc ocispec.Descriptor, at time.Time, err error) {
	size, ok := d.size.(int64)
	micro, ok2 := d.micro.(int64)
	if !ok || !ok2 || size < 0 {
		return desc, at, fmt.Errorf("%w: size %v or time %v is no number that fits", ErrCorruptIndex, d.size, d.micro)
	}
	if err := checkDigest(digest.Digest(d.digest)); err != nil {
		return desc, at, fmt.Errorf("%w: %w", ErrCorruptIndex, err)
	}
	desc = ocispec.Descriptor{MediaType: d.mediaType, Digest: digest.Digest(d.digest), Size: size, ArtifactType: d.artifactType}
	return desc, time.UnixMicro(micro), nil
}

// rowReader is index and indexTx: one row, without or within a transaction.
type rowReader interface {
	row(text string, args []any, dest ...any) (bool, error)
}

// refRow returns a ref's descriptor and when it was last changed.
func refRow(from rowReader, name, reference string) (desc ocispec.Descriptor, updated time.Time, ok bool, err error) {
	var key refKey
	var row descriptorRow
	if ok, err = from.row(sqlResolve, []any{name, reference}, append([]any{&key.name, &key.reference}, row.dest()...)...); ok && err == nil {
		if err = key.check(name, reference); err == nil {
			desc, updated, err = row.value()
		}
	}
	return desc, updated, ok && err == nil, err
}

// manifestRow returns a manifest's descriptor.
func manifestRow(from rowReader, d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	var row descriptorRow
	if ok, err = from.row(sqlResolveDigest, []any{string(d)}, row.dest()...); ok && err == nil {
		if desc, _, err = row.value(); err == nil {
			err = checkFound(d, desc.Digest)
		}
	}
	return desc, ok && err == nil, err
}

// A queryer is index and indexTx: queries without or within a transaction.
type queryer interface {
	rowReader
	query(ctx context.Context, text string, args []any) (*sql.Rows, error)
	explain(err error) error
}

// pages runs a query whose last argument is a limit until it has no more rows.
// visit returns the arguments, but for the limit, of the page after its row.
func pages(ctx context.Context, q queryer, text string, args []any, visit func(*sql.Rows) (next []any, err error)) error {
	const page = 1000
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		from := args
		got, err := scanAll(ctx, q, text, page, append(slices.Clone(args), page), func(rows *sql.Rows) (struct{}, error) {
			var err error
			args, err = visit(rows)
			return struct{}{}, err
		})
		if err != nil || len(got) < page {
			return err
		}
		if !ascends(from, args) {
			return errOutOfOrder
		}
	}
}

// errOutOfOrder ends a listing of a damaged index, which could go on for ever.
var errOutOfOrder = fmt.Errorf("%w: its rows are out of order", ErrCorruptIndex)

// ascends reports whether a page's arguments are above those of the page before.
func ascends(before, after []any) bool {
	for i := range before {
		c := 0
		switch b := before[i].(type) {
		case string:
			c = strings.Compare(after[i].(string), b)
		case int:
			c = cmp.Compare(after[i].(int), b)
		}
		if c != 0 {
			return c > 0
		}
	}
	return false
}

// rowDigest checks a digest that a row holds, before anything relies on it.
func rowDigest(s string) (digest.Digest, error) {
	if err := checkDigest(digest.Digest(s)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrCorruptIndex, err)
	}
	return digest.Digest(s), nil
}

// replaceManifest makes the rows of a manifest that is recorded what they should be,
// and those of the refs that point at it. Blobs must be recorded before.
func (t *indexTx) replaceManifest(m *Manifest) error {
	row, err := manifestColumns(m)
	if err != nil {
		return err
	}
	if _, err := t.exec(sqlUpdateManifest, row...); err != nil {
		return err
	}
	if err := t.deleteMembers(m.Digest()); err != nil {
		return err
	}
	if err := t.putMembers(m); err != nil {
		return err
	}
	_, err = t.exec(sqlUpdateRefs, string(m.Digest()))
	return err
}

func (t *indexTx) deleteMembers(d digest.Digest) error {
	_, err := t.exec(sqlDeleteMembers, string(d))
	return err
}
