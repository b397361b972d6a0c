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
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

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

// tree returns every file below dir with its bytes, and the modes of all.
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

func TestImportLayout(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	manifest, config := image("layer")
	nested := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s]}`, desc(imageType, manifest))
	outer := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s,%s]}`,
		desc("application/vnd.oci.image.index.v1+json", nested), desc(imageType, manifest))
	artifact := fmt.Sprintf(`{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","artifactType":"application/vnd.example.test","blobs":[%s]}`, desc("text/plain", "layer"))
	at := func(d, name string) string {
		b, err := json.Marshal(name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSuffix(d, "}") + fmt.Sprintf(`,"annotations":{"org.opencontainers.image.ref.name":%s}}`, b)
	}
	index := func(entries ...string) entry {
		return entry{name: "index.json", body: `{"schemaVersion":2,"manifests":[` + strings.Join(entries, ",") + `],"x-unknown":[1]}`}
	}
	blobs := []entry{layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), blobEntry(nested), blobEntry(outer), blobEntry(artifact), {name: "README", body: "?"}}
	img := desc(imageType, manifest)
	art := desc("application/vnd.oci.artifact.manifest.v1+json", artifact)
	idx := desc("application/vnd.oci.image.index.v1+json", outer)
	unknown := desc("application/x-unknown", "?") // image-layout.md has an entry of application/xml
	pin := digest.FromString(manifest).String()
	for name, c := range map[string]struct {
		index entry
		opts  *ocilocal.ImportOptions
		want  []string // "reference digest", "- digest" for no ref
		fails error
	}{
		"full name":            {index(at(img, "example.com/a:v1")), nil, []string{"example.com/a:v1 " + manifest}, nil},
		"several forms":        {index(at(img, "example.com/a:v1"), at(art, "example.com/a:v2"), at(idx, "example.com/a:v3")), nil, []string{"example.com/a:v1 " + manifest, "example.com/a:v2 " + artifact, "example.com/a:v3 " + outer}, nil},
		"no name":              {index(img), nil, []string{"- " + manifest}, nil},
		"bare tag":             {index(at(img, "v1")), nil, nil, ocilocal.ErrBareName},
		"bare tag, ignored":    {index(at(img, "v1")), &ocilocal.ImportOptions{IgnoreNames: true}, []string{"- " + manifest}, nil},
		"bare tags, of a name": {index(at(img, "v1"), at(art, "v2@"+pin), at(idx, "example.com/a:v3")), &ocilocal.ImportOptions{Repository: "example.com/m"}, []string{"example.com/m:v1 " + manifest, "example.com/m:v2 " + artifact, "example.com/a:v3 " + outer}, nil},
		"bare tag, bad name":   {index(at(img, "v1")), &ocilocal.ImportOptions{Repository: "example.com/m:v1"}, nil, ocilocal.ErrInvalidReference},
		"bare tag, named":      {index(at(img, "v1")), &ocilocal.ImportOptions{Reference: ref("example.com/n:v1")}, []string{"example.com/n:v1 " + manifest}, nil},
		"bare tag, other":      {index(at(img, "v1")), &ocilocal.ImportOptions{Reference: ref("example.com/n:v2")}, nil, ocilocal.ErrInvalidArgument},
		"renamed":              {index(at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Reference: ref("example.com/n:v2"), Rename: true}, []string{"example.com/n:v2 " + manifest}, nil},
		"not renamed":          {index(at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Reference: ref("example.com/n:v2")}, nil, ocilocal.ErrInvalidArgument},
		"selected by name":     {index(at(img, "example.com/a:v1"), at(art, "example.com/a:v2")), &ocilocal.ImportOptions{Select: "example.com/a:v2"}, []string{"example.com/a:v2 " + artifact}, nil},
		"selected by digest":   {index(img, art), &ocilocal.ImportOptions{Select: digest.FromString(artifact).String()}, []string{"- " + artifact}, nil},
		"selected, not there":  {index(img), &ocilocal.ImportOptions{Select: "nothing"}, nil, ocilocal.ErrNotFound},
		"name without grammar": {index(at(img, "a\x1b[31m/../b c")), &ocilocal.ImportOptions{IgnoreNames: true}, []string{"- " + manifest}, nil},
		"unknown type beside":  {index(unknown, img), nil, []string{"- " + manifest}, nil},
		"unknown type, named":  {index(unknown, img), &ocilocal.ImportOptions{Reference: ref("example.com/n:v1")}, []string{"example.com/n:v1 " + manifest}, nil},
		"unknown type only":    {index(unknown), nil, nil, ocilocal.ErrUnsupportedMediaType},
		"unknown type, chosen": {index(at(unknown, "x"), at(img, "y")), &ocilocal.ImportOptions{Select: "x"}, nil, ocilocal.ErrUnsupportedMediaType},
		"unknown type, other":  {index(at(unknown, "x"), at(img, "y")), &ocilocal.ImportOptions{Select: "y", IgnoreNames: true}, []string{"- " + manifest}, nil},
		"name without host":    {index(at(img, "release/v1")), nil, nil, ocilocal.ErrBareName},
		"name without tag":     {index(at(img, "app:5000/x")), &ocilocal.ImportOptions{Repository: "example.com/m"}, nil, ocilocal.ErrBareName},
		"name and tag only":    {index(at(img, "app:5000")), nil, nil, ocilocal.ErrBareName},
		"short name, named":    {index(at(img, "alpine:3")), &ocilocal.ImportOptions{Reference: ref("docker.io/library/alpine:3")}, []string{"docker.io/library/alpine:3 " + manifest}, nil},
		"digest after a colon": {index(at(img, "example.com/a:"+pin)), nil, []string{"example.com/a@" + pin + " " + manifest}, nil},
		"named and pinned":     {index(at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Reference: ref("example.com/a:v1@" + pin)}, []string{"example.com/a:v1@" + pin + " " + manifest}, nil},
		"pinned":               {index(at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Reference: ref("example.com/a@" + pin)}, []string{"example.com/a@" + pin + " " + manifest}, nil},
		"pinned, other tag":    {index(at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Reference: ref("example.com/a:v2@" + pin)}, nil, ocilocal.ErrInvalidArgument},
		"pinned, other digest": {index(at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Reference: ref("example.com/a:v1@" + digest.FromString("?").String())}, nil, ocilocal.ErrDigestMismatch},
		"empty index":          {index(), nil, nil, nil},
		"empty index, one":     {index(), &ocilocal.ImportOptions{Reference: ref("example.com/a:v1")}, nil, ocilocal.ErrNotFound},
		"null for entries":     {entry{name: "index.json", body: `{"schemaVersion":2,"manifests":null}`}, nil, nil, nil},
		"other digest":         {index(at(img, "example.com/a@"+digest.FromString("?").String()), at(art, "example.com/a:v2")), nil, []string{"- " + manifest, "example.com/a:v2 " + artifact}, nil},
		"other digest, tagged": {index(at(img, "example.com/a:v1@"+digest.FromString("?").String())), nil, []string{"example.com/a:v1 " + manifest}, nil},
		"other digest, named":  {index(at(img, "example.com/a@"+digest.FromString("?").String())), &ocilocal.ImportOptions{Reference: ref("example.com/a:v1")}, []string{"example.com/a:v1 " + manifest}, nil},
		"other name's digest":  {index(at(img, "example.com/a@"+digest.FromString("?").String())), &ocilocal.ImportOptions{Reference: ref("example.com/b:v1")}, nil, ocilocal.ErrInvalidArgument},
		"unknown algorithm":    {index(strings.Replace(art, "sha256:", "blake3:", 1), at(img, "example.com/a:v1")), nil, []string{"example.com/a:v1 " + manifest}, nil},
		"bad entry unwanted":   {index(strings.Replace(art, "sha256:", "sha256:x", 1), at(img, "example.com/a:v1")), &ocilocal.ImportOptions{Select: "example.com/a:v1"}, []string{"example.com/a:v1 " + manifest}, nil},
		"bad entry wanted":     {index(strings.Replace(art, "sha256:", "sha256:x", 1), at(img, "example.com/a:v1")), nil, nil, ocilocal.ErrInvalidLayout},
		"member by digest":     {index(at(idx, "example.com/a:v1")), &ocilocal.ImportOptions{Select: pin, Reference: ref("example.com/n:v1")}, []string{"example.com/n:v1 " + manifest}, nil},
		"one under two names":  {index(at(img, "example.com/a:v1"), at(img, "example.com/b:v1")), nil, []string{"example.com/a:v1 " + manifest, "example.com/b:v1 " + manifest}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := layoutDir(t, append(slices.Clone(blobs), c.index)...)
			before := tree(t, dir)
			r := openTemp(t, nil)
			for range 2 { // the second run changes nothing
				result, err := r.ImportLayout(ctx, dir, c.opts)
				if !errors.Is(err, c.fails) {
					t.Fatalf("%v, want %v", err, c.fails)
				}
				if err != nil {
					checkNothingVisible(t, r)
					continue
				}
				var got []string
				for i, a := range result.Artifacts {
					name := "-"
					if !a.Update.Reference.IsZero() {
						name = a.Update.Reference.String()
					}
					if i < len(c.want) {
						_, body, _ := strings.Cut(c.want[i], " ")
						if a.Descriptor.Digest == digest.FromString(body) {
							name += " " + body
						}
					}
					got = append(got, name)
					loaded, err := r.LoadDigest(ctx, a.Descriptor.Digest)
					if err != nil {
						t.Fatal(err)
					}
					if m, err := loaded.Manifest(ctx); err != nil || m.Digest() != a.Descriptor.Digest {
						t.Fatal(err)
					}
				}
				if !slices.Equal(got, c.want) {
					t.Errorf("imported %q, want %q", got, c.want)
				}
				if skips := strings.HasPrefix(name, "unknown ") && name != "unknown type, other"; skips != (len(result.Skipped) == 1) {
					t.Errorf("skipped %v", result.Skipped)
				}
			}
			if !maps.Equal(before, tree(t, dir)) {
				t.Error("the source was changed")
			}
		})
	}
}

