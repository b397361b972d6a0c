// The hooks by which the external tests reach into the package, in the order of the families in
// CONTRIBUTING.md. They show or set what is there; no hook has logic that a test should check, and
// nothing else may be in this file.

package ocilocal

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// --- errors, references, JSON, manifests ---

// ProcessCondition tells a condition of the process from damage.
var ProcessCondition = processCondition

var (
	ReferenceFromKey = referenceFromKey
	ReferenceKey     = Reference.key
	CheckTag         = checkTag
	IsBareTag        = isBareTag
)

var (
	CanonicalAnnotations = canonicalAnnotations
	EmptyJSON            = emptyJSON
)

// ManifestSpec is manifestSpec with exported fields.
type ManifestSpec struct {
	ArtifactType string
	Config       *ocispec.Descriptor
	Layers       []ocispec.Descriptor
	Annotations  map[string]string
	Subject      *ocispec.Descriptor
}

// BuildManifest builds the canonical manifest of s.
func BuildManifest(f ManifestFormat, s ManifestSpec) (*Manifest, error) {
	return buildManifest(f, manifestSpec{s.ArtifactType, s.Config, s.Layers, s.Annotations, s.Subject})
}

// ManifestChildren returns role and digest of each child.
func ManifestChildren(m *Manifest) []string {
	var out []string
	for i, d := range m.children() {
		out = append(out, fmt.Sprintf("%s %s", m.childRole(i), d.Digest))
	}
	return out
}

// --- root: the seam of file operations ---

// SetFault has fault called before each file operation of r, by any goroutine; if it returns an
// error, the operation fails with that. Nil ends it. No call may be under way.
func SetFault(r *LocalRegistry, fault func(op, name string) error) { r.root.fault = fault }

// OpenFaulty is [Open] with the seam in place from the beginning.
func OpenFaulty(ctx context.Context, dir string, fault func(op, name string) error) (*LocalRegistry, error) {
	return Open(ctx, dir, &Options{fault: fault})
}

// RefuseNetworkFS returns the error that a root on a file system with that name gets.
func RefuseNetworkFS(name string, allow bool) error {
	return (&LocalRegistry{opts: Options{AllowNetworkFS: allow}}).checkFS(name)
}

// TryLockDir tries to lock a directory below r's root.
func TryLockDir(r *LocalRegistry, name string) (release func() error, held bool, err error) {
	return tryLockDir(r.root, name)
}

// TryLockFile tries to lock a file below r's root.
func TryLockFile(r *LocalRegistry, name string) (release func() error, held bool, err error) {
	f, err := r.root.openLocked(name)
	if f == nil {
		return nil, false, err
	}
	return f.Close, true, nil
}

// RootDir is rootDir.
type RootDir = rootDir

// OpenRootDir opens a directory. Without shortcuts, each operation is one of [os.Root].
func OpenRootDir(dir string, shortcuts bool) (*RootDir, error) {
	r, err := openRoot(dir, nil)
	if err == nil && !shortcuts {
		err = r.short.Close()
		r.short = nil
	}
	return r, err
}

// HasShortcut reports whether the system has the call that shortcuts need.
func HasShortcut(r *RootDir) bool { return r.short != nil }

// ShortcutOpen opens a file for reading by a shortcut alone.
func ShortcutOpen(r *RootDir, name string) (f *os.File, done bool, err error) {
	return r.short.openFile(name, os.O_RDONLY|openNonblock, 0)
}

// ShortcutLink links a file by a shortcut alone.
func ShortcutLink(r *RootDir, name, to string) (done bool, err error) { return r.short.link(name, to) }

// ShortcutRemove removes a file by a shortcut alone.
func ShortcutRemove(r *RootDir, name string) (done bool, err error) { return r.short.remove(name) }

// SharedSync returns a function that calls fn as concurrent fsyncs of a directory are shared.
func SharedSync(fn func() error) func() error {
	s := newSharedSync()
	return func() error { return s.do(fn) }
}

// --- graph ---

