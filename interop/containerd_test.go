package interop_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/ocilocal/ocilocal"
)

// A containerdStore is a repository as a content store of containerd. Copy it into your program: it
// is all that an adapter takes.
//
// containerd stores a manifest before its content, and a manifest is a blob like any other to it. A
// registry publishes a manifest after its content. So all content comes in as blobs, which the
// repository holds for [ocilocal.GCOptions.Held]. [containerdStore.publish] names a manifest for
// good, when its content is there.
//
// Labels and times are not kept: containerd's metadata store keeps them. There is no Walk, with which
// that store would remove what it does not know: [ocilocal.LocalRegistry.GC] collects garbage.
// Ingests end with the process.
type containerdStore struct {
	repo *ocilocal.Repository
	dir  string // of the files of ingests

	mu      sync.Mutex
	ingests map[string]*containerdIngest // by ref
}

// A containerdIngest is content that is being written. Its writer alone uses it, except for status
// and open, which mu of the store guards.
type containerdIngest struct {
	store  *containerdStore
	file   *os.File
	hash   digest.Digester
	open   bool // has a writer
	status content.Status
}

// containerdError adds the error that containerd looks for.
func containerdError(err error) error {
	for is, as := range map[error]error{ocilocal.ErrNotFound: errdefs.ErrNotFound, ocilocal.ErrInUse: errdefs.ErrFailedPrecondition} {
		if errors.Is(err, is) {
			return errors.Join(as, err)
		}
	}
	return err
}

func (s *containerdStore) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	desc, err := s.repo.StatBlob(ctx, d)
	return content.Info{Digest: d, Size: desc.Size}, containerdError(err)
}

func (s *containerdStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	f, err := s.repo.OpenFile(ctx, desc.Digest)
	if err != nil {
		return nil, containerdError(err)
	}
	return f, nil
}

func (s *containerdStore) Delete(ctx context.Context, d digest.Digest) error {
	return containerdError(s.repo.DeleteBlob(ctx, d))
}

func (s *containerdStore) Update(context.Context, content.Info, ...string) (content.Info, error) {
	return content.Info{}, errdefs.ErrNotImplemented
}

func (s *containerdStore) Walk(context.Context, content.WalkFunc, ...string) error {
	return errdefs.ErrNotImplemented
}

func (s *containerdStore) Status(_ context.Context, ref string) (content.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if in := s.ingests[ref]; in != nil {
		return in.status, nil
	}
	return content.Status{}, fmt.Errorf("ingest %s: %w", ref, errdefs.ErrNotFound)
}

// ListStatuses has no filters.
func (s *containerdStore) ListStatuses(context.Context, ...string) (all []content.Status, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, in := range s.ingests {
		all = append(all, in.status)
	}
	return all, nil
}

func (s *containerdStore) Abort(_ context.Context, ref string) error {
	s.mu.Lock()
	in := s.ingests[ref]
	s.mu.Unlock()
	if in == nil {
		return fmt.Errorf("ingest %s: %w", ref, errdefs.ErrNotFound)
	}
	return in.remove()
}

