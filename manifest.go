package ocilocal

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits on documents from outside. A document beyond one of them is an [ErrTooLarge]. Only a
// manifest that is nested too deep is an [ErrInvalidManifest].
const (
	// MaxManifestSize bounds manifests and image indexes, in bytes. It is the size that registries
	// are expected to accept (distribution-spec, "Pushing Manifests"). A descriptor has over 100
	// bytes, so it also bounds the descriptors of one document, to about 37,000.
	MaxManifestSize = 4 << 20
	// MaxLayoutIndexSize bounds the index.json of a layout, in bytes: enough for 100,000 entries with
	// long names and some annotations. It is not a manifest, and no registry has to take it.
	MaxLayoutIndexSize = 32 << 20
	// MaxIndexNesting bounds how deep image indexes lie in image indexes.
	MaxIndexNesting = 8
	// MaxClosure bounds the descriptors that one artifact refers to through all its manifests.
	MaxClosure = 100_000
	// MaxImportManifests bounds the bytes of all manifests of one import or pull, which
	// are in memory until they are published together.
	MaxImportManifests = 128 << 20
	// MaxJSONDepth bounds how deep arrays and objects lie in each other.
	MaxJSONDepth = 64
)

// Media types of manifests that image-spec 1.1 does not define. Docker's manifests have the forms
// of image-spec under older names.
const (
	MediaTypeArtifactManifest   = "application/vnd.oci.artifact.manifest.v1+json" // image-spec 1.1.0-rc2, artifact.md
	MediaTypeDockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// A Manifest is a read-only view of a manifest document of any accepted form. It keeps the bytes of
// the document as they came. Methods return copies, so callers can't change it. It is safe for
// concurrent use.
type Manifest struct {
	doc    manifestDoc // its MediaType is the effective one
	form   manifestForm
	raw    []byte
	digest digest.Digest
	layers []ocispec.Descriptor // doc.Layers or doc.Blobs
}

// manifestDoc holds the fields of all forms (image-spec manifest.md, image-index.md).
type manifestDoc struct {
	SchemaVersion int64                `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	ArtifactType  string               `json:"artifactType"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Blobs         []ocispec.Descriptor `json:"blobs"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	Subject       *ocispec.Descriptor  `json:"subject"`
	Annotations   map[string]string    `json:"annotations"`
}

type manifestForm int

const (
	formImage manifestForm = iota + 1
	formIndex
	formArtifact
)

// formOf returns the form of a manifest's media type, and 0 for any other media type.
func formOf(mediaType string) manifestForm {
	switch mediaType {
	case ocispec.MediaTypeImageManifest, MediaTypeDockerManifest:
		return formImage
	case ocispec.MediaTypeImageIndex, MediaTypeDockerManifestList:
		return formIndex
	case MediaTypeArtifactManifest:
		return formArtifact
	}
	return 0
}

// ParseManifest reads an OCI image manifest, image index or artifact manifest, or
// a Docker manifest (version 2, schema 2) or manifest list. It keeps a copy of raw.
//
// mediaType is the media type by which the descriptor or the registry names the document, without
// parameters. If it is "", the mediaType in the document counts. If that is missing too, the
// structure decides. Only the two documents of image-spec 1.1 may omit mediaType: Docker's and
// artifact manifests must have it. So equal bytes never have two media types.
//
// A document must mean the same to every reader. So it is refused, beyond the rules of the
// specification, if it
//   - has parts of two forms (CVE-2021-41190), or contradicts mediaType
//   - repeats a key, or has a known key in another case
//   - is not strict JSON in UTF-8
//   - gives one digest two sizes, or has a data field that is not the content
//
// Unknown fields are allowed.
//
// Errors:
//   - [ErrTooLarge]: raw has more than [MaxManifestSize] bytes
//   - [ErrUnsupportedMediaType]
//   - [ErrInvalidManifest] for the rest, together with [ErrInvalidDigest], [ErrDigestMismatch] or
//     [ErrSizeMismatch] if one of these says more
func ParseManifest(mediaType string, raw []byte) (*Manifest, error) {
	if len(raw) > MaxManifestSize { // before the copy
		return nil, tooLargeManifest(len(raw))
	}
	return parseManifest(mediaType, bytes.Clone(raw))
}

func tooLargeManifest(size int) error {
	return fmt.Errorf("%w: manifest of %d bytes, at most %d are taken", ErrTooLarge, size, MaxManifestSize)
}

// parseManifest is [ParseManifest] without the copy: raw must not change any more. Every manifest
// that comes from anywhere passes through here, so the rest of the package relies on its checks.
func parseManifest(mediaType string, raw []byte) (*Manifest, error) {
	if len(raw) > MaxManifestSize {
		return nil, tooLargeManifest(len(raw))
	}
	if mediaType != "" && formOf(mediaType) == 0 {
		return nil, fmt.Errorf("%w: %s is not a manifest media type", ErrUnsupportedMediaType, printable(mediaType))
	}
	m := &Manifest{raw: raw}
	present, err := decodeStrict(raw, jsonManifest, &m.doc)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidManifest, err)
	}
	if err := m.settleForm(mediaType, present); err != nil {
		return nil, err
	}
	if err := m.checkFields(present); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidManifest, err)
	}
	m.layers = m.doc.Layers
	if m.form == formArtifact {
		m.layers = m.doc.Blobs
	}
	if err := m.checkDescriptors(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidManifest, err)
	}
	m.digest = digestOf(digest.SHA256, raw)
	return m, nil
}

// The fields that tell the forms apart.
var (
	hasConfig    = jsonManifest.bit("config")
	hasLayers    = jsonManifest.bit("layers")
	hasBlobs     = jsonManifest.bit("blobs")
	hasManifests = jsonManifest.bit("manifests")
)

// settleForm sets the form and the effective media type. Equal bytes have one media type, whoever
// brings them and whatever their descriptor says, because the registry records it once for all
// refs. Only image-spec lets a document leave mediaType out. [Manifest.checkFields] then accepts
// "manifests" in an image index alone, so the structure decides.
func (m *Manifest) settleForm(mediaType string, present fieldSet) error {
	own := m.doc.MediaType
	switch {
	case mediaType != "" && own != "" && own != mediaType:
		return fmt.Errorf("%w: mediaType is %s, but the document was given as %s",
			ErrInvalidManifest, printable(own), mediaType)
	case mediaType != "":
		m.doc.MediaType = mediaType
	case own != "":
		if formOf(own) == 0 {
			return fmt.Errorf("%w: %s is not a manifest media type", ErrUnsupportedMediaType, printable(own))
		}
	case present&hasManifests != 0:
		m.doc.MediaType = ocispec.MediaTypeImageIndex
	case present&(hasConfig|hasLayers) != 0:
		m.doc.MediaType = ocispec.MediaTypeImageManifest
	default:
		return fmt.Errorf("%w: neither mediaType nor structure tells what it is", ErrInvalidManifest)
	}
	m.form = formOf(m.doc.MediaType)
	if own == "" && m.doc.MediaType != ocispec.MediaTypeImageManifest && m.doc.MediaType != ocispec.MediaTypeImageIndex {
		return fmt.Errorf("%w: mediaType: missing, and %s demands it", ErrInvalidManifest, m.doc.MediaType)
	}
	return nil
}

// checkFields checks the fields that the form must have and must not have. A list that is null
// means an empty one, because that is how Go writes a nil slice. An image manifest may leave
// its layers out: oras, skopeo, regctl and crane all accept it.
func (m *Manifest) checkFields(present fieldSet) error {
	var foreign fieldSet
	switch m.form {
	case formImage:
		foreign = hasManifests | hasBlobs
	case formIndex:
		foreign = hasConfig | hasLayers | hasBlobs
	case formArtifact:
		foreign = hasManifests | hasConfig | hasLayers
	}
	for i, f := range jsonManifest.fields {
		if present&foreign&(1<<i) != 0 {
			return fmt.Errorf("ambiguous: %s in a document of type %s", f.name, m.doc.MediaType)
		}
	}
	switch {
	case m.form != formArtifact && m.doc.SchemaVersion != 2:
		return fmt.Errorf("schemaVersion: missing or not 2")
	case m.form == formImage && m.doc.Config == nil:
		return fmt.Errorf("config: missing")
	case m.form == formIndex && present&hasManifests == 0:
		return fmt.Errorf("manifests: missing")
	case m.form == formArtifact || m.doc.ArtifactType != "":
		return checkMediaType("artifactType", m.doc.ArtifactType)
	}
	return nil
}

// checkDescriptors checks each descriptor, and that two with one digest agree about the size. The
// registry records one size for each digest.
func (m *Manifest) checkDescriptors() error {
	sizes := make(map[digest.Digest]int64, len(m.layers)+len(m.doc.Manifests)+2)
	check := func(d *ocispec.Descriptor) error {
		if err := checkDescriptor(d); err != nil {
			return err
		}
		if size, ok := sizes[d.Digest]; ok && size != d.Size {
			return fmt.Errorf("size: %d, but elsewhere %s has %d", d.Size, d.Digest, size)
		}
		sizes[d.Digest] = d.Size
		return nil
	}
	for _, one := range [...]struct {
		field string
		d     *ocispec.Descriptor
	}{{"config", m.doc.Config}, {"subject", m.doc.Subject}} {
		if one.d != nil {
			if err := check(one.d); err != nil {
				return fmt.Errorf("%s.%w", one.field, err)
			}
		}
	}
	for _, list := range [...]struct {
		field string
		ds    []ocispec.Descriptor
	}{{"layers", m.doc.Layers}, {"blobs", m.doc.Blobs}, {"manifests", m.doc.Manifests}} {
		for i := range list.ds {
			if err := check(&list.ds[i]); err != nil {
				return fmt.Errorf("%s[%d].%w", list.field, i, err)
			}
		}
	}
	return nil
}

// checkDescriptor checks the rules of image-spec descriptor.md for d alone. [checkJSON] has checked
// already that the required fields are there, their types and the range of size. The error begins
// with the name of the field.
func checkDescriptor(d *ocispec.Descriptor) error {
	if err := checkMediaType("mediaType", d.MediaType); err != nil {
		return err
	}
	if err := checkDigest(d.Digest); err != nil {
		return fmt.Errorf("digest: %w", err)
	}
	if d.ArtifactType != "" {
		if err := checkMediaType("artifactType", d.ArtifactType); err != nil {
			return err
		}
	}
	if d.Data == nil {
		return nil
	}
	if int64(len(d.Data)) != d.Size {
		return fmt.Errorf("data: %w: %d bytes, size says %d", ErrSizeMismatch, len(d.Data), d.Size)
	}
	if got := digestOf(d.Digest.Algorithm(), d.Data); got != d.Digest {
		return fmt.Errorf("data: %w: content is %s", ErrDigestMismatch, got)
	}
	return nil
}

// checkMediaType refuses a text that is longer than any media type (RFC 6838, section 4.2, allows
// 127 characters on either side of the '/') or could harm a terminal. It accepts all others:
// image-spec wants unknown types to be stored and copied.
func checkMediaType(field, s string) error {
	bad := s == "" || len(s) > 255
	for _, c := range []byte(s) {
		bad = bad || c < 0x20 || c > 0x7e
	}
	if bad {
		return fmt.Errorf("%s: %s is not 1 to 255 printable ASCII characters", field, printable(s))
	}
	return nil
}

// MediaType returns the media type of the document. [ParseManifest] says where it comes from.
func (m *Manifest) MediaType() string { return m.doc.MediaType }

// IsIndex reports whether the document is an image index or a manifest list.
func (m *Manifest) IsIndex() bool { return m.form == formIndex }

// ArtifactType returns the document's artifactType; for an image manifest
// without one, the config's media type (image-spec manifest.md, "Guidelines for
// Artifact Usage"); else "".
func (m *Manifest) ArtifactType() string {
	if m.doc.ArtifactType == "" && m.doc.Config != nil {
		return m.doc.Config.MediaType
	}
	return m.doc.ArtifactType
}

// Config returns the config of an image manifest, and false for the other forms.
func (m *Manifest) Config() (ocispec.Descriptor, bool) { return cloneOptional(m.doc.Config) }

// Layers returns the layers of an image manifest or the blobs of an artifact
// manifest, in the document's order.
func (m *Manifest) Layers() []ocispec.Descriptor { return cloneDescriptors(m.layers) }

// Manifests returns the members of an index, in the document's order.
func (m *Manifest) Manifests() []ocispec.Descriptor { return cloneDescriptors(m.doc.Manifests) }

// LayersByMediaType returns the layers of exactly this media type.
func (m *Manifest) LayersByMediaType(mediaType string) []ocispec.Descriptor {
	return m.layersWhere(func(d *ocispec.Descriptor) bool { return d.MediaType == mediaType })
}

// LayersByAnnotation returns the layers that have this annotation with this value.
func (m *Manifest) LayersByAnnotation(key, value string) []ocispec.Descriptor {
	return m.layersWhere(func(d *ocispec.Descriptor) bool {
		got, ok := d.Annotations[key]
		return ok && got == value
	})
}

func (m *Manifest) layersWhere(match func(*ocispec.Descriptor) bool) []ocispec.Descriptor {
	var found []ocispec.Descriptor
	for i := range m.layers {
		if match(&m.layers[i]) {
			found = append(found, cloneDescriptor(m.layers[i]))
		}
	}
	return found
}

// Annotations returns the document's annotations; nil when it has none.
func (m *Manifest) Annotations() map[string]string { return maps.Clone(m.doc.Annotations) }

// Subject returns the descriptor of the manifest to which this one refers, and false if it has no
// subject.
func (m *Manifest) Subject() (ocispec.Descriptor, bool) { return cloneOptional(m.doc.Subject) }

// Bytes returns the document as it was read.
func (m *Manifest) Bytes() []byte { return bytes.Clone(m.raw) }

// Size returns the length of the document in bytes.
func (m *Manifest) Size() int64 { return int64(len(m.raw)) }

// Digest returns the digest by which the registry has the document. It is a SHA-256 digest unless
// the document came under another one. That of a manifest from [ParseManifest] always is SHA-256.
func (m *Manifest) Digest() digest.Digest { return m.digest }

// Descriptor returns media type, digest, size and artifact type of the document.
func (m *Manifest) Descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType:    m.MediaType(),
		Digest:       m.digest,
		Size:         m.Size(),
		ArtifactType: m.ArtifactType(),
	}
}

// cloneDescriptor copies a descriptor with all that its fields point at.
func cloneDescriptor(d ocispec.Descriptor) ocispec.Descriptor {
	d.URLs = slices.Clone(d.URLs)
	d.Annotations = maps.Clone(d.Annotations)
	d.Data = bytes.Clone(d.Data)
	if d.Platform != nil {
		p := *d.Platform
		p.OSFeatures = slices.Clone(p.OSFeatures)
		d.Platform = &p
	}
	return d
}

func cloneOptional(d *ocispec.Descriptor) (ocispec.Descriptor, bool) {
	if d == nil {
		return ocispec.Descriptor{}, false
	}
	return cloneDescriptor(*d), true
}

func cloneDescriptors(ds []ocispec.Descriptor) []ocispec.Descriptor {
	if len(ds) == 0 {
		return nil
	}
	clones := make([]ocispec.Descriptor, len(ds))
	for i, d := range ds {
		clones[i] = cloneDescriptor(d)
	}
	return clones
}

// A role says in which part of its manifest a member stands. The index stores it as a number: see
// roleNumber.
type role string

const (
	roleConfig   role = "config"
	roleLayer    role = "layer"
	roleManifest role = "manifest"
)

// children returns the descriptors of all content that the manifest needs, in document order: the
// config if there is one, then the layers; or the members of an image index. The subject is not
// among them. The caller must not write through the pointers, maps and slices in them.
func (m *Manifest) children() []ocispec.Descriptor {
	switch {
	case m.form == formIndex:
		return slices.Clip(m.doc.Manifests)
	case m.doc.Config == nil:
		return slices.Clip(m.layers)
	}
	return append([]ocispec.Descriptor{*m.doc.Config}, m.layers...)
}

// childRole returns the role of children()[i]. A member of an image index whose media type is
// unknown is stored and copied like a layer: image-index.md forbids an error for it.
func (m *Manifest) childRole(i int) role {
	switch {
	case m.form == formIndex && formOf(m.doc.Manifests[i].MediaType) != 0:
		return roleManifest
	case i == 0 && m.doc.Config != nil:
		return roleConfig
	}
	return roleLayer
}

// ManifestFormat chooses the form of a manifest that is built.
type ManifestFormat int

const (
	// FormatDefault is the registry's choice ([Options.Format]), or else FormatImageManifest.
	FormatDefault ManifestFormat = iota
	// FormatArtifactManifest is [MediaTypeArtifactManifest], which has no config. Few registries
	// and tools read it.
	FormatArtifactManifest
	// FormatImageManifest is an OCI image manifest with an artifactType (image-spec 1.1), the form
	// that registries and tools read. Its config is the empty object {} unless it is set.
	FormatImageManifest
)

// String names the format for messages.
func (f ManifestFormat) String() string {
	switch f {
	case FormatDefault:
		return "default"
	case FormatArtifactManifest:
		return "artifact manifest"
	case FormatImageManifest:
		return "image manifest"
	}
	return fmt.Sprintf("ManifestFormat(%d)", int(f))
}
