package ocilocal_test

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// problems runs Verify and returns "kind digest" for each problem, with the name of a digest if it
// has one.
func problems(t testing.TB, r *ocilocal.LocalRegistry, opts *ocilocal.VerifyOptions, names map[digest.Digest]string) (found []string) {
	t.Helper()
	for p, err := range r.Verify(t.Context(), opts) {
		if err != nil {
			t.Fatal(err)
		}
		if p.Err == nil || p.String() == "" {
			t.Errorf("%+v has no cause", p)
		}
		about := names[p.Digest]
		if p.Path != "" {
			about = p.Path
		}
		found = append(found, strings.TrimSpace(string(p.Kind)+" "+about))
	}
	return found
}

func write(t testing.TB, name, content string) {
	t.Helper()
	os.Chmod(name, 0o644)
	if err := errors.Join(os.WriteFile(name, []byte(content), 0o444), os.Chmod(name, 0o444)); err != nil {
		t.Fatal(err)
	}
}

// TestVerifyHoldsNoConnection: the bodies of loops over problems may use the registry, even if
// there are as many loops at once as connections.
func TestVerifyHoldsNoConnection(t *testing.T) {
	r := openTemp(t, nil)
	dontWatch(r.Root())
	published(t, r, "example.com/a:v1", "layer", nil)
	execIndex(t, r.Root(), "UPDATE refs SET media_type = artifact_type")
	var inside, done sync.WaitGroup
	n := max(2, runtime.NumCPU())
	inside.Add(n)
	for range n {
		done.Go(func() {
			for range r.Verify(t.Context(), nil) {
				inside.Done()
				inside.Wait()
				if ok, err := r.Exists(t.Context(), ref("example.com/a:v1")); !ok || err != nil {
					t.Error(ok, err)
				}
				return
			}
			t.Error("nothing found")
			inside.Done()
		})
	}
	done.Wait()
}

// TestVerifyBusy: if the index is busy, Verify returns that error and reports no blob as damaged.
func TestVerifyBusy(t *testing.T) {
	ctx := t.Context()
	r := openTemp(t, &ocilocal.Options{BusyTimeout: time.Millisecond})
	dontWatch(r.Root())
	a := published(t, r, "example.com/a:v1", "layer", nil)
	other := openAgain(t, r)
	defer mustClose(t, other)
	for what, damage := range map[string]func(){
		"rows": func() { execIndex(t, r.Root(), "UPDATE members SET annotations = 'x'") },
		"file": func() { os.Remove(blobFile(r, a.Digest())) },
	} {
		damage()
		err := ocilocal.IndexWrite(ctx, other, func(func(string) error) error {
			n, end := 0, error(nil)
			for _, end = range r.Verify(ctx, nil) {
				n++
			}
			if n != 1 || !errors.Is(end, ocilocal.ErrBusy) {
				t.Errorf("%s: yielded %d times, ended with %v", what, n, end)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		if got := problems(t, r, nil, nil); len(got) != 1 {
			t.Errorf("%s: found %q", what, got)
		}
	}
}
