package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A layoutIndex is a layout's index.json.
type layoutIndex struct {
	raw     []byte
	entries []ocispec.Descriptor // not validated yet: see [checkDescriptor]
}

// parseLayoutIndex parses a layout's index.json (image-spec image-layout.md, "index.json file"). It
// has the form of an image index. Its mediaType may be missing, as many tools leave it out. A
// document that also has the fields of an image manifest is refused, because programs could take it
// for either.
//
// Entries are not checked here. A bad entry fails an import only if the import needs it: see
// choose.
func parseLayoutIndex(raw []byte) (*layoutIndex, error) {
	var doc struct {
		SchemaVersion int64                `json:"schemaVersion"`
		MediaType     string               `json:"mediaType"`
		Manifests     []ocispec.Descriptor `json:"manifests"`
	}
	present, err := decodeStrict(raw, jsonManifest, &doc)
	switch {
	case err != nil:
	case doc.SchemaVersion != 2:
		err = errors.New("schemaVersion: missing or not 2")
	case doc.MediaType != "" && doc.MediaType != ocispec.MediaTypeImageIndex:
		err = fmt.Errorf("mediaType is %s, not an image index's", printable(doc.MediaType))
	case present&(hasConfig|hasLayers|hasBlobs) != 0:
		err = errors.New("ambiguous: it has parts of an image manifest")
	case present&hasManifests == 0:
		err = errors.New("manifests: missing")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: index.json: %w", ErrInvalidLayout, err)
	}
	return &layoutIndex{raw, doc.Manifests}, nil
}

// stageIndex stages index.json itself as an image index, and returns an index with this one entry:
// see [ImportOptions.AsIndex]. Its bytes are those of the file, so its digest is the same for
// everybody who imports the layout so.
func (im *importer) stageIndex(ctx context.Context, index *layoutIndex) (*layoutIndex, error) {
	m, err := ParseManifest(ocispec.MediaTypeImageIndex, index.raw)
	if err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	if err := im.charge(m.Size()); err != nil {
		return nil, err
	}
	if _, err := im.stage.putBytes(ctx, m.raw, digest.SHA256); err != nil {
		return nil, err
	}
	return &layoutIndex{entries: []ocispec.Descriptor{m.Descriptor()}}, nil
}

// choose returns the entries that Select and Platform choose. Entries that are no error, but cannot
// be imported, are returned as skipped: other content than manifests (image-spec image-layout.md
// has an example of one), and digests of unknown algorithms. An entry that is malformed fails the
// import only if it is chosen: unrelated content must not stop an import.
//
// Reference, Select, Expected and calls such as LoadPath need exactly one entry. Then no entry and
// several entries are errors. Several entries of one manifest count as one, if they spell its name
// in several ways, or if Select is its digest. If no entry has the digest of Select, it is looked
// for among the members of image indexes.
func (im *importer) choose(ctx context.Context, entries []ocispec.Descriptor) (chosen, skipped []ocispec.Descriptor, err error) {
	s := im.opts.Select
	selected := false
	for _, e := range entries {
		if !im.selects(e) {
			continue
		}
		selected = true
		switch {
		case formOf(e.MediaType) == 0 || !knownAlgorithm(e.Digest):
			skipped = append(skipped, e)
		default:
			if err := checkDescriptor(&e); err != nil {
				return nil, nil, fmt.Errorf("%w: index.json: entry %w", ErrInvalidLayout, err)
			}
			if chosen, err = im.onPlatform(ctx, chosen, e); err != nil {
				return nil, nil, err
			}
		}
	}
	if !selected && checkDigest(digest.Digest(s)) == nil {
		if chosen, err = im.chooseMember(ctx, entries, 0, map[digest.Digest]bool{}); err != nil {
			return nil, nil, err
		}
	}
	o := &im.opts
	single := o.one || !o.Reference.IsZero() || s != "" || o.Expected != ""
	if single && len(chosen) > 1 && isOneManifest(chosen, string(chosen[0].Digest) == s) {
		chosen = chosen[:1]
	}
	switch {
	case len(chosen) == 0 && len(skipped) > 0:
		err = unusable(skipped[0])
	case len(chosen) == 0 && s != "" && !selected:
		err = fmt.Errorf("%w: no entry of index.json has the name or digest %s", ErrNotFound, printable(s))
	case len(chosen) == 0 && s != "":
		err = fmt.Errorf("%w: entry %s of index.json has nothing for platform %s/%s", ErrNotFound, printable(s), printable(o.Platform.OS), printable(o.Platform.Architecture))
	case len(chosen) == 0 && o.Platform != nil:
		err = fmt.Errorf("%w: index.json has no entry for platform %s/%s", ErrNotFound, printable(o.Platform.OS), printable(o.Platform.Architecture))
	case len(chosen) == 0 && single:
		err = fmt.Errorf("%w: index.json has no entries", ErrNotFound)
	case len(chosen) > 1 && single:
		err = fmt.Errorf("%w: index.json has %d entries that fit, and one was asked for (ImportOptions.Select chooses by name or digest, Platform by platform)",
			ErrInvalidArgument, len(chosen))
	}
	return chosen, skipped, err
}

