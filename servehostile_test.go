package ocilocal_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// TestServeHostile: clients that break off, lie about lengths, send rubbish, or say nothing. Each
// gets an answer or the end of its connection. Nothing that they sent is below blobs/.
func TestServeHostile(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, &ocilocal.HandlerOptions{StallTimeout: 500 * time.Millisecond})
	d := digestOfText("0123456789")
	post := "POST /v2/org/app/blobs/uploads/?digest=" + string(d) + " HTTP/1.1\r\nHost: x\r\n"
	put := "PUT /v2/org/app/manifests/v1 HTTP/1.1\r\nHost: x\r\n"
	for name, test := range map[string]struct {
		send   string // and then the client says nothing more, or breaks off
		breaks bool
		status string // "" if there may be no answer
	}{
		"silent blob":            {send: post + "Content-Length: 10\r\n\r\n01234", status: "408"},
		"silent manifest":        {send: put + "Content-Length: 10\r\n\r\n{", status: "408"},
		"silent chunk":           {send: post + "Transfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n", status: "408"},
		"cut blob":               {send: post + "Content-Length: 10\r\n\r\n01234", breaks: true},
		"cut chunk":              {send: post + "Transfer-Encoding: chunked\r\n\r\n5\r\n012", breaks: true},
		"bad chunk":              {send: post + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", status: "400"},
		"endless manifest":       {send: put + "Content-Length: 9223372036854775807\r\n\r\n{", status: "413"},
		"body of unknown method": {send: "BREW /v2/org/app/manifests/v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx", status: "405"},
		"body of a bad path":     {send: "PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx", status: "404"},
		"too few":                {send: post + "Connection: close\r\nContent-Length: 9\r\n\r\n012345678", status: "400"},
		"too many":               {send: post + "Connection: close\r\nContent-Length: 11\r\n\r\n01234567890", status: "400"},
		"huge length":            {send: post + "Content-Length: 9223372036854775807\r\n\r\n0", status: "413"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", s.host)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, test.send); err != nil {
				t.Fatal(err)
			}
			if test.breaks {
				if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err == nil {
				_, err = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
			switch {
			case err != nil && test.status != "":
				t.Error(err)
			case err == nil && (res.StatusCode < 400 || !strings.HasPrefix(res.Status, test.status)):
				t.Errorf("%s, want %s", res.Status, test.status)
			}
			// The server ends the connection, and does not wait for the rest.
			if test.status != "" {
				if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, io.EOF) {
					t.Log(err)
				}
			}
		})
	}
	t.Run("afterwards", func(t *testing.T) {
		t.Cleanup(func() {
			if files := filesBelow(t, r, "blobs"); len(files) > 0 {
				t.Errorf("%q", files)
			}
		})
	})
}

// FuzzServe: no request is a panic or a 5xx, every error has a code, and no GET deletes a blob.
func FuzzServe(f *testing.F) {
	r := openTemp(f, nil)
	s := serveAt(f, r, nil)
	m := s.pushImage("org/app", "v1", "layer")
	layer := string(digestOfText("layer"))
	at := s.want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
	methods := []string{"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS"}
	for i, path := range []string{"/v2/", "/v2/_catalog", "/v2/org/app/tags/list", "/v2/org/app/manifests/v1", "/v2/org/app/manifests/" + string(m),
		"/v2/org/app/blobs/" + layer, "/v2/org/app/blobs/uploads/", at, "/v2/org/app/referrers/" + string(m), "/v2/a/../b", "//", "/v2/a/blobs/uploads/..%2f"} {
		f.Add(uint8(i), path, "n=1&last=v0&artifactType=x", "bytes=0-1", "0-3", "application/json", "text")
		f.Add(uint8(2), path, "digest="+string(digestOfText("text")), "bytes=-1", "0-3", ocispec.MediaTypeImageManifest, imageOf("layer"))
		f.Add(uint8(3), path, "mount="+layer+"&from=org/app", "bytes=5-", "9-1", "", "text")
		f.Add(uint8(4), path, "ns=x", "bytes=1-2,3-4", "18446744073709551616-", "a/b; c=d", "")
	}
	h := r.Handler(nil)
	f.Fuzz(func(t *testing.T, method uint8, path, query, part, contentRange, mediaType, body string) {
		req := (&http.Request{
			Method: methods[int(method)%len(methods)], URL: &url.URL{Path: path, RawQuery: query}, RequestURI: path,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Host: "x",
			Header: http.Header{"Range": {part}, "Content-Range": {contentRange}, "Content-Type": {mediaType}, "If-None-Match": {part}},
			Body:   io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body)),
		}).WithContext(t.Context())
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		a := received{w.Code, w.Header(), w.Body.String()}
		if a.status < 200 || a.status >= 500 {
			t.Errorf("%s %q: %v", req.Method, path, a)
		}
		if a.status >= 400 && req.Method != "HEAD" && a.code() == "" {
			t.Errorf("%s %q: %d without a code: %s", req.Method, path, a.status, a.body)
		}
		if n := len(filesBelow(t, r, "blobs")); req.Method == "GET" && n < 3 {
			t.Errorf("%d blobs are left", n)
		}
		for name, values := range a.header {
			if strings.ContainsAny(strings.Join(values, ""), "\r\n") && name != "Location" && name != "Link" {
				t.Errorf("header %s: %q", name, values)
			}
		}
	})
}
