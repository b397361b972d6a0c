// The files beside the root of a flow: the source of an import, which must not change, or the target
// of an export, which must be whole or untouched. The flows themselves are in faults_test.go.

package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

func besideOf(root string) string { return filepath.Join(filepath.Dir(root), "beside") }

const (
	newRefLegacy = "example.com/fault/new/__v1" // newRef in a legacy tree
	othersRef    = "example.com/fault/others:v1"
	archiveName  = "a.tar"
)

func exportLayoutFlow(r *ocilocal.LocalRegistry) error {
	return r.ExportLayout(context.Background(), besideOf(r.Root()), exportedRefs, nil)
}

func exportArchiveFlow(r *ocilocal.LocalRegistry) error {
	name := filepath.Join(besideOf(r.Root()), archiveName)
	err := r.ExportArchiveFile(context.Background(), name, exportedRefs, nil)
	if errors.Is(err, ocilocal.ErrExists) {
		err = r.ExportArchiveFile(context.Background(), name, exportedRefs, &ocilocal.ExportOptions{Overwrite: true})
	}
	return err
}

var exportedRefs = []ocilocal.Reference{ocilocal.MustParseReference(keptRef), ocilocal.MustParseReference(movedRef)}

func makeDir(t *testing.T, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

// writeEntries writes a layout below dir.
func writeEntries(below string, entries []entry) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		t.Helper()
		for _, e := range entries {
			name := filepath.Join(dir, filepath.FromSlash(path.Join(below, e.name)))
			if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(e.body), 0o444)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// othersEntries are the files of another tool's layout. The flow also exports one of its blobs.
func othersEntries() []entry {
	manifest := fmt.Sprintf(`{"schemaVersion":2,"artifactType":%q,"config":%s,"layers":[%s],"annotations":{%q:"theirs"}}`,
		testType, desc("application/vnd.oci.empty.v1+json", "{}"), desc("a/b", string(keptLayers[0])), labelKey)
	return []entry{layoutVersion, layoutIndex(manifest, othersRef), blobEntry(manifest), blobEntry("{}"), blobEntry(string(keptLayers[0]))}
}

// othersLayout has these files, another tool's file, and a damaged copy of a blob that is exported.
func othersLayout(t *testing.T, dir string) {
	t.Helper()
	damaged := blobEntry(string(keptLayers[1]))
	damaged.body = strings.ToUpper(damaged.body)
	writeEntries("", append(othersEntries(), damaged, entry{name: "NOTES", body: "theirs"}))(t, dir)
}

func othersArchive(t *testing.T, dir string) {
	t.Helper()
	writeEntries("", []entry{{name: archiveName, body: string(tarOf(t, othersEntries()...))}})(t, dir)
}

// checkBeside checks the files beside the root after a flow. done says whether the flow succeeded. If
// not, what is the operation that failed, or "kill".
func (f *flow) checkBeside(t *testing.T, root string, done bool, what string) {
	t.Helper()
	dir, fresh := besideOf(root), filepath.Join(t.TempDir(), "fresh")
	if f.beside != nil {
		f.beside(t, fresh)
	}
	if !f.exports {
		if f.beside != nil && !maps.Equal(tree(t, fresh), tree(t, dir)) {
			t.Error("the source of the import was changed")
		}
		return
	}
	archive := strings.HasPrefix(f.name, "export archive")
	before, after := readTarget(t, fresh), map[string]string{keptRef: "before", movedRef: "before"}
	if !archive {
		maps.Copy(after, before)
	}
	got := readTarget(t, dir)
	// Once the file has its name, only its sync and the removal of temporary files can fail.
	late := what == "kill" || what == "fsyncdir ." || what == "open ." || strings.HasPrefix(what, "remove ")
	if isAfter := maps.Equal(got, after); !isAfter && (done || !maps.Equal(got, before)) || isAfter && !done && !late && !maps.Equal(after, before) {
		t.Errorf("the target holds %v (done: %v, %s), was to hold %v, then %v", got, done, what, before, after)
	}
	// The next export into a layout removes the files of a killed one. Beside an archive they stay.
	var left []string
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, e := range entries {
		mayStay := (!done || archive) && (what == "kill" || strings.HasPrefix(what, "remove ")) && strings.HasPrefix(e.Name(), ".ocilocal-")
		// Only the holder of the lock may remove its directory, and this export did not get the lock.
		mayStay = mayStay || !done && strings.HasSuffix(what, " "+e.Name()) && e.Name() == ".ocilocal-tmp"
		if !mayStay && !slices.Contains([]string{"NOTES", "oci-layout", "index.json", "blobs", archiveName}, e.Name()) {
			left = append(left, e.Name())
		}
	}
	if len(left) > 0 {
		t.Errorf("left in the target (done: %v, %s): %q", done, what, left)
	}
	if _, err := os.Lstat(filepath.Join(fresh, "NOTES")); err == nil && tree(t, dir)["NOTES"] != "theirs" {
		t.Error("another tool's file is lost")
	}
}

// readTarget returns the refs of a layout directory, or of the archive in dir, with the labels of
// their artifacts. It fails if one is incomplete. It shares no code with the library.
func readTarget(t *testing.T, dir string) map[string]string {
	t.Helper()
	if raw, err := os.ReadFile(filepath.Join(dir, archiveName)); err == nil {
		return readLayoutFiles(t, untar(t, raw))
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return readLayoutFiles(t, tree(t, dir))
}

func untar(t *testing.T, raw []byte) map[string]string {
	t.Helper()
	files := map[string]string{}
	r := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		b, readErr := io.ReadAll(r)
		if err := errors.Join(err, readErr); err != nil {
			t.Errorf("archive is not whole: %v", err)
			return files
		}
		files[h.Name] = string(b)
	}
}

func readLayoutFiles(t *testing.T, files map[string]string) map[string]string {
	t.Helper()
	type descriptor struct {
		Digest      digest.Digest
		Size        int64
		Annotations map[string]string
	}
	whole := func(d descriptor) []byte {
		body, ok := files["blobs/sha256/"+d.Digest.Encoded()]
		if !ok || int64(len(body)) != d.Size || digest.FromString(body) != d.Digest {
			t.Errorf("%s is in the target's index, and its file is missing or damaged (%v)", d.Digest, ok)
		}
		return []byte(body)
	}
	index, ok := files["index.json"]
	if !ok {
		return nil
	}
	if files["oci-layout"] != layoutVersion.body {
		t.Errorf("a layout with an index.json has the oci-layout %q", files["oci-layout"])
	}
	var doc struct{ Manifests []descriptor }
	if err := json.Unmarshal([]byte(index), &doc); err != nil {
		t.Errorf("index.json: %v", err)
	}
	labels := map[string]string{}
	for _, e := range doc.Manifests {
		var m struct {
			Config        *descriptor
			Layers, Blobs []descriptor
			Annotations   map[string]string
		}
		if err := json.Unmarshal(whole(e), &m); err != nil {
			t.Errorf("%s: %v", e.Digest, err)
		}
		if m.Config != nil {
			whole(*m.Config)
		}
		for _, d := range slices.Concat(m.Layers, m.Blobs) {
			whole(d)
		}
		labels[e.Annotations["org.opencontainers.image.ref.name"]] = m.Annotations[labelKey]
	}
	return labels
}
