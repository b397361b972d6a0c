package ocilocal

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// A blob that is put is here from then on. A row that it had before is that of an absent member,
	// of a subject, or of a blob that becomes a manifest (role 3).
	sqlPutBlob = `INSERT INTO content (digest, size, kind, created, present) VALUES (?, ?, ?, ?, 1)
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size, kind = iif(present AND excluded.kind <> 3, kind, excluded.kind),
		created = iif(present, created, excluded.created), present = 1 WHERE size <> excluded.size OR NOT present OR kind <> 3 AND excluded.kind = 3`
	sqlPutAbsent = `INSERT INTO content (digest, size, kind, created, present) VALUES (?, ?, ?, ?, 0)
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size, kind = excluded.kind WHERE size = -1`
	sqlBecomeAbsent = `UPDATE content SET present = 0, size = ?2 WHERE digest = ?1`
	sqlIsAbsent     = `SELECT 1 FROM content c WHERE digest = ?1 AND NOT present AND EXISTS (SELECT 1 FROM members WHERE content = c.id)`
	// A member of an image index (role 3) is absent, too, if its bytes are only a blob here.
	sqlIsAbsentManifest = `SELECT 1 FROM content c WHERE digest = ?1 AND NOT ` + manifestHere + ` AND EXISTS (SELECT 1 FROM members WHERE content = c.id AND (role = 3 OR NOT present))`
	sqlIsOnlyBlob       = `SELECT 1 FROM content c WHERE digest = ?1 AND present AND NOT ` + manifestHere
	// True if the content c is here, and has been recorded as a manifest.
	manifestHere = `(c.present AND (c.kind = 3 OR EXISTS (SELECT 1 FROM manifests WHERE id = c.id)))`
	// True if the member c is here in the role in which the row m of members names it.
	memberHere = `iif(m.role = 3, ` + manifestHere + `, c.present)`
	// What manifests say of a blob that they name, one row for each combination. At most 1,000
	// manifests are asked: very many may need the same blob.
	sqlStated = `SELECT DISTINCT role, size FROM (SELECT role, size FROM members WHERE content = (SELECT id FROM content WHERE digest = ?) AND role <> ? LIMIT 1000)
		ORDER BY role, size LIMIT 8`

	sqlPutSubject = `INSERT INTO content (digest, size, kind, created, present) VALUES (?, -1, ?, ?, 0) ON CONFLICT (digest) DO NOTHING`
	// The new kind is the role in which a manifest needs the blob, or ?3 if none does.
	sqlNotManifest = `UPDATE content AS c SET kind = coalesce((SELECT min(role) FROM members WHERE content = c.id AND role <> ?2), ?3)
		WHERE digest = ?1 AND kind = ?2 AND NOT EXISTS (SELECT 1 FROM manifests WHERE id = c.id)`
	sqlContentID  = `SELECT id FROM content WHERE digest = ?`
	sqlBlobSize   = `SELECT size FROM content WHERE digest = ? AND present`
	sqlHasBlob    = `SELECT 1 FROM content WHERE digest = ? AND present`
	sqlHasAnyBlob = `SELECT 1 FROM content WHERE present LIMIT 1`

	sqlPutManifest = `INSERT INTO manifests (id, digest, media_type, artifact_type, subject, annotations, created)
		SELECT id, ?1, ?2, ?3, ?4, ?5, ?6 FROM content WHERE digest = ?1 ON CONFLICT (id) DO NOTHING RETURNING id`
	sqlPutMember = `INSERT INTO members (manifest, position, role, content, media_type, size, annotations)
		VALUES (?, ?, ?, (SELECT id FROM content WHERE digest = ?), ?, ?, ?)`
	sqlUpdateManifest = `UPDATE manifests SET digest = ?1, media_type = ?2, artifact_type = ?3, subject = ?4, annotations = ?5
		WHERE id = (SELECT id FROM content WHERE digest = ?1) RETURNING id`
	sqlDeleteMembers = `DELETE FROM members WHERE manifest = (SELECT id FROM content WHERE digest = ?)`
	sqlUpdateRefs    = `UPDATE refs SET digest = c.digest, media_type = m.media_type, artifact_type = m.artifact_type, size = c.size
		FROM manifests m JOIN content c ON c.id = m.id WHERE m.id = ?1 AND refs.manifest = ?1`

	sqlPutType = `INSERT INTO types (text) VALUES (?) RETURNING id`
	sqlTypeID  = `SELECT id FROM types WHERE text = ?`
	sqlType    = `SELECT text FROM types WHERE id = ?`

	// The descriptor of a manifest m whose content is c.
	descriptorColumns = `(SELECT text FROM types WHERE id = m.media_type), m.digest, c.size, (SELECT text FROM types WHERE id = m.artifact_type)`

	sqlResolveDigest = `SELECT ` + descriptorColumns + `, m.created FROM content c JOIN manifests m ON m.id = c.id WHERE c.digest = ?`
	sqlGetManifest   = `SELECT m.media_type, m.digest, c.size, m.artifact_type FROM content c JOIN manifests m ON m.id = c.id WHERE c.digest = ?`
	sqlMembers       = `SELECT m.position, m.role, c.digest, (SELECT text FROM types WHERE id = m.media_type), m.size, ` + memberHere + `
		FROM members m LEFT JOIN content c ON c.id = m.content
		WHERE m.manifest = (SELECT id FROM content WHERE digest = ?) AND m.position >= ? ORDER BY m.position LIMIT ?`
	// A page of referrers starts after the digest ?2. The index manifests_by_subject has this order,
	// and manifests_by_type has it for each artifact type. So a page reads only its own rows.
	sqlReferrers       = selectReferrers + `WHERE m.subject = (SELECT id FROM content WHERE digest = ?1) AND m.digest > ?2 ORDER BY m.digest LIMIT ?3`
	sqlReferrersOfType = selectReferrers + `WHERE m.subject = (SELECT id FROM content WHERE digest = ?1) AND m.digest > ?2
		AND m.artifact_type = (SELECT id FROM types WHERE text = ?4) ORDER BY m.digest LIMIT ?3`
	selectReferrers = `SELECT ` + descriptorColumns + `, m.annotations
		FROM manifests m LEFT JOIN content c ON c.id = m.id `
)

