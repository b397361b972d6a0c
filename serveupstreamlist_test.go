package ocilocal_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// allPages follows the links of a list and returns the entries of all pages, by get.
func (s *served) allPages(path string, get func(body string) []string) (all []string) {
	s.t.Helper()
	for path != "" {
		a := s.want(200, "GET", path, "")
		all = append(all, get(a.body)...)
		link, _, _ := strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
		path = link
	}
	return all
}

func tagsOf(body string) []string {
	var doc struct{ Tags []string }
	_ = json.Unmarshal([]byte(body), &doc)
	return doc.Tags
}

func digestsOf(body string) (all []string) {
	var doc ocispec.Index
	_ = json.Unmarshal([]byte(body), &doc)
	for _, d := range doc.Manifests {
		all = append(all, string(d.Digest))
	}
	return all
}

// referrerOf is a manifest with a subject and one layer.
func referrerOf(subject, layer string) string {
	return strings.TrimSuffix(imageOf(layer), "}") + `,"subject":` + desc(imageType, subject) + "}"
}

// TestServeUpstreamLists: tags and referrers of the upstream and those that are here are listed once
// each, in pages of every size. While the upstream is down, those that are here are.
func TestServeUpstreamLists(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	subject := imageOf("one")
	m.want(404, "GET", "/v2/org/app/tags/list", "")
	var tags, referrers, here []string
	for i := range 6 {
		tag := fmt.Sprintf("v%d", i)
		layer := fmt.Sprintf("signature %d", i)
		raw := referrerOf(subject, layer)
		d := string(digestOfText(raw))
		for side, s := range []*served{m.origin, m.served} {
			if side == 0 && i%3 == 1 || side == 1 && i%3 == 0 { // some only here, some only there
				continue
			}
			s.pushImage("org/app", tag, "one")
			s.pushBlob("org/app", layer)
			s.want(201, "PUT", appManifests+d, raw, "Content-Type", imageType)
		}
		tags, referrers = append(tags, tag), append(referrers, d)
		if i%3 > 0 {
			here = append(here, d)
		}
	}
	slices.Sort(referrers)
	slices.Sort(here)
	list := "/v2/org/app/referrers/" + string(digestOfText(subject))
	for _, n := range []int{1, 2, 3, 6, 100} {
		if got := m.allPages(fmt.Sprintf("/v2/org/app/tags/list?n=%d", n), tagsOf); !slices.Equal(got, tags) {
			t.Errorf("tags by %d: %v", n, got)
		}
		if got := m.allPages(fmt.Sprintf("%s?n=%d", list, n), digestsOf); !slices.Equal(got, referrers) {
			t.Errorf("referrers by %d: %v, want %v", n, got, referrers)
		}
	}
	if got := m.allPages(list+"?artifactType=application/vnd.other", digestsOf); len(got) > 0 {
		t.Errorf("of another type: %v", got)
	}
	// A list in no order and without pages.
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		found := strings.HasSuffix(r.URL.Path, "/tags/list")
		if found {
			fmt.Fprint(w, `{"name":"org/app","tags":["v5","v0","v3","v2","not a tag"]}`)
		}
		return found
	})
	if got := m.allPages("/v2/org/app/tags/list?n=2", tagsOf); !slices.Equal(got, tags) {
		t.Errorf("tags of an origin without pages: %v", got)
	}

	m.down()
	if got := m.allPages("/v2/org/app/tags/list?n=2", tagsOf); !slices.Equal(got, []string{"v1", "v2", "v4", "v5"}) {
		t.Errorf("tags here: %v", got)
	}
	if got := m.allPages(list+"?n=1", digestsOf); !slices.Equal(got, here) {
		t.Errorf("referrers here: %v", got)
	}
	for _, path := range []string{"/v2/org/app/tags/list", list} {
		if a := m.want(200, "GET", path, ""); !strings.Contains(a.header.Get("Warning"), "only what is here") {
			t.Errorf("%s: %v", path, a.header)
		}
	}
	// That the upstream has no such repository is not known now.
	m.want(502, "GET", "/v2/org/other/tags/list", "")
	m.intercept(nil)
	if a := m.want(404, "GET", "/v2/org/other/tags/list", ""); a.header.Get("Warning") != "" {
		t.Error(a.header)
	}
}

