package ocilocal_test

import (
	"errors"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestPartialNoSpace fills the disk at each operation on the directories of interrupted pulls.
// Each such pull reports a full disk, and the next one succeeds.
func TestPartialNoSpace(t *testing.T) {
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 2<<20))
	for _, where := range []string{"mkdir tmp/partial", "mkdir tmp/partial/", "create tmp/partial/", "write tmp/partial/"} {
		for _, full := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
			r := openRemote(t, nil)
			hits := 0
			ocilocal.SetFault(r, func(op, name string) error {
				at := op + " " + name
				if at != where && (where[len(where)-1] != '/' || len(at) < len(where) || at[:len(where)] != where) {
					return nil
				}
				hits++
				return full
			})
			_, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil)
			if !errors.Is(err, ocilocal.ErrNoSpace) || !errors.Is(err, full) || hits == 0 {
				t.Errorf("%v at %s, hit %d times: %v", full, where, hits, err)
			}
			ocilocal.SetFault(r, nil)
			if _, err := r.Pull(t.Context(), s.ref("org/model:v1"), nil); err != nil {
				t.Errorf("after %v at %s: %v", full, where, err)
			}
		}
	}
}
