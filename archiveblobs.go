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
// archive. Others hash, compare and write the small blobs, while it reads on.
//
// A blob that the registry has, in a good file, is only read: nothing is written and synced for it.
// The archive's copy must hash to its name all the same. Whether a blob is needed is known later,
// since index.json may come last. So a copy with other bytes is only noted: see [importer.claim].
type archiveBlobs struct {
	im    *importer
	tasks *tasks
	seen  map[digest.Digest]bool // blobs that came before
	mu    sync.Mutex             // guards im.damaged while tasks run
}

// maxSmallBlob is the size up to which a blob is read into memory: one for each task, and one more.
const maxSmallBlob = 256 << 10

func newArchiveBlobs(ctx context.Context, im *importer) *archiveBlobs {
	return &archiveBlobs{im: im, tasks: newTasks(ctx, diskWorkers), seen: map[digest.Digest]bool{}}
}

// wait returns when no task is running, with the first error: that of a task, or err.
func (a *archiveBlobs) wait(err error) error { return a.tasks.wait(err) }

// put stages the next blob of the archive, perhaps not before wait.
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
	b := make([]byte, size)
	if _, err := io.ReadFull(src, b); err != nil {
		return err
	}
	return a.tasks.start(func() error {
		had, err := a.im.stage.putBytesAs(ctx, b, d)
		if err = a.end(d, item, had, err); err != nil {
			err = fmt.Errorf("archive entry %s: %w", blobPath(d), err)
		}
		return err
	})
}

// putLarge stages a blob that memory should not hold, and reports whether the registry has it.
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

// end takes the outcome of one blob. That it has other bytes than its name says is noted.
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

// charge counts a blob that the registry does not have against MaxBytes.
func (a *archiveBlobs) charge(d digest.Digest, size int64) error {
	if a.im.maxBytes <= 0 {
		return nil
	}
	if have, err := a.im.registry.blobs.size(d); err == nil && have == size {
		return nil
	}
	return a.im.charge(size)
}
