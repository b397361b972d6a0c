package ocilocal

import (
	"bufio"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
)

// checkRemoteText fails unless a message is short and has no control characters for a terminal.
func checkRemoteText(t *testing.T, text string, most int) {
	t.Helper()
	if len(text) > most {
		t.Fatalf("message of %d bytes: %.300q", len(text), text)
	}
	if i := strings.IndexFunc(text, func(c rune) bool { return !unicode.IsPrint(c) }); i >= 0 {
		t.Fatalf("message with what isn't printable: %q", text[max(i-40, 0):])
	}
}

// FuzzChallenge: the challenges that are read from WWW-Authenticate are bounded and have one
// meaning. A token server that is accepted does not have a private address.
func FuzzChallenge(f *testing.F) {
	for _, s := range []string{
		``, `Basic`, `basic realm="x"`, `Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:org/model:pull"`,
		`Basic realm="x", Bearer realm="https://auth.test/t", service=s`, `Bearer realm = "a" , service = "b"`, `Bearer,Basic`, `Bearer realm="`,
		`Bearer realm="a\"b\\c"`, `Bearer realm="a",REALM="b"`, `Negotiate abc==`, `Digest realm="x", nonce="y", Basic realm="z"`, `, ,Basic realm=x,`,
		"Bearer realm=\"a\tb\x00\x80\"", `Bearer scope="a:b:c,d a:b:d e:f:* :x y:"`, `Bearer realm=https://auth.test`, strings.Repeat("a,", 20),
		`Bearer realm="https://127.0.0.1/t"`, `Bearer realm="https://[::ffff:169.254.169.254]/t"`, `Bearer realm="https://2130706433/t"`, `Bearer realm="https://0x7f.1/t"`,
		`Bearer realm="https://user:pw@auth.test/t"`, `Bearer realm="http://auth.test/t"`, `Bearer realm="https://[fe80::1%25lo]/t"`, `Bearer realm="https://10.0.0.1.:443/t#f"`,
		`Bearer realm="https://registry.test./t"`, `Bearer realm="https://a` + "\u202e" + `b.test/t"`, `Bearer scope="` + strings.Repeat("r:x:a,b,c ", 20) + `"`,
		`Bearer scope="` + "a:b,\u0085c:d" + `"`,
	} {
		f.Add(s, "")
	}
	f.Add(`Basic realm="x"`, `Bearer realm="https://auth.test/token"`)
	f.Add(`Bearer scope="r:0:a r:1:a r:2:a r:3:a r:4:a r:5:a r:6:a r:7:a r:8:a r:9:a r:10:a r:11:a r:12:a r:13:a r:14:a r:15:a r:16:a"`, "")
	f.Add(`Bearer scope="r:0:a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q,r"`, "")
	ref := MustParseReference("registry.test/org/model:v1")
	p, err := (&Remote{}).repo(ref)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, one, two string) {
		all := parseChallenges([]string{one, two})
		if len(all) > maxChallenges {
			t.Fatalf("%d challenges", len(all))
		}
		size := 0
		for _, c := range all {
			if c.scheme == "" || c.scheme != strings.ToLower(c.scheme) {
				t.Fatalf("scheme %q", c.scheme)
			}
			for k, v := range c.params {
				if k == "" || k != strings.ToLower(k) {
					t.Fatalf("parameter %q", k)
				}
				size += len(k) + len(v)
			}
			printed := printChallenge(c)
			if len(printed) > maxChallengeLen {
				continue
			}
			if again := parseChallenges([]string{printed}); len(again) != 1 || again[0].scheme != c.scheme || !maps.Equal(again[0].params, c.params) {
				t.Fatalf("%q is read as %q", printed, again)
			}
			for k := range c.params { // a duplicate parameter has two meanings
				if twice := printed + ", " + strings.ToUpper(k) + "=x"; len(parseChallenges([]string{twice})) > 0 {
					t.Fatalf("%q is read", twice)
				}
			}
		}
		if size > len(one)+len(two) {
			t.Fatalf("%d bytes of parameters from %d", size, len(one)+len(two))
		}
		has := func(scheme string) bool {
			return slices.ContainsFunc(all, func(c challenge) bool { return c.scheme == scheme })
		}
		chosen, ok := chooseChallenge(all)
		if ok != (has("bearer") || has("basic")) || ok && has("bearer") != (chosen.scheme == "bearer") {
			t.Fatalf("of %q, %q is chosen", all, chosen)
		}
		checkScope(t, chosen.params["scope"])
		checkFuzzedRealm(t, p, chosen.params["realm"])
	})
}

