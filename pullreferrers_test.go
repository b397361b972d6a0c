package ocilocal_test

import (
	"testing"

	"github.com/ocilocal/ocilocal"
)

// A list of referrers names one that was deleted. The others come along.
func TestPullReferrersDeadEntry(t *testing.T) {
	s := newServer(t)
	s.noReferrers = true
	r := openRemote(t, nil)
	subject, signatures := withSignatures(t, r, s, 2)
	for _, a := range append(signatures, subject) {
		if _, err := r.Push(t.Context(), a.Reference(), nil); err != nil {
			t.Fatal(err)
		}
	}
	delete(s.manifests["org/model"], string(signatures[0].Digest()))
	got, err := openRemote(t, nil).Pull(t.Context(), subject.Reference(), &ocilocal.PullOptions{Referrers: true})
	if err != nil || len(got.Referrers) != 1 || got.Referrers[0].Digest != signatures[1].Digest() {
		t.Errorf("%+v, %v", got, err)
	}
}
