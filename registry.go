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

// Names in a root. Those of the directories are in blob.go.
const (
	indexFile = "index.sqlite3"
	idFile    = "id"
)

// Options are the options of [Open]. Nil is the zero value, which suits most programs.
type Options struct {
	// BusyTimeout is how long a write waits for other processes before it fails with [ErrBusy].
	// Zero or less means 30 seconds.
	BusyTimeout time.Duration
	// Format is the manifest form for builders that do not choose one. Zero means
	// [FormatImageManifest].
	Format ManifestFormat
	// ArtifactTypes, if not empty, are the only artifact types that may be published. Others fail
	// with [ErrArtifactType].
	ArtifactTypes []string
	// LegacyRoot, if not empty, is the root of an OMMX v2 local registry. [LocalRegistry.Load]
	// looks there for artifacts that this registry does not have. [DefaultLegacyRoot] returns the
	// directory that OMMX uses. It is never written to.
	LegacyRoot string
	// Remote is the client with which [LocalRegistry.Load] pulls artifacts that this registry does
	// not have. Pull and Push use it too, unless their options have another. Without it, Load does
	// not use the network, and Pull and Push use the zero Remote.
	Remote *Remote
	// SeparateRegistries keeps content of different remote registries apart. A pull uses a local
	// manifest or blob only if a ref of the same registry host leads to it, and fetches it
	// otherwise. Without this option, a hostile registry can publish a manifest with the digest of
	// content that another registry has protected. A pull then gives the local content a name in
	// the hostile registry, and the next push under that name sends it there.
	//
	// It costs a query of the index for each blob. Content that another registry has sent before is
	// downloaded again; on the disk, its bytes are kept once. The option protects only if every
	// pull into the root has it. Refs that were built, tagged or imported count as content of the
	// host in their names.
	SeparateRegistries bool
	// AllowNetworkFS opens a root on a network file system. Otherwise that fails with
	// [ErrNetworkFS]. Only one machine at a time may use such a root.
	AllowNetworkFS bool
	// AllowOtherOwner opens a root that belongs to another user, or whose index, log, tmp/ or
	// blobs/ does. Otherwise that fails with [ErrForeignRoot], unless the other user is root. The
	// owner of a root decides what every reference in it means. It has no effect on Windows.
	AllowOtherOwner bool
	// Logger gets events that no call can return as an error. Nil discards them.
	Logger *slog.Logger

	fault faultFunc // for rootDir
	adopt bool      // accept a blobs/ in a directory without an id: only Rebuild does
	id    string    // of a root that is created; "" makes a random one
	more  []string  // the statements of one more schema version, for tests
}

// A LocalRegistry is an open root directory. Any number of goroutines may use one, and any number
// of processes on one machine may open the same root.
//
// open sets the fields above pulls, and they do not change. Each exported method holds the registry
// open by begin, so it may use root, blobs and index until it returns.
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

	pulls sync.Map // transfers that other calls may join, by key: see sharedPull

	mu      sync.Mutex
	closed  bool           // guarded by mu
	calls   sync.WaitGroup // calls that have begun and not ended; none is added once closed is set
	closing chan struct{}  // closed by Close before it waits, for work that no context of a caller ends
}

// DefaultRoot returns the directory for a user's registry. That is $OCILOCAL_ROOT if it is set, and
// otherwise the directory ocilocal in:
//   - Unix: $XDG_DATA_HOME or ~/.local/share
//   - macOS: ~/Library/Application Support
//   - Windows: %LocalAppData%
//
// Error: that of [os.UserHomeDir], if none of these is known.
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
// registry in it, if they are missing, and completes a creation that was interrupted. Several
// processes may do so at once.
//
// A registry is created only if the names tmp, blobs and id are free in dir. If they are not, or if
// index.sqlite3 belongs to another program, nothing in the directory is changed. An index by an
// older version of this package is migrated. Symbolic links in dir are resolved once: the registry
// stays with the directory to which dir led. If that is moved or replaced while the registry is
// open, calls fail with [ErrForeignIndex]. ctx governs the call only.
//
// Errors:
//   - [ErrForeignRoot]: tmp, blobs or id exist and do not belong to a registry, or a file of the
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

