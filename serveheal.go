package ocilocal

import (
	"errors"

	"github.com/opencontainers/go-digest"
)

// How a mirror heals.
//
// The problem: a file of the registry can become damaged. Clients then get errors until somebody
// calls Repair, although the upstream has the content.
//
// The rule: whoever finds that content has the wrong bytes or the wrong size fetches it again, as
// if it were absent. The damaged file stays until good bytes are here. They then replace it in one
// step: see [stage.link]. A file that cannot be read is not damaged: the next read may succeed.
//
// It is safe because a fetch looks at the file again and fetches nothing if it is good by now, and
// because only bytes with the right digest replace a file that was just found damaged. So clients,
// other processes and Repair may heal the same file at the same time. If the upstream fails,
// nothing has changed.

// heals reports whether an error means that a mirror should fetch the content, again or for the
// first time.
func (x *exchange) heals(err error) bool {
	return x.upstream != nil && (errors.Is(err, ErrNotFound) || saysDamaged(err))
}

// noteDamage logs an error if it says that content is damaged: whoever runs the server should look
// at the disk.
func (x *exchange) noteDamage(d digest.Digest, err error) {
	if saysDamaged(err) {
		x.registry.opts.Logger.Warn("ocilocal: damaged content is fetched again", "digest", d, "error", err)
	}
}

// notHealed chooses the answer if damaged content could not be fetched again. What the upstream
// does not have is damaged, and not unknown.
func notHealed(damage, failed error) error {
	if errors.Is(failed, ErrNotFound) && saysDamaged(damage) {
		return damage
	}
	return failed
}

// healing reports whether the blob of the path is being fetched. If it is here nevertheless, its
// file may be damaged.
func (x *exchange) healing() bool {
	u := x.upstream
	if u == nil {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.fetches[blobKey(x.repo, x.digest)] != nil
}

// healSent fetches a blob again that turned out to be damaged while it was being sent. The answer
// is lost. It breaks off afterwards, so that the client's next request finds good bytes.
func (x *exchange) healSent(damage error) {
	if !x.heals(damage) {
		return
	}
	if err := x.fetch(x.digest); err != nil && x.r.Context().Err() == nil {
		x.registry.opts.Logger.Error("ocilocal: a damaged blob could not be fetched again", "digest", x.digest, "error", err)
	}
}
