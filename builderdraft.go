package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A draft is a manifest that is being built: the part that [Builder] and [IndexBuilder] share.
type draft struct {
	mu     sync.Mutex // guards what follows
	spec   manifestSpec
	done   bool      // built or cancelled
	update RefUpdate // the outcome of Build
}

// start checks the name and the artifact type of a new draft, and sets the type.
func (d *draft) start(ref Reference, artifactType string) error {
	if ref.Digest() != "" {
		return fmt.Errorf("%w: %s has a digest, which is known only after the build", ErrInvalidReference, ref)
	}
	if artifactType != "" {
		if err := checkTypeName("artifact type", artifactType); err != nil {
			return err
		}
	}
	d.spec.artifactType = artifactType
	return nil
}

// change calls fn, which changes the spec, with mu held. It returns [ErrClosed] if the draft is
// done.
func (d *draft) change(fn func(*manifestSpec)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done {
		return ErrClosed
	}
	fn(&d.spec)
	return nil
}

// isDone reports whether the manifest was built or cancelled.
func (d *draft) isDone() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.done
}

// setAnnotation is SetAnnotation of both builders.
func (d *draft) setAnnotation(key, value string) error {
	if err := checkAnnotation(key, value); err != nil {
		return err
	}
	return d.change(func(spec *manifestSpec) {
		if spec.annotations == nil {
			spec.annotations = map[string]string{}
		}
		spec.annotations[key] = value
	})
}

// setSubject is SetSubject of both builders.
func (d *draft) setSubject(desc ocispec.Descriptor) error {
	if err := checkPlaceable(&desc); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidManifest, err)
	}
	desc = cloneDescriptor(desc)
	return d.change(func(spec *manifestSpec) { spec.subject = &desc })
}

// publish publishes the manifest, whose bytes and blobs are in the stage. If it returns nil, the
// draft is done. The caller holds mu.
func (d *draft) publish(ctx context.Context, r *LocalRegistry, st *stage, p publication) error {
	updates, err := r.publish(ctx, st, []publication{p})
	if err != nil {
		return err
	}
	d.update = updates[0]
	if err := d.update.conflict(p.Expected); err != nil {
		return err
	}
	d.done = true
	return nil
}

// outcome returns the update of the last publish.
func (d *draft) outcome() RefUpdate {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.update
}

// checkAnnotation refuses an annotation that a manifest cannot have. The builders check each part
// when it is given, so that Build does not fail for a mistake that cannot be taken back.
func checkAnnotation(key, value string) error {
	_, err := canonicalAnnotations(map[string]string{key: value})
	if key == "" {
		err = errors.New("key is empty")
	}
	if err != nil {
		return fmt.Errorf("%w: annotation: %w", ErrInvalidArgument, err)
	}
	return nil
}

// checkPlaceable refuses a descriptor that a manifest cannot have. Building and parsing a manifest
// with it applies the same rules as Build, so the two never disagree.
func checkPlaceable(desc *ocispec.Descriptor) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	_, err := buildManifest(FormatArtifactManifest, manifestSpec{artifactType: ArtifactTypeOMMX, subject: desc})
	return err
}

// checkTypeName refuses a text that is not a media type (RFC 6838, section 4.2). Only builders
// check this: manifests by other tools may have other texts, and are accepted.
func checkTypeName(field, s string) error {
	const longest = 127 // on either side of the '/'
	top, sub, _ := strings.Cut(s, "/")
	for _, name := range []string{top, sub} {
		bad := name == "" || len(name) > longest
		for i, c := range []byte(strings.ToLower(name)) {
			bad = bad || !isLowerAlnum(c) && (i == 0 || strings.IndexByte("!#$&-^_.+", c) < 0)
		}
		if bad {
			return fmt.Errorf("%w: %s: %s is not of the form type/subtype (RFC 6838, section 4.2)", ErrInvalidArgument, field, printable(s))
		}
	}
	return nil
}
