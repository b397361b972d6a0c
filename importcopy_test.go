package ocilocal_test

import (
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestImportRegistry copies an artifact with its referrers from one root into another, under its
// own name and under another one. An artifact with damaged or missing content is not copied.
func TestImportRegistry(t *testing.T) {
	src, dst := openTemp(t, nil), openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/model:v1")
	subject := pushed(t, src, ref, nil, nil, noise(1, 100), noise(2, 5<<20))
	signature := pushed(t, src, ocilocal.MustParseReference("example.com/model:sig"), nil, descOf(subject), noise(3, 100))
	got, err := dst.ImportRegistry(t.Context(), src, ref, nil)
	if err != nil || got.Artifacts[0].Update.Outcome != ocilocal.Inserted || got.BlobsWritten != 4 || mustResolve(t, dst, ref).Digest != subject.Digest() {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := dst.LoadDigest(t.Context(), signature.Digest()); err == nil {
		t.Error("a referrer came along unasked")
	}
	other := ocilocal.MustParseReference("example.com/other:v2")
	got, err = dst.ImportRegistry(t.Context(), src, ref, &ocilocal.ImportOptions{Reference: other, Referrers: true})
	if err != nil || len(got.Referrers) != 1 || mustResolve(t, dst, other).Digest != subject.Digest() {
		t.Errorf("%+v, %+v, %v", got.Referrers, mustResolve(t, dst, other), err)
	}
	if _, err := dst.LoadDigest(t.Context(), signature.Digest()); err != nil {
		t.Error(err)
	}
	if found := problems(t, dst, nil, nil); len(found) > 0 {
		t.Errorf("%q", found)
	}
	// Damaged and absent content is not copied.
	_, err = dst.ImportRegistry(t.Context(), src, ocilocal.MustParseReference("example.com/absent:v1"), nil)
	mustFail(t, err, ocilocal.ErrNotFound)
	rewriteReadOnly(t, blobFile(src, digest.FromBytes(noise(2, 5<<20))), flipBit)
	empty := openTemp(t, nil)
	_, err = empty.ImportRegistry(t.Context(), src, ref, nil)
	mustFail(t, err, ocilocal.ErrDigestMismatch)
	nothingIn(t, empty)
}

// TestImportReferrersKeepRef: if referrers are imported too, the ref points at the artifact and not
// at a referrer.
func TestImportReferrersKeepRef(t *testing.T) {
	src, dst := openTemp(t, nil), openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/model:v1")
	subject := pushed(t, src, ref, nil, nil, noise(1, 100))
	pushed(t, src, ocilocal.MustParseReference("example.com/model:sig"), nil, descOf(subject), noise(3, 100))
	dir := filepath.Join(t.TempDir(), "layout")
	if err := src.ExportLayout(t.Context(), dir, []ocilocal.Reference{ref}, &ocilocal.ExportOptions{Referrers: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := dst.ImportLayout(t.Context(), dir, &ocilocal.ImportOptions{Select: string(subject.Digest()), Referrers: true}); err != nil {
		t.Fatal(err)
	}
	if got := mustResolve(t, dst, ref).Digest; got != subject.Digest() {
		t.Errorf("the ref is at %s, want %s", got, subject.Digest())
	}
}

// TestImportRegistrySkipsReferrers: a referrer that is incomplete in the source is skipped, and the
// others are imported.
func TestImportRegistrySkipsReferrers(t *testing.T) {
	src, dst := openTemp(t, nil), openTemp(t, nil)
	ref := ocilocal.MustParseReference("example.com/model:v1")
	subject := pushed(t, src, ref, nil, nil, noise(1, 100))
	var all []*ocilocal.LocalArtifact
	for i := range 3 {
		all = append(all, pushed(t, src, ocilocal.MustParseReference(fmt.Sprint("example.com/model:sig", i)), nil, descOf(subject), noise(byte(10+i), 100)))
	}
	withoutFile(t, src, digest.FromBytes(noise(10, 100))) // the layer of the first
	withoutFile(t, src, all[1].Digest())
	got, err := dst.ImportRegistry(t.Context(), src, ref, &ocilocal.ImportOptions{Referrers: true})
	if err != nil || len(got.Referrers) != 1 || got.Referrers[0].Digest != all[2].Digest() || len(got.Skipped) != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	if found := problems(t, dst, nil, nil); len(found) > 0 {
		t.Errorf("%q", found)
	}
}

// TestImportAbsentMeanwhile imports an image index with an absent member. When the import has
// looked for the member in vain, a client brings it. It still may be absent.
func TestImportAbsentMeanwhile(t *testing.T) {
	t.Parallel()
	amd, arm := imageOf("amd"), imageOf("arm")
	index := imageIndexOf(desc(imageType, amd), desc(imageType, arm))
	mirror := func(t *testing.T) *servedMirror {
		m := newMirror(t, nil, nil)
		for _, layer := range []string{"amd", "arm"} {
			m.origin.pushImage("org/app", "", layer)
		}
		m.origin.want(201, "PUT", appManifests+"v1", index, "Content-Type", indexType)
		for _, path := range []string{appManifests + "v1", manifestAt(amd), blobAt("amd"), blobAt("{}")} {
			m.want(200, "GET", path, "")
		}
		return m
	}
	local := ocilocal.MustParseReference("localhost/org/app:v1")
	t.Run("from a registry", func(t *testing.T) {
		m, r := mirror(t), openTemp(t, nil)
		var looked atomic.Bool
		ocilocal.SetFault(m.r, func(op, name string) error {
			if op != "open" || !strings.HasSuffix(name, digestOfText(arm).Encoded()) || looked.Swap(true) {
				return nil
			}
			if a, err := m.try("GET", manifestAt(arm), nil); err != nil || a.status != 200 {
				t.Errorf("%d %s, %v", a.status, a.body, err)
			}
			return fs.ErrNotExist
		})
		if got, err := r.ImportRegistry(t.Context(), m.r, local, nil); err != nil || len(got.Absent) != 1 {
			t.Errorf("%+v, %v", got, err)
		}
		checkSound(t, r)
	})
	t.Run("by a pull", func(t *testing.T) {
		m := mirror(t)
		m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != manifestAt(arm) {
				return false
			}
			for _, text := range []string{"arm", "{}"} {
				to := "/v2/org/other/blobs/uploads/?digest=" + string(digestOfText(text))
				if a, err := m.try("POST", to, strings.NewReader(text)); err != nil || a.status != 201 {
					t.Errorf("%d %s, %v", a.status, a.body, err)
				}
			}
			if a, err := m.try("PUT", "/v2/org/other/manifests/v1", strings.NewReader(arm)); err != nil || a.status != 201 {
				t.Errorf("%d %s, %v", a.status, a.body, err)
			}
			w.WriteHeader(404)
			io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`)
			return true
		})
		from := ocilocal.MustParseReference(m.origin.host + "/org/app:v1")
		got, err := m.r.Pull(t.Context(), from, &ocilocal.PullOptions{As: local, Remote: m.opts.Upstream.Remote})
		if err != nil || len(got.Absent) != 1 {
			t.Errorf("%+v, %v", got, err)
		}
		checkSound(t, m.r)
	})
}
