package ocilocal_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestPushArtifactManifestRefused: if a registry refuses artifact manifests, the error says what to
// do. Other refusals keep their meaning.
func TestPushArtifactManifestRefused(t *testing.T) {
	s := newServer(t)
	s.noArtifacts = true
	r := openRemote(t, nil)
	ref := s.ref("org/model:v1")
	pushed(t, r, ref, &ocilocal.BuilderOptions{Format: ocilocal.FormatArtifactManifest}, nil, noise(1, 10))
	_, err := r.Push(t.Context(), ref, nil)
	if e, ok := errors.AsType[*ocilocal.RemoteError](err); !errors.Is(err, ocilocal.ErrUnsupportedManifest) || !ok || e.Status != 400 ||
		!strings.Contains(err.Error(), "FormatImageManifest") || !strings.Contains(err.Error(), "Convert") {
		t.Error(err)
	}
	// A registry that accepts them may lack a blob, which is another error.
	for _, code := range []int{400, 404} {
		s.overrideBy(func(w http.ResponseWriter, q *http.Request) bool {
			if q.Method == "PUT" && strings.Contains(q.URL.Path, "/manifests/") {
				fail(w, code, "MANIFEST_BLOB_UNKNOWN")
				return true
			}
			return false
		})
		if _, err := r.Push(t.Context(), ref, nil); errors.Is(err, ocilocal.ErrUnsupportedManifest) || !errors.Is(err, ocilocal.ErrNotFound) {
			t.Errorf("%d: %v", code, err)
		}
	}
}
