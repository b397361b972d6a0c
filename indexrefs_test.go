package ocilocal_test

import (
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestRefRows: when a ref is moved, its row keeps the time of its first publish. The entry of an
// index.json belongs to the old manifest, and is removed.
func TestRefRows(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	published(t, r, "example.com/other:v1", "layer", nil)
	name := ref("example.com/a:v1")
	one, _ := imageRows(t, "{}", "layer")
	two, _ := imageRows(t, "{}", "layer", "layer")
	if _, _, _, _, ok, err := ocilocal.RefDetails(r, name); ok || err != nil {
		t.Errorf("a ref that is not there: %v, %v", ok, err)
	}
	if err := ocilocal.PublishAbsent(ctx, r, name, one, `{"platform":{}}`); err != nil {
		t.Fatal(err)
	}
	created, moved, used, entry, ok, err := ocilocal.RefDetails(r, name)
	if err != nil || !ok || created.IsZero() || !created.Equal(moved) || !used.IsZero() || entry != `{"platform":{}}` {
		t.Errorf("first: created %v, moved %v, used %v, entry %q, %v, %v", created, moved, used, entry, ok, err)
	}
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.SetRefEntry(name, "{}") }); err != nil {
		t.Fatal(err)
	}
	if _, _, _, entry, _, err := ocilocal.RefDetails(r, name); err != nil || entry != "{}" {
		t.Errorf("entry %q, %v", entry, err)
	}
	if err := ocilocal.PublishAbsent(ctx, r, name, two, ""); err != nil {
		t.Fatal(err)
	}
	created2, moved2, _, entry, _, err := ocilocal.RefDetails(r, name)
	if err != nil || !created2.Equal(created) || !moved2.After(created) || entry != "" {
		t.Errorf("moved: created %v, was %v; moved %v; entry %q; %v", created2, created, moved2, entry, err)
	}
	if desc, err := r.Resolve(ctx, name); err != nil || desc.Digest != two.Digest() {
		t.Errorf("%v, %v", desc, err)
	}
}
