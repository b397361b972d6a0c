package powercut

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestMirror cuts the power while clients pull through a mirror, leave in the middle of blobs, and push
// to it, and while collections with no grace run. Afterwards the mirror first has no upstream: it has
// every manifest that it acknowledged, whole, and answers with right bytes or with an error. Then the
// upstream is there again, and the mirror has all.
func TestMirror(t *testing.T) {
	m := boot(t)
	origin := newOrigin(t)
	first := m.mark()
	reg, err := ocilocal.Open(t.Context(), filepath.Join(m.dir, "registry"), nil)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(origin.mirror(reg))
	defer server.Close()
	var mu sync.Mutex
	pushed := map[string]push{}
	var wg sync.WaitGroup
	for g := range *writers + 1 {
		wg.Go(func() {
			c := &puller{t: t, base: server.URL, origin: origin, rng: rand.New(rand.NewPCG(*seed, uint64(g+100)))}
			for i := range 30 {
				tag := fmt.Sprintf("pushed%d-%d", g, i)
				var p push
				p.begun = m.mark()
				err := c.step(reg, m.dir, tag, &p)
				if err != nil {
					t.Error(err)
					return
				}
				p.done = m.mark()
				if p.digest != "" {
					mu.Lock()
					pushed[tag] = p
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	server.Close()
	if err := reg.Close(); err != nil {
		t.Fatal(err)
	}
	if t.Failed() {
		return
	}
	t.Logf("%d pushes", len(pushed))
	partial, present := 0, 0
	m.eachCut(t, first, func(t *testing.T, dir string, moment int) {
		root := filepath.Join(dir, "registry")
		left, err := filepath.Glob(filepath.Join(root, "tmp", "partial", "*", "data"))
		if err != nil {
			t.Fatal(err)
		}
		partial += len(left)
		present += len(hashBlobs(t, root))
		origin.examine(t, root, pushed, moment)
	})
	t.Logf("the cuts left %d whole blobs and %d partial ones", present, partial)
	if *cuts >= 20 && (partial == 0 || present == 0) {
		t.Error("no cut came into a fetch, or none after one")
	}
}

// A push is one change of a tag of the mirror.
type push struct {
	change
	raw   string   // the manifest
	blobs []string // that it needs
}

// An origin is the upstream of a mirror. Its content does not change.
type origin struct {
	url       string
	down      atomic.Bool
	transport *http.Transport
	content   map[string]string // below /v2/, without what is pushed to the mirror
	images    []originImage
}

type originImage struct {
	tag, raw string
	large    string // one of its blobs, so large that its transfers are kept and continued
	blobs    []string
}

const (
	imageType = "application/vnd.oci.image.manifest.v1+json"
	indexType = "application/vnd.oci.image.index.v1+json"
)

func descriptor(mediaType, content string) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, digest.FromString(content), len(content))
}

func imageOf(layers ...string) string {
	all := make([]string, len(layers))
	for i, layer := range layers {
		all[i] = descriptor("text/plain", layer)
	}
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"application/vnd.example","config":%s,"layers":[%s]}`,
		imageType, descriptor("application/vnd.oci.empty.v1+json", "{}"), strings.Join(all, ","))
}

func blobPath(text string) string     { return "org/app/blobs/" + string(digest.FromString(text)) }
func manifestPath(text string) string { return "org/app/manifests/" + string(digest.FromString(text)) }

// newOrigin serves image indexes of two images each. An image has a large layer, a small one, and one
// that others have too.
func newOrigin(t *testing.T) *origin {
	reg, err := ocilocal.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	server := httptest.NewServer(reg.Handler(nil))
	t.Cleanup(server.Close)
	o := &origin{url: server.URL, content: map[string]string{}, transport: &http.Transport{}}
	t.Cleanup(o.transport.CloseIdleConnections)
	put := func(reference, mediaType, raw string) {
		t.Helper()
		o.content["org/app/manifests/"+reference], o.content[manifestPath(raw)] = raw, raw
		if _, err := send("PUT", server.URL+"/v2/org/app/manifests/"+reference, raw, 201, mediaType); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		var members []string
		for j := range 2 {
			large := string(bytes.Repeat(fmt.Appendf(nil, "large layer %d of image %d; ", j, i), 50_000+1000*i))
			image := originImage{tag: fmt.Sprintf("v%d", i), large: large, blobs: []string{large, fmt.Sprintf("small %d of %d", j, i), fmt.Sprintf("shared by %d", i/2)}}
			image.raw = imageOf(image.blobs...)
			image.blobs = append(image.blobs, "{}")
			for _, blob := range image.blobs {
				o.content[blobPath(blob)] = blob
				if err := upload(server.URL, blob); err != nil {
					t.Fatal(err)
				}
			}
			put(string(digest.FromString(image.raw)), imageType, image.raw)
			o.images = append(o.images, image)
			members = append(members, descriptor(imageType, image.raw))
		}
		put(fmt.Sprintf("v%d", i), indexType, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, indexType, strings.Join(members, ",")))
	}
	return o
}

// RoundTrip implements [http.RoundTripper].
func (o *origin) RoundTrip(r *http.Request) (*http.Response, error) {
	if o.down.Load() {
		return nil, errors.New("the origin is down")
	}
	return o.transport.RoundTrip(r)
}

// mirror returns the handler of a mirror of the origin.
func (o *origin) mirror(reg *ocilocal.LocalRegistry) http.Handler {
	return reg.Handler(&ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{
		Host: strings.TrimPrefix(o.url, "http://"),
		Remote: &ocilocal.Remote{
			Client: &http.Client{Transport: o},
			Retry:  func(int, error) (time.Duration, bool) { return 0, false },
		},
		Revalidate: -1,
	}})
}

// A puller is a client of the mirror.
type puller struct {
	t      *testing.T
	base   string
	origin *origin
	rng    *rand.Rand
}

// step does one thing. If it pushes, it fills in p.
func (c *puller) step(reg *ocilocal.LocalRegistry, dir, tag string, p *push) error {
	image := c.origin.images[c.rng.IntN(len(c.origin.images))]
	get := func(path string) error {
		body, status, err := fetch(c.t.Context(), c.base+"/v2/"+path, "")
		if err == nil && (status != 200 || body != c.origin.content[path]) {
			err = fmt.Errorf("GET %s: %d, %d bytes", path, status, len(body))
		}
		return err
	}
	index := "org/app/manifests/" + image.tag
	if err := get(index); err != nil {
		return err
	}
	switch c.rng.IntN(8) {
	case 0:
		_, err := reg.GC(c.t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace})
		return err
	case 1: // something else on the machine syncs now and then
		return run("sync", "-f", dir)
	case 2, 3: // leave
		if err := get(manifestPath(image.raw)); err != nil {
			return err
		}
		ctx, leave := context.WithCancel(c.t.Context())
		defer leave()
		req, err := http.NewRequestWithContext(ctx, "GET", c.base+"/v2/"+blobPath(image.large), nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		_, err = io.CopyN(io.Discard, res.Body, int64(1+c.rng.IntN(len(image.large))))
		return err
	case 4: // the index under another tag, with this image
		if err := get(manifestPath(image.raw)); err != nil {
			return err
		}
		p.raw, p.blobs = c.origin.content[index], image.blobs
	case 5: // another image of the same layers
		if err := get(manifestPath(image.raw)); err != nil {
			return err
		}
		added := "layer of " + tag
		if err := upload(c.base, added); err != nil {
			return err
		}
		layers := append([]string{added}, image.blobs[:3]...)
		p.raw, p.blobs = imageOf(layers...), append(layers, "{}")
	default:
		if err := get(manifestPath(image.raw)); err != nil {
			return err
		}
		for _, blob := range image.blobs {
			if err := get(blobPath(blob)); err != nil {
				return err
			}
		}
	}
	if p.raw == "" {
		return nil
	}
	p.digest = digest.FromString(p.raw)
	_, err := send("PUT", c.base+"/v2/org/app/manifests/"+tag, p.raw, 201, "")
	return err
}

// examine judges the mirror in root as the power cut left it.
func (o *origin) examine(t *testing.T, root string, pushed map[string]push, moment int) {
	ctx := t.Context()
	reg, err := ocilocal.Open(ctx, root, nil)
	if err != nil {
		t.Errorf("after the cut: %v", err)
		return
	}
	defer reg.Close()
	server := httptest.NewServer(o.mirror(reg))
	defer server.Close()
	sound := func(may ...ocilocal.ProblemKind) {
		t.Helper()
		for p, err := range reg.Verify(ctx, nil) {
			if err != nil || !slices.Contains(may, p.Kind) {
				t.Errorf("%v, %v", p, err)
			}
		}
	}
	sound(ocilocal.ProblemUnrecorded, ocilocal.ProblemCollected) // of calls that were under way
	o.down.Store(true)
	for tag, p := range pushed {
		content := map[string]string{"org/app/manifests/" + tag: p.raw}
		if p.done <= moment {
			for _, blob := range p.blobs {
				content[blobPath(blob)] = blob
			}
		}
		for path, want := range content {
			body, status, err := fetch(ctx, server.URL+"/v2/"+path, "")
			there := err == nil && status == 200 && body == want
			if p.done <= moment && !there || p.begun > moment && status == 200 || status == 200 && !there {
				t.Errorf("%s, pushed from %d to %d: %s has %d, %d bytes, %v", tag, p.begun, p.done, path, status, len(body), err)
			}
		}
	}
	for path, want := range o.content {
		for part, want := range map[string]string{"": want, "bytes=1-": want[1:]} {
			if part != "" && !strings.Contains(path, "/blobs/") {
				continue
			}
			body, status, err := fetch(ctx, server.URL+"/v2/"+path, part)
			if err != nil || status < 300 && body != want || status >= 300 && status != 404 && status != 502 {
				t.Errorf("without the upstream, %s %s has %d, %d bytes, %v", path, part, status, len(body), err)
			}
		}
	}
	o.down.Store(false)
	// First the manifests: a blob that no manifest here names is not found.
	for _, kind := range []string{"/manifests/v", "/manifests/sha", "/blobs/"} {
		for path, want := range o.content {
			if !strings.Contains(path, kind) {
				continue
			}
			body, status, err := fetch(ctx, server.URL+"/v2/"+path, "")
			if err != nil { // bytes that the cut has damaged were being sent
				body, status, err = fetch(ctx, server.URL+"/v2/"+path, "")
			}
			if err != nil || status != 200 || body != want {
				t.Errorf("%s has %d, %d bytes, %v", path, status, len(body), err)
			}
		}
	}
	if _, err := reg.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Error(err)
	}
	sound()
}

// fetch makes a GET, for a part if that is not empty. A body that breaks off is an error.
func fetch(ctx context.Context, url, part string) (body string, status int, err error) {
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return "", 0, err
	}
	if part != "" {
		req.Header.Set("Range", part)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", 0, err
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	return string(got), res.StatusCode, err
}

// send makes a request with a body, and returns the Location of the answer.
func send(method, url, body string, status int, mediaType string) (string, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != status {
		err = fmt.Errorf("%s %s: %d %s", method, url, res.StatusCode, got)
	}
	return res.Header.Get("Location"), err
}

// upload pushes a blob.
func upload(base, text string) error {
	_, err := send("POST", base+"/v2/org/app/blobs/uploads/?digest="+string(digest.FromString(text)), text, 201, "")
	return err
}
