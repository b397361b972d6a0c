package benchmarks

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	ggcrremote "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/ocilocal/ocilocal"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	regref "github.com/regclient/regclient/types/ref"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"
)

// A Transfer moves artifacts between a library's own local store and the world. A
// peer's store is a layout directory, whose entries are named by bare tags. Names
// are full references. What a library can't do is nil.
type Transfer struct {
	Name string
	// One is set where each artifact takes a process of its own, OneTar where an archive
	// holds one artifact: then only tasks of one artifact are measured.
	One, OneTar bool
	// Unverified is set where ImportDir and ExportDir copy files without looking at their digests.
	Unverified bool

	ImportDir func(ctx context.Context, from, store string, names []string) error
	ImportTar func(ctx context.Context, from, store string, names []string) error
	ExportDir func(ctx context.Context, store, to string, names []string) error
	ExportTar func(ctx context.Context, store, to string, names []string) error
	Pull      func(ctx context.Context, store string, names []string) error
	// PullAgain is Pull when all is there, and the registry is to be asked whether that is so.
	PullAgain func(ctx context.Context, store string, names []string) error
	Push      func(ctx context.Context, store string, names []string) error
	// PullMany is Pull of one artifact by so many goroutines at once, which share one open store.
	PullMany func(ctx context.Context, store, name string, callers int) error
}

// Transfers are the compared libraries.
var Transfers = []Transfer{
	{
		Name:      "ocilocal",
		ImportDir: ours(importDir), ImportTar: ours(importTar),
		ExportDir: ourExport((*ocilocal.LocalRegistry).ExportLayout),
		ExportTar: ourExport((*ocilocal.LocalRegistry).ExportArchiveFile),
		Pull:      pull(nil), PullAgain: pull(nil), Push: push, PullMany: pullMany,
	},
	{
		Name:      "oras-go",
		ImportDir: orasCopy(openOCI, openOCI), ImportTar: orasCopy(openOCITar, openOCI),
		ExportDir: orasCopy(openOCI, openOCI),
		Pull:      orasRemote(orasPull), PullAgain: orasRemote(orasPull), Push: orasRemote(orasPush), PullMany: orasPullMany,
	},
	{
		Name: "ggcr", Unverified: true,
		ImportDir: ggcrCopy, ExportDir: ggcrCopy,
		Pull: ggcrPull, PullAgain: ggcrPull, Push: ggcrPush,
	},
	{
		Name: "regclient", OneTar: true,
		ImportDir: regCopyDirs, ImportTar: regImport,
		ExportDir: regCopyDirs, ExportTar: regExport,
		Pull: regPull, PullAgain: regPull, Push: regPush,
	},
}

// Skopeo is the program of that name, its start included.
var Skopeo = Transfer{
	Name: "skopeo", One: true,
	ImportDir: skopeoCopy("oci:", "oci:"), ImportTar: skopeoCopy("oci-archive:", "oci:"),
	ExportDir: skopeoCopy("oci:", "oci:"), ExportTar: skopeoCopy("oci:", "oci-archive:"),
	Pull: skopeoPull, PullAgain: skopeoPull,
	Push: func(ctx context.Context, store string, names []string) error {
		return skopeo(ctx, filepath.Dir(store), "oci:"+store+":"+tag(names[0]), "docker://"+names[0])
	},
}

func init() {
	if _, err := exec.LookPath("skopeo"); err == nil {
		Transfers = append(Transfers, Skopeo)
	}
}

// skopeo copies; it unpacks archives into the directory tmp.
func skopeo(ctx context.Context, tmp, from, to string) error {
	out, err := exec.CommandContext(ctx, "skopeo", "--insecure-policy", "--tmpdir", tmp, "copy", "--all", "--quiet",
		"--src-tls-verify=false", "--dest-tls-verify=false", from, to).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("skopeo copy %s %s: %w: %s", from, to, err, out)
	}
	return err
}

func skopeoCopy(fromKind, toKind string) func(context.Context, string, string, []string) error {
	return func(ctx context.Context, from, to string, names []string) error {
		return skopeo(ctx, filepath.Dir(to), fromKind+from+":"+tag(names[0]), toKind+to+":"+tag(names[0]))
	}
}

