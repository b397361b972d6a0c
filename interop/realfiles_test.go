package interop_test

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// A realFile is a file or directory that a tool writes. The commands run one after another in a
// directory with the layout "seed" of testdata/golden (an image v1, and an index multi of two
// platforms) and a file "hello". HOST is a registry with both under example/demo,
// NAME is a full name, and STORE are the flags for a private image store.
type realFile struct {
	path     string
	commands string
	verdict  string // "" for a round trip; sparse for one in which a part is absent; else notOCI
}

const (
	notOCI = "not OCI"          // Docker's archives, skopeo's directories: refused
	sparse = "a part is absent" // an index whose children are not all there
)

// realFiles has the files that sessions with the tools end in, and those of testdata/golden that
// take a daemon or an old version.
var realFiles = []realFile{
	{"skopeo-full.tar", "skopeo copy oci:seed:v1 oci-archive:skopeo-full.tar:NAME", ""},
	{"skopeo-tag.tar", "skopeo copy oci:seed:v1 oci-archive:skopeo-tag.tar:v1", ""},
	{"skopeo-unnamed.tar", "skopeo copy oci:seed:v1 oci-archive:skopeo-unnamed.tar", ""},
	{"skopeo-multi.tar", "skopeo copy --all oci:seed:multi oci-archive:skopeo-multi.tar:NAME", ""},
	{"skopeo-one-of-many.tar", "skopeo --override-arch arm64 --override-os linux copy oci:seed:multi oci-archive:skopeo-one-of-many.tar:arm", ""},
	{"skopeo-layout", "skopeo copy oci:seed:v1 oci:skopeo-layout:v1", ""},
	{"skopeo-layout-unnamed", "skopeo copy oci:seed:v1 oci:skopeo-layout-unnamed", ""},
	{"skopeo-layout-multi", "skopeo copy --all oci:seed:multi oci:skopeo-layout-multi:multi", ""},
	{"skopeo-layout-two", "skopeo copy oci:seed:v1 oci:skopeo-layout-two:v1; skopeo copy --all oci:seed:multi oci:skopeo-layout-two:multi", ""},
	{"skopeo-layout-moved", "skopeo copy oci:seed:v1 oci:skopeo-layout-moved:v1; skopeo copy --all oci:seed:multi oci:skopeo-layout-moved:v1", ""},
	{"skopeo-index-only", "skopeo copy --multi-arch index-only oci:seed:multi oci:skopeo-index-only:multi", sparse},
	{"skopeo-zstd", "skopeo copy --dest-compress-format zstd --dest-compress oci:seed:v1 oci:skopeo-zstd:v1", ""},
	{"skopeo-uncompressed", "skopeo copy --dest-decompress --dest-oci-accept-uncompressed-layers oci:seed:v1 oci:skopeo-uncompressed:v1", ""},
	{"skopeo-dir", "skopeo copy oci:seed:v1 dir:skopeo-dir", notOCI},
	{"skopeo-docker.tar", "skopeo copy oci:seed:v1 docker-archive:skopeo-docker.tar:NAME", notOCI},

	{"umoci-empty", "umoci init --layout umoci-empty", ""},
	{"umoci-new", "umoci init --layout umoci-new; umoci new --image umoci-new:v1", ""},
	{"umoci-insert", "umoci init --layout umoci-insert; umoci new --image umoci-insert:v1; umoci insert --rootless --image umoci-insert:v1 hello /hello", ""},
	{"umoci-garbage", "umoci init --layout umoci-garbage; umoci new --image umoci-garbage:v1; umoci config --image umoci-garbage:v1 --tag v2 --os linux; umoci rm --image umoci-garbage:v1", ""},
	{"umoci-tags", "umoci init --layout umoci-tags; umoci new --image umoci-tags:v1; umoci tag --image umoci-tags:v1 v2", ""},

	{"buildah.tar", "buildah BUILD; buildah STORE push demo oci-archive:buildah.tar:NAME", ""},
	{"buildah-unnamed.tar", "buildah BUILD; buildah STORE push demo oci-archive:buildah-unnamed.tar", ""},
	{"buildah-layout", "buildah BUILD; buildah STORE push demo oci:buildah-layout:v1", ""},
	{"buildah-list.tar", "buildah BUILD; buildah STORE manifest create list demo; buildah STORE manifest push --all list oci-archive:buildah-list.tar:NAME", ""},
	{"buildah-docker.tar", "buildah BUILD; buildah STORE push demo docker-archive:buildah-docker.tar:NAME", notOCI},
	{"buildah-dir", "buildah BUILD; buildah STORE push demo dir:buildah-dir", notOCI},

	{"podman.tar", "skopeo copy oci:seed:v1 oci-archive:in.tar:NAME; podman STORE load -i in.tar; podman STORE save --format oci-archive -o podman.tar NAME", ""},
	{"podman-dir", "skopeo copy oci:seed:v1 oci-archive:in.tar:NAME; podman STORE load -i in.tar; podman STORE save --format oci-dir -o podman-dir NAME", ""},
	{"podman-docker.tar", "skopeo copy oci:seed:v1 oci-archive:in.tar:NAME; podman STORE load -i in.tar; podman STORE save --format docker-archive -o podman-docker.tar NAME", notOCI},
	{"podman-docker-dir", "skopeo copy oci:seed:v1 oci-archive:in.tar:NAME; podman STORE load -i in.tar; podman STORE save --format docker-dir -o podman-docker-dir NAME", notOCI},

	{"crane-oci", "crane pull --format oci HOST/example/demo:v1 crane-oci", ""},
	{"crane-annotated", "crane pull --format oci --annotate-ref HOST/example/demo:v1 crane-annotated", ""},
	{"crane-index", "crane pull --format oci --annotate-ref HOST/example/demo:multi crane-index", ""},
	{"crane-platform", "crane pull --format oci --platform linux/arm64 --annotate-ref HOST/example/demo:multi crane-platform", ""},
	{"crane-two", "crane pull --format oci --annotate-ref HOST/example/demo:v1 crane-two; crane pull --format oci --annotate-ref HOST/example/demo:multi crane-two", ""},
	{"crane-tarball.tar", "crane pull HOST/example/demo:v1 crane-tarball.tar", notOCI},
	{"crane-legacy.tar", "crane pull --format legacy HOST/example/demo:v1 crane-legacy.tar", notOCI},

	{"regctl.tar", "regctl image export ocidir://seed:v1 regctl.tar", ""},
	{"regctl-named.tar", "regctl image export --name NAME ocidir://seed:v1 regctl-named.tar", ""},
	{"regctl-multi.tar", "regctl image export --name NAME ocidir://seed:multi regctl-multi.tar", ""},
	{"regctl-platform.tar", "regctl image export --platform linux/arm64 --name NAME ocidir://seed:multi regctl-platform.tar", ""},
	{"regctl.tar.gz", "regctl image export --compress ocidir://seed:v1 regctl.tar.gz", ""},
	{"regctl-dir", "regctl image copy ocidir://seed:v1 ocidir://regctl-dir:v1", ""},
	{"regctl-dir-multi", "regctl image copy ocidir://seed:multi ocidir://regctl-dir-multi:multi", ""},
	{"regctl-dir-sparse", "regctl image copy --platforms linux/arm64 ocidir://seed:multi ocidir://regctl-dir-sparse:multi", sparse},
	{"regctl-put", "regctl artifact put --artifact-type application/vnd.example --file hello ocidir://regctl-put:v1", ""},
	{"regctl-attached", "regctl artifact put --artifact-type application/vnd.example --file hello ocidir://regctl-attached:v1; " +
		"regctl artifact put --artifact-type application/vnd.note --file hello --subject ocidir://regctl-attached:v1", ""},
	{"regctl-deleted", "regctl image copy ocidir://seed:v1 ocidir://regctl-deleted:v1; regctl image copy ocidir://seed:multi ocidir://regctl-deleted:multi; regctl tag rm ocidir://regctl-deleted:v1", ""},

	{"oras-tag", "oras copy --from-oci-layout seed:v1 --to-oci-layout oras-tag:v1", ""},
	{"oras-multi", "oras copy --from-oci-layout seed:multi --to-oci-layout oras-multi:multi", ""},
	{"oras-push", "oras push --oci-layout oras-push:v1 --artifact-type application/vnd.example hello:text/plain", ""},
	{"oras-tags", "oras push --oci-layout oras-tags:v1,v2 --artifact-type application/vnd.example hello:text/plain", ""},
	{"oras-untagged", "oras push --oci-layout oras-untagged --artifact-type application/vnd.example hello:text/plain", ""},
	{"oras-attached", "oras push --oci-layout oras-attached:v1 --artifact-type application/vnd.example hello:text/plain; oras attach --oci-layout oras-attached:v1 --artifact-type application/vnd.note hello:text/plain", ""},
	{"oras-index", "oras copy --from-oci-layout seed:v1 --to-oci-layout oras-index:v1; oras manifest index create --oci-layout oras-index:all v1", ""},
	{"oras-backup.tar", "oras backup --plain-http --output oras-backup.tar HOST/example/demo:v1,multi", ""},
	{"oras-backup", "oras backup --plain-http --output oras-backup HOST/example/demo:v1", ""},

	{"ommx2.ommx", "ommx2 SCRIPT2 make ommx2.ommx", ""},
	{"ommx2.ommx.unnamed", "ommx2 SCRIPT2 make ommx2.ommx", ""},
	{"ommx3.ommx", "ommx3 SCRIPT3 make ommx3.ommx", ""},
	{"golden/ommx-0.5.1.ommx", "", ""},
	{"golden/ommx-1.9.5.ommx", "", ""},
	{"golden/containerd.tar", "", ""},
	{"golden/containerd-platform.tar", "", sparse},
	{"golden/docker-save.tar", "", ""},
	{"golden/docker-save-multi.tar", "", ""},
	{"golden/docker-save-platform.tar", "", ""},
}

