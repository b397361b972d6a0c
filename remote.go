package ocilocal

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// Limits on content from a remote registry. Content that passes one is [ErrTooLarge]. If no honest
// registry would pass the limit, it is [ErrProtocol].
const (
	maxErrorBody  = 8 << 10   // of an error's body; the rest is not read
	maxTokenBody  = 128 << 10 // a token of maxTokenLen in a document
	maxTokenLen   = 64 << 10
	maxRedirects  = 5
	maxRetries    = 5
	maxPages      = 1000
	maxHeaderSize = 256 << 10
	maxWarnings   = 1000 // distinct ones; further ones are dropped
	maxRemembered = 1000 // challenges, tokens and hosts that are kept
)

// A Remote is a client of registries that speak the OCI distribution-spec 1.1, or Docker's older
// form of it. The zero value works: it is anonymous, and speaks https to all hosts except loopback.
// Once a Remote is in use, its fields must not change, and it must not be copied. It is safe for
// concurrent use. Share one, since it keeps tokens and connections.
//
// A credential goes to two places only. One is the registry that it is for. The other is the token
// server that this registry names, if its address is https, and public or of the registry's own
// kind. A credential never follows a redirect, an upload location or a link to another scheme, host
// or port.
type Remote struct {
	// Client makes the requests. Its transport, timeout and cookie jar are used, and its
	// CheckRedirect is not. Nil means a transport of this Remote, with proxies from the
	// environment. A Client.Timeout would include the reading of whole blobs, so StallTimeout is
	// better.
	Client *http.Client
	// Credentials is asked at most once per call, when a registry wants a credential. Nil means
	// anonymous. If it fails, the call goes on without a credential. If the registry then refuses,
	// the error of the call includes this failure.
	Credentials CredentialFunc
	// SendCredentials reports whether credentials go to host ("ghcr.io") with the first request. By
	// default a request is anonymous until the registry asks for credentials. Some registries never
	// ask: they answer 403, 404 or 429, or a shorter list, to anonymous requests. Nil means none.
	SendCredentials func(host string) bool
	// PlainHTTP reports whether host ("localhost:5000") is spoken to without TLS. Nil means
	// loopback only: localhost, 127.0.0.0/8 and [::1].
	PlainHTTP func(host string) bool
	// AllowAddress reports whether the named registry may send requests to addr, an address that is
	// not public: for a token, or by a redirect or an upload location. It is not asked about the
	// addresses that a registry may use anyway: its own address, and addresses of the same kind
	// (private, loopback, 100.64.0.0/10, 198.18.0.0/15, 240.0.0.0/4). It must be safe for
	// concurrent use. Nil allows none.
	AllowAddress func(registry string, addr netip.Addr) bool
	// Mirrors lists the mirrors of registries, by the host that references name: "docker.io",
	// "ghcr.io".
	//
	// [LocalRegistry.Pull], [LocalRegistry.Load], [LocalRegistry.Repair], [Remote.Manifest] and
	// [Remote.Resolve] ask a registry's mirrors before the registry, in this order: for blobs and
	// for manifests by digest, which the digest proves, and for tags if [Mirror.Tags] is set. After
	// any failure of a mirror, a 404 included, the next one is asked, and last the registry. So a
	// mirror never makes a call fail, and never says that something is absent. A mirror that gives
	// no answer, or a wrong one, is not asked for a minute.
	//
	// All other calls ask only the registry. Nothing is ever pushed to a mirror. Credentials,
	// SendCredentials, PlainHTTP and AllowAddress are asked about the mirror's host; the registry's
	// credentials don't reach it. A mirror gets the registry's host as the query parameter ns, so
	// one mirror can serve several registries.
	//
	// A list here is like registry-mirrors of dockerd with {"docker.io": {{Location: …, Tags:
	// true}}}, like the [host] tables of containerd's hosts.toml without the capability "push"
	// (Tags is "resolve"), and like [[registry.mirror]] of containers-registries.conf with
	// pull-from-mirror = "digest-only" (Tags: "all").
	Mirrors map[string][]Mirror
	// Retry decides whether and when a failed request is repeated. Nil means [DefaultRetry].
	Retry RetryFunc
	// Logger records each repeated request and each failed mirror at level Warn, with the error.
	// Nil discards the records.
	Logger *slog.Logger
	// MaxPerHost is how many requests to one registry run at a time. Zero means 16.
	MaxPerHost int
	// StallTimeout ends a request in which fewer than 4,096 bytes move for this long. Zero means 60
	// seconds. Registries get five times as long to answer an upload. While a blob is sent, the kernel
	// takes bytes only when a part of its buffer is free, which can be 1 MiB or more. A push over a line
	// that needs longer than StallTimeout for that much wants a longer one.
	StallTimeout time.Duration
	// Warn is called once with each distinct warning of a registry (distribution-spec, "Warnings"),
	// by one goroutine at a time. It must not block. Nil discards the warnings.
	Warn func(host, text string)
	// UserAgent is sent to registries. Empty means "ocilocal".
	UserAgent string

	telling sync.Mutex // held while Warn is called

	mu     sync.Mutex // guards the fields below
	client *http.Client
	// retired are clients that were replaced after a stall. Their connections may still be in use.
	retired []*http.Client
	hosts   map[string]*remoteHost
	cache   map[tokenKey]*tokenEntry
	warned  map[string]bool
}