func printChallenge(c challenge) string {
	var params []string
	for _, k := range slices.Sorted(maps.Keys(c.params)) {
		params = append(params, k+`="`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(c.params[k])+`"`)
	}
	return c.scheme + " " + strings.Join(params, ", ")
}

// checkScope: the scope in a challenge is added to the needed one and never replaces it. Equal
// scopes have equal texts.
func checkScope(t *testing.T, text string) {
	t.Helper()
	s := scope{}
	s.add("repository:org/model:pull")
	s.add(text)
	list := s.list()
	if len(list) > 16 || !slices.Contains(s["repository:org/model"], "pull") {
		t.Fatalf("scopes %q", list)
	}
	again := scope{}
	again.add(strings.Join(list, " "))
	if got := again.list(); !slices.Equal(got, list) {
		t.Fatalf("%q is read as %q", list, got)
	}
	for resource, actions := range s {
		if len(actions) > 16 || resource == "" || strings.ContainsFunc(resource, unicode.IsSpace) {
			t.Fatalf("%q: %q", resource, actions)
		}
	}
}

// checkFuzzedRealm judges which token servers an https registry on the Internet may name.
func checkFuzzedRealm(t *testing.T, p *remoteRepo, realm string) {
	t.Helper()
	u, err := p.checkRealm(context.Background(), realm)
	if err != nil {
		if !errors.Is(err, ErrProtocol) || u != nil {
			t.Fatalf("%v, %v", u, err)
		}
		checkRemoteText(t, err.Error(), 1000)
		return
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	if u.Scheme != "https" || u.User != nil || host == "" || u.Fragment != "" {
		t.Fatalf("realm %q is accepted: %q", realm, u)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap()
		if !a.IsGlobalUnicast() || a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() {
			t.Fatalf("realm %q is accepted", realm)
		}
	} else if last := host[strings.LastIndexByte(host, '.')+1:]; strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") && strings.Trim(last[2:], "0123456789abcdef") == "" {
		t.Fatalf("realm %q is accepted", realm)
	}
}

