package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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
	// one. Zero means [FormatImageManifest].
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
	// SeparateRegistries keeps content of different remote registries apart: a pull uses a manifest
	// or blob that is here only if a ref of the same registry host leads to it, and fetches it
	// otherwise. Without it, whoever publishes a manifest that names the digest of something that
	// is here gives that content a name of theirs by a pull, and gets it by the next push under
	// that name.
	//
	// It costs a look at the index for each blob, and a second download of what another
	// registry brought before; on the disk, the bytes are kept once. It protects only as far as
	// every pull into the root has it. Refs that were built, tagged or imported count as
	// content of the host in their names.
	SeparateRegistries bool
	// AllowNetworkFS opens a root on a network file system, which otherwise
	// fails with [ErrNetworkFS]. There, only one machine at a time may use it.
	AllowNetworkFS bool
	// AllowOtherOwner opens a root that belongs to another user, or whose index, log, tmp/ or
	// blobs/ does; otherwise that is an [ErrForeignRoot], unless the other user is root. The
	// owner of a root decides what every reference in it means. It has no effect on Windows.
	AllowOtherOwner bool
	// Logger gets events that no call can return as an error. Nil discards them.
	Logger *slog.Logger

	fault faultFunc // for rootDir
	adopt bool      // take blobs/ for the registry's although the directory has no id: only Rebuild may
	id    string    // of a root that is created; "" makes a random one
	more  []string  // makes a schema version after those that there are, for tests
}

// A LocalRegistry is an open root directory. Any number of goroutines may use
// one, and any number of processes on one machine may open the same root.
type LocalRegistry struct {
	dir    string // absolute, without symbolic links
	opts   Options
	root   *rootDir
	blobs  *blobStore
	index  *index
	id     string
	self   fs.FileInfo // of the directory
	opened fs.FileInfo // of the index file
	remote *Remote     // for Pull and Push

	pulls sync.Map // transfers under way that other calls may join, by key: see sharedPull

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

// Open opens the registry in dir for reading and writing. It creates the directory, and the
// registry in it, if they are missing, and completes one whose creation was interrupted. Several
// processes may do so at once.
//
// A registry is created only where the names tmp, blobs and id are free. Otherwise, and where
// index.sqlite3 is another program's, nothing in the directory is changed. An index by an older
// version of this package is brought up to date. Symbolic links in dir are resolved once: the
// registry stays the directory that dir led to, and if that is moved or replaced while the
// registry is open, calls fail with [ErrForeignIndex]. ctx governs the call only.
//
// Errors:
//   - [ErrForeignRoot]: tmp, blobs or id exist and are not a registry's, or a file of the
//     registry belongs to another user
//   - [ErrForeignIndex]: index.sqlite3 was not made by this package for this root
//   - [ErrNewerSchema]: the index is by a newer version of this package
//   - [ErrCorruptIndex]: the index is damaged, or only its log is left
//   - [ErrNetworkFS]: dir is on a network file system
//   - [ErrReadOnly]: this process may not write to dir
//   - [ErrInvalidArgument]: dir is empty
//   - [ErrBusy], and any error from ctx or the file system
func Open(ctx context.Context, dir string, opts *Options) (*LocalRegistry, error) {
	r, err := open(ctx, dir, opts, false)
	return r, opError("open", dir, "", err)
}

// OpenReadOnly opens an existing registry and never changes it: writing
// methods fail with [ErrReadOnly]. It works on a directory that this process
// may not write, provided that no other process writes to it meanwhile.
//
// Errors are those of [Open], and
//   - [ErrNotFound]: dir has no registry
//   - [ErrReadOnly]: the index is by an older version, which only Open brings up to date
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
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		dir = filepath.Clean(dir) // the system takes a/../b for nothing where there is no a
	}
	if !readOnly {
		if err := mkdirAllSync(dir, 0o700, r.opts.fault); err != nil {
			return nil, err
		}
	}
	if r.dir, err = resolveDir(dir); err == nil {
		r.root, err = openRoot(r.dir, r.opts.fault)
	}
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
	if readOnly {
		_, err = r.checkDirs()
	} else {
		err = r.makeDirs()
	}
	if err != nil {
		return nil, errors.Join(err, r.index.close())
	}
	return r, nil
}

func (r *LocalRegistry) schema() []schemaVersion {
	if more := r.opts.more; len(more) > 0 {
		newest := schemas[len(schemas)-1].objects
		return append(schemas[:], schemaVersion{objects: append(slices.Clip(newest), more...), upgrade: more})
	}
	return schemas[:]
}

// openIndex opens the index, in the mode that the root allows.
func (r *LocalRegistry) openIndex(ctx context.Context, readOnly bool) (*index, error) {
	db := database{path: filepath.Join(r.dir, indexFile), anyOwner: r.opts.AllowOtherOwner, same: r.checkBound, sameFile: r.checkIndexFile}
	if !readOnly {
		// SQLite would open what it can't write, and fail at the first write only.
		for _, dir := range []string{r.dir, filepath.Join(r.dir, tmpDir), filepath.Join(r.dir, blobsDir)} {
			if err := checkWritable(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%w: %w (OpenReadOnly reads it)", ErrReadOnly, err)
			}
		}
		return openIndex(ctx, db, r.opts.BusyTimeout, r.schema())
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

// Root returns the registry's directory as an absolute path.
func (r *LocalRegistry) Root() string { return r.dir }

// ID returns the registry's own name: lower-case letters and digits, random,
// fixed when the root was created.
func (r *LocalRegistry) ID() string { return r.id }

// localHost is the host of names that this registry makes up.
func (r *LocalRegistry) localHost() string { return r.id + localHostSuffix }

// localHostSuffix ends the names of hosts that exist nowhere: refs there were made up by a
// registry.
const localHostSuffix = ".ocilocal.local"
