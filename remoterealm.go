package ocilocal

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"
)

// An addressClass says from where an address can be reached. A registry may name a token
// server only at an address of its own class or at a public one: else a
// registry on the Internet could make us send requests, with credentials, to what only we can reach.
type addressClass int

const (
	classPublic addressClass = iota
	classPrivate
	classLoopback
	classSpecial // link-local, unspecified, multicast: no token server at all, unless the registry is at the very address
)

// embedded are the IPv6 prefixes whose addresses stand for an IPv4 address, and where it begins in them.
var embedded = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},   // NAT64
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12}, // NAT64 for local use
	{netip.MustParsePrefix("2002::/16"), 2},       // 6to4
	{netip.MustParsePrefix("::/96"), 12},          // "IPv4-compatible"
}

// notPublic are ranges that netip's own predicates don't name.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("fec0::/10"),
}

func classOf(a netip.Addr) addressClass {
	a = a.Unmap().WithZone("")
	if a.IsLoopback() {
		return classLoopback
	}
	if a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() {
		return classSpecial
	}
	for _, e := range embedded {
		if e.prefix.Contains(a) {
			b := a.As16()
			return classOf(netip.AddrFrom4([4]byte(b[e.at : e.at+4])))
		}
	}
	if a.IsPrivate() {
		return classPrivate
	}
	for _, p := range notPublic {
		if p.Contains(a) {
			return classSpecial
		}
	}
	return classPublic
}

// mayAsk reports whether a registry at from, the zero Addr if that isn't known,
// may name a token server at to.
func mayAsk(from, to netip.Addr) bool {
	class := classOf(to)
	return class == classPublic || from.IsValid() &&
		(from.Unmap() == to.Unmap() || class != classSpecial && class == classOf(from))
}

// checkRealm returns the address of the token server that a registry names, if it may name it.
func (p *remoteRepo) checkRealm(ctx context.Context, realm string) (*url.URL, error) {
	refuse := func(format string, args ...any) error {
		return &RemoteError{Method: http.MethodGet, URL: publicURL(p.host.base), TokenServer: true, final: true,
			Err: fmt.Errorf("%w: token server that %s names is refused: "+format, append([]any{ErrProtocol, p.host.name}, args...)...)}
	}
	u, err := url.Parse(realm)
	if err != nil || realm == "" {
		return nil, refuse("its realm is not an address")
	}
	u.Fragment, u.RawFragment = "", ""
	host := strings.TrimSuffix(u.Hostname(), ".")
	switch {
	case u.User != nil:
		return nil, refuse("its realm has user information in it")
	case host == "" || u.Opaque != "":
		return nil, refuse("its realm has no host")
	case strings.ContainsFunc(host, func(c rune) bool { return c > 0x7e }): // which net/http makes ASCII of, even digits and dots
		return nil, refuse("its realm has a host that is not in ASCII")
	case u.Scheme == "https":
	case u.Scheme == "http" && p.host.base.Scheme == "http" && p.remote.plainHTTP(u.Host):
	default:
		return nil, refuse("%s is neither https, nor http where that is allowed", publicURL(u))
	}
	if sameOrigin(u, p.host.base) {
		return u, nil // it has what goes there anyway
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if !mayAsk(p.host.address(), addr) {
			return nil, refuse("%s is not a public address", printable(host))
		}
		return u, nil
	}
	// 2130706433, 0x7f.1 and 127.1 are addresses to some resolvers only.
	if isNumber(strings.ToLower(host[strings.LastIndexByte(host, '.')+1:])) {
		return nil, refuse("%s is no host name and no IP address", printable(host))
	}
	if tokenDial(p.remote.httpClient()) == nil { // what it dials can't be looked at: look where it probably will
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err == nil && slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !mayAsk(p.host.address(), a) }) {
			return nil, refuse("%s is not at a public address", printable(host))
		}
	}
	return u, nil
}

