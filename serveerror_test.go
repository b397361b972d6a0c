package ocilocal_test

import (
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestServeErrors puts manifests that the handler must refuse. Each fault has its status and its
// code of the distribution specification.
func TestServeErrors(t *testing.T) {
	t.Parallel()
	s := serveAt(t, openTemp(t, nil), nil)
	raw := imageOf("layer")
	for name, test := range map[string]struct {
		reference, body, mediaType string
		status                     int
		code                       string
	}{
		"digest":    {string(digestOfText("x")), raw, "", 400, "DIGEST_INVALID"},
		"malformed": {"v1", "{", "", 400, "MANIFEST_INVALID"},
		"type":      {"v1", raw, ocispec.MediaTypeImageIndex, 400, "MANIFEST_INVALID"},
		"unknown":   {"v1", raw, "text/plain", 400, "MANIFEST_INVALID"},
		"header":    {"v1", raw, "a b c", 400, "MANIFEST_INVALID"},
		"size":      {"v1", raw + strings.Repeat(" ", ocilocal.MaxManifestSize), "", 413, "SIZE_INVALID"},
		"tag":       {"-v1", raw, "", 404, "MANIFEST_UNKNOWN"},
		"algorithm": {"md5:00", raw, "", 400, "DIGEST_INVALID"},
	} {
		if a := s.want(test.status, "PUT", "/v2/org/app/manifests/"+test.reference, test.body, "Content-Type", test.mediaType); a.code() != test.code {
			t.Errorf("%s: %s", name, a.body)
		}
	}
}
