package ocilocal_test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// serveFlow does the same as putFlow, over HTTP and with one blob in two chunks.
func serveFlow(r *ocilocal.LocalRegistry) error {
	var failure error
	ocilocal.SetLogger(r, slog.New(errorLog{slog.DiscardHandler, &failure}))
	defer ocilocal.SetLogger(r, slog.New(slog.DiscardHandler))
	h := r.Handler(&ocilocal.HandlerOptions{Host: "example.com"})
	send := func(method, path, body string, status int, fields ...string) (http.Header, error) {
		req := httptest.NewRequest(method, path, strings.NewReader(body))
		for i := 0; i < len(fields); i += 2 {
			req.Header.Set(fields[i], fields[i+1])
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if w.Code != status {
			return nil, &ocilocal.Error{Op: fmt.Sprintf("%s %s: %d %s", method, path, w.Code, w.Body), Err: cmp.Or(failure, errors.New("unexpected status"))}
		}
		return w.Header(), nil
	}
	const repository = "/v2/fault/new/"
	config, layer := "{}", string(noise(34, 5000))
	if _, err := send("POST", repository+"blobs/uploads/?digest="+string(digestOfText(config)), config, 201); err != nil {
		return err
	}
	header, err := send("POST", repository+"blobs/uploads/", "", 202)
	if err == nil {
		_, err = send("PATCH", header.Get("Location"), layer[:3000], 202, "Content-Range", "0-2999")
	}
	if err == nil {
		_, err = send("PUT", header.Get("Location")+"?digest="+string(digestOfText(layer)), layer[3000:], 201, "Content-Range", "3000-4999")
	}
	if err == nil {
		_, err = send("PUT", repository+"manifests/v1", fmt.Sprintf(
			`{"schemaVersion":2,"artifactType":%q,"config":%s,"layers":[%s],"annotations":{%q:"imported"}}`,
			testType, desc("application/vnd.oci.empty.v1+json", config), desc("a/b", layer), labelKey), 201,
			"Content-Type", ocispec.MediaTypeImageManifest)
	}
	return err
}

// errorLog is a log that keeps the last error.
type errorLog struct {
	slog.Handler
	last *error
}

func (l errorLog) Enabled(context.Context, slog.Level) bool { return true }

func (l errorLog) Handle(_ context.Context, record slog.Record) error {
	record.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok {
			*l.last = err
		}
		return true
	})
	return nil
}

// serveWorker serves a root until it is killed.
func serveWorker(in *bufio.Scanner, args []string) error {
	endWithParent(in)
	r, err := ocilocal.Open(context.Background(), args[0], nil)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	say("serves", l.Addr())
	return http.Serve(l, r.Handler(nil))
}

// TestServeKilled kills a server while clients push, pull and delete, again and again. Another
// server of the root then has every manifest that was acknowledged and not deleted, and its blobs.
func TestServeKilled(t *testing.T) {
	root := t.TempDir()
	dontWatch(root)
	mustClose(t, mustOpen(t, root))
	var mu sync.Mutex
	acknowledged := map[string]string{} // tags and the manifests that they point at
	rounds := scaled(4, 20, 300)
	for round := range rounds {
		server := startWorker(t, "serve", root)
		base := "http://" + server.expect("serves")[0] + "/v2/org/app/"
		var clients sync.WaitGroup
		const total = 4
		done := make(chan struct{}, 1000)
		var killed atomic.Bool
		for c := range total {
			clients.Go(func() {
				http := &http.Client{Transport: &http.Transport{}}
				defer http.CloseIdleConnections()
				for i := 0; ; i++ {
					tag := fmt.Sprintf("t%d-%d-%d", round, c, i)
					raw, err := pushKilled(http, base, tag)
					if err == nil {
						mu.Lock()
						acknowledged[tag] = raw
						mu.Unlock()
					}
					if err == nil && i%3 == 2 {
						// A tag whose deletion was not acknowledged may be there or not.
						mu.Lock()
						delete(acknowledged, tag)
						mu.Unlock()
						_, _, err = ask(http, "DELETE", base+"manifests/"+tag, "", 202)
					}
					if err != nil {
						if !killed.Load() {
							t.Error(err)
						}
						return
					}
					select {
					case done <- struct{}{}:
					default:
					}
				}
			})
		}
		go func() {
			clients.Wait()
			close(done)
		}()
		for range 1 + rand.IntN(4*total) {
			<-done
		}
		killed.Store(true)
		server.kill()
		clients.Wait()
	}
	r := mustOpen(t, root)
	collect(t, r, atOnce)
	s := serveAt(t, r, nil)
	if len(acknowledged) < rounds {
		t.Fatalf("%d manifests in %d rounds", len(acknowledged), rounds)
	}
	for _, tag := range slices.Sorted(maps.Keys(acknowledged)) {
		a := s.want(200, "GET", "/v2/org/app/manifests/"+tag, "")
		if a.body != acknowledged[tag] {
			t.Errorf("%s: %s, want %s", tag, a.body, acknowledged[tag])
		}
		var m ocispec.Manifest
		if err := json.Unmarshal([]byte(a.body), &m); err != nil {
			t.Fatal(err)
		}
		for _, d := range append(m.Layers, m.Config) {
			if a := s.want(200, "GET", "/v2/org/app/blobs/"+string(d.Digest), ""); digest.FromString(a.body) != d.Digest {
				t.Errorf("%s: %d bytes of %s", tag, len(a.body), d.Digest)
			}
		}
	}
	for p, err := range r.Verify(t.Context(), nil) {
		t.Error(p, err)
	}
}

// pushKilled pushes an image, in chunks, to a server that may die, and returns its manifest.
func pushKilled(c *http.Client, base, tag string) (string, error) {
	layer := tag + string(noise(byte(len(tag)), 2000))
	raw := imageOf(layer)
	if _, _, err := ask(c, "POST", base+"blobs/uploads/?digest="+string(digestOfText("{}")), "{}", 201); err != nil {
		return "", err
	}
	header, _, err := ask(c, "POST", base+"blobs/uploads/", "", 202)
	if err != nil {
		return "", err
	}
	at := strings.TrimSuffix(base, "/v2/org/app/") + header.Get("Location")
	if _, _, err = ask(c, "PATCH", at, layer[:1000], 202); err != nil {
		return "", err
	}
	if _, _, err = ask(c, "PUT", at+"?digest="+string(digestOfText(layer)), layer[1000:], 201); err != nil {
		return "", err
	}
	if _, _, err = ask(c, "PUT", base+"manifests/"+tag, raw, 201); err != nil {
		return "", err
	}
	_, _, _ = ask(c, "GET", base+"blobs/"+string(digestOfText(layer)), "", 200) // cut off by the kill, at times
	return raw, nil
}

// ask makes a request, and returns an error unless the answer has that status.
func ask(c *http.Client, method, url, body string, status int) (http.Header, string, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != status {
		err = fmt.Errorf("%s: %s", res.Status, got)
	}
	return res.Header, string(got), err
}