// address is where the registry is.
func (h *remoteHost) address() netip.Addr {
	if a, err := netip.ParseAddr(h.base.Hostname()); err == nil {
		return a
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.addr
}

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// tokenDial returns the function by which client connects, nil if it has none that can be wrapped.
func tokenDial(client *http.Client) *http.Transport {
	rt := client.Transport
	if s, ok := rt.(strictTransport); ok {
		rt = s.next
	}
	t, _ := rt.(*http.Transport)
	return t
}

// registryKey is the context key for where the registry is that named a token server.
type registryKey struct{}

// tokenClient returns the client for token servers that are not at the registry's
// own origin. It looks at each address that it connects to, after names were resolved and before a byte is sent.
func (r *Remote) tokenClient() *http.Client {
	client := r.httpClient()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tokens != nil {
		return r.tokens
	}
	c := *client
	if own := tokenDial(client); own != nil {
		c.Transport = strictTransport{guardedTransport(own)}
	}
	r.tokens = &c
	return r.tokens
}

// guardedTransport copies a transport so that it refuses connections to
// addresses that [mayAsk] forbids. Connections are never shared between
// requests, since what may be connected to differs.
func guardedTransport(own *http.Transport) *http.Transport {
	t := own.Clone()
	t.DisableKeepAlives = true
	t.ForceAttemptHTTP2 = false
	t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	t.Protocols = nil
	if t.TLSClientConfig != nil {
		t.TLSClientConfig.NextProtos = []string{"http/1.1"}
	}
	guard := func(dial dialFunc) dialFunc {
		return func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err == nil {
				if err = checkDialed(ctx, conn.RemoteAddr().String()); err != nil {
					conn.Close()
					return nil, err
				}
			}
			return conn, err
		}
	}
	//lint:ignore SA1019 it counts where DialContext is nil
	switch older := t.Dial; {
	case t.DialContext != nil:
		t.DialContext = guard(t.DialContext)
	case older != nil:
		t.DialContext = guard(func(_ context.Context, network, address string) (net.Conn, error) { return older(network, address) })
	default:
		// A plain dialer can be stopped before it connects.
		d := &net.Dialer{Timeout: 30 * time.Second, ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
			return checkDialed(ctx, address)
		}}
		t.DialContext = d.DialContext
	}
	//lint:ignore SA1019 it counts where DialTLSContext is nil
	switch older := t.DialTLS; {
	case t.DialTLSContext != nil:
		t.DialTLSContext = guard(t.DialTLSContext)
	case older != nil:
		t.DialTLSContext = guard(func(_ context.Context, network, address string) (net.Conn, error) { return older(network, address) })
	}
	return t
}

// checkDialed refuses an address if the registry in ctx may not name it.
func checkDialed(ctx context.Context, address string) error {
	from, ok := ctx.Value(registryKey{}).(netip.Addr)
	if !ok {
		return nil // through a proxy, whose address says nothing
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil || mayAsk(from, to.Addr()) {
		return nil
	}
	return fmt.Errorf("%w: the token server that the registry names is at %s, which is not a public address", ErrProtocol, to.Addr())
}

// exchangeToken sends one request to a token server.
func (p *remoteRepo) exchangeToken(ctx context.Context, c *remoteCall, u *url.URL) (*http.Response, error) {
	client := p.remote.httpClient()
	if !sameOrigin(u, p.host.base) {
		client = p.remote.tokenClient()
		if !proxied(client, u) {
			ctx = context.WithValue(ctx, registryKey{}, p.host.address())
		}
	}
	return p.remote.exchange(ctx, client, c, u, p.remote.header(c.header), nil)
}

// proxied reports whether client goes through a proxy to u.
func proxied(client *http.Client, u *url.URL) bool {
	t := tokenDial(client)
	if t == nil || t.Proxy == nil {
		return false
	}
	proxy, err := t.Proxy(&http.Request{Method: http.MethodGet, URL: u, Header: http.Header{}})
	return err == nil && proxy != nil
}
