package ocilocal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// imageIndex returns an image index of manifests of the given types.
func imageIndex(mediaType string, manifests ...string) string {
	var ds []string
	for _, m := range manifests {
		ds = append(ds, desc(mediaType, m))
	}
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, strings.Join(ds, ","))
}

// archiveOf returns an archive of blobs whose index.json names top.
func archiveOf(t *testing.T, mediaType, top string, blobs ...string) []byte {
	t.Helper()
	entries := []entry{{name: "index.json", body: fmt.Sprintf(
		`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":%q}}]}`,
		mediaType, digest.FromString(top), len(top), newRef)}}
	for _, b := range slices.Concat(blobs, []string{top}) { // tables share the array of blobs
		entries = append(entries, blobEntry(b))
	}
	return tarOf(t, entries...)
}

// TestClosures imports image indexes whose members lie deep, come twice, or contradict each other.
func TestClosures(t *testing.T) {
	manifest, config := image("layer")
	lying := strings.Replace(manifest, `"size":5`, `"size":4`, 1)
	nested := func(depth int) (top string, all []string) {
		top = imageIndex(imageType, manifest)
		all = []string{manifest, config, "layer"}
		for range depth - 1 {
			all = append(all, top)
			top = imageIndex(ocispec.MediaTypeImageIndex, top)
		}
		return top, all
	}
	flat, flatBlobs := nested(1)
	deep, deepBlobs := nested(ocilocal.MaxIndexNesting)
	deeper, deeperBlobs := nested(ocilocal.MaxIndexNesting + 1)
	left := strings.Replace(flat, `{"schema`, `{"annotations":{"side":"left"},"schema`, 1)
	diamond := imageIndex(ocispec.MediaTypeImageIndex, flat, left)
	asImage := imageIndex(imageType, flat)
	for name, c := range map[string]struct {
		top   string
		all   []string
		want  error
		blobs int
	}{
		"flat":                        {flat, flatBlobs, nil, 4},
		"as deep as may be":           {deep, deepBlobs, nil, 3 + ocilocal.MaxIndexNesting},
		"deeper":                      {deeper, deeperBlobs, ocilocal.ErrTooLarge, 0},
		"diamond":                     {diamond, append([]string{left, flat}, flatBlobs...), nil, 6},
		"one member twice":            {imageIndex(imageType, manifest, manifest), flatBlobs, nil, 4},
		"empty":                       {imageIndex(imageType), nil, nil, 1},
		"member missing":              {flat, flatBlobs[1:], nil, 1}, // recorded as absent
		"member's layer missing":      {deep, append(deepBlobs[3:], manifest, config), ocilocal.ErrIncomplete, 0},
		"index said to be a manifest": {asImage, append([]string{flat}, flatBlobs...), ocilocal.ErrInvalidManifest, 0},
		"two sizes for one layer":     {imageIndex(imageType, manifest, lying), append([]string{lying}, flatBlobs...), ocilocal.ErrInvalidManifest, 0},
		"member of unknown type":      {imageIndex("text/plain", manifest), flatBlobs, nil, 2}, // what it is made of is its own affair
		"that one missing":            {imageIndex("text/plain", manifest), flatBlobs[1:], ocilocal.ErrIncomplete, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			src := archiveOf(t, ocispec.MediaTypeImageIndex, c.top, c.all...)
			got, err := r.ImportArchive(t.Context(), bytes.NewReader(src), nil)
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Fatalf("%+v, %v; want %v", got, err, c.want)
			}
			if n := len(filesBelow(t, r, "blobs")); n != c.blobs {
				t.Errorf("%d blobs are kept, want %d", n, c.blobs)
			}
			if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(newRef)); ok != (c.want == nil) || err != nil {
				t.Error(ok, err)
			}
			if c.want != nil {
				return
			}
			u, err := r.Tag(t.Context(), digest.FromString(c.top), ocilocal.MustParseReference(movedRef), nil)
			if err != nil || u.Outcome != ocilocal.Inserted {
				t.Error(u, err)
			}
		})
	}
}

