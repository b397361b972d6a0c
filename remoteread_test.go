package ocilocal_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestResolveHeads: HEAD may say less than GET. Resolve returns the right descriptor all the same,
// and never a size of 0.
func TestResolveHeads(t *testing.T) {
	const image = ocispec.MediaTypeImageManifest
	header := func(header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
		}
	}
	for name, answer := range map[string]func(v *victim) http.HandlerFunc{
		"length 0": func(v *victim) http.HandlerFunc {
			return header("Content-Type", image, "Docker-Content-Digest", string(v.manifest.digest), "Content-Length", "0")
		},
		"no length": func(v *victim) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				header("Content-Type", image, "Docker-Content-Digest", string(v.manifest.digest))(w, r)
				w.(http.Flusher).Flush()
			}
		},
		"no digest": func(v *victim) http.HandlerFunc {
			return header("Content-Type", "application/octet-stream", "Content-Length", fmt.Sprint(len(v.manifest.body)))
		},
		"nothing": func(*victim) http.HandlerFunc { return header() },
		"HTML":    func(*victim) http.HandlerFunc { return header("Content-Type", "text/html") },
		"400":     func(*victim) http.HandlerFunc { return status(400) },
		"403":     func(*victim) http.HandlerFunc { return status(403) },
		"404":     func(*victim) http.HandlerFunc { return status(404) },
		"405":     func(*victim) http.HandlerFunc { return status(405) },
		"500":     func(*victim) http.HandlerFunc { return status(500) },
		"501":     func(*victim) http.HandlerFunc { return status(501) },
	} {
		t.Run(name, func(t *testing.T) {
			v := newVictim(t)
			v.onMethod("HEAD", "/manifests/", answer(v))
			remote := &ocilocal.Remote{Retry: quick}
			defer remote.CloseIdleConnections()
			got, err := remote.Resolve(t.Context(), v.ref("org/model:v1"))
			if err != nil || got.Digest != v.manifest.digest || got.Size != int64(len(v.manifest.body)) || got.MediaType != image {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}

// TestPullContentTypes: servers send manifests with the media types of plain files. The document
// itself says what it is.
func TestPullContentTypes(t *testing.T) {
	t.Parallel()
	const image = ocispec.MediaTypeImageManifest
	good := newVictim(t)
	for given, want := range map[string]error{
		image: nil, image + "; charset=utf-8": nil, image + ";": nil, image + "; charset": nil, image + ", application/json": nil,
		"Application/vnd.OCI.image.manifest.v1+JSON": nil,
		"": nil, "application/json": nil, "text/json": nil, "text/plain; charset=utf-8": nil, "application/octet-stream": nil, "binary/octet-stream": nil,
		"text/html": ocilocal.ErrUnsupportedMediaType, "application/x-gzip": ocilocal.ErrUnsupportedMediaType,
		"application/vnd.docker.distribution.manifest.v1+prettyjws": ocilocal.ErrUnsupportedMediaType,
		ocilocal.MediaTypeDockerManifest:                            ocilocal.ErrInvalidManifest,
	} {
		v := good.again(t)
		v.on("/manifests/v1", func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = []string{given}
			if given == "" {
				w.Header()["Content-Type"] = nil
			}
			w.Write(v.manifest.body)
		})
		_, err := openRemote(t, nil).Pull(t.Context(), v.ref("org/model:v1"), nil)
		if want != nil {
			mustFail(t, err, want)
		} else if err != nil {
			t.Errorf("%q: %v", given, err)
		}
	}
	// Other JSON with such a type is not a manifest.
	v := newVictim(t)
	v.on("/manifests/v1", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/json")
		io.WriteString(w, `{"schemaVersion":2}`)
	})
	_, err := openRemote(t, nil).Pull(t.Context(), v.ref("org/model:v1"), nil)
	mustFail(t, err, ocilocal.ErrInvalidManifest)
}

// TestHeadLies: the answer to HEAD is a hint. The content that arrives counts.
func TestHeadLies(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	other := digest.FromString("other")
	for name, c := range map[string]struct {
		header []string
		want   error // of a pull that checks
	}{
		"another size":   {[]string{"Content-Length", "7", "Docker-Content-Digest", string(v.manifest.digest)}, nil},
		"too large":      {[]string{"Content-Length", "9223372036854775807", "Docker-Content-Digest", string(v.manifest.digest)}, nil},
		"no digest":      {[]string{"Content-Length", "7"}, nil},
		"no type":        {[]string{"Content-Type", "", "Docker-Content-Digest", string(v.manifest.digest)}, nil},
		"another type":   {[]string{"Content-Type", ocispec.MediaTypeImageIndex, "Docker-Content-Digest", string(v.manifest.digest)}, nil},
		"HTML":           {[]string{"Content-Type", "text/html", "Docker-Content-Digest", string(v.manifest.digest)}, nil},
		"another digest": {[]string{"Content-Length", "7", "Docker-Content-Digest", string(other)}, ocilocal.ErrNotFound},
		"a bad digest":   {[]string{"Docker-Content-Digest", "sha256:" + strings.Repeat("A", 64)}, ocilocal.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVictim(t)
			v.onMethod("HEAD", "/manifests/v1", func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				for i := 0; i < len(c.header); i += 2 {
					w.Header().Set(c.header[i], c.header[i+1])
				}
			})
			r := openRemote(t, nil)
			got, err := r.Pull(t.Context(), v.ref("org/model:v1"), &ocilocal.PullOptions{})
			if c.want != nil {
				mustFail(t, err, c.want)
				nothingIn(t, r)
			} else if err != nil || got.Artifact.Digest() != v.manifest.digest {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	// By digest, with other bytes. The header has the digest that was asked for, or that of the bytes.
	others := append(bytes.Clone(v.manifest.body), ' ')
	for _, header := range []digest.Digest{v.manifest.digest, digest.FromBytes(others)} {
		v := newVictim(t)
		v.on("/manifests/"+string(v.manifest.digest), body(others, "Content-Type", ocispec.MediaTypeImageManifest, "Docker-Content-Digest", string(header)))
		remote := &ocilocal.Remote{}
		_, err := remote.Manifest(t.Context(), v.ref("org/model@"+string(v.manifest.digest)))
		mustFail(t, err, ocilocal.ErrDigestMismatch)
		r := openRemote(t, remote)
		_, err = r.Pull(t.Context(), v.ref("org/model@"+string(v.manifest.digest)), nil)
		mustFail(t, err, ocilocal.ErrDigestMismatch)
		nothingIn(t, r)
	}
}

// TestResolveFails: a registry that fails is not asked twice as often because HEAD comes before
// GET.
func TestResolveFails(t *testing.T) {
	s := newServer(t)
	s.overrideBy(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(503)
		return true
	})
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	_, err := remote.Resolve(t.Context(), s.ref("org/model:v1"))
	mustFail(t, err, ocilocal.ErrTransport)
	if n, heads := len(s.requests("")), len(s.requests("HEAD")); n != 7 || heads != 1 {
		t.Errorf("%d requests, %d of HEAD", n, heads)
	}
}
