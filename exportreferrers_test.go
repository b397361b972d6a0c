package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// signed fills a registry with an artifact, its predecessor, two signatures of it, a
// signature of one of these that no ref points at, and something else.
func signed(t *testing.T, r *ocilocal.LocalRegistry) (app *ocilocal.LocalArtifact, line, referrers []digest.Digest) {
	t.Helper()
	other := ocilocal.BuilderOptions{Format: ocilocal.FormatArtifactManifest}
	old := child(t, r, "example.com/app:v0", ocilocal.BuilderOptions{}, nil, nil, "old app")
	app = child(t, r, "example.com/app:v1", ocilocal.BuilderOptions{}, descOf(old), nil, "app")
	sig := child(t, r, "example.com/app:sig", other, descOf(app), nil, "signature")
	twin := child(t, r, "example.com/app:twin", ocilocal.BuilderOptions{}, descOf(app), nil, "signature")
	over := child(t, r, "example.com/app:over", ocilocal.BuilderOptions{}, descOf(sig), nil, "countersignature")
	child(t, r, "example.com/app:other", ocilocal.BuilderOptions{}, nil, nil, "other")
	if _, err := r.Remove(t.Context(), over.Reference()); err != nil {
		t.Fatal(err)
	}
	return app, []digest.Digest{old.Digest()}, sortedDigests(sig.Digest(), twin.Digest(), over.Digest())
}

func sortedDigests(ds ...digest.Digest) []digest.Digest { return slices.Sorted(slices.Values(ds)) }

func entryDigests(in *ocilocal.Inspection, named bool) []digest.Digest {
	var ds []digest.Digest
	for _, e := range in.Entries {
		if (e.Name != "") == named {
			ds = append(ds, e.Descriptor.Digest)
		}
	}
	return sortedDigests(ds...)
}

func TestExportReferrers(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	app, line, referrers := signed(t, r)
	for _, c := range []struct {
		name    string
		opts    ocilocal.ExportOptions
		unnamed []digest.Digest
	}{
		{"none", ocilocal.ExportOptions{}, nil},
		{"referrers", ocilocal.ExportOptions{Referrers: true}, referrers},
		{"and lineage", ocilocal.ExportOptions{Referrers: true, Lineage: true}, sortedDigests(slices.Concat(line, referrers)...)},
		{"one by digest", ocilocal.ExportOptions{Referrers: true, Digests: referrers[:1]}, referrers},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out [2]bytes.Buffer
			for i := range out {
				if err := r.ExportArchive(ctx, &out[i], []ocilocal.Reference{app.Reference()}, &c.opts); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(out[0].Bytes(), out[1].Bytes()) {
				t.Error("equal content, other bytes")
			}
			dir := filepath.Join(t.TempDir(), "layout")
			for range 2 { // the second adds nothing
				if err := r.ExportLayout(ctx, dir, []ocilocal.Reference{app.Reference()}, &c.opts); err != nil {
					t.Fatal(err)
				}
			}
			archive, err := ocilocal.InspectArchive(ctx, &out[0])
			if err != nil {
				t.Fatal(err)
			}
			layout, err := ocilocal.InspectLayout(ctx, dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, in := range []*ocilocal.Inspection{archive, layout} {
				if got := entryDigests(in, false); !slices.Equal(got, c.unnamed) {
					t.Errorf("unnamed: %v, want %v", got, c.unnamed)
				}
				if got := entryDigests(in, true); !slices.Equal(got, []digest.Digest{app.Digest()}) {
					t.Errorf("named: %v", got)
				}
			}
		})
	}
	// A referrer whose manifest was lost is not left out in silence.
	if err := os.Remove(filepath.Join(r.Root(), "blobs", "sha256", referrers[0].Encoded())); err != nil {
		t.Fatal(err)
	}
	if err := r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{app.Reference()}, &ocilocal.ExportOptions{Referrers: true}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	if err := r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{app.Reference()}, nil); err != nil {
		t.Error(err)
	}
}