func skopeoPull(ctx context.Context, store string, names []string) error {
	return skopeo(ctx, filepath.Dir(store), "docker://"+names[0], "oci:"+store+":"+tag(names[0]))
}

func tag(full string) string { return full[strings.LastIndexByte(full, ':')+1:] }

func repository(full string) string { return full[:strings.LastIndexByte(full, ':')] }

func references(names []string) (refs []ocilocal.Reference) {
	for _, n := range names {
		refs = append(refs, ocilocal.MustParseReference(n))
	}
	return refs
}

func ours(do func(ctx context.Context, r *ocilocal.LocalRegistry, from string) error) func(context.Context, string, string, []string) error {
	return func(ctx context.Context, from, store string, _ []string) error {
		r, err := ocilocal.Open(ctx, store, nil)
		if err != nil {
			return err
		}
		return errors.Join(do(ctx, r, from), r.Close())
	}
}

func importDir(ctx context.Context, r *ocilocal.LocalRegistry, from string) error {
	_, err := r.ImportLayout(ctx, from, nil)
	return err
}

func importTar(ctx context.Context, r *ocilocal.LocalRegistry, from string) error {
	_, err := r.ImportArchiveFile(ctx, from, nil)
	return err
}

func ourExport(do func(*ocilocal.LocalRegistry, context.Context, string, []ocilocal.Reference, *ocilocal.ExportOptions) error) func(context.Context, string, string, []string) error {
	return func(ctx context.Context, store, to string, names []string) error {
		r, err := ocilocal.Open(ctx, store, nil)
		if err != nil {
			return err
		}
		return errors.Join(do(r, ctx, to, references(names), nil), r.Close())
	}
}

func pull(opts *ocilocal.PullOptions) func(context.Context, string, []string) error {
	return ourRemote(func(ctx context.Context, r *ocilocal.LocalRegistry, ref ocilocal.Reference) error {
		_, err := r.Pull(ctx, ref, opts)
		return err
	})
}

func push(ctx context.Context, store string, names []string) error {
	return ourRemote(func(ctx context.Context, r *ocilocal.LocalRegistry, ref ocilocal.Reference) error {
		_, err := r.Push(ctx, ref, nil)
		return err
	})(ctx, store, names)
}

func ourRemote(do func(context.Context, *ocilocal.LocalRegistry, ocilocal.Reference) error) func(context.Context, string, []string) error {
	return func(ctx context.Context, store string, names []string) error {
		remote := &ocilocal.Remote{}
		defer remote.CloseIdleConnections()
		r, err := ocilocal.Open(ctx, store, &ocilocal.Options{Remote: remote})
		if err != nil {
			return err
		}
		for _, ref := range references(names) {
			if err = do(ctx, r, ref); err != nil {
				break
			}
		}
		return errors.Join(err, r.Close())
	}
}

func pullMany(ctx context.Context, store, name string, callers int) error {
	remote := &ocilocal.Remote{}
	defer remote.CloseIdleConnections()
	r, err := ocilocal.Open(ctx, store, &ocilocal.Options{Remote: remote})
	if err != nil {
		return err
	}
	err = atOnce(callers, func() error {
		_, err := r.Pull(ctx, ocilocal.MustParseReference(name), nil)
		return err
	})
	return errors.Join(err, r.Close())
}

