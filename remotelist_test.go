package ocilocal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestRemoteListsTooMany: a registry may list a million tags, and no more.
func TestRemoteListsTooMany(t *testing.T) {
	v := &victim{server: newServer(t)}
	page := []byte(`{"tags":["a"` + strings.Repeat(`,"a"`, 299_999) + `]}`)
	v.onMethod("GET", "/tags/list", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", fmt.Sprintf(`<?n=%d>; rel="next"`, v.tries.Load()))
		w.Write(page)
	})
	remote := &ocilocal.Remote{Retry: quick}
	defer remote.CloseIdleConnections()
	n := 0
	for _, err := range remote.Tags(t.Context(), v.ref("org/model")) {
		if n++; err != nil {
			mustFail(t, err, ocilocal.ErrTooLarge)
		}
	}
	if n != 900_001 {
		t.Errorf("%d tags", n-1)
	}
}

// TestHostileCodings: answers with a Content-Encoding that changes the bytes are refused, whole or
// cut off, even if the client could decode them.
func TestHostileCodings(t *testing.T) {
	if ranAlone(t) {
		return
	}
	v := newVictim(t)
	coded := gzipped(v.manifest.body)
	for name, b := range map[string][]byte{
		"whole": coded, "half": coded[:len(coded)/2], "header": coded[:10], "nothing": nil, "without its end": coded[:len(coded)-8],
		"wrong sum": append(bytes.Clone(coded[:len(coded)-8]), 1, 2, 3, 4, 5, 6, 7, 8), "a bomb": gzipped(make([]byte, 64<<20)),
	} {
		for _, coding := range []string{"gzip", "GZIP", "gzip, gzip", "br"} {
			for _, decodes := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s as %q, %v", name, coding, decodes), func(t *testing.T) {
					v := newVictim(t)
					remote := &ocilocal.Remote{Retry: quick, Client: &http.Client{Transport: &http.Transport{DisableCompression: !decodes}}}
					r := openRemote(t, remote)
					answer := func(code int) http.HandlerFunc {
						return func(w http.ResponseWriter, _ *http.Request) {
							w.Header()["Content-Encoding"] = []string{coding}
							w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
							w.WriteHeader(code)
							w.Write(b)
						}
					}
					coded := func(end string, code int, want error) {
						v.on(end, answer(code))
						_, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil)
						mustFail(t, err, want)
						checkUnpublished(t, r)
					}
					if n := allocated(func() {
						coded("/manifests/v1", 200, ocilocal.ErrProtocol)
						coded(v.largeAt, 200, ocilocal.ErrProtocol)
						coded(v.smallAt, 200, ocilocal.ErrProtocol)
						coded("/manifests/v1", 404, ocilocal.ErrNotFound)
					}); n > 64<<20 {
						t.Errorf("%d bytes were allocated", n)
					}
					for _, err := range remote.Tags(t.Context(), v.ref("org/model")) {
						if err != nil {
							t.Error(err)
						}
					}
					v.behave()
					if _, err := r.Pull(t.Context(), v.ref("org/model:v1"), nil); err != nil {
						t.Errorf("afterwards: %v", err)
					}
				})
			}
		}
	}
}

// rawAnswer answers with bytes as they are, which net/http would not write.
func rawAnswer(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		io.WriteString(conn, text)
	}
}

