package ocilocal

import (
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// SkipEntry is what [ImportOptions.Name] returns to leave an entry out.
//
//lint:ignore ST1012 it is named as [fs.SkipDir] is, which is not an error either
var SkipEntry = errors.New("skip this entry")

// A claim is the name of an entry in an index.json. Nothing proves it. At most one field is set.
type claim struct {
	// ref is the entry's full name: host, repository, and tag or digest. Zero if it has none.
	ref Reference
	// text is a name that is not a full one, such as a tag.
	text string
	// digest is a name that is only a digest. It is a name of the entry if it is the entry's own.
	digest digest.Digest
	// from is the host and repository of other content, such as the image index from which this
	// manifest was taken.
	from string
}

// isOther reports whether the claim names other content than the entry with this digest.
func (c claim) isOther(d digest.Digest) bool {
	return c.from != "" || c.digest != "" && c.digest != d
}

// From an entry to its reference:
//
//	entryClaim   the two annotations → a claim
//	reference    the claim and the options → a Reference
//	  Reference      the caller's name, if the claim allows it or Rename is set
//	  Repository     completes a tag, or the entry's own digest
//	  Name           the caller's function decides
//	  text           is ErrBareName, since no option names the entry
//	  Anonymous      a new name, if there is still none
//	name         refuses two entries of one name, and takes the facts of each entry

// entryClaim returns the claim of an entry. Imports, exports and inspections all use it, so they
// agree about names.
//
// Tools write names in two annotations. org.opencontainers.image.ref.name has no grammar
// (image-spec annotations.md): it may be a full name, a tag, or anything. containerd writes the
// full name to io.containerd.image.name, and to ref.name the part after the repository: "1.0",
// "1.0@sha256:…", "@sha256:…" or nothing. So:
//
//   - a full name in ref.name counts;
//   - else one in image.name counts, unless ref.name is another tag;
//   - else ref.name is a digest, or a text that names nothing here.
//
// A name can end in a digest other than the entry's: podman and skopeo write the digest of the
// image index to the entry of one platform. Such a name says where the content came from. It is not
// a name of the entry, unless it has a tag too: then the tag counts.
func entryClaim(e ocispec.Descriptor) claim {
	name, image := e.Annotations[ocispec.AnnotationRefName], e.Annotations[annotationImageName]
	if c, full := fullName(name, e.Digest); full {
		return c
	}
	if c, full := fullName(image, e.Digest); full {
		tag, _, _ := strings.Cut(name, "@")
		if tag == "" || tag == c.ref.Tag() || checkDigest(digest.Digest(name)) == nil {
			return c
		}
	}
	if name == "" {
		name = image
	}
	if d := digest.Digest(strings.TrimPrefix(name, "@")); checkDigest(d) == nil {
		return claim{digest: d}
	}
	return claim{text: name}
}

// fullName returns the claim of a full name. A full name has all parts: a host, a repository, and a
// tag or digest. [ParseReference] also accepts short names and completes them by Docker Hub's
// rules. Here that would be wrong: the text release/v1 of some index.json is not an artifact of
// Docker Hub.
func fullName(name string, d digest.Digest) (c claim, full bool) {
	host, rest, ok := strings.Cut(name, "/")
	if !ok || !isHost(host) || !strings.ContainsAny(rest, ":@") {
		return claim{}, false
	}
	ref, err := parseLegacyName(name)
	switch {
	case err != nil:
		return claim{}, false
	case ref.tag != "":
		ref.digest = ""
	case ref.digest != d:
		return claim{from: ref.Name()}, true
	}
	return claim{ref: ref}, true
}

// parseLegacyName is [ParseReference] that also accepts a digest after ':', as OMMX v2 writes it.
func parseLegacyName(name string) (Reference, error) {
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		if before, hex, ok := strings.Cut(name, ":"+string(alg)+":"); ok {
			name = before + "@" + string(alg) + ":" + hex
		}
	}
	return ParseReference(name)
}

// tag returns the claim's text if that is a tag, and "" otherwise. A digest after it is ignored, as
// in a full name.
func (c claim) tag() string {
	tag, _, _ := strings.Cut(c.text, "@")
	if isBareTag(tag) {
		return tag
	}
	return ""
}

// allows reports whether content with this claim may get the name want although
// [ImportOptions.Rename] is not set. Content without a name may get any. A tag may get any
// repository with this tag. Otherwise the names must agree.
func (c claim) allows(want Reference) bool {
	switch {
	case c.text != "":
	case c.from != "":
		return c.from == want.Name()
	case c.ref.Tag() == "": // nothing, or a digest, which [LocalRegistry.publish] checks
		return c.ref.IsZero() || c.ref.Name() == want.Name()
	default:
		return agree(c.ref, want)
	}
	if tag := c.tag(); tag != "" {
		return tag == want.Tag()
	}
	loose, err := parseLegacyName(c.text) // without a host too
	return err == nil && agree(loose, want)
}

