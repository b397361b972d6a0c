// An internet on loopback: invented host names and addresses, TLS, registries and token servers that
// keep a log of requests, so that tests can check which host saw a secret.

package ocilocal_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// Every secret of these tests contains "hush". Nothing else does.
const (
	secretPassword = "hush/pass+word"
	secretRefresh  = "hush-refresh+token"
	secretToken    = "hush-token-"
)

var secretTexts = []string{"hush", "HUSH", base64.StdEncoding.EncodeToString([]byte("me:" + secretPassword)),
	base64.StdEncoding.EncodeToString([]byte(secretPassword))}

// secretIn returns the secret that a text holds, "" if it holds none.
func secretIn(text string) string {
	for _, s := range secretTexts {
		if strings.Contains(text, s) {
			return s
		}
	}
	return ""
}

// An internet has hosts with invented names and addresses, each a server on loopback that records
// its requests.
type internet struct {
	t        testing.TB
	cert     tls.Certificate
	roots    *x509.CertPool
	sites    map[string]*site // by host:port
	plain    []string         // hosts that are reached without TLS
	warnings []string
	failures []error // the errors that the retry policy saw
	mu       sync.Mutex
}

// A site is one origin.
type site struct {
	*httptest.Server
	ip string // where it seems to be

	mu       sync.Mutex
	dials    int
	requests []string // whole, with headers and body
}

func newInternet(t testing.TB) *internet {
	t.Helper()
	in := &internet{t: t, sites: map[string]*site{}, roots: x509.NewCertPool()}
	in.cert = certificate(t, "registry.test", "*.test", "*.registry.test", "*.evil.test", "*.test.evil.test", "*.other.test", "localhost")
	in.roots.AddCert(in.cert.Leaf)
	return in
}

// certificate returns a self-signed certificate for names.
func certificate(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key, Leaf: leaf}
}

// site makes an origin such as "https://cdn.test", which seems to be at ip.
func (in *internet) site(origin, ip string, h http.Handler) *site {
	in.t.Helper()
	u, err := url.Parse(origin)
	if err != nil {
		in.t.Fatal(err)
	}
	s := &site{ip: ip}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.note(r)
		h.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if u.Scheme == "https" {
		s.EnableHTTP2 = true
		s.TLS = &tls.Config{Certificates: []tls.Certificate{in.cert}}
		s.StartTLS()
	} else {
		s.Start()
	}
	in.t.Cleanup(s.Close)
	in.sites[hostPort(u)] = s
	return s
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// note records a request. It reads a small body and puts it back.
func (s *site) note(r *http.Request) {
	head, _ := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), r.Body), r.Body}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s\n", r.Method, r.RequestURI)
	r.Header.Write(&b)
	b.Write(head)
	text := b.String()
	if unescaped, err := url.QueryUnescape(text); err == nil {
		text += "\n" + unescaped
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, text)
}

func (s *site) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// registry is a site with a registry.
func (in *internet) registry(origin, ip string) *server {
	s := unservedServer(in.t)
	scheme, host, _ := strings.Cut(origin, "://")
	if s.host = host; scheme == "http" {
		in.plain = append(in.plain, host)
	}
	s.Server = &httptest.Server{URL: origin}
	in.site(origin, ip, s)
	return s
}

// dial leads to the site with that name. A literal address leads to a site of that address.
func (in *internet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	s := in.sites[strings.ToLower(address)]
	if s == nil {
		host, _, _ := net.SplitHostPort(address)
		return nil, &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}}
	}
	s.mu.Lock()
	s.dials++
	s.mu.Unlock()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.Listener.Addr().String())
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(address)
	at, err := netip.ParseAddrPort(net.JoinHostPort(s.ip, port))
	return &farConn{conn, net.TCPAddrFromAddrPort(at)}, err
}

// A farConn seems to lead to another address.
type farConn struct {
	net.Conn
	to net.Addr
}

func (c *farConn) RemoteAddr() net.Addr { return c.to }

