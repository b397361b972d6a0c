package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

func repository(t testing.TB, r *ocilocal.LocalRegistry, name string) *ocilocal.Repository {
	t.Helper()
	p, err := r.Repository(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// blobOf returns the descriptor of a text as a blob.
func blobOf(text string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: "text/plain", Digest: digest.FromString(text), Size: int64(len(text))}
}

// manifestOf returns the descriptor of a manifest's or index's text.
func manifestOf(text string) ocispec.Descriptor {
	d := blobOf(text)
	d.MediaType = ocispec.MediaTypeImageManifest
	if strings.Contains(text, `"manifests"`) {
		d.MediaType = ocispec.MediaTypeImageIndex
	}
	return d
}

// push pushes content as oras does, the manifest last.
func push(t testing.TB, p *ocilocal.Repository, manifest string, blobs ...string) ocispec.Descriptor {
	t.Helper()
	for _, b := range blobs {
		if err := p.Push(t.Context(), blobOf(b), strings.NewReader(b)); err != nil {
			t.Fatal(err)
		}
	}
	desc := manifestOf(manifest)
	if err := p.Push(t.Context(), desc, strings.NewReader(manifest)); err != nil {
		t.Fatal(err)
	}
	return desc
}

// pushImage pushes an image with one layer under a tag, or by digest.
func pushImage(t testing.TB, p *ocilocal.Repository, tag, layer string) ocispec.Descriptor {
	t.Helper()
	manifest, config := image(layer)
	desc := push(t, p, manifest, config, layer)
	if tag != "" {
		if err := p.Tag(t.Context(), desc, tag); err != nil {
			t.Fatal(err)
		}
	}
	return desc
}

// fetched reads content through the view.
func fetched(p *ocilocal.Repository, desc ocispec.Descriptor) (string, error) {
	rc, err := p.Fetch(context.Background(), desc)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(rc)
	return string(b), errors.Join(err, rc.Close())
}

// checkShown checks whether a repository shows a manifest and the blobs that it needs, by each
// method that reads.
func checkShown(t *testing.T, p *ocilocal.Repository, want bool, manifest string, blobs ...string) {
	t.Helper()
	desc := manifestOf(manifest)
	texts := map[string]ocispec.Descriptor{manifest: desc}
	for _, b := range blobs {
		texts[b] = blobOf(b)
	}
	for text, d := range texts {
		ok, err := p.Exists(t.Context(), d)
		if ok != want || err != nil {
			t.Errorf("%s: %v, %v", d.Digest, ok, err)
		}
		got, err := fetched(p, d)
		if want && (got != text || err != nil) || !want && !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%q, %v", got, err)
		}
		stat, err := p.Stat(t.Context(), d.Digest)
		if want && (stat.Size != d.Size || err != nil) || !want && !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%+v, %v", stat, err)
		}
	}
	got, err := p.Resolve(t.Context(), desc.Digest.String())
	if want && (got.Digest != desc.Digest || got.MediaType != desc.MediaType || err != nil) || !want && !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestRepository: a repository shows what was pushed to it, by tag and by digest. Another
// repository does not. The content survives a collection without grace.
func TestRepository(t *testing.T) {
	r := openTemp(t, nil)
	p, other := repository(t, r, "localhost/org/app"), repository(t, r, "localhost/org/other")
	manifest, config := image("layer")
	desc := push(t, p, manifest, config, "layer")
	shown := func(p *ocilocal.Repository, want bool) { t.Helper(); checkShown(t, p, want, manifest, config, "layer") }
	shown(p, true)
	shown(other, false)
	collect(t, r, atOnce)
	shown(p, true)
	_, err := p.Resolve(t.Context(), "v1")
	mustFail(t, err, ocilocal.ErrNotFound)
	if err := p.Tag(t.Context(), desc, "v1"); err != nil {
		t.Fatal(err)
	}
	if got, err := p.Resolve(t.Context(), "v1"); err != nil || got.Digest != desc.Digest {
		t.Errorf("%+v, %v", got, err)
	}
	if a, err := r.Load(t.Context(), ref("localhost/org/app:v1")); err != nil || a.Digest() != desc.Digest {
		t.Errorf("%v, %v", a, err)
	}
	mustFail(t, other.Tag(t.Context(), desc, "v1"), ocilocal.ErrNotFound)
	mustFail(t, p.Tag(t.Context(), blobOf("layer"), "v1"), ocilocal.ErrNotFound)
	_, err = r.Repository("localhost/UPPER")
	mustFail(t, err, ocilocal.ErrInvalidReference)
}