// manifest returns the descriptor of a manifest row.
func (t *indexTx) manifest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	desc, ok, err = manifestRow(t, d)
	return desc, ok, err
}

// putBlob records a blob that is here. The caller has found its file in this transaction, which
// keeps every collector out. kind is its role. A row that says already that the blob is here keeps
// its time, and its kind unless the blob is a manifest now.
func (t *indexTx) putBlob(d digest.Digest, size int64, kind role, now time.Time) error {
	_, err := t.exec(sqlPutBlob, digestBytes(d), size, roleNumber(kind), now.UnixMicro())
	return err
}

// putAbsent records that a manifest names a blob which need not be here. If the blob has a row that
// says it is here, that row stays.
func (t *indexTx) putAbsent(d digest.Digest, size int64, kind role, now time.Time) error {
	_, err := t.exec(sqlPutAbsent, digestBytes(d), size, roleNumber(kind), now.UnixMicro())
	return err
}

// notManifest corrects the row of a blob that is not a manifest though its row says so. Repair
// calls it.
func (t *indexTx) notManifest(d digest.Digest) error {
	_, err := t.exec(sqlNotManifest, digestBytes(d), roleNumber(roleManifest), roleNumber(roleLayer))
	return err
}

// becomeAbsent records that a blob or manifest which was here is absent. Some manifest must name
// it, or nothing would ever remove the row.
func (t *indexTx) becomeAbsent(d digest.Digest, size int64) error {
	if err := t.deleteManifest(d); err != nil {
		return err
	}
	_, err := t.exec(sqlBecomeAbsent, digestBytes(d), size)
	return err
}

// isAbsent reports whether a manifest names d and the rows record d as absent in the role as. The
// bytes of an absent member of an image index can be here as a layer: the member is absent then, and
// the layer is not.
func isAbsent(q queryer, d digest.Digest, as role) (bool, error) {
	if as == roleManifest {
		return exists(q, sqlIsAbsentManifest, digestBytes(d))
	}
	return exists(q, sqlIsAbsent, digestBytes(d))
}

// isOnlyBlob reports whether d is here and is not recorded as a manifest.
func isOnlyBlob(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlIsOnlyBlob, digestBytes(d))
}

// statedSizes returns the sizes that manifests state for a config or layer that they name, a few at
// most, and a role in which they name it.
func statedSizes(q queryer, d digest.Digest) (as role, sizes []int64, err error) {
	err = eachRow(context.Background(), q, sqlStated, []any{digestBytes(d), roleNumber(roleManifest)}, func(rows *sql.Rows) error {
		var kind int
		var size int64
		if err := rows.Scan(&kind, &size); err != nil {
			return err
		}
		if len(sizes) == 0 {
			as = numberedRole(kind)
		}
		if !slices.Contains(sizes, size) {
			sizes = append(sizes, size)
		}
		return nil
	})
	return as, sizes, err
}

// contentID returns the id of a digest's row, 0 if it has none.
func contentID(q queryer, d digest.Digest) (id int64, err error) {
	_, err = q.row(sqlContentID, []any{digestBytes(d)}, &id)
	return id, err
}

