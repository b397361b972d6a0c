package ocilocal_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// oneRange is the syntax of RFC 9110 for one range. net/http accepts other spellings too.
var oneRange = regexp.MustCompile(`^bytes=([0-9]+-[0-9]*|-[0-9]+)$`)

// FuzzServeRange compares the ranges that the handler reads with those of net/http.
func FuzzServeRange(f *testing.F) {
	content := noise(1, 1000)
	for _, s := range []string{"bytes=0-", "bytes=-1", "bytes=5-6", "bytes=999-2000", "bytes=1000-", "bytes=2-1", "bytes= 1 - 2 ", "bytes=1-2,", "0-1", "bytes=--1", "bytes=-0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		start, length, whole, err := ocilocal.ParseByteRange(s, int64(len(content)))
		if err == nil && !whole && (start < 0 || length <= 0 || start > int64(len(content))-length) {
			t.Fatalf("%q is %d+%d", s, start, length)
		}
		w := httptest.NewRecorder()
		http.ServeContent(w, &http.Request{Method: "GET", Header: http.Header{"Range": {s}}}, "", time.Time{}, bytes.NewReader(content))
		if part := w.Header().Get("Content-Range"); w.Code == 206 && err == nil && !whole {
			if want := fmt.Sprintf("bytes %d-%d/%d", start, start+length-1, len(content)); part != want {
				t.Errorf("%q is %s, net/http says %s", s, want, part)
			}
		} else if w.Code == 206 && w.Body.Len() > 0 && oneRange.MatchString(s) { // of no byte, RFC 9110 demands 416
			t.Errorf("%q: whole %t, %v, net/http says %s", s, whole, err, part)
		}
		if start, length, ok := ocilocal.ParseContentRange(s); ok && (start < 0 || length <= 0 || start+length < 0) {
			t.Errorf("chunk %q is %d+%d", s, start, length)
		}
	})
}