// FuzzRedirect: neither a registry nor the hosts to which it redirects can choose who gets a
// credential, or make the client connect to a forbidden address.
func FuzzRedirect(f *testing.F) {
	public, private, metadata := []byte{203, 0, 113, 1}, []byte{10, 0, 0, 7}, []byte{169, 254, 169, 254}
	mapped, unique := netip.MustParseAddr("::ffff:10.0.0.1").As16(), netip.MustParseAddr("fd00::7").As16()
	for _, to := range []string{
		"https://cdn.test/blob", "//cdn.test/x", "/v2/x", "?again", "https://registry.test/x", "https://REGISTRY.test:443/x", "https://registry.test./x",
		"https://registry.test:8443/x", "http://registry.test/x", "http://cdn.test/x", "https://registry.test@cdn.test/x", "https://me:you@registry.test/",
		"https://169.254.169.254/x", "https://10.0.0.7/", "https://[::1]:5000/", "https://[::ffff:10.0.0.1]/", "https://[fe80::1%25eth0]/", "https://2852039166/",
		"https://0xa9.254.169.254/", "https://127.1/", "https://１６９.254.169.254/", "https://registry.test.cdn.test/", "https:cdn.test", "https:///x", "file:///etc/passwd",
		"https://cdn.test/%zz", "\\\\cdn.test\\x", "https://cdn.test:99999/", "https://[64:ff9b::a9fe:a9fe]/", "https://registry.test\x00.cdn.test/", "https://\u212aegistry.test/",
	} {
		for method := range byte(3) {
			f.Add(true, method, to, "https://registry.test/back", public, private)
			f.Add(false, method, to, "http://registry.test/back", private, public)
		}
	}
	f.Add(true, byte(0), "https://cdn.test/", "https://registry.test/", private, metadata)
	f.Add(true, byte(0), "https://cdn.test/", "https://registry.test/", private, unique[:])
	f.Add(true, byte(0), "https://cdn.test/", "https://cdn.test/", public, mapped[:])
	f.Add(true, byte(0), "https://cdn.test/", "https://cdn.test/", metadata, metadata)
	f.Fuzz(func(t *testing.T, tls bool, method byte, one, two string, from, to []byte) {
		at, ok := netip.AddrFromSlice(from)
		other, ok2 := netip.AddrFromSlice(to)
		if !ok || !ok2 || !headerValue(one) || !headerValue(two) {
			return
		}
		n := &fuzzedNet{tls: tls, registry: at, others: other, locations: []string{one, two}}
		n.follow(t, []string{http.MethodGet, http.MethodPut, http.MethodDelete}[method%3])
	})
}

// A fuzzedNet has a registry at one address and all other hosts at another. It records the
// requests.
type fuzzedNet struct {
	tls              bool // the registry is spoken to by TLS
	registry, others netip.Addr
	locations        []string // of the first answers; the next one is final

	mu    sync.Mutex
	asked int
	wrong []string
}

const fuzzedSecret = "Bearer hush-hush"

// follow sends one request with a credential and looks at who was asked for it.
func (n *fuzzedNet) follow(t *testing.T, method string) {
	t.Helper()
	plain, secret := n.dial(false), n.dial(true)
	r := &Remote{
		Client:       &http.Client{Transport: &http.Transport{DialContext: plain, DialTLSContext: secret, DisableKeepAlives: true}},
		PlainHTTP:    func(string) bool { return !n.tls },
		StallTimeout: time.Minute,
	}
	p, err := r.repo(MustParseReference("registry.test/org/model:v1"))
	if err != nil {
		t.Fatal(err)
	}
	p.host.reached(netip.AddrPortFrom(n.registry, 443).String())
	c := &remoteCall{method: method, url: p.url("manifests", "v1"), repo: p}
	res, _, err := p.follow(t.Context(), c, fuzzedSecret)
	if err == nil {
		res.Body.Close()
	} else {
		checkRemoteText(t, p.conceal(err).Error(), 3000)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.wrong) > 0 || n.asked > maxRedirects+1 || n.asked == 0 {
		t.Fatalf("%s %q from %v, others at %v: %d requests, %q", method, n.locations, n.registry, n.others, n.asked, n.wrong)
	}
}

// dial returns a function that connects to a server which answers one request.
func (n *fuzzedNet) dial(tls bool) dialFunc {
	return func(_ context.Context, _, address string) (net.Conn, error) {
		ours := n.tls == tls && address == map[bool]string{true: "registry.test:443", false: "registry.test:80"}[tls]
		at := n.others
		if host, _, err := net.SplitHostPort(address); err == nil && strings.EqualFold(strings.TrimSuffix(host, "."), "registry.test") {
			at = n.registry
			ours = ours || n.tls == tls && strings.HasSuffix(address, map[bool]string{true: ":443", false: ":80"}[tls])
		}
		client, server := net.Pipe()
		go n.serve(server, tls, ours, at)
		return &fuzzedConn{client, net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, 443))}, nil
	}
}

