package ocilocal_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
	"github.com/opencontainers/go-digest"
)

// TestHoldRows sets, renews, lists and drops holds, of one repository and of all. The rows of held
// content can't be deleted.
func TestHoldRows(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	a, b := published(t, r, "example.com/a:v1", "one", nil).Digest(), published(t, r, "example.com/a:v2", "two", nil).Digest()
	write := func(fn func(ocilocal.IndexTx) error) {
		t.Helper()
		if err := ocilocal.IndexRows(ctx, r, fn); err != nil {
			t.Fatal(err)
		}
	}
	write(func(tx ocilocal.IndexTx) error {
		return errors.Join(
			tx.SetHold("example.com/x", a, time.UnixMicro(1)),
			tx.SetHold("example.com/x", a, time.UnixMicro(5)),
			tx.SetHold("example.com/x", b, time.UnixMicro(2)),
			tx.SetHold("example.com/y", a, time.UnixMicro(3)))
	})
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error {
		return tx.SetHold("example.com/x", digest.FromString("unknown"), time.Now())
	}); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Errorf("a hold of unknown content: %v", err)
	}
	check := func(in, all []string) {
		t.Helper()
		gotIn, gotAll, err := ocilocal.Holds(ctx, r, "example.com/x")
		if err != nil || !slices.Equal(gotIn, in) || !slices.Equal(gotAll, all) {
			t.Errorf("holds of x: %q, all: %q, %v\nwant %q, %q", gotIn, gotAll, err, in, all)
		}
	}
	xa, xb, ya := fmt.Sprintf("example.com/x %s 5", a), fmt.Sprintf("example.com/x %s 2", b), fmt.Sprintf("example.com/y %s 3", a)
	check([]string{xa, xb}, []string{xa, xb, ya})
	if _, err := r.Remove(ctx, ref("example.com/a:v1")); err != nil {
		t.Fatal(err)
	}
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(a) }); err == nil {
		t.Error("rows of held content were deleted")
	}
	for _, want := range []bool{true, false} {
		write(func(tx ocilocal.IndexTx) error {
			found, err := tx.DropHold("example.com/x", a)
			if found != want {
				t.Errorf("drop says %v, want %v", found, want)
			}
			return err
		})
	}
	check([]string{xb}, []string{xb, ya})
	write(func(tx ocilocal.IndexTx) error {
		_, err := tx.DropHold("example.com/y", a)
		return errors.Join(err, tx.Delete(a))
	})
	check([]string{xb}, []string{xb})
}

// TestUnnamedRows: the entry of an index.json for a manifest that was imported by digest is kept as
// long as the rows of the manifest.
func TestUnnamedRows(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	a, b := published(t, r, "example.com/a:v1", "one", nil).Digest(), published(t, r, "example.com/a:v2", "two", nil).Digest()
	check := func(wantA, wantB string) {
		t.Helper()
		gotA, bad := ocilocal.UnnamedEntry(r, a)
		gotB, worse := ocilocal.UnnamedEntry(r, b)
		if err := errors.Join(bad, worse); err != nil || gotA != wantA || gotB != wantB {
			t.Errorf("%q and %q, %v; want %q and %q", gotA, gotB, err, wantA, wantB)
		}
	}
	check("", "")
	for _, entry := range []string{"{}", `{"x":1}`} {
		if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error {
			if err := tx.SetUnnamed(digest.FromString("unknown"), entry, time.Now()); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("an unknown manifest: %v", err)
			}
			return tx.SetUnnamed(a, entry, time.Now())
		}); err != nil {
			t.Fatal(err)
		}
		check(entry, "")
	}
	if _, err := r.Remove(ctx, ref("example.com/a:v1")); err != nil {
		t.Fatal(err)
	}
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(a) }); err != nil {
		t.Fatal(err)
	}
	check("", "")
}