func ref(s string) ocilocal.Reference { return ocilocal.MustParseReference(s) }

// TestLayoutSwapped has another program that puts something else in the place of a
// file, after it was looked at and before it is opened.
func TestLayoutSwapped(t *testing.T) {
	manifest, config := image("layer")
	entries := []entry{layoutVersion, layoutIndex(manifest, "example.com/a:v1"), blobEntry(manifest), blobEntry(config), blobEntry("layer")}
	for _, e := range entries {
		t.Run(filepath.Base(e.name), func(t *testing.T) {
			dir := layoutDir(t, entries...)
			r := openTemp(t, nil)
			looked, swapped := false, false
			ocilocal.SetFault(r, func(op, name string) error {
				if name != e.name {
					return nil
				}
				if op == "open" && looked { // the store, which looks at no file first, hasn't got it
					other := filepath.Join(dir, "other")
					swapped = true
					return errors.Join(os.WriteFile(other, []byte(e.body), 0o600), os.Rename(other, filepath.Join(dir, filepath.FromSlash(name))))
				}
				looked = op == "stat"
				return nil
			})
			defer ocilocal.SetFault(r, nil)
			_, err := r.ImportLayout(t.Context(), dir, nil)
			if !swapped || !errors.Is(err, ocilocal.ErrInvalidLayout) {
				t.Errorf("swapped: %v; %v, want ErrInvalidLayout", swapped, err)
			}
			checkNothingVisible(t, r)
		})
	}
}