// A manifest that lies in an image index has referrers as well.
func TestReferrersOfIndexMember(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	manifest, config := image("layer")
	index := imageIndex(imageType, manifest)
	top := archiveOf(t, "application/vnd.oci.image.index.v1+json", index, manifest, config, "layer")
	from, err := r.ImportArchive(ctx, bytes.NewReader(top), &ocilocal.ImportOptions{Reference: ref("example.com/multi:v1"), Rename: true})
	if err != nil {
		t.Fatal(err)
	}
	inner, err := r.LoadDigest(ctx, digest.FromString(manifest))
	if err != nil {
		t.Fatal(err)
	}
	sig := child(t, r, "example.com/multi:sig", ocilocal.BuilderOptions{}, descOf(inner), nil, "sig")
	var out bytes.Buffer
	if err := r.ExportArchive(ctx, &out, []ocilocal.Reference{ref("example.com/multi:v1")}, &ocilocal.ExportOptions{Referrers: true}); err != nil {
		t.Fatal(err)
	}
	to := openTemp(t, nil)
	got, err := to.ImportArchive(ctx, &out, &ocilocal.ImportOptions{Select: string(from.Artifacts[0].Descriptor.Digest), Referrers: true})
	if err != nil || len(got.Referrers) != 1 || got.Referrers[0].Digest != sig.Digest() {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestImportReferrers(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	app, line, referrers := signed(t, r)
	// Everything, all that can be with its name.
	var refs []ocilocal.Reference
	for ref, err := range r.Refs(ctx, nil) {
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref.Reference)
	}
	all := &ocilocal.ExportOptions{Referrers: true}
	var archive bytes.Buffer
	if err := r.ExportArchive(ctx, &archive, refs, all); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if err := r.ExportLayout(ctx, dir, refs, all); err != nil {
		t.Fatal(err)
	}
	for name, load := range map[string]func(*ocilocal.LocalRegistry, *ocilocal.ImportOptions) (*ocilocal.ImportResult, error){
		"archive": func(r *ocilocal.LocalRegistry, o *ocilocal.ImportOptions) (*ocilocal.ImportResult, error) {
			return r.ImportArchive(ctx, bytes.NewReader(archive.Bytes()), o)
		},
		"layout": func(r *ocilocal.LocalRegistry, o *ocilocal.ImportOptions) (*ocilocal.ImportResult, error) {
			return r.ImportLayout(ctx, dir, o)
		},
	} {
		t.Run(name, func(t *testing.T) {
			to := openTemp(t, nil)
			one := ocilocal.ImportOptions{Select: app.Reference().String()}
			if got, err := load(to, &one); err != nil || got.Referrers != nil {
				t.Fatalf("%+v, %v", got, err)
			}
			if _, err := to.LoadDigest(ctx, referrers[0]); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("came unasked: %v", err)
			}
			one.Referrers = true
			for range 2 {
				got, err := load(to, &one)
				if err != nil {
					t.Fatal(err)
				}
				var came []digest.Digest
				for _, d := range got.Referrers {
					came = append(came, d.Digest)
				}
				if !slices.Equal(sortedDigests(came...), referrers) || len(got.Artifacts) != 1 {
					t.Errorf("%v, want %v", came, referrers)
				}
			}
			n := 0
			for ref, err := range to.Refs(ctx, nil) {
				if n++; err != nil || ref.Reference != app.Reference() {
					t.Errorf("ref %v, %v", ref, err)
				}
			}
			n = 0
			for _, err := range to.Referrers(ctx, app.Digest(), nil) {
				if n++; err != nil {
					t.Error(err)
				}
			}
			if n != 2 {
				t.Errorf("%d referrers in the index", n)
			}
			if _, err := to.LoadDigest(ctx, line[0]); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("the subject came unasked: %v", err)
			}
			// They have no refs: their subject keeps them, unless an option drops them.
			for _, keep := range []bool{true, false} {
				if _, err := to.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, DropReferrers: !keep}); err != nil {
					t.Fatal(err)
				}
				for _, d := range referrers {
					if _, err := to.LoadDigest(ctx, d); (err == nil) != keep {
						t.Errorf("keep %v: %v", keep, err)
					}
				}
			}
			for p, err := range to.Verify(ctx, nil) {
				t.Error(p, err)
			}
		})
	}
}

