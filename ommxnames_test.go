package ocilocal_test

import (
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestThrowawayReference: the name is on ttl.sh, never the same twice, and its tag is a time.
func TestThrowawayReference(t *testing.T) {
	a, b := ocilocal.ThrowawayReference(), ocilocal.ThrowawayReference()
	if a == b || a.Registry() != "ttl.sh" || a.Tag() != "1h" || len(a.Repository()) < 20 {
		t.Errorf("%s, %s", a, b)
	}
}