// TestTwoMediaTypes imports bytes without a mediaType under two media types, in both orders. One of
// them is refused each time and changes nothing: equal bytes have one media type.
func TestTwoMediaTypes(t *testing.T) {
	ctx := t.Context()
	manifest, config := image("layer")
	r := openTemp(t, nil)
	for i, mediaType := range []string{ocilocal.MediaTypeDockerManifest, imageType, ocilocal.MediaTypeDockerManifest} {
		index := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":"example.com/a:v%d"}}]}`,
			mediaType, digest.FromString(manifest), len(manifest), i)
		src := tarOf(t, blobEntry(config), blobEntry("layer"), blobEntry(manifest), entry{name: "index.json", body: index})
		_, err := r.ImportArchive(ctx, bytes.NewReader(src), nil)
		if refused := errors.Is(err, ocilocal.ErrInvalidManifest); refused != (mediaType != imageType) || !refused && err != nil {
			t.Errorf("as %s: %v", mediaType, err)
		}
	}
	n := 0
	for ref, err := range r.Refs(ctx, nil) {
		if n++; err != nil || ref.Descriptor.MediaType != imageType {
			t.Errorf("%v, %v", ref, err)
		}
	}
	if found := problems(t, r, nil, nil); n != 1 || len(found) != 0 {
		t.Errorf("%d refs, %q", n, found)
	}
}

// TestPartMissing removes one file after another of an image index that a ref points at. Then it
// can be neither tagged nor exported, Verify names the missing file, and a collection deletes
// nothing that may be needed.
func TestPartMissing(t *testing.T) {
	manifest, config := image("layer")
	top := imageIndex(imageType, manifest)
	for name, part := range map[string]string{"index": top, "manifest": manifest, "config": config, "layer": "layer"} {
		t.Run(name, func(t *testing.T) {
			r := openTemp(t, nil)
			if _, err := r.ImportArchive(t.Context(), bytes.NewReader(archiveOf(t, ocispec.MediaTypeImageIndex, top, manifest, config, "layer")), nil); err != nil {
				t.Fatal(err)
			}
			child(t, r, keptRef, ocilocal.BuilderOptions{}, nil, nil, "kept")
			missing := digest.FromString(part)
			if err := os.Remove(blobFile(r, missing)); err != nil {
				t.Fatal(err)
			}
			u, err := r.Tag(t.Context(), digest.FromString(top), ocilocal.MustParseReference(movedRef), nil)
			if !errors.Is(err, ocilocal.ErrIncomplete) || u.Outcome != 0 {
				t.Errorf("Tag: %+v, %v, want %v", u, err, ocilocal.ErrIncomplete)
			}
			if ok, err := r.Exists(t.Context(), ocilocal.MustParseReference(movedRef)); ok || err != nil {
				t.Errorf("a name for what is incomplete: %v, %v", ok, err)
			}
			if err := r.ExportArchive(t.Context(), io.Discard, []ocilocal.Reference{ocilocal.MustParseReference(newRef)}, nil); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("ExportArchive: %v, want %v", err, ocilocal.ErrNotFound)
			}
			var found []digest.Digest
			for p, err := range r.Verify(t.Context(), nil) {
				if err != nil || p.Kind != ocilocal.ProblemMissing {
					t.Errorf("Verify: %v, %v", p, err)
				}
				found = append(found, p.Digest)
			}
			if !slices.Equal(found, []digest.Digest{missing}) {
				t.Errorf("Verify finds %v, want %v missing", found, missing)
			}
			before := blobNames(t, r)
			report, err := r.GC(t.Context(), atOnce)
			if isManifest := part == top || part == manifest; isManifest != errors.Is(err, ocilocal.ErrUnsafe) || !isManifest && err != nil {
				t.Errorf("GC: %v", err)
			}
			if !slices.Equal(report.Missing, []digest.Digest{missing}) || !slices.Equal(before, blobNames(t, r)) {
				t.Errorf("GC: %+v; blobs before %v, after %v", report, before, blobNames(t, r))
			}
		})
	}
}

