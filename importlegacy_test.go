package ocilocal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

const ommxType = "application/org.ommx.v1.artifact"

// ommxV2 returns a layout as the OMMX v2 SDK writes it: a manifest in the order of its struct,
// without mediaType, and the name in index.json if there is one.
func ommxV2(instance, artifactType, name string) (manifest string, entries []entry) {
	config := "{}"
	manifest = fmt.Sprintf(`{"schemaVersion":2,"artifactType":%q,"config":%s,"layers":[%s],"annotations":{"org.ommx.v1.artifact.title":%q}}`,
		artifactType, desc("application/vnd.oci.empty.v1+json", config), desc("application/org.ommx.v1.instance", instance), instance)
	annotations := "{}"
	if name != "" {
		annotations = fmt.Sprintf(`{"org.opencontainers.image.ref.name":%q}`, name)
	}
	index := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":%s}]}`,
		imageType, digest.FromString(manifest), len(manifest), annotations)
	return manifest, []entry{layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry(instance), {name: "index.json", body: index}}
}

// legacyTree writes entries at their paths: path → name in index.json.
func legacyTree(t testing.TB, at map[string]string) string {
	t.Helper()
	var all []entry
	for p, name := range at {
		_, entries := ommxV2(p, ommxType, name)
		for _, e := range entries {
			e.name = path.Join(p, e.name)
			all = append(all, e)
		}
	}
	return layoutDir(t, all...)
}

func legacyDigest(at, name string) digest.Digest {
	manifest, _ := ommxV2(at, ommxType, name)
	return digest.FromString(manifest)
}

const someHex = "67555a1e3fd8d4e1b4cdcf6b4ee8a62b4a2bd9fba8b95fca0b24e2c33d3f3b4e"

// legacyNames has each spelling of names that OMMX v2 uses: the path, the name in index.json, and
// the reference today.
var legacyNames = []struct{ path, name, today string }{
	{"ghcr.io/jij-inc/ommx/demo/__v1", "ghcr.io/jij-inc/ommx/demo:v1", "ghcr.io/jij-inc/ommx/demo:v1"},
	{"ghcr.io/jij-inc/ommx/demo/__v2", "", "ghcr.io/jij-inc/ommx/demo:v2"},
	{"localhost__5000/test_repo/__latest", "localhost:5000/test_repo:latest", "localhost:5000/test_repo:latest"},
	{"localhost__5000/test_repo/__v1", "", "localhost:5000/test_repo:v1"},
	{"registry-1.docker.io/ubuntu/__20.04", "registry-1.docker.io/ubuntu:20.04", "docker.io/library/ubuntu:20.04"},
	{"registry-1.docker.io/ubuntu/__22.04", "ubuntu:22.04", "docker.io/library/ubuntu:22.04"},
	{"library/ubuntu/__24.04", "library/ubuntu:24.04", "docker.io/library/ubuntu:24.04"},
	{"jij/demo/__v1", "", "docker.io/jij/demo:v1"},
	{"docker.io/library/alpine/__3", "", "docker.io/library/alpine:3"},
	{"example.com/foo/__my__tag", "example.com/foo:my__tag", "example.com/foo:my__tag"},
	{"example.com/foo/__your__tag", "", "example.com/foo:your__tag"},
	{"example.com/a__b/c/__v1", "example.com/a__b/c:v1", "example.com/a__b/c:v1"},
	{"example.com/bare/__v1", "v1", "example.com/bare:v1"},
}

