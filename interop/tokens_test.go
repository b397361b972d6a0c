package interop_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	tokenIssuer, tokenService = "interop issuer", "interop registry"
	// identityToken is what an OAuth2 client may send in the place of a password.
	identityToken = "identity-of-alice"
)

// A tokenServer issues the bearer tokens of the distribution project's token
// specification: by GET with basic authentication, and by POST as OAuth2. User
// alice gets all that is asked for; everybody else may pull below public/.
type tokenServer struct {
	url      string
	key      *ecdsa.PrivateKey
	cert     []byte // in DER, for the header x5c
	certFile string

	mu       sync.Mutex
	requests []tokenRequest
}

// A tokenRequest is what was asked of a tokenServer.
type tokenRequest struct {
	method, user string
	scopes       []string
	granted      bool
}

// An access is one entry of a token's list of what it allows.
type access struct {
	Type    string   `json:"type"`
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

func newTokenServer(t *testing.T, p *pki) *tokenServer {
	t.Helper()
	now := time.Now()
	ts := &tokenServer{key: newKey(t)}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: tokenIssuer},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	ts.cert = sign(t, cert, cert, ts.key, ts.key)
	ts.certFile = writeFile(t, "token.pem", pemOf("CERTIFICATE", ts.cert))
	srv := httptest.NewUnstartedServer(ts)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{p.cert}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	// By name, as the registry: go-containerregistry refuses a realm at a
	// loopback address wherever the registry is, and oras one at another name.
	ts.url = strings.Replace(srv.URL, "127.0.0.1", "localhost", 1) + "/token"
	return ts
}

// config is the registry's part of the configuration.
func (ts *tokenServer) config() string {
	return "auth:\n  token:\n    realm: " + ts.url + "\n    service: " + tokenService +
		"\n    issuer: " + tokenIssuer + "\n    rootcertbundle: " + ts.certFile + "\n"
}

func (ts *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	who, form, ok := identify(r)
	var scopes []string
	for _, s := range form["scope"] {
		scopes = append(scopes, strings.Fields(s)...)
	}
	ok = ok && r.URL.Path == "/token" && form.Get("service") == tokenService
	ts.mu.Lock()
	ts.requests = append(ts.requests, tokenRequest{method: r.Method, user: who, scopes: scopes, granted: ok})
	ts.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusUnauthorized)
		w.Write([]byte(`{"errors":[{"code":"UNAUTHORIZED","message":"no such user, password or service"}]}`))
		return
	}
	token, err := ts.token(who, scopes)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer := map[string]any{"access_token": token, "expires_in": 300, "issued_at": time.Now().UTC().Format(time.RFC3339)}
	if r.Method == http.MethodGet {
		answer["token"] = token
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}

// identify tells who asks: "" for an anonymous request.
func identify(r *http.Request) (who string, form url.Values, ok bool) {
	switch r.Method {
	case http.MethodGet:
		name, secret, given := r.BasicAuth()
		return name, r.URL.Query(), !given || name == user && secret == password
	case http.MethodPost:
		if err := r.ParseForm(); err != nil {
			return "", nil, false
		}
		switch f := r.PostForm; f.Get("grant_type") {
		case "refresh_token":
			return user, f, f.Get("refresh_token") == identityToken
		case "password":
			return f.Get("username"), f, f.Get("username") == user && f.Get("password") == password
		}
	}
	return "", nil, false
}

// token makes a JSON web token that allows what who may do of scopes.
func (ts *tokenServer) token(who string, scopes []string) (string, error) {
	list := []access{}
	for _, s := range scopes {
		kind, rest, _ := strings.Cut(s, ":")
		at := strings.LastIndex(rest, ":")
		if at < 0 {
			continue
		}
		a := access{Type: kind, Name: rest[:at], Actions: strings.Split(rest[at+1:], ",")}
		if who != user {
			if !strings.HasPrefix(a.Name, "public/") || !slices.Contains(a.Actions, "pull") {
				continue
			}
			a.Actions = []string{"pull"}
		}
		list = append(list, a)
	}
	now := time.Now()
	header, err := json.Marshal(map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(ts.cert)}})
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(map[string]any{
		"iss": tokenIssuer, "sub": who, "aud": tokenService, "jti": rand.Text(),
		"iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(5 * time.Minute).Unix(), "access": list,
	})
	if err != nil {
		return "", err
	}
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, ts.key, sum[:])
	if err != nil {
		return "", err
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}
