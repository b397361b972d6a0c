package ocilocal_test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// The next page is found whatever its Link has beside it. A Link that can't be
// read is an error, since a list without its end would look like a whole one.
func TestRemoteListsLinks(t *testing.T) {
	for link, want := range map[string]error{
		`<?n=2&x= y>; rel="next"`:                                                  nil,
		`<?n=2>; title="a, b; c"; rel="next"`:                                      nil,
		`<?n=3>; title="<x>; rel=next, "; rel="prev", <?n=2>; rel="next last"`:     nil,
		`<?n=2>;rel=next;title=a/b`:                                                nil,
		`</v2/org/model/tags/list?n=2>; rel="next"`:                                nil,
		`/v2/org/model/tags/list?n=2; rel="next"`:                                  nil,
		`<http://inside.test/v2/org/model/tags/list?n=2>; rel=next`:                nil, // the address of the registry behind its proxy
		`<https://inside.test:5000/prefix/v2/org/model/tags/list?n=2>; rel="next"`: nil,
		`<?n=2>; rel="next`:                                                        ocilocal.ErrProtocol,
		`<http://inside.test/v2/org/other/tags/list?n=2>; rel=next`:                ocilocal.ErrProtocol,
		`<http://me:you@inside.test/v2/org/model/tags/list?n=2>; rel=next`:         ocilocal.ErrProtocol,
		`<?n=2; rel="next"`:                                                        ocilocal.ErrProtocol,
		`?n=2; rel="next"`:                                                         ocilocal.ErrProtocol,
		`<?n=2&hush=` + strings.Repeat("x", 8<<10) + `>; rel="next"`:               ocilocal.ErrProtocol,
	} {
		v := &victim{server: newServer(t)}
		v.onMethod("GET", "/tags/list", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("n") == "2" {
				io.WriteString(w, `{"tags":["b"]}`)
				return
			}
			w.Header().Set("Link", link)
			io.WriteString(w, `{"tags":["a"]}`)
		})
		remote := &ocilocal.Remote{Retry: quick}
		defer remote.CloseIdleConnections()
		var got []string
		var last error
		for tag, err := range remote.Tags(t.Context(), v.ref("org/model")) {
			if last = err; err == nil {
				got = append(got, tag)
			}
		}
		if want == nil && (last != nil || strings.Join(got, "") != "ab") {
			t.Errorf("%s: %q, %v", link, got, last)
		} else if want != nil {
			mustFail(t, last, want)
		}
	}
}

// A registry may list a million tags, not more.
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

// A registry that says an upload is at the last byte there can be.
func TestPushRangeOverflows(t *testing.T) {
	for _, says := range []string{"0-9223372036854775807", "0-9223372036854775806", "0-18446744073709551615"} {
		v := &victim{server: newServer(t)}
		v.onMethod("PATCH", "/blobs/uploads/", func(w http.ResponseWriter, r *http.Request) {
			if c := r.Header.Get("Content-Range"); strings.HasPrefix(c, "-") || strings.Contains(c, "--") {
				t.Errorf("a chunk of bytes %s", c)
			}
			status(202, "Location", r.URL.String(), "Range", says)(w, r)
		})
		r := openRemote(t, nil)
		ref := v.ref("org/model:v1")
		pushed(t, r, ref, nil, nil, noise(2, 300_000))
		_, err := r.Push(t.Context(), ref, &ocilocal.PushOptions{ChunkSize: 100_000})
		mustFail(t, err, ocilocal.ErrRejected)
		if n := v.tries.Load(); n > 3 {
			t.Errorf("%s: %d chunks of 3", says, n)
		}
	}
}

// A token is longer than what messages quote of a header: what is left of it where they are cut is hidden too.
func TestHostileEcho(t *testing.T) {
	token := "hush" + strings.Repeat("-hush", 200)
	for name, header := range map[string][]string{
		"Content-Encoding": {"Content-Encoding"}, "Content-Type": {"Content-Type"}, "digest": {"Docker-Content-Digest"},
		"Location": {"Location"}, "Warning": {"Warning"}, "Link": {"Link"},
	} {
		for _, before := range []string{"", "x", strings.Repeat("x", 190), strings.Repeat("x", 290), "sha256:", "a/", "https://other.test/", "https://", "299 - \"" + strings.Repeat("x", 150)} {
			in := newInternet(t)
			s := in.registry("https://registry.test", "203.0.113.1")
			in.site("https://other.test", "203.0.113.2", http.HandlerFunc(status(500)))
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				shown := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
				if shown == "" {
					w.Header().Set("WWW-Authenticate", `Bearer realm="https://registry.test/token"`)
					w.WriteHeader(401)
					return true
				}
				w.Header().Set(header[0], before+shown)
				if header[0] == "Location" {
					w.WriteHeader(302)
				}
				io.WriteString(w, `{"tags":[]}`)
				return true
			}
			remote := in.remote(s.host, ocilocal.Credential{RegistryToken: token})
			_, err := remote.Manifest(t.Context(), s.ref("org/model:v1"))
			if err == nil {
				t.Errorf("%s: no error", name)
			}
			in.quiet(err)
			for _, err := range remote.Tags(t.Context(), s.ref("org/model:v1")) {
				in.quiet(err)
			}
			in.noSecretSeen(registrySite, "other.test:443") // where the registry itself has sent it
		}
	}
}

