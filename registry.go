package ocilocal

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	indexFile = "index.sqlite3"
	idFile    = "id"
)

// Options are what [Open] can be told. The zero value, like nil, is fit for most programs.
type Options struct {
	// BusyTimeout is how long a write waits for other processes before it
	// fails with [ErrBusy]. Zero or less means 30 seconds.
	BusyTimeout time.Duration
	// Format is the manifest form of what builders make that don't choose
	// one. Zero means [FormatArtifactManifest].
	Format ManifestFormat
	// ArtifactTypes, if not empty, are the only artifact types that may be
	// published; others fail with [ErrArtifactType].
	ArtifactTypes []string
	// LegacyRoot, if not empty, is the root of an OMMX v2 local registry, where
	// [LocalRegistry.Load] looks for what is not here yet. [DefaultLegacyRoot]
	// returns where OMMX keeps it. It is never written to.
	LegacyRoot string
	// Remote is the client that [LocalRegistry.Load] pulls with what is not here
	// yet, and that Pull and Push use unless they are given another. Without one,
	// Load doesn't use the network, and Pull and Push use the zero Remote.
	Remote *Remote
	// SeparateRegistries keeps content of different remote registries apart: a pull uses a manifest or
	// blob that is here only if a ref of the same registry host leads to it, and fetches it otherwise.
	// Without it, whoever publishes a manifest that names the digest of something that is here
	// gives that content a name of theirs by a pull, and gets it by the next push under that name.
	//
	// It costs a look at the index for each blob, and a second download of what another
	// registry brought before; on the disk, the bytes are kept once. It protects only as far as
	// every pull into the root has it. Refs that were built, tagged or imported count as
	// content of the host in their names.
	SeparateRegistries bool
	// AllowNetworkFS opens a root on a network file system, which otherwise
	// fails with [ErrNetworkFS]. There, only one machine at a time may use it.
	AllowNetworkFS bool
	// Logger is told what can't be returned. Nil discards.
	Logger *slog.Logger

	fault faultFunc  // for rootDir
	id    string     // for a root that is made new; "" for one of its own
	more  [][]string // migrations after those that there are, for tests
}

// A LocalRegistry is an open root directory. Any number of goroutines may use
// one, and any number of processes on one machine may open the same root.
type LocalRegistry struct {
	dir    string // absolute
	opts   Options
	root   *rootDir
	blobs  *blobStore
	index  *index
	id     string
	opened fs.FileInfo // of the index file
	remote *Remote     // for Pull and Push

	mu     sync.Mutex
	closed bool           // guarded by mu
	calls  sync.WaitGroup // those under way; none is added once closed is set
}

// DefaultRoot returns the directory for a user's registry: $OCILOCAL_ROOT if
// that is set, else ocilocal in $XDG_DATA_HOME or ~/.local/share (Unix),
// ~/Library/Application Support (macOS) or %LocalAppData% (Windows).
// Error: that of [os.UserHomeDir], where none of these is known.
func DefaultRoot() (string, error) {
	if dir := os.Getenv("OCILOCAL_ROOT"); dir != "" {
		return dir, nil
	}
	data := ""
	switch runtime.GOOS {
	case "windows":
		data = os.Getenv("LocalAppData")
	case "darwin":
	default:
		if xdg := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(xdg) {
			data = xdg
		}
	}
	if data == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", opError("find the default root", "", "", fmt.Errorf("%w (set OCILOCAL_ROOT)", err))
		}
		data = filepath.Join(home, ".local", "share")
		if runtime.GOOS == "darwin" {
			data = filepath.Join(home, "Library", "Application Support")
		}
	}
	return filepath.Join(data, "ocilocal"), nil
}

// Open opens the registry in dir for reading and writing, and creates it where
// there is none. Several processes may do so at once.
//
// An index of an older version of this package is brought up to date. A dir whose index.sqlite3
// isn't this package's is left untouched: [ErrForeignIndex], [ErrNewerSchema],
// [ErrCorruptIndex]; the last also where only the log of an index is left. Further errors:
// [ErrNetworkFS]; [ErrReadOnly] for a dir that this process may not write; [ErrInvalidArgument] for an
// empty dir; [ErrBusy], and the file system's. ctx governs the call only.
func Open(ctx context.Context, dir string, opts *Options) (*LocalRegistry, error) {
	r, err := open(ctx, dir, opts, false)
	return r, opError("open", dir, "", err)
}

