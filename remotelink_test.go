package ocilocal_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestRemoteListsLinks: the next page is found in a Link with other parameters and links. A Link
// that can't be read is an error: the list would seem to be complete.
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