// TestServeUpstreamHugeReferrers: an upstream can't fill the memory with a list. If its referrers take
// more than 16 MiB, the list has what is here, with a warning.
func TestServeUpstreamHugeReferrers(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	subject := imageOf("one")
	m.pushBlob("org/app", "signature")
	m.pushBlob("org/app", "{}")
	raw := referrerOf(subject, "signature")
	m.want(201, "PUT", manifestAt(raw), raw)
	list := "/v2/org/app/referrers/" + string(digestOfText(subject))
	const size = 1 << 20
	pages := 0
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != list {
			return false
		}
		page, _ := strconv.Atoi(r.URL.Query().Get("page"))
		if page < pages-1 {
			w.Header().Set("Link", fmt.Sprintf(`<%s?page=%d>; rel="next"`, list, page+1))
		}
		w.Header().Set("Content-Type", indexType)
		d := strings.TrimSuffix(desc(imageType, fmt.Sprint(page)), "}")
		fmt.Fprintf(w, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s,"annotations":{"note":%q}}]}`, indexType, d, strings.Repeat("x", size))
		return true
	})
	for _, pages = range []int{15, 2} {
		if a := m.want(200, "GET", list+"?n=1", ""); a.header.Get("Warning") != "" {
			t.Errorf("%d pages: %v", pages, a.header)
		}
	}
	if got := m.allPages(list, digestsOf); len(got) != pages+1 {
		t.Errorf("%d referrers, want %d and the one here", len(got), pages)
	}
	pages = 16
	a := m.want(200, "GET", list, "")
	if got := digestsOf(a.body); len(got) != 1 || !strings.Contains(a.header.Get("Warning"), "only what is here") {
		t.Errorf("%d referrers, %v", len(got), a.header)
	}
}

// TestServeUpstreamManyReferrers: a mirror lists up to 10,000 referrers of its upstream. If there are
// more, the list has what is here, with a warning.
func TestServeUpstreamManyReferrers(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	m.origin.pushImage("org/app", "v1", "one")
	m.want(200, "GET", appManifests+"v1", "")
	list := "/v2/org/app/referrers/" + string(digestOfText(imageOf("one")))
	for _, n := range []int{10_000, 10_001} {
		all := make([]string, n)
		for i := range all {
			all[i] = desc(imageType, strconv.Itoa(i))
		}
		m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != list {
				return false
			}
			w.Header().Set("Content-Type", indexType)
			io.WriteString(w, imageIndexOf(all...))
			return true
		})
		a := m.want(200, "GET", list, "")
		if listed, warned := len(digestsOf(a.body)), a.header.Get("Warning") != ""; warned != (n > 10_000) || warned == (listed > 0) {
			t.Errorf("%d: %d on the first page, %v", n, listed, a.header)
		}
	}
}

// TestServeUpstreamReferrers: a referrer that a client fetches is kept with its subject, without a
// ref.
func TestServeUpstreamReferrers(t *testing.T) {
	t.Parallel()
	m := newMirror(t, nil, nil)
	m.origin.pushImage("org/app", "v1", "one")
	raw := referrerOf(imageOf("one"), "signature")
	m.origin.pushBlob("org/app", "signature")
	m.origin.want(201, "PUT", manifestAt(raw), raw, "Content-Type", imageType)
	m.want(200, "GET", appManifests+"v1", "")
	m.want(200, "GET", manifestAt(raw), "")
	m.want(200, "GET", blobAt("signature"), "")
	collect(t, m.r, atOnce)
	checkSound(t, m.r)
	m.down()
	list := "/v2/org/app/referrers/" + string(digestOfText(imageOf("one")))
	if got := digestsOf(m.want(200, "GET", list, "").body); !slices.Equal(got, []string{string(digestOfText(raw))}) {
		t.Errorf("referrers: %v", got)
	}
	m.want(200, "GET", manifestAt(raw), "")
	m.want(200, "GET", blobAt("signature"), "")
	refs := 0
	for range m.r.Refs(t.Context(), nil) {
		refs++
	}
	if refs != 1 {
		t.Errorf("%d refs", refs)
	}
}
