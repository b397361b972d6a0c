package ocilocal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A sharedFetch brings one manifest or blob from the upstream, for all requests that want it.
//
// Like a [sharedPull] it belongs to no request: it runs until it is done, until the last request that
// waits for it has left, or until the registry is closed. So a client that goes away ends nothing for
// the others.
//
// The requests for a large blob do not wait for its end. The bytes are in a file below tmp/ as soon
// as they have arrived, and each request reads that file with a [follower] while it grows. The bytes
// may still turn out to be wrong, and a second attempt may overwrite them. So each request hashes
// what it sends, and keeps the last byte back until its own bytes have the right digest and the
// fetch has succeeded. A request for a range reads and hashes the whole file as well, and sends its
// part of it. So its last byte waits for the end of the blob, but its client hears at once that there
// is an answer, and a client that wants the rest of a blob gets it while it arrives.
type sharedFetch struct {
	u        *upstream
	key      string
	cancel   context.CancelFunc
	waiting  int // requests; guarded by upstream.mu
	done     chan struct{}
	err      error              // set before done is closed
	manifest ocispec.Descriptor // likewise: what was fetched, unless it is a blob or nothing is new
	content  []byte             // of the manifest

	began chan struct{} // closed when the first bytes have been written
	mu    sync.Mutex
	more  chan struct{} // closed when more bytes have been written; guarded by mu
}

// join returns the fetch with that key, or starts one that does work. The caller must leave it.
func (u *upstream) join(ctx context.Context, key string, work func(context.Context, *sharedFetch) error) (*sharedFetch, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.fetches[key]; f != nil {
		f.waiting++
		return f, nil
	}
	end, err := u.registry.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	f := &sharedFetch{u: u, key: key, cancel: func() { cancel(nil) }, waiting: 1, done: make(chan struct{}), began: make(chan struct{})}
	f.more = f.began
	u.fetches[key] = f
	go func() {
		select {
		case <-u.registry.closing:
			cancel(ErrClosed)
		case <-own.Done():
		}
	}()
	go func() {
		defer end()
		settle(func() error {
			err := work(own, f)
			if err != nil && context.Cause(own) == ErrClosed {
				err = ErrClosed
			}
			return err
		}, f.end)
	}()
	return f, nil
}

// end wakes the requests.
func (f *sharedFetch) end(err error) {
	f.u.mu.Lock()
	f.forget()
	f.u.mu.Unlock()
	f.err = err
	f.cancel()
	close(f.done)
}

// forget lets the next request begin again. The caller holds upstream.mu.
func (f *sharedFetch) forget() {
	if f.u.fetches[f.key] == f {
		delete(f.u.fetches, f.key)
	}
}

// leave says that a request needs the fetch no more. The last one ends it.
func (f *sharedFetch) leave() {
	f.u.mu.Lock()
	f.waiting--
	last := f.waiting == 0
	if last {
		f.forget()
	}
	f.u.mu.Unlock()
	if last {
		f.cancel()
	}
}

// wait returns when the fetch is done, with its error, or when ctx ends.
func (f *sharedFetch) wait(ctx context.Context) error {
	select {
	case <-f.done:
		raise(f.err)
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// grown says that more bytes of the blob are in its file.
func (f *sharedFetch) grown() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.more)
	f.more = make(chan struct{})
}

// growth returns a channel that is closed when more bytes are in the file than now.
func (f *sharedFetch) growth() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.more
}

// A wantedBlob is a blob that manifests of a repository name, and that is not here.
type wantedBlob struct {
	digest digest.Digest
	role   role
	// sizes are what manifests of the registry state. One of them may lie, so all are tried.
	sizes []int64
}

// wanted returns what the manifests say of a blob that the repository shows.
//
// Errors: [ErrNotFound] for another blob, and for a manifest.
func (p *Repository) wanted(d digest.Digest) (*wantedBlob, error) {
	b := &wantedBlob{digest: d}
	var err error
	if b.role, b.sizes, err = statedSizes(p.registry.index, d); err != nil {
		return nil, err
	}
	ok := len(b.sizes) > 0
	if ok {
		ok, err = p.shows(p.registry.index, d)
	}
	if err == nil && !ok {
		err = fmt.Errorf("%s in %s: %w", d, p.name, ErrNotFound)
	}
	return b, err
}

// blobKey is the key of a blob's fetch.
func blobKey(p *Repository, d digest.Digest) string { return "blob " + p.name + "@" + string(d) }

// fetchBlob joins the fetch of a blob.
func (u *upstream) fetchBlob(ctx context.Context, p *Repository, b *wantedBlob) (*sharedFetch, error) {
	return u.join(ctx, blobKey(p, b.digest), func(ctx context.Context, f *sharedFetch) (err error) {
		src, err := u.source(p, string(b.digest))
		if err != nil {
			return err
		}
		st := u.registry.blobs.newStage()
		defer func() { u.registry.logDiscard(st.discard()) }()
		from := &fetcher{registry: u.registry, repo: src, ref: src.ref, stage: st, grown: f.grown}
		for _, size := range b.sizes {
			desc := ocispec.Descriptor{MediaType: mediaTypeBlob, Digest: b.digest, Size: size}
			err = fetchFrom(src, func() error { return u.stageBlob(ctx, from, desc) })
			if err == nil {
				return u.registry.fill(ctx, st, desc, b.role)
			}
			if !errors.Is(err, ErrSizeMismatch) {
				break
			}
		}
		return err
	})
}

