package ocilocal_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestUseAfterClose calls every method of a closed registry.
func TestUseAfterClose(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/a:v1")
	built, err := build(t, r, ref.String(), nil, "layer")
	if err != nil {
		t.Fatal(err)
	}
	layers, err := built.Layers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	artifact, err := r.Load(ctx, ref) // its manifest isn't read yet
	if err != nil {
		t.Fatal(err)
	}
	builder, err := r.NewBuilder(ref, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.test"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := builder.AddLayerBytes(ctx, "text/plain", []byte("layer"), nil); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(archive, tarOf(t), 0o600); err != nil {
		t.Fatal(err)
	}
	root, id := r.Root(), r.ID()
	mustClose(t, r)
	if r.Root() != root || r.ID() != id {
		t.Error("Root or ID changed")
	}
	d := built.Digest()
	calls := map[string]func() error{
		"Backup":          func() error { _, err := r.Backup(ctx, t.TempDir(), nil); return err },
		"ImportOMMX":      func() error { _, err := r.ImportOMMX(ctx, t.TempDir(), nil); return err },
		"FS":              func() error { _, err := fs.Stat(r.FS(ctx), "."); return err },
		"Stats":           func() error { _, err := r.Stats(ctx); return err },
		"RefUsage":        func() error { _, err := r.RefUsage(ctx, ref); return err },
		"RepositoryUsage": func() error { _, err := r.RepositoryUsage(ctx, ref.Name()); return err },
		"Repositories": func() (last error) {
			for _, err := range r.Repositories(ctx, nil) {
				last = err
			}
			return last
		},
		"NewAnonymousBuilder": func() error { _, err := r.NewAnonymousBuilder(nil); return err },
		"PruneAnonymous":      func() error { _, err := r.PruneAnonymous(ctx, nil); return err },
		"OtherAnonymousRefs": func() (last error) {
			for _, err := range r.OtherAnonymousRefs(ctx) {
				last = err
			}
			return last
		},
		"AnonymousRefs": func() (last error) {
			for _, err := range r.AnonymousRefs(ctx) {
				last = err
			}
			return last
		},
		"Close": func() error { return r.Close() },
		"Handler": func() error {
			w := httptest.NewRecorder()
			r.Handler(nil).ServeHTTP(w, httptest.NewRequest("GET", "/v2/a/tags/list", nil))
			if w.Code == http.StatusServiceUnavailable {
				return ocilocal.ErrClosed
			}
			return nil
		},
		"Resolve":           func() error { _, err := r.Resolve(ctx, ref); return err },
		"ResolveDigest":     func() error { _, err := r.ResolveDigest(ctx, d); return err },
		"Exists":            func() error { _, err := r.Exists(ctx, ref); return err },
		"Load":              func() error { _, err := r.Load(ctx, ref); return err },
		"LoadWith":          func() error { _, err := r.LoadWith(ctx, ref, nil); return err },
		"ImportRegistry":    func() error { _, err := r.ImportRegistry(ctx, openTemp(t, nil), ref, nil); return err },
		"ImportLegacyEntry": func() error { _, err := r.ImportLegacyEntry(ctx, filepath.Dir(archive), ref, nil); return err },
		"NewReferrerBuilder": func() error {
			_, err := r.NewReferrerBuilder(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d, Size: 1}, nil)
			return err
		},
		"LoadDigest":      func() error { _, err := r.LoadDigest(ctx, d); return err },
		"HasBlob":         func() error { _, err := r.HasBlob(ctx, d); return err },
		"OpenBlob":        func() error { _, err := r.OpenBlob(ctx, layers[0]); return err },
		"OpenBlobFile":    func() error { _, err := r.OpenBlobFile(ctx, layers[0]); return err },
		"Tag":             func() error { _, err := r.Tag(ctx, d, ref, nil); return err },
		"Remove":          func() error { _, err := r.Remove(ctx, ref); return err },
		"NewBuilder":      func() error { _, err := r.NewBuilder(ref, nil); return err },
		"NewIndexBuilder": func() error { _, err := r.NewIndexBuilder(ref, nil); return err },
		"Repository": func() error {
			p, err := r.Repository(ref.Name())
			if err != nil {
				return err
			}
			_, err = p.Stat(ctx, d)
			return err
		},
		"NewOMMXBuilder":    func() error { _, err := r.NewOMMXBuilder(ref, nil); return err },
		"NewGitHubBuilder":  func() error { _, err := r.NewGitHubBuilder("o", "r", "n", "v1", nil); return err },
		"ImportArchive":     func() error { _, err := r.ImportArchive(ctx, bytes.NewReader(nil), nil); return err },
		"ImportArchiveFile": func() error { _, err := r.ImportArchiveFile(ctx, archive, nil); return err },
		"ExportArchive":     func() error { return r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{ref}, nil) },
		"ExportArchiveFile": func() error { return r.ExportArchiveFile(ctx, archive+"2", []ocilocal.Reference{ref}, nil) },
		"ExportLayout":      func() error { return r.ExportLayout(ctx, archive+"3", []ocilocal.Reference{ref}, nil) },
		"ImportLayout":      func() error { _, err := r.ImportLayout(ctx, filepath.Dir(archive), nil); return err },
		"GC":                func() error { _, err := r.GC(ctx, nil); return err },
		"Repair":            func() error { _, err := r.Repair(ctx, nil); return err },
		"Verify": func() (last error) {
			for _, err := range r.Verify(ctx, nil) {
				last = err
			}
			return last
		},
		"Referrers": func() (last error) {
			for _, err := range r.Referrers(ctx, d, nil) {
				last = err
			}
			return last
		},
		"Convert": func() error {
			_, err := r.Convert(ctx, ref, ocilocal.MustParseReference("example.com/a:v2"), nil)
			return err
		},
		"Pull":         func() error { _, err := r.Pull(ctx, ref, nil); return err },
		"Push":         func() error { _, err := r.Push(ctx, ref, nil); return err },
		"GCReport":     func() error { _, err := r.GCReport(ctx, nil); return err },
		"ImportLegacy": func() error { _, err := r.ImportLegacy(ctx, filepath.Dir(archive), nil); return err },
		"LoadPath":     func() error { _, err := r.LoadPath(ctx, archive, nil); return err },
		"ImportPath":   func() error { _, err := r.ImportPath(ctx, archive, nil); return err },
		"Refs": func() (last error) {
			for _, err := range r.Refs(ctx, nil) {
				last = err
			}
			return last
		},
		"Blobs": func() (last error) {
			for _, err := range r.Blobs(ctx) {
				last = err
			}
			return last
		},
	}
	for m := range reflect.TypeFor[*ocilocal.LocalRegistry]().Methods() {
		if calls[m.Name] == nil && m.Name != "Root" && m.Name != "ID" {
			t.Errorf("this test doesn't call %s", m.Name)
		}
	}
	p, err := r.Repository(ref.Name())
	if err != nil {
		t.Fatal(err)
	}
	desc := built.Descriptor()
	view := map[string]func() error{
		"Stat":         func() error { _, err := p.Stat(ctx, d); return err },
		"StatManifest": func() error { _, err := p.StatManifest(ctx, d); return err },
		"StatBlob":     func() error { _, err := p.StatBlob(ctx, d); return err },
		"Exists":       func() error { _, err := p.Exists(ctx, desc); return err },
		"Fetch":        func() error { _, err := p.Fetch(ctx, desc); return err },
		"OpenFile":     func() error { _, err := p.OpenFile(ctx, d); return err },
		"Resolve":      func() error { _, err := p.Resolve(ctx, "v1"); return err },
		"Tag":          func() error { return p.Tag(ctx, desc, "v1") },
		"Untag":        func() error { return p.Untag(ctx, "v1") },
		"Tags":         func() error { return p.Tags(ctx, "", func([]string) error { return nil }) },
		"TagList":      func() error { _, err := p.TagList(ctx, "", 1); return err },
		"Predecessors": func() error { _, err := p.Predecessors(ctx, desc); return err },
		"Referrers": func() (last error) {
			for _, err := range p.Referrers(ctx, d, nil) {
				last = err
			}
			return last
		},
		"PutBlob":        func() error { _, err := p.PutBlob(ctx, strings.NewReader("x"), "", -1); return err },
		"PutManifest":    func() error { _, err := p.PutManifest(ctx, "", []byte("{}"), nil); return err },
		"Push":           func() error { return p.Push(ctx, layers[0], strings.NewReader("layer")) },
		"Mount":          func() error { _, err := p.Mount(ctx, d, nil); return err },
		"Delete":         func() error { return p.Delete(ctx, desc) },
		"DeleteManifest": func() error { return p.DeleteManifest(ctx, d) },
		"DeleteBlob":     func() error { return p.DeleteBlob(ctx, d) },
	}
	for m := range reflect.TypeFor[*ocilocal.Repository]().Methods() {
		if view[m.Name] == nil && m.Name != "Name" {
			t.Errorf("this test doesn't call Repository.%s", m.Name)
		}
	}
	for name, call := range view {
		calls["Repository."+name] = call
	}
	maps.Copy(calls, map[string]func() error{
		"Manifest":  func() error { _, err := artifact.Manifest(ctx); return err },
		"Parent":    func() error { _, err := artifact.Parent(ctx); return err },
		"Diff":      func() error { _, err := artifact.Diff(ctx, artifact); return err },
		"Layers":    func() error { _, err := artifact.Layers(ctx); return err },
		"ReadLayer": func() error { _, err := built.ReadLayer(ctx, layers[0]); return err },
		"OpenLayer": func() error { _, err := built.OpenLayer(ctx, ocispec.Descriptor{Digest: layers[0].Digest}); return err },
		"AddLayer": func() error {
			_, err := builder.AddLayer(ctx, "text/plain", strings.NewReader("x"), nil)
			return err
		},
		"AddLayerBytes": func() error { _, err := builder.AddLayerBytes(ctx, "text/plain", []byte("x"), nil); return err },
		"Build":         func() error { _, err := builder.Build(ctx); return err },
	})
	for name, call := range calls {
		if err := call(); !errors.Is(err, ocilocal.ErrClosed) || !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s: %v, want %v", name, err, ocilocal.ErrClosed)
		}
	}
	if err := builder.Cancel(); err != nil {
		t.Errorf("Cancel: %v", err)
	}
}