// atOnce calls do in so many goroutines.
func atOnce(callers int, do func() error) error {
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() { errs[i] = do() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func openOCI(ctx context.Context, dir string) (oras.ReadOnlyTarget, error) {
	return oci.NewWithContext(ctx, dir)
}

func openOCITar(ctx context.Context, file string) (oras.ReadOnlyTarget, error) {
	return oci.NewFromTar(ctx, file)
}

type orasOpener func(ctx context.Context, where string) (oras.ReadOnlyTarget, error)

func orasCopy(openFrom, openTo orasOpener) func(context.Context, string, string, []string) error {
	return func(ctx context.Context, from, to string, names []string) error {
		src, err := openFrom(ctx, from)
		if err != nil {
			return err
		}
		dst, err := openTo(ctx, to)
		if err != nil {
			return err
		}
		for _, n := range names {
			if _, err := oras.Copy(ctx, src, tag(n), dst.(oras.Target), tag(n), oras.DefaultCopyOptions); err != nil {
				return err
			}
		}
		return nil
	}
}

func orasRemote(do func(ctx context.Context, store *oci.Store, repo *remote.Repository, tag string) error) func(context.Context, string, []string) error {
	return func(ctx context.Context, dir string, names []string) error {
		store, err := oci.NewWithContext(ctx, dir)
		if err != nil {
			return err
		}
		for _, n := range names {
			repo, err := remote.NewRepository(repository(n))
			if err != nil {
				return err
			}
			repo.PlainHTTP = true
			if err := do(ctx, store, repo, tag(n)); err != nil {
				return err
			}
		}
		return nil
	}
}

func orasPull(ctx context.Context, store *oci.Store, repo *remote.Repository, tag string) error {
	_, err := oras.Copy(ctx, repo, tag, store, tag, oras.DefaultCopyOptions)
	return err
}

func orasPullMany(ctx context.Context, dir, name string, callers int) error {
	store, err := oci.NewWithContext(ctx, dir)
	if err != nil {
		return err
	}
	repo, err := remote.NewRepository(repository(name))
	if err != nil {
		return err
	}
	repo.PlainHTTP = true
	return atOnce(callers, func() error { return orasPull(ctx, store, repo, tag(name)) })
}

func orasPush(ctx context.Context, store *oci.Store, repo *remote.Repository, tag string) error {
	_, err := oras.Copy(ctx, store, tag, repo, tag, oras.DefaultCopyOptions)
	return err
}

// ggcrEntries returns what a layout names, by tag.
func ggcrEntries(dir string) (ggcr.ImageIndex, map[string]ggcr.Descriptor, error) {
	p, err := layout.FromPath(dir)
	if err != nil {
		return nil, nil, err
	}
	index, err := p.ImageIndex()
	if err != nil {
		return nil, nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, nil, err
	}
	entries := map[string]ggcr.Descriptor{}
	for _, d := range m.Manifests {
		entries[d.Annotations[ocispec.AnnotationRefName]] = d
	}
	return index, entries, nil
}

func ggcrCopy(_ context.Context, from, to string, names []string) error {
	src, entries, err := ggcrEntries(from)
	if err != nil {
		return err
	}
	dst, err := layout.Write(to, empty.Index)
	if err != nil {
		return err
	}
	for _, n := range names {
		named := layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: tag(n)})
		d := entries[tag(n)]
		if d.MediaType.IsIndex() {
			index, err := src.ImageIndex(d.Digest)
			if err != nil {
				return err
			}
			if err := dst.AppendIndex(index, named); err != nil {
				return err
			}
			continue
		}
		img, err := src.Image(d.Digest)
		if err != nil {
			return err
		}
		if err := dst.AppendImage(img, named); err != nil {
			return err
		}
	}
	return nil
}

func ggcrPull(ctx context.Context, store string, names []string) error {
	dst, err := layout.FromPath(store)
	if err != nil {
		if dst, err = layout.Write(store, empty.Index); err != nil {
			return err
		}
	}
	puller, err := ggcrremote.NewPuller()
	if err != nil {
		return err
	}
	for _, n := range names {
		ref, err := name.ParseReference(n, name.Insecure)
		if err != nil {
			return err
		}
		desc, err := puller.Get(ctx, ref)
		if err != nil {
			return err
		}
		img, err := desc.Image()
		if err != nil {
			return err
		}
		if err := dst.ReplaceImage(img, func(d ggcr.Descriptor) bool { return d.Annotations[ocispec.AnnotationRefName] == tag(n) },
			layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: tag(n)})); err != nil {
			return err
		}
	}
	return nil
}

func ggcrPush(ctx context.Context, store string, names []string) error {
	src, entries, err := ggcrEntries(store)
	if err != nil {
		return err
	}
	pusher, err := ggcrremote.NewPusher()
	if err != nil {
		return err
	}
	for _, n := range names {
		img, err := src.Image(entries[tag(n)].Digest)
		if err != nil {
			return err
		}
		ref, err := name.ParseReference(n, name.Insecure)
		if err != nil {
			return err
		}
		if err := pusher.Push(ctx, ref, img); err != nil {
			return err
		}
	}
	return nil
}

