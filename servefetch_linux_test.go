package ocilocal_test

import (
	"path/filepath"
	"syscall"
	"testing"
)

// TestServeFetchNoSpace: on a full disk a mirror serves what it has, and answers 507 for the rest. Once
// there is space, it fetches again.
func TestServeFetchNoSpace(t *testing.T) {
	mnt := mountTmpfs(t, "size=3m")
	r := mustOpen(t, filepath.Join(mnt, "root"))
	defer r.Close()
	m := newMirror(t, nil, nil)
	large := aLargeBlob(41)
	m.origin.pushImage("org/app", "v1", "here", "not here", large)
	m.origin.pushImage("org/app", "v2", "other")
	s := serveAt(t, r, m.opts)
	s.want(200, "GET", appManifests+"v1", "")
	s.want(200, "GET", blobAt("here"), "")
	for _, part := range []string{"", "bytes=1-"} { // the answer has begun when the disk is full
		if a, err := s.try("GET", blobAt(large), nil, "Range", part); err == nil && a.status != 507 || len(a.body) >= len(large)-1 {
			t.Errorf("%q: %d, %d bytes, %v", part, a.status, len(a.body), err)
		}
	}
	s.want(507, "GET", blobAt("not here"), "")
	s.want(507, "GET", appManifests+"v2", "")
	s.want(200, "GET", appManifests+"v1", "")
	s.want(200, "GET", blobAt("here"), "")

	if err := syscall.Mount("tmpfs", mnt, "tmpfs", syscall.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"not here", large} {
		if a := s.want(200, "GET", blobAt(text), ""); a.body != text {
			t.Errorf("%d bytes", len(a.body))
		}
	}
	collect(t, r, atOnce)
	checkSound(t, r)
}
