package ocilocal_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestHeldBlobs: a blob that PutBlob has acknowledged stays, for every process, until
// GCOptions.Held has passed. Neither a collection without grace nor the end of the process that
// put it removes it.
func TestHeldBlobs(t *testing.T) {
	root, a, b := twoHandles(t)
	manifest, config := image("layer")
	for _, text := range []string{config, "layer"} {
		if _, err := repository(t, a, "localhost/app").PutBlob(t.Context(), strings.NewReader(text), "", -1); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, a)
	collect(t, b, atOnce)
	collect(t, b, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Held: 1})
	desc := push(t, repository(t, b, "localhost/app"), manifest)
	if err := repository(t, b, "localhost/app").Tag(t.Context(), desc, "v1"); err != nil {
		t.Fatal(err)
	}
	collect(t, b, &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Held: ocilocal.NoGrace})
	if _, err := os.Stat(filepath.Join(root, "tmp", "held")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("tmp/held: %v", err)
	}
	if text, err := fetched(repository(t, b, "localhost/app"), blobOf("layer")); text != "layer" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
}

// TestHeldBlobDamaged: a power cut can damage a held blob, because it is not synced. A manifest
// that needs it is refused, as if the blob were missing. Clients do not hear that the blob is
// there, because they would not put it again. No repository can mount it. Putting the blob again
// heals it.
func TestHeldBlobDamaged(t *testing.T) {
	for what, damage := range map[string]func(name string) error{
		"bytes": func(name string) error { return os.WriteFile(name, []byte("lAyer"), 0o644) },
		"empty": func(name string) error { return os.WriteFile(name, nil, 0o644) },
	} {
		_, a, b := twoHandles(t)
		manifest, config := image("layer")
		p := repository(t, a, "localhost/app")
		for _, text := range []string{config, "layer"} {
			if _, err := p.PutBlob(t.Context(), strings.NewReader(text), "", -1); err != nil {
				t.Fatal(err)
			}
		}
		held, err := filepath.Glob(filepath.Join(a.Root(), "tmp/held/*/*/sha256-"+blobOf("layer").Digest.Encoded()))
		if err != nil || len(held) != 1 {
			t.Fatalf("%q, %v", held, err)
		}
		if err := errors.Join(os.Chmod(held[0], 0o644), damage(held[0])); err != nil {
			t.Fatal(err)
		}
		for _, r := range []*ocilocal.LocalRegistry{a, b} {
			p := repository(t, r, "localhost/app")
			if ok, err := p.Exists(t.Context(), blobOf("layer")); ok || err != nil {
				t.Errorf("%s: %v, %v", what, ok, err)
			}
			serveAt(t, r, nil).want(404, "HEAD", "/v2/app/blobs/"+blobOf("layer").Digest.String(), "")
			_, err := repository(t, r, "localhost/other").Mount(t.Context(), blobOf("layer").Digest, p)
			mustFail(t, err, ocilocal.ErrNotFound)
			_, err = p.PutManifest(t.Context(), "", []byte(manifest), nil)
			if !errors.Is(err, ocilocal.ErrIncomplete) {
				t.Errorf("%s: %v", what, err)
			}
			if text, err := fetched(p, blobOf("layer")); err == nil {
				t.Errorf("%s: %q", what, text)
			}
		}
		push(t, p, manifest, "layer")
		// When the blob is published, a damaged held copy of it disturbs neither reads nor puts.
		if _, err := p.PutBlob(t.Context(), strings.NewReader("layer"), "", -1); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Remove(held[0]), damage(held[0])); err != nil {
			t.Fatal(err)
		}
		for _, r := range []*ocilocal.LocalRegistry{a, b} {
			p := repository(t, r, "localhost/app")
			if text, err := fetched(p, blobOf("layer")); text != "layer" || err != nil {
				t.Errorf("%s: %q, %v", what, text, err)
			}
			push(t, p, manifest)
		}
	}
}
