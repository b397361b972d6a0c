package ocilocal_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

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

// TestImportCounts imports more blobs than are synced at a time: what was there is counted as
// reused.
func TestImportCounts(t *testing.T) {
	t.Parallel()
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
	for _, want := range []struct{ written, reused int }{{layers + 2, 0}, {0, layers + 2}} {
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