// TestImportReferrersConflict: if an artifact is not imported because of a conflict, its referrers
// are not imported either.
func TestImportReferrersConflict(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	app, _, referrers := signed(t, r)
	var archive bytes.Buffer
	if err := r.ExportArchive(ctx, &archive, []ocilocal.Reference{app.Reference()}, &ocilocal.ExportOptions{Referrers: true}); err != nil {
		t.Fatal(err)
	}
	to := openTemp(t, nil)
	published(t, to, app.Reference().String(), "another", nil)
	o := ocilocal.ImportOptions{Select: app.Reference().String(), Referrers: true}
	got, err := to.ImportArchive(ctx, bytes.NewReader(archive.Bytes()), &o)
	if !errors.Is(err, ocilocal.ErrConflict) || got == nil || got.Referrers != nil || got.Artifacts[0].Update.Outcome != ocilocal.Conflicted {
		t.Errorf("%+v, %v", got, err)
	}
	for _, d := range referrers {
		if _, err := to.LoadDigest(ctx, d); !errors.Is(err, ocilocal.ErrNotFound) {
			t.Error(err)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := to.ImportArchive(cancelled, bytes.NewReader(archive.Bytes()), &o); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// A type that the registry does not accept fails the whole import.
	typed := openTemp(t, &ocilocal.Options{ArtifactTypes: []string{"application/vnd.example.none"}})
	if _, err := typed.ImportArchive(ctx, bytes.NewReader(archive.Bytes()), &o); !errors.Is(err, ocilocal.ErrArtifactType) {
		t.Error(err)
	}
	checkNothingVisible(t, typed)
}

func TestImportReferrersHostile(t *testing.T) {
	t.Parallel()
	manifest, config := image("layer")
	entryOf := func(body string) string { return desc(imageType, body) }
	referrer := func(subject string, size int, layer string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"artifactType":"application/vnd.example.sig","config":%s,"layers":[%s],"subject":{"mediaType":%q,"digest":%q,"size":%d}}`,
			desc("application/vnd.oci.empty.v1+json", config), desc("text/plain", layer), imageType, subject, size)
	}
	subject := string(digest.FromString(manifest))
	good := referrer(subject, len(manifest), "sig")
	lost := referrer(subject, len(manifest), "not there")
	mine := []entry{blobEntry(manifest), blobEntry(config), blobEntry("layer"), blobEntry("sig")}
	cut := blobEntry(good)
	cut.body = good[:len(good)-1]
	flipped := blobEntry(good)
	flipped.body = good[:len(good)-1] + "]"
	for _, c := range []struct {
		name    string
		entries []string
		blobs   []entry
		want    error
		came    int
	}{
		{"good", []string{entryOf(good)}, []entry{blobEntry(good)}, nil, 1},
		{"twice", []string{entryOf(good), entryOf(good)}, []entry{blobEntry(good)}, nil, 1},
		{"not of this", []string{entryOf(referrer(manSHA, 1, "sig"))}, []entry{blobEntry(referrer(manSHA, 1, "sig"))}, nil, 0},
		{"no manifest's type", []string{desc("text/plain", "absent")}, nil, nil, 0},
		{"subject of another size", []string{entryOf(referrer(subject, 1, "sig"))}, []entry{blobEntry(referrer(subject, 1, "sig"))}, nil, 1},
		{"manifest missing", []string{entryOf(good)}, nil, ocilocal.ErrIncomplete, 0},
		{"layer missing", []string{entryOf(lost)}, []entry{blobEntry(lost)}, ocilocal.ErrIncomplete, 0},
		{"cut off", []string{entryOf(good)}, []entry{cut}, ocilocal.ErrSizeMismatch, 0},
		{"flipped", []string{entryOf(good)}, []entry{flipped}, ocilocal.ErrDigestMismatch, 0},
		{"no JSON", []string{entryOf("{")}, []entry{blobEntry("{")}, ocilocal.ErrInvalidManifest, 0},
		{"of another type", []string{desc(ocilocal.MediaTypeArtifactManifest, good)}, []entry{blobEntry(good)}, ocilocal.ErrInvalidManifest, 0},
		{"too large", []string{fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, imageType, manHex("a"), 5<<20)}, nil, ocilocal.ErrTooLarge, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			doc := `{"schemaVersion":2,"manifests":[` + entryOf(manifest)
			for _, e := range c.entries {
				doc += "," + e
			}
			all := slices.Concat(mine, c.blobs, []entry{layoutVersion, {name: "index.json", body: doc + "]}"}})
			dir := layoutDir(t, all...)
			o := &ocilocal.ImportOptions{Select: subject, Reference: ref("example.com/a:v1"), Referrers: true}
			r := openTemp(t, nil)
			got, err := r.ImportLayout(t.Context(), dir, o)
			if !errors.Is(err, c.want) {
				t.Fatalf("layout: %v, want %v", err, c.want)
			}
			if err == nil && len(got.Referrers) != c.came {
				t.Errorf("layout: %v came, want %d", got.Referrers, c.came)
			}
			if err != nil {
				checkNothingVisible(t, r)
			}
			r = openTemp(t, nil)
			got, err = r.ImportArchive(t.Context(), bytes.NewReader(tarOf(t, all...)), o)
			if !errors.Is(err, c.want) {
				// An archive's blobs are all verified, before what they are for is known.
				if !errors.Is(err, ocilocal.ErrDigestMismatch) || c.name != "cut off" {
					t.Fatalf("archive: %v, want %v", err, c.want)
				}
			}
			if err == nil && len(got.Referrers) != c.came {
				t.Errorf("archive: %v came, want %d", got.Referrers, c.came)
			}
			if err != nil {
				checkNothingVisible(t, r)
			}
		})
	}
}

// TestImportReferrersNewRef imports an artifact with its referrers into an empty registry. The ref
// points at the artifact, and not at a referrer.
func TestImportReferrersNewRef(t *testing.T) {
	r := openTemp(t, nil)
	app, _, _ := signed(t, r)
	var archive bytes.Buffer
	if err := r.ExportArchive(t.Context(), &archive, []ocilocal.Reference{app.Reference()}, &ocilocal.ExportOptions{Referrers: true}); err != nil {
		t.Fatal(err)
	}
	to := openTemp(t, nil)
	o := ocilocal.ImportOptions{Select: app.Reference().String(), Referrers: true}
	if _, err := to.ImportArchive(t.Context(), bytes.NewReader(archive.Bytes()), &o); err != nil {
		t.Fatal(err)
	}
	if d, err := to.Resolve(t.Context(), app.Reference()); err != nil || d.Digest != app.Digest() {
		t.Errorf("%s is %v, want %s, %v", app.Reference(), d.Digest, app.Digest(), err)
	}
}