type fuzzedConn struct {
	net.Conn
	to net.Addr
}

func (c *fuzzedConn) RemoteAddr() net.Addr { return c.to }

// serve answers one request and judges whether it was allowed. ours says that it came to the
// registry's origin, and at that it came to this address.
func (n *fuzzedNet) serve(conn net.Conn, tls, ours bool, at netip.Addr) {
	defer conn.Close()
	req, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	judge := func(bad bool, text string) {
		if bad {
			n.wrong = append(n.wrong, text+" "+req.Method+" "+req.Host)
		}
	}
	judge(!ours && req.Header.Get("Authorization") != "", "the credential went to another origin:")
	judge(!ours && req.Method == http.MethodDelete, "another origin was asked to delete:")
	judge(n.tls && !tls, "TLS was given up:")
	judge(!ours && at.Unmap() != n.registry.Unmap() && onlyHere(at) && (!onlyHere(n.registry) || linkLocal(at)), "a private address was asked:")
	status, header := 200, ""
	if n.asked < len(n.locations) {
		status, header = 307, "Location: "+n.locations[n.asked]+"\r\n"
	}
	n.asked++
	fmt.Fprintf(conn, "HTTP/1.1 %d x\r\n%sContent-Length: 0\r\nConnection: close\r\n\r\n", status, header)
}

// onlyHere reports whether an address is not public. It decides in another way than kindOf.
func onlyHere(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	b := a.As16()
	switch {
	case a.Is6() && (b[0] == 0x20 && b[1] == 0x02): // 6to4
		return onlyHere(netip.AddrFrom4([4]byte(b[2:6])))
	case a.Is6() && (string(b[:12]) == "\x00\x64\xff\x9b\x00\x00\x00\x00\x00\x00\x00\x00" || string(b[:6]) == "\x00\x64\xff\x9b\x00\x01"):
		return onlyHere(netip.AddrFrom4([4]byte(b[12:])))
	case a.Is6():
		return !a.IsGlobalUnicast() || a.IsPrivate() || b[0] == 0xfe && b[1]&0xc0 == 0xc0 || strings.Trim(string(b[:12]), "\x00") == "" && onlyHere(netip.AddrFrom4([4]byte(b[12:])))
	}
	q := a.As4()
	return !a.IsGlobalUnicast() || a.IsPrivate() || q[0] == 0 || q[0] >= 240 || q[0] == 100 && q[1]&0xc0 == 64 || q[0] == 192 && q[1] == 0 && q[2] == 0 || q[0] == 198 && q[1]&0xfe == 18
}

// linkLocal reports whether an address is one at which only the registry itself may be.
func linkLocal(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast()
}