// Closure lists what manifests need, by their bytes: manifests, and then configs and layers.
func Closure(ctx context.Context, r *LocalRegistry, roots ...ocispec.Descriptor) (manifests, blobs []digest.Digest, err error) {
	c := r.newClosure()
	for _, root := range roots {
		if _, err := c.add(ctx, root); err != nil {
			return nil, nil, err
		}
	}
	for _, d := range c.manifests {
		manifests = append(manifests, d.Digest)
	}
	for _, d := range c.blobs {
		blobs = append(blobs, d.Digest)
	}
	return manifests, blobs, nil
}

// ClimbOptions are the ways of a climb. With Files it looks whether files are there.
type ClimbOptions struct {
	Subjects, Referrers, Files bool
	Name, Reference            string
}

func (o ClimbOptions) climb(ctx context.Context, r *LocalRegistry) *climb {
	c := &climb{ctx: ctx, q: r.index, ways: ways{subjects: o.Subjects, referrers: o.Referrers, name: o.Name, reference: o.Reference}}
	if o.Files {
		c.present = r.blobs.present
	}
	return c
}

// Led reports whether a ref leads to d.
func Led(ctx context.Context, r *LocalRegistry, d digest.Digest, o ClimbOptions) (bool, error) {
	return o.climb(ctx, r).led(d)
}

// LeadTo returns d and all that leads to it.
func LeadTo(ctx context.Context, r *LocalRegistry, d digest.Digest, o ClimbOptions) ([]digest.Digest, error) {
	all, _, err := o.climb(ctx, r).all(d, 1000)
	return all, err
}

// OwnedBy reports whether a ref of a registry host leads to d.
func OwnedBy(ctx context.Context, r *LocalRegistry, host string, d digest.Digest) (bool, error) {
	return r.ownedBy(ctx, host, d)
}

// --- collection ---

// StepByOne lets each step of a collection delete one blob or manifest, however fast the machine is.
func StepByOne(opts *GCOptions) { opts.step = -1 }

// --- index ---

// IndexWrite runs fn in r's next write transaction, which other calls may share. fn gets a function
// that runs SQL in it.
func IndexWrite(ctx context.Context, r *LocalRegistry, fn func(exec func(text string) error) error) error {
	return r.index.write(ctx, func(tx *indexTx) error {
		return fn(func(text string) error {
			_, err := tx.exec(text)
			return err
		})
	})
}

// IndexQuery runs a query outside any transaction.
func IndexQuery(ctx context.Context, r *LocalRegistry, text string) error {
	return eachRow(ctx, r.index, text, nil, func(*sql.Rows) error { return nil })
}

// OtherName returns the name of a ref below a prefix whose manifest needs d.
func OtherName(r *LocalRegistry, d digest.Digest, prefix, not string) (string, error) {
	return r.index.otherName(d, prefix, not)
}

// StatedSizes returns the sizes that manifests state for a blob.
func StatedSizes(r *LocalRegistry, d digest.Digest) ([]int64, error) {
	_, sizes, err := statedSizes(r.index, d)
	return sizes, err
}

// IndexReaders bounds the connections that read r's index.
func IndexReaders(r *LocalRegistry, n int) { r.index.readers.SetMaxOpenConns(n) }

// IndexPragma returns a pragma's value on the writer's connection, and on a reader's.
func IndexPragma(r *LocalRegistry, name string) (writer, reader string, err error) {
	err = r.index.write(context.Background(), func(tx *indexTx) error {
		_, err := tx.row("PRAGMA "+name, nil, &writer)
		return err
	})
	if err == nil {
		_, err = r.index.row("PRAGMA "+name, nil, &reader)
	}
	return writer, reader, err
}

// IndexQueue returns how many write calls wait for the committing goroutine.
func IndexQueue(r *LocalRegistry) int {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	return len(r.index.queue)
}

// IndexLeading reports whether a goroutine is committing.
func IndexLeading(r *LocalRegistry) bool {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	return r.index.leading
}

// An IndexTx is a transaction of an index.
type IndexTx struct{ tx *indexTx }

// IndexRows runs fn in a write transaction of r's index.
func IndexRows(ctx context.Context, r *LocalRegistry, fn func(IndexTx) error) error {
	return r.index.write(ctx, func(tx *indexTx) error { return fn(IndexTx{tx}) })
}