// OpenReadOnly opens an existing registry and never changes it: writing methods fail with
// [ErrReadOnly]. It works on a directory that this process may not write, if no other process
// writes to it meanwhile.
//
// Errors are those of [Open], and
//   - [ErrNotFound]: dir has no registry
//   - [ErrReadOnly]: the index is by an older version, which only Open migrates
func OpenReadOnly(ctx context.Context, dir string, opts *Options) (*LocalRegistry, error) {
	r, err := open(ctx, dir, opts, true)
	return r, opError("open read-only", dir, "", err)
}

// open is Open, or OpenReadOnly if readOnly is set. Backup uses it for its target. The order
// matters:
//
//	the directory         opened once; all later access is relative to it
//	checkRoot             owner and file system, before anything in it is opened or made
//	create                if there is no index
//	r.opened              the identity of the index file, before SQLite opens it by its path:
//	                      checkBound compares it, so a file that is exchanged in between is found
//	openIndex, checkID    the index is this package's, and this root's
//	makeDirs              last, since nothing may be made in a directory that is not a registry
func open(ctx context.Context, dir string, opts *Options, readOnly bool) (_ *LocalRegistry, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r := &LocalRegistry{closing: make(chan struct{})}
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
		dir = filepath.Clean(dir) // without a directory a, the system does not find a/../b
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

// schema returns the schema versions of the index: the released ones and, in tests, one more.
func (r *LocalRegistry) schema() []schemaVersion {
	if more := r.opts.more; len(more) > 0 {
		newest := schemas[len(schemas)-1].objects
		return append(schemas[:], schemaVersion{objects: append(slices.Clip(newest), more...), upgrade: more})
	}
	return schemas[:]
}

// openIndex opens the index in the mode that the root allows:
//
//	read-write   after Open. The directories must be writable, since SQLite finds out only at the
//	             first write
//	query only   after OpenReadOnly of a writable directory: SQLite may make the -shm that it shares
//	             with writers, but changes nothing else
//	read-only    in a directory that cannot be written: a -shm of another process is used
//	immutable    if there is none, and the log is empty: nobody writes, so no locks are needed
//
// If there is no -shm and the log is not empty, its commits cannot be read. Ignoring them would
// show an old state, so that is an error.
func (r *LocalRegistry) openIndex(ctx context.Context, readOnly bool) (*index, error) {
	db := database{path: filepath.Join(r.dir, indexFile), anyOwner: r.opts.AllowOtherOwner, same: r.checkBound, sameFile: r.checkIndexFile}
	if !readOnly {
		for _, dir := range []string{r.dir, filepath.Join(r.dir, tmpDir), filepath.Join(r.dir, blobsDir)} {
			if err := checkWritable(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%w: %w (OpenReadOnly reads it)", ErrReadOnly, err)
			}
		}
		return openIndex(ctx, db, r.opts.BusyTimeout, r.schema())
	}
	db.mode = indexReadOnly
	if checkWritable(r.dir) == nil {
		db.mode = indexQueryOnly
	}
	x, err := openIndex(ctx, db, r.opts.BusyTimeout, r.schema())
	if !errors.Is(err, ErrReadOnly) && !errors.Is(err, ErrIndexIO) {
		return x, err
	}
	if fi, statErr := r.root.Stat(indexFile + "-wal"); statErr == nil && fi.Size() > 0 {
		return nil, fmt.Errorf("%s-wal holds changes that cannot be read without write access (open the registry once with write access): %w", indexFile, err)
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

// localHostSuffix ends the host of every name that a registry makes up. No such host exists: names
// under .local are not in the global DNS (RFC 6762).
const localHostSuffix = ".ocilocal.local"