// regCopy copies with regclient between addresses that from and to make of a name.
func regCopy(ctx context.Context, names []string, from, to func(name string) string) error {
	host := config.HostNewName(names[0][:strings.IndexByte(names[0], '/')])
	host.TLS = config.TLSDisabled
	rc := regclient.New(regclient.WithConfigHost(*host))
	var src, dst regref.Ref
	var err error
	for _, n := range names {
		if src, err = regref.New(from(n)); err != nil {
			return err
		}
		if dst, err = regref.New(to(n)); err != nil {
			return err
		}
		if err = rc.ImageCopy(ctx, src, dst); err != nil {
			return err
		}
	}
	// Once for all: closing a directory collects garbage there, and takes longer than anything else.
	return errors.Join(rc.Close(ctx, src), rc.Close(ctx, dst))
}

func regDir(dir string) func(string) string {
	return func(name string) string { return fmt.Sprintf("ocidir://%s:%s", dir, tag(name)) }
}

func regSame(name string) string { return name }

func regCopyDirs(ctx context.Context, from, to string, names []string) error {
	return regCopy(ctx, names, regDir(from), regDir(to))
}

func regImport(ctx context.Context, file, store string, names []string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	dst, err := regref.New(regDir(store)(names[0]))
	if err != nil {
		return err
	}
	rc := regclient.New()
	return errors.Join(rc.ImageImport(ctx, dst, f, regclient.ImageWithImportName(tag(names[0]))), rc.Close(ctx, dst))
}

func regExport(ctx context.Context, store, file string, names []string) error {
	src, err := regref.New(regDir(store)(names[0]))
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	rc := regclient.New()
	return errors.Join(rc.ImageExport(ctx, src, f), rc.Close(ctx, src), f.Close())
}

func regPull(ctx context.Context, store string, names []string) error {
	return regCopy(ctx, names, regSame, regDir(store))
}

func regPush(ctx context.Context, store string, names []string) error {
	return regCopy(ctx, names, regDir(store), regSame)
}

// Work is a set of artifacts to be moved, in the forms that the libraries start from.
type Work struct {
	Names []string
	Bytes int64  // of layers
	Store string // ocilocal's root
	Full  string // layout directory with full names
	Tags  string // the same with bare tags
	Tar   string // archive of Full
	Tags2 string // archive of Tags
}

// NewWork makes n artifacts with layers of a size below dir. No two seeds have a layer in common.
func NewWork(ctx context.Context, dir, repository string, seed, n, layers int, size int64) (*Work, error) {
	w := newWork(dir)
	r, err := ocilocal.Open(ctx, w.Store, &ocilocal.Options{Format: ocilocal.FormatImageManifest})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if err := w.build(ctx, r, repository, seed, n, layers, size); err != nil {
		return nil, err
	}
	return w, w.export(ctx, r, repository)
}

// NewOwn makes the same in a library's own store, and not in the other forms.
func NewOwn(ctx context.Context, dir, repository, library string, n, layers int, size int64) (*Work, error) {
	w := newWork(dir)
	r, err := ocilocal.Open(ctx, w.Store, &ocilocal.Options{Format: ocilocal.FormatImageManifest})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if err := w.build(ctx, r, repository, 0, n, layers, size); err != nil || library == "ocilocal" {
		return w, err
	}
	return w, w.exportTags(ctx, r, repository)
}

// NewIndexWork makes one image index, which has n images with layers of a size.
func NewIndexWork(ctx context.Context, dir, repository string, n, layers int, size int64) (*Work, error) {
	source := newWork(filepath.Join(dir, "images"))
	r, err := ocilocal.Open(ctx, source.Store, &ocilocal.Options{Format: ocilocal.FormatImageManifest})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if err := source.build(ctx, r, repository, 0, n, layers, size); err != nil {
		return nil, err
	}
	refs := references(source.Names)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for i, ref := range refs {
		d, err := r.Resolve(ctx, ref)
		if err != nil {
			return nil, err
		}
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: fmt.Sprintf("bench%d", i)}
		index.Manifests = append(index.Manifests, d)
	}
	if err := r.ExportLayout(ctx, source.Full, refs, nil); err != nil {
		return nil, err
	}
	w := newWork(dir)
	w.Bytes, w.Names = source.Bytes, []string{repository + ":index"}
	if err := nameOnly(source.Full, w.Names[0], index); err != nil {
		return nil, err
	}
	own, err := ocilocal.Open(ctx, w.Store, nil)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if err := importDir(ctx, own, source.Full); err != nil {
		return nil, err
	}
	return w, w.export(ctx, own, repository)
}