// internType returns the number of a media type or artifact type.
//
// The handle remembers the numbers that it has seen, so that a publish does not look up the same
// few types again. A number that this transaction has read or written is remembered only when it is
// committed (see [indexTx.types]): before that, the row may be undone.
func (t *indexTx) internType(text string) (id int64, err error) {
	if id = t.types[text]; id == 0 {
		id = t.newTypes[text]
	}
	if id != 0 {
		return id, nil
	}
	found, err := t.row(sqlTypeID, []any{text}, &id)
	if err == nil && !found {
		_, err = t.row(sqlPutType, []any{text}, &id)
	}
	if err != nil {
		return 0, err
	}
	t.newTypes[text] = id
	return id, nil
}

// typeText returns the media type or artifact type with a number that a row had. No rows may be
// open. The index remembers it, since a row of types never changes.
func (x *index) typeText(number any) (text string, err error) {
	id, ok := number.(int64)
	if !ok {
		return "", fmt.Errorf("%w: %v is not the number of a type", ErrCorruptIndex, number)
	}
	x.mu.Lock()
	text, ok = x.typeTexts[id]
	x.mu.Unlock()
	if ok {
		return text, nil
	}
	if ok, err = x.row(sqlType, []any{id}, &text); !ok && err == nil {
		err = fmt.Errorf("%w: type %d has no row", ErrCorruptIndex, id)
	}
	if err != nil {
		return "", err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.typeTexts) >= maxTypes {
		clear(x.typeTexts)
	}
	x.typeTexts[id] = text
	return text, nil
}

// putManifest records a manifest and its members, unless it is recorded already, and returns the
// recorded descriptor. The content rows of the manifest and of its members must exist. A manifest
// that is recorded keeps its rows, since an equal digest means an equal document.
func (t *indexTx) putManifest(m *Manifest, now time.Time) (desc ocispec.Descriptor, err error) {
	row, err := t.manifestColumns(m, now)
	if err != nil {
		return desc, err
	}
	var id int64
	inserted, err := t.row(sqlPutManifest, append(row, now.UnixMicro()), &id)
	if err != nil {
		return desc, err
	}
	if inserted {
		return m.Descriptor(), t.putMembers(m, id)
	}
	desc, ok, err := manifestRow(t, m.Digest())
	if err == nil && !ok {
		err = errNoContent(m)
	}
	return desc, err
}

// putMembers records the members of a manifest that has none.
func (t *indexTx) putMembers(m *Manifest, id int64) error {
	for i, c := range m.children() {
		annotations, err := canonicalAnnotations(c.Annotations)
		if err != nil {
			return err
		}
		mediaType, err := t.internType(c.MediaType)
		if err != nil {
			return err
		}
		if _, err := t.exec(sqlPutMember, id, i, roleNumber(m.childRole(i)), digestBytes(c.Digest), mediaType, c.Size, annotations); err != nil {
			return err
		}
	}
	return nil
}

// manifestColumns returns the columns of a manifest's row, except its id and its time. If its subject
// has no row, it gets one that says it is not here.
func (t *indexTx) manifestColumns(m *Manifest, now time.Time) (row []any, err error) {
	row = []any{digestBytes(m.Digest()), nil, nil, nil, nil}
	if row[1], err = t.internType(m.MediaType()); err == nil {
		row[2], err = t.internType(m.ArtifactType())
	}
	if subject, ok := m.Subject(); ok && err == nil {
		row[3], err = t.putSubject(subject.Digest, now)
	}
	if err == nil {
		row[4], err = canonicalAnnotations(m.doc.Annotations)
	}
	return row, err
}

// errNoContent is the error for a manifest that has no row as a blob.
func errNoContent(m *Manifest) error {
	return fmt.Errorf("%w: manifest %s has no row as a blob", ErrCorruptIndex, m.Digest())
}

// putSubject returns the id of a subject's row. It makes the row if there is none: a referrer may
// come before its subject.
func (t *indexTx) putSubject(d digest.Digest, now time.Time) (id int64, err error) {
	if id, err = contentID(t, d); id != 0 || err != nil {
		return id, err
	}
	if _, err := t.exec(sqlPutSubject, digestBytes(d), roleNumber(roleManifest), now.UnixMicro()); err != nil {
		return 0, err
	}
	return contentID(t, d)
}

// A member is a descriptor that a manifest needs, as the index has it.
type member struct {
	position int
	role     role
	desc     ocispec.Descriptor
	absent   bool // recorded as one that need not be here
}

// members visits the members of a manifest, in the manifest's order. It reads in pages, so visit
// may query and write. A manifest without rows has no members.
func members(q queryer, d digest.Digest, visit func(member) error) error {
	id := digestBytes(d)
	p := paging[member]{text: sqlMembers, size: 100, scan: func(rows *sql.Rows) (m member, err error) {
		var kind int
		var b sql.RawBytes
		var mediaType sql.NullString
		var present sql.NullBool
		if err = rows.Scan(&m.position, &kind, &b, &mediaType, &m.desc.Size, &present); err == nil {
			m.role, m.desc.MediaType, m.absent = numberedRole(kind), mediaType.String, !present.Bool
			m.desc.Digest, err = digestFromBytes(b)
		}
		return m, err
	}, after: func(m member) []any { return []any{id, m.position + 1} }}
	return p.each(context.Background(), q, []any{id, 0}, visit)
}

