package ocilocal_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestImportLayout imports layouts with all forms of entries and names, under various options, and
// compares the refs. A second import of the same layout gives the same result, and the source does
// not change.
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

// TestImportCountsRace: if another publisher names a blob first, the import counts it as reused.
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
