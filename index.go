package ocilocal

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
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
	s, err := q.stmt(sqlMembers)
	if err != nil {
		return err
	}
	for from := 0; ; from += page {
		batch, err := scanAll(s, page, []any{string(d), from, page}, func(rows *sql.Rows) (m member, err error) {
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
	s, err := x.stmt(sqlList)
	if err != nil {
		return nil, err
	}
	var row descriptorRow
	var refName, refReference string
	dest := append([]any{&refName, &refReference}, row.dest()...)
	return scanAll(s, n, []any{name, reference, below, n}, func(rows *sql.Rows) (r Ref, err error) {
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

// What garbage collection reads and deletes.
const (
	// The table itself is read, not its index: what only that says otherwise is still a root.
	sqlRefTargets   = `SELECT name, reference, manifest FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`
	sqlManifestRows = `SELECT digest, subject FROM manifests WHERE digest > ? ORDER BY digest LIMIT ?`
	sqlMemberRows   = `SELECT manifest, position, role, digest FROM members WHERE (manifest, position) > (?, ?) ORDER BY manifest, position LIMIT ?`
	sqlBlobRows     = `SELECT digest, size, kind, created FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?`

	sqlHasRef  = `SELECT 1 FROM refs WHERE manifest = ? LIMIT 1`
	sqlSubject = `SELECT subject FROM manifests WHERE digest = ?`

	// Both look in one statement, so that no commit comes in between.
	sqlDangling     = `SELECT manifest FROM refs r NOT INDEXED WHERE NOT EXISTS (SELECT 1 FROM manifests m WHERE m.digest = r.manifest)`
	sqlLostManifest = `SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM manifests WHERE digest = ?1)
		AND (EXISTS (SELECT 1 FROM blobs WHERE digest = ?1 AND kind = ?2) OR EXISTS (SELECT 1 FROM members WHERE digest = ?1 AND role = ?2))`
	// All that leads to ?1, itself included: what needs it, what has it as its
	// subject, and with ?2 also the subjects of these.
	sqlLeading = `WITH RECURSIVE up (d) AS (SELECT ?1
		UNION SELECT m.manifest FROM up JOIN members m ON m.digest = up.d
		UNION SELECT m.digest FROM up JOIN manifests m ON m.subject = up.d AND m.subject <> ''
		UNION SELECT m.subject FROM up JOIN manifests m ON m.digest = up.d WHERE ?2 AND m.subject <> '')
		SELECT d, EXISTS (SELECT 1 FROM refs WHERE manifest = d) FROM up`

	sqlPointers = `SELECT manifest FROM members WHERE digest = ?1 AND manifest > ?2
		UNION SELECT digest FROM manifests WHERE subject = ?1 AND subject <> '' AND digest > ?2 ORDER BY 1 LIMIT ?3`

	sqlDeleteManifest = `DELETE FROM manifests WHERE digest = ?`
	sqlDeleteBlob     = `DELETE FROM blobs WHERE digest = ?`
)

// A queryer is index and indexTx: queries without or within a transaction.
type queryer interface {
	rowReader
	stmt(text string) (*sql.Stmt, error)
}

// pages runs a query whose last argument is a limit until it has no more rows.
// visit returns the arguments, but for the limit, of the page after its row.
func pages(ctx context.Context, q queryer, text string, args []any, visit func(*sql.Rows) (next []any, err error)) error {
	const page = 1000
	s, err := q.stmt(text)
	if err != nil {
		return err
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		from := args
		got, err := scanAll(s, page, append(slices.Clone(args), page), func(rows *sql.Rows) (struct{}, error) {
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

// refTargets visits what each ref points at.
func (x *index) refTargets(ctx context.Context, visit func(digest.Digest)) error {
	return pages(ctx, x, sqlRefTargets, []any{"", ""}, func(rows *sql.Rows) ([]any, error) {
		var name, reference, s string
		if err := rows.Scan(&name, &reference, &s); err != nil {
			return nil, err
		}
		d, err := rowDigest(s)
		visit(d)
		return []any{name, reference}, err
	})
}

// lostManifest reports whether d has no row among the manifests although its own
// blob's row, or that of an index above it, says that it is one.
func lostManifest(q queryer, d digest.Digest) (bool, error) {
	var one int
	return q.row(sqlLostManifest, []any{string(d), string(roleManifest)}, &one)
}

// leading visits d and all that leads to it, and says of each whether a ref points at it.
func leading(q queryer, d digest.Digest, referrers bool, visit func(d digest.Digest, ref bool) error) error {
	s, err := q.stmt(sqlLeading)
	if err != nil {
		return err
	}
	_, err = scanAll(s, 0, []any{string(d), referrers}, func(rows *sql.Rows) (struct{}, error) {
		var d digest.Digest
		var ref bool
		if err := rows.Scan(&d, &ref); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, visit(d, ref)
	})
	if err == errStop {
		err = nil
	}
	return err
}

// manifestRows visits every manifest with its subject.
func (x *index) manifestRows(ctx context.Context, visit func(d, subject digest.Digest)) error {
	return pages(ctx, x, sqlManifestRows, []any{""}, func(rows *sql.Rows) ([]any, error) {
		var s, subject string
		if err := rows.Scan(&s, &subject); err != nil {
			return nil, err
		}
		d, err := rowDigest(s)
		if err == nil && subject != "" {
			_, err = rowDigest(subject)
		}
		visit(d, digest.Digest(subject))
		return []any{s}, err
	})
}

// memberRows visits every pair of a manifest and what it needs, a manifest's one after the other.
func (x *index) memberRows(ctx context.Context, visit func(manifest digest.Digest, kind role, d digest.Digest)) error {
	return pages(ctx, x, sqlMemberRows, []any{"", -1}, func(rows *sql.Rows) ([]any, error) {
		var manifest, kind, s string
		var position int
		if err := rows.Scan(&manifest, &position, &kind, &s); err != nil {
			return nil, err
		}
		d, err := rowDigest(s)
		if err == nil {
			_, err = rowDigest(manifest)
		}
		visit(digest.Digest(manifest), role(kind), d)
		return []any{manifest, position}, err
	})
}

// blobRows visits every blob's row, manifests' too.
func (x *index) blobRows(ctx context.Context, visit func(d digest.Digest, size int64, kind role, created time.Time)) error {
	return pages(ctx, x, sqlBlobRows, []any{""}, func(rows *sql.Rows) ([]any, error) {
		var s, kind string
		var size, micro int64
		if err := rows.Scan(&s, &size, &kind, &micro); err != nil {
			return nil, err
		}
		d, err := rowDigest(s)
		visit(d, size, role(kind), time.UnixMicro(micro))
		return []any{s}, err
	})
}

// A blobRow is what the index says of a blob.
type blobRow struct {
	digest   digest.Digest // not checked
	size     int64
	manifest bool // by its own row, or by that among the manifests
}

// blobsAfter returns one page of blobs in the order of their digests, after one of them.
func (x *index) blobsAfter(after digest.Digest, n int) ([]blobRow, error) {
	s, err := x.stmt(sqlBlobsAfter)
	if err != nil {
		return nil, err
	}
	return scanAll(s, n, []any{string(after), n, string(roleManifest)}, func(rows *sql.Rows) (b blobRow, err error) {
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

// hasRef reports whether a ref points at d.
func hasRef(q queryer, d digest.Digest) (bool, error) {
	var one int
	return q.row(sqlHasRef, []any{string(d)}, &one)
}

// subjectOf returns the subject of a manifest, "" if it has none or isn't here.
func subjectOf(q queryer, d digest.Digest) (subject digest.Digest, err error) {
	_, err = q.row(sqlSubject, []any{string(d)}, &subject)
	return subject, err
}

// errStop ends a walk early, without an error.
var errStop = errors.New("stop")

// pointers visits the manifests that need d or have it as their subject.
// visit may query: no rows are open meanwhile, which would keep a connection.
func pointers(ctx context.Context, q queryer, d digest.Digest, visit func(manifest digest.Digest) error) error {
	const page = 100
	s, err := q.stmt(sqlPointers)
	if err != nil {
		return err
	}
	for after := digest.Digest(""); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch, err := scanAll(s, page, []any{string(d), string(after), page}, func(rows *sql.Rows) (d digest.Digest, err error) {
			err = rows.Scan(&d)
			return d, err
		})
		if err != nil {
			return err
		}
		for _, manifest := range batch {
			if manifest <= after {
				return errOutOfOrder
			}
			after = manifest
			if err := visit(manifest); err == errStop {
				return nil
			} else if err != nil {
				return err
			}
		}
		if len(batch) < page {
			return nil
		}
	}
}

// delete removes the rows of a manifest with its members, or of a blob.
func (t *indexTx) delete(d digest.Digest) error {
	if _, err := t.exec(sqlDeleteManifest, string(d)); err != nil {
		return err
	}
	_, err := t.exec(sqlDeleteBlob, string(d))
	return err
}

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

// Statements of displace. The text fills more pages than the cache may then have.
const (
	sqlSmallCache  = `PRAGMA cache_size = 10`
	sqlFill        = `INSERT INTO meta (key, value) VALUES ('fill', hex(zeroblob(40000)))`
	sqlUnfill      = `DELETE FROM meta WHERE key = 'fill'`
	sqlWriterCache = `PRAGMA cache_size = -16000`
)

// displace makes sure that no commit can come to light any more that nobody has seen yet.
//
// A process that dies in the last moment of a commit leaves it whole in the write-ahead log,
// but not in the memory that SQLite's processes share. The others don't see it, and
// the next of them to write puts its own frames in its place. But if none writes, the
// commit is there when the log is read anew. Whoever does, in a transaction, what can't be
// undone because of what it sees, must therefore write first: not at the commit, before which
// it may die too, but now. So this fills the cache until SQLite has to spill pages into the log.
func (t *indexTx) displace() error {
	var err error
	for _, text := range []string{sqlSmallCache, sqlFill, sqlUnfill} {
		if err == nil {
			_, err = t.exec(text)
		}
	}
	_, always := t.exec(sqlWriterCache)
	return errors.Join(err, always)
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
	s, err := q.stmt(sqlManifestColumns)
	if err != nil {
		return "", err
	}
	found, err := scanAll(s, 1, []any{string(m.Digest())}, func(rows *sql.Rows) (struct{}, error) {
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
	s, err := x.stmt(sqlCheckRefs)
	if err != nil {
		return err
	}
	for last := (row{}); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch, err := scanAll(s, page, []any{last.name, last.reference, page}, func(rows *sql.Rows) (r row, err error) {
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

// integrity visits what SQLite itself finds wrong.
func (x *index) integrity(ctx context.Context, quick bool, visit func(string)) error {
	texts := []string{"PRAGMA integrity_check(100)", "PRAGMA foreign_key_check"}
	if quick {
		texts[0] = "PRAGMA quick_check(100)"
	}
	for i, text := range texts {
		if err := ctx.Err(); err != nil {
			return err
		}
		s, err := x.stmt(text)
		if err != nil {
			return err
		}
		if _, err := scanAll(s, 1, nil, func(rows *sql.Rows) (struct{}, error) {
			cols := make([]any, 1+3*i)
			dest := make([]any, len(cols))
			for k := range cols {
				dest[k] = &cols[k]
			}
			if err := rows.Scan(dest...); err != nil {
				return struct{}{}, err
			}
			if i == 1 {
				visit(fmt.Sprintf("row %v of %v points at nothing in %v", cols[1], cols[0], cols[2]))
			} else if cols[0] != "ok" {
				visit(fmt.Sprint(cols[0]))
			}
			return struct{}{}, nil
		}); err != nil {
			return err
		}
	}
	return nil
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

const sqlSalvage = `SELECT name, reference, manifest FROM refs WHERE (name, reference) > (?, ?) ORDER BY name, reference LIMIT ?`

// salvageRefs reads what can be read of the refs in a damaged index.
func salvageRefs(ctx context.Context, path string) (refs []Ref) {
	x, err := openUnchecked(path, indexQueryOnly, 0, nil)
	if err != nil {
		return nil
	}
	defer x.close()
	// An error ends it: the rows before it are what could be saved.
	_ = pages(ctx, x, sqlSalvage, []any{"", ""}, func(rows *sql.Rows) ([]any, error) {
		var name, reference, manifest string
		if err := rows.Scan(&name, &reference, &manifest); err != nil {
			return nil, err
		}
		ref, err := referenceFromKey(name, reference)
		if d, bad := rowDigest(manifest); err == nil && bad == nil {
			refs = append(refs, Ref{Reference: ref, Descriptor: ocispec.Descriptor{Digest: d}})
		}
		return []any{name, reference}, nil
	})
	return refs
}

// Statements of lineage.go.
const (
	// A page of referrers starts after the digest ?3. The second condition lets
	// SQLite use the partial index, which is in the order asked for.
	sqlReferrers = `SELECT media_type, digest, size, artifact_type, annotations FROM manifests
		WHERE subject = ?1 AND subject <> '' AND (?2 = '' OR artifact_type = ?2) AND digest > ?3 ORDER BY digest LIMIT ?4`
)

// referrers returns one page of the manifests with that subject, after a digest.
func (x *index) referrers(subject digest.Digest, artifactType string, after digest.Digest, n int) ([]ocispec.Descriptor, error) {
	s, err := x.stmt(sqlReferrers)
	if err != nil {
		return nil, err
	}
	return scanAll(s, n, []any{string(subject), artifactType, string(after), n}, func(rows *sql.Rows) (d ocispec.Descriptor, err error) {
		var annotations []byte
		if err := rows.Scan(&d.MediaType, &d.Digest, &d.Size, &d.ArtifactType, &annotations); err != nil {
			return d, err
		}
		if err = checkDigest(d.Digest); err == nil {
			err = json.Unmarshal(annotations, &d.Annotations)
		}
		if err != nil {
			err = fmt.Errorf("%w: row of manifest %q: %w", ErrCorruptIndex, clip(string(d.Digest)), err)
		}
		return d, err
	})
}

// Statements of push.go.
const (
	// At most 1,000 manifests are looked at: there are blobs that all have.
	sqlOtherName = `SELECT r.name FROM (SELECT manifest FROM members WHERE digest = ?1 LIMIT 1000) m JOIN refs r ON r.manifest = m.manifest
		WHERE r.name >= ?2 AND r.name < ?3 AND r.name <> ?4 LIMIT 1`
)

// otherName returns the name, other than not and beginning with prefix, of a ref whose
// manifest has d; "" if none is found. The prefix ends with a '/'.
func (x *index) otherName(d digest.Digest, prefix, not string) (name string, err error) {
	s, err := x.stmt(sqlOtherName)
	if err != nil {
		return "", err
	}
	above := prefix[:len(prefix)-1] + "0" // the character after '/'
	_, err = scanAll(s, 1, []any{string(d), prefix, above, not}, func(rows *sql.Rows) (struct{}, error) {
		return struct{}{}, rows.Scan(&name)
	})
	return name, err
}

// Statements of stats.go.
const (
	sqlTotals    = `SELECT count(*), coalesce(sum(size), 0), (SELECT count(*) FROM manifests) FROM blobs` // of one moment
	sqlRefTotals = `SELECT count(*), count(DISTINCT name) FROM refs`

	// Both are merges of two scans. A manifest's own row in blobs is left out
	// of the second: where it has a ref, no member names it.
	sqlNoRef     = `SELECT digest FROM manifests EXCEPT SELECT manifest FROM refs ORDER BY 1`
	sqlNoPointer = `SELECT digest FROM blobs WHERE kind <> ?1 EXCEPT SELECT digest FROM members ORDER BY 1`

	sqlBlobSize = `SELECT size FROM blobs WHERE digest = ?`
	// A ref that is not (?2, ?3), or not of the name ?2 if ?3 is ''.
	sqlOtherRef = `SELECT 1 FROM refs WHERE manifest = ?1 AND NOT (name = ?2 AND ?3 IN ('', reference)) LIMIT 1`
	sqlNames    = `SELECT DISTINCT name FROM refs WHERE name >= ?1 AND name > ?2 AND name < ?3 ORDER BY name LIMIT ?4`
)

// digests reads a column of digests.
func (x *index) digests(text string, args ...any) ([]digest.Digest, error) {
	s, err := x.stmt(text)
	if err != nil {
		return nil, err
	}
	return scanAll(s, 0, args, func(rows *sql.Rows) (d digest.Digest, err error) {
		var s string
		if err := rows.Scan(&s); err != nil {
			return "", err
		}
		return rowDigest(s)
	})
}

// names returns one page of the names that have refs: at least from, after a name and below another.
func (x *index) names(from, after, below string, n int) ([]string, error) {
	s, err := x.stmt(sqlNames)
	if err != nil {
		return nil, err
	}
	return scanAll(s, n, []any{from, after, below, n}, func(rows *sql.Rows) (name string, err error) {
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

// hasOtherRef reports whether a ref points at d, other than the one, or than all of a name if reference is "".
func hasOtherRef(q rowReader, d digest.Digest, name, reference string) (bool, error) {
	var one int
	return q.row(sqlOtherRef, []any{string(d), name, reference}, &one)
}

// blobSize returns the size that a blob's row says, 0 if it has none.
func blobSize(q rowReader, d digest.Digest) (size int64, err error) {
	_, err = q.row(sqlBlobSize, []any{string(d)}, &size)
	return size, err
}

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

// Statements of backup.go. The snapshot is a copy of the source's index that
// nobody else sees, and is attached to the backup's as "other".
const (
	sqlMakeLeftOut = `CREATE TABLE left_out (name TEXT NOT NULL, reference TEXT NOT NULL, PRIMARY KEY (name, reference)) STRICT, WITHOUT ROWID`
	sqlLeaveOut    = `INSERT OR IGNORE INTO left_out SELECT name, reference FROM refs WHERE manifest = ?`
	sqlRefsTo      = `SELECT name, reference FROM refs WHERE manifest = ?`
	sqlUnref       = `DELETE FROM refs WHERE manifest = ?`

	sqlOtherBlobs = `SELECT digest, size FROM other.blobs WHERE digest > ? ORDER BY digest LIMIT ?`

	sqlMergeBlobs     = `INSERT OR IGNORE INTO main.blobs SELECT * FROM other.blobs`
	sqlMergeManifests = `INSERT OR IGNORE INTO main.manifests SELECT * FROM other.manifests`
	sqlMergeMembers   = `INSERT OR IGNORE INTO main.members SELECT * FROM other.members`
	sqlMergeGone      = `DELETE FROM main.refs AS r WHERE NOT EXISTS (SELECT 1 FROM other.refs o WHERE o.name = r.name AND o.reference = r.reference)
		AND NOT EXISTS (SELECT 1 FROM other.left_out o WHERE o.name = r.name AND o.reference = r.reference)`
	sqlMergeRefs = `INSERT OR REPLACE INTO main.refs SELECT * FROM (SELECT * FROM other.refs EXCEPT SELECT * FROM main.refs)`

	// The time of a ref's last change is in it, so that any change of a ref shows.
	sqlRefsMark = `SELECT count(*), coalesce(sum(updated % 1000000007), 0) FROM main.refs`
)

// refsMark returns a text that tells whether refs have changed.
func refsMark(q rowReader) (mark string, refs int, err error) {
	var sum int64
	_, err = q.row(sqlRefsMark, nil, &refs, &sum)
	return fmt.Sprintf("%d.%d", refs, sum), refs, err
}

// leaveOut takes a blob out of a snapshot, with all manifests that need it and
// the refs to these, which it calls visit with.
func (t *indexTx) leaveOut(ctx context.Context, d digest.Digest, visit func(Reference)) error {
	if err := neededBy(ctx, t, d, func(manifest digest.Digest) error { return t.leaveOut(ctx, manifest, visit) }); err != nil {
		return err
	}
	refs, err := refsTo(t, d)
	if err != nil {
		return err
	}
	for _, ref := range refs {
		visit(ref)
	}
	for _, text := range []string{sqlLeaveOut, sqlUnref} {
		if _, err := t.exec(text, string(d)); err != nil {
			return err
		}
	}
	return t.delete(d)
}

// refsTo returns the refs that point at d.
func refsTo(q queryer, d digest.Digest) ([]Reference, error) {
	s, err := q.stmt(sqlRefsTo)
	if err != nil {
		return nil, err
	}
	return scanAll(s, 0, []any{string(d)}, func(rows *sql.Rows) (Reference, error) {
		var name, reference string
		if err := rows.Scan(&name, &reference); err != nil {
			return Reference{}, err
		}
		return referenceFromKey(name, reference)
	})
}

// neededBy visits the manifests that need d, not those whose subject it is.
func neededBy(ctx context.Context, q queryer, d digest.Digest, visit func(manifest digest.Digest) error) error {
	return pointers(ctx, q, d, func(manifest digest.Digest) error {
		needs := false
		err := members(q, manifest, func(m member) error {
			needs = needs || m.desc.Digest == d
			return nil
		})
		if err == nil && needs {
			err = visit(manifest)
		}
		return err
	})
}

// otherBlobs visits the blobs of the attached snapshot.
func (t *indexTx) otherBlobs(ctx context.Context, visit func(d digest.Digest, size int64) error) error {
	return pages(ctx, t, sqlOtherBlobs, []any{""}, func(rows *sql.Rows) ([]any, error) {
		var s string
		var size int64
		if err := rows.Scan(&s, &size); err != nil {
			return nil, err
		}
		d, err := rowDigest(s)
		if err == nil {
			err = visit(d, size)
		}
		return []any{s}, err
	})
}

// merge takes all rows of the attached snapshot in, so that the refs are those of the
// snapshot, and returns how many refs it set and removed.
func (t *indexTx) merge(ctx context.Context) (set, removed int64, err error) {
	for _, step := range []struct {
		text string
		rows *int64
	}{{sqlMergeBlobs, new(int64)}, {sqlMergeManifests, new(int64)}, {sqlMergeMembers, new(int64)}, {sqlMergeGone, &removed}, {sqlMergeRefs, &set}} {
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		if *step.rows, err = t.exec(step.text); err != nil {
			return 0, 0, err
		}
	}
	return set, removed, nil
}