// isOneManifest reports whether entries describe one manifest and, unless anyName is set, have one
// name.
func isOneManifest(entries []ocispec.Descriptor, anyName bool) bool {
	first := entries[0]
	return !slices.ContainsFunc(entries, func(e ocispec.Descriptor) bool {
		return e.Digest != first.Digest || !anyName && entryClaim(e) != entryClaim(first)
	})
}

// selects reports whether Select chooses an entry: it is empty, one of the two annotations as they
// are, the digest, or the reference that [InspectedEntry] shows.
func (im *importer) selects(e ocispec.Descriptor) bool {
	switch im.opts.Select {
	case "", e.Annotations[ocispec.AnnotationRefName], e.Annotations[annotationImageName], string(e.Digest):
		return true
	}
	return im.opts.Select == entryClaim(e).ref.String()
}

// knownAlgorithm reports whether this package knows the algorithm of a digest. Text without a colon
// has no algorithm: it counts as known, so that checkDescriptor reports it as malformed.
func knownAlgorithm(d digest.Digest) bool {
	alg, _, ok := strings.Cut(string(d), ":")
	return !ok || digestHexLen(digest.Algorithm(alg)) != 0
}

// unusable is the error for an entry that was skipped although it was the only one that fits.
func unusable(e ocispec.Descriptor) error {
	if formOf(e.MediaType) == 0 {
		return fmt.Errorf("%w: the entry of index.json is of type %s, which is not a manifest media type", ErrUnsupportedMediaType, printable(e.MediaType))
	}
	return fmt.Errorf("%w: index.json: %w", ErrInvalidLayout, checkDigest(e.Digest))
}

// onPlatform appends the part of an entry that is for the wanted platform, if there is one. That is
// the entry itself, if it names this platform or none, or one member of an image index. A member
// gets the annotations of the index's entry, and so its name.
func (im *importer) onPlatform(ctx context.Context, chosen []ocispec.Descriptor, e ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	want := im.opts.Platform
	switch {
	case want == nil:
		return append(chosen, e), nil
	case formOf(e.MediaType) != formIndex:
		if e.Platform == nil || fitsPlatform(want, e.Platform) {
			chosen = append(chosen, e)
		}
		return chosen, nil
	}
	m, err := im.peek(ctx, e)
	if err != nil {
		return nil, err
	}
	member, err := choosePlatform(m, want)
	if err != nil {
		return chosen, nil // another entry may be for this platform
	}
	member.Annotations = e.Annotations
	return append(chosen, member), nil
}

// chooseMember looks for the digest of Select among the members of image indexes: of those in
// descs, and then of the indexes in each of them. An index that cannot be read is skipped, because
// it was not asked for. seen has the indexes that were read. depth is the number of indexes above
// descs.
//
// Only the parts of descriptors that peek needs are kept while nested indexes are read: see
// [importer.read].
func (im *importer) chooseMember(ctx context.Context, descs []ocispec.Descriptor, depth int, seen map[digest.Digest]bool) ([]ocispec.Descriptor, error) {
	for _, d := range descs {
		if formOf(d.MediaType) != formIndex || checkDescriptor(&d) != nil || seen[d.Digest] || depth > MaxIndexNesting {
			continue
		}
		seen[d.Digest] = true
		m, err := im.peek(ctx, d)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			continue
		}
		var nested []ocispec.Descriptor
		for _, member := range m.doc.Manifests {
			if string(member.Digest) == im.opts.Select && formOf(member.MediaType) != 0 {
				member.Annotations = nil // they describe the member within its index
				return []ocispec.Descriptor{member}, nil
			}
			if formOf(member.MediaType) == formIndex {
				nested = append(nested, ocispec.Descriptor{MediaType: member.MediaType, Digest: member.Digest, Size: member.Size, Data: member.Data})
			}
		}
		if found, err := im.chooseMember(ctx, nested, depth+1, seen); found != nil || err != nil {
			return found, err
		}
	}
	return nil, nil
}

// An Inspection lists the content of a layout directory or archive by its index.json and its file
// names. Nothing of it is verified.
type Inspection struct {
	Entries []InspectedEntry // in the order of index.json
	Blobs   int              // files named by a digest
	Bytes   int64            // total size of these files
}

// An InspectedEntry is one entry of an index.json.
type InspectedEntry struct {
	Name       string    // the annotation org.opencontainers.image.ref.name, unchanged
	Reference  Reference // the full name that the entry claims; zero if it has none
	Descriptor ocispec.Descriptor
}

func newInspection(entries []ocispec.Descriptor) *Inspection {
	in := &Inspection{}
	for _, e := range entries {
		name := e.Annotations[ocispec.AnnotationRefName]
		in.Entries = append(in.Entries, InspectedEntry{Name: name, Reference: entryClaim(e).ref, Descriptor: e})
	}
	return in
}
