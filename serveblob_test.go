package ocilocal_test

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// TestServeBlob reads a blob whole and in ranges, and asks for one that the client has already or
// that another repository has.
func TestServeBlob(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	text := strings.Repeat("0123456789", 50_000)
	d := s.pushBlob("org/app", text)
	path := "/v2/org/app/blobs/" + string(d)
	tag := `"` + string(d) + `"`
	for _, test := range []struct {
		name, method string
		fields       []string
		status       int
		body, part   string
	}{
		{"whole", "GET", nil, 200, text, ""},
		{"head", "HEAD", nil, 200, "", ""},
		{"known", "GET", []string{"If-None-Match", `"x", W/` + tag}, 304, "", ""},
		{"unknown", "GET", []string{"If-None-Match", `"x"`}, 200, text, ""},
		{"first", "GET", []string{"Range", "bytes=0-9"}, 206, text[:10], "bytes 0-9/500000"},
		{"last", "GET", []string{"Range", "bytes=-3"}, 206, "789", "bytes 499997-499999/500000"},
		{"rest", "GET", []string{"Range", "bytes=499995-"}, 206, "56789", "bytes 499995-499999/500000"},
		{"beyond", "GET", []string{"Range", "bytes=499999-99999999999999999999"}, 206, "9", "bytes 499999-499999/500000"},
		{"same", "GET", []string{"Range", "bytes=1-1", "If-Range", tag}, 206, "1", "bytes 1-1/500000"},
		{"changed", "GET", []string{"Range", "bytes=1-1", "If-Range", `"x"`}, 200, text, ""},
		{"several", "GET", []string{"Range", "bytes=0-1,3-4"}, 200, text, ""},
		{"unit", "GET", []string{"Range", "items=0-1"}, 200, text, ""},
		{"nonsense", "GET", []string{"Range", "bytes=a-b"}, 200, text, ""},
		{"outside", "GET", []string{"Range", "bytes=500000-"}, 416, "", "bytes */500000"},
		{"none", "GET", []string{"Range", "bytes=-0"}, 416, "", "bytes */500000"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := s.want(test.status, test.method, path, "", test.fields...)
			if a.status != 416 && a.body != test.body {
				t.Errorf("got %d bytes, want %d", len(a.body), len(test.body))
			}
			if got := a.header.Get("Content-Range"); got != test.part {
				t.Errorf("Content-Range %q, want %q", got, test.part)
			}
			if a.status < 400 && a.header.Get("ETag") != tag {
				t.Errorf("ETag %q", a.header.Get("ETag"))
			}
			if test.method == "HEAD" && a.header.Get("Content-Length") != "500000" {
				t.Errorf("Content-Length %q", a.header.Get("Content-Length"))
			}
		})
	}
	if a := s.want(404, "GET", "/v2/org/other/blobs/"+string(d), ""); a.code() != "BLOB_UNKNOWN" {
		t.Error(a.body)
	}
}

// TestServeDamaged: no client gets all bytes of a damaged blob, or a range of it. A damaged
// manifest is a 500.
func TestServeDamaged(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := mustOpen(t, root)
	s := serveAt(t, r, nil)
	text := strings.Repeat("x", 2<<20)
	m := s.pushImage("org/app", "v1", "small", text)
	for _, bad := range []string{text[:len(text)-1] + "y", text[1:], text + "x"} {
		spoil(t, r, digestOfText(text), bad)
		again := mustOpen(t, root) // this handle has verified nothing
		s := serveAt(t, again, nil)
		path := "/v2/org/app/blobs/" + string(digestOfText(text))
		a, err := s.try("GET", path, nil)
		if err == nil && a.status == 200 || len(a.body) >= len(bad) {
			t.Errorf("got %d bytes of the damaged blob, %v", len(a.body), err)
		}
		if a := s.want(500, "GET", path, "", "Range", "bytes=0-9"); a.code() != "UNKNOWN" {
			t.Error(a.body)
		}
	}
	spoil(t, r, digestOfText("small"), "SMALL")
	again := serveAt(t, mustOpen(t, root), nil)
	again.want(500, "GET", "/v2/org/app/blobs/"+string(digestOfText("small")), "")
	spoil(t, r, m, strings.Replace(imageOf("small", text), "plain", "PLAIN", 1))
	again.want(500, "GET", "/v2/org/app/manifests/v1", "")
}

// TestServeTiny reads blobs around the size up to which they are sent from memory. One that is
// damaged after it was served is a 500 again, whatever is at its place.
func TestServeTiny(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, nil)
	for _, size := range []int{0, 1, 4096, 8<<10 - 1, 8 << 10, 8<<10 + 1} {
		text := strings.Repeat("x", size)
		s.pushImage("org/app", "v1", text)
		path := "/v2/org/app/blobs/" + string(digestOfText(text))
		for range 2 {
			a := s.want(200, "GET", path, "")
			if a.body != text || a.header.Get("Accept-Ranges") != "bytes" || a.header.Get("ETag") != `"`+string(digestOfText(text))+`"` {
				t.Errorf("%d bytes: got %d, %v", size, len(a.body), a.header)
			}
		}
	}
	text := strings.Repeat("y", 4096)
	m := s.pushImage("org/app", "v1", text)
	for _, d := range []string{"blobs/" + string(digestOfText(text)), "manifests/v1", "manifests/" + string(m)} {
		s.want(200, "GET", "/v2/org/app/"+d, "")
	}
	for name, damage := range map[string]func(file string) error{
		"changed": func(file string) error { return os.WriteFile(file, []byte(text[1:]+"z"), 0o600) },
		"short":   func(file string) error { return os.WriteFile(file, []byte(text[1:]), 0o600) },
		"long":    func(file string) error { return os.WriteFile(file, []byte(text+"y"), 0o600) },
		"empty":   func(file string) error { return os.WriteFile(file, nil, 0o600) },
		"link":    func(file string) error { return os.Symlink("../../id", file) },
		"folder":  func(file string) error { return os.Mkdir(file, 0o700) },
	} {
		for path, d := range map[string]string{"blobs/" + string(digestOfText(text)): blobFile(r, digestOfText(text)), "manifests/v1": blobFile(r, m)} {
			if err := errors.Join(os.Remove(d), damage(d)); err != nil {
				t.Fatal(err)
			}
			if a := s.want(500, "GET", "/v2/org/app/"+path, ""); a.code() != "UNKNOWN" || a.header.Get("ETag") != "" {
				t.Errorf("%s, %s: %v", name, path, a)
			}
		}
	}
}
