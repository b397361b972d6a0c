package ocilocal_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestPullIndex pulls an image index whole, and one of its manifests by platform. A variant that
// image-spec takes for granted may be missing on either side.
func TestPullIndex(t *testing.T) {
	s := newServer(t)
	amd, arm := s.put(t, "org/multi", "", noise(1, 10)), s.put(t, "org/multi", "", noise(2, 10))
	index := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[
		{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"platform":{"os":"linux","architecture":"amd64"}},
		{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"platform":{"os":"linux","architecture":"arm64","variant":"v8"}}]}`,
		amd, len(s.at("org/multi", string(amd)).body), arm, len(s.at("org/multi", string(arm)).body))
	whole := s.putRaw("org/multi", "v1", ocispec.MediaTypeImageIndex, []byte(index))

	r := openRemote(t, nil)
	got, err := r.Pull(t.Context(), s.ref("org/multi:v1"), nil)
	if err != nil || got.Artifact.Digest() != whole || got.BlobsWritten != 6 {
		t.Errorf("%+v, %v", got, err)
	}
	r = openRemote(t, nil)
	o := &ocilocal.PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}}
	if got, err = r.Pull(t.Context(), s.ref("org/multi:v1"), o); err != nil || got.Artifact.Digest() != arm || got.BlobsWritten != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	// arm64 means v8, and amd64 means v1.
	for _, want := range []ocispec.Platform{
		{OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "amd64", Variant: "v1"}, {OS: "linux", Architecture: "amd64"},
	} {
		r := openRemote(t, nil)
		got, err := r.Pull(t.Context(), s.ref("org/multi:v1"), &ocilocal.PullOptions{Platform: &want})
		if digest := map[string]digest.Digest{"arm64": arm, "amd64": amd}[want.Architecture]; err != nil || got.Artifact.Digest() != digest {
			t.Errorf("%+v: %+v, %v", want, got, err)
		}
	}
	_, err = r.Pull(t.Context(), s.ref("org/multi:v1"), &ocilocal.PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v9"}})
	mustFail(t, err, ocilocal.ErrNotFound)
	o.Platform.Architecture = "s390x"
	if _, err = r.Pull(t.Context(), s.ref("org/multi:v1"), o); !errors.Is(err, ocilocal.ErrNotFound) {
		t.Error(err)
	}
	o.Platform.Architecture = "amd64"
	pinned, err := s.ref("org/multi:v1").WithDigest(whole)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = r.Pull(t.Context(), pinned, o); !errors.Is(err, ocilocal.ErrInvalidArgument) {
		t.Error(err)
	}
	o.As = ocilocal.MustParseReference("example.com/amd:v1")
	if got, err = r.Pull(t.Context(), pinned, o); err != nil || got.Artifact.Digest() != amd || got.Artifact.Reference() != o.As {
		t.Errorf("%+v, %v", got, err)
	}
}
