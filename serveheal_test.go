package ocilocal_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// servedDamages are ways to damage the file of a blob that has a text.
var servedDamages = map[string]func(file, text string) error{
	"changed": func(file, text string) error { return os.WriteFile(file, []byte(text[1:]+"~"), 0o600) },
	"short":   func(file, text string) error { return os.WriteFile(file, []byte(text[1:]), 0o600) },
	"long":    func(file, text string) error { return os.WriteFile(file, []byte(text+"y"), 0o600) },
	"empty":   func(file, _ string) error { return os.WriteFile(file, nil, 0o600) },
	"link":    func(file, _ string) error { return os.Symlink("../../id", file) },
}

// damageServed puts something else at the place of a blob.
func damageServed(t *testing.T, r *ocilocal.LocalRegistry, kind, text string) {
	t.Helper()
	file := blobFile(r, digestOfText(text))
	if err := errors.Join(os.Remove(file), servedDamages[kind](file, text)); err != nil {
		t.Fatal(err)
	}
}

// TestServeHeal: a mirror fetches damaged content again when a client asks for it. The client gets
// the right bytes at once, except of a large blob that is verified while it is sent.
func TestServeHeal(t *testing.T) {
	t.Parallel()
	texts := map[string]string{
		"tiny":   "one",
		"small":  string(noise(1, 100<<10)),
		"medium": string(noise(2, 600<<10)),
		"large":  string(noise(3, 2<<20)),
	}
	m := newMirrorOf(t, texts["tiny"], texts["small"], texts["medium"], texts["large"])
	manifest := imageOf(texts["tiny"], texts["small"], texts["medium"], texts["large"])
	for kind := range servedDamages {
		for name, text := range texts {
			path := blobAt(text)
			m.want(200, "GET", path, "")
			damageServed(t, m.r, kind, text)
			m.want(200, "HEAD", path, "")
			if a := m.want(206, "GET", path, "", "Range", "bytes=1-2"); a.body != text[1:3] {
				t.Errorf("%s, %s: range of %d bytes", name, kind, len(a.body))
			}
			damageServed(t, m.r, kind, text)
			brokenOff := len(text) > 256<<10 // and the client may have repeated the request
			if a, err := m.try("GET", path, nil); (!brokenOff || err == nil) && (err != nil || a.status != 200 || a.body != text) {
				t.Errorf("%s, %s: %d, %d bytes, %v", name, kind, a.status, len(a.body), err)
			}
			m.requests("")
			if a := m.want(200, "GET", path, ""); a.body != text {
				t.Errorf("%s, %s: %d bytes", name, kind, len(a.body))
			}
			m.wantRequests()
		}
		for _, path := range []string{appManifests + "v1", manifestAt(manifest)} {
			damageServed(t, m.r, kind, manifest)
			m.want(200, "HEAD", path, "")
			if a := m.want(200, "GET", path, ""); a.body != manifest {
				t.Errorf("manifest, %s: %s", kind, a.body)
			}
		}
	}
	checkSound(t, m.r)
}

