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

// TestHoldRows: holds are set, renewed, listed by content, by repository and all together, and
// dropped. The rows of held content can't be deleted.
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
	check := func(of, in, all []string) {
		t.Helper()
		gotOf, gotIn, gotAll, err := ocilocal.Holds(ctx, r, a, "example.com/x")
		if err != nil || !slices.Equal(gotOf, of) || !slices.Equal(gotIn, in) || !slices.Equal(gotAll, all) {
			t.Errorf("holds of a: %q, of x: %q, all: %q, %v\nwant %q, %q, %q", gotOf, gotIn, gotAll, err, of, in, all)
		}
	}
	xa, xb, ya := fmt.Sprintf("example.com/x %s 5", a), fmt.Sprintf("example.com/x %s 2", b), fmt.Sprintf("example.com/y %s 3", a)
	check([]string{xa, ya}, []string{xa, xb}, []string{xa, xb, ya})
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
	check([]string{ya}, []string{xb}, []string{xb, ya})
	write(func(tx ocilocal.IndexTx) error {
		_, err := tx.DropHold("example.com/y", a)
		return errors.Join(err, tx.Delete(a))
	})
	check(nil, []string{xb}, []string{xb})
}

// TestUnnamedRows: a manifest that was imported by digest is listed until it is taken out or its
// rows are deleted.
func TestUnnamedRows(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	a, b := published(t, r, "example.com/a:v1", "one", nil).Digest(), published(t, r, "example.com/a:v2", "two", nil).Digest()
	for _, step := range []struct {
		do   func(ocilocal.IndexTx) error
		want []string
	}{
		{func(tx ocilocal.IndexTx) error {
			return errors.Join(tx.SetUnnamed(a, "", time.UnixMicro(1)), tx.SetUnnamed(b, `{"x":1}`, time.UnixMicro(2)))
		}, []string{fmt.Sprintf("%s 1 ", a), fmt.Sprintf(`%s 2 {"x":1}`, b)}},
		{func(tx ocilocal.IndexTx) error { return tx.SetUnnamed(a, `{}`, time.UnixMicro(3)) }, []string{fmt.Sprintf("%s 3 {}", a), fmt.Sprintf(`%s 2 {"x":1}`, b)}},
		{func(tx ocilocal.IndexTx) error { return tx.DropUnnamed(b) }, []string{fmt.Sprintf("%s 3 {}", a)}},
		{func(tx ocilocal.IndexTx) error {
			if err := tx.SetUnnamed(digest.FromString("unknown"), "", time.Now()); !errors.Is(err, ocilocal.ErrNotFound) {
				t.Errorf("an unknown manifest: %v", err)
			}
			return nil
		}, []string{fmt.Sprintf("%s 3 {}", a)}},
	} {
		if err := ocilocal.IndexRows(ctx, r, step.do); err != nil {
			t.Fatal(err)
		}
		if got, err := ocilocal.Unnamed(ctx, r); err != nil || !slices.Equal(got, step.want) {
			t.Errorf("%q, %v, want %q", got, err, step.want)
		}
	}
	if _, err := r.Remove(ctx, ref("example.com/a:v1")); err != nil {
		t.Fatal(err)
	}
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(a) }); err != nil {
		t.Fatal(err)
	}
	if got, err := ocilocal.Unnamed(ctx, r); err != nil || len(got) > 0 {
		t.Errorf("after its rows were deleted: %q, %v", got, err)
	}
}