// A remoteHost is what a Remote knows of one registry or mirror. A Remote forgets all of them when
// there are maxRemembered: calls under way keep theirs, and later ones learn again.
type remoteHost struct {
	name  string        // as in references: "docker.io"
	base  *url.URL      // "https://registry-1.docker.io", where requests go
	slots chan struct{} // one element for each request under way, until its body is closed
	// referrers has one place. A call that changes a referrers tag takes it.
	referrers chan struct{}

	mu         sync.Mutex           // guards the fields below
	challenges map[string]challenge // by repository: what it last asked for
	addr       netip.Addr           // where it was last reached
	resting    time.Time            // until when it is not asked as a mirror
	away       *http.Client         // for requests that leave its origin
}

// plainHTTP applies r.PlainHTTP to a host, which includes the port if there is one.
func (r *Remote) plainHTTP(host string) bool {
	if r.PlainHTTP != nil {
		return r.PlainHTTP(host)
	}
	name := (&url.URL{Host: host}).Hostname()
	addr, err := netip.ParseAddr(name)
	return name == "localhost" || err == nil && addr.IsLoopback()
}

// host returns what r knows of a registry. name is the host in references.
func (r *Remote) host(name string) *remoteHost {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.hosts[name]; h != nil {
		return h
	}
	h := &remoteHost{
		name:       name,
		base:       &url.URL{Scheme: "https", Host: name, Path: "/"}, // a request with a relative path would be malformed
		slots:      make(chan struct{}, cmp.Or(max(r.MaxPerHost, 0), 16)),
		referrers:  make(chan struct{}, 1),
		challenges: map[string]challenge{},
	}
	if name == registryDockerHub {
		h.base.Host = "registry-1.docker.io"
	}
	if r.plainHTTP(name) {
		h.base.Scheme = "http"
	}
	if r.hosts == nil || len(r.hosts) >= maxRemembered {
		for _, old := range r.hosts {
			old.closeIdle()
		}
		r.hosts = map[string]*remoteHost{}
	}
	r.hosts[name] = h
	return h
}

// httpClient returns the client for registries.
func (r *Remote) httpClient() *http.Client {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client == nil {
		c := http.Client{}
		if r.Client != nil {
			c = *r.Client
		}
		if c.Transport == nil && r.Client == nil {
			c.Transport = ownTransport()
		}
		c.Transport = strictTransport{cmp.Or(c.Transport, http.DefaultTransport)}
		// follow follows redirects: it decides which headers may leave the origin.
		c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		r.client = &c
	}
	return r.client
}

// ownTransport returns a transport like net/http's default one, with bounds on headers, and without
// decompression: the digest is of the bytes that are sent.
func ownTransport() *http.Transport {
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		ForceAttemptHTTP2:   true,
		MaxIdleConns:        100,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
		DisableCompression:  true,
		// Otherwise the error would be a text without a kind.
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, res *http.Response) error {
			return proxyError(res.StatusCode)
		},
		// A dead connection is noticed after half a minute, although nobody closes it.
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second, WriteByteTimeout: 30 * time.Second},
		MaxResponseHeaderBytes: maxHeaderSize,
		ReadBufferSize:         64 << 10,
		WriteBufferSize:        64 << 10,
	}
}