// FuzzLink: the next page is on the origin that was asked. It is found with any other text in the
// field.
func FuzzLink(f *testing.F) {
	for _, s := range []string{
		``, `</v2/org/model/tags/list?last=a>; rel="next"`, `<?n=2>; rel=next`, `<https://registry.test/x>; rel="next"`, `<https://REGISTRY.test:443/x>; rel="next"`,
		`<https://other.test/x>; rel="next"`, `<//other.test/x>; rel=next`, `<http://registry.test/x>; rel=next`, `<https://registry.test:444/x>; rel=next`,
		`<https://u:p@registry.test/x>; rel=next`, `<https://registry.test@other.test/x>; rel=next`, `<\\other.test/x>; rel=next`, `</\other.test/x>; rel=next`,
		`<a>; rel="prev", <b>; rel="next"`, `<a>; title="x, <https://other.test>; rel=next"; rel="prev", <b>; rel="prev next"`, `<a>; rel="next`, `<a>rel=next`, `<a`,
		`<a>; REL=NEXT`, `<a>; rel=prev; rel=next`, `<javascript:x>; rel=next`, `<https:x>; rel=next`, `<https://registry.test./x>; rel=next`,
		"<https://\u212aegistry.test/x>; rel=next", "<\x00>; rel=next", "<%zz?hush>; rel=next", `<` + strings.Repeat("x", 300) + `>; rel=next`, `<a b>; rel="next"`, `<#f>; rel=next`,
	} {
		f.Add(s, s, "title, of; a \"page\"")
	}
	at, err := url.Parse("https://registry.test/v2/org/model/tags/list?n=100")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, one, two, title string) {
		u, err := nextPage(at, http.Header{"Link": {one, two}})
		switch {
		case err != nil:
			if u != nil || !errors.Is(err, ErrProtocol) {
				t.Fatalf("%v, %v", u, err)
			}
			checkRemoteText(t, err.Error(), 1000)
		case u == nil:
		default:
			checkNextPage(t, at, u)
			// The same target is found with any other text in the field.
			if !headerValue(title) || strings.Contains(u.String(), ">") || len(title)+len(u.String()) > 2000 {
				return
			}
			quoted := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(title)
			field := fmt.Sprintf(`<https://other.test/>; rel="prev"; title="%s", <%s>; title="%s"; rel="next last"`, quoted, u, quoted)
			if again, err := nextPage(at, http.Header{"Link": {field}}); err != nil || again == nil || again.String() != u.String() {
				t.Fatalf("%q leads to %v, %v", field, again, err)
			}
		}
	})
}

func checkNextPage(t *testing.T, at, u *url.URL) {
	t.Helper()
	if u.Scheme != at.Scheme || !strings.EqualFold(strings.TrimSuffix(u.Hostname(), "."), at.Hostname()) || cmp.Or(u.Port(), "443") != "443" {
		t.Fatalf("leads to another origin: %q", u)
	}
	if u.User != nil || u.Fragment != "" || u.Opaque != "" {
		t.Fatalf("leads to %#v", u)
	}
}

// headerValue reports whether net/http accepts a text as the value of a header field.
func headerValue(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < 0x20 && c != '\t' || c == 0x7f })
}

// FuzzContentRange: a Content-Range that is accepted lies within the content.
func FuzzContentRange(f *testing.F) {
	for _, s := range []string{
		"", "bytes 5-9/10", "bytes 5-9/*", "bytes 5-9/11", "bytes 5-10/10", "bytes 4-9/10", "bytes 9-5/10", "bytes 5-4/10", "bytes */10", "bytes 5-/10", "bytes -5/10",
		"bytes=5-9", "bytes +5-+9/+10", "bytes 5-9223372036854775807/9223372036854775808", "bytes 5-18446744073709551615/10", "bytes 5 - 9 / 10", "bytes 5-9/10/10", "bytes 5-9/1_0",
		"0-9", "0-0", "bytes=0-9", "1-9", "0-", "0--1", "0-9223372036854775807", "0-9223372036854775806", "0-9223372036854775808", "0-9,11-12", "0-9\x00", "0-00", "16777216",
		"bytes 5-9/10\x1b[31m", strings.Repeat("9", 300),
	} {
		f.Add(s, int64(5), int64(10))
		f.Add(s, int64(1), int64(1))
		f.Add(s, int64(5), int64(math.MaxInt64))
	}
	f.Fuzz(func(t *testing.T, text string, from, size int64) {
		if size >= 0 && from >= 0 && from < size {
			end, err := checkContentRange(text, from, size)
			switch {
			case err != nil:
				if end != 0 || !errors.Is(err, ErrProtocol) {
					t.Fatalf("%d, %v", end, err)
				}
				checkRemoteText(t, err.Error(), 1500)
			case end <= from || end > size:
				t.Fatalf("%q: bytes %d to %d of %d", text, from, end, size)
			case !rangeSays(text, from, end, size):
				t.Fatalf("%q is read as bytes %d to %d of %d", text, from, end, size)
			default:
				for _, printed := range []string{fmt.Sprintf("bytes %d-%d/%d", from, end-1, size), fmt.Sprintf("bytes %d-%d/*", from, end-1)} {
					if again, err := checkContentRange(printed, from, size); err != nil || again != end {
						t.Fatalf("%q ends at %d, %v", printed, again, err)
					}
				}
			}
		}
		if size >= 0 {
			checkFuzzedChunk(t, text, size)
		}
	})
}