// stageBlob stages a blob of the upstream. Its file may be here, from a publish that has not come to
// its rows or a collector that was killed.
func (u *upstream) stageBlob(ctx context.Context, from *fetcher, desc ocispec.Descriptor) error {
	if ok, err := from.stage.reuse(ctx, desc.Digest, desc.Size); ok || err != nil {
		return err
	}
	if err := u.charge(desc.Size); err != nil {
		return err
	}
	return from.bring(ctx, desc, roleLayer, nil)
}

// fill makes a staged blob present that was absent or lost. If no manifest names it any more, its
// file is left to collections.
func (r *LocalRegistry) fill(ctx context.Context, st *stage, desc ocispec.Descriptor, as role) error {
	if err := st.settle(ctx, func(d digest.Digest) (bool, error) { return hasBlob(r.index, d) }); err != nil {
		return err
	}
	return r.write(ctx, func(tx *indexTx) error {
		_, sizes, err := statedSizes(tx, desc.Digest)
		if err != nil || len(sizes) == 0 {
			return err
		}
		if err := st.recheck(desc.Digest, desc.Size); err != nil {
			return err
		}
		return tx.putBlob(desc.Digest, desc.Size, as, time.Now())
	})
}

// openAbsent is openBlob for a blob that is not here, or is damaged here. It answers HEAD, returns a
// blob to be followed if that is what the request wants, and otherwise nil when the blob is here.
func (x *exchange) openAbsent() (b *servedBlob, answered bool, err error) {
	ctx := x.r.Context()
	wanted, err := x.repo.wanted(x.digest)
	if err != nil {
		return nil, false, err
	}
	if x.unchanged(x.digest) {
		return nil, true, nil
	}
	size := wanted.sizes[0]
	if x.r.Method == "HEAD" {
		x.w.Header().Set("Accept-Ranges", "bytes")
		x.describe(x.digest, mediaTypeBlob, size)
		x.w.WriteHeader(http.StatusOK)
		return nil, true, nil
	}
	if len(wanted.sizes) == 1 && size >= keepPartial { // a blob that can be followed
		b = &servedBlob{foundBlob: foundBlob{size: size}}
		if err := x.choosePart(b); err != nil {
			return nil, false, err
		}
	}
	f, err := x.upstream.fetchBlob(ctx, x.repo, wanted)
	if err != nil {
		return nil, false, err
	}
	if b != nil {
		// The first bytes say that the upstream has the blob. Before them there can be an answer.
		select {
		case <-f.began:
		case <-f.done:
		case <-ctx.Done():
		}
		if x.follow(f, b) {
			return b, false, nil
		}
	}
	defer f.leave()
	if err := f.wait(ctx); err != nil {
		return nil, false, x.upstreamError(err)
	}
	return nil, false, nil
}

// follow opens the file of a blob that is still being fetched. It reports false if the blob is complete
// or the fetch has failed.
func (x *exchange) follow(f *sharedFetch, b *servedBlob) bool {
	select {
	case <-f.done:
		return false
	default:
	}
	store := x.registry.blobs
	file, err := store.root.OpenFile(path.Join(partialPath(x.digest), partialData), os.O_RDONLY|openNoFollow, 0)
	if err != nil {
		return false
	}
	b.follower = &follower{ctx: x.r.Context(), file: file, fetch: f}
	b.unverified = store.verifier(b.follower.ctx, b.follower, x.digest, b.size)
	x.w.Header().Set("Accept-Ranges", "bytes")
	return true
}

// A follower reads the file of a blob while a fetch writes it.
type follower struct {
	ctx   context.Context
	file  *os.File
	fetch *sharedFetch
	// idle calls wait, which returns when there may be more. Nil only waits.
	idle func(wait func())
}

// Read returns io.EOF at the end of the file if the fetch has succeeded, and otherwise its error.
func (r *follower) Read(p []byte) (int, error) {
	for {
		more, ended := r.fetch.growth(), false
		select {
		case <-r.fetch.done:
			ended = true // so that the next read sees all bytes
		default:
		}
		n, err := r.file.Read(p)
		if n > 0 || err != io.EOF {
			return n, err
		}
		if ended {
			return 0, cmp.Or(r.fetch.err, io.EOF)
		}
		r.idle(func() {
			select {
			case <-more:
			case <-r.fetch.done:
			case <-r.ctx.Done():
			}
		})
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
	}
}

// failed returns the error of the fetch, if that has ended.
func (r *follower) failed() error {
	select {
	case <-r.fetch.done:
		return r.fetch.err
	default:
		return nil
	}
}

// Close leaves the fetch.
func (r *follower) Close() error {
	r.fetch.leave()
	return r.file.Close()
}

