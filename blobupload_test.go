package ocilocal_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// TestOldUploadContinued: a client continues an old upload when a sweep has found it old and has not
// locked it yet. The upload stays, and can be finished.
func TestOldUploadContinued(t *testing.T) {
	t.Parallel()
	for what, sweep := range map[string]func(t *testing.T, r *ocilocal.LocalRegistry){
		"collection": func(t *testing.T, r *ocilocal.LocalRegistry) { collect(t, r, atOnce) },
		"too many": func(t *testing.T, r *ocilocal.LocalRegistry) {
			serveAt(t, r, &ocilocal.HandlerOptions{MaxUploads: 1}).want(429, "POST", "/v2/org/app/blobs/uploads/", "")
		},
	} {
		_, a, b := twoHandles(t)
		s := serveAt(t, a, nil)
		at := s.want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
		files, err := filepath.Glob(filepath.Join(a.Root(), "tmp/upload/*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%q, %v", files, err)
		}
		old := time.Now().Add(-48 * time.Hour)
		if err := os.Chtimes(files[0], old, old); err != nil {
			t.Fatal(err)
		}
		continued := false
		ocilocal.SetFault(b, func(op, name string) error {
			if op == "lock" && strings.HasPrefix(name, "tmp/upload/") && !continued {
				continued = true
				s.want(202, "PATCH", at, "some ")
			}
			return nil
		})
		sweep(t, b)
		ocilocal.SetFault(b, nil)
		if !continued {
			t.Errorf("%s: the sweep has not locked the upload", what)
		}
		s.want(201, "PUT", at+"?digest="+string(digestOfText("some bytes")), "bytes")
	}
}