// TestHostileWire: odd answers that net/http refuses, and some that it accepts.
func TestHostileWire(t *testing.T) {
	t.Parallel()
	const ansi = "\x1b[31mred\x1b[0m\u202e\x9b"
	good, rows := newVictim(t), 0
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"status text":               {"HTTP/1.1 500 " + ansi + "\r\nContent-Length: 0\r\n\r\n", ocilocal.ErrTransport},
		"status text of a redirect": {"HTTP/1.1 302 " + ansi + "\r\nLocation: " + "/" + ansi + "\r\nContent-Length: 0\r\n\r\n", ocilocal.ErrTransport},
		"status of words":           {"HTTP/1.1 " + ansi + " OK\r\n\r\n", ocilocal.ErrTransport},
		"status of four digits":     {"HTTP/1.1 2000 OK\r\n\r\n", ocilocal.ErrTransport},
		"status 999":                {"HTTP/1.1 999 " + ansi + "\r\nContent-Length: 0\r\n\r\n", ocilocal.ErrTransport},
		"status 000":                {"HTTP/1.1 000 " + ansi + "\r\nContent-Length: 0\r\n\r\n", ocilocal.ErrProtocol},
		"another protocol":          {"SSH-2.0-" + ansi + "\r\n", ocilocal.ErrTransport},
		"nothing":                   {"", ocilocal.ErrTransport},
		"half a header":             {"HTTP/1.1 200 OK\r\nContent-Le", ocilocal.ErrTransport},
		"header line":               {"HTTP/1.1 200 OK\r\nX " + ansi + ": y\r\n\r\n", ocilocal.ErrTransport},
		"header without a name":     {"HTTP/1.1 200 OK\r\n: " + ansi + "\r\n\r\n", ocilocal.ErrTransport},
		"two lengths":               {"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", ocilocal.ErrTransport},
		"negative length":           {"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nxx", ocilocal.ErrTransport},
		"length of no number":       {"HTTP/1.1 200 OK\r\nContent-Length: " + ansi + "\r\n\r\n", ocilocal.ErrTransport},
		"length of 2^63":            {"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\n", ocilocal.ErrTransport},
		"length of 2^63-1":          {"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775807\r\n\r\n", ocilocal.ErrTooLarge},
		"chunk of no number":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + ansi + "\r\n", ocilocal.ErrTransport},
		"chunk of 2^64":             {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n", ocilocal.ErrTransport},
		"unknown transfer coding":   {"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + ansi + "\r\n\r\n", ocilocal.ErrTransport},
		"early hints for ever":      {strings.Repeat("HTTP/1.1 103 Early Hints\r\nX-Y: "+strings.Repeat("x", 1000)+"\r\n\r\n", 1000), ocilocal.ErrTransport},
		"headers for ever":          {"HTTP/1.1 200 OK\r\nX-Y: " + strings.Repeat("x", 1<<20), ocilocal.ErrTransport},
	} {
		for _, end := range []string{"manifest", "blob", "upload"} {
			rows++
			mine := fmt.Sprintf("org/mine%d:v1", rows)
			t.Run(name+", "+end, func(t *testing.T) {
				v := good.again(t)
				answer := rawAnswer(c.text)
				switch end {
				case "manifest":
					v.on("/manifests/v1", answer)
				case "blob":
					v.on(v.smallAt, answer)
				case "upload":
					v.onMethod("POST", "/blobs/uploads/", answer)
				}
				r := openRemote(t, nil)
				ref := v.ref("org/model:v1")
				do := func() error {
					_, err := r.Pull(t.Context(), ref, nil)
					return err
				}
				if end == "upload" {
					ref = v.ref(mine)
					pushed(t, r, ref, nil, nil, noise(7, 100))
					do = func() error {
						_, err := r.Push(t.Context(), ref, nil)
						return err
					}
				}
				err := do()
				want := c.want
				if end != "manifest" && want == ocilocal.ErrTooLarge || end == "upload" && strings.HasPrefix(name, "chunk") {
					want = err // some error: such a body isn't read
				}
				mustFail(t, err, want)
				if _, ok := errors.AsType[*ocilocal.RemoteError](err); !ok {
					t.Errorf("%T has no RemoteError", err)
				}
				checkRemoteMessage(t, err)
				v.behave()
				if err := do(); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		}
	}
}

// TestPushHostileMount has answers to a mount that are wrong, hostile or a refusal.
func TestPushHostileMount(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   error
	}{
		"of another digest": {status(201, "Docker-Content-Digest", string(digest.FromString("other"))), ocilocal.ErrDigestMismatch},
		"of a bad digest":   {status(201, "Docker-Content-Digest", "sha256:x"), ocilocal.ErrProtocol},
		"opens no upload":   {status(202), ocilocal.ErrProtocol},
		"opens a file":      {status(202, "Location", "file:///etc/passwd"), ocilocal.ErrProtocol},
		"refused":           {status(403), nil}, // the blobs are sent
		"fails":             {status(400), nil},
		"redirected":        {status(307, "Location", "http://127.0.0.1:1/x"), nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Query().Get("mount") == "" {
					return false
				}
				c.answer(w, r)
				return true
			})
			r := openRemote(t, nil)
			pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 100))
			_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{As: s.ref("org/other:v1")})
			if c.want != nil {
				mustFail(t, err, c.want)
			} else if err != nil {
				t.Error(err)
			}
			checkRemoteMessage(t, err)
		})
	}
}

// TestRemoteListsStop: a caller may stop in the middle of a list.
func TestRemoteListsStop(t *testing.T) {
	for _, noReferrers := range []bool{false, true} {
		s := newServer(t)
		s.noReferrers, s.pageSize = noReferrers, 1
		r := openRemote(t, nil)
		subject, _ := withSignatures(t, r, s, 2)
		if _, err := r.Push(t.Context(), subject.Reference(), &ocilocal.PushOptions{Referrers: true, Tags: []string{"v2"}}); err != nil {
			t.Fatal(err)
		}
		remote := &ocilocal.Remote{Retry: quick}
		defer remote.CloseIdleConnections()
		s.forget()
		for tag, err := range remote.Tags(t.Context(), subject.Reference()) {
			if tag == "" || err != nil {
				t.Error(tag, err)
			}
			break
		}
		for d, err := range remote.Referrers(t.Context(), subject.Reference(), "") {
			if d.Digest == "" || err != nil {
				t.Error(d, err)
			}
			break
		}
		if n := len(s.requests("last=")); n > 0 {
			t.Errorf("%d further pages were asked for", n)
		}
	}
}
