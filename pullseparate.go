package ocilocal

import (
	"context"

	"github.com/opencontainers/go-digest"
)

// maxOwnerWalk bounds how many manifests are looked at to find the owners of a blob. A blob that
// more manifests share is fetched again, which costs its download and nothing else.
const maxOwnerWalk = 1000

// ownedBy reports whether a ref of a registry host leads to d: it points at d, or at a manifest
// that needs d.
//
// Under [Options.SeparateRegistries] this decides whether a pull from host may use content that is
// here. A digest alone proves nothing: whoever knows the digest of a secret can publish a manifest
// that names it. A pull that took the secret from here would give it a name of that registry, and a
// push under that name would disclose it. A ref of host is proof enough. Under the option such refs
// come from pulls that received every byte from host, or from the user, who has built or tagged the
// content under that name.
func (r *LocalRegistry) ownedBy(ctx context.Context, host string, d digest.Digest) (bool, error) {
	_, named, err := (&climb{ctx: ctx, q: r.index}).all(d, maxOwnerWalk)
	if err != nil {
		return false, err
	}
	for _, d := range named {
		if owned, err := r.index.hasRefUnder(d, host+"/"); owned || err != nil {
			return owned, err
		}
	}
	return false, nil
}