// TestImportLegacy imports a tree by four processes at once: each entry is imported by one of them
// and verified by the others. A later import heals a blob that was damaged, and the tree never
// changes.
func TestImportLegacy(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	at := map[string]string{}
	for _, c := range legacyNames {
		at[c.path] = c.name
	}
	root := legacyTree(t, at)
	before := tree(t, root)
	r := openTemp(t, nil)
	processes := make([]*worker, 4)
	for i := range processes {
		processes[i] = startWorker(t, "legacy", r.Root(), root)
		processes[i].expect("ready")
	}
	for _, p := range processes {
		p.send("go")
	}
	imported := 0
	for _, p := range processes {
		var scanned, mine, verified int
		if line := strings.Join(p.expect("report"), " "); line == "" {
			t.Error("no report")
		} else if _, err := fmt.Sscan(line, &scanned, &mine, &verified); err != nil || scanned != len(at) || mine+verified != len(at) {
			t.Errorf("scanned, imported, verified: %s", line)
		}
		imported += mine
		p.finish()
	}
	if imported != len(at) {
		t.Errorf("%d imported in all, want %d", imported, len(at))
	}
	for _, c := range legacyNames {
		desc, err := r.Resolve(ctx, ref(c.today))
		if err != nil || desc.Digest != legacyDigest(c.path, c.name) {
			t.Errorf("%s: %v %v", c.today, desc.Digest, err)
		}
	}
	// An import compares the bytes of the registry, and heals a blob that was damaged.
	layer := digest.FromString(legacyNames[0].path)
	rewrite(t, blobFile(r, layer), flipBit)
	again, err := r.ImportLegacy(ctx, root, nil)
	if err != nil || again.Verified != len(at) {
		t.Errorf("%+v %v", again, err)
	}
	if b, err := os.ReadFile(blobFile(r, layer)); err != nil || digest.FromBytes(b) != layer {
		t.Errorf("a damaged blob holds %q after the tree was imported again, %v", b, err)
	}
	if !maps.Equal(before, tree(t, root)) {
		t.Error("the source was changed")
	}
}

func init() { workers["legacy"] = legacyWorker }

// legacyWorker imports a legacy tree on request: "ready", then "report scanned imported
// verified".
func legacyWorker(in *bufio.Scanner, args []string) error {
	ctx := context.Background()
	r, err := ocilocal.Open(ctx, args[0], nil)
	if err != nil {
		return err
	}
	say("ready")
	in.Scan()
	report, err := r.ImportLegacy(ctx, args[1], nil)
	if err == nil {
		say("report", report.Scanned, report.Imported, report.Verified)
	}
	return errors.Join(err, r.Close())
}