// remote is a client in this internet, with a credential for one registry.
func (in *internet) remote(host string, cred ocilocal.Credential) *ocilocal.Remote {
	r := &ocilocal.Remote{
		Client: &http.Client{Transport: &http.Transport{
			DialContext: in.dial, ForceAttemptHTTP2: true, DisableCompression: true,
			TLSClientConfig: &tls.Config{RootCAs: in.roots},
		}},
		PlainHTTP: func(host string) bool {
			return slices.Contains(in.plain, host)
		},
		Retry: func(attempt int, err error) (time.Duration, bool) {
			in.mu.Lock()
			in.failures = append(in.failures, err)
			in.mu.Unlock()
			return quick(attempt, err)
		},
		Warn: func(host, text string) {
			in.mu.Lock()
			in.warnings = append(in.warnings, host+" "+text)
			in.mu.Unlock()
		},
	}
	if host != "" {
		r.Credentials = ocilocal.StaticCredential(host, cred)
	}
	in.t.Cleanup(r.CloseIdleConnections)
	return r
}

// noSecretSeen fails if any other site saw a secret.
func (in *internet) noSecretSeen(but ...string) {
	in.t.Helper()
	for name, s := range in.sites {
		if slices.Contains(but, name) {
			continue
		}
		for _, r := range s.asked() {
			if secretIn(r) != "" {
				in.t.Errorf("%s was shown a secret:\n%s", name, r)
			}
		}
	}
}

// quiet fails if an error, one that the retry policy saw, or a warning contains a secret or a
// character that controls a terminal.
func (in *internet) quiet(err error) {
	in.t.Helper()
	in.mu.Lock()
	defer in.mu.Unlock()
	texts := slices.Clone(in.warnings)
	for _, err := range append(slices.Clone(in.failures), err) {
		texts = append(texts, errorTexts(err)...)
	}
	for _, text := range texts {
		checkText(in.t, text)
	}
}

func checkText(t testing.TB, text string) {
	t.Helper()
	if secretIn(text) != "" {
		t.Errorf("secret in %q", text)
	}
	if i := strings.IndexFunc(text, func(c rune) bool { return c < 0x20 || 0x7f <= c && c < 0xa0 || c == '\u202e' }); i >= 0 {
		t.Errorf("control character in %q", text[max(i-40, 0):])
	}
	if len(text) > 8<<10 {
		t.Errorf("%d bytes of error: %.300q", len(text), text)
	}
}

// errorTexts returns the forms in which an error gets into logs.
func errorTexts(err error) (texts []string) {
	if err == nil {
		return nil
	}
	texts = append(texts, err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%#v", err))
	if e, ok := errors.AsType[*ocilocal.RemoteError](err); ok {
		texts = append(texts, fmt.Sprintf("%#v", e), fmt.Sprintf("%+v", *e), e.URL, e.Err.Error())
	}
	return append(texts, chainTexts(err)...)
}

// chainTexts returns the texts of all errors that an error wraps.
func chainTexts(err error) (texts []string) {
	var next []error
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		next = []error{e.Unwrap()}
	case interface{ Unwrap() []error }:
		next = e.Unwrap()
	}
	for _, err := range next {
		if err != nil {
			texts = append(texts, err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%#v", err))
			texts = append(texts, chainTexts(err)...)
		}
	}
	return texts
}

// mustFail checks an error that a hostile server has caused. It must match want.
func mustFail(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
	for _, text := range errorTexts(err) {
		checkText(t, text)
	}
}

// nothingIn fails unless a registry is sound and empty. It closes r.
func nothingIn(t testing.TB, r *ocilocal.LocalRegistry) {
	t.Helper()
	for ref, err := range r.Refs(t.Context(), nil) {
		t.Errorf("published: %v, %v", ref, err)
	}
	for p, err := range r.Verify(t.Context(), nil) {
		t.Errorf("problem: %v, %v", p, err)
	}
	if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if tt, ok := t.(*testing.T); ok {
		checkCollected(tt, r.Root(), model{})
	}
}

// allocated returns how many bytes the process allocates while fn runs. So a test that uses it must
// not be parallel.
func allocated(fn func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// base returns the server's origin.
func (s *server) base(t testing.TB) *url.URL {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// gzipAnswer answers with a coded body, which the client did not ask for.
func gzipAnswer(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		io.WriteString(z, body)
		z.Close()
	}
}