// TestLayoutIndexBounded: index.json is not read further than an index may be long.
func TestLayoutIndexBounded(t *testing.T) {
	dir := layoutDir(t, layoutVersion, entry{name: "index.json"})
	if err := os.Truncate(filepath.Join(dir, "index.json"), 256<<20); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := ocilocal.InspectLayout(t.Context(), dir)
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ocilocal.ErrTooLarge) || got > 128<<20 {
		t.Errorf("%v, with %d MiB allocated", err, got>>20)
	}
}

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

func TestHostileLayouts(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	m, c, l, idx := blobEntry(manifest), blobEntry(config), blobEntry("layer"), layoutIndex(manifest, "example.com/a:v1")
	with := func(name, body string) entry { return entry{name: name, body: body} }
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("layer"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		dir  string
		want error
	}{
		"no oci-layout":              {layoutDir(t, m, c, l, idx), nil},
		"oci-layout 2.0.0":           {layoutDir(t, m, c, l, idx, with("oci-layout", `{"imageLayoutVersion":"2.0.0"}`)), ocilocal.ErrInvalidLayout},
		"oci-layout in other case":   {layoutDir(t, m, c, l, idx, with("oci-layout", `{"IMAGELAYOUTVERSION":"1.0.0"}`)), ocilocal.ErrInvalidLayout},
		"oci-layout of two versions": {layoutDir(t, m, c, l, idx, with("oci-layout", `{"imageLayoutVersion":"2.0.0","imageLayoutVersion":"1.0.0"}`)), ocilocal.ErrInvalidLayout},
		"oci-layout not JSON":        {layoutDir(t, m, c, l, idx, with("oci-layout", "1.0.0")), ocilocal.ErrInvalidLayout},
		"oci-layout a directory":     {layoutDir(t, m, c, l, idx, entry{name: "oci-layout", head: tar.Header{Typeflag: tar.TypeDir}}), ocilocal.ErrInvalidLayout},
		"oci-layout a link":          {layoutDir(t, m, c, l, idx, with("real", layoutVersion.body), symlink("oci-layout", "real")), ocilocal.ErrInvalidLayout},
		"no index.json":              {layoutDir(t, layoutVersion, m, c, l), ocilocal.ErrInvalidLayout},
		"index.json of 33 MiB":       {layoutDir(t, layoutVersion, m, c, l, with("index.json", strings.Repeat(" ", 33<<20))), ocilocal.ErrTooLarge},
		"index.json a link":          {layoutDir(t, layoutVersion, m, c, l, with("real", idx.body), symlink("index.json", "real")), ocilocal.ErrInvalidLayout},
		"index.json not JSON":        {layoutDir(t, layoutVersion, m, c, l, with("index.json", "{")), ocilocal.ErrInvalidLayout},
		"index.json twice manifests": {layoutDir(t, layoutVersion, m, c, l, with("index.json", `{"schemaVersion":2,"manifests":[],"manifests":[]}`)), ocilocal.ErrInvalidLayout},
		"blobs a file":               {layoutDir(t, layoutVersion, idx, with("blobs", "")), ocilocal.ErrInvalidLayout},
		"sha256 a file":              {layoutDir(t, layoutVersion, idx, with("blobs/sha256", "")), ocilocal.ErrInvalidLayout},
		"name of 10 MiB":             {layoutDir(t, layoutVersion, m, c, l, layoutIndex(manifest, strings.Repeat("x", 10<<20))), ocilocal.ErrBareName},
		"a file":                     {filepath.Join(outside, "secret"), syscall.ENOTDIR},
		"blobs a link":               {layoutDir(t, layoutVersion, idx, with("real/x", ""), symlink("blobs", "real")), ocilocal.ErrInvalidLayout},
		"sha256 a link outside":      {layoutDir(t, layoutVersion, idx, entry{name: "blobs/x"}, symlink("blobs/sha256", outside)), ocilocal.ErrInvalidLayout},
		"blob a link outside":        {layoutDir(t, layoutVersion, idx, m, c, symlink(l.name, filepath.Join(outside, "secret"))), ocilocal.ErrInvalidLayout},
		"blob a link inside":         {layoutDir(t, layoutVersion, idx, m, c, with("real", "layer"), symlink(l.name, "../../real")), ocilocal.ErrInvalidLayout},
		"blob a directory":           {layoutDir(t, layoutVersion, idx, m, c, entry{name: l.name, head: tar.Header{Typeflag: tar.TypeDir}}), ocilocal.ErrInvalidLayout},
		"layer missing":              {layoutDir(t, layoutVersion, idx, m, c), ocilocal.ErrIncomplete},
		"config missing":             {layoutDir(t, layoutVersion, idx, m, l), ocilocal.ErrIncomplete},
		"manifest missing":           {layoutDir(t, layoutVersion, idx, c, l), ocilocal.ErrIncomplete},
		"layer too short":            {layoutDir(t, layoutVersion, idx, m, c, with(l.name, "lay")), ocilocal.ErrSizeMismatch},
		"layer too long":             {layoutDir(t, layoutVersion, idx, m, c, with(l.name, "layer and more")), ocilocal.ErrSizeMismatch},
		"layer other bytes":          {layoutDir(t, layoutVersion, idx, m, c, with(l.name, "LAYER")), ocilocal.ErrDigestMismatch},
		"manifest other bytes":       {layoutDir(t, layoutVersion, idx, with(m.name, strings.Replace(manifest, "test", "tset", 1)), c, l), ocilocal.ErrDigestMismatch},
		"digest with ..":             {layoutDir(t, layoutVersion, with("index.json", strings.Replace(idx.body, digest.FromString(manifest).String(), "sha256:../../../../etc/passwd", 1)), m, c, l), ocilocal.ErrInvalidLayout},
		"digest unknown":             {layoutDir(t, layoutVersion, with("index.json", strings.Replace(idx.body, "sha256:", "md5:", 1)), m, c, l), ocilocal.ErrInvalidLayout},
		"not there":                  {filepath.Join(outside, "nothing"), fs.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			_, err := r.ImportLayout(t.Context(), tc.dir, nil)
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if tc.want == nil {
				return
			}
			checkNothingVisible(t, r)
		})
	}
}