// Coded answers, cut off or not, are refused, whether or not the client could decode them.
func TestHostileCodings(t *testing.T) {
	v := newVictim(t)
	coded := gzipped(v.manifest.body)
	for name, b := range map[string][]byte{
		"whole": coded, "half": coded[:len(coded)/2], "header": coded[:10], "nothing": nil, "without its end": coded[:len(coded)-8],
		"not gzip": v.manifest.body, "wrong sum": append(bytes.Clone(coded[:len(coded)-8]), 1, 2, 3, 4, 5, 6, 7, 8), "a bomb": gzipped(make([]byte, 64<<20)),
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
						v.mu.Lock()
						v.on(end, answer(code))
						v.mu.Unlock()
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

// rawAnswer answers with bytes as they are, not as net/http would write them.
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

// TestHostileWire: answers that net/http itself refuses, or lets through although they are odd.
func TestHostileWire(t *testing.T) {
	t.Parallel()
	const ansi = "\x1b[31mred\x1b[0m\u202e\x9b"
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
			t.Run(name+", "+end, func(t *testing.T) {
				v := newVictim(t)
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
					ref = v.ref("org/mine:v1")
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

// TestUploadsElsewhere: where an upload goes on is the registry's choice, the credential stays with it.
func TestUploadsElsewhere(t *testing.T) {
	for name, c := range map[string]struct {
		first, later string // where the upload is opened, and goes on after a chunk
		want         error
		at           string // the site that gets bytes
	}{
		"another host":            {first: "https://uploads.test/u", at: "uploads.test:443"},
		"another port":            {first: "https://registry.test:8443/u", at: "registry.test:8443"},
		"another host, mid-way":   {first: "/v2/org/model/blobs/uploads/u", later: "https://uploads.test/u", at: "uploads.test:443"},
		"without a scheme":        {first: "//uploads.test/u", at: "uploads.test:443"},
		"its own name":            {first: "https://REGISTRY.test:443/u", at: registrySite},
		"no TLS, by a proxy":      {first: "http://registry.test/v2/org/model/blobs/uploads/u", at: registrySite},
		"a proxy's inside":        {first: "http://inside:5000/v2/org/model/blobs/uploads/u", at: registrySite},
		"no TLS":                  {first: "http://registry.test/u", want: ocilocal.ErrProtocol},
		"no TLS, mid-way":         {first: "https://uploads.test/u", later: "http://registry.test/u", want: ocilocal.ErrProtocol},
		"user information":        {first: "https://me:you@uploads.test/u", want: ocilocal.ErrProtocol},
		"who wants a credential":  {first: "https://uploads.test/login", want: ocilocal.ErrUnauthorized},
		"who redirects the bytes": {first: "https://uploads.test/back", want: ocilocal.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			// An upload without memory: what is put is good.
			uploads := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				switch {
				case r.URL.Path == "/login":
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(401)
				case r.URL.Path == "/back":
					w.Header().Set("Location", "https://registry.test/v2/u")
					w.WriteHeader(307)
				case r.Method == "PATCH":
					from, _, _ := strings.Cut(r.Header.Get("Content-Range"), "-")
					at, _ := strconv.Atoi(from)
					w.Header().Set("Location", cmp.Or(c.later, c.first))
					w.Header().Set("Range", fmt.Sprintf("0-%d", int64(at)+n-1))
					w.WriteHeader(202)
				case r.Method == "PUT":
					w.WriteHeader(201)
				default:
					w.WriteHeader(204)
				}
			})
			s := in.registry("https://registry.test", "203.0.113.1")
			s.user, s.password = "me", secretPassword
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case r.Method == "POST" && s.authorized(w, r):
					w.Header()["Location"] = []string{c.first}
					w.WriteHeader(202)
				case r.Method == "POST":
				case strings.HasSuffix(r.URL.Path, "/u"):
					uploads(w, r)
				case r.Method == "PUT" && r.Header.Get("Authorization") != "": // manifests, of blobs that aren't here
					w.WriteHeader(201)
				default:
					return false
				}
				return true
			}
			for _, origin := range []string{"https://uploads.test", "https://registry.test:8443", "http://registry.test"} {
				in.site(origin, "203.0.113.2", uploads)
			}
			remote := in.remote(s.host, ocilocal.Credential{Username: "me", Password: secretPassword})
			r := openRemote(t, remote)
			pushed(t, r, s.ref("org/model:v1"), nil, nil, noise(1, 300_000))
			_, err := r.Push(t.Context(), s.ref("org/model:v1"), &ocilocal.PushOptions{ChunkSize: 100_000})
			in.quiet(err)
			in.noSecretSeen(registrySite)
			if c.want != nil {
				mustFail(t, err, c.want)
			} else if err != nil {
				t.Fatal(err)
			}
			if at := in.sites[c.at]; at != nil && !slices.ContainsFunc(at.asked(), func(r string) bool { return strings.HasPrefix(r, "PATCH") || strings.HasPrefix(r, "PUT /u") }) {
				t.Errorf("%s got %q", c.at, at.asked())
			}
			if n := len(in.sites["registry.test:80"].asked()); n > 0 {
				t.Errorf("%d requests without TLS", n)
			}
		})
	}
}

// TestPushHostileMount: a mount that isn't what was asked for.
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
			s.override = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Query().Get("mount") == "" {
					return false
				}
				c.answer(w, r)
				return true
			}
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

// TestHeadLies: what HEAD says is a hint; what comes is what counts.
func TestHeadLies(t *testing.T) {
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
	// By digest, with other bytes, whether the header says what was asked for or what they are.
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