// renew makes later requests use new connections, after a request of client has stalled. Nothing
// ends an HTTP/2 connection whose peer has disappeared, so each attempt would stall on it again.
// Idle connections of HTTP/1 to the same place are probably dead as well. Requests that run on the
// old client go on: it is retired, and its idle connections are closed with those of later ones.
func (p *remoteRepo) renew(client *http.Client) {
	r := p.remote
	r.mu.Lock()
	if t := transportOf(client); r.client == client && t != nil {
		c := *client
		c.Transport = strictTransport{cloneTransport(t)}
		r.client = &c
	}
	r.mu.Unlock()
	p.host.mu.Lock()
	if p.host.away == client {
		p.host.away = nil
	}
	p.host.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Contains(r.retired, client) { // requests that stall together have the same one
		r.retired = append(r.retired, client)
	}
	for _, c := range r.retired { // those that stalled earlier have no request any more
		c.CloseIdleConnections()
	}
	r.retired = r.retired[max(len(r.retired)-maxRetired, 0):]
}

// maxRetired is how many retired clients are kept.
const maxRetired = 16

// CloseIdleConnections closes the connections of r that no request uses, also those of a Client
// that the user has given.
func (r *Remote) CloseIdleConnections() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		r.client.CloseIdleConnections()
	}
	for _, c := range r.retired {
		c.CloseIdleConnections()
	}
	for _, h := range r.hosts {
		h.closeIdle()
	}
}

// closeIdle closes the idle connections to places other than the registry.
func (h *remoteHost) closeIdle() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.away != nil {
		h.away.CloseIdleConnections()
	}
}

// A remoteRepo is one repository of one registry for the length of one call. All requests of the
// call use one credential.
type remoteRepo struct {
	remote *Remote
	host   *remoteHost
	ref    Reference
	name   string // the repository

	mirrors  []*remoteRepo // asked before it, in calls that read
	mirrorOf string        // of a mirror: the host of the registry
	tags     bool          // of a mirror: whether it may answer for tags

	turn *manifestTurn // for all that is parsed, also by its mirrors; nil for none

	mu      sync.Mutex  // guards the fields below
	failure string      // of a mirror: why it was passed over
	asked   bool        // the source of credentials was asked
	cred    *Credential // a pointer, so that printing a remoteRepo doesn't print it
	credErr error       // of the source: see blame
	shown   []string    // tokens and the like that the registry was sent
}

// repo returns the repository of ref for a call. It makes no request.
func (r *Remote) repo(ref Reference) (*remoteRepo, error) {
	if err := ref.checkGiven(); err != nil {
		return nil, err
	}
	return &remoteRepo{remote: r, host: r.host(ref.Registry()), ref: ref, name: ref.Repository()}, nil
}

// url returns the address of something below /v2/<repository>/. The parts are tags, digests and
// fixed words, which need no escaping.
func (p *remoteRepo) url(parts ...string) *url.URL {
	u := p.host.base.JoinPath(append([]string{"v2", p.name}, parts...)...)
	if p.mirrorOf != "" {
		u.RawQuery = url.Values{"ns": {p.mirrorOf}}.Encode() // as containerd's mirrors know it
	}
	return u
}

// warn passes on the warnings in an answer (distribution-spec, "Warnings"), each once.
func (r *Remote) warn(host string, header http.Header, secrets []string) {
	if r.Warn == nil {
		return
	}
	for _, v := range header.Values("Warning") {
		text, ok := strings.CutPrefix(v, `299 - "`)
		if !ok {
			continue
		}
		text, _, _ = strings.Cut(text, `"`)
		text = serverText(text, secrets)
		r.mu.Lock()
		seen := r.warned[host+" "+text] || len(r.warned) >= maxWarnings
		if !seen {
			if r.warned == nil {
				r.warned = map[string]bool{}
			}
			r.warned[host+" "+text] = true
		}
		r.mu.Unlock()
		if !seen {
			r.tellWarning(host, text)
		}
	}
}

// tellWarning calls r.Warn. A panic of it does not keep the mutex.
func (r *Remote) tellWarning(host, text string) {
	r.telling.Lock()
	defer r.telling.Unlock()
	r.Warn(host, text)
}

// header returns h with the fields that every request has.
func (r *Remote) header(h http.Header) http.Header {
	h = maps.Clone(h)
	if h == nil {
		h = http.Header{}
	}
	h.Set("User-Agent", cmp.Or(r.UserAgent, "ocilocal"))
	h.Set("Accept-Encoding", "identity") // bytes are wanted as they were hashed
	return h
}
