package ocilocal

import (
	"context"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A climb goes up, by the index's rows, from a digest to what leads to it: the manifests that need
// it, what needs these, and so on. It answers the question whether a ref leads to a digest, which
// all of upkeep asks.
//
// A manifest can also be kept, by what refers to it or, with referrers, by what it refers to. Kept
// is not needed: a publish makes sure that what a manifest needs is there, but never looks for its
// subject. So rows of a kept manifest can be left without a file, as by a collector that was killed
// between the two. Such a manifest is dead, and so is what only it leads to. With present a climb
// tells these apart.
type climb struct {
	ctx context.Context
	q   queryer
	ways
	// protected are digests that count as if a ref pointed at them, where their files are there.
	protected []digest.Digest
	// present reports whether a file is there. Nil means that all are.
	present func(digest.Digest) (bool, error)

	known map[digest.Digest]bool // what led has answered
}

// led reports whether a ref leads to d. If none does, none leads to any of what leads to d either.
// All that it finds out it remembers: the answers are of one moment only where q is a transaction.
func (c *climb) led(d digest.Digest) (bool, error) {
	if led, ok := c.known[d]; ok {
		return led, nil
	}
	for {
		led, seen, err := c.up(d)
		if err != nil {
			return false, err
		}
		if led && c.present != nil {
			// Each manifest without a file takes a way out of the graph, so look again without
			// these.
			more, err := c.look(seen)
			if err != nil {
				return false, err
			}
			if more {
				continue
			}
		}
		if c.known == nil {
			c.known = map[digest.Digest]bool{}
		}
		if led {
			seen = []digest.Digest{d}
		}
		for _, d := range seen {
			c.known[d] = led
		}
		return led, nil
	}
}

// up goes up from d until it meets a ref, and returns what it has seen.
func (c *climb) up(d digest.Digest) (led bool, seen []digest.Digest, err error) {
	if err := c.ctx.Err(); err != nil {
		return false, nil, err
	}
	err = above(c.ctx, c.q, d, &c.ways, func(d digest.Digest, ref bool) error {
		seen = append(seen, d)
		if led = ref || slices.Contains(c.protected, d) && !slices.Contains(c.missing, d); led {
			return errStop
		}
		return nil
	})
	return led, seen, err
}

// look notes what of seen has no file, and reports whether it found any that it didn't know.
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

// all returns d and all that leads to it, at most limit digests, and which of them refs point at.
func (c *climb) all(d digest.Digest, limit int) (all, named []digest.Digest, err error) {
	if err := c.ctx.Err(); err != nil {
		return nil, nil, err
	}
	err = above(c.ctx, c.q, d, &c.ways, func(d digest.Digest, ref bool) error {
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
