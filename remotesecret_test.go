package ocilocal_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestOtherHostsAreNotQuoted: errors do not quote a host to which the registry only leads, because
// that may be one that only this machine can reach. They do quote the registry.
func TestOtherHostsAreNotQuoted(t *testing.T) {
	const told = "inner-service-4711"
	for name, h := range map[string]http.HandlerFunc{
		"status":   func(w http.ResponseWriter, _ *http.Request) { fail(w, 403, told) },
		"coding":   bare(200, "Content-Encoding", told),
		"range":    bare(206, "Content-Range", "bytes "+told),
		"location": bare(302, "Location", told+"://x"),
		"no HTTP": func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, "220 "+told+" ready\r\n")
			conn.Close()
		},
		"bad header": func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n"+told+"\r\n\r\n")
			conn.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := newInternet(t)
			s := in.registry("http://plain.test", "203.0.113.1")
			s.put(t, "org/model", "v1", noise(1, 100))
			in.site("http://other.test", "203.0.113.2", h)
			s.sendOn("http://other.test/blob")
			_, err := openRemote(t, in.remote("", ocilocal.Credential{})).Pull(t.Context(), s.ref("org/model:v1"), nil)
			if err == nil {
				t.Fatal("no error")
			}
			for _, text := range errorTexts(err) {
				if strings.Contains(text, told) {
					t.Errorf("quoted: %s", text)
				}
			}
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				h(w, r)
				return true
			})
			_, err = in.remote("", ocilocal.Credential{}).Manifest(t.Context(), s.ref("org/model:v1"))
			if name != "range" && (err == nil || !strings.Contains(err.Error(), told)) {
				t.Errorf("the registry is not quoted: %v", err)
			}
		})
	}
}

// TestHostileEcho: a registry repeats the token in its answers. Messages cut long headers, and the
// beginning of a token before the cut is hidden too.
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
			s.overrideBy(func(w http.ResponseWriter, r *http.Request) bool {
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
			})
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
