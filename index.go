package ocilocal

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// indexAppID is PRAGMA application_id of our index files: "ocil".
	indexAppID = 0x6f63696c
	// indexVersion is PRAGMA user_version: how many of the migrations it has had.
	indexVersion = len(migrations)
)

// migrations take the index from one schema version to the next. A list that
// was released never changes; a new version appends one. The statements stand
// here exactly as SQLite keeps them: checkSchema compares the text.
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
)
const (
	sqlGetMeta = `SELECT value FROM meta WHERE key = ?`
	sqlSetMeta = `INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`

	sqlPutBlob = `INSERT INTO blobs (digest, size, kind, created) VALUES (?, ?, ?, ?)
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size WHERE size <> excluded.size`
	sqlPutManifest = `INSERT INTO manifests (digest, media_type, artifact_type, size, config, subject, annotations, created)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING`
	sqlPutMember = `INSERT INTO members (manifest, position, role, digest, media_type, size, annotations) VALUES (?, ?, ?, ?, ?, ?, ?)`

	sqlGetRef    = `SELECT manifest FROM refs WHERE name = ? AND reference = ?`
	sqlPutRef    = `INSERT OR REPLACE INTO refs (name, reference, manifest, media_type, artifact_type, size, updated) VALUES (?, ?, ?, ?, ?, ?, ?)`
	sqlDeleteRef = `DELETE FROM refs WHERE name = ? AND reference = ?`

	// A ref's row repeats its manifest's descriptor, which can't change: a
	// listing of 100,000 is then one scan, not as many look-ups by random digests.
	sqlResolve       = `SELECT media_type, manifest, size, artifact_type, updated FROM refs WHERE name = ? AND reference = ?`
	sqlResolveDigest = `SELECT media_type, digest, size, artifact_type, created FROM manifests WHERE digest = ?`
	sqlMembers       = `SELECT role, digest, media_type, size FROM members WHERE manifest = ? AND position >= ? ORDER BY position LIMIT ?`
	// A page starts after (?1, ?2) and stays below the upper bound ?3 of the names.
	sqlList = `SELECT name, reference, media_type, manifest, size, artifact_type, updated FROM refs
		WHERE (name, reference) > (?1, ?2) AND name < ?3 ORDER BY name, reference LIMIT ?4`
)

// meta returns a value of the table meta, "" when there is none.
func (x *index) meta(key string) (value string, err error) {
	_, err = x.row(sqlGetMeta, []any{key}, &value)
	return value, err
}

// ref returns what a ref points at, "" when there is none.
func (t *indexTx) ref(name, reference string) (d digest.Digest, err error) {
	_, err = t.row(sqlGetRef, []any{name, reference}, &d)
	return d, err
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
	var created int64
	ok, err = t.row(sqlResolveDigest, []any{string(d)}, &desc.MediaType, &desc.Digest, &desc.Size, &desc.ArtifactType, &created)
	return desc, ok, err
}

// resolved returns a ref's row with its manifest's.
func (t *indexTx) resolved(name, reference string) (desc ocispec.Descriptor, updated time.Time, ok bool, err error) {
	var micro int64
	ok, err = t.row(sqlResolve, []any{name, reference}, &desc.MediaType, &desc.Digest, &desc.Size, &desc.ArtifactType, &micro)
	return desc, time.UnixMicro(micro), ok, err
}

// putBlob records a blob. kind is the role it was first seen in.
func (t *indexTx) putBlob(d digest.Digest, size int64, kind string, now time.Time) error {
	_, err := t.exec(sqlPutBlob, string(d), size, kind, now.UnixMicro())
	return err
}

// putManifest records a manifest and its members, unless it is there. Blobs must be recorded before.
func (t *indexTx) putManifest(m *Manifest, now time.Time) error {
	annotations, err := canonicalAnnotations(m.doc.Annotations)
	if err != nil {
		return err
	}
	config, _ := m.Config()
	subject, _ := m.Subject()
	n, err := t.exec(sqlPutManifest, string(m.Digest()), m.MediaType(), m.ArtifactType(), m.Size(),
		string(config.Digest), string(subject.Digest), annotations, now.UnixMicro())
	if err != nil || n == 0 {
		return err
	}
	for i, c := range m.children() {
		annotations, err := canonicalAnnotations(c.Annotations)
		if err != nil {
			return err
		}
		if _, err := t.exec(sqlPutMember, string(m.Digest()), i, string(m.childRole(i)), string(c.Digest), c.MediaType, c.Size, annotations); err != nil {
			return err
		}
	}
	return nil
}

// A member is one row of what a manifest needs.
type member struct {
	role string
	desc ocispec.Descriptor
}

// members calls visit with what a manifest directly needs.
func (t *indexTx) members(d digest.Digest, visit func(member) error) error {
	const page = 100
	s, err := t.stmt(sqlMembers)
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
	var updated int64
	ok, err = x.row(sqlResolve, []any{name, reference}, &desc.MediaType, &desc.Digest, &desc.Size, &desc.ArtifactType, &updated)
	return desc, ok, err
}

// resolveDigest returns a manifest's descriptor.
func (x *index) resolveDigest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	var created int64
	ok, err = x.row(sqlResolveDigest, []any{string(d)}, &desc.MediaType, &desc.Digest, &desc.Size, &desc.ArtifactType, &created)
	return desc, ok, err
}

// list returns one page of refs: after (name, reference), names below limit.
func (x *index) list(name, reference, below string, n int) ([]Ref, error) {
	s, err := x.stmt(sqlList)
	if err != nil {
		return nil, err
	}
	return scanAll(s, n, []any{name, reference, below, n}, func(rows *sql.Rows) (r Ref, err error) {
		var name, reference string
		var updated int64
		d := &r.Descriptor
		if err := rows.Scan(&name, &reference, &d.MediaType, &d.Digest, &d.Size, &d.ArtifactType, &updated); err != nil {
			return r, err
		}
		if r.Reference, err = referenceFromKey(name, reference); err == nil {
			err = checkDigest(d.Digest)
		}
		if err != nil {
			return r, fmt.Errorf("%w: row of ref %s: %w", ErrCorruptIndex, strconv.Quote(clip(name+":"+reference)), err)
		}
		r.Updated = time.UnixMicro(updated)
		return r, nil
	})
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