// resolveDigest returns a manifest's descriptor.
func (x *index) resolveDigest(d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	var row descriptorRow
	ok, err = x.row(sqlGetManifest, []any{digestBytes(d)}, &row.mediaType, &row.digest, &row.size, &row.artifactType)
	if !ok || err != nil {
		return desc, false, err
	}
	if desc, err = x.descriptor(&row); err == nil {
		err = checkFound(d, desc.Digest)
	}
	return desc, err == nil, err
}

// descriptor returns the descriptor in a row that has the numbers of the types, and no time.
func (x *index) descriptor(row *descriptorRow) (desc ocispec.Descriptor, err error) {
	row.micro = int64(0)
	if row.mediaType, err = x.typeText(row.mediaType); err == nil {
		row.artifactType, err = x.typeText(row.artifactType)
	}
	if err == nil {
		desc, _, err = row.value()
	}
	return desc, err
}

// checkFound returns an [ErrCorruptIndex] unless a manifest's row has the digest that was asked
// for.
func checkFound(asked, found digest.Digest) error {
	if asked == found {
		return nil
	}
	return fmt.Errorf("%w: looking for manifest %s finds %s", ErrCorruptIndex, asked, printable(string(found)))
}

// manifestRow returns a manifest's descriptor, and reports whether there is such a manifest.
func manifestRow(q queryer, d digest.Digest) (desc ocispec.Descriptor, ok bool, err error) {
	var row descriptorRow
	if ok, err = q.row(sqlResolveDigest, []any{digestBytes(d)}, row.dest()...); ok && err == nil {
		if desc, _, err = row.value(); err == nil {
			err = checkFound(d, desc.Digest)
		}
	}
	return desc, ok && err == nil, err
}

// replaceManifest corrects the rows of a recorded manifest from its document, and the rows of the
// refs that point at it. The rows of its members' blobs must exist. Repair calls it.
func (t *indexTx) replaceManifest(m *Manifest, now time.Time) error {
	clear(t.types) // a type's own row may be what is wrong
	row, err := t.manifestColumns(m, now)
	if err != nil {
		return err
	}
	var id int64
	if ok, err := t.row(sqlUpdateManifest, row, &id); err != nil {
		return err
	} else if !ok {
		return errNoContent(m)
	}
	if err := t.deleteMembers(m.Digest()); err != nil {
		return err
	}
	if err := t.putMembers(m, id); err != nil {
		return err
	}
	_, err = t.exec(sqlUpdateRefs, id)
	return err
}

// deleteMembers removes the members of a manifest.
func (t *indexTx) deleteMembers(d digest.Digest) error {
	_, err := t.exec(sqlDeleteMembers, digestBytes(d))
	return err
}

// referrers returns one page of the manifests with that subject, after a digest.
func (x *index) referrers(subject digest.Digest, artifactType string, after digest.Digest, n int) ([]ocispec.Descriptor, error) {
	var row descriptorRow
	dest := row.dest()
	var annotations []byte
	dest[4] = &annotations
	row.micro = int64(0)
	text, args := sqlReferrers, []any{digestBytes(subject), digestBytes(after), n}
	if artifactType != "" {
		text, args = sqlReferrersOfType, append(args, artifactType)
	}
	return readRows(context.Background(), x, text, n, args, func(rows *sql.Rows) (d ocispec.Descriptor, err error) {
		if err := rows.Scan(dest...); err != nil {
			return d, err
		}
		if d, _, err = row.value(); err == nil {
			err = json.Unmarshal(annotations, &d.Annotations)
		}
		if err != nil {
			err = fmt.Errorf("%w: row of manifest %s: %w", ErrCorruptIndex, printable(string(d.Digest)), err)
		}
		return d, err
	})
}

// blobSize returns the recorded size of a blob, or 0 if the blob is absent or has no row.
func blobSize(q queryer, d digest.Digest) (size int64, err error) {
	_, err = q.row(sqlBlobSize, []any{digestBytes(d)}, &size)
	return size, err
}

// hasBlob reports whether the index says that a blob is here.
func hasBlob(q queryer, d digest.Digest) (bool, error) {
	return exists(q, sqlHasBlob, digestBytes(d))
}

// hasAnyBlob reports whether the index says of any blob that it is here.
func hasAnyBlob(q queryer) (bool, error) {
	return exists(q, sqlHasAnyBlob)
}