// InternType returns the number of a media type.
func (t IndexTx) InternType(text string) (int64, error) { return t.tx.internType(text) }

// SetHold has a repository hold content.
func (t IndexTx) SetHold(name string, d digest.Digest, since time.Time) error {
	return t.tx.setHold(name, d, since)
}

// DropHold removes a hold.
func (t IndexTx) DropHold(name string, d digest.Digest) (bool, error) { return t.tx.dropHold(name, d) }

// SetUnnamed lists a manifest as imported by digest.
func (t IndexTx) SetUnnamed(d digest.Digest, entry string, since time.Time) error {
	return t.tx.setUnnamed(d, entry, since)
}

// SetRefEntry sets what else an index.json says of a ref.
func (t IndexTx) SetRefEntry(ref Reference, entry string) error {
	name, reference := ref.key()
	return t.tx.setRefEntry(name, reference, entry)
}

// Delete removes the rows of a manifest or blob.
func (t IndexTx) Delete(d digest.Digest) error { return t.tx.delete(d) }

// Holds returns the holds of a repository, then all.
func Holds(ctx context.Context, r *LocalRegistry, name string) (in, all []string, err error) {
	text := func(h holdRow) string { return fmt.Sprint(h.name, " ", h.digest, " ", h.since.UnixMicro()) }
	err = holdsIn(ctx, r.index, name, func(h holdRow) error { in = append(in, text(h)); return nil })
	if err == nil {
		err = holds(ctx, r.index, func(h holdRow) error { all = append(all, text(h)); return nil })
	}
	return in, all, err
}

// UnnamedEntry returns what an index.json said of a manifest that was imported by digest.
func UnnamedEntry(r *LocalRegistry, d digest.Digest) (string, error) { return unnamedEntry(r.index, d) }

// RefDetails returns what the index says of a ref besides its descriptor.
func RefDetails(r *LocalRegistry, ref Reference) (created, moved, used time.Time, entry string, ok bool, err error) {
	name, reference := ref.key()
	d, ok, err := refDetails(r.index, name, reference)
	return d.created, d.moved, d.used, d.entry, ok, err
}

// Members lists what a manifest directly names, by its rows.
func Members(r *LocalRegistry, d digest.Digest) (all []string, err error) {
	err = members(r.index, d, func(m member) error {
		all = append(all, fmt.Sprint(m.role, " ", m.desc.Digest, " ", m.desc.MediaType, " ", m.desc.Size, " absent=", m.absent))
		return nil
	})
	return all, err
}

// PublishAbsent publishes a manifest some of whose blobs need not be here.
func PublishAbsent(ctx context.Context, r *LocalRegistry, ref Reference, m *Manifest, entry string, absent ...digest.Digest) error {
	st := r.blobs.newStage()
	_, err := st.putBytes(ctx, m.Bytes(), digest.SHA256)
	if err == nil {
		p := onlyManifest(ref, m, PublishOptions{Policy: Replace})
		p.absent, p.entry = map[digest.Digest]bool{}, entry
		for _, d := range absent {
			p.absent[d] = true
		}
		_, err = r.publish(ctx, st, []publication{p})
	}
	return errors.Join(err, st.discard())
}

// DigestBytes and DigestFromBytes convert a digest to and from its form in the index.
var (
	DigestBytes     = digestBytes
	DigestFromBytes = digestFromBytes
)

// NewerSchema returns options for a program that knows one schema version more.
func NewerSchema(stmts ...string) *Options { return &Options{more: stmts} }

// --- import ---

// CollectClosures collects the closures of entries as an import does. Its source has the manifests in
// raw, and no config or layer.
func CollectClosures(ctx context.Context, r *LocalRegistry, entries []ocispec.Descriptor, raw map[string][]byte) error {
	im := r.newImporter(nil)
	im.fetch = func(ctx context.Context, desc ocispec.Descriptor, as role, _ *meteredItem) error {
		if as != roleManifest {
			return nil
		}
		_, _, err := im.stage.put(ctx, bytes.NewReader(raw[string(desc.Digest)]), "", desc.Digest, desc.Size)
		return err
	}
	named, _, err := im.name(entries)
	if err == nil {
		_, _, err = im.collect(ctx, entries, named)
	}
	if rm := im.stage.discard(); err == nil {
		err = rm
	}
	return err
}

