// Layouts and archives made by hand, the refs and files that an import of them must leave, and artifacts
// that most tests of imports and exports publish.

package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// layoutDir writes the entries of a layout to a new directory.
func layoutDir(t testing.TB, entries ...entry) string {
	t.Helper()
	dir := t.TempDir()
	for _, e := range entries {
		name := filepath.Join(dir, filepath.FromSlash(e.name))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch e.head.Typeflag {
		case tar.TypeSymlink:
			err = os.Symlink(e.head.Linkname, name)
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		default:
			err = os.WriteFile(name, []byte(e.body), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

var layoutVersion = entry{name: "oci-layout", body: `{"imageLayoutVersion":"1.0.0"}`}

func symlink(name, to string) entry {
	return entry{name: name, head: tar.Header{Typeflag: tar.TypeSymlink, Linkname: to}}
}

// tree returns the bytes of every file below dir, and the modes of all entries.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if !e.Type().IsRegular() {
			got[rel] = e.Type().String()
			return nil
		}
		b, err := os.ReadFile(p)
		got[rel] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func ref(s string) ocilocal.Reference { return ocilocal.MustParseReference(s) }

// checkNothingVisible fails when a failed import has left a ref or a staged file.
func checkNothingVisible(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	for ref, err := range r.Refs(context.Background(), nil) {
		t.Errorf("visible: %v %v", ref.Reference, err)
	}
	for name := range tree(t, filepath.Join(r.Root(), "tmp")) {
		t.Errorf("left in tmp/: %s", name)
	}
}

// published builds an artifact with one layer and, if subject isn't nil, that subject.
func published(t testing.TB, r *ocilocal.LocalRegistry, name, layer string, subject *ocilocal.LocalArtifact) *ocilocal.LocalArtifact {
	t.Helper()
	b, err := r.NewBuilder(ref(name), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Cancel()
	if _, err := b.AddLayerBytes(t.Context(), "text/plain", []byte(layer), nil); err != nil {
		t.Fatal(err)
	}
	if subject != nil {
		if err := b.SetSubject(subject.Descriptor()); err != nil {
			t.Fatal(err)
		}
	}
	a, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

type entry struct {
	name string
	body string
	head tar.Header // Typeflag, Linkname, PAXRecords; zero for a plain file
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.head
		h.Name, h.Mode = e.name, 0o644
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.body))
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write([]byte(e.body)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func blobEntry(body string) entry {
	d := digest.FromString(body)
	return entry{name: "blobs/sha256/" + d.Encoded(), body: body}
}

func desc(mediaType, body string) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, digest.FromString(body), len(body))
}

const imageType = "application/vnd.oci.image.manifest.v1+json"

// image returns the parts of an image manifest with one layer.
func image(layer string) (manifest, config string) {
	config = "{}"
	return fmt.Sprintf(`{"schemaVersion":2,"artifactType":"application/vnd.example.test","config":%s,"layers":[%s]}`,
		desc("application/vnd.oci.empty.v1+json", config), desc("text/plain", layer)), config
}

func layoutIndex(manifest, name string) entry {
	return entry{name: "index.json", body: fmt.Sprintf(
		`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":%q}}]}`,
		imageType, digest.FromString(manifest), len(manifest), name)}
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

// endlessZeros is a stream without an end.
type endlessZeros struct{}

// indexOf is an index.json of descriptors.
func indexOf(descriptors ...string) entry {
	return entry{name: "index.json", body: `{"schemaVersion":2,"manifests":[` + strings.Join(descriptors, ",") + `]}`}
}

// with adds fields to a descriptor, as JSON.
func with(descriptor, fields string) string {
	return strings.TrimSuffix(descriptor, "}") + "," + fields + "}"
}

// called adds annotations, as pairs of key and value.
func called(descriptor string, pairs ...string) string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return with(descriptor, `"annotations":`+string(b))
}

const (
	refName   = "org.opencontainers.image.ref.name"
	imageName = "io.containerd.image.name"
)

// importBoth imports a layout as a directory and as an archive. Both must give the same refs, or the same kind of error.
func importBoth(t *testing.T, opts *ocilocal.ImportOptions, entries ...entry) (*ocilocal.LocalRegistry, *ocilocal.ImportResult, error) {
	t.Helper()
	dir, archive := openTemp(t, nil), openTemp(t, nil)
	got, err := dir.ImportLayout(t.Context(), layoutDir(t, entries...), opts)
	other, otherErr := archive.ImportArchive(t.Context(), bytes.NewReader(tarOf(t, entries...)), opts)
	if (err == nil) != (otherErr == nil) {
		t.Fatalf("directory: %v; archive: %v", err, otherErr)
	}
	if err != nil {
		nothingCame(t, dir)
		nothingCame(t, archive)
		return dir, got, err
	}
	if (opts == nil || !opts.Anonymous) && fmt.Sprint(got.Artifacts) != fmt.Sprint(other.Artifacts) {
		t.Errorf("from the directory %v, from the archive %v", got.Artifacts, other.Artifacts)
	}
	if len(got.Skipped) != len(other.Skipped) {
		t.Errorf("skipped in the directory %v, in the archive %v", got.Skipped, other.Skipped)
	}
	checkSound(t, dir)
	checkSound(t, archive)
	return dir, got, nil
}

// imageIndexOf is an image index of descriptors.
func imageIndexOf(descriptors ...string) string {
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, strings.Join(descriptors, ","))
}
