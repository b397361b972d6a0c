package ocilocal_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestServeManifests puts, reads and deletes manifests and tags. A blob can be deleted only when no
// manifest needs it any more.
func TestServeManifests(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	raw := imageOf("layer")
	d := string(digestOfText(raw))
	if a := s.want(400, "PUT", "/v2/org/app/manifests/v1", raw); a.code() != "MANIFEST_BLOB_UNKNOWN" {
		t.Error(a)
	}
	s.pushImage("org/app", "v1", "layer")
	s.pushImage("org/app", "", "layer")
	for _, reference := range []string{"v1", d} {
		for _, method := range []string{"GET", "HEAD"} {
			a := s.want(200, method, "/v2/org/app/manifests/"+reference, "")
			if a.header.Get("Docker-Content-Digest") != d || a.header.Get("Content-Type") != ocispec.MediaTypeImageManifest ||
				a.header.Get("Content-Length") != fmt.Sprint(len(raw)) || method == "GET" && a.body != raw {
				t.Errorf("%s %s: %v", method, reference, a)
			}
		}
		s.want(304, "GET", "/v2/org/app/manifests/"+reference, "", "If-None-Match", `"`+d+`"`)
	}
	// A tag moves. The manifest that it pointed at stays.
	other := string(s.pushImage("org/app", "v1", "other"))
	if a := s.want(200, "HEAD", "/v2/org/app/manifests/v1", ""); a.header.Get("Docker-Content-Digest") != other {
		t.Error(a)
	}
	s.want(202, "DELETE", "/v2/org/app/manifests/v1", "")
	s.want(404, "DELETE", "/v2/org/app/manifests/v1", "")
	s.want(200, "GET", "/v2/org/app/manifests/"+other, "")
	if a := s.want(200, "GET", "/v2/org/app/tags/list", ""); !strings.Contains(a.body, `"tags":[]`) {
		t.Error(a.body)
	}
	s.want(202, "DELETE", "/v2/org/app/manifests/"+other, "")
	s.want(404, "GET", "/v2/org/app/manifests/"+other, "")
	layer := "/v2/org/app/blobs/" + string(digestOfText("layer"))
	s.want(409, "DELETE", layer, "")
	s.want(202, "DELETE", "/v2/org/app/manifests/"+d, "")
	s.want(202, "DELETE", layer, "")
	s.want(404, "GET", layer, "")
}

// TestServeManifestTypes puts and gets each form of manifest, by a tag and by digests of each
// algorithm. Bytes and media type stay, whatever the client accepts. A form that few clients read
// gets a warning.
func TestServeManifestTypes(t *testing.T) {
	t.Parallel()
	s := serveAt(t, openTemp(t, nil), nil)
	image := imageOf("layer")
	s.pushImage("org/app", "v1", "layer")
	docker := strings.Replace(image, imageType, ocilocal.MediaTypeDockerManifest, 1)
	s.want(201, "PUT", "/v2/org/app/manifests/docker", docker, "Content-Type", ocilocal.MediaTypeDockerManifest)
	artifact := `{"mediaType":"` + ocilocal.MediaTypeArtifactManifest + `","artifactType":"application/vnd.example","blobs":[` + desc("text/plain", "layer") + `]}`
	list := strings.Replace(imageIndexOf(desc(ocilocal.MediaTypeDockerManifest, docker)), indexType, ocilocal.MediaTypeDockerManifestList, 1)
	for mediaType, raw := range map[string]string{
		imageType:                            image,
		indexType:                            imageIndexOf(desc(imageType, image)),
		ocilocal.MediaTypeDockerManifest:     docker,
		ocilocal.MediaTypeDockerManifestList: list,
		ocilocal.MediaTypeArtifactManifest:   artifact,
	} {
		references := []string{"v2"}
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			references = append(references, string(alg.FromString(raw)))
		}
		for _, reference := range references {
			path := "/v2/org/app/manifests/" + reference
			a := s.want(201, "PUT", path, raw, "Content-Type", mediaType)
			if warned := a.header.Get("Warning") != ""; warned != (mediaType == ocilocal.MediaTypeArtifactManifest) {
				t.Errorf("%s: %v", mediaType, a.header)
			}
			want := reference
			if reference == "v2" {
				want = string(digestOfText(raw))
			}
			a = s.want(200, "GET", path, "", "Accept", "text/plain")
			if a.body != raw || a.header.Get("Content-Type") != mediaType || a.header.Get("Docker-Content-Digest") != want {
				t.Errorf("%s %s: %v", mediaType, reference, a)
			}
		}
	}
}