// rangeSays reads a Content-Range in another way than the package.
func rangeSays(text string, from, end, size int64) bool {
	var a, b, total int64
	n, _ := fmt.Sscanf(text, "bytes %d-%d/%d", &a, &b, &total)
	return a == from && b == end-1 && (n == 3 && total == size || n == 2 && strings.HasSuffix(text, "/*"))
}

// checkFuzzedChunk looks at the Range of an answer to a chunk, with which an upload may get as far
// as size.
func checkFuzzedChunk(t *testing.T, text string, size int64) {
	t.Helper()
	at := size / 2
	end, ok := rangeEnd(text, at, size-at)
	if !ok {
		return
	}
	if end <= at || end > size {
		t.Fatalf("%q: the upload is at %d, after bytes %d to %d", text, end, at, size)
	}
	if again, ok := rangeEnd(fmt.Sprintf("0-%d", end-1), at, size-at); !ok || again != end {
		t.Fatalf("%d is read as %d, %v", end, again, ok)
	}
}

// FuzzErrorBody: an error has only a short part of an answer, and no secret that was sent.
func FuzzErrorBody(f *testing.F) {
	for _, b := range []string{
		``, `{}`, `{"errors":[]}`, `{"errors":[{"code":"DENIED","message":"no"}]}`, `{"errors":[{"code":"DENIED","message":"you sent hush-hush"}]}`,
		`{"errors":[{"code":"hush-hush","message":"\u001b[31m\u202e\ud800"}]}`, `{"errors":[{"code":"A","message":"hush\u0000hush"}]}`, `{"errors":{"code":"A"}}`,
		`{"errors":[{"code":"MANIFEST_UNKNOWN","detail":{"a":[1,2,3]}}],"ERRORS":[{"code":"TOOMANYREQUESTS"}]}`, `<html>`, `[[[[[[`, `{"errors":null}`,
		`{"errors":[` + strings.Repeat(`{"code":"A"},`, 11) + `{}]}`, `{"errors":[{"code":"A","message":"` + strings.Repeat("hush-hus", 40) + `"}]}`,
	} {
		f.Add([]byte(b), 404, "10", "hush-hush")
		f.Add([]byte(b), 400, "Fri, 31 Dec 9999 23:59:59 GMT", "hush?hush")
	}
	f.Add([]byte(`{"errors":[{"code":"A","message":"p\u00e4ssword p%C3%A4ss\"word"}]}`), 503, "99999999999999999999", "pässword")
	f.Add([]byte(``), 429, "-5", "x")
	u := &url.URL{Scheme: "https", Host: "registry.test", Path: "/v2/org/model/manifests/v1", RawQuery: "sig=hush-hush", User: url.UserPassword("me", "hush-hush")}
	p, err := (&Remote{}).repo(MustParseReference("registry.test/org/model:v1"))
	if err != nil {
		f.Fatal(err)
	}
	sentinels := []error{ErrNotFound, ErrUnauthorized, ErrDenied, ErrRateLimited, ErrTooLarge, ErrRejected, ErrProtocol, ErrTransport, errors.ErrUnsupported}
	f.Fuzz(func(t *testing.T, body []byte, status int, retryAfter, secret string) {
		if strings.ContainsAny(secret, "[]") || strings.Contains("[secret]", secret) {
			secret = "hush-hush" // that one can't be told from its replacement
		}
		secrets := spellings([]string{secret})
		res := &http.Response{StatusCode: status, Request: &http.Request{Method: "GET", URL: u}, Header: http.Header{"Retry-After": {retryAfter}}, Body: io.NopCloser(strings.NewReader(string(body)))}
		p.shown = []string{secret}
		e := p.answerError(&remoteCall{}, res)
		if len(e.Codes) > 10 || e.RetryAfter < 0 || e.RetryAfter > maxServerWait {
			t.Fatalf("%d codes, %v", len(e.Codes), e.RetryAfter)
		}
		if n := len(slices.DeleteFunc(slices.Clone(sentinels), func(s error) bool { return !errors.Is(e, s) })); n != 1 {
			t.Fatalf("%v matches %d sentinels", e, n)
		}
		if wait, again := DefaultRetry(1, e); again && (!e.Temporary() || wait <= 0 || wait > maxRetryWait+time.Second) {
			t.Fatalf("%v again after %v", e, wait)
		}
		texts := []string{e.Error(), e.URL}
		for _, c := range e.Codes {
			texts = append(texts, c.Code, c.Message)
			checkRemoteText(t, c.Code+c.Message, 2*(200+len("…")))
		}
		// The body as the cause of an error, as net/http quotes what it can't read.
		quoting := &RemoteError{Method: "GET", URL: publicURL(u), Err: fmt.Errorf("%w: malformed line %s", ErrTransport, body)}
		quoting.clean(secrets)
		texts = append(texts, quoting.Error())
		if !errors.Is(quoting, ErrTransport) {
			t.Fatal("the cause is lost")
		}
		for _, text := range texts {
			checkRemoteText(t, text, 8<<10)
			if strings.Contains(text, "sig=") || len(secret) >= 4 && strings.Contains(strings.ReplaceAll(text, u.Path, ""), secret) && !strings.Contains(quoting.Method+ErrTransport.Error()+"registry answered malformed line", secret) {
				t.Fatalf("%q is in %q", secret, text)
			}
		}
	})
}

