package ocilocal_test

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// golden returns the path of a file that a real tool has made: see testdata/golden/README.md.
func golden(name string) string { return filepath.Join("testdata", "golden", name) }

// unpackGolden unpacks a directory that a real tool has made.
func unpackGolden(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(golden(name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), strings.TrimSuffix(name, ".tar.gz"))
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, 0o755)
		} else {
			var body []byte
			if body, err = io.ReadAll(r); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, body, h.FileInfo().Mode().Perm()))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// demoRef is the name that the content of most golden files has.
const demoRef = "ghcr.io/example/demo:v1"

// goldenEntries are the entries of the archives and layouts: what each is called there, the
// reference that this is, if it is one, and the digest that the tool itself reports.
var goldenEntries = map[string][]struct{ name, ref, digest string }{
	"buildah.tar":                {{demoRef, demoRef, "d26d6fcbfef95ed8590928acb21664acf7ac4ecb558d3dd7ace73dcc36a43d38"}},
	"containerd.tar":             {{"v1", demoRef, multiDigest}},
	"crane-layout.tar.gz":        {{"127.0.0.1:5998/example/demo:v1", "127.0.0.1:5998/example/demo:v1", imageDigest}},
	"docker-save.tar":            {{"v1", demoRef, imageDigest}},
	"docker-save-multi.tar":      {{"v1", demoRef, multiDigest}},
	"docker-save-platform.tar":   {{"v1", demoRef, "b7dc28e92c69433272d3710ed418f6e8d26a273be7cc49da0cdecf38edea3261"}},
	"ommx-0.5.1.ommx":            {{demoRef, demoRef, "7f84cfcc523aa71c66e34470124bf033f9f19cdf5f359c9c6e94ac068c913a15"}},
	"ommx-1.9.5.ommx":            {{demoRef, demoRef, "353b98fe463762683a895a307ed44a830d145c631d34db1931af697e1c770149"}},
	"ommx-2.9.3.ommx":            {{demoRef, demoRef, ommx2Digest}},
	"ommx-3.0.0a8.ommx":          {{demoRef, demoRef, ommx3Digest}},
	"ommx-3.0.0b7.ommx":          {{demoRef, demoRef, ommx3Digest}},
	"oras-backup.tar":            {{"v1", "", orasDigest}},
	"oras-layout.tar.gz":         {{"v1", "", orasDigest}},
	"podman.tar":                 {{demoRef, demoRef, "d26d6fcbfef95ed8590928acb21664acf7ac4ecb558d3dd7ace73dcc36a43d38"}},
	"regctl.tar":                 {{"v1", "127.0.0.1:5998/example/demo:v1", imageDigest}},
	"regctl-multi.tar":           {{"multi", "127.0.0.1:5998/example/demo:multi", multiDigest}},
	"seed-layout.tar.gz":         {{"v1", "", imageDigest}, {"multi", "", multiDigest}},
	"skopeo.tar":                 {{demoRef, demoRef, imageDigest}},
	"skopeo-tag.tar":             {{"v1", "", imageDigest}},
	"skopeo-multi-layout.tar.gz": {{"v1", "", multiDigest}},
	"umoci-layout.tar.gz":        {{"v1", "", "a80acb545f10806340805d8c1e1f9dd3a2554e90ab1264788d2d882502919ce7"}},
}

const (
	imageDigest = "77f98b76b3e6ca2f5b898123b0e563a8983e8223e76b16db3d5d5b276ba09cf8"
	multiDigest = "dfc24d2f13f628d5371ee1804930f0fc566e519d0f1825999ce310b94567d956"
	orasDigest  = "a03992a37c062d7c4b96c601f65e80072f914130722c409b4bd955bcdb666f6b"
	ommx2Digest = "a018977f56d89a56617a97a02471769dd8a8372408c4b85b8e5161d4debd7881"
	ommx3Digest = "e19716526b9b366352072bd1eecd55c0ae9caf0d7a2fda2822df937c1aff36f7"
)

// TestGolden imports files of real tools through each door that takes them, and then exports and
// imports the content again. Names and digests are those that the tools report.
func TestGolden(t *testing.T) {
	for name, want := range goldenEntries {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sources := []string{golden(name)}
			if strings.HasSuffix(name, ".tar.gz") {
				sources = append(sources, unpackGolden(t, name))
			}
			for _, source := range sources {
				in, err := ocilocal.InspectPath(t.Context(), source)
				if err != nil {
					t.Fatal(err)
				}
				if len(in.Entries) != len(want) {
					t.Fatalf("%s has the entries %+v", source, in.Entries)
				}
				for i, w := range want {
					e := in.Entries[i]
					if e.Name != w.name || e.Reference.String() != w.ref || e.Descriptor.Digest.Encoded() != w.digest {
						t.Errorf("%s: entry %d is %q, %q, %s; want %+v", source, i, e.Name, e.Reference, e.Descriptor.Digest, w)
					}
					importGolden(t, source, e)
				}
			}
		})
	}
}