// TestServePreconditions: If-Match and If-None-Match make a put or deletion of a tag a
// compare-and-swap. A change that fails leaves everything as it was.
func TestServePreconditions(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	one, two := string(s.pushImage("org/app", "", "one")), string(s.pushImage("org/app", "", "two"))
	const tag = "/v2/org/app/manifests/v1"
	for i, step := range []struct {
		status       int
		method, body string
		field, value string
		tag          string // the digest at which the tag points then, "" for none
	}{
		{412, "PUT", "one", "If-Match", "*", ""},
		{412, "PUT", "one", "If-Match", `"` + one + `"`, ""},
		{404, "DELETE", "", "If-Match", "*", ""}, // as without it
		{201, "PUT", "one", "If-None-Match", "*", one},
		{412, "PUT", "one", "If-None-Match", "*", one},
		{412, "PUT", "two", "If-None-Match", "*", one},
		{412, "PUT", "two", "If-None-Match", `"x", W/"` + one + `"`, one},
		{412, "PUT", "two", "If-Match", `"` + two + `"`, one},
		{412, "PUT", "two", "If-Match", `W/"` + one + `"`, one},
		{201, "PUT", "two", "If-Match", `"x", "` + one + `"`, two},
		{201, "PUT", "one", "If-Match", "*", one},
		{201, "PUT", "two", "If-None-Match", `"` + two + `"`, two},
		{412, "DELETE", "", "If-Match", `"` + one + `"`, two},
		{412, "DELETE", "", "If-None-Match", "*", two},
		{202, "DELETE", "", "If-Match", `"` + two + `"`, ""},
	} {
		body := step.body
		if body != "" {
			body = imageOf(body)
		}
		if a := s.do(step.method, tag, body, step.field, step.value); a.status != step.status || step.status == 412 && a.code() != "DENIED" {
			t.Errorf("%d: %s with %s: %s: %d %s", i, step.method, step.field, step.value, a.status, a.body)
		}
		if got := s.do("HEAD", tag, "").header.Get("Docker-Content-Digest"); got != step.tag {
			t.Errorf("%d: the tag points at %q, want %q", i, got, step.tag)
		}
	}
	// By digest.
	s.want(412, "PUT", "/v2/org/app/manifests/"+one, imageOf("one"), "If-None-Match", "*")
	s.want(412, "DELETE", "/v2/org/app/manifests/"+one, "", "If-Match", `"`+two+`"`)
	s.want(202, "DELETE", "/v2/org/app/manifests/"+one, "", "If-Match", `"`+one+`"`)
	s.want(412, "PUT", "/v2/org/app/manifests/"+one, imageOf("one"), "If-Match", "*")
	s.want(201, "PUT", "/v2/org/app/manifests/"+one, imageOf("one"), "If-None-Match", "*")
}

const indexType = ocispec.MediaTypeImageIndex

// TestServePutSparse puts manifests of which a part is recorded as absent. Bytes that the repository
// has may get another tag, as crane tag does it. A new image index may not name an absent member.
func TestServePutSparse(t *testing.T) {
	t.Parallel()
	for name, l := range lackingLayouts() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, _, err := importBoth(t, nil, l.entries()...)
			if err != nil {
				t.Fatal(err)
			}
			s := serveAt(t, r, &ocilocal.HandlerOptions{Host: "example.com"})
			put := func(status int, repository, reference, raw string) received {
				t.Helper()
				return s.want(status, "PUT", "/v2/"+repository+"/manifests/"+reference, raw)
			}
			put(201, "a", "v2", l.top)
			put(201, "a", string(digestOfText(l.top)), l.top)
			if a := s.want(200, "GET", "/v2/a/manifests/v2", ""); a.body != l.top {
				t.Error(a.body)
			}
			checkSound(t, r)
			put(400, "other", "v1", l.top)
			if l.mediaType() == indexType {
				renewed := imageIndexOf(fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":300}`, imageType, l.absent))
				a := put(400, "a", "v3", renewed)
				if a.code() != "MANIFEST_BLOB_UNKNOWN" || !strings.Contains(a.body, string(l.absent)) || strings.Contains(a.body, "example.com") {
					t.Error(a.body)
				}
			}
			s.want(404, "GET", "/v2/other/manifests/v1", "")
			s.want(404, "GET", "/v2/a/manifests/v3", "")
			checkSound(t, r)
		})
	}
}

// TestServeLostManifest: the file of a manifest is lost. That is not a 404, by which clients would take
// it for deleted. A mirror fetches it again.
func TestServeLostManifest(t *testing.T) {
	t.Parallel()
	lose := func(r *ocilocal.LocalRegistry, raw string) {
		t.Helper()
		if err := os.Remove(blobFile(r, digestOfText(raw))); err != nil {
			t.Fatal(err)
		}
	}
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	s.pushImage("org/app", "v1", "one")
	raw := imageOf("one")
	lose(r, raw)
	for _, path := range []string{appManifests + "v1", manifestAt(raw)} {
		if a := s.want(500, "GET", path, ""); !strings.Contains(a.body, "damaged") {
			t.Error(a.body)
		}
	}
	s.pushImage("org/app", "v1", "one")
	s.want(200, "GET", appManifests+"v1", "")
	checkSound(t, r)

	m := newMirrorOf(t, "one")
	for _, path := range []string{appManifests + "v1", manifestAt(raw)} {
		lose(m.r, raw)
		if a := m.want(200, "GET", path, ""); a.body != raw {
			t.Error(a.body)
		}
		checkSound(t, m.r)
	}
	lose(m.r, raw)
	m.down()
	m.want(502, "GET", appManifests+"v1", "")
}
