package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A fetcher brings manifests and blobs from one repository into a stage.
type fetcher struct {
	registry *LocalRegistry
	repo     *remoteRepo
	ref      Reference // for messages
	stage    *stage
	received atomic.Int64 // bytes of blobs
	// grown, if not nil, is called when bytes of a large blob have been written to the file of its
	// partial, by this transfer or by the one that it waits for.
	grown func()
}

// fetch stages one blob or manifest. If the registry itself says that it does not have it, the error
// is also [ErrIncomplete].
func (p *fetcher) fetch(ctx context.Context, desc ocispec.Descriptor, as role, item *meteredItem) error {
	err := p.bring(ctx, desc, as, item)
	if absent, certain := p.repo.saysAbsent(err); absent && certain {
		err = incomplete(err)
	}
	return err
}

func (p *fetcher) bring(ctx context.Context, desc ocispec.Descriptor, as role, item *meteredItem) (err error) {
	if err := checkDigest(desc.Digest); err != nil {
		return err
	}
	if as == roleManifest {
		m, err := p.repo.manifest(ctx, string(desc.Digest), desc.MediaType)
		if err != nil {
			return err
		}
		_, err = p.stage.putBytes(ctx, m.raw, desc.Digest.Algorithm())
		return err
	}
	if desc.Size < keepPartial {
		return p.fetchWhole(ctx, desc, item)
	}
	part, err := p.partial(ctx, desc)
	if err != nil {
		return err
	}
	if p.stage.has(desc.Digest) {
		item.skip()
		return nil
	}
	if part == nil {
		return p.fetchWhole(ctx, desc, item)
	}
	defer func() { err = errors.Join(err, part.close()) }() // frees its lock, even if a function of the caller panics
	if part.kept > 0 && p.registry.opts.SeparateRegistries {
		// It is not known which registry sent these bytes, and this one must send all of them.
		err := p.fetchWhole(ctx, desc, item)
		if err == nil {
			part.have = 0 // close removes it
		}
		return err
	}
	return p.resume(ctx, desc, part, item)
}

// partial opens the bytes that an earlier transfer of a large blob left, and locks them. If another
// transfer of the blob is under way, in this process or another one, partial waits for the lock.
// The bytes that the other transfer has received then count here, too. That transfer may end in
// three ways:
//
//   - It has published the blob. Then the blob is staged from the store, and partial returns nil.
//   - It has the whole blob and is busy with other blobs. Then the file is hashed and used.
//   - It has failed, or was killed, which frees the lock. Then this transfer goes on where it
//     stopped.
//
// If the other transfer receives nothing for the stall timeout, partial returns nil, too. Then the
// blob must be fetched without keeping it. No transfer waits while it holds a lock, so none waits
// for ever.
func (p *fetcher) partial(ctx context.Context, desc ocispec.Descriptor) (*partial, error) {
	limit := cmp.Or(max(p.repo.remote.StallTimeout, 0), time.Minute)
	deadline, size := time.Now().Add(limit), int64(-1)
	waited, looked := false, false
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		part, err := p.stage.openPartial(ctx, desc.Digest, desc.Size)
		if err != nil || part != nil && part.have > 0 || p.registry.opts.SeparateRegistries {
			return part, err
		}
		// A file that turns out to be damaged is not hashed again with each turn.
		if waited && (part != nil || !looked) && p.registry.blobs.checkSize(desc.Digest, desc.Size) == nil {
			looked = true
			if ok, err := p.stage.reuse(ctx, desc.Digest, desc.Size); ok || err != nil {
				if part != nil {
					err = errors.Join(err, part.close())
				}
				return nil, err
			}
		}
		if part != nil {
			return part, nil
		}
		waited = true
		if now := p.stage.partialSize(desc.Digest); now != size {
			deadline, size = time.Now().Add(limit), now
			if p.grown != nil && now > 0 {
				p.grown()
			}
		}
		if time.Now().After(deadline) {
			return nil, nil
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, ctx.Err()
		case <-t.C:
		}
	}
}

// keepPartial is the size from which on the bytes of a blob outlive an interrupted pull. Smaller
// blobs cost less to fetch again than a directory and a lock for each.
const keepPartial = 1 << 20