// TestRepositoryTags lists in pages, past any number of manifests without a tag.
func TestRepositoryTags(t *testing.T) {
	r := openTemp(t, nil)
	p := repository(t, r, "localhost/app")
	n := scaled(1200, 10_000, 100_000)
	desc := pushImage(t, p, "", "layer")
	if err := p.Tag(t.Context(), desc, desc.Digest.String()); err != nil {
		t.Fatal(err)
	}
	// Tags on both sides of the digests.
	execIndex(t, r.Root(), fmt.Sprintf(`WITH RECURSIVE i (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM i WHERE n < %d)
		INSERT INTO refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved)
		SELECT name, iif(n %% 3 = 0, printf('sha256:%%064x', n), printf('%%s%%06d', iif(n %% 2, 'a', 'v'), n)), manifest, digest, size, media_type, artifact_type, created, moved
		FROM i, refs WHERE reference = '%s'`, n, desc.Digest))
	var all []string
	pages := 0
	if err := p.Tags(t.Context(), "", func(tags []string) error {
		all = append(all, tags...)
		pages++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(all) != n-n/3 || !slices.IsSorted(all) || pages < 2 {
		t.Errorf("%d tags in %d pages", len(all), pages)
	}
	for _, last := range []string{"a000005", "a00000x", "sha256", "v000004", "zzz"} {
		want := all[min(len(all), indexAfter(all, last)):]
		want = want[:min(len(want), 7)]
		if got, err := p.TagList(t.Context(), last, 7); err != nil || !slices.Equal(got, want) {
			t.Errorf("after %s: %q, %v, want %q", last, got, err, want)
		}
	}
	stop := errors.New("stop")
	if err := p.Tags(t.Context(), "", func([]string) error { return stop }); err != stop {
		t.Error(err)
	}
}

func indexAfter(sorted []string, last string) int {
	i, found := slices.BinarySearch(sorted, last)
	if found {
		i++
	}
	return i
}

// jsonOf is a descriptor as JSON.
func jsonOf(d ocispec.Descriptor) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, d.MediaType, d.Digest, d.Size)
}

// referring adds a subject to the text of a manifest.
func referring(manifest string, subject ocispec.Descriptor) string {
	return strings.TrimSuffix(manifest, "}") + `,"subject":` + jsonOf(subject) + "}"
}

// TestRepositoryPublishedMeanwhile publishes and releases a held blob between two looks of a reader:
// the first, at the index, does not find it, and the second, at the held files, would not either.
func TestRepositoryPublishedMeanwhile(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	writer, reader := mustOpen(t, root), mustOpen(t, root)
	p, q := repository(t, writer, "localhost/app"), repository(t, reader, "localhost/app")
	for layer, look := range map[string]func(ocispec.Descriptor) error{
		"one": func(d ocispec.Descriptor) error { _, err := q.StatBlob(t.Context(), d.Digest); return err },
		"two": func(d ocispec.Descriptor) error {
			f, err := q.OpenFile(t.Context(), d.Digest)
			if err != nil {
				return err
			}
			return f.Close()
		},
	} {
		manifest, config := image(layer)
		for _, text := range []string{config, layer} {
			if err := p.Push(t.Context(), blobOf(text), strings.NewReader(text)); err != nil {
				t.Fatal(err)
			}
		}
		s := stopAt(reader, "stat tmp/held/")
		done := s.start(t, func() error { return look(blobOf(layer)) })
		push(t, p, manifest)
		collect(t, writer, &ocilocal.GCOptions{Held: -1, Grace: 0})
		close(s.let)
		if err := outcome(t, done); err != nil {
			t.Error(err)
		}
	}
}
