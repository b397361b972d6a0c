package ocilocal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestImportNameFunc uses ImportOptions.Name to accept only names of one repository.
func TestImportNameFunc(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	second, _ := image("LAYER")
	parts := []entry{blobEntry(manifest), blobEntry(config), blobEntry("layer"), blobEntry(second), blobEntry("LAYER")}
	mine, theirs := desc(imageType, manifest), desc(imageType, second)
	only := func(e ocilocal.InspectedEntry) (ocilocal.Reference, error) {
		if e.Reference.Name() != "example.com/mine" {
			return ocilocal.Reference{}, ocilocal.SkipEntry
		}
		return e.Reference, nil
	}
	index := indexOf(called(mine, refName, "v1"), called(theirs, refName, "ghcr.io/corp/prod:v1"))
	r, got, err := importBoth(t, &ocilocal.ImportOptions{Repository: "example.com/mine", Name: only}, append(parts, index)...)
	if err != nil || len(got.Artifacts) != 1 || len(got.Skipped) != 1 || got.Artifacts[0].Update.Reference != ref("example.com/mine:v1") {
		t.Fatalf("%+v, %v", got, err)
	}
	if ok, err := r.Exists(t.Context(), ref("ghcr.io/corp/prod:v1")); ok || err != nil {
		t.Errorf("the archive has set a ref that was refused: %v", err)
	}
	refused := errors.New("refused")
	if _, _, err := importBoth(t, &ocilocal.ImportOptions{Name: func(ocilocal.InspectedEntry) (ocilocal.Reference, error) {
		return ocilocal.Reference{}, refused
	}}, append(parts, index)...); !errors.Is(err, refused) {
		t.Errorf("an error of Name: %v", err)
	}
	_, got, err = importBoth(t, &ocilocal.ImportOptions{Name: func(e ocilocal.InspectedEntry) (ocilocal.Reference, error) {
		return ocilocal.Reference{}, nil
	}}, append(parts, index)...)
	if err != nil || len(got.Unnamed()) != 2 {
		t.Errorf("no names: %+v, %v", got, err)
	}
	_, got, err = importBoth(t, &ocilocal.ImportOptions{IgnoreNames: true}, append(parts, index)...)
	if err != nil || len(got.Unnamed()) != 2 {
		t.Errorf("IgnoreNames: %+v, %v", got, err)
	}
	for name, opts := range map[string]*ocilocal.ImportOptions{
		"Reference and Repository":   {Reference: ref("example.com/a:v1"), Repository: "example.com/a", Select: "v1"},
		"Reference and Name":         {Reference: ref("example.com/a:v1"), Name: only, Select: "v1"},
		"IgnoreNames and Repository": {IgnoreNames: true, Repository: "example.com/a"},
		"AsIndex and Select":         {AsIndex: true, Select: "v1"},
	} {
		if _, _, err := importBoth(t, opts, append(parts, index)...); !errors.Is(err, ocilocal.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestImportContainerdName imports entries with the pairs of names that containerd writes.
// Reference is accepted if it agrees with the name that counts.
func TestImportContainerdName(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	d := digest.FromString(manifest).String()
	parts := []entry{blobEntry(manifest), blobEntry(config), blobEntry("layer")}
	for _, c := range []struct{ name, full, as string }{
		{"9", "example.com/q/z:9", "example.com/q/z:9"},
		{"9@" + d, "example.com/q/z:9", "example.com/q/z:9"},
		{"9", "example.com/q/z:9@" + d, "example.com/q/z:9"},
		{"", "example.com/q/z:9", "example.com/q/z:9"},
		{"@" + d, "example.com/q/z@" + d, "example.com/q/z@" + d},
	} {
		pairs := []string{imageName, c.full}
		if c.name != "" {
			pairs = append(pairs, refName, c.name)
		}
		index := indexOf(called(desc(imageType, manifest), pairs...))
		for _, opts := range []*ocilocal.ImportOptions{{}, {Reference: ref(c.as)}, {Select: c.as}, {Select: c.full}} {
			_, got, err := importBoth(t, opts, append(parts, index)...)
			if err != nil || got.Artifacts[0].Update.Reference != ref(c.as) {
				t.Errorf("%q, %q with %+v: %+v, %v", c.name, c.full, opts, got, err)
			}
		}
		if _, _, err := importBoth(t, &ocilocal.ImportOptions{Reference: ref("example.com/other/thing:9")}, append(parts, index)...); !errors.Is(err, ocilocal.ErrInvalidArgument) {
			t.Errorf("%q, %q as another: %v", c.name, c.full, err)
		}
	}
}

// TestDigestNames imports entries whose names are only a digest. If it is the entry's own digest, it
// becomes a reference when Repository is set, and otherwise the entry has no name. Any other digest is
// kept as an annotation: it says where the content came from.
func TestDigestNames(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	second, _ := image("LAYER")
	own, other := digest.FromString(manifest).String(), "sha256:"+strings.Repeat("0", 64)
	parts := []entry{blobEntry(manifest), blobEntry(config), blobEntry("layer"), blobEntry(second), blobEntry("LAYER")}
	for name, completed := range map[string]string{own: "example.com/a@" + own, "@" + own: "example.com/a@" + own, other: "", "@" + other: ""} {
		index := indexOf(called(desc(imageType, manifest), refName, name), called(desc(imageType, second), refName, "example.com/a:v1"))
		for _, opts := range []*ocilocal.ImportOptions{{}, {Repository: "example.com/a"}, {Select: own, Reference: ref("example.com/b:v1")}} {
			want := opts.Reference.String()
			if opts.Repository != "" {
				want = completed
			}
			r, got, err := importBoth(t, opts, append(parts, index)...)
			if err != nil || got.Artifacts[0].Update.Reference.String() != want {
				t.Errorf("%s with %+v: %+v, %v", name, opts, got, err)
				continue
			}
			if opts.Repository == "" && want == "" { // a name of other content is kept by digest
				dir := t.TempDir()
				if err := r.ExportLayout(t.Context(), dir, nil, &ocilocal.ExportOptions{Digests: []digest.Digest{digest.Digest(own)}}); err != nil {
					t.Fatal(err)
				}
				in, err := ocilocal.InspectLayout(t.Context(), dir)
				if kept := name == other || name == "@"+other; err != nil || (in.Entries[0].Name == name) != kept {
					t.Errorf("%s: exported as %+v, %v", name, in, err)
				}
			}
		}
	}
}

// TestOddNames imports names that are legal in an index.json but not in a reference, and names that
// are equal or differ only in case.
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

// TestDockerSave imports an entry as `docker save` writes it: a tag in one annotation and the full
// name in another. The full name counts if it has that tag.
func TestDockerSave(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	save := func(name, full string) []byte {
		return tarOf(t, entry{name: "manifest.json", body: "[]"}, blobEntry(manifest), blobEntry(config), blobEntry("layer"),
			entry{name: "index.json", body: fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":%q,"io.containerd.image.name":%q}}]}`,
				imageType, digest.FromString(manifest), len(manifest), name, full)})
	}
	for _, c := range []struct{ name, full, want string }{
		{"3.20", "docker.io/library/alpine:3.20", "docker.io/library/alpine:3.20"},
		{"3.20@sha256:" + strings.Repeat("0", 64), "docker.io/library/alpine:3.20", "docker.io/library/alpine:3.20"},
		{"@sha256:" + strings.Repeat("0", 64), "docker.io/library/alpine:3.20", "docker.io/library/alpine:3.20"},
		{"sha256:" + strings.Repeat("0", 64), "docker.io/library/alpine:3.20", "docker.io/library/alpine:3.20"},
		{"9", "example.com/q/z:9@" + digest.FromString(manifest).String(), "example.com/q/z:9"},
		{"", "example.com/q/z@" + digest.FromString(manifest).String(), "example.com/q/z@" + digest.FromString(manifest).String()},
		{"", "example.com/q/z@sha256:" + strings.Repeat("0", 64), ""},
		{"3.21", "docker.io/library/alpine:3.20", ""},
		{"3.20", "alpine:3.20", ""},
		{"example.com/a:v1", "docker.io/library/alpine:v1", "example.com/a:v1"},
		{"", "docker.io/library/alpine:3.20", "docker.io/library/alpine:3.20"},
		{"", "alpine", ""},
	} {
		r := openTemp(t, nil)
		got, err := r.ImportArchive(t.Context(), bytes.NewReader(save(c.name, c.full)), nil)
		if bare := c.want == "" && !strings.Contains(c.full, "@"); bare != errors.Is(err, ocilocal.ErrBareName) {
			t.Errorf("%+v: %v", c, err)
		} else if bare {
			got, err = r.ImportArchive(t.Context(), bytes.NewReader(save(c.name, c.full)), &ocilocal.ImportOptions{IgnoreNames: true})
		}
		if err != nil || got.Artifacts[0].Name != c.name || got.Artifacts[0].Update.Reference.String() != c.want {
			t.Errorf("%+v: %+v, %v", c, got, err)
		}
		in, err := ocilocal.InspectArchive(t.Context(), bytes.NewReader(save(c.name, c.full)))
		if err != nil || in.Entries[0].Reference.String() != c.want {
			t.Errorf("%+v: %+v, %v", c, in, err)
		}
		if _, err = r.ImportArchive(t.Context(), bytes.NewReader(save(c.name, c.full)), &ocilocal.ImportOptions{Select: c.full, IgnoreNames: true}); err != nil {
			t.Errorf("%+v, chosen: %v", c, err)
		}
	}
}
