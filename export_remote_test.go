package ocilocal

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
)

// FuzzChallenge reads WWW-Authenticate fields. What was read reads the same when
// it is printed, and no parameter or scheme is longer than what came.
func FuzzChallenge(f *testing.F) {
	for _, s := range []string{
		`Bearer realm="https://auth.example.com/token",service="registry.example.com",scope="repository:a/b:pull,push"`,
		`Basic realm="Registry Realm"`, `basic`, `Basic realm=x, Bearer realm="y", service=z`, `Negotiate abc==, Basic realm=""`,
		`Bearer realm="a\"b\\c"`, `Bearer realm="open`, `Bearer realm="x",realm="y"`, `Bearer realm = "x" , service= y`, `,,, Basic ,realm=x,,`,
		`Bearer realm=`, `=`, `Bearer "x"`, "Bearer realm=\"a\r\nX: y\"", strings.Repeat("Basic, ", 100), strings.Repeat("x", 5000),
	} {
		f.Add(s, "")
	}
	f.Add(`Basic realm=a`, `Bearer realm=b`)
	f.Fuzz(func(t *testing.T, a, b string) {
		all := parseChallenges([]string{a, b})
		if len(all) > maxChallenges {
			t.Fatalf("%d challenges", len(all))
		}
		size := 0
		for _, c := range all {
			if c.scheme == "" || c.scheme != strings.ToLower(c.scheme) {
				t.Errorf("scheme %q", c.scheme)
			}
			size += len(c.scheme)
			for k, v := range c.params {
				if k == "" || k != strings.ToLower(k) {
					t.Errorf("parameter %q", k)
				}
				size += len(k) + len(v)
			}
			if again := parseChallenges([]string{printChallenge(c)}); len(printChallenge(c)) <= maxChallengeLen &&
				(len(again) != 1 || again[0].scheme != c.scheme || !maps.Equal(again[0].params, c.params)) {
				t.Errorf("%v printed and read is %v", c, again)
			}
		}
		if size > len(a)+len(b) {
			t.Errorf("%d bytes from %d", size, len(a)+len(b))
		}
		if c, ok := chooseChallenge(all); ok && c.scheme != "basic" && c.scheme != "bearer" {
			t.Errorf("chose %q", c.scheme)
		}
		s := scope{}
		s.add(a)
		s.add(b)
		list := s.list()
		if len(list) > 16 {
			t.Errorf("%d scopes", len(list))
		}
		again := scope{}
		again.add(strings.Join(list, " "))
		if !slices.Equal(again.list(), list) {
			t.Errorf("scopes %q read again are %q", list, again.list())
		}
	})
}

func printChallenge(c challenge) string {
	var params []string
	for _, k := range slices.Sorted(maps.Keys(c.params)) {
		params = append(params, k+`="`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(c.params[k])+`"`)
	}
	return c.scheme + " " + strings.Join(params, ", ")
}

// FuzzLink reads Link fields. A next page is on the origin that was asked, by http or
// https, and has no user information.
func FuzzLink(f *testing.F) {
	for _, s := range []string{
		`</v2/a/tags/list?n=10&last=b>; rel="next"`, `<https://example.com/v2/x>; rel=next`, `<http://example.com/x>; rel="next"`,
		`<//evil.example/x>; rel="next"`, `<https://me:secret@example.com/x>;rel=next`, `<x>; rel="prev", <y>; rel="last next"`,
		`<file:///etc/passwd>; rel=next`, `<>; rel=next`, `<x`, `x>; rel=next`, `<https://EXAMPLE.com:443/x>;REL=NEXT`, `<?>;rel=next`, "<\x00>;rel=next",
		`<https://example.com:444/x>; rel=next`, `<x>; title="a,b;rel=next"`, strings.Repeat("<x>,", 2000),
	} {
		f.Add(s, "")
	}
	at, err := url.Parse("https://example.com/v2/a/b/tags/list?n=1")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		u, err := nextPage(at, http.Header{"Link": {a, b}})
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Errorf("%v is no ErrProtocol", err)
			}
			return
		}
		if u == nil {
			return
		}
		if u.Scheme != "https" || !sameOrigin(u, at) || u.User != nil || u.Fragment != "" {
			t.Errorf("%q leads to %s", a, u)
		}
		// As a request would be made of it.
		if req, err := http.NewRequest(http.MethodGet, u.String(), nil); err == nil && !strings.EqualFold(req.URL.Hostname(), "example.com") {
			t.Errorf("%q asks %s", a, req.URL.Host)
		}
	})
}

// FuzzContentRange reads what registries say of ranges, when bytes come and when they
// are sent. What is taken lies within the blob.
func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-9/10", "bytes 5-9/10", "bytes 5-9/*", "bytes 5-4/10", "bytes 5-10/11", "bytes */10", "bytes 5-9/9223372036854775807",
		"bytes 5-18446744073709551615/10", "bytes=5-9/10", "bytes +5-9/10", "bytes 5--9/10", "0-9", "0-0", "bytes=0-4", "0-9223372036854775807", "1-4", "0-", "-5", ""} {
		f.Add(s, int64(5), int64(10))
	}
	f.Add("bytes 0-9223372036854775806/9223372036854775807", int64(0), int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, text string, from, size int64) {
		if from >= 0 && size > from {
			end, err := checkContentRange(text, from, size)
			if err == nil && (end <= from || end > size) || err != nil && (!errors.Is(err, ErrProtocol) || end != 0) {
				t.Errorf("%q from %d of %d: %d, %v", text, from, size, end, err)
			}
			if err == nil && text != fmt.Sprintf("bytes %d-%d/%d", from, end-1, size) && text != fmt.Sprintf("bytes %d-%d/*", from, end-1) && !hasLeadingZero(text) {
				t.Errorf("%q was read as %d to %d of %d", text, from, end, size)
			}
		}
		if from >= 0 {
			at, err := uploadedTo(text, from)
			if at < 0 || err != nil && !errors.Is(err, ErrProtocol) {
				t.Errorf("%q: %d, %v", text, at, err)
			}
		}
	})
}

