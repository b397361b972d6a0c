package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The tree of an OMMX v2 registry. Each entry is a layout directory with one manifest:
//
//	root/ghcr.io/org/model/__v1/                 ghcr.io/org/model:v1
//	root/localhost__5000/model/__v1/             localhost:5000/model:v1
//	root/ghcr.io/org/model/__sha256__<hex>/      ghcr.io/org/model@sha256:<hex>
//	                              ├ oci-layout, index.json
//	                              └ blobs/sha256/…
//
// A ':' cannot be in a file name on every system, so "__" stands for it. That cannot always be read
// back, because a tag may have "__" too: see legacyName. Going from a reference to its paths is
// unambiguous, which is how Load finds an entry: see legacyPaths.

// maxLegacyDepth is the deepest level of directories that is searched for entries. The repository
// of a reference cannot have as many path elements.
const maxLegacyDepth = 130

// DefaultLegacyRoot returns the directory in which the OMMX v2 SDK keeps its local registry. That
// is $OMMX_LOCAL_REGISTRY_ROOT if it is set, and otherwise:
//   - Unix: ommx in $XDG_DATA_HOME or ~/.local/share
//   - macOS: ~/Library/Application Support/org.ommx.ommx
//   - Windows: %AppData%\ommx\ommx\data
//
// Error: that of [os.UserHomeDir], if none of these is known.
func DefaultLegacyRoot() (string, error) {
	if dir := os.Getenv("OMMX_LOCAL_REGISTRY_ROOT"); dir != "" {
		return dir, nil
	}
	if dir := os.Getenv("AppData"); dir != "" && runtime.GOOS == "windows" {
		return filepath.Join(dir, "ommx", "ommx", "data"), nil
	}
	if xdg := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(xdg) && runtime.GOOS != "darwin" {
		return filepath.Join(xdg, "ommx"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", opError("find the legacy root", "", "", fmt.Errorf("%w (set OMMX_LOCAL_REGISTRY_ROOT)", err))
	}
	if runtime.GOOS == "darwin" {
		return filepath.Join(home, "Library", "Application Support", "org.ommx.ommx"), nil
	}
	return filepath.Join(home, ".local", "share", "ommx"), nil
}

// LegacyOptions govern an import from an older registry. Nil is the zero value.
type LegacyOptions struct {
	// Policy is for refs that point at another digest here. Zero is [KeepExisting].
	Policy Policy
	// Name, if not nil, decides the reference of each entry. claimed is the name in the older
	// registry. ref is that name as a reference, and zero if it is not one. Name returns the
	// reference to set. It can return [SkipEntry] to leave the entry out. Any other error is
	// reported as the error of this entry. Name must not call the registry.
	Name func(claimed string, ref Reference) (Reference, error)
	// Progress, if not nil, is called with the state of the import. Items are entries of the older
	// registry. Entries that the registry has already count as skipped. Bytes are not counted.
	// Entries that cannot be imported, or are left out, are subtracted from the totals.
	Progress func(Progress)
}

// A legacyNamer is LegacyOptions.Name.
type legacyNamer func(claimed string, ref Reference) (Reference, error)

// name applies the function, if there is one, to an entry. err says why claimed is not a reference.
// It is returned if the function gives no reference either. A reference that the function returns
// is validated, since the caller may have made it in any way.
func (fn legacyNamer) name(claimed string, ref Reference, err error) (Reference, error) {
	if fn == nil {
		return ref, err
	}
	named, refused := fn(claimed, ref)
	switch {
	case refused != nil:
		return Reference{}, refused
	case named.IsZero() && err != nil:
		return Reference{}, err
	}
	return named, named.checkGiven()
}

// A LegacyReport counts the entries of an older registry by their outcomes.
type LegacyReport struct {
	Scanned    int             // entries found
	Imported   int             // refs that are new here
	Verified   int             // refs that existed already, with the same content
	Replaced   int             // refs that were moved
	Conflicted []RefUpdate     // refs that point at another digest and were kept
	Failed     []LegacyFailure // entries that could not be imported
	Skipped    []string        // entries that LegacyOptions.Name left out
	// MissingSubjects are the subjects of imported artifacts that neither registry has whole. The
	// artifacts are imported without them.
	MissingSubjects []digest.Digest
}

// A LegacyFailure says why one entry could not be imported.
type LegacyFailure struct {
	Entry string // its path below the old root
	Err   error
}

// add counts the outcome of one entry.
func (l *LegacyReport) add(entry string, u RefUpdate, err error) {
	switch {
	case err == SkipEntry:
		l.Skipped = append(l.Skipped, entry)
	case u.Outcome == Conflicted:
		l.Conflicted = append(l.Conflicted, u)
	case err != nil:
		l.Failed = append(l.Failed, LegacyFailure{entry, err})
	case u.Outcome == Replaced:
		l.Replaced++
	case u.Outcome == Unchanged:
		l.Verified++
	default:
		l.Imported++
	}
}

// ImportLegacy imports every entry of an OMMX v2 local registry: a tree of layout directories with
// paths of the form host/repository/__tag. If the index.json of an entry has a name, it must fit
// the path. Otherwise the path is the name. Only artifacts of type [ArtifactTypeOMMX] are imported.
// A bad entry does not stop the others: the report lists it. ImportLegacy can be repeated, and run
// several times at once. The tree is never written to. A symbolic link in it is not followed: it is
// reported as failed.
//
// Errors, together with the report so far: [ErrReadOnly], [ErrBusy], [ErrNoSpace], and any error
// from ctx, the index, or the file system for root itself.
func (r *LocalRegistry) ImportLegacy(ctx context.Context, root string, opts *LegacyOptions) (report *LegacyReport, err error) {
	defer addOp(&err, "import legacy registry", root, "")
	if opts == nil {
		opts = &LegacyOptions{}
	}
	report = &LegacyReport{}
	return report, r.withSource(ctx, root, func(root *rootDir) error { return r.importLegacy(ctx, root, opts, report) })
}

// ImportLegacyEntry imports the entry of an OMMX v2 local registry that has the name ref, and sets
// ref. opts say what happens if ref points elsewhere. [LocalRegistry.Load] does the same with
// [Options.LegacyRoot], if the registry does not have ref. The tree is never written to.
//
// Errors:
//   - [ErrNotFound]: the tree has no such entry
//   - [*ConflictError], together with the update
//   - [ErrArtifactType]: the artifact is not of type [ArtifactTypeOMMX]
//   - those of [LocalRegistry.ImportLayout], and any error from the file system for root itself
func (r *LocalRegistry) ImportLegacyEntry(ctx context.Context, root string, ref Reference, opts *PublishOptions) (u RefUpdate, err error) {
	defer addOp(&err, "import legacy entry", ref.String(), "")
	if err := ref.checkGiven(); err != nil {
		return u, err
	}
	end, err := r.beginWrite(ctx)
	if err != nil {
		return u, err
	}
	defer end()
	if opts == nil {
		opts = &PublishOptions{}
	}
	u, found, err := r.legacyEntry(ctx, root, ref, *opts)
	if err == nil && !found {
		err = fmt.Errorf("%w in the legacy registry %s", ErrNotFound, root)
	}
	return u, err
}

// importLegacy finds all entries first and then imports them one by one, each with a publish of its
// own transaction. So a bad entry, or a call that is killed, never undoes the entries before it. A
// call that is repeated finds these as Unchanged, and writes nothing for them.
func (r *LocalRegistry) importLegacy(ctx context.Context, root *rootDir, opts *LegacyOptions, report *LegacyReport) error {
	m := newMeter(opts.Progress, Reference{}) // it is used on this goroutine only
	m.phase(PhasePlan)
	entries, err := legacyEntries(ctx, root, report)
	if err != nil {
		return err
	}
	m.plan(len(entries), 0)
	m.planned(PhaseBlobs)
	for _, entry := range entries {
		report.Scanned++
		u, err := r.importLegacyEntry(ctx, root, entry, Reference{}, opts.Name, PublishOptions{Policy: opts.Policy})
		if fatal(err) {
			return err
		}
		report.add(entry, u, err)
		meterEntry(m, u, err)
	}
	m.finish()
	return nil
}

// meterEntry reports the progress of one entry: done, skipped because it was here, or out of the
// plan because it failed.
func meterEntry(m *meter, u RefUpdate, err error) {
	// The size stays 0, because bytes are not counted.
	desc := ocispec.Descriptor{MediaType: u.Descriptor.MediaType, Digest: u.Descriptor.Digest}
	switch {
	case err != nil || u.Outcome == Conflicted:
		m.plan(-1, 0)
	case u.Outcome == Unchanged:
		m.skip(desc)
	default:
		m.done(desc)
	}
}

// fatal reports whether err concerns the process or the registry, and not one entry. Every further
// entry would fail with it as well, so it ends the import.
func fatal(err error) bool {
	return processCondition(err) || errors.Is(err, ErrCorruptIndex) || errors.Is(err, ErrForeignIndex)
}

// legacyEntries finds the directories whose name begins with "__", in order. It does not look into
// them. A directory that cannot be read is reported and skipped. So are a symbolic link and a
// layout at a path that names nothing, since the owner would otherwise believe that the artifacts
// there were imported.
func legacyEntries(ctx context.Context, root *rootDir, report *LegacyReport) ([]string, error) {
	var entries []string
	var visit func(dir string, depth int) error
	visit = func(dir string, depth int) error {
		return root.eachEntry(ctx, dir, func(name string) error {
			at := path.Join(dir, name)
			fi, err := root.Lstat(at)
			switch {
			case err != nil:
			case fi.Mode()&fs.ModeSymlink != 0:
				err = fmt.Errorf("%w: a symbolic link, which is not followed", ErrInvalidLayout)
			case !fi.IsDir():
				var stray bool
				if stray, err = marksLayout(root, dir, name); stray {
					at, err = dir, fmt.Errorf("%w: path of the layout is not of the form host/repository/__tag", ErrInvalidLayout)
				}
			case strings.HasPrefix(name, "__"):
				entries = append(entries, at)
			case depth >= maxLegacyDepth:
				err = fmt.Errorf("%w: more than %d directories deep", ErrTooLarge, maxLegacyDepth)
			default:
				err = visit(at, depth+1)
			}
			if err != nil && !fatal(err) {
				report.Failed = append(report.Failed, LegacyFailure{at, err})
				return nil
			}
			return err
		})
	}
	if err := visit(".", 1); err != nil {
		return nil, err
	}
	slices.Sort(entries)
	return entries, nil
}

// marksLayout reports whether a file of this name shows that its directory is a layout. oci-layout
// does. Where it is missing, as some tools leave it out, index.json beside blobs/ does.
func marksLayout(root *rootDir, dir, name string) (bool, error) {
	if name != ocispec.ImageIndexFile {
		return name == ocispec.ImageLayoutFile, nil
	}
	_, err := root.Lstat(path.Join(dir, ocispec.ImageLayoutFile))
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return hasDir(root, path.Join(dir, blobsDir))
}

// importLegacyEntry imports one layout directory of the tree. If ref is not zero, the entry must
// have that name: an entry with another name or another digest is [ErrNotFound], which lets
// legacyEntry try the next path. If ref is zero, rename decides about the name, unless it is nil.
//
// The importer gets Rename, because the name was decided here: index.json may have the short
// spelling of v2, which entryClaim would not accept.
func (r *LocalRegistry) importLegacyEntry(ctx context.Context, root *rootDir, entry string, ref Reference, rename legacyNamer, opts PublishOptions) (RefUpdate, error) {
	sub, err := root.below(entry)
	if err != nil {
		return RefUpdate{}, err
	}
	defer sub.Close()
	l := &layout{root: sub}
	index, err := l.index()
	if err != nil {
		return RefUpdate{}, err
	}
	descs := index.entries
	named, err := legacyName(entry, descs)
	if ref.IsZero() {
		named, err = rename.name(entry, named, err)
	}
	if err != nil {
		return RefUpdate{}, err
	}
	if ref.IsZero() {
		ref = named
	} else if !agree(named, ref) {
		return RefUpdate{}, fmt.Errorf("%w: the entry is named %s", ErrNotFound, named)
	} else if pin := ref.Digest(); pin != "" && named.Digest() == "" && len(descs) == 1 && descs[0].Digest != pin {
		return RefUpdate{}, fmt.Errorf("%w: the entry has digest %s", ErrNotFound, descs[0].Digest)
	}
	im := r.importAs(l, ref, opts)
	im.accept = func(m *Manifest) error {
		if m.ArtifactType() != ArtifactTypeOMMX {
			return fmt.Errorf("%w: %s is not %s", ErrArtifactType, printable(m.ArtifactType()), ArtifactTypeOMMX)
		}
		return nil
	}
	u, _, err := im.runOne(ctx, descs)
	return u, err
}

// importAs returns an importer that publishes the one entry of a layout as ref.
func (r *LocalRegistry) importAs(l *layout, ref Reference, opts PublishOptions) *importer {
	return r.layoutImporter(l, &ImportOptions{Reference: ref, Rename: true, PublishOptions: opts, one: true})
}

// runOne imports one entry and discards the stage. It returns the outcome for the ref, also of a
// conflict, and the subjects that are missing.
func (im *importer) runOne(ctx context.Context, descs []ocispec.Descriptor) (RefUpdate, []ocispec.Descriptor, error) {
	defer func() { im.registry.logDiscard(im.stage.discard()) }()
	result, err := im.run(ctx, &layoutIndex{entries: descs})
	if result == nil || len(result.Artifacts) == 0 {
		return RefUpdate{}, nil, err
	}
	return result.Artifacts[0].Update, result.missingSubjects, err
}

// legacyName returns the name of an entry. The path cannot always be read back, because a tag may
// have "__" in it. So a name in index.json counts, if it fits the path. A name that does not fit is
// an error, because either of the two could be wrong.
func legacyName(entry string, descs []ocispec.Descriptor) (Reference, error) {
	name := ""
	if len(descs) == 1 {
		name = descs[0].Annotations[ocispec.AnnotationRefName]
	}
	if ref, err := parseLegacyName(name); err == nil && name != "" && !isBareTag(name) {
		if !slices.Contains(legacyPaths(ref), entry) {
			return Reference{}, fmt.Errorf("%w: index.json names it %s, which does not belong at this path", ErrInvalidLayout, printable(name))
		}
		return ref, nil
	}
	host, rest, ok := strings.Cut(entry, "/")
	i := strings.LastIndex(rest, "/__")
	if !ok || i <= 0 {
		return Reference{}, fmt.Errorf("%w: path is not of the form host/repository/__tag", ErrInvalidLayout)
	}
	tag := rest[i+len("/__"):]
	// The tag sha256__<64 digits> has the path of that digest. Only the content tells them apart.
	if alg, hex, ok := strings.Cut(tag, "__"); ok {
		if d := digest.NewDigestFromEncoded(digest.Algorithm(alg), hex); checkDigest(d) == nil && len(descs) == 1 && descs[0].Digest == d {
			tag = string(d)
		}
	}
	return parseLegacyName(strings.Replace(host, "__", ":", 1) + "/" + rest[:i] + ":" + tag)
}

// legacyPaths returns the paths at which OMMX v2 may keep ref: host[__port]/repository/__tag, under
// each spelling that means the same name today. v2 always took the text before the first '/' for
// the host, and did not add "library/". So docker.io/org/model may lie under org/model, and
// docker.io/library/alpine under docker.io/alpine.
func legacyPaths(ref Reference) (paths []string) {
	host, repository := ref.Registry(), ref.Repository()
	names := []string{path.Join(strings.Replace(host, ":", "__", 1), repository)}
	if host == registryDockerHub {
		names = []string{path.Join("registry-1.docker.io", repository), path.Join("docker.io", repository), path.Join("index.docker.io", repository)}
		// A first part with "__" is read back as a host with a port.
		if first, _, _ := strings.Cut(repository, "/"); !strings.Contains(first, "__") {
			names = append(names, repository)
		}
		if short, ok := strings.CutPrefix(repository, "library/"); ok && !strings.Contains(short, "/") {
			for _, host := range []string{"registry-1.docker.io", "docker.io", "index.docker.io"} {
				names = append(names, path.Join(host, short))
			}
		}
	}
	for _, name := range names {
		if ref.Tag() != "" {
			paths = append(paths, path.Join(name, "__"+ref.Tag()))
		}
		if d := ref.Digest(); d != "" {
			paths = append(paths, path.Join(name, "__"+strings.Replace(string(d), ":", "__", 1)))
		}
	}
	return paths
}

// fetchLegacy imports the entry of the legacy root that has ref's name, and returns the artifact.
// It returns nil if the registry has no legacy root, or the root has no such entry. The artifact is
// made from the result of the import. Reading the index instead could fail after the import is
// durable: the call would return an error although it has changed the registry.
func (r *LocalRegistry) fetchLegacy(ctx context.Context, ref Reference) (*LocalArtifact, error) {
	if r.opts.LegacyRoot == "" || r.blobs.readOnly {
		return nil, nil
	}
	end, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	u, found, err := r.legacyEntry(ctx, r.opts.LegacyRoot, ref, PublishOptions{})
	if !found && (err == nil || errors.Is(err, fs.ErrNotExist)) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return r.newArtifact(ref, u.Descriptor, nil), nil
}

// legacyEntry imports the entry of a legacy root that has the name ref, if there is one. found is
// set with an error too, if an entry was found and could not be imported. Then the other paths are
// not tried: the entry is the right one, and the caller must learn that it is bad.
func (r *LocalRegistry) legacyEntry(ctx context.Context, dir string, ref Reference, opts PublishOptions) (u RefUpdate, found bool, err error) {
	root, err := openRoot(dir, r.root.fault)
	if err != nil {
		return u, false, err
	}
	defer root.Close()
	for _, entry := range legacyPaths(ref) {
		found, err := hasDir(root, entry)
		if err == nil && !found {
			continue
		}
		if err == nil {
			u, err = r.importLegacyEntry(ctx, root, entry, ref, nil, opts)
		}
		switch {
		case errors.Is(err, ErrNotFound):
			continue
		case err != nil:
			return u, true, fmt.Errorf("legacy entry %s: %w", printable(entry), err)
		}
		return u, true, nil
	}
	return RefUpdate{}, false, nil
}

// hasDir reports whether there is a directory of this name and no symbolic link on the way to it.
func hasDir(root *rootDir, name string) (bool, error) {
	at := ""
	for part := range strings.SplitSeq(name, "/") {
		at = path.Join(at, part)
		fi, err := root.Lstat(at)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.IsDir() {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
	return true, nil
}