// fetchWhole fetches a blob, in each attempt from its beginning: first from the mirrors, once each,
// then from the registry, as often as the retry policy says.
func (p *fetcher) fetchWhole(ctx context.Context, desc ocispec.Descriptor, item *meteredItem) error {
	answered, err := p.repo.viaMirrors(ctx, false, func(mirror *remoteRepo) error { return p.fetchOnce(ctx, mirror, desc, item) })
	if answered || err != nil {
		return err
	}
	for attempt := 1; ; attempt++ {
		err := p.fetchOnce(ctx, p.repo, desc, item)
		if err == nil {
			return nil
		}
		if err := p.repo.again(ctx, attempt, err); err != nil {
			return p.repo.despiteMirrors(err)
		}
	}
}

// fetchOnce makes one attempt to fetch a blob from the registry or a mirror.
func (p *fetcher) fetchOnce(ctx context.Context, from *remoteRepo, desc ocispec.Descriptor, item *meteredItem) error {
	res, _, err := from.blob(ctx, desc, 0)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body := &countedBody{src: res.Body, count: p.count(item, 0), coding: codingOf(res)}
	_, _, err = p.stage.put(ctx, body, "", desc.Digest, desc.Size)
	return from.blobError(ctx, desc, body, err)
}

// resume fetches the rest of a blob. Whenever the blob is a MiB further than ever before, the
// attempts count from one again: a line that breaks now and then does not end a large transfer.
func (p *fetcher) resume(ctx context.Context, desc ocispec.Descriptor, part *partial, item *meteredItem) error {
	item.resume(part.have)
	part.grown = p.grown
	answered, err := p.repo.viaMirrors(ctx, false, func(mirror *remoteRepo) error {
		part.kept = part.have // from elsewhere
		return p.resumeOnce(ctx, mirror, desc, part, item)
	})
	if answered || err != nil {
		return err
	}
	part.kept = part.have
	furthest := part.have
	for attempt := 1; ; attempt++ {
		err := p.resumeOnce(ctx, p.repo, desc, part, item)
		if err == nil {
			return nil
		}
		if part.have >= furthest+keepPartial {
			furthest, attempt = part.have, 1
		}
		if err := p.repo.again(ctx, attempt, err); err != nil {
			return p.repo.despiteMirrors(err)
		}
	}
}

// resumeOnce makes one request for the missing bytes. If the bytes are wrong as a whole, and a part
// of them came from elsewhere, it fetches all of them from this source.
func (p *fetcher) resumeOnce(ctx context.Context, from *remoteRepo, desc ocispec.Descriptor, part *partial, item *meteredItem) error {
	if part.have < part.size {
		if err := p.appendOnce(ctx, from, desc, part, item); err != nil {
			return err
		}
	}
	old := part.kept > 0
	err := part.finish(ctx)
	if old && errors.Is(err, ErrDigestMismatch) { // the bytes of an earlier pull or a mirror may be the wrong ones
		return p.resumeOnce(ctx, from, desc, part, item)
	}
	if errors.Is(err, ErrDigestMismatch) {
		return from.blobProblem(desc, err)
	}
	return err
}

// appendOnce makes one request, and appends the answer to the bytes that are here.
func (p *fetcher) appendOnce(ctx context.Context, from *remoteRepo, desc ocispec.Descriptor, part *partial, item *meteredItem) error {
	res, at, err := from.blob(ctx, desc, part.have)
	if err != nil {
		return unsatisfied(part, err)
	}
	defer res.Body.Close()
	if at != part.have {
		if err := part.reset(); err != nil {
			return err
		}
	}
	body := &countedBody{src: res.Body, count: p.count(item, part.have), coding: codingOf(res)}
	err = part.append(ctx, body)
	if err == nil && part.have < part.size {
		err = io.ErrUnexpectedEOF
	}
	return from.blobError(ctx, desc, body, err)
}

// unsatisfied discards the bytes that are here if a registry says that the missing ones do not
// exist (RFC 9110, section 15.5.17). The next attempt begins at the first byte.
func unsatisfied(part *partial, err error) error {
	if e, ok := errors.AsType[*RemoteError](err); ok && e.Status == 416 && part.have > 0 {
		return errors.Join(part.reset(), &RemoteError{Method: e.Method, URL: e.URL, Status: e.Status, again: true, Err: e.Err})
	}
	return err
}

// count counts the bytes that an attempt receives of a blob from byte at on.
func (p *fetcher) count(item *meteredItem, at int64) func(n int) {
	report := item.from(at)
	return func(n int) {
		p.received.Add(int64(n))
		report(n)
	}
}
