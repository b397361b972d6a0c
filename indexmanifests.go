package ocilocal

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	sqlPutBlob = `INSERT INTO blobs (digest, size, kind, created) VALUES (?, ?, ?, ?)
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size WHERE size <> excluded.size`
	// The role in which a manifest needs it; else that of blobs that nothing needs.
	sqlNotManifest = `UPDATE blobs SET kind = coalesce((SELECT min(role) FROM members WHERE digest = ?1 AND role <> ?2), ?3)
		WHERE digest = ?1 AND kind = ?2 AND NOT EXISTS (SELECT 1 FROM manifests WHERE digest = ?1)`
	sqlBlobSize   = `SELECT size FROM blobs WHERE digest = ?`
	sqlHasBlob    = `SELECT 1 FROM blobs WHERE digest = ?`
	sqlHasAnyBlob = `SELECT 1 FROM blobs LIMIT 1`

	sqlPutManifest = `INSERT INTO manifests (digest, media_type, artifact_type, size, config, subject, annotations, created)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING`
	sqlPutMember      = `INSERT INTO members (manifest, position, role, digest, media_type, size, annotations) VALUES (?, ?, ?, ?, ?, ?, ?)`
	sqlUpdateManifest = `UPDATE manifests SET media_type = ?2, artifact_type = ?3, size = ?4, config = ?5, subject = ?6, annotations = ?7 WHERE digest = ?1`
	sqlDeleteMembers  = `DELETE FROM members WHERE manifest = ?`
	sqlUpdateRefs     = `UPDATE refs SET media_type = m.media_type, artifact_type = m.artifact_type, size = m.size
		FROM manifests m WHERE m.digest = ?1 AND refs.manifest = ?1`

	sqlResolveDigest = `SELECT media_type, digest, size, artifact_type, created FROM manifests WHERE digest = ?`
	sqlMembers       = `SELECT position, role, digest, media_type, size FROM members WHERE manifest = ? AND position >= ? ORDER BY position LIMIT ?`
	// A page of referrers starts after the digest ?3. The second condition lets
	// SQLite use the partial index, which is in the order asked for.
	sqlReferrers = `SELECT media_type, digest, size, artifact_type, annotations FROM manifests
		WHERE subject = ?1 AND subject <> '' AND (?2 = '' OR artifact_type = ?2) AND digest > ?3 ORDER BY digest LIMIT ?4`
)

// manifest returns the descriptor of a manifest row.
func (t *indexTx) manifest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	desc, ok, err = manifestRow(t, d)
	return desc, ok, err
}

// putBlob records a blob. kind is the role it was first seen in.
func (t *indexTx) putBlob(d digest.Digest, size int64, kind role, now time.Time) error {
	_, err := t.exec(sqlPutBlob, string(d), size, string(kind), now.UnixMicro())
	return err
}

// notManifest corrects the row of a blob that says it is a manifest, and is not one.
func (t *indexTx) notManifest(d digest.Digest) error {
	_, err := t.exec(sqlNotManifest, string(d), string(roleManifest), string(roleLayer))
	return err
}

// putManifest records a manifest and its members, unless it is recorded already, and returns the
// recorded descriptor. Its own blob and its members' must be recorded before.
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

// putMembers records the members of a manifest that has none.
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

// manifestColumns returns the columns of a manifest's row, except its time.
func manifestColumns(m *Manifest) ([]any, error) {
	annotations, err := canonicalAnnotations(m.doc.Annotations)
	config, _ := m.Config()
	subject, _ := m.Subject()
	return []any{string(m.Digest()), m.MediaType(), m.ArtifactType(), m.Size(), string(config.Digest), string(subject.Digest), annotations}, err
}

// memberColumns returns the columns of the row for a manifest's i-th child.
func memberColumns(m *Manifest, i int) ([]any, error) {
	c := m.children()[i]
	annotations, err := canonicalAnnotations(c.Annotations)
	return []any{string(m.Digest()), i, string(m.childRole(i)), string(c.Digest), c.MediaType, c.Size, annotations}, err
}

// A member is a descriptor that a manifest needs, as the index has it.
type member struct {
	position int
	role     role
	desc     ocispec.Descriptor
}

// members visits what a manifest directly needs, in the manifest's order.
func members(q queryer, d digest.Digest, visit func(member) error) error {
	p := paging[member]{text: sqlMembers, size: 100, scan: func(rows *sql.Rows) (m member, err error) {
		var kind string
		err = rows.Scan(&m.position, &kind, &m.desc.Digest, &m.desc.MediaType, &m.desc.Size)
		m.role = role(kind)
		return m, err
	}, after: func(m member) []any { return []any{string(d), m.position + 1} }}
	return p.each(context.Background(), q, []any{string(d), 0}, visit)
}

// resolveDigest returns a manifest's descriptor.
func (x *index) resolveDigest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	desc, ok, err = manifestRow(x, d)
	return desc, ok, err
}

// checkFound returns an [ErrCorruptIndex] unless a manifest's row has the digest that was asked
// for.
func checkFound(asked, found digest.Digest) error {
	if asked == found {
		return nil
	}
	return fmt.Errorf("%w: looking for manifest %s finds %s", ErrCorruptIndex, asked, printable(string(found)))
}

// manifestRow returns a manifest's descriptor.
func manifestRow(q queryer, d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	var row descriptorRow
	if ok, err = q.row(sqlResolveDigest, []any{string(d)}, row.dest()...); ok && err == nil {
		if desc, _, err = row.value(); err == nil {
			err = checkFound(d, desc.Digest)
		}
	}
	return desc, ok && err == nil, err
}

// replaceManifest corrects the rows of a recorded manifest, and those of the refs that
// point at it. Its members' blobs must be recorded before.
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

// deleteMembers removes the members of a manifest.
func (t *indexTx) deleteMembers(d digest.Digest) error {
	_, err := t.exec(sqlDeleteMembers, string(d))
	return err
}

// referrers returns one page of the manifests with that subject, after a digest.
func (x *index) referrers(subject digest.Digest, artifactType string, after digest.Digest, n int) ([]ocispec.Descriptor, error) {
	return readRows(context.Background(), x, sqlReferrers, n, []any{string(subject), artifactType, string(after), n}, func(rows *sql.Rows) (d ocispec.Descriptor, err error) {
		var annotations []byte
		if err := rows.Scan(&d.MediaType, &d.Digest, &d.Size, &d.ArtifactType, &annotations); err != nil {
			return d, err
		}
		if err = checkDigest(d.Digest); err == nil {
			err = json.Unmarshal(annotations, &d.Annotations)
		}
		if err != nil {
			err = fmt.Errorf("%w: row of manifest %s: %w", ErrCorruptIndex, printable(string(d.Digest)), err)
		}
		return d, err
	})
}

// blobSize returns the size that a blob's row says, 0 if it has none.
func blobSize(q queryer, d digest.Digest) (size int64, err error) {
	_, err = q.row(sqlBlobSize, []any{string(d)}, &size)
	return size, err
}

// hasBlob reports whether the index has a row for a blob.
func hasBlob(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlHasBlob, string(d))
}

// hasAnyBlob reports whether the index has a row for any blob.
func hasAnyBlob(q queryer) (bool, error) {
	return exists(q, sqlHasAnyBlob)
}
