package ocilocal_test

import (
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestOldUploads: an upload that had no byte for UploadAge makes place for another one. A
// collection removes it after Held, and not before.
func TestOldUploads(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	uploads := "/v2/org/app/blobs/uploads/"
	s := serveAt(t, r, &ocilocal.HandlerOptions{MaxUploads: 2})
	s.want(202, "POST", uploads, "")
	s.want(202, "POST", uploads, "")
	s.want(429, "POST", uploads, "")

	s = serveAt(t, r, &ocilocal.HandlerOptions{MaxUploads: 2, UploadAge: 1})
	at := s.want(202, "POST", uploads, "").header.Get("Location")
	collect(t, r, atOnce)
	s.want(204, "GET", at, "")
	if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace, Held: ocilocal.NoGrace}); err != nil {
		t.Fatal(err)
	}
	s.want(404, "GET", at, "")
}