// SetLegacyRoot is [Options.LegacyRoot] for an open registry. No call may be under way.
func SetLegacyRoot(r *LocalRegistry, dir string) { r.opts.LegacyRoot = dir }

// LegacyName decides what an entry of an OMMX v2 registry is called.
var LegacyName = legacyName

// LegacyPaths returns where an OMMX v2 registry may keep a reference.
var LegacyPaths = legacyPaths

// TarEntry is one entry as the reader of archives sees it.
type TarEntry struct {
	Name   string
	Alias  string // of a sparse file, in some programs
	Size   int64
	Kind   byte
	Sparse bool
	Odd    bool // programs disagree about the name, which is refused if it means something
	Data   string
}

// TarEntries reads all entries of a tar.
func TarEntries(src io.Reader) (entries []TarEntry, err error) {
	stream, err := openTarStream(context.Background(), src)
	if err != nil {
		return nil, err
	}
	tr := &tarReader{src: stream}
	for {
		e, err := tr.next()
		if err == io.EOF {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(io.LimitReader(tr, 1<<10)) // the rest is skipped
		if err != nil {
			return nil, err
		}
		entries = append(entries, TarEntry{e.name, e.alias, e.size, e.kind, e.sparse, e.odd, string(data)})
	}
}

// --- export ---

// WriteEntry writes one file of an archive.
var WriteEntry = writeEntry

// --- remote ---

// AskHelper runs a credential helper with another time limit than usual.
func AskHelper(ctx context.Context, name, host string, limit time.Duration) (Credential, error) {
	return askHelper(ctx, name, host, limit)
}

// Parallel runs do with each number below n.
func Parallel(workers, n int, do func(i int)) {
	parallel(workers, slices.All(make([]struct{}, n)), func(i int, _ struct{}) { do(i) })
}

// RunTasks starts functions as tasks, most of them at once, and waits for them.
func RunTasks(ctx context.Context, most int, fns ...func(context.Context) error) (err error) {
	t := newTasks(ctx, most)
	for _, fn := range fns {
		if err = t.start(func() error { return fn(t.ctx) }); err != nil {
			break
		}
	}
	return t.wait(err)
}

// ReadBounded reads all of src.
var ReadBounded = readBounded

// --- serve ---

// ParseByteRange reads a Range header.
func ParseByteRange(s string, size int64) (start, length int64, whole bool, err error) {
	r, whole, err := parseByteRange(s, size)
	return r.start, r.length, whole, err
}

// ParseContentRange reads the Content-Range of a chunk.
func ParseContentRange(s string) (start, length int64, ok bool) {
	r, ok := parseContentRange(s)
	return r.start, r.length, ok
}

// KeptHashes returns for how many uploads a handler has kept the hash.
func KeptHashes(h http.Handler) int {
	own := h.(*handler)
	own.mu.Lock()
	defer own.mu.Unlock()
	return len(own.hashes)
}

// MaxUploadHashes is how many it keeps at most.
const MaxUploadHashes = maxUploadHashes

// UncountedPart is the part of the free uploads that a handler begins before it counts again.
const UncountedPart = uncountedPart

// SetLogger is [Options.Logger] for an open registry. No call may be under way.
func SetLogger(r *LocalRegistry, l *slog.Logger) { r.opts.Logger = l }

// --- progress ---

// MeterItem begins the only item of a call that reports to fn.
func MeterItem(fn func(Progress), desc ocispec.Descriptor) (count func(n int), end func()) {
	item := newMeter(fn, Reference{}).item(desc)
	return item.from(0), item.end
}

// OwnTransport is the transport of a Remote without a Client.
var OwnTransport = ownTransport

// RenewRemote is what happens after so many requests of one client have stalled. It returns how many clients
// are retired.
func RenewRemote(r *Remote, stalls int) int {
	p, client := &remoteRepo{remote: r, host: r.host("example.com")}, r.httpClient()
	for range stalls {
		p.renew(client)
	}
	return len(r.retired)
}