// agree reports whether two references can mean the same content: they have the same host and
// repository, and want has no other tag. If want has a digest only, publish compares it with the
// content.
func agree(named, want Reference) bool {
	return named.Name() == want.Name() &&
		(want.Tag() == "" || named.Tag() == want.Tag() || named.Digest() != "" && named.Digest() == want.Digest())
}

// A namedEntry is an entry of an index.json with the reference that it gets here.
type namedEntry struct {
	ocispec.Descriptor
	ref   Reference // zero for none
	facts string    // the text of entryFacts
}

// name gives each entry its reference. Entries that [ImportOptions.Name] leaves out are returned as
// skipped. Two entries of one name and different digests are an error: whichever was imported, the
// other one would be lost. The same manifest twice under one name is harmless.
func (im *importer) name(entries []ocispec.Descriptor) (named []namedEntry, skipped []ocispec.Descriptor, err error) {
	at := map[Reference]digest.Digest{}
	for _, e := range entries {
		ref, err := im.reference(e)
		if err == SkipEntry {
			skipped = append(skipped, e)
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		if d, twice := at[ref]; twice && !ref.IsZero() && d != e.Digest {
			return nil, nil, fmt.Errorf("%w: two entries of index.json are called %s: %s and %s (ImportOptions.Platform or Select chooses one, AsIndex imports them as one image)",
				ErrInvalidArgument, ref, d, e.Digest)
		}
		at[ref] = e.Digest
		facts, err := factsOf(e, ref, im.opts.IgnoreNames).text()
		if err != nil {
			return nil, nil, fmt.Errorf("%w: index.json: entry %s: %w", ErrInvalidLayout, e.Digest, err)
		}
		named = append(named, namedEntry{e, ref, facts})
	}
	return named, skipped, nil
}

// reference returns the reference that one entry gets here; zero for none.
func (im *importer) reference(e ocispec.Descriptor) (ref Reference, err error) {
	o := &im.opts
	c := entryClaim(e)
	if o.IgnoreNames {
		c = claim{}
	}
	if want := o.Reference; !want.IsZero() {
		if !o.Rename && !c.allows(want) {
			return ref, fmt.Errorf("%w: the content is named %s, not %s (ImportOptions.Rename overrides)",
				ErrInvalidArgument, printable(c.String()), want)
		}
		return want, nil
	}
	ref = c.ref
	if o.Repository != "" {
		if tag := c.tag(); tag != "" {
			ref, err = ParseReference(o.Repository + ":" + tag)
		} else if c.digest == e.Digest {
			ref, err = ParseReference(o.Repository + "@" + string(c.digest))
		}
		if err != nil {
			return Reference{}, err
		}
	}
	switch {
	case o.Name != nil:
		if ref, err = o.Name(InspectedEntry{Name: e.Annotations[ocispec.AnnotationRefName], Reference: ref, Descriptor: cloneDescriptor(e)}); err != nil {
			return Reference{}, err
		}
	case ref.IsZero() && c.text != "" && !o.Anonymous:
		return ref, fmt.Errorf("%w: %s (ImportOptions: Repository names all entries with a tag, Reference names one, Anonymous makes up names, IgnoreNames imports by digest)",
			ErrBareName, printable(c.text))
	}
	if ref.IsZero() && (o.Anonymous || o.mustName) {
		return im.registry.anonymousReference(o.PublishOptions)
	}
	return ref, nil
}

// String returns the claim for messages. It is not safe to print as it is: text comes from outside.
func (c claim) String() string {
	switch {
	case c.text != "":
		return c.text
	case c.digest != "":
		return string(c.digest)
	case c.from != "":
		return c.from
	}
	return c.ref.String()
}

// checkNames refuses options about names that contradict each other.
func (o *ImportOptions) checkNames() error {
	if o.Repository != "" {
		if _, err := canonicalName(o.Repository); err != nil {
			return fmt.Errorf("ImportOptions.Repository: %w", err)
		}
	}
	switch {
	case !o.Reference.IsZero() && (o.Repository != "" || o.Name != nil):
		return fmt.Errorf("%w: ImportOptions.Reference leaves nothing for Repository and Name to decide", ErrInvalidArgument)
	case o.IgnoreNames && o.Repository != "":
		return fmt.Errorf("%w: ImportOptions.Repository needs the tags that IgnoreNames ignores", ErrInvalidArgument)
	case o.AsIndex && (o.Select != "" || o.Platform != nil || o.Repository != "" || o.Name != nil || o.Referrers):
		return fmt.Errorf("%w: ImportOptions.AsIndex imports all entries as one, so no option can choose or name them", ErrInvalidArgument)
	}
	return nil
}
