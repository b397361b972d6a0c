package ocilocal_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestPullReferrersDeadEntry: a list of referrers names one that was deleted. The others are
// pulled.
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
	s.plant("org/model", string(signatures[0].Digest()), "", nil) // it is lost
	got, err := openRemote(t, nil).Pull(t.Context(), subject.Reference(), &ocilocal.PullOptions{Referrers: true})
	if err != nil || len(got.Referrers) != 1 || got.Referrers[0].Digest != signatures[1].Digest() {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestPullSharedLimit: MaxBytes counts for a whole pull, even if another call made the transfer.
func TestPullSharedLimit(t *testing.T) {
	s := newServer(t)
	large := noise(1, 2<<20)
	there := openRemote(t, nil)
	subject := pushed(t, there, s.ref("org/model:v1"), nil, nil, large)
	pushed(t, there, s.ref("org/model:sig"), nil, descOf(subject), noise(2, 1<<20))
	if _, err := there.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true}); err != nil {
		t.Fatal(err)
	}
	g := s.holdBack(large)
	r := openRemote(t, nil)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			_, err := r.Pull(t.Context(), subject.Reference(), &ocilocal.PullOptions{Referrers: true, MaxBytes: 5 << 19})
			if !errors.Is(err, ocilocal.ErrTooLarge) {
				t.Error(err)
			}
		})
		<-g.asked
	}
	close(g.open)
	wg.Wait()
	mustClose(t, r)
}