// FuzzDockerConfig: a credential is returned only for the host and the repository that its entry
// names. No message quotes the file.
func FuzzDockerConfig(f *testing.F) {
	auth := base64.StdEncoding.EncodeToString([]byte("me:hush-hush"))
	for _, doc := range []string{
		``, `{}`, `null`, `[]`, `{"auths":null}`, `{"auths":{"r.test":{"auth":"` + auth + `"}}}`, `{"auths":{"r.test:5000":{"auth":"` + auth + `"}}}`,
		`{"auths":{"https://r.test/v1/":{"auth":"` + auth + `"},"r.test/org":{"username":"o","password":"hush-hush"}}}`, `{"auths":{"r.test.evil.test":{"identitytoken":"hush-hush"}}}`,
		`{"auths":{"https://index.docker.io/v1/":{"registrytoken":"hush-hush"}}}`, `{"auths":{"r.test":{"auth":"hush-hush"}}}`, `{"auths":{"r.test":{"auth":["hush-hush"]}}}`,
		`{"auths":{"r.test":{"auth":"hush-hush`, `{"auths":{"r.test/org/model":{}},"credsStore":"none"}`, `{"credHelpers":{"r.test":"../../hush-hush"}}`, `{"credHelpers":{"r.test":"x"}}`,
		`{"credsStore":"` + strings.Repeat("x", 400) + `"}`, `{"credsStore":"\u001b[31m"}`, `{"Auths":{"R.TEST":{"AUTH":"` + auth + `"}}}`, `{"auths":{"":{"auth":"` + auth + `"}}}`,
		`{"auths":{"http://r.test":{"auth":"bm8gY29sb24="}}}`, `{"auths":{"r.test":{"username":"a\u001b[31m:b\r\n","password":"hush-hush"}}}`, `{"auths":{"r.test/v2":{"auth":"` + auth + `"}}}`,
		`{"auths":{"r.test/org/mode":{"auth":"` + auth + `"},"r.test/or":{"auth":"` + auth + `"}}}`,
	} {
		f.Add([]byte(doc), "r.test/org/model")
		f.Add([]byte(doc), "r.test:5000/v2/")
		f.Add([]byte(doc), "org/model")
	}
	f.Setenv("PATH", f.TempDir()) // no helper is found
	f.Fuzz(func(t *testing.T, raw []byte, name string) {
		ref, err := ParseReference(name + ":v1")
		if err != nil || len(raw) > 64<<10 {
			return
		}
		doc, err := parseCredentialFile(raw)
		if err != nil {
			checkFuzzedCredentialError(t, raw, err)
			return
		}
		c, err := doc.find(t.Context(), ref.Registry(), ref.Repository())
		if err != nil {
			if !c.anonymous() {
				t.Fatalf("credential beside %v", err)
			}
			checkFuzzedCredentialError(t, raw, err)
			return
		}
		if c.anonymous() && (helperName(doc.store) != "" || helperName(doc.helpers[ref.Registry()]) != "") {
			t.Fatal("a helper that isn't there was asked, and had no error")
		}
		if !c.anonymous() && !slices.ContainsFunc(slices.Collect(maps.Keys(doc.auths)), func(key string) bool {
			var entry credentialEntry
			if json.Unmarshal(doc.auths[key], &entry) != nil {
				return false
			}
			e, err := entry.credential()
			return err == nil && e == c && credentialKeyFits(key, ref)
		}) {
			t.Fatalf("%s gets a credential that isn't its own", ref)
		}
		checkFuzzedCredential(t, c)
	})
}