// TestUnknownMember: a member of an image index with an unknown media type is kept, verified and
// exported like a layer.
func TestUnknownMember(t *testing.T) {
	manifest, config := image("layer")
	const note = "<note/>"
	top := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s,%s]}`, ocispec.MediaTypeImageIndex, desc(imageType, manifest), desc("application/xml", note))
	src := archiveOf(t, ocispec.MediaTypeImageIndex, top, manifest, config, "layer", note)
	ctx := t.Context()
	name := ocilocal.MustParseReference(newRef)
	for range 2 {
		r := openTemp(t, nil)
		if _, err := r.ImportArchive(ctx, bytes.NewReader(src), nil); err != nil {
			t.Fatal(err)
		}
		if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
			t.Fatal(err)
		}
		for p, err := range r.Verify(ctx, nil) {
			t.Error(p, err)
		}
		if got := filesBelow(t, r, "blobs"); len(got) != 5 {
			t.Errorf("%d blobs are kept, want 5", len(got))
		}
		if _, err := r.Tag(ctx, digest.FromString(top), ocilocal.MustParseReference(movedRef), nil); err != nil {
			t.Error(err)
		}
		var out bytes.Buffer
		if err := r.ExportArchive(ctx, &out, []ocilocal.Reference{name}, nil); err != nil {
			t.Fatal(err)
		}
		src = out.Bytes() // and once more from what went out
	}
}

// TestMaxClosure: three artifacts together may have more blobs than MaxClosure allows for one.
func TestMaxClosure(t *testing.T) {
	t.Parallel()
	const layers = ocilocal.MaxClosure/3 + 1
	raw := map[string][]byte{}
	var entries []ocispec.Descriptor
	var manifests []string
	for i := range 3 {
		var b strings.Builder
		b.WriteString(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":` + desc("a/b", "{}") + `,"layers":[`)
		for j := range layers {
			if j > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, `{"mediaType":"a/b","digest":"sha256:%064x","size":1}`, i*layers+j)
		}
		b.WriteString("]}")
		m := b.String()
		raw[digest.FromString(m).String()] = []byte(m)
		manifests = append(manifests, m)
		entries = append(entries, ocispec.Descriptor{MediaType: imageType, Digest: digest.FromString(m), Size: int64(len(m))})
	}
	r := openTemp(t, nil)
	if err := ocilocal.CollectClosures(t.Context(), r, entries, raw); err != nil {
		t.Errorf("three artifacts: %v", err)
	}
	one := imageIndex(imageType, manifests...)
	raw[digest.FromString(one).String()] = []byte(one)
	entries = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString(one), Size: int64(len(one))}}
	if err := ocilocal.CollectClosures(t.Context(), r, entries, raw); !errors.Is(err, ocilocal.ErrTooLarge) {
		t.Errorf("one image index of the three: %v, want ErrTooLarge", err)
	}
}

// TestManyLargeManifests: manifests are in memory until they are published. So all manifests of one
// import together are bounded.
func TestManyLargeManifests(t *testing.T) {
	needsDeep(t, "128 MiB of manifests")
	pad := strings.Repeat("x", 4_000_000)
	var blobs, index []string
	for i := range ocilocal.MaxImportManifests/len(pad) + 1 {
		m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"a/b","config":%s,"layers":[],"annotations":{"n":"%d","pad":%q}}`,
			imageType, desc("application/vnd.oci.empty.v1+json", "{}"), i, pad)
		blobs, index = append(blobs, m), append(index, desc(imageType, m))
	}
	src := &stream{n: len(blobs), next: func(i int) []byte {
		return plainFile("blobs/sha256/"+digest.FromString(blobs[i]).Encoded(), blobs[i])
	}}
	end := tarOf(t, blobEntry("{}"), entry{name: "index.json", body: `{"schemaVersion":2,"manifests":[` + strings.Join(index, ",") + `]}`})
	r := openTemp(t, nil)
	if _, err := r.ImportArchive(t.Context(), io.MultiReader(src, bytes.NewReader(end)), nil); !errors.Is(err, ocilocal.ErrTooLarge) {
		t.Error(err)
	}
	if n := len(blobNames(t, r)); n != 0 {
		t.Errorf("%d blobs are left", n)
	}
}
