package ocilocal_test

import (
	"bytes"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestUnreadPages: no call reads all rows of a kind to answer a question about one of them. 6,000
// manifests need the blob "{}", 5,700 of them have a tag in one repository, all refer to one manifest, and
// that manifest has 6,000 tags in another repository. The pages of the index with most of these rows are destroyed, so a call
// that reads one of them fails.
func TestUnreadPages(t *testing.T) {
	const n, first = 6000, 300
	r := openTemp(t, nil)
	one := pushImage(t, repository(t, r, "localhost/tags"), "t000000", "a layer")
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		`INSERT INTO content (digest, size, kind, created) SELECT unhex('01' || printf('%064x', i)), 300, 3, 1 FROM n`,
		`INSERT INTO manifests (id, digest, media_type, artifact_type, subject, annotations, created)
			SELECT c.id, c.digest, m.media_type, m.artifact_type, m.id, m.annotations, 1 FROM n, content c, manifests m WHERE c.digest = unhex('01' || printf('%064x', i)) AND m.digest = ?1`,
		`INSERT INTO members SELECT c.id, 0, m.role, m.content, m.media_type, m.size, m.annotations FROM n, content c, members m
			WHERE c.digest = unhex('01' || printf('%064x', i)) AND m.manifest = (SELECT id FROM content WHERE digest = ?1) AND m.position = 0`,
		`INSERT INTO refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved)
			SELECT iif(i <= ` + fmt.Sprint(first) + `, 'localhost/first', 'localhost/many'), printf('t%06d', i), m.id, m.digest, 300, m.media_type, m.artifact_type, 1, 1
			FROM n, manifests m WHERE m.digest = unhex('01' || printf('%064x', i))`,
		`INSERT INTO refs (name, reference, manifest, digest, size, media_type, artifact_type, created, moved)
			SELECT 'localhost/tags', printf('t%06d', i), manifest, digest, size, media_type, artifact_type, 1, 1 FROM n, refs WHERE name = 'localhost/tags'`,
	} {
		execIndex(t, r.Root(), `WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < `+fmt.Sprint(n)+`) `+strings.ReplaceAll(text, "?1", sqlDigest(one.Digest)))
	}
	r = openAgain(t, r)
	last := pushImage(t, repository(t, r, "localhost/zlast"), "v1", "another layer")
	b, err := r.NewReferrerBuilder(one, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.rare"})
	if err != nil {
		t.Fatal(err)
	}
	referrer, err := b.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	destroyPages(t, r.Root(), "refs", "localhost/many")
	destroyPages(t, r.Root(), "refs", "localhost/tags")
	destroyPages(t, r.Root(), "refs_by_manifest", "localhost/many")
	destroyPages(t, r.Root(), "refs_by_manifest", "localhost/tags")
	destroyPages(t, r.Root(), "members_by_content", "")
	destroyPages(t, r.Root(), "manifests_by_subject", "")
	destroyPages(t, r.Root(), "manifests_by_type", "")

	r = openAgain(t, r)
	defer r.Close()
	empty, layer := blobOf("{}"), blobOf("a layer").Digest
	for name, want := range map[string]bool{"localhost/first": true, "localhost/many": true, "localhost/tags": true, "localhost/zlast": true, "localhost/none": false} {
		if ok, err := repository(t, r, name).Exists(t.Context(), empty); ok != want || err != nil {
			t.Errorf("%s shows {}: %v, %v", name, ok, err)
		}
	}
	names := []string{}
	for name, err := range r.Repositories(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	if !slices.Equal(names, []string{"localhost/first", "localhost/many", "localhost/tags", "localhost/zlast"}) {
		t.Errorf("repositories are %s", names)
	}
	for artifactType, want := range map[string][]digest.Digest{"application/vnd.example.rare": {referrer.Digest()}, "application/vnd.example.none": nil} {
		var found []digest.Digest
		for d, err := range r.Referrers(t.Context(), one.Digest, &ocilocal.ReferrersOptions{ArtifactType: artifactType}) {
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, d.Digest)
		}
		if !slices.Equal(found, want) {
			t.Errorf("referrers of type %s are %s", artifactType, found)
		}
	}
	usage, err := r.RefUsage(t.Context(), ref("localhost/zlast:v1"))
	if err != nil || usage.Own.Blobs+usage.Shared.Blobs != 2 {
		t.Errorf("usage: %+v, %v", usage, err)
	}
	for d, want := range map[digest.Digest]string{layer: "", empty.Digest: "localhost/first"} {
		if name, err := ocilocal.OtherName(r, d, "localhost/", "localhost/tags"); name != want || err != nil {
			t.Errorf("other name for %s: %q, %v", d, name, err)
		}
	}
	for host, want := range map[string]bool{"localhost": true, "other.example": false} {
		if ok, err := ocilocal.OwnedBy(t.Context(), r, host, layer); ok != want || err != nil {
			t.Errorf("%s owns the layer: %v, %v", host, ok, err)
		}
	}
	if sizes, err := ocilocal.StatedSizes(r, empty.Digest); !slices.Equal(sizes, []int64{2}) || err != nil {
		t.Errorf("stated sizes of {}: %v, %v", sizes, err)
	}
	if _, err := r.Tag(t.Context(), one.Digest, ref("localhost/zz:v1"), nil); err != nil {
		t.Error(err)
	}
	if err := repository(t, r, "localhost/zlast").DeleteManifest(t.Context(), last.Digest); err != nil {
		t.Error(err)
	}
}

// destroyPages overwrites pages of a table or index of a closed registry, except those with nodes
// and the first and last few. With a name, it overwrites only leaves inside the run of those that
// have only this name.
func destroyPages(t *testing.T, root, table, name string) {
	t.Helper()
	path := filepath.Join(root, "index.sqlite3")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	var pages []int64
	rows, err := db.Query(`SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY path`, table)
	for err == nil && rows.Next() {
		pages = append(pages, 0)
		err = rows.Scan(&pages[len(pages)-1])
	}
	if err == nil {
		err = rows.Err()
	}
	if closed := db.Close(); err != nil || closed != nil {
		t.Fatal(err, closed)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 4096
	if name != "" {
		pages = slices.DeleteFunc(pages, func(n int64) bool {
			page := make([]byte, size)
			if _, err := f.ReadAt(page, (n-1)*size); err != nil {
				t.Fatal(err)
			}
			return bytes.Count(page, []byte("localhost/")) != bytes.Count(page, []byte(name))
		})
	}
	const keep = 4
	if len(pages) < 3*keep {
		t.Fatalf("%s %s has only %d pages", table, name, len(pages))
	}
	for _, n := range pages[keep : len(pages)-keep] {
		if _, err := f.WriteAt(make([]byte, size), (n-1)*size); err != nil {
			t.Fatal(err)
		}
	}
}
