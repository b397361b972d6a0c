package ocilocal_test

import (
	"errors"
	"io"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestManifestReadOnce: copies of an artifact share the manifest once it was read, even if its file
// is removed. After a failed read, the next call reads again.
func TestManifestReadOnce(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	made, _ := oneLayer(t, r, newRef, []byte("body"))
	a, err := r.Load(ctx, made.Reference())
	if err != nil {
		t.Fatal(err)
	}
	early := *a // before anything is read
	file := blobFile(r, a.Digest())
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	rewrite(t, file, flipBit)
	if _, err := a.Manifest(ctx); !errors.Is(err, ocilocal.ErrDigestMismatch) {
		t.Errorf("of a damaged file: %v", err)
	}
	rewrite(t, file, func([]byte) []byte { return good })
	m, err := a.Manifest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	late := *a
	for _, a := range []*ocilocal.LocalArtifact{a, &early, &late} {
		if again, err := a.Manifest(ctx); again != m || err != nil {
			t.Errorf("another read, or none: %v", err)
		}
		if layers, err := a.Layers(ctx); len(layers) != 1 || err != nil {
			t.Error(layers, err)
		}
	}
}

// TestNamesNothing: a zero reference, and a name or digest that is none, are refused. They are not
// looked up, and so not reported as missing.
func TestNamesNothing(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	var zero ocilocal.Reference
	for name, call := range map[string]func() error{
		"Resolve":   func() error { _, err := r.Resolve(ctx, zero); return err },
		"Exists":    func() error { _, err := r.Exists(ctx, zero); return err },
		"Load":      func() error { _, err := r.Load(ctx, zero); return err },
		"Remove":    func() error { _, err := r.Remove(ctx, zero); return err },
		"Tag":       func() error { _, err := r.Tag(ctx, digest.FromString("x"), zero, nil); return err },
		"Push":      func() error { _, err := r.Push(ctx, zero, nil); return err },
		"Pull":      func() error { _, err := r.Pull(ctx, zero, nil); return err },
		"RefUsage":  func() error { _, err := r.RefUsage(ctx, zero); return err },
		"Convert":   func() error { _, err := r.Convert(ctx, zero, ocilocal.MustParseReference(newRef), nil); return err },
		"Export":    func() error { return r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{zero}, nil) },
		"Builder":   func() error { _, err := r.NewBuilder(zero, nil); return err },
		"Rem. Tags": func() error { return firstError((&ocilocal.Remote{}).Tags(ctx, zero)) },
	} {
		if err := call(); !errors.Is(err, ocilocal.ErrInvalidReference) {
			t.Errorf("%s of the zero reference: %v", name, err)
		}
	}
	for _, name := range []string{"alpine", "library/alpine", "example.com", "EXAMPLE.com/a", "example.com/a:v1", "garbage!!", "x' OR '1'='1", "index.docker.io/library/a"} {
		o := &ocilocal.ListOptions{Name: name}
		_, err := r.RepositoryUsage(ctx, name)
		for _, err := range []error{err, firstError(r.Refs(ctx, o)), firstError(r.Repositories(ctx, o))} {
			if !errors.Is(err, ocilocal.ErrInvalidArgument) {
				t.Errorf("repository %q: %v", name, err)
			}
		}
	}
	if _, err := r.RepositoryUsage(ctx, ""); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Errorf("no repository: %v", err)
	}
}