// importGolden imports one entry, reads all of it, and takes it through an archive to another
// registry.
func importGolden(t *testing.T, source string, e ocilocal.InspectedEntry) {
	t.Helper()
	opts := &ocilocal.ImportOptions{Select: e.Descriptor.Digest.String()}
	ref := e.Reference
	if ref.IsZero() {
		ref = ocilocal.MustParseReference("example.com/golden/" + e.Name)
		opts.Reference, opts.Rename = ref, true
	}
	r := openTemp(t, nil)
	result, err := r.ImportPath(t.Context(), source, opts)
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Artifacts) != 1 || result.Artifacts[0].Update.Reference != ref || result.Artifacts[0].Descriptor.Digest != e.Descriptor.Digest {
		t.Fatalf("imported %+v, want %s at %s", result.Artifacts, ref, e.Descriptor.Digest)
	}
	archive := filepath.Join(t.TempDir(), "again.tar")
	if err := r.ExportArchiveFile(t.Context(), archive, []ocilocal.Reference{ref}, nil); err != nil {
		t.Fatal(err)
	}
	other := openTemp(t, nil)
	if _, err := other.ImportArchiveFile(t.Context(), archive, nil); err != nil {
		t.Fatal(err)
	}
	if d, err := other.Resolve(t.Context(), ref); err != nil || d.Digest != e.Descriptor.Digest || d.MediaType != e.Descriptor.MediaType {
		t.Errorf("after an export and an import %s is %v, %v", ref, d, err)
	}
	for p, err := range other.Verify(t.Context(), nil) {
		t.Errorf("Verify: %v, %v", p, err)
	}
}

// TestGoldenRefused: Docker's own form of archive is not an OCI layout.
func TestGoldenRefused(t *testing.T) {
	for _, name := range []string{"podman-docker.tar", "crane-docker.tar"} {
		r := openTemp(t, nil)
		if _, err := r.ImportPath(t.Context(), golden(name), nil); !errors.Is(err, ocilocal.ErrUnsupportedMediaType) {
			t.Errorf("%s: %v", name, err)
		}
		if refs := listed(t, r); len(refs) != 0 {
			t.Errorf("%s: there are refs %v", name, refs)
		}
	}
}

// TestGoldenOMMX imports the registries of versions 2 and 3 of the OMMX SDK. The processes of
// version 3 ended without a checkpoint, so that most rows are in SQLite's log.
func TestGoldenOMMX(t *testing.T) {
	r := openTemp(t, nil)
	report, err := r.ImportLegacy(t.Context(), unpackGolden(t, "ommx-2.9.3-tree.tar.gz"), nil)
	if err != nil || report.Imported != 1 || len(report.Failed) != 0 {
		t.Errorf("version 2: %+v, %v", report, err)
	}
	if d, err := r.Resolve(t.Context(), ocilocal.MustParseReference(demoRef)); err != nil || d.Digest.Encoded() != ommx2Digest {
		t.Errorf("version 2: %v, %v", d, err)
	}
	for _, version := range []string{"3.0.0a8", "3.0.0b7"} { // schema 1 and schema 2
		r := openTemp(t, nil)
		report, err := r.ImportOMMX(t.Context(), unpackGolden(t, "ommx-"+version+"-registry.tar.gz"), nil)
		if err != nil || report.Imported != 1 || len(report.Failed) != 0 {
			t.Errorf("version %s: %+v, %v", version, report, err)
		}
		if d, err := r.Resolve(t.Context(), ocilocal.MustParseReference(demoRef)); err != nil || d.Digest.Encoded() != ommx3Digest {
			t.Errorf("version %s: %v, %v", version, d, err)
		}
	}
}

// schemaRefs are what the registry of each schema version has.
var schemaRefs = map[string]string{
	"example.com/golden/artifact:v1":      "10218802e51950634c846c9bc6ca411824a35b2847b994b7eab3e829f471d88e",
	"example.com/golden/child:v1":         "c0017df72cb66bda8f6508989ca15c78bd8bcd39e59345683ae17a3b3e455df2",
	"example.com/golden/multi:v1":         multiDigest,
	"example.com/golden/tagged:sha256__0": "4bd17fdf5a24e73ec0abf2b07751fa2629adba6be1cbdd446a3a023b21507071",
	"localhost:5000/golden/image:V1":      "4bd17fdf5a24e73ec0abf2b07751fa2629adba6be1cbdd446a3a023b21507071",
}

// TestGoldenSchemas opens registries that each schema version has made. All that they hold can
// be read; a child still leads to its parent, which only it needs; and a collection deletes what
// was removed or replaced before.
func TestGoldenSchemas(t *testing.T) {
	for version := 1; version <= 2; version++ {
		t.Run(fmt.Sprint(version), func(t *testing.T) { testGoldenSchema(t, fmt.Sprintf("ocilocal-schema%d.tar.gz", version)) })
	}
}

func testGoldenSchema(t *testing.T, name string) {
	root := unpackGolden(t, name)
	r := mustOpen(t, root)
	check := func() {
		t.Helper()
		n := 0
		for ref, err := range r.Refs(t.Context(), nil) {
			if err != nil {
				t.Fatal(err)
			}
			if n++; schemaRefs[ref.Reference.String()] != ref.Descriptor.Digest.Encoded() {
				t.Errorf("%s is at %s", ref.Reference, ref.Descriptor.Digest)
			}
		}
		if n != len(schemaRefs) {
			t.Errorf("%d refs, want %d", n, len(schemaRefs))
		}
		for p, err := range r.Verify(t.Context(), nil) {
			t.Errorf("Verify: %v, %v", p, err)
		}
		child, err := r.Load(t.Context(), ocilocal.MustParseReference("example.com/golden/child:v1"))
		if err != nil {
			t.Fatal(err)
		}
		parent, err := child.Parent(t.Context())
		if err != nil || parent == nil {
			t.Fatalf("the child's parent: %v, %v", parent, err)
		}
		if layers, err := parent.Layers(t.Context()); err != nil || len(layers) != 2 {
			t.Errorf("the parent's layers: %v, %v", layers, err)
		}
	}
	check()
	if report, err := r.GC(t.Context(), atOnce); err != nil || report.Deleted.Manifests != 1 || report.Deleted.Blobs != 1 {
		t.Errorf("the collection: %+v, %v", report, err)
	}
	check()
	mustClose(t, r)
	r = mustOpen(t, root)
	check()
}