// OpenReadOnly opens an existing registry and never changes it: writing
// methods fail with [ErrReadOnly]. It works on a directory that this process
// may not write, then provided that no other process writes to it meanwhile.
// Errors are those of [Open], [ErrNotFound] when there is no registry, and [ErrReadOnly]
// when its index is of an older version, which only Open brings up to date.
func OpenReadOnly(ctx context.Context, dir string, opts *Options) (*LocalRegistry, error) {
	r, err := open(ctx, dir, opts, true)
	return r, opError("open read-only", dir, "", err)
}

func open(ctx context.Context, dir string, opts *Options, readOnly bool) (_ *LocalRegistry, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r := &LocalRegistry{}
	if opts != nil {
		r.opts = *opts
	}
	r.opts.ArtifactTypes = slices.Clone(r.opts.ArtifactTypes)
	if r.opts.BusyTimeout <= 0 {
		r.opts.BusyTimeout = 30 * time.Second
	}
	if r.remote = r.opts.Remote; r.remote == nil {
		r.remote = &Remote{}
	}
	if r.opts.Logger == nil {
		r.opts.Logger = slog.New(slog.DiscardHandler)
	}
	if dir == "" {
		return nil, fmt.Errorf("%w: directory name is empty", ErrInvalidArgument)
	}
	if r.dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if !readOnly {
		if err := mkdirAllSync(r.dir, 0o700, r.opts.fault); err != nil {
			return nil, err
		}
	}
	r.root, err = openRoot(r.dir, r.opts.fault)
	if err != nil {
		if readOnly && errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", ErrNotFound, err)
		}
		return nil, err
	}
	r.blobs = newBlobStore(r.root, readOnly)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.blobs.close(), r.root.Close())
		}
	}()
	if err := r.checkRoot(); err != nil {
		return nil, err
	}
	r.opened, err = r.root.Lstat(indexFile)
	if errors.Is(err, fs.ErrNotExist) {
		if readOnly {
			return nil, fmt.Errorf("%w: no %s in it", ErrNotFound, indexFile)
		}
		if err := r.checkNoLog(); err != nil {
			return nil, err
		}
		if err := r.create(ctx); err != nil {
			return nil, err
		}
		r.opened, err = r.root.Lstat(indexFile)
	}
	if err != nil {
		return nil, err
	}
	if !r.opened.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrForeignIndex, indexFile)
	}
	if r.index, err = r.openIndex(ctx, readOnly); err != nil {
		return nil, err
	}
	if err := r.checkID(); err != nil {
		return nil, errors.Join(err, r.index.close())
	}
	return r, nil
}

// checkRoot looks at where and how the root lies.
func (r *LocalRegistry) checkRoot() error {
	fi, err := r.root.Stat(".")
	if err != nil {
		return err
	}
	if fi.Mode().Perm()&0o002 != 0 && runtime.GOOS != "windows" {
		r.opts.Logger.Warn("ocilocal: anybody on this machine may write to the registry", "root", r.dir, "mode", fi.Mode())
	}
	name, err := networkFS(r.dir)
	if err != nil {
		return err
	}
	return r.checkFS(name)
}

// checkFS refuses a network file system, by name; "" is a local one.
func (r *LocalRegistry) checkFS(name string) error {
	if name == "" || r.opts.AllowNetworkFS {
		return nil
	}
	return fmt.Errorf("%w (%s): two machines would damage the index (Options.AllowNetworkFS opens it all the same)", ErrNetworkFS, name)
}