// TestImportLegacyFailures has a tree with good and bad entries. The report lists each bad one with
// its error, and the good ones are imported.
func TestImportLegacyFailures(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	root := legacyTree(t, map[string]string{
		"example.com/good/__v1":     "example.com/good:v1",
		"example.com/conflict/__v1": "example.com/conflict:v1",
		"example.com/moved/__v1":    "example.com/elsewhere:v1",
		"example.com/damaged/__v1":  "",
		"example.com/noindex/__v1":  "",
		"example.com/BAD/__v1":      "",
		"__lost":                    "",
		"host/__lost":               "",
	})
	other, entries := ommxV2("other", "application/vnd.example.other", "example.com/other:v1")
	_ = other
	for _, e := range entries {
		name := filepath.Join(root, "example.com/other/__v1", filepath.FromSlash(e.name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(e.body), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	deep := filepath.Join(root, strings.Repeat("d/", 300))
	damaged := filepath.Join(root, "example.com/damaged/__v1/blobs/sha256", digest.FromString("example.com/damaged/__v1").Encoded())
	if err := errors.Join(
		os.MkdirAll(deep, 0o755),
		os.WriteFile(damaged, []byte("?"), 0o644),
		os.Remove(filepath.Join(root, "example.com/noindex/__v1/index.json")),
		os.Symlink("..", filepath.Join(root, "example.com/loop")),
		os.Symlink("good", filepath.Join(root, "example.com/__link")),
	); err != nil {
		t.Fatal(err)
	}
	for _, policy := range []ocilocal.Policy{ocilocal.KeepExisting, ocilocal.Replace} {
		r := openTemp(t, nil)
		mine := published(t, r, "example.com/conflict:v1", "mine", nil)
		report, err := r.ImportLegacy(ctx, root, &ocilocal.LegacyOptions{Policy: policy})
		if err != nil {
			t.Fatal(err)
		}
		var failed []string
		for _, f := range report.Failed {
			failed = append(failed, f.Entry)
			for entry, want := range map[string]error{
				"example.com/moved/__v1": ocilocal.ErrInvalidLayout, "example.com/damaged/__v1": ocilocal.ErrSizeMismatch,
				"example.com/noindex/__v1": ocilocal.ErrInvalidLayout, "example.com/BAD/__v1": ocilocal.ErrInvalidReference,
				"example.com/other/__v1": ocilocal.ErrArtifactType, "__lost": ocilocal.ErrInvalidLayout, "host/__lost": ocilocal.ErrInvalidLayout,
				"example.com/loop": ocilocal.ErrInvalidLayout, "example.com/__link": ocilocal.ErrInvalidLayout,
			} {
				if f.Entry == entry && !errors.Is(f.Err, want) {
					t.Errorf("%s: %v, want %v", entry, f.Err, want)
				}
			}
		}
		if len(failed) != 10 || report.Imported != 1 || report.Scanned != 9 {
			t.Errorf("failed %q, %+v", failed, report)
		}
		desc, err := r.Resolve(ctx, mine.Reference())
		if err != nil {
			t.Fatal(err)
		}
		if kept := desc.Digest == mine.Digest(); kept != (policy == ocilocal.KeepExisting) ||
			kept != (len(report.Conflicted) == 1) || kept == (report.Replaced == 1) {
			t.Errorf("policy %v: %+v", policy, report)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := openTemp(t, nil).ImportLegacy(ctx, root, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := openTemp(t, nil).ImportLegacy(t.Context(), filepath.Join(root, "nothing"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestLoadLegacy loads each name by its reference of today, first from the tree, then from the
// index.
func TestLoadLegacy(t *testing.T) {
	ctx := t.Context()
	at := map[string]string{}
	for _, c := range legacyNames {
		at[c.path] = c.name
	}
	at["quay.io/jitesoft/alpine/__sha256__"+someHex] = "" // its content is another's
	root := legacyTree(t, at)
	r := openTemp(t, &ocilocal.Options{LegacyRoot: root})
	// A load looks only at the paths of a name. It never lists a directory of the tree.
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "readdir" && !strings.HasPrefix(name, "tmp") {
			t.Errorf("%s was listed", name)
		}
		return nil
	})
	for _, c := range legacyNames {
		a, err := r.Load(ctx, ref(c.today))
		if err != nil || a.Digest() != legacyDigest(c.path, c.name) || a.Reference() != ref(c.today) {
			t.Errorf("%s: %v", c.today, err)
		}
	}
	if _, err := r.Load(ctx, ref("quay.io/jitesoft/alpine@sha256:"+someHex)); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("by a digest that is not that of the content: %v", err)
	}
	for _, missing := range []string{"ghcr.io/jij-inc/ommx/demo:v9", "example.com/nothing/at:all"} {
		if _, err := r.Load(ctx, ref(missing)); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%s: %v", missing, err)
		}
	}
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	for _, c := range legacyNames {
		if _, err := r.Load(ctx, ref(c.today)); err != nil {
			t.Errorf("second load: %v", err)
		}
	}
	var names []string
	for ref, err := range r.Refs(ctx, nil) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, ref.Reference.String())
	}
	if want := len(legacyNames); len(names) != want {
		t.Errorf("%d refs, want %d: %q", len(names), want, names)
	}
}

// TestLoadLegacyByDigest loads an entry whose name is the digest of its manifest.
func TestLoadLegacyByDigest(t *testing.T) {
	manifest, entries := ommxV2("by digest", ommxType, "")
	d := digest.FromString(manifest)
	for i := range entries {
		entries[i].name = path.Join("quay.io/jitesoft/alpine/__sha256__"+d.Encoded(), entries[i].name)
	}
	root := layoutDir(t, entries...)
	name := ref("quay.io/jitesoft/alpine@" + d.String())
	r := openTemp(t, &ocilocal.Options{LegacyRoot: root})
	if a, err := r.Load(t.Context(), name); err != nil || a.Digest() != d {
		t.Fatal(err)
	}
	report, err := r.ImportLegacy(t.Context(), root, nil)
	if err != nil || report.Verified != 1 {
		t.Errorf("%+v %v", report, err)
	}
}

// TestLoadLegacyPinned loads by tag and digest. If the entry of the tag has another digest, the
// entry of the digest is loaded.
func TestLoadLegacyPinned(t *testing.T) {
	manifest, pinned := ommxV2("pinned", ommxType, "")
	d := digest.FromString(manifest)
	_, tagged := ommxV2("tagged", ommxType, "quay.io/x/y:v1")
	var all []entry
	for at, entries := range map[string][]entry{"quay.io/x/y/__sha256__" + d.Encoded(): pinned, "quay.io/x/y/__v1": tagged} {
		for _, e := range entries {
			e.name = path.Join(at, e.name)
			all = append(all, e)
		}
	}
	r := openTemp(t, &ocilocal.Options{LegacyRoot: layoutDir(t, all...)})
	if a, err := r.Load(t.Context(), ref("quay.io/x/y:v1@"+d.String())); err != nil || a.Digest() != d {
		t.Error(err)
	}
	if _, err := r.Load(t.Context(), ref("quay.io/x/y:v1@sha256:"+someHex)); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("a digest that the tree doesn't have: %v", err)
	}
}

// TestLoadLegacyLinks has links and files in the paths of entries. Load finds no such entry.
func TestLoadLegacyLinks(t *testing.T) {
	root := legacyTree(t, map[string]string{"real.example/foo/__v1": ""})
	outside := legacyTree(t, map[string]string{"foo/__v1": ""})
	if err := errors.Join(
		os.Symlink(outside, filepath.Join(root, "out.example")),
		os.Symlink("real.example", filepath.Join(root, "in.example")),
		os.Symlink("loop.example", filepath.Join(root, "loop.example")),
		os.Symlink("__v1", filepath.Join(root, "real.example/foo/__v2")),
		os.WriteFile(filepath.Join(root, "file.example"), nil, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	r := openTemp(t, &ocilocal.Options{LegacyRoot: root})
	for _, name := range []string{"out.example/foo:v1", "in.example/foo:v1", "loop.example/foo:v1", "file.example/foo:v1", "real.example/foo:v2"} {
		if a, err := r.Load(t.Context(), ref(name)); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%s: %v %v", name, a, err)
		}
	}
	if _, err := r.Load(t.Context(), ref("real.example/foo:v1")); err != nil {
		t.Error(err)
	}
}

// TestImportLegacyCondition: if the process has no descriptors left, the import ends with that
// error. It does not report any directory as bad.
func TestImportLegacyCondition(t *testing.T) {
	r := openTemp(t, nil)
	dir := legacyTree(t, map[string]string{"example.com/a/__v1": "", "example.com/b/__v1": ""})
	for _, at := range []string{"example.com", "example.com/a", "example.com/b"} {
		ocilocal.SetFault(r, func(op, name string) error {
			if op == "open" && name == at {
				return syscall.EMFILE
			}
			return nil
		})
		report, err := r.ImportLegacy(t.Context(), dir, nil)
		ocilocal.SetFault(r, nil)
		if !errors.Is(err, syscall.EMFILE) || len(report.Failed) > 0 {
			t.Errorf("at %s: %+v, %v", at, report, err)
		}
	}
}

func TestDefaultLegacyRoot(t *testing.T) {
	t.Setenv("OMMX_LOCAL_REGISTRY_ROOT", "/somewhere")
	if got, err := ocilocal.DefaultLegacyRoot(); err != nil || got != "/somewhere" {
		t.Error(got, err)
	}
	t.Setenv("OMMX_LOCAL_REGISTRY_ROOT", "")
	t.Setenv("HOME", "/home/someone")
	t.Setenv("AppData", `C:\Users\someone\AppData\Roaming`)
	for data, want := range map[string]string{
		"/data": "/data/ommx",
		"":      "/home/someone/.local/share/ommx",
		"data":  "/home/someone/.local/share/ommx", // relative paths are ignored, by the XDG specification
	} {
		switch runtime.GOOS {
		case "darwin":
			want = "/home/someone/Library/Application Support/org.ommx.ommx"
		case "windows":
			want = `C:\Users\someone\AppData\Roaming\ommx\ommx\data`
		}
		t.Setenv("XDG_DATA_HOME", data)
		if got, err := ocilocal.DefaultLegacyRoot(); err != nil || got != want {
			t.Errorf("XDG_DATA_HOME=%q: %q, %v; want %q", data, got, err, want)
		}
	}
}

// FuzzLegacyNames turns references into their paths in an OMMX v2 registry, and back. A path never
// gets a name that belongs to another path. A digest names only content that has it.
func FuzzLegacyNames(f *testing.F) {
	d := digest.FromString("manifest")
	for _, s := range []string{
		"ghcr.io/jij-inc/ommx/demo:v1", "localhost:5000/test_repo:latest", "ubuntu:20.04", "library/ubuntu:20.04", "example.com/foo:my__tag",
		"example.com/a__b/c:v1", "quay.io/jitesoft/alpine@" + d.String(), "example.com/a:sha256__" + d.Encoded(), "example.com/a:sha256__x", "[::1]:5000/a:v1",
		"example.com/a:v1@" + d.String(), "index.docker.io/x:__v",
		"docker.io/0__0/0", "docker.io/a__5/b:v1",
	} {
		f.Add(s, "manifest", true)
		f.Add(s, "other", false)
	}
	f.Fuzz(func(t *testing.T, s, content string, annotated bool) {
		want, err := ocilocal.ParseReference(s)
		if err != nil {
			return
		}
		desc := ocispec.Descriptor{Digest: digest.FromString(content)}
		if annotated {
			desc.Annotations = map[string]string{"org.opencontainers.image.ref.name": want.String()}
		}
		for _, path := range ocilocal.LegacyPaths(want) {
			got, err := ocilocal.LegacyName(path, []ocispec.Descriptor{desc})
			if err != nil {
				t.Fatalf("%s at %s: %v", want, path, err)
			}
			if annotated && got != want {
				t.Errorf("%s at %s is called %s", want, path, got)
			}
			if !slices.Contains(ocilocal.LegacyPaths(got), path) {
				t.Errorf("%s at %s is called %s, which does not belong there", want, path, got)
			}
			if !annotated && got.Name() != want.Name() {
				t.Errorf("%s at %s is called %s, another name", want, path, got)
			}
			if !annotated && got.Digest() != "" && got.Digest() != desc.Digest {
				t.Errorf("%s is called %s, the digest of other content", desc.Digest, got)
			}
		}
	})
}

// TestImportLegacyStray: an import reports a layout in the tree whose path is not a name.
func TestImportLegacyStray(t *testing.T) {
	root := legacyTree(t, map[string]string{"ghcr.io/org/demo/__v1": "", "ghcr.io/org/demo/__v2": ""})
	demo := filepath.Join(root, "ghcr.io", "org", "demo")
	if err := errors.Join(os.Rename(filepath.Join(demo, "__v1"), filepath.Join(demo, "v1")), os.Rename(filepath.Join(demo, "__v2"), filepath.Join(demo, "v2")),
		os.Remove(filepath.Join(demo, "v2", "oci-layout")), os.WriteFile(filepath.Join(demo, "index.json"), nil, 0o644)); err != nil { // the last one is not a layout
		t.Fatal(err)
	}
	report, err := openTemp(t, nil).ImportLegacy(t.Context(), root, nil)
	if err != nil || report.Scanned != 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	var strays []string
	for _, f := range report.Failed {
		mustFail(t, f.Err, ocilocal.ErrInvalidLayout)
		strays = append(strays, f.Entry)
	}
	if slices.Sort(strays); !slices.Equal(strays, []string{"ghcr.io/org/demo/v1", "ghcr.io/org/demo/v2"}) {
		t.Errorf("reported %q", strays)
	}
}

// TestImportLegacyEntry imports one entry under each policy.
func TestImportLegacyEntry(t *testing.T) {
	const at = "example.com/one/__v1"
	root := legacyTree(t, map[string]string{at: "example.com/one:v1", "example.com/one/__v2": ""})
	r := openTemp(t, nil)
	own := published(t, r, "example.com/one:v1", "own", nil)
	u, err := r.ImportLegacyEntry(t.Context(), root, own.Reference(), nil)
	if !errors.Is(err, ocilocal.ErrConflict) || u.Outcome != ocilocal.Conflicted || u.Existing != own.Digest() {
		t.Errorf("%+v, %v", u, err)
	}
	for _, opts := range []*ocilocal.PublishOptions{{Policy: ocilocal.Replace}, {Expected: own.Digest()}} {
		if _, err := r.Tag(t.Context(), own.Digest(), own.Reference(), &ocilocal.PublishOptions{Policy: ocilocal.Replace}); err != nil {
			t.Fatal(err)
		}
		u, err = r.ImportLegacyEntry(t.Context(), root, own.Reference(), opts)
		if err != nil || u.Outcome != ocilocal.Replaced || u.Descriptor.Digest != legacyDigest(at, "example.com/one:v1") {
			t.Errorf("%+v: %+v, %v", opts, u, err)
		}
	}
	if ok, err := r.Exists(t.Context(), ref("example.com/one:v2")); ok || err != nil {
		t.Errorf("another entry came in: %v", err)
	}
	_, err = r.ImportLegacyEntry(t.Context(), root, ref("example.com/one:v3"), nil)
	mustFail(t, err, ocilocal.ErrNotFound)
	_, err = r.ImportLegacyEntry(t.Context(), root, ocilocal.Reference{}, nil)
	mustFail(t, err, ocilocal.ErrInvalidReference)
	_, err = r.ImportLegacyEntry(t.Context(), filepath.Join(root, "none"), ref("example.com/one:v1"), nil)
	mustFail(t, err, os.ErrNotExist)
}
