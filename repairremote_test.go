package ocilocal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// noRetry is a retry policy of one attempt.
func noRetry(int, error) (wait time.Duration, again bool) { return 0, false }

// TestRepairFromRemote: blobs that no source has are fetched from the registries in the refs.
func TestRepairFromRemote(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	remote := &ocilocal.Remote{Retry: noRetry}
	defer remote.CloseIdleConnections()
	large := strings.Repeat("large", 1<<19) // by way of a partial file
	setUp := func() (*ocilocal.LocalRegistry, *ocilocal.LocalArtifact) {
		r := openTemp(t, nil)
		a := titled(t, r, s.ref("team/app:v1").String(), "", "layer", "", "other", "", large)
		if _, err := r.Push(t.Context(), a.Reference(), &ocilocal.PushOptions{Remote: remote}); err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{"layer", large} {
			rewrite(t, blobFile(r, digest.FromString(text)), flipBit)
		}
		if err := errors.Join(os.Remove(blobFile(r, digest.FromString("other"))), os.Remove(blobFile(r, a.Digest()))); err != nil {
			t.Fatal(err)
		}
		return r, a
	}
	sound := func(r *ocilocal.LocalRegistry, a *ocilocal.LocalArtifact, report *ocilocal.RepairReport, err error) {
		t.Helper()
		want := []digest.Digest{a.Digest(), digest.FromString("layer"), digest.FromString("other"), digest.FromString(large)}
		slices.Sort(want)
		slices.Sort(report.Healed)
		if err != nil || !slices.Equal(report.Healed, want) || len(report.Left) > 0 || len(report.Quarantined) > 0 {
			t.Errorf("%+v, %v", report, err)
		}
		checkSound(t, r)
		checkNoTmp(t, r)
	}

	damagedToo, _ := setUp()
	// Only the registries of the refs are asked.
	s.forget()
	report, err := damagedToo.Repair(t.Context(), nil)
	if err != nil || len(report.Left) == 0 || len(s.requests("/v2/")) > 0 {
		t.Errorf("%+v, %v", report, err)
	}
	checkQuarantine(t, damagedToo)
	r, a := setUp()
	report, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Remote: remote})
	sound(r, a, report, err)

	// Recovered refs have no real host. The ref of a referrer leads to its subject's repository.
	r, a = setUp()
	child(t, r, s.ref("team/app:referrer").String(), ocilocal.BuilderOptions{}, descOf(a), nil, "of it")
	if _, err := r.Remove(t.Context(), a.Reference()); err != nil {
		t.Fatal(err)
	}
	report, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Remote: remote})
	sound(r, a, report, err)

	// The repositories that the caller names, and no other; the first doesn't have it.
	r, a = setUp()
	s.forget()
	report, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Remote: remote, From: []ocilocal.Reference{s.ref("none/app:v1"), s.ref("team/app:v9")}})
	sound(r, a, report, err)
	if n := len(s.requests("none/app")); n != 4 {
		t.Errorf("%d requests to the first", n)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Repair(cancelled, &ocilocal.RepairOptions{Remote: remote}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestRepairFromBadRemote asks registries that fail or send other bytes. They heal nothing. Repair
// finishes all other work and then returns their error.
func TestRepairFromBadRemote(t *testing.T) {
	s := newServer(t)
	remote := &ocilocal.Remote{Retry: noRetry}
	defer remote.CloseIdleConnections()
	r := openTemp(t, nil)
	a := titled(t, r, s.ref("team/app:v1").String(), "", "layer", "", "other", "", "third")
	if _, err := r.Push(t.Context(), a.Reference(), &ocilocal.PushOptions{Remote: remote}); err != nil {
		t.Fatal(err)
	}
	d := func(text string) digest.Digest { return digest.FromString(text) }
	for _, text := range []string{"layer", "other", "third"} {
		rewrite(t, blobFile(r, d(text)), flipBit)
	}
	s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, d("layer").String()):
			fmt.Fprint(w, "LAYER")
		case strings.HasSuffix(r.URL.Path, d("other").String()):
			w.WriteHeader(http.StatusInternalServerError)
		default:
			return false
		}
		return true
	})
	report, err := r.Repair(t.Context(), &ocilocal.RepairOptions{Remote: remote})
	if e, ok := errors.AsType[*ocilocal.RemoteError](err); !ok || e.URL == "" {
		t.Errorf("error %v", err)
	}
	if !slices.Equal(report.Healed, []digest.Digest{d("third")}) || len(report.Quarantined) != 2 || len(report.Left) != 2 {
		t.Errorf("%+v", report)
	}
	s.behave()
	report, err = r.Repair(t.Context(), &ocilocal.RepairOptions{Remote: remote})
	if err != nil || len(report.Healed) != 2 || len(report.Left) != 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if b, err := os.ReadFile(blobFile(r, d("layer"))); err != nil || !bytes.Equal(b, []byte("layer")) {
		t.Errorf("%q, %v", b, err)
	}
	checkSound(t, r)
	checkQuarantine(t, r)
}

// checkQuarantine empties the quarantine, and fails if it is empty already.
func checkQuarantine(t *testing.T, r *ocilocal.LocalRegistry) {
	t.Helper()
	dir := filepath.Join(r.Root(), "tmp", "quarantine")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("%d in quarantine, %v", len(entries), err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
}
