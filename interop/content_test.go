package interop_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

const artifactType = "application/vnd.example.interop"

// newRegistry opens a registry of its own for a test.
func newRegistry(t *testing.T) *ocilocal.LocalRegistry {
	t.Helper()
	r, err := ocilocal.Open(t.Context(), filepath.Join(t.TempDir(), "root"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func reference(t *testing.T, s string) ocilocal.Reference {
	t.Helper()
	ref, err := ocilocal.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func references(t *testing.T, names []string) []ocilocal.Reference {
	t.Helper()
	var refs []ocilocal.Reference
	for _, s := range names {
		refs = append(refs, reference(t, s))
	}
	return refs
}

// tarball is a tar with one file.
func tarball(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// imageFile is what the image of buildImage has in its one layer.
const imageFile, imageContent = "hello.txt", "made by ocilocal\n"

// buildImage makes an image that container tools can unpack.
func buildImage(t *testing.T, r *ocilocal.LocalRegistry, name string) *ocilocal.LocalArtifact {
	t.Helper()
	layer := tarball(t, imageFile, imageContent)
	b, err := r.NewBuilder(reference(t, name), &ocilocal.BuilderOptions{Format: ocilocal.FormatImageManifest})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":{"Cmd":["/hello"]},"rootfs":{"type":"layers","diff_ids":[%q]}}`, digest.FromBytes(layer))
	if _, err := b.SetConfig(t.Context(), ocispec.MediaTypeImageConfig, []byte(config)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddLayerBytes(t.Context(), ocispec.MediaTypeImageLayerGzip, gzipped(t, layer), nil); err != nil {
		t.Fatal(err)
	}
	return build(t, b)
}

// buildArtifact makes an artifact that is no container image, about subject if that is not nil.
func buildArtifact(t *testing.T, r *ocilocal.LocalRegistry, name string, format ocilocal.ManifestFormat, subject *ocispec.Descriptor) *ocilocal.LocalArtifact {
	t.Helper()
	b, err := r.NewBuilder(reference(t, name), &ocilocal.BuilderOptions{ArtifactType: artifactType, Format: format})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	for i := range 3 {
		annotations := map[string]string{ocispec.AnnotationTitle: fmt.Sprintf("part-%d.txt", i)}
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", fmt.Appendf(nil, "%s part %d\n", name, i), annotations); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.SetAnnotation("org.example.text", `<&> "é" `+"\u2028"); err != nil {
		t.Fatal(err)
	}
	if subject != nil {
		if err := b.SetSubject(*subject); err != nil {
			t.Fatal(err)
		}
	}
	return build(t, b)
}

func build(t *testing.T, b *ocilocal.Builder) *ocilocal.LocalArtifact {
	t.Helper()
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// export writes an archive of refs into a file and returns its name.
func export(t *testing.T, r *ocilocal.LocalRegistry, refs ...string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ours.tar")
	if err := r.ExportArchiveFile(t.Context(), name, references(t, refs), nil); err != nil {
		t.Fatal(err)
	}
	return name
}

// exportLayout writes a layout directory of refs and returns its name.
func exportLayout(t *testing.T, r *ocilocal.LocalRegistry, refs ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ours")
	if err := r.ExportLayout(t.Context(), dir, references(t, refs), nil); err != nil {
		t.Fatal(err)
	}
	return dir
}

// importArchive imports an archive that a tool wrote into a new registry.
func importArchive(t *testing.T, name string, opts *ocilocal.ImportOptions) (*ocilocal.LocalRegistry, *ocilocal.ImportResult) {
	t.Helper()
	r := newRegistry(t)
	result, err := r.ImportArchiveFile(t.Context(), name, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r, result
}

// importLayout imports a layout directory that a tool wrote into a new registry.
func importLayout(t *testing.T, dir string, opts *ocilocal.ImportOptions) (*ocilocal.LocalRegistry, *ocilocal.ImportResult) {
	t.Helper()
	r := newRegistry(t)
	result, err := r.ImportLayout(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r, result
}

// as gives what is imported a name.
func as(t *testing.T, name string) *ocilocal.ImportOptions {
	return &ocilocal.ImportOptions{Reference: reference(t, name)}
}

// byDigest imports content without the names that it has.
var byDigest = &ocilocal.ImportOptions{IgnoreNames: true}

// hasWhole checks that a digest is there and that all below it reads back
// right. It returns how many manifests and blobs that were, each counted once.
func hasWhole(t *testing.T, r *ocilocal.LocalRegistry, d digest.Digest, absent ...ocispec.Descriptor) int {
	t.Helper()
	seen := map[digest.Digest]bool{}
	for _, a := range absent {
		seen[a.Digest] = true
	}
	if err := walk(t.Context(), r, d, seen); err != nil {
		t.Fatalf("%s: %v", d, err)
	}
	return len(seen)
}

func walk(ctx context.Context, r *ocilocal.LocalRegistry, d digest.Digest, seen map[digest.Digest]bool) error {
	if seen[d] {
		return nil
	}
	seen[d] = true
	a, err := r.LoadDigest(ctx, d)
	if err != nil {
		return err
	}
	m, err := a.Manifest(ctx)
	if err != nil {
		return err
	}
	for _, c := range m.Manifests() {
		if err := walk(ctx, r, c.Digest, seen); err != nil {
			return err
		}
	}
	blobs := slices.Clone(m.Layers())
	if config, ok := m.Config(); ok {
		blobs = append(blobs, config)
	}
	for _, desc := range blobs {
		src, err := r.OpenBlob(ctx, desc)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, src)
		src.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", desc.Digest, err)
		}
		seen[desc.Digest] = true
	}
	return nil
}

// wantImported checks that an import brought want, whole, and under ref if that is not "".
func wantImported(t *testing.T, r *ocilocal.LocalRegistry, result *ocilocal.ImportResult, ref, want string) {
	t.Helper()
	found := slices.ContainsFunc(result.Artifacts, func(a ocilocal.ImportedArtifact) bool { return string(a.Descriptor.Digest) == want })
	if !found {
		t.Fatalf("%s was not imported: %+v", want, result.Artifacts)
	}
	hasWhole(t, r, digest.Digest(want))
	if ref == "" {
		return
	}
	desc, err := r.Resolve(t.Context(), reference(t, ref))
	if err != nil {
		t.Fatal(err)
	}
	if string(desc.Digest) != want {
		t.Errorf("%s is %s, want %s", ref, desc.Digest, want)
	}
}

// wantEqual compares what a tool says with what was expected of it.
func wantEqual(t *testing.T, what, got, want string) {
	t.Helper()
	if strings.TrimSpace(got) != want {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}