func hasLeadingZero(text string) bool {
	for n := range strings.FieldsFuncSeq(text, func(c rune) bool { return c < '0' || c > '9' }) {
		if len(n) > 1 && n[0] == '0' {
			return true
		}
	}
	return false
}

// FuzzErrorBody reads the body of an error and its Retry-After. What comes of them
// is short, printable, and without the secrets that were sent.
func FuzzErrorBody(f *testing.F) {
	const secret = `pa"ss wörd`
	for _, s := range []string{
		`{"errors":[{"code":"DENIED","message":"requested access","detail":[{"Type":"repository"}]}]}`, `{"errors":[]}`, `{"errors":null}`, `[]`, `null`, ``,
		`{"errors":[{"code":7}]}`, `{"errors":[{"code":"\u001b[31m","message":"a\r\nb"}]}`, `{"errors":[{"message":"you sent pa\"ss wörd"}]}`,
		`{"errors":[{"message":"you sent pa%22ss%20w%C3%B6rd or pa%22ss+w%C3%B6rd"}]}`, `<html>502</html>`, strings.Repeat(`{"errors":`, 1000),
		`{"errors":[` + strings.TrimSuffix(strings.Repeat(`{"code":"A"},`, 100), ",") + `]}`,
	} {
		f.Add([]byte(s), "120")
	}
	for _, s := range []string{"-1", "99999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 1900 00:00:00 GMT", "1.5", "0x10"} {
		f.Add([]byte("{}"), s)
	}
	secrets := spellings([]string{secret})
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f.Fuzz(func(t *testing.T, body []byte, after string) {
		codes := parseErrorBody(body, secrets)
		if len(codes) > 10 {
			t.Errorf("%d codes", len(codes))
		}
		e := &RemoteError{Method: "GET", URL: "https://example.com/", Status: 403, Codes: codes, RetryAfter: parseRetryAfter(after, now)}
		e.Err = e.kind()
		text := e.Error()
		if strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) }) {
			t.Errorf("unprintable: %q", text)
		}
		if len(text) > 10*2*300+1000 {
			t.Errorf("%d bytes of text", len(text))
		}
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("the secret is in %q", text)
			}
		}
		if e.RetryAfter < 0 || e.RetryAfter > maxServerWait {
			t.Errorf("Retry-After %q is %v", after, e.RetryAfter)
		}
	})
}

// FuzzDockerConfig reads a credential file. A host gets no entry but one that names it,
// an error says nothing of the file's content, and none makes a request's line break.
func FuzzDockerConfig(f *testing.F) {
	for _, s := range []string{
		`{"auths":{"example.com":{"auth":"bWU6c2VjcmV0"}}}`, `{"auths":{"https://example.com/v2/":{"username":"me","password":"secret"}}}`,
		`{"auths":{"example.com/team/app":{"identitytoken":"secret"},"other.example":{"registrytoken":"x"}}}`, `{"auths":{"example.com":{"auth":"!"}}}`,
		`{"auths":{"example.com":{"auth":"bm9jb2xvbg=="}}}`, `{"auths":{"example.com":null}}`, `{"auths":{"":{"auth":"bWU6c2VjcmV0"},"/team":{"auth":"bWU6c2VjcmV0"}}}`,
		`{"auths":7}`, `{"auths":{"example.com":{"auth":"bWU6c2VjcmV0"}},"auths":{}}`, `{"AUTHS":{"example.com":{"AUTH":"bWU6c2VjcmV0"}}}`, `{`, ``, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		doc := &credentialFile{}
		if err := parseCredentialFile(b, doc); err != nil {
			if err.Error() != "is not JSON of the right form" {
				t.Errorf("the error quotes: %v", err)
			}
			return
		}
		doc.CredHelpers, doc.CredsStore = nil, "" // these run programs
		const host, repository = "example.com", "team/app"
		c, err := doc.find(t.Context(), host, repository)
		if err != nil {
			if err.Error() != "an auth is not user:password in base64" {
				t.Errorf("the error quotes: %v", err)
			}
			return
		}
		if c.anonymous() {
			return
		}
		named := false
		for key := range doc.Auths {
			key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
			named = named || key == host || strings.HasPrefix(key, host+"/")
		}
		if !named {
			t.Errorf("%s got a credential of another: %q", host, b)
		}
		// The same entry alone, written anew, gives the same credential.
		again := &credentialFile{}
		out, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		if err := parseCredentialFile(out, again); err != nil {
			t.Fatal(err)
		}
		if c2, err := again.find(t.Context(), host, repository); err != nil || c2 != c {
			t.Errorf("read again it is another: %v", err)
		}
	})
}