// nameOnly puts an index into a layout and makes it all that index.json names.
func nameOnly(dir, name string, index ocispec.Index) error {
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	d := digest.FromBytes(b)
	if err := os.WriteFile(filepath.Join(dir, ocispec.ImageBlobsDir, string(d.Algorithm()), d.Encoded()), b, 0o600); err != nil {
		return err
	}
	b, err = json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageIndex, Digest: d, Size: int64(len(b)),
			Annotations: map[string]string{ocispec.AnnotationRefName: name}}}})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, ocispec.ImageIndexFile), b, 0o600)
}

func newWork(dir string) *Work {
	return &Work{Store: filepath.Join(dir, "store"), Full: filepath.Join(dir, "full"),
		Tags: filepath.Join(dir, "tags"), Tar: filepath.Join(dir, "full.tar"), Tags2: filepath.Join(dir, "tags.tar")}
}

// build makes the artifacts in ocilocal's store.
func (w *Work) build(ctx context.Context, r *ocilocal.LocalRegistry, repository string, seed, n, layers int, size int64) error {
	w.Bytes = int64(n*layers) * size
	for i := range n {
		w.Names = append(w.Names, fmt.Sprintf("%s:t%05d", repository, i))
		b, err := r.NewBuilder(ocilocal.MustParseReference(w.Names[i]), &ocilocal.BuilderOptions{ArtifactType: artifactType})
		if err != nil {
			return err
		}
		for k := range layers {
			if _, err := b.AddLayer(ctx, layerType, Large(uint64(seed<<20+i*layers+k), size), nil); err != nil {
				return err
			}
		}
		if _, err := b.Build(ctx); err != nil {
			return err
		}
	}
	return nil
}

// export writes what is in ocilocal's store in the other forms.
func (w *Work) export(ctx context.Context, r *ocilocal.LocalRegistry, repository string) error {
	refs := references(w.Names)
	if err := r.ExportLayout(ctx, w.Full, refs, nil); err != nil {
		return err
	}
	if err := r.ExportArchiveFile(ctx, w.Tar, refs, nil); err != nil {
		return err
	}
	if err := w.exportTags(ctx, r, repository); err != nil {
		return err
	}
	f, err := os.Create(w.Tags2)
	if err != nil {
		return err
	}
	return errors.Join(tarDir(f, w.Tags), f.Close())
}

// exportTags writes the layout that has bare tags.
func (w *Work) exportTags(ctx context.Context, r *ocilocal.LocalRegistry, repository string) error {
	if err := r.ExportLayout(ctx, w.Tags, references(w.Names), nil); err != nil {
		return err
	}
	index := filepath.Join(w.Tags, ocispec.ImageIndexFile)
	b, err := os.ReadFile(index)
	if err != nil {
		return err
	}
	return os.WriteFile(index, []byte(strings.ReplaceAll(string(b), repository+":", "")), 0o600)
}

// Source is the layout or archive that a library takes: ocilocal's has full names.
func (w *Work) Source(library string, archive bool) string {
	switch {
	case library == "ocilocal" && archive:
		return w.Tar
	case library == "ocilocal":
		return w.Full
	case archive:
		return w.Tags2
	}
	return w.Tags
}

// Own is the library's own store with the work in it.
func (w *Work) Own(library string) string {
	if library == "ocilocal" {
		return w.Store
	}
	return w.Tags
}

func tarDir(f *os.File, dir string) error {
	w := tar.NewWriter(f)
	return errors.Join(w.AddFS(os.DirFS(dir)), w.Close())
}
