package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// There are two ways down from a manifest to what it needs:
//
//	closure   by the manifests' bytes, which are read and verified: for exports and pushes, since
//	          content that leaves the registry must be right even if the index is damaged
//	descent   by the index's rows, which is much faster: for the checks of publishing and upkeep
//
// graphup.go has the way up.

// A closure gathers all that some artifacts need, each manifest and each blob once. It keeps
// descriptors only, so its size does not grow with the size of the manifests.
type closure struct {
	registry  *LocalRegistry
	manifests []ocispec.Descriptor // children before parents
	blobs     []ocispec.Descriptor // configs and layers, whose files were not looked for
	seen      map[digest.Digest]bool
}

func (r *LocalRegistry) newClosure() closure {
	return closure{registry: r, seen: map[digest.Digest]bool{}}
}

// add adds a manifest with all that it needs, and returns it.
//
// Errors:
//   - [ErrTooLarge] for indexes nested too deep, or an artifact of more than [MaxClosure] blobs
//   - [ErrNotFound] for a manifest that is not here
//   - those of readVerified
func (c *closure) add(ctx context.Context, desc ocispec.Descriptor) (*Manifest, error) {
	return c.down(ctx, desc, 0, len(c.seen)+MaxClosure)
}

// down is add for a manifest at a depth of nesting. most bounds the size of seen: MaxClosure more
// than before the artifact, because a closure of several artifacts may be larger.
func (c *closure) down(ctx context.Context, desc ocispec.Descriptor, depth, most int) (m *Manifest, err error) {
	if depth > MaxIndexNesting {
		return nil, fmt.Errorf("%w: image indexes nested more than %d deep", ErrTooLarge, MaxIndexNesting)
	}
	m, err = c.registry.readVerified(ctx, desc)
	if err != nil || c.seen[desc.Digest] {
		return m, err
	}
	c.seen[desc.Digest] = true
	defer func() {
		if err != nil { // it is not in the closure
			delete(c.seen, desc.Digest)
		}
	}()
	for i, child := range m.children() {
		if c.seen[child.Digest] {
			continue
		}
		if len(c.seen) >= most {
			return nil, fmt.Errorf("%w: an artifact of more than %d blobs", ErrTooLarge, MaxClosure)
		}
		if m.childRole(i) == roleManifest || foreignLayer(child.MediaType) {
			absent, err := isAbsent(c.registry.index, child.Digest, m.childRole(i))
			if err != nil {
				return nil, err
			}
			if absent {
				c.seen[child.Digest] = true // and in neither list
				continue
			}
		}
		if m.childRole(i) == roleManifest {
			if _, err := c.down(ctx, child, depth+1, most); err != nil {
				return nil, err
			}
			continue
		}
		c.seen[child.Digest] = true
		c.blobs = append(c.blobs, child)
	}
	c.manifests = append(c.manifests, desc)
	return m, nil
}

// addReferrer adds a referrer with everything that it needs. A referrer is kept, not needed: a file
// of it may be missing. Then addReferrer reports false, and the closure stays as it was.
//
// Errors are those of add, except [ErrNotFound], and those of checkSize.
func (c *closure) addReferrer(ctx context.Context, desc ocispec.Descriptor) (here bool, err error) {
	manifests, blobs := len(c.manifests), len(c.blobs)
	_, err = c.add(ctx, desc)
	for _, b := range c.blobs[blobs:] {
		if err == nil {
			err = c.registry.blobs.checkSize(b.Digest, b.Size)
		}
	}
	if err == nil {
		return true, nil
	}
	for _, d := range slices.Concat(c.manifests[manifests:], c.blobs[blobs:]) {
		delete(c.seen, d.Digest)
	}
	c.manifests, c.blobs = c.manifests[:manifests], c.blobs[:blobs]
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return false, err
}

// A descent goes down, by the index's rows, from manifests to all that they need. With subjects it
// also goes to their subjects and to all that these need. It meets each digest once, however many
// calls of each lead to it.
type descent struct {
	q        queryer
	subjects bool
	// lacked says which members that are recorded as absent are visited too. Nil: none.
	lacked func(member) bool
	seen   map[digest.Digest]bool
}

// each visits the content to which root leads and which this descent has not met before, root
// first. Of a subject only the digest is known, so its size is −1. visit may query, because no
// rows are open meanwhile. A chain of subjects may be very long, so each keeps a list and does
// not recurse.
func (w *descent) each(ctx context.Context, root ocispec.Descriptor, visit func(ocispec.Descriptor) error) error {
	meet := func(d ocispec.Descriptor) (first bool, err error) {
		if w.seen[d.Digest] {
			return false, nil
		}
		if w.seen == nil {
			w.seen = map[digest.Digest]bool{}
		}
		w.seen[d.Digest] = true
		return true, visit(d)
	}
	for todo := []ocispec.Descriptor{root}; len(todo) > 0; {
		m := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if err := ctx.Err(); err != nil {
			return err
		}
		if first, err := meet(m); !first || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		if err := members(w.q, m.Digest, func(c member) error {
			if c.absent && (w.lacked == nil || !w.lacked(c)) {
				return nil
			}
			if c.role == roleManifest {
				todo = append(todo, c.desc)
				return nil
			}
			_, err := meet(c.desc)
			return err
		}); err != nil {
			return err
		}
		if !w.subjects {
			continue
		}
		subject, err := subjectOf(w.q, m.Digest)
		if err != nil {
			return err
		}
		if subject != "" {
			todo = append(todo, ocispec.Descriptor{Digest: subject, Size: -1})
		}
	}
	return nil
}