// TestServeHealFails: if the upstream does not have the damaged content, the answer is 500. If it
// fails or lies, the answer is 502. The damaged bytes stay as they are.
func TestServeHealFails(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one")
	m.want(200, "GET", blobAt("one"), "")
	paths := map[string]string{"one": blobAt("one"), imageOf("one"): manifestAt(imageOf("one"))}
	for text := range paths {
		damageServed(t, m.r, "changed", text)
	}
	answers := func(status int, hook func(http.ResponseWriter)) {
		t.Helper()
		m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			hook(w)
			return true
		})
		for text, path := range paths {
			m.want(status, "GET", path, "")
			m.want(status, "GET", path, "", "If-None-Match", `"other"`)
			b, err := os.ReadFile(blobFile(m.r, digestOfText(text)))
			if err != nil || string(b) != text[1:]+"~" {
				t.Errorf("%s: %v", b, err)
			}
		}
		m.want(status, "GET", blobAt("one"), "", "Range", "bytes=1-1")
	}
	answers(502, func(w http.ResponseWriter) { w.WriteHeader(503) })
	answers(502, func(w http.ResponseWriter) { w.WriteHeader(401) })
	answers(502, func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", imageType)
		w.Write([]byte("eno"))
	})
	answers(500, func(w http.ResponseWriter) {
		w.WriteHeader(404)
		fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`)
	})
	m.intercept(nil)
	for text, path := range paths {
		if a := m.want(200, "GET", path, ""); a.body != text {
			t.Error(a.body)
		}
	}
	checkSound(t, m.r)
}

// TestServeHealNever: only a mirror that can write heals, and only content of the repository. A
// directory at the place of a blob stays.
func TestServeHealNever(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one", "two")
	m.want(200, "GET", blobAt("one"), "")
	m.want(200, "GET", blobAt("two"), "")
	damageServed(t, m.r, "changed", "one")
	ro, err := ocilocal.OpenReadOnly(t.Context(), m.r.Root(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, ro)
	m.requests("")
	serveAt(t, ro, m.opts).want(500, "GET", blobAt("one"), "")
	m.want(404, "GET", "/v2/org/other/blobs/"+string(digestOfText("one")), "")
	m.wantRequests()
	opts := *m.opts
	opts.ReadOnly = true
	serveAt(t, m.r, &opts).want(200, "GET", blobAt("one"), "")

	dir := blobFile(m.r, digestOfText("two"))
	kept := filepath.Join(dir, "kept")
	if err := errors.Join(os.Remove(dir), os.Mkdir(dir, 0o700), os.WriteFile(kept, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	m.want(500, "GET", blobAt("two"), "")
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", blobAt("two"), "")
	checkSound(t, m.r)
}

// TestServeHealSeparate: a mirror that keeps registries apart heals as well.
func TestServeHealSeparate(t *testing.T) {
	t.Parallel()
	m := newMirror(t, &ocilocal.Options{SeparateRegistries: true}, nil)
	m.origin.pushImage("org/app", "v1", "one")
	m.want(200, "GET", appManifests+"v1", "")
	for text, path := range map[string]string{"one": blobAt("one"), imageOf("one"): appManifests + "v1"} {
		damageServed(t, m.r, "changed", text)
		if a := m.want(200, "GET", path, ""); a.body != text {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	checkSound(t, m.r)
}

// TestServeHealBeside: clients of two mirrors of one root ask for content that is damaged again and
// again, beside repairs and collections without a grace. Everybody gets the right bytes.
func TestServeHealBeside(t *testing.T) {
	t.Parallel()
	m := newMirrorOf(t, "one")
	m.want(200, "GET", blobAt("one"), "")
	other := mustOpen(t, m.r.Root())
	defer mustClose(t, other)
	mirrors := []*served{m.served, serveAt(t, other, m.opts)}
	for range 10 {
		for text, path := range map[string]string{"one": blobAt("one"), imageOf("one"): appManifests + "v1"} {
			damageServed(t, m.r, "changed", text)
			var all sync.WaitGroup
			for _, s := range mirrors {
				for range 2 {
					all.Go(func() {
						if a, err := s.try("GET", path, nil); err != nil || a.status != 200 || a.body != text {
							t.Errorf("%d %s, %v", a.status, a.body, err)
						}
					})
				}
			}
			all.Go(func() { other.GC(t.Context(), atOnce) }) // it refuses beside a damaged manifest
			all.Go(func() {
				if _, err := m.r.Repair(t.Context(), nil); err != nil {
					t.Error(err)
				}
			})
			all.Wait()
		}
	}
	collect(t, m.r, atOnce) // what Repair has moved away
	checkSound(t, m.r)
}

// TestServeHealLarge: a client that gets a damaged large blob hears at the end that it is damaged. By
// then it has been fetched again, once, and other clients have got it while it arrived.
func TestServeHealLarge(t *testing.T) {
	t.Parallel()
	text := aLargeBlob(5)
	m := newMirrorOf(t, text)
	m.want(200, "GET", blobAt(text), "")
	damageServed(t, m.r, "changed", text)
	asked, answer := make(chan struct{}, 1), make(chan struct{})
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(text)))
		io.WriteString(w, text[:2<<20])
		http.NewResponseController(w).Flush()
		asked <- struct{}{}
		<-answer
		io.WriteString(w, text[2<<20:])
		return true
	})
	m.requests("")
	var first sync.WaitGroup
	first.Go(func() {
		if a, err := m.try("GET", blobAt(text), nil); err == nil {
			t.Errorf("got %d bytes of damaged content", len(a.body))
		}
	})
	<-asked
	res := m.get(t.Context(), blobAt(text))
	readSome(t, res, 2<<20, text)
	close(answer)
	if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != text[2<<20:] {
		t.Errorf("%d bytes more, %v", len(rest), err)
	}
	first.Wait()
	if a := m.want(200, "GET", blobAt(text), ""); a.body != text {
		t.Errorf("%d bytes", len(a.body))
	}
	m.wantRequests("GET " + blobAt(text))
	checkSound(t, m.r)
}