// TestOddNames imports names that are legal in an index.json, though no reference allows
// them, and names that are equal or differ only in case.
func TestOddNames(t *testing.T) {
	manifest, config := image("layer")
	second, _ := image("LAYER")
	index := func(names ...string) entry {
		var ds []string
		for i, name := range names {
			b, err := json.Marshal(name)
			if err != nil {
				t.Fatal(err)
			}
			ds = append(ds, strings.TrimSuffix(desc(imageType, []string{manifest, second}[i]), "}")+`,"annotations":{"org.opencontainers.image.ref.name":`+string(b)+`}}`)
		}
		return entry{name: "index.json", body: `{"schemaVersion":2,"manifests":[` + strings.Join(ds, ",") + `]}`}
	}
	for name, c := range map[string]struct {
		index entry
		opts  *ocilocal.ImportOptions
		want  []string
		fails error
	}{
		"NUL":             {index("example.com/a:v1\x00"), nil, nil, ocilocal.ErrBareName},
		"NUL, ignored":    {index("example.com/a:v1\x00"), &ocilocal.ImportOptions{IgnoreNames: true}, []string{"none"}, nil},
		"3 MiB":           {index(strings.Repeat("x", 3<<20)), &ocilocal.ImportOptions{IgnoreNames: true}, []string{"none"}, nil},
		"twins but case":  {index("example.com/a:v1", "example.com/a:V1"), nil, []string{"inserted", "inserted"}, nil},
		"equal, kept":     {index("example.com/a:v1", "example.com/a:v1"), nil, nil, ocilocal.ErrInvalidArgument},
		"equal, replaced": {index("example.com/a:v1", "example.com/a:v1"), &ocilocal.ImportOptions{PublishOptions: ocilocal.PublishOptions{Policy: ocilocal.Replace}}, nil, ocilocal.ErrInvalidArgument},
		"equal, ignored":  {index("example.com/a:v1", "example.com/a:v1"), &ocilocal.ImportOptions{IgnoreNames: true}, []string{"none", "none"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			dir := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), blobEntry(second), blobEntry("LAYER"), c.index)
			result, err := r.ImportLayout(t.Context(), dir, c.opts)
			if !errors.Is(err, c.fails) {
				t.Fatal(err)
			}
			if err != nil {
				checkNothingVisible(t, r)
				return
			}
			var got []string
			for _, a := range result.Artifacts {
				got = append(got, a.Update.Outcome.String())
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestImportCounts imports more blobs than are synced at a time: what was there is counted as reused.
func TestImportCounts(t *testing.T) {
	const layers = 100
	from, to := openTemp(t, nil), openTemp(t, nil)
	name := ref("example.com/many:v1")
	b, err := from.NewBuilder(name, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range layers {
		if _, err := b.AddLayerBytes(t.Context(), "text/plain", fmt.Appendf(nil, "layer %d", i), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := from.ExportArchive(t.Context(), &archive, []ocilocal.Reference{name}, nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct{ written, reused int }{{layers + 1, 0}, {0, layers + 1}} {
		got, err := to.ImportArchive(t.Context(), bytes.NewReader(archive.Bytes()), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.BlobsWritten != want.written || got.BlobsReused != want.reused || (got.BytesWritten == 0) != (want.written == 0) {
			t.Errorf("%d written (%d bytes), %d reused, want %d and %d", got.BlobsWritten, got.BytesWritten, got.BlobsReused, want.written, want.reused)
		}
	}
}

// TestImportCountsRace: another publisher names a blob first, which so is reused.
func TestImportCountsRace(t *testing.T) {
	manifest, config := image("layer")
	dir := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry("layer"), layoutIndex(manifest, "example.com/a:v1"))
	r := openTemp(t, nil)
	theirs := blobFile(r, digest.FromString("layer"))
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "link" && filepath.Base(name) == filepath.Base(theirs) {
			return os.WriteFile(theirs, []byte("layer"), 0o444)
		}
		return nil
	})
	got, err := r.ImportLayout(t.Context(), dir, nil)
	ocilocal.SetFault(r, nil)
	if err != nil || got.BlobsWritten != 2 || got.BlobsReused != 1 {
		t.Errorf("%+v, %v; want 2 blobs written and 1 reused", got, err)
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

func TestExportLayout(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	one := published(t, r, "example.com/a:v1", "one", nil)
	two := published(t, r, "example.com/a:v2", "two", one)
	dir := filepath.Join(t.TempDir(), "new", "layout")
	if err := r.ExportLayout(ctx, dir, []ocilocal.Reference{ref("example.com/a:v1")}, nil); err != nil {
		t.Fatal(err)
	}
	// Another tool adds an entry with fields of its own, and a file.
	index := filepath.Join(dir, "index.json")
	b, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	foreign := `{"mediaType":"application/x-foreign","digest":"` + digest.FromString("foreign").String() + `","size":7,"x-own":"<&>"}`
	changed := strings.Replace(string(b), `"manifests":[`, `"x-top":{"b":1},"manifests":[`+foreign+`,`, 1)
	if err := os.WriteFile(index, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "NOTES"), []byte("theirs"), 0o644); err != nil {
		t.Fatal(err)
	}
	all := []ocilocal.Reference{ref("example.com/a:v2"), ref("example.com/a:v1")}
	if err := r.ExportLayout(ctx, dir, all, nil); err != nil {
		t.Fatal(err)
	}
	after := tree(t, dir)
	for name := range after {
		if strings.HasPrefix(name, ".ocilocal") {
			t.Errorf("left over: %s", name)
		}
	}
	if after["NOTES"] != "theirs" || !strings.Contains(after["index.json"], foreign) || !strings.Contains(after["index.json"], `"x-top":{"b":1}`) {
		t.Errorf("lost what others had: %s", after["index.json"])
	}
	again := after
	if err := r.ExportLayout(ctx, dir, all, nil); err != nil {
		t.Fatal(err)
	}
	if after = tree(t, dir); !maps.Equal(after, again) {
		t.Errorf("a second export changed something: %s\n%s", again["index.json"], after["index.json"])
	}
	// A round trip: each name and digest.
	to := openTemp(t, nil)
	for _, a := range []*ocilocal.LocalArtifact{one, two} {
		result, err := to.ImportLayout(ctx, dir, &ocilocal.ImportOptions{Select: a.Reference().String()})
		if err != nil {
			t.Fatal(err)
		}
		if u := result.Artifacts[0].Update; u.Reference != a.Reference() || u.Descriptor.Digest != a.Digest() || u.Outcome != ocilocal.Inserted {
			t.Errorf("%+v", u)
		}
	}
}

// TestExportLayoutCutOff exports into what exports have left that were killed just before
// the rename of index.json, or of oci-layout.
func TestExportLayoutCutOff(t *testing.T) {
	r := openTemp(t, nil)
	refs := []ocilocal.Reference{published(t, r, "example.com/a:v1", "one", nil).Reference()}
	dir := t.TempDir()
	if err := r.ExportLayout(t.Context(), dir, refs, nil); err != nil {
		t.Fatal(err)
	}
	whole := tree(t, dir)
	for _, name := range []string{"index.json", "oci-layout"} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, ".ocilocal-new")); err != nil {
			t.Fatal(err)
		}
		if name == "oci-layout" {
			if err := os.Remove(filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.ExportLayout(t.Context(), dir, refs, nil); err != nil || !maps.Equal(tree(t, dir), whole) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	// Without index.json a layout is another tool's, if it has anything else.
	if err := errors.Join(os.Remove(filepath.Join(dir, "index.json")), os.WriteFile(filepath.Join(dir, "theirs"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportLayout(t.Context(), dir, refs, nil); !errors.Is(err, ocilocal.ErrInvalidLayout) {
		t.Errorf("beside another's file: %v", err)
	}
}

func TestExportLayoutConflicts(t *testing.T) {
	ctx := t.Context()
	r, other := openTemp(t, nil), openTemp(t, nil)
	refs := []ocilocal.Reference{ref("example.com/a:v1")}
	published(t, r, "example.com/a:v1", "one", nil)
	b := published(t, other, "example.com/a:v1", "another", nil)
	dir := t.TempDir()
	if err := r.ExportLayout(ctx, dir, refs, nil); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	if err := other.ExportLayout(ctx, dir, refs, nil); !errors.Is(err, ocilocal.ErrExists) {
		t.Fatalf("%v, want ErrExists", err)
	}
	if !maps.Equal(before, tree(t, dir)) {
		t.Error("a refused export changed the layout")
	}
	if err := other.ExportLayout(ctx, dir, refs, &ocilocal.ExportOptions{Overwrite: true}); err != nil {
		t.Fatal(err)
	}
	in, err := ocilocal.InspectLayout(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(in.Entries) != 1 || in.Entries[0].Descriptor.Digest != b.Digest() || in.Entries[0].Reference != refs[0] || in.Blobs != 4 {
		t.Errorf("%+v", in)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "thesis.tex"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportLayout(ctx, full, refs, nil); !errors.Is(err, ocilocal.ErrInvalidLayout) {
		t.Errorf("into somebody's directory: %v", err)
	}
	// A damaged blob of the layout is healed, a link in its place replaced and not followed.
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("keep"), 0o644); err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(dir, "blobs", "sha256", digest.FromString("another").Encoded())
	for _, damage := range []func() error{
		func() error { return os.WriteFile(blob, []byte("damaged"), 0o644) },
		func() error { return os.Symlink(victim, blob) },
	} {
		if err := os.Remove(blob); err != nil {
			t.Fatal(err)
		}
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if err := other.ExportLayout(ctx, dir, refs, nil); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Lstat(blob); err != nil || !fi.Mode().IsRegular() {
			t.Fatal(fi, err)
		}
		if got := tree(t, dir)["blobs/sha256/"+filepath.Base(blob)]; got != "another" {
			t.Errorf("blob holds %q", got)
		}
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "keep" {
		t.Errorf("victim: %q %v", b, err)
	}
}

// TestExportersRace lets several registries export into one directory at once.
func TestExportersRace(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 {
		r := openTemp(t, nil)
		name := fmt.Sprintf("example.com/a:v%d", i)
		published(t, r, name, name, nil)
		wg.Go(func() {
			if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref(name)}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	in, err := ocilocal.InspectLayout(t.Context(), dir)
	if err != nil || len(in.Entries) != 8 {
		t.Fatalf("%+v %v", in, err)
	}
}

func TestExportArchiveFile(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	one := published(t, r, "example.com/a:v1", "one", nil)
	refs := []ocilocal.Reference{one.Reference()}
	dir := t.TempDir()
	name := filepath.Join(dir, "a.tar")
	if err := r.ExportArchiveFile(ctx, name, refs, nil); err != nil {
		t.Fatal(err)
	}
	first := tree(t, dir)
	if err := r.ExportArchiveFile(ctx, name, refs, nil); !errors.Is(err, ocilocal.ErrExists) || !errors.Is(err, fs.ErrExist) {
		t.Fatalf("over an existing file: %v", err)
	}
	if err := r.ExportArchiveFile(ctx, name, []ocilocal.Reference{ref("example.com/nothing:v1")}, &ocilocal.ExportOptions{Overwrite: true}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Fatal(err)
	}
	if !maps.Equal(first, tree(t, dir)) {
		t.Error("a failed export changed something")
	}
	// A link in its place is refused, or replaced, never followed.
	victim, link := filepath.Join(dir, "victim"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(victim, []byte("keep"), 0o644), os.Symlink(victim, link)); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(ctx, link, refs, nil); !errors.Is(err, ocilocal.ErrExists) {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(ctx, link, refs, &ocilocal.ExportOptions{Overwrite: true}); err != nil {
		t.Fatal(err)
	}
	got := tree(t, dir)
	if got["victim"] != "keep" || got["link"] != got["a.tar"] || len(got) != 3 {
		t.Errorf("%d files, victim %q", len(got), got["victim"])
	}
	// A blob that is damaged leaves no file.
	layer := filepath.Join(r.Root(), "blobs", "sha256", digest.FromString("one").Encoded())
	if err := errors.Join(os.Chmod(layer, 0o644), os.WriteFile(layer, []byte("eno"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportArchiveFile(ctx, filepath.Join(dir, "b.tar"), refs, nil); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Fatal(err)
	}
	if !maps.Equal(got, tree(t, dir)) {
		t.Error("a failed export left something")
	}
}

// TestExportsCancelled cancels while a large layer goes out: soon nothing more is written, and nothing is there.
func TestExportsCancelled(t *testing.T) {
	const size = 64 << 20
	r := openTemp(t, nil)
	a := pushed(t, r, ref("example.com/large:v1"), nil, nil, make([]byte, size))
	refs := []ocilocal.Reference{a.Reference()}
	// Which write is in the midst of the layer, and how many more there may be, of 16, 64 and some 300.
	writesOf := map[string]struct{ at, most int64 }{"layout": {6, 1}, "archive": {20, 1}, "gzip": {20, 40}}
	for name, export := range map[string]func(ctx context.Context, dir string) error{
		"layout": func(ctx context.Context, dir string) error {
			return r.ExportLayout(ctx, filepath.Join(dir, "layout"), refs, nil)
		},
		"archive": func(ctx context.Context, dir string) error {
			return r.ExportArchiveFile(ctx, filepath.Join(dir, "a.tar"), refs, nil)
		},
		"gzip": func(ctx context.Context, dir string) error {
			return r.ExportArchiveFile(ctx, filepath.Join(dir, "a.tar.gz"), refs, &ocilocal.ExportOptions{Gzip: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var writes, after atomic.Int64
			ocilocal.SetFault(r, func(op, _ string) error {
				switch {
				case op == "write" && ctx.Err() != nil:
					after.Add(1)
				case op == "write" && writes.Add(1) == writesOf[name].at:
					cancel()
				}
				return nil
			})
			defer ocilocal.SetFault(r, nil)
			if err := export(ctx, dir); !errors.Is(err, context.Canceled) {
				t.Errorf("%v, want context.Canceled", err)
			}
			if n := after.Load(); n > writesOf[name].most {
				t.Errorf("%d more writes", n)
			}
			for file := range tree(t, dir) {
				t.Errorf("left: %s", file)
			}
		})
	}
}

// TestArchiveBytes looks at what a streaming reader sees: what there is comes first, and
// nothing of when, where and by whom the archive was made is in it. Other
// releases write the same bytes.
func TestArchiveBytes(t *testing.T) {
	r := openTemp(t, nil)
	a := pushed(t, r, ref("example.com/a:v1"), nil, nil, []byte("one"), []byte("two"))
	var out bytes.Buffer
	if err := r.ExportArchive(t.Context(), &out, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	const golden = "sha256:4974750d8a06d18f930be056e3a80ab5d39b3e968df3dde4a645852454a09f59"
	if d := digest.FromBytes(out.Bytes()); d != golden {
		t.Errorf("%s, want %s", d, golden)
	}
	checkHead := func(h *tar.Header, format tar.Format) {
		t.Helper()
		if h.Typeflag != tar.TypeReg || h.Mode != 0o444 || !h.ModTime.Equal(time.Unix(0, 0)) || !h.AccessTime.IsZero() || !h.ChangeTime.IsZero() ||
			h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || h.Format != format {
			t.Errorf("%+v", h)
		}
	}
	var names []string
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		checkHead(h, tar.FormatUSTAR)
		names = append(names, h.Name)
	}
	manifest := "blobs/sha256/" + a.Digest().Encoded()
	if len(names) != 6 || names[0] != "oci-layout" || names[1] != "index.json" || names[2] != manifest || !slices.IsSorted(names[3:]) {
		t.Errorf("%q", names)
	}
	// From 8 GiB on a size takes a PAX record.
	for size, format := range map[int64]tar.Format{8<<30 - 1: tar.FormatUSTAR, 8 << 30: tar.FormatPAX} {
		out.Reset()
		tw := tar.NewWriter(&out)
		if err := ocilocal.WriteEntry(tw, manifest, strings.NewReader("its beginning"), size); err != nil {
			t.Fatal(err)
		}
		h, err := tar.NewReader(&out).Next()
		if err != nil || h.Size != size || h.Name != manifest {
			t.Fatalf("%+v, %v", h, err)
		}
		checkHead(h, format)
	}
}

func TestExportLineage(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	a := published(t, r, "example.com/a:v1", "one", nil)
	b := published(t, r, "example.com/a:v2", "two", a)
	c := published(t, r, "example.com/a:v3", "three", b)
	if _, err := r.Remove(ctx, b.Reference()); err != nil {
		t.Fatal(err)
	}
	for _, zip := range []bool{false, true} {
		var archives [2]bytes.Buffer
		for i, refs := range [][]ocilocal.Reference{{c.Reference(), a.Reference()}, {a.Reference(), c.Reference(), c.Reference()}} {
			if err := r.ExportArchive(ctx, &archives[i], refs, &ocilocal.ExportOptions{Lineage: true, Gzip: zip}); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(archives[0].Bytes(), archives[1].Bytes()) {
			t.Error("equal content, other bytes")
		}
		if zip != bytes.HasPrefix(archives[0].Bytes(), []byte{0x1f, 0x8b}) {
			t.Error("gzip or not is mixed up")
		}
		to := openTemp(t, nil)
		if _, err := to.ImportArchive(ctx, &archives[0], nil); err != nil {
			t.Fatal(err)
		}
		for _, want := range []*ocilocal.LocalArtifact{a, b, c} {
			if _, err := to.LoadDigest(ctx, want.Digest()); err != nil {
				t.Error(err)
			}
		}
		if ok, err := to.Exists(ctx, b.Reference()); ok || err != nil {
			t.Error("a name came from nowhere", err)
		}
	}
	// By digest, without a name, and without the lineage.
	var out bytes.Buffer
	if err := r.ExportArchive(ctx, &out, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{c.Digest()}}); err != nil {
		t.Fatal(err)
	}
	in, err := ocilocal.InspectArchive(ctx, &out)
	if err != nil || len(in.Entries) != 1 || in.Entries[0].Name != "" || in.Blobs != 2 {
		t.Errorf("%+v %v", in, err)
	}
	// A gap in the chain is an error of its own.
	to := openTemp(t, nil)
	out.Reset()
	if err := r.ExportArchive(ctx, &out, []ocilocal.Reference{c.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := to.ImportArchive(ctx, &out, nil); err != nil {
		t.Fatal(err)
	}
	if err := to.ExportArchive(ctx, io.Discard, []ocilocal.Reference{c.Reference()}, &ocilocal.ExportOptions{Lineage: true}); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Errorf("lineage with a gap: %v", err)
	}
}

// TestExportIndexIsJSON makes sure that other programs can read names with odd characters.
func TestExportIndexIsJSON(t *testing.T) {
	r := openTemp(t, nil)
	a := published(t, r, "localhost:5000/a__b/c:V-1_x.y", "x", nil)
	dir := t.TempDir()
	if err := r.ExportLayout(t.Context(), dir, []ocilocal.Reference{a.Reference()}, nil); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Manifests []struct{ Annotations map[string]string }
	}
	if err := json.Unmarshal([]byte(tree(t, dir)["index.json"]), &doc); err != nil {
		t.Fatal(err)
	}
	if got := doc.Manifests[0].Annotations["org.opencontainers.image.ref.name"]; got != "localhost:5000/a__b/c:V-1_x.y" {
		t.Errorf("%q", got)
	}
}

// Large blobs are copied by the kernel; they are verified like others.
func TestLayoutLargeBlobs(t *testing.T) {
	t.Parallel()
	const chunk = 4 << 20
	for _, n := range []int{chunk - 1, chunk, 2*chunk + 3} {
		from := openTemp(t, nil)
		ref := ocilocal.MustParseReference("example.com/large:v1")
		a := pushed(t, from, ref, nil, nil, noise(1, n))
		dir := filepath.Join(t.TempDir(), "layout")
		if err := from.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref}, nil); err != nil {
			t.Fatal(err)
		}
		to := openTemp(t, nil)
		var writes atomic.Int64
		ocilocal.SetFault(to, func(op, name string) error {
			if op == "write" {
				writes.Add(1)
			}
			return nil
		})
		if _, err := to.ImportLayout(t.Context(), dir, nil); err != nil {
			t.Fatal(err)
		}
		// The kernel is given 4 MiB at a time, and once more to see the end.
		if most := 2 + n/chunk + 2; runtime.GOOS == "linux" && n >= chunk && writes.Load() > int64(most) {
			t.Errorf("%d bytes: %d writes, the kernel's would be %d", n, writes.Load(), most)
		}
		layers, err := a.Layers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		copied, err := to.Load(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := copied.ReadLayer(t.Context(), layers[0]); err != nil || !bytes.Equal(b, noise(1, n)) {
			t.Error(err)
		}
		file := filepath.Join(dir, "blobs", "sha256", layers[0].Digest.Encoded())
		// What was imported is no other name of the source's file, which others may change.
		rewrite(t, file, flipBit)
		if b, err := copied.ReadLayer(t.Context(), layers[0]); err != nil || !bytes.Equal(b, noise(1, n)) {
			t.Errorf("%d bytes: after a change of the source: %v", n, err)
		}
		for name, c := range map[string]struct {
			change func(b []byte) []byte
			want   error
		}{
			"flipped": {func(b []byte) []byte { b[len(b)-2] ^= 1; return b }, ocilocal.ErrDigestMismatch},
			"shorter": {func(b []byte) []byte { return b[:len(b)-1] }, ocilocal.ErrSizeMismatch},
			"longer":  {func(b []byte) []byte { return append(b, 0) }, ocilocal.ErrSizeMismatch},
		} {
			rewrite(t, file, func([]byte) []byte { return c.change(noise(1, n)) })
			r := openTemp(t, nil)
			if _, err := r.ImportLayout(t.Context(), dir, nil); !errors.Is(err, c.want) {
				t.Errorf("%d bytes, %s: %v", n, name, err)
			}
			checkNothingVisible(t, r)
		}
		// A damaged blob of the registry doesn't get out.
		rewrite(t, filepath.Join(from.Root(), "blobs", "sha256", layers[0].Digest.Encoded()), func(b []byte) []byte { b[5] ^= 1; return b })
		if err := from.ExportLayout(t.Context(), dir+"2", []ocilocal.Reference{ref}, nil); !errors.Is(err, ocilocal.ErrDigestMismatch) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestLayoutChangesMeanwhile cuts or prolongs a blob of the source while it is being copied, in
// each of the two ways of copying.
func TestLayoutChangesMeanwhile(t *testing.T) {
	for _, size := range []int{1000, 8 << 20} {
		layer := strings.Repeat("layer", size/5)
		manifest, config := image(layer)
		for _, to := range []int64{int64(len(layer)) / 2, int64(len(layer)) + 1} {
			t.Run(fmt.Sprintf("%d to %d bytes", len(layer), to), func(t *testing.T) {
				dir := layoutDir(t, layoutVersion, blobEntry(manifest), blobEntry(config), blobEntry(layer), layoutIndex(manifest, "example.com/a:v1"))
				source := filepath.Join(dir, filepath.FromSlash(blobEntry(layer).name))
				r := openTemp(t, nil)
				other, _ := image("another layer") // the config is in the registry then
				if _, err := r.ImportLayout(t.Context(), layoutDir(t, layoutVersion, blobEntry(other), blobEntry(config),
					blobEntry("another layer"), layoutIndex(other, "example.com/other:v1")), nil); err != nil {
					t.Fatal(err)
				}
				if _, err := r.Remove(t.Context(), ocilocal.MustParseReference("example.com/other:v1")); err != nil {
					t.Fatal(err)
				}
				var copies atomic.Int64
				ocilocal.SetFault(r, func(op, _ string) error {
					if op != "create" || copies.Add(1) != 2 { // the manifest comes before the layer
						return nil
					}
					return os.Truncate(source, to) // which is open by then
				})
				_, err := r.ImportLayout(t.Context(), dir, nil)
				ocilocal.SetFault(r, nil)
				if !errors.Is(err, ocilocal.ErrSizeMismatch) {
					t.Errorf("%v, want ErrSizeMismatch", err)
				}
				checkNothingVisible(t, r)
			})
		}
	}
}