func (s *containerdStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Ref == "" {
		return nil, fmt.Errorf("ref is empty: %w", errdefs.ErrInvalidArgument)
	}
	if o.Desc.Digest != "" {
		if _, err := s.repo.StatBlob(ctx, o.Desc.Digest); err == nil {
			return nil, fmt.Errorf("content %s: %w", o.Desc.Digest, errdefs.ErrAlreadyExists)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.ingests[o.Ref]
	switch {
	case in != nil && in.open:
		return nil, fmt.Errorf("ref %s is in use: %w", o.Ref, errdefs.ErrUnavailable)
	case in == nil:
		f, err := os.CreateTemp(s.dir, "ingest-")
		if err != nil {
			return nil, err
		}
		now := time.Now()
		in = &containerdIngest{store: s, file: f, hash: digest.Canonical.Digester(), status: content.Status{Ref: o.Ref, Total: o.Desc.Size, Expected: o.Desc.Digest, StartedAt: now, UpdatedAt: now}}
		s.ingests[o.Ref] = in
	}
	in.open = true
	return in, nil
}

func (in *containerdIngest) Write(p []byte) (int, error) {
	n, err := io.MultiWriter(in.file, in.hash.Hash()).Write(p)
	in.store.mu.Lock()
	defer in.store.mu.Unlock()
	in.status.Offset += int64(n)
	in.status.UpdatedAt = time.Now()
	return n, err
}

func (in *containerdIngest) Digest() digest.Digest { return in.hash.Digest() }

func (in *containerdIngest) Status() (content.Status, error) {
	in.store.mu.Lock()
	defer in.store.mu.Unlock()
	return in.status, nil
}

func (in *containerdIngest) Truncate(size int64) error {
	if size != 0 {
		return fmt.Errorf("truncate to %d bytes: %w", size, errdefs.ErrNotImplemented)
	}
	in.store.mu.Lock()
	in.status.Offset = 0
	in.store.mu.Unlock()
	in.hash.Hash().Reset()
	_, err := in.file.Seek(0, io.SeekStart)
	return errors.Join(err, in.file.Truncate(0))
}

// Close leaves what was written for the next writer of the ref.
func (in *containerdIngest) Close() error {
	in.store.mu.Lock()
	defer in.store.mu.Unlock()
	in.open = false
	return nil
}

// remove ends the ingest.
func (in *containerdIngest) remove() error {
	in.store.mu.Lock()
	defer in.store.mu.Unlock()
	delete(in.store.ingests, in.status.Ref)
	return errors.Join(in.file.Close(), os.Remove(in.file.Name()))
}

func (in *containerdIngest) Commit(ctx context.Context, size int64, expected digest.Digest, _ ...content.Opt) error {
	d, has := in.Digest(), in.status.Offset
	if size > 0 && size != has || expected != "" && expected != d {
		return fmt.Errorf("content of %d bytes is %s, want %d and %s: %w", has, d, size, expected, errdefs.ErrFailedPrecondition)
	}
	if _, err := in.store.repo.StatBlob(ctx, d); err == nil {
		return errors.Join(in.remove(), fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists))
	}
	if _, err := in.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := in.store.repo.PutBlob(ctx, in.file, d, has); err != nil {
		return err
	}
	return in.remove()
}

// publish gives a manifest a tag. All its content, manifests included, must be in the store: those
// below it are put first, because the registry knows them as blobs until then.
func (s *containerdStore) publish(ctx context.Context, desc ocispec.Descriptor, tag string) error {
	raw, err := content.ReadBlob(ctx, s, desc)
	if err != nil {
		return err
	}
	m, err := ocilocal.ParseManifest(desc.MediaType, raw)
	if err != nil {
		return err
	}
	for _, child := range m.Manifests() {
		if err := s.publish(ctx, child, ""); err != nil {
			return err
		}
	}
	_, err = s.repo.PutManifest(ctx, desc.MediaType, raw, &ocilocal.PutManifestOptions{Tag: tag})
	return err
}

// newContainerdStore makes a store of a repository in a new registry.
func newContainerdStore(ctx context.Context, dir string) (*containerdStore, *ocilocal.LocalRegistry, error) {
	r, err := ocilocal.Open(ctx, filepath.Join(dir, "registry"), nil)
	if err != nil {
		return nil, nil, err
	}
	repo, err := r.Repository("example.com/team/app")
	if err != nil {
		return nil, nil, errors.Join(err, r.Close())
	}
	return &containerdStore{repo: repo, dir: dir, ingests: map[string]*containerdIngest{}}, r, nil
}

// TestContainerdSuite runs containerd's tests of content stores. As in containerd, the metadata store
// is in front, which keeps labels, times and namespaces. No test is left out.
func TestContainerdSuite(t *testing.T) {
	open := func(opts ...metadata.DBOpt) testsuite.StoreInitFn {
		return func(ctx context.Context, dir string) (context.Context, content.Store, func() error, error) {
			s, r, err := newContainerdStore(ctx, dir)
			if err != nil {
				return nil, nil, nil, err
			}
			db, err := bolt.Open(filepath.Join(dir, "metadata.db"), 0o600, nil)
			if err != nil {
				return nil, nil, nil, errors.Join(err, r.Close())
			}
			spaces := 0
			ctx = testsuite.SetContextWrapper(ctx, func(ctx context.Context, shared bool) (context.Context, func(context.Context) error, error) {
				spaces++
				name := fmt.Sprint("space", spaces)
				ctx = namespaces.WithNamespace(ctx, name)
				if shared {
					err = db.Update(func(tx *bolt.Tx) error {
						return metadata.NewNamespaceStore(tx).SetLabel(ctx, name, labels.LabelSharedNamespace, "true")
					})
				}
				return ctx, func(context.Context) error { return nil }, err
			})
			return ctx, metadata.NewDB(db, s, nil, opts...).ContentStore(), func() error { return errors.Join(db.Close(), r.Close()) }, nil
		}
	}
	testsuite.ContentSuite(t, "ocilocal", open())
	testsuite.ContentCrossNSSharedSuite(t, "ocilocal", open())
	testsuite.ContentCrossNSIsolatedSuite(t, "ocilocal", open(metadata.WithPolicyIsolated))
	testsuite.ContentSharedNSIsolatedSuite(t, "ocilocal", open(metadata.WithPolicyIsolated))
}

// TestContainerdRoundTrip copies an image index from a registry to containerd's own store, and from
// there to another registry.
func TestContainerdRoundTrip(t *testing.T) {
	ctx := t.Context()
	from, r, err := newContainerdStore(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := r.NewIndexBuilder(ocilocal.MustParseReference("example.com/team/app:v1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	for _, arch := range []string{"amd64", "arm64"} {
		image, err := r.NewBuilder(ocilocal.MustParseReference("example.com/team/app:"+arch), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.app"})
		if err != nil {
			t.Fatal(err)
		}
		defer image.Cancel()
		if _, err := image.AddLayerBytes(ctx, "text/plain", []byte("for "+arch), nil); err != nil {
			t.Fatal(err)
		}
		a, err := image.Build(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.AddManifest(ctx, a.Descriptor()); err != nil {
			t.Fatal(err)
		}
	}
	built, err := b.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}

	theirs, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	to, other, err := newContainerdStore(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	copyAll := func(from content.Provider, to content.Store) {
		fetch := images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
			src, err := from.ReaderAt(ctx, desc)
			if err != nil {
				return nil, err
			}
			defer src.Close()
			return nil, content.WriteBlob(ctx, to, string(desc.Digest), content.NewReader(src), desc)
		})
		if err := images.Walk(ctx, images.Handlers(fetch, images.ChildrenHandler(from)), built.Descriptor()); err != nil {
			t.Fatal(err)
		}
	}
	copyAll(from, theirs)
	copyAll(theirs, to)
	if err := to.publish(ctx, built.Descriptor(), "copy"); err != nil {
		t.Fatal(err)
	}
	if _, err := other.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Held: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	got, err := to.repo.Resolve(ctx, "copy")
	if err != nil || got.Digest != built.Digest() {
		t.Errorf("%v, %v", got, err)
	}
	for p, err := range other.Verify(ctx, nil) {
		t.Errorf("%v, %v", p, err)
	}
}