// TestRealFiles imports files of all tools, exports them, and imports them again. Every digest
// stays. Whatever is not OCI is refused.
func TestRealFiles(t *testing.T) {
	s := inProcess(t, &server{}, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	b := newRealBox(t)
	for _, tag := range []string{"v1", "multi"} {
		b.run("skopeo", "copy", "--all", "--dest-tls-verify=false", "oci:seed:"+tag, "docker://"+s.host+"/example/demo:"+tag)
	}
	var mu sync.Mutex
	counts := map[string]int{}
	t.Run("each", func(t *testing.T) {
		for _, f := range realFiles {
			t.Run(f.path, func(t *testing.T) {
				t.Parallel()
				path := f.make(t, s.host)
				outcome := f.judge(t, path)
				mu.Lock()
				defer mu.Unlock()
				counts[outcome]++
			})
		}
	})
	t.Logf("%d files: %v", len(realFiles), counts)
}

// newRealBox is a box with the files that the commands of realFiles start from.
func newRealBox(t *testing.T) *box {
	t.Helper()
	b := newBox(t)
	unpack(t, filepath.Join("..", "testdata", "golden", "seed-layout.tar.gz"), b.path("seed"))
	b.write("hello", "hello\n")
	b.setenv("OMMX_LOCAL_REGISTRY_ROOT", b.path("ommx"))
	return b
}

// unpack unpacks a packed directory.
func unpack(t *testing.T, name, dir string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			continue
		}
		body, err := io.ReadAll(r)
		if err := errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, body, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

// make runs the commands and returns the path of what they wrote.
func (f realFile) make(t *testing.T, host string) string {
	t.Helper()
	if name, ok := strings.CutPrefix(f.path, "golden/"); ok {
		return filepath.Join("..", "testdata", "golden", name)
	}
	b := newRealBox(t)
	run, err := os.MkdirTemp("", "run") // podman takes no long name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	store := fmt.Sprintf("--root %s --runroot %s --storage-driver vfs", b.path("storage"), run)
	commands := strings.NewReplacer("HOST", host, "NAME", ommxName, "SCRIPT2", script(t, "ommx2"), "SCRIPT3", script(t, "ommx3"),
		"buildah BUILD", "buildah STORE from --name c scratch; buildah STORE copy c hello /hello; buildah STORE commit --timestamp 0 c demo",
	).Replace(f.commands)
	for command := range strings.SplitSeq(strings.ReplaceAll(commands, "STORE", store), ";") {
		words := strings.Fields(command)
		b.run(words[0], words[1:]...)
	}
	return b.path(f.path)
}

// judge imports a file, and takes everything in it through an archive and through a directory.
func (f realFile) judge(t *testing.T, path string) (outcome string) {
	t.Helper()
	r := newRegistry(t)
	opts := &ocilocal.ImportOptions{Repository: "example.com/real", Name: func(e ocilocal.InspectedEntry) (ocilocal.Reference, error) {
		if !e.Reference.IsZero() {
			return e.Reference, nil
		}
		return ocilocal.ParseReference("example.com/real/unnamed:" + e.Descriptor.Digest.Encoded())
	}}
	result, err := r.ImportPath(t.Context(), path, opts)
	switch f.verdict {
	case notOCI:
		if !errors.Is(err, ocilocal.ErrUnsupportedMediaType) && !errors.Is(err, ocilocal.ErrInvalidLayout) {
			t.Errorf("import: %v", err)
		}
		return notOCI
	}
	if err != nil {
		t.Fatal(err)
	}
	if f.verdict == sparse {
		outcome = sparse
	}
	if (len(result.Absent) > 0) != (f.verdict == sparse) {
		t.Errorf("absent: %v", result.Absent)
	}
	in, err := ocilocal.InspectPath(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if c := result.Conflicts(); len(c) > 0 || len(result.Skipped) > 0 || len(result.Artifacts) != len(in.Entries) {
		t.Errorf("of %d entries %d were imported, %d skipped, conflicts %v", len(in.Entries), len(result.Artifacts), len(result.Skipped), c)
	}
	var refs []ocilocal.Reference
	want := map[ocilocal.Reference]ocispec.Descriptor{}
	for _, a := range result.Artifacts {
		if !slices.ContainsFunc(in.Entries, func(e ocilocal.InspectedEntry) bool { return e.Descriptor.Digest == a.Descriptor.Digest }) {
			t.Errorf("%s is not in the file", a.Descriptor.Digest)
		}
		refs = append(refs, a.Update.Reference)
		want[a.Update.Reference] = a.Descriptor
	}
	if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Error(err)
	}
	if len(refs) == 0 {
		return "empty"
	}
	archive, dir := filepath.Join(t.TempDir(), "again.tar"), filepath.Join(t.TempDir(), "again")
	if err := errors.Join(r.ExportArchiveFile(t.Context(), archive, refs, nil), r.ExportLayout(t.Context(), dir, refs, nil)); err != nil {
		t.Fatal(err)
	}
	for _, again := range []string{archive, dir} {
		back := newRegistry(t)
		if _, err := back.ImportPath(t.Context(), again, nil); err != nil {
			t.Fatal(err)
		}
		for ref, desc := range want {
			got, err := back.Resolve(t.Context(), ref)
			if err != nil || got.Digest != desc.Digest || got.MediaType != desc.MediaType {
				t.Errorf("%s is %v, %v; was %v", ref, got, err, desc)
				continue
			}
			hasWhole(t, back, got.Digest, result.Absent...)
		}
	}
	return "round trip"
}