// credentialKeyFits reports whether a name in the file is that of a reference's registry, or of a
// path above it.
func credentialKeyFits(key string, ref Reference) bool {
	if scheme, rest, ok := strings.Cut(key, "://"); ok {
		key = strings.ToLower(scheme) + "://" + rest
	}
	address := strings.HasPrefix(key, "https://") || strings.HasPrefix(key, "http://")
	host, path, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://"), "/")
	if host = strings.ToLower(host); strings.HasPrefix(key, "https://") {
		host = strings.TrimSuffix(host, ":443")
	} else if address {
		host = strings.TrimSuffix(host, ":80")
	}
	if ref.Registry() == registryDockerHub && slices.Contains([]string{"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com", "hub.docker.com"}, host) {
		host = registryDockerHub
	}
	if name, err := ParseReference(host + "/x:v1"); host != ref.Registry() && (err != nil || name.Registry() != ref.Registry()) {
		return false
	}
	path = strings.Trim(path, "/")
	if path == "" || path == "v1" || path == "v2" || address && (strings.HasPrefix(path, "v1/") || strings.HasPrefix(path, "v2/")) {
		return true
	}
	return strings.HasPrefix(ref.Repository()+"/", path+"/")
}

// checkFuzzedCredentialError: an error quotes nothing of the file except the name of a helper.
func checkFuzzedCredentialError(t *testing.T, raw []byte, err error) {
	t.Helper()
	checkRemoteText(t, err.Error(), 600)
	if strings.Contains(err.Error(), "hush-hush") && !errors.Is(err, ErrInvalidArgument) && !strings.Contains(err.Error(), "docker-credential-") {
		t.Fatalf("secret of %q in %v", raw, err)
	}
}

// checkFuzzedCredential: however a credential is printed, only its user and its source appear.
func checkFuzzedCredential(t *testing.T, c Credential) {
	t.Helper()
	j, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	open := Credential{Username: c.Username, Password: "x"}
	for _, text := range []string{fmt.Sprintf("%v", c), fmt.Sprintf("%+v", &c), fmt.Sprintf("%#v", c)} {
		checkRemoteText(t, text, 2000)
		if !c.anonymous() && text != open.String() {
			t.Fatalf("printed: %q", text)
		}
	}
	if len(j) > 4000 {
		t.Fatalf("JSON of %d bytes", len(j))
	}
}