// sendFollowed sends a blob while it arrives. What has arrived is not kept back while more is
// awaited, and the client is not blamed for that time.
func (x *exchange) sendFollowed(w *serveWriter, b *servedBlob) error {
	b.follower.idle = func(wait func()) {
		_ = http.NewResponseController(x.w).Flush()
		wait()
		w.stall.begin()
	}
	dst := &partWriter{w: w, skip: b.part.start, left: b.part.length}
	buf := make([]byte, 64<<10)
	if _, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{b.unverified}, buf); err != nil {
		if failed := b.follower.failed(); failed != nil && x.r.Context().Err() == nil {
			x.registry.opts.Logger.Error("ocilocal: a blob that was being sent could not be fetched", "digest", x.digest, "error", failed)
		}
		return err
	}
	_, err := w.Write(dst.last)
	return err
}

// A partWriter writes a part of what it gets, except the last byte of the part, which it keeps.
type partWriter struct {
	w          *serveWriter
	skip, left int64 // bytes before the part, and of it
	last       []byte
}

func (p *partWriter) Write(b []byte) (int, error) {
	n := len(b)
	skipped := min(int64(n), p.skip)
	p.skip -= skipped
	b = b[skipped:]
	b = b[:min(int64(len(b)), p.left)]
	p.left -= int64(len(b))
	if end := len(b) - 1; p.left == 0 && end >= 0 {
		p.last = []byte{b[end]}
		b = b[:end]
	}
	if len(b) == 0 {
		p.w.stall.progress(n) // of the client, who waits
		return n, nil
	}
	_, err := p.w.Write(b)
	return n, err
}

// A need is a config, layer or member of a manifest.
type need struct {
	digest digest.Digest
	role   role
}

// needs returns what the manifest needs. Unlike the manifest, it takes no more memory than the bytes.
func (m *Manifest) needs() []need {
	var all []need
	for i, c := range m.children() {
		all = append(all, need{c.Digest, m.childRole(i)})
	}
	return all
}

// complete fetches what a pushed manifest needs and what is absent here: HEAD has told the client
// that it is here. The members of an image index are completed, too. If the repository has that
// index already, its absent members stay absent, and so do those of an index below it. If the
// upstream does not have something, complete goes on: the publish decides whether it may be absent.
//
// The result is the members that stay absent. The publish must not ask again which they are: while
// complete waits for the upstream, another client may fetch the manifest of one of them, and not
// its layers. So a push is judged by one look at each member. A member that was absent then may be
// absent, whatever has come of it since, as if the push had been before that fetch. A member that
// was here is complete in the end, or the publish refuses it. Collections keep it meanwhile, because
// something in the repository leads to it.
func (x *exchange) complete(d digest.Digest, needs []need) (lacked map[digest.Digest]bool, err error) {
	ctx, q := x.r.Context(), x.registry.index
	known, err := x.repo.has(d)
	if err != nil {
		return nil, err
	}
	lacked = map[digest.Digest]bool{}
	down := descent{q: q, lacked: func(c member) bool {
		if c.role == roleManifest {
			lacked[c.desc.Digest] = true
		}
		return c.role != roleManifest
	}}
	for _, c := range needs {
		if c.role != roleManifest {
			if err := x.bring(c.digest); err != nil {
				return nil, err
			}
			continue
		}
		if known {
			absent, err := isAbsent(q, c.digest, roleManifest)
			if err != nil {
				return nil, err
			}
			if absent {
				lacked[c.digest] = true
				continue
			}
		}
		member, err := x.repo.manifest(q, c.digest)
		if errors.Is(err, ErrNotFound) { // the index is new, or a layer elsewhere has the bytes
			member, err = x.bringManifest(c.digest)
		}
		if err == nil {
			err = down.each(ctx, member, func(d ocispec.Descriptor) error { return x.bring(d.Digest) })
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	if !known { // what a new index names must be here, even if an index below it lacks it
		for _, c := range needs {
			delete(lacked, c.digest)
		}
	}
	return lacked, nil
}

// bring fetches a config or layer that is absent. It does nothing if the repository has it, or if
// neither a manifest of the repository nor the upstream knows it.
func (x *exchange) bring(d digest.Digest) error {
	_, err := x.find(d, true)
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	if err = x.fetch(d); errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// fetch fetches a config or layer that manifests of the repository name, and waits for it.
func (x *exchange) fetch(d digest.Digest) error {
	wanted, err := x.repo.wanted(d)
	if err != nil {
		return err
	}
	f, err := x.upstream.fetchBlob(x.r.Context(), x.repo, wanted)
	if err == nil {
		err = f.wait(x.r.Context())
		f.leave()
	}
	if err != nil {
		err = x.upstreamError(err)
	}
	return err
}

// bringManifest fetches a manifest, without what it needs.
func (x *exchange) bringManifest(d digest.Digest) (ocispec.Descriptor, error) {
	ref, err := x.repo.reference(string(d))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if _, _, err := x.pullManifest(x.r.Context(), ref, ""); err != nil {
		return ocispec.Descriptor{}, x.upstreamError(err)
	}
	return x.repo.manifest(x.registry.index, d)
}
