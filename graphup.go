package ocilocal

import (
	"context"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A climb goes up, by the index's rows, from a digest to the manifests that need it, to those that
// need these, and so on. It answers the question of all upkeep: does a ref lead to this digest?
//
//	ref ──▶ image index ──▶ manifest ──▶ layer       members: needed
//	                           ▲  subject
//	                           └───────── referrer   kept, not needed (see ways)
//
// By the ways, a manifest can also be kept: by its referrers, or by its subject. Kept is not
// needed: a publish makes sure that all members of a manifest are there, but never looks for its
// subject. So the rows of a kept manifest can exist without its file, for example after a
// collector was killed between the two. Such a manifest is dead, and so is content to which only
// it leads. With present a climb takes files into account, and finds that out.
type climb struct {
	ctx context.Context
	q   queryer
	ways
	// protected are digests that count as if a ref pointed at them, if they have files.
	protected []digest.Digest
	// present reports whether a digest has a file. Nil means that all have.
	present func(digest.Digest) (bool, error)

	known map[digest.Digest]bool // the answers of led
}

// led reports whether a ref leads to d. It remembers its answers: if no ref leads to d, none leads
// to any digest above d either, and they are answered too. The answers are of one moment only if q
// is a transaction.
func (c *climb) led(d digest.Digest) (bool, error) {
	if led, ok := c.known[d]; ok {
		return led, nil
	}
	if err := c.ctx.Err(); err != nil {
		return false, err
	}
	// A query for all that leads to d costs as much as there is, and very many artifacts may need the
	// same blob. Members of a manifest are needed whether it has a file or not, so this answer needs
	// no look at files.
	led, err := ledNear(c.q, d, &c.ways)
	if err != nil {
		return false, err
	}
	if led {
		c.remember(true, d)
		return true, nil
	}
	for {
		led, seen, err := c.up(d)
		if err != nil {
			return false, err
		}
		if led && c.present != nil {
			// A manifest without a file does not lead to its subject or its referrers. So climb again
			// without these ways. Each turn finds at least one such manifest more, or it ends.
			more, err := c.look(seen)
			if err != nil {
				return false, err
			}
			if more {
				continue
			}
		}
		if led {
			seen = []digest.Digest{d}
		}
		c.remember(led, seen...)
		return led, nil
	}
}

// remember notes the answer of led for some digests.
func (c *climb) remember(led bool, all ...digest.Digest) {
	if c.known == nil {
		c.known = map[digest.Digest]bool{}
	}
	for _, d := range all {
		c.known[d] = led
	}
}

// up goes up from d until it meets a ref, and returns the digests that it has seen.
func (c *climb) up(d digest.Digest) (led bool, seen []digest.Digest, err error) {
	if err := c.ctx.Err(); err != nil {
		return false, nil, err
	}
	err = above(c.ctx, c.q, d, &c.ways, -1, func(d digest.Digest, ref bool) error {
		seen = append(seen, d)
		if led = ref || slices.Contains(c.protected, d) && !slices.Contains(c.missing, d); led {
			return errStop
		}
		return nil
	})
	return led, seen, err
}

// look adds the digests in seen that have no file to c.missing, and reports whether it found a new
// one.
func (c *climb) look(seen []digest.Digest) (more bool, err error) {
	for _, d := range seen {
		there, err := c.present(d)
		if err != nil {
			return false, err
		}
		if !there && !slices.Contains(c.missing, d) {
			c.missing = append(c.missing, d)
			more = true
		}
	}
	return more, nil
}

// all returns d and all that leads to it, at most limit digests. named are those of them at which a
// ref points. It does not look at files.
func (c *climb) all(d digest.Digest, limit int) (all, named []digest.Digest, err error) {
	if err := c.ctx.Err(); err != nil {
		return nil, nil, err
	}
	err = above(c.ctx, c.q, d, &c.ways, limit, func(d digest.Digest, ref bool) error {
		if len(all) == limit {
			return errStop
		}
		all = append(all, d)
		if ref {
			named = append(named, d)
		}
		return nil
	})
	return all, named, err
}