// create lays out a new root. Everything is made under tmp/ and linked to its
// name without replacing, so that of several processes one wins each step.
func (r *LocalRegistry) create(ctx context.Context) error {
	// Whoever made the root may have been killed before its entry was synced.
	// Where this process can't do that, it didn't make the root either.
	if err := syncEntries(filepath.Dir(r.dir), r.opts.fault); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if err := r.makeDirs(); err != nil {
		return err
	}
	session, err := r.blobs.enter()
	if err != nil {
		return err
	}
	id, err := r.readID()
	if errors.Is(err, fs.ErrNotExist) {
		if err := r.writeID(ctx, session); err != nil {
			return err
		}
		id, err = r.readID()
	}
	if err != nil {
		return err
	}
	fresh, err := r.blobs.empty()
	if err != nil {
		return err
	}
	private := path.Join(session, rand.Text())
	if err := createIndex(ctx, filepath.Join(r.dir, private), id, r.schema(), !fresh); err != nil {
		return err
	}
	if err := r.root.Chmod(private, 0o600); err != nil {
		return err
	}
	return r.name(ctx, private, indexFile)
}

// checkNoLog refuses to make an index where the log of a lost one lies: SQLite would take
// it for the new one's, and what it says for the truth.
func (r *LocalRegistry) checkNoLog() error {
	for _, suffix := range []string{"-wal", "-journal"} {
		_, err := r.root.Lstat(indexFile + suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil { // unless another process has just made the index and its log
			_, err = r.root.Lstat(indexFile)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %s is not there, but %s%s is (put it back, or Rebuild)", ErrCorruptIndex, indexFile, indexFile, suffix)
		}
		return err
	}
	return nil
}

// makeDirs makes the directories of a root that aren't there.
func (r *LocalRegistry) makeDirs() error {
	for _, dir := range []string{blobsDir, tmpDir} {
		if err := r.root.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return r.root.syncDir(".")
}

// name gives a complete file below tmp/ its name in the root, unless that is taken.
func (r *LocalRegistry) name(ctx context.Context, private, name string) error {
	moved := false
	// Alone, because a file system without hard links cannot name a file without replacing another.
	err := r.blobs.alone(ctx, func() (err error) {
		moved, err = r.root.linkNew(private, name)
		return err
	})
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if !moved {
		err = errors.Join(err, r.root.Remove(private))
	}
	return errors.Join(err, r.root.syncDir("."))
}

func (r *LocalRegistry) writeID(ctx context.Context, session string) error {
	private := path.Join(session, rand.Text())
	f, err := r.root.openFile(private, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if _, err = io.WriteString(f, cmp.Or(r.opts.id, strings.ToLower(rand.Text()))+"\n"); err == nil {
		err = f.sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return r.name(ctx, private, idFile)
}

func (r *LocalRegistry) readID() (string, error) {
	f, err := r.root.OpenFile(idFile, os.O_RDONLY|openNoFollow, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := checkRegular(f); err != nil {
		return "", fmt.Errorf("%w: %w", ErrForeignIndex, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, 100))
	if err != nil {
		return "", err
	}
	id := strings.TrimSuffix(string(b), "\n")
	if len(id) == 0 || len(id) > 64 || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyz") != "" {
		return "", fmt.Errorf("%w: file %s holds no id: %q", ErrForeignIndex, idFile, clip(id))
	}
	return id, nil
}

func (r *LocalRegistry) schema() [][]string { return append(migrations[:], r.opts.more...) }

// openIndex opens the index, in the mode that the root allows.
func (r *LocalRegistry) openIndex(ctx context.Context, readOnly bool) (*index, error) {
	db := database{path: filepath.Join(r.dir, indexFile)}
	if !readOnly {
		// SQLite would open what it can't write, and fail at the first write only. A copy
		// of a root may lack the directories that were empty.
		complete := true
		for _, dir := range []string{r.dir, filepath.Join(r.dir, tmpDir), filepath.Join(r.dir, blobsDir)} {
			if err := checkWritable(dir); errors.Is(err, fs.ErrNotExist) {
				complete = false
			} else if err != nil {
				return nil, fmt.Errorf("%w: %w (OpenReadOnly reads it)", ErrReadOnly, err)
			}
		}
		x, err := openIndex(ctx, db, r.opts.BusyTimeout, r.schema())
		if err == nil && !complete {
			if err = r.makeDirs(); err != nil {
				return nil, errors.Join(err, x.close())
			}
		}
		return x, err
	}
	// SQLite reads a WAL database only with a -shm beside it, shared with
	// writers. Where it may, it makes one, and the last to close cleans up.
	db.mode = indexReadOnly
	if checkWritable(r.dir) == nil {
		db.mode = indexQueryOnly
	}
	x, err := openIndex(ctx, db, r.opts.BusyTimeout, r.schema())
	if !errors.Is(err, ErrReadOnly) && !errors.Is(err, ErrIndexIO) {
		return x, err
	}
	if fi, statErr := r.root.Stat(indexFile + "-wal"); statErr == nil && fi.Size() > 0 {
		return nil, fmt.Errorf("%s-wal holds changes that can't be read without writing (open it once where it can be written): %w", indexFile, err)
	}
	db.mode = indexImmutable
	return openIndex(ctx, db, r.opts.BusyTimeout, r.schema())
}

// errNoID is of an index that is this package's, in a root that has lost its id.
var errNoID = errors.New("the root has no file")

// checkID makes sure that the index is this root's own.
func (r *LocalRegistry) checkID() error {
	var err error
	if r.id, err = meta(r.index, metaID); err != nil {
		return err
	}
	switch id, err := r.readID(); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w %s; the index's id is %s (if they belong together, write that id there)", ErrForeignIndex, errNoID, idFile, r.id)
	case err != nil:
		return err
	case id != r.id:
		return fmt.Errorf("%w: the index's id is %s, the root's is %s", ErrForeignIndex, r.id, id)
	}
	return nil
}

// Close waits for the calls under way and closes the registry; calls that come
// meanwhile fail with [ErrClosed]. So it must not be called from within one, such
// as by a reader that is being added as a layer; the bodies of loops over
// listings may call it. Open readers stay usable. The connections of a Remote that was given by
// Options stay open. A second Close returns [ErrClosed].
func (r *LocalRegistry) Close() error {
	r.mu.Lock()
	already := r.closed
	r.closed = true
	r.mu.Unlock()
	if already {
		return opError("close", r.dir, "", ErrClosed)
	}
	r.calls.Wait()
	if r.opts.Remote == nil {
		r.remote.CloseIdleConnections()
	}
	return opError("close", r.dir, "", errors.Join(r.index.close(), r.blobs.close(), r.root.Close()))
}

// openOther opens a regular file that the caller names. It refuses those of the index: closing
// any descriptor of them would drop the locks that SQLite holds in this process.
func (r *LocalRegistry) openOther(name string) (*os.File, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if own, err := r.root.Stat(indexFile + suffix); err == nil && os.SameFile(own, fi) {
			return nil, fmt.Errorf("%w: this is the registry's own index", ErrInvalidArgument)
		}
	}
	return openRegular(name)
}

// begin keeps the registry open until end is called. Once Close has begun it
// fails, also from within a call that Close waits for.
func (r *LocalRegistry) begin(ctx context.Context) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, ErrClosed
	}
	r.calls.Add(1)
	return r.calls.Done, nil
}

// beginWrite is begin of a call that changes the registry: one that is open read-only fails with [ErrReadOnly].
func (r *LocalRegistry) beginWrite(ctx context.Context) (end func(), err error) {
	if end, err = r.begin(ctx); err == nil && r.blobs.readOnly {
		end()
		return nil, ErrReadOnly
	}
	return end, err
}

// Root returns the registry's directory as an absolute path.
func (r *LocalRegistry) Root() string { return r.dir }

// ID returns the registry's own name: lower-case letters and digits, random,
// fixed when the root was created.
func (r *LocalRegistry) ID() string { return r.id }

// localHost is the host of names that this registry makes up.
func (r *LocalRegistry) localHost() string { return r.id + localHostSuffix }

// localHostSuffix ends the names of hosts that exist nowhere: refs there were made up by a registry.
const localHostSuffix = ".ocilocal.local"

// within runs fn, which is short, while the registry is kept open.
func (r *LocalRegistry) within(ctx context.Context, fn func() error) error {
	end, err := r.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	return fn()
}
