package ocilocal_test

import (
	"errors"
	"io"
	"path/filepath"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestOneReader makes all calls that read the index with a pool of a single connection. A query
// that runs while rows of another one are open would wait for that connection for ever. The
// bodies of loops over listings query as well, because callers may do so.
func TestOneReader(t *testing.T) {
	r := openTemp(t, nil)
	ocilocal.IndexReaders(r, 1)
	ctx := t.Context()
	a := published(t, r, "example.com/reader/a:v1", "one", nil)
	b := published(t, r, "example.com/reader/b:v1", "two", a)
	published(t, r, "example.com/reader/c:v1", "three", b)
	collected := published(t, r, "example.com/reader/d:v1", "four", nil)
	if _, err := r.Remove(ctx, collected.Reference()); err != nil {
		t.Fatal(err)
	}
	for what, call := range map[string]func() error{
		"Refs": func() (err error) {
			for ref, bad := range r.Refs(ctx, nil) {
				_, more := r.Resolve(ctx, ref.Reference)
				err = errors.Join(err, bad, more)
			}
			return err
		},
		"Repositories": func() (err error) {
			for name, bad := range r.Repositories(ctx, nil) {
				_, more := r.RepositoryUsage(ctx, name)
				err = errors.Join(err, bad, more)
			}
			return err
		},
		"Referrers": func() (err error) {
			for d, bad := range r.Referrers(ctx, a.Digest(), nil) {
				_, more := r.ResolveDigest(ctx, d.Digest)
				err = errors.Join(err, bad, more)
			}
			return err
		},
		"History": func() (err error) {
			for at, bad := range b.History(ctx) {
				_, more := r.RefUsage(ctx, at.Reference())
				err = errors.Join(err, bad, ignoreInvalid(more))
			}
			return err
		},
		"Verify": func() (err error) {
			for _, bad := range r.Verify(ctx, nil) {
				err = errors.Join(err, bad)
			}
			return err
		},
		"Stats":  func() error { _, err := r.Stats(ctx); return err },
		"Report": func() error { _, err := r.GCReport(ctx, nil); return err },
		"GC":     func() error { _, err := r.GC(ctx, atOnce); return err },
		"Repair": func() error { _, err := r.Repair(ctx, nil); return err },
		"Backup": func() error { _, err := r.Backup(ctx, filepath.Join(t.TempDir(), "backup"), nil); return err },
		"Layout": func() error {
			return r.ExportLayout(ctx, filepath.Join(t.TempDir(), "layout"), []ocilocal.Reference{a.Reference()}, nil)
		},
		"Archive": func() error {
			return r.ExportArchive(ctx, io.Discard, []ocilocal.Reference{a.Reference(), b.Reference()}, &ocilocal.ExportOptions{Referrers: true})
		},
		"Prune": func() error { _, err := r.PruneAnonymous(ctx, nil); return err },
	} {
		done := make(chan error, 1)
		go func() { done <- call() }()
		if err := outcome(t, done); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// ignoreInvalid returns nil for the error about an artifact without a name.
func ignoreInvalid(err error) error {
	if errors.Is(err, ocilocal.ErrInvalidReference) {
		return nil
	}
	return err
}
