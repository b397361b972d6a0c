package interop_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/olareg/olareg"
	olaregconfig "github.com/olareg/olareg/config"
	"golang.org/x/crypto/bcrypt"
)

const user, password = "alice", "correct horse"

// A server is a registry on loopback that lives as long as its test.
type server struct {
	name string
	host string // localhost with TLS, 127.0.0.1 without, and the port
	tls  bool
	auth bool // it wants user and password
	// artifactManifests tells whether it takes OCI artifact manifests.
	artifactManifests bool
	// referrers tells whether it has the referrers API.
	referrers bool
	pki       *pki
	tokens    *tokenServer // nil if it doesn't need one
}

// url is the server's address.
func (s *server) url() string {
	if s.tls {
		return "https://" + s.host
	}
	return "http://" + s.host
}

// servers starts a registry of each kind.
var servers = map[string]func(t *testing.T) *server{
	"docker-registry with htpasswd": func(t *testing.T) *server {
		s := &server{tls: true, auth: true, pki: newPKI(t)}
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		file := writeFile(t, "htpasswd", []byte(user+":"+string(hash)+"\n"))
		return s.distribution(t, "docker-registry", "auth:\n  htpasswd:\n    realm: interop\n    path: "+file+"\n")
	},
	"docker-registry with tokens": func(t *testing.T) *server {
		s := &server{tls: true, auth: true, pki: newPKI(t)}
		s.tokens = newTokenServer(t, s.pki)
		return s.distribution(t, "docker-registry", s.tokens.config())
	},
	"distribution 3": func(t *testing.T) *server {
		return (&server{}).distribution(t, "registry3", "")
	},
	"distribution 3 with tokens": func(t *testing.T) *server {
		s := &server{tls: true, auth: true, pki: newPKI(t)}
		s.tokens = newTokenServer(t, s.pki)
		return s.distribution(t, "registry3", s.tokens.config())
	},
	"go-containerregistry": func(t *testing.T) *server {
		handler := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
		return inProcess(t, &server{artifactManifests: true, referrers: true}, handler)
	},
	"olareg": func(t *testing.T) *server {
		enabled := true
		o := olareg.New(olaregconfig.Config{
			Storage: olaregconfig.ConfigStorage{StoreType: olaregconfig.StoreDir, RootDir: t.TempDir()},
			API:     olaregconfig.ConfigAPI{DeleteEnabled: &enabled},
			Log:     slog.New(slog.DiscardHandler),
		})
		t.Cleanup(func() {
			if err := o.Close(); err != nil {
				t.Error(err)
			}
		})
		return inProcess(t, &server{referrers: true}, o)
	},
	"ocilocal": func(t *testing.T) *server {
		return inProcess(t, &server{artifactManifests: true, referrers: true}, newRegistry(t).Handler(nil))
	},
}

// eachServer runs a test against every kind of registry.
func eachServer(t *testing.T, test func(t *testing.T, s *server)) {
	for name, start := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t)
			s.name = name
			test(t, s)
		})
	}
}

func inProcess(t *testing.T, s *server, h http.Handler) *server {
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	s.host = srv.Listener.Addr().String()
	return s
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// distribution starts a program that takes the distribution project's configuration.
func (s *server) distribution(t *testing.T, program, auth string) *server {
	t.Helper()
	path := need(t, program)
	config := "version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\n" +
		"storage:\n  filesystem: {rootdirectory: " + t.TempDir() + "}\n  delete: {enabled: true}\n" +
		"http:\n  addr: 127.0.0.1:0\n"
	if s.tls {
		config += "  tls: {certificate: " + s.pki.certFile + ", key: " + s.pki.keyFile + "}\n"
	}
	cmd := exec.Command(path, "serve", writeFile(t, "config.yml", []byte(config+auth)))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "OTEL_TRACES_EXPORTER=none"}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	ended := make(chan []string)
	go func() { // reads on to the end, so that the program never waits for its log
		defer close(ended)
		defer close(address)
		var lines []string
		for sc := bufio.NewScanner(stderr); sc.Scan(); {
			if m := listening.FindStringSubmatch(sc.Text()); m != nil {
				address <- m[1]
			}
			lines = append(lines, sc.Text())
		}
		ended <- lines
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		if lines := <-ended; t.Failed() {
			t.Logf("the log of %s ends:\n%s", program, strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
		cmd.Wait()
	})
	select {
	case s.host = <-address:
	case <-time.After(time.Minute):
	}
	if s.host == "" {
		t.Fatalf("%s did not begin to listen", program)
	}
	if s.tls {
		s.host = strings.Replace(s.host, "127.0.0.1", "localhost", 1)
	}
	return s
}

// login lets the tools of a box use a server.
func (b *box) login(s *server) {
	b.t.Helper()
	config := map[string]any{}
	if s.auth {
		auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
		config["auths"] = map[string]any{s.host: map[string]string{"auth": auth}}
	}
	text, err := json.Marshal(config)
	if err != nil {
		b.t.Fatal(err)
	}
	b.write(b.configFile, string(text))
	if s.tls {
		b.setenv("SSL_CERT_FILE", s.pki.caFile)
	}
}

func writeFile(t *testing.T, name string, content []byte) string {
	t.Helper()
	name = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// A pki is a certificate authority and a certificate of its for loopback.
type pki struct {
	caFile, certFile, keyFile string
	cert                      tls.Certificate
	roots                     *x509.CertPool
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	now := time.Now()
	caKey, key := newKey(t), newKey(t)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "interop test authority"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER := sign(t, ca, ca, caKey, caKey)
	leafDER := sign(t, leaf, ca, key, caKey)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{
		caFile:   writeFile(t, "ca.pem", pemOf("CERTIFICATE", caDER)),
		certFile: writeFile(t, "cert.pem", pemOf("CERTIFICATE", leafDER)),
		keyFile:  writeFile(t, "key.pem", pemOf("PRIVATE KEY", keyDER)),
		cert:     tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: key},
		roots:    x509.NewCertPool(),
	}
	parsed, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	p.roots.AddCert(parsed)
	return p
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t *testing.T, cert, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// client is an HTTP client that trusts the server's authority.
func (s *server) client() *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if s.tls {
		transport.TLSClientConfig = &tls.Config{RootCAs: s.pki.roots}
	}
	return &http.Client{Transport: transport}
}

// request sends a request without credentials.
func (s *server) request(t *testing.T, method, path, contentType, body string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.url()+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := s.client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp
}
