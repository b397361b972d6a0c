package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// archiveBlobs brings the blobs of an archive into an importer's stage. One goroutine reads the
// archive, because a stream has one position. Small blobs are read into memory, and tasks hash,
// compare and write them while it reads on. Large blobs are handled on that goroutine, since they
// must not be in memory.
//
// If the registry has a blob in a good file, the archive's copy is only read: nothing is written or
// synced for it. The copy must hash to its name nevertheless, or an import would accept an archive
// here that it refuses in an empty registry. Whether a blob is needed is known later, since
// index.json may come last. So a copy with other bytes is only noted in im.damaged, and
// [importer.claim] fails if a manifest needs it.
type archiveBlobs struct {
	im    *importer
	tasks *tasks
	seen  map[digest.Digest]bool // blobs that came before; used by the reading goroutine only
	mu    sync.Mutex             // guards im.damaged while tasks run
	// buffers are *[]byte of maxSmallBlob: as many as there are tasks, and one more.
	buffers sync.Pool
}

// maxSmallBlob is the size up to which a blob is read into memory. At most one for each task, and
// one for the reading goroutine, are in memory at once.
const maxSmallBlob = 256 << 10

func newArchiveBlobs(ctx context.Context, im *importer) *archiveBlobs {
	return &archiveBlobs{im: im, tasks: newTasks(ctx, diskWorkers), seen: map[digest.Digest]bool{}, buffers: sync.Pool{New: func() any {
		b := make([]byte, maxSmallBlob)
		return &b
	}}}
}

// wait returns when no task is running, with the first error: that of a task, or err. It must be
// called before the importer runs: from then on, im.damaged is read without the mutex.
func (a *archiveBlobs) wait(err error) error { return a.tasks.wait(err) }

// put stages the next blob of the archive. A small one may be staged later, by a task: wait says
// when all are. The context is that of the tasks, so the first failure ends the reading too. A blob
// that the archive has twice is counted and charged once.
func (a *archiveBlobs) put(_ context.Context, d digest.Digest, src io.Reader, size int64) error {
	var item *meteredItem
	if !a.seen[d] {
		a.seen[d] = true
		if err := a.charge(d, size); err != nil {
			return err
		}
		a.im.meter.plan(1, size)
		item = a.im.meter.item(ocispec.Descriptor{Digest: d, Size: size})
	}
	ctx := a.tasks.ctx
	if size > maxSmallBlob {
		had, err := a.putLarge(ctx, d, src, size, item)
		return a.end(d, item, had, err)
	}
	buf := a.buffers.Get().(*[]byte)
	b := (*buf)[:size]
	if _, err := io.ReadFull(src, b); err != nil {
		return err
	}
	return a.tasks.start(func() error {
		defer a.buffers.Put(buf)
		had, err := a.im.stage.putBytesAs(ctx, b, d)
		if err = a.end(d, item, had, err); err != nil {
			err = fmt.Errorf("archive entry %s: %w", blobPath(d), err)
		}
		return err
	})
}

// putLarge stages a blob that is too large for memory, and reports whether the registry has it. If
// it does, the archive's copy is read to the end and verified, but not written.
func (a *archiveBlobs) putLarge(ctx context.Context, d digest.Digest, src io.Reader, size int64, item *meteredItem) (had bool, err error) {
	had, err = a.im.stage.reuse(ctx, d, size)
	switch {
	case err != nil:
	case had:
		_, err = a.im.registry.blobs.verifier(ctx, io.NopCloser(src), d, size).WriteTo(io.Discard)
	default:
		_, _, err = a.im.stage.put(ctx, item.reader(src), "", d, size)
	}
	return had, err
}

// end records the outcome of one blob. A blob with other bytes than its name says does not fail the
// import yet: it is noted in im.damaged, and leaves the totals of the progress.
func (a *archiveBlobs) end(d digest.Digest, item *meteredItem, had bool, err error) error {
	if errors.Is(err, ErrDigestMismatch) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.im.damaged[d] = true
		item.drop()
		return nil
	}
	if err == nil {
		if had {
			item.skip()
		}
		item.end()
	}
	return err
}

// charge counts a blob that the registry does not have against MaxBytes, before it is written. Only
// the size in the store is compared. If that file is damaged, the blob is written without a charge;
// it then replaces a file of the same size.
func (a *archiveBlobs) charge(d digest.Digest, size int64) error {
	if a.im.maxBytes <= 0 {
		return nil
	}
	if have, err := a.im.registry.blobs.size(d); err == nil && have == size {
		return nil
	}
	return a.im.charge(size)
}
