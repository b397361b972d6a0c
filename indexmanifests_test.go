package ocilocal_test

import (
	"context"
	"database/sql"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// contentRows lists the rows of content by its view: digest, size, kind and presence.
func contentRows(t *testing.T, r *ocilocal.LocalRegistry) map[digest.Digest]string {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(r.Root(), "index.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query("SELECT digest, size || ' ' || kind || ' ' || present FROM readable_content")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	all := map[digest.Digest]string{}
	for rows.Next() {
		var d digest.Digest
		var text string
		if err := rows.Scan(&d, &text); err != nil {
			t.Fatal(err)
		}
		all[d] = text
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// imageRows returns an image manifest with layers of these texts, whose config is the first.
func imageRows(t *testing.T, texts ...string) (*ocilocal.Manifest, []digest.Digest) {
	t.Helper()
	var descs []ocispec.Descriptor
	var all []digest.Digest
	for _, s := range texts {
		d := digest.FromString(s)
		descs = append(descs, ocispec.Descriptor{MediaType: "text/plain", Digest: d, Size: int64(len(s))})
		all = append(all, d)
	}
	m, err := ocilocal.BuildManifest(ocilocal.FormatImageManifest, ocilocal.ManifestSpec{
		ArtifactType: "application/vnd.example.test", Config: &descs[0], Layers: descs[1:]})
	if err != nil {
		t.Fatal(err)
	}
	return m, all
}

// TestAbsentRows: a manifest can be published without some of its blobs, if the publication says
// so. Its rows say which. When such a blob is published later, it is present for every manifest.
func TestAbsentRows(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	published(t, r, "example.com/a:v1", "here", nil)
	layer := digest.FromString("here")
	m, _ := imageRows(t, "{}", "here", "not here")
	gone := digest.FromString("not here")
	if err := ocilocal.PublishAbsent(ctx, r, ref("example.com/a:v2"), m, ""); !errors.Is(err, ocilocal.ErrIncomplete) {
		t.Fatalf("a blob is neither here nor recorded as absent: %v", err)
	}
	if err := ocilocal.PublishAbsent(ctx, r, ref("example.com/a:v2"), m, "", gone, layer); err != nil {
		t.Fatal(err)
	}
	state := func(want bool) {
		t.Helper()
		all, err := ocilocal.Members(r, m.Digest())
		if err != nil {
			t.Fatal(err)
		}
		for i, absent := range []bool{false, false, want} {
			if !strings.HasSuffix(all[i], map[bool]string{false: "absent=false", true: "absent=true"}[absent]) {
				t.Errorf("member %d: %s", i, all[i])
			}
		}
		if got, want := contentRows(t, r)[gone], map[bool]string{true: "8 layer 0", false: "8 layer 1"}[want]; got != want {
			t.Errorf("row of the absent layer: %q, want %q", got, want)
		}
	}
	state(true)
	stats, err := r.Stats(ctx)
	if err != nil || stats.Total.Blobs != 2 || stats.Total.Manifests != 2 {
		t.Errorf("the absent layer counts: %+v, %v", stats.Total, err)
	}
	published(t, r, "example.com/b:v1", "not here", nil)
	state(false)
	if err := ocilocal.PublishAbsent(ctx, r, ref("example.com/a:v3"), m, "", gone); err != nil {
		t.Fatal(err)
	}
	state(false)
}

// TestSubjectRows: a subject that is not here has a row that says so, until it is published. When
// it is collected and its referrers stay, the row says again that it is not here. The row is
// deleted with the last referrer.
func TestSubjectRows(t *testing.T) {
	ctx := t.Context()
	other := openTemp(t, nil)
	parent := published(t, other, "example.com/a:parent", "layer of the parent", nil)
	d := parent.Digest()
	r := openTemp(t, nil)
	child := published(t, r, "example.com/a:child", "layer of the child", parent)
	state := func(when, want string) {
		t.Helper()
		if got := contentRows(t, r)[d]; !strings.HasSuffix(got, want) || (got == "") != (want == "") {
			t.Errorf("%s, the subject's row is %q, want %q", when, got, want)
		}
		if _, err := r.ResolveDigest(ctx, d); (err == nil) != (want == "manifest 1") {
			t.Errorf("%s, the subject resolves: %v", when, err)
		}
		problems, err := collectProblems(ctx, r)
		if err != nil || len(problems) > 0 {
			t.Errorf("%s: %v, %v", when, problems, err)
		}
	}
	state("before it is published", "-1 manifest 0")
	if got := published(t, r, "example.com/a:parent", "layer of the parent", nil); got.Digest() != d {
		t.Fatal("another manifest")
	}
	state("when it is here", "manifest 1")
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(d) }); err == nil {
		t.Error("a manifest with a ref was deleted")
	}
	if _, err := r.Remove(ctx, ref("example.com/a:parent")); err != nil {
		t.Fatal(err)
	}
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(d) }); err != nil {
		t.Fatal(err)
	}
	if got := contentRows(t, r)[d]; got != "-1 manifest 0" {
		t.Errorf("after its rows were deleted: %q", got)
	}
	if _, err := r.Remove(ctx, child.Reference()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	if all := contentRows(t, r); len(all) != 0 {
		t.Errorf("after its last referrer was collected: %v", all)
	}
}

// collectProblems returns what Verify finds.
func collectProblems(ctx context.Context, r *ocilocal.LocalRegistry) (all []ocilocal.Problem, err error) {
	for p, err := range r.Verify(ctx, nil) {
		if err != nil {
			return all, err
		}
		all = append(all, p)
	}
	return all, nil
}

// TestAbsentRowsGo: the row of an absent member is deleted with the last manifest that names it.
func TestAbsentRowsGo(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	published(t, r, "example.com/a:v1", "here", nil)
	one, _ := imageRows(t, "{}", "here", "absent")
	two, _ := imageRows(t, "{}", "absent", "another")
	absent, another := digest.FromString("absent"), digest.FromString("another")
	for i, m := range []*ocilocal.Manifest{one, two} {
		if err := ocilocal.PublishAbsent(ctx, r, ref("example.com/absent:v"+string(rune('1'+i))), m, "", absent, another); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range [][]bool{{true, true}, {true, false}, {false, false}} {
		rows := contentRows(t, r)
		if _, first := rows[absent]; first != want[0] {
			t.Errorf("after %d: row of absent: %v", i, first)
		}
		if _, second := rows[another]; second != want[1] {
			t.Errorf("after %d: row of another: %v", i, second)
		}
		m := []*ocilocal.Manifest{two, one, nil}[i]
		if m == nil {
			break
		}
		if _, err := r.Remove(ctx, ref("example.com/absent:v"+string(rune('2'-i)))); err != nil {
			t.Fatal(err)
		}
		if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(m.Digest()) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) error { return tx.Delete(digest.FromString("here")) }); err == nil {
		t.Error("a blob that a manifest needs was deleted")
	}
}

// TestTypes: if a call that has given a number to a type fails, no other call uses that number.
// Once it is committed, all calls do.
func TestTypes(t *testing.T) {
	r := openTemp(t, nil)
	ctx := t.Context()
	number := func(r *ocilocal.LocalRegistry, text string, fail error) (id int64) {
		t.Helper()
		err := ocilocal.IndexRows(ctx, r, func(tx ocilocal.IndexTx) (err error) {
			if id, err = tx.InternType(text); err != nil {
				return err
			}
			if again, err := tx.InternType(text); err != nil || again != id {
				t.Errorf("%s is %d, then %d, %v", text, id, again, err)
			}
			return fail
		})
		if !errors.Is(err, fail) {
			t.Fatal(err)
		}
		return id
	}
	undone := number(r, "text/undone", errors.New("undone"))
	other := mustOpen(t, r.Root())
	defer mustClose(t, other)
	if taken := number(other, "text/taken", nil); taken != undone {
		t.Fatalf("the number %d was not taken again, but %d", undone, taken)
	}
	if again := number(r, "text/undone", nil); again == undone {
		t.Error("a number that was never committed is used")
	}
	if a, b := number(r, "text/taken", nil), number(other, "text/taken", nil); a != b {
		t.Errorf("one type is %d and %d", a, b)
	}
}

// TestDigestBytes: the bytes of digests are in the order of their texts, and are turned back into
// the same texts.
func TestDigestBytes(t *testing.T) {
	var all []digest.Digest
	for _, s := range []string{"", "a", "b", "c"} {
		all = append(all, digest.SHA256.FromString(s), digest.SHA384.FromString(s), digest.SHA512.FromString(s))
	}
	slices.Sort(all)
	for i, d := range all {
		got, err := ocilocal.DigestFromBytes(ocilocal.DigestBytes(d))
		if err != nil || got != d {
			t.Errorf("%s gives %s, %v", d, got, err)
		}
		if i > 0 && string(ocilocal.DigestBytes(all[i-1])) >= string(ocilocal.DigestBytes(d)) {
			t.Errorf("%s and %s are in another order as bytes", all[i-1], d)
		}
	}
	for _, d := range []digest.Digest{"", "sha256:", "sha1:" + digest.Digest(strings.Repeat("0", 40)), "sha256:" + digest.Digest(strings.Repeat("A", 64))} {
		if b := ocilocal.DigestBytes(d); b == nil || len(b) > 0 {
			t.Errorf("%q has the bytes %x", d, b)
		}
	}
	whole := ocilocal.DigestBytes(all[0])
	for _, b := range [][]byte{nil, {}, {1}, whole[:32], append(slices.Clone(whole), 0), append([]byte{0}, whole[1:]...), append([]byte{2}, whole[1:]...), append([]byte{9}, whole[1:]...)} {
		if d, err := ocilocal.DigestFromBytes(b); !errors.Is(err, ocilocal.ErrCorruptIndex) {
			t.Errorf("%x is %s, %v", b, d, err)
		}
	}
}
