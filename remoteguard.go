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

// This file decides where requests may go that a registry sends elsewhere: to a token server, to
// the target of a redirect, to the location of an upload.
//
// The problem: a registry on the Internet could name an address that only this machine can reach,
// such as a cloud's metadata service, and make this program send requests there. A name is no
// better than an address, because the registry's owner decides where the name leads, and may
// decide otherwise between a check and the connection.
//
// The rule: a request that leaves the registry's origin may go to a public address, to the very
// address of the registry, or to an address of the registry's own kind. A registry in a private
// network may use its neighbours. [Remote.AllowAddress] can allow more.
//
// It is safe because the address is checked on the connection itself, after names are resolved and
// before a byte of the request is sent. Two cases can't be checked there. A proxy makes the
// connection itself, so only literal addresses are refused. A RoundTripper of another type than
// [*http.Transport] hides its connections, so names are looked up before it is called.

// An addressKind says from where an address can be reached.
type addressKind int

const (
	kindPublic    addressKind = iota
	kindPrivate               // RFC 1918, unique local
	kindLoopback              // this machine
	kindShared                // 100.64.0.0/10: carrier-grade NAT, Tailscale, pods of some clusters
	kindBenchmark             // 198.18.0.0/15: proxies that invent an address for each name
	kindReserved              // 240.0.0.0/4: some clouds use it as a private network
	kindSpecial               // link-local, unspecified, multicast: nothing but the registry may be there
)

// addressKinds are the ranges that the predicates of [netip.Addr] do not know.
var addressKinds = []struct {
	prefix netip.Prefix
	kind   addressKind
}{
	{netip.MustParsePrefix("100.64.0.0/10"), kindShared},
	{netip.MustParsePrefix("198.18.0.0/15"), kindBenchmark},
	{netip.MustParsePrefix("255.255.255.255/32"), kindSpecial},
	{netip.MustParsePrefix("240.0.0.0/4"), kindReserved},
	{netip.MustParsePrefix("0.0.0.0/8"), kindSpecial},
	{netip.MustParsePrefix("192.0.0.0/24"), kindSpecial},
	{netip.MustParsePrefix("fec0::/10"), kindSpecial},
}

// embedded are the IPv6 prefixes whose addresses stand for an IPv4 address, which begins at byte
// at.
var embedded = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},   // NAT64
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12}, // NAT64 for local use
	{netip.MustParsePrefix("2002::/16"), 2},       // 6to4
	{netip.MustParsePrefix("::/96"), 12},          // "IPv4-compatible"
}

// kindOf returns the kind of an address.
func kindOf(a netip.Addr) addressKind {
	a = a.Unmap().WithZone("")
	if a.IsLoopback() {
		return kindLoopback
	}
	if a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() {
		return kindSpecial
	}
	for _, e := range embedded {
		if e.prefix.Contains(a) {
			b := a.As16()
			return kindOf(netip.AddrFrom4([4]byte(b[e.at : e.at+4])))
		}
	}
	if a.IsPrivate() {
		return kindPrivate
	}
	for _, k := range addressKinds {
		if k.prefix.Contains(a) {
			return k.kind
		}
	}
	return kindPublic
}

// mayReach reports whether a registry at from may send requests to to. A zero from means that the
// registry's address is not known.
func mayReach(from, to netip.Addr) bool {
	kind := kindOf(to)
	return kind == kindPublic || from.IsValid() &&
		(from.Unmap() == to.Unmap() || kind != kindSpecial && kind == kindOf(from))
}

// mayDial is mayReach for p's registry, or what the user allows.
func (p *remoteRepo) mayDial(to netip.Addr) bool {
	to = to.Unmap().WithZone("")
	return mayReach(p.host.address(), to) || p.remote.AllowAddress != nil && p.remote.AllowAddress(p.host.name, to)
}

// address returns the address of the registry, the zero Addr if it is not known.
func (h *remoteHost) address() netip.Addr {
	if a, err := netip.ParseAddr(h.base.Hostname()); err == nil {
		return a
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.addr
}

// reached records the address at which the registry was reached last. [mayReach] compares other
// addresses with it.
func (h *remoteHost) reached(address string) {
	if ap, err := netip.ParseAddrPort(address); err == nil {
		h.mu.Lock()
		h.addr = ap.Addr().Unmap().WithZone("")
		h.mu.Unlock()
	}
}

// A refusedAddress is the reason for which a request is not sent. Its text quotes no server.
type refusedAddress struct{ addr netip.Addr }

func (e *refusedAddress) Error() string {
	return fmt.Sprintf("%s is not a public address (Remote.AllowAddress can allow it)", e.addr)
}

// checkHost refuses the host of an address that the registry names, as far as that can be told
// before connecting. The error has no sentinel.
func (p *remoteRepo) checkHost(ctx context.Context, u *url.URL) error {
	host := strings.TrimSuffix(u.Hostname(), ".")
	if strings.ContainsFunc(host, func(c rune) bool { return c > 0x7e }) { // net/http turns some of these into digits and dots
		return fmt.Errorf("host %s is not in ASCII", printable(host))
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if !p.mayDial(addr) {
			return &refusedAddress{addr}
		}
		return nil
	}
	// 2130706433, 0x7f.1 and 127.1 are addresses to some resolvers only.
	if isNumber(strings.ToLower(host[strings.LastIndexByte(host, '.')+1:])) {
		return fmt.Errorf("%s is neither a host name nor an IP address", printable(host))
	}
	if transportOf(p.remote.httpClient()) == nil { // its connections can't be checked, so look the name up
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return !p.mayDial(a) }); err == nil && i >= 0 {
			return fmt.Errorf("%s is at %w", printable(host), &refusedAddress{addrs[i]})
		}
	}
	return nil
}

// transportOf returns the transport of a client, nil if it is of another type.
func transportOf(client *http.Client) *http.Transport {
	rt := client.Transport
	if s, ok := rt.(strictTransport); ok {
		rt = s.next
	}
	t, _ := rt.(*http.Transport)
	return t
}

// dialKey is the context key for the *remoteRepo whose registry sends a request elsewhere.
type dialKey struct{}

// awayClient returns the client for requests that leave the registry's origin, and the context for
// a request to u. Registries share no such client, because a connection that one registry may
// use can be forbidden to another.
func (p *remoteRepo) awayClient(ctx context.Context, u *url.URL) (*http.Client, context.Context) {
	client := p.remote.httpClient()
	own := transportOf(client)
	if own == nil {
		return client, ctx
	}
	p.host.mu.Lock()
	defer p.host.mu.Unlock()
	if p.host.away == nil {
		c := *client
		c.Transport = strictTransport{guardedTransport(own)}
		p.host.away = &c
	}
	if !proxied(p.host.away, u) { // the address of a proxy says nothing
		ctx = context.WithValue(ctx, dialKey{}, p)
	}
	return p.host.away, ctx
}

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// cloneTransport copies a transport. The copy shares no connections with it.
func cloneTransport(own *http.Transport) *http.Transport {
	t := own.Clone()
	if len(t.TLSNextProto) == 0 && t.TLSClientConfig != nil && slices.Contains(t.TLSClientConfig.NextProtos, "h2") {
		t.ForceAttemptHTTP2 = true // own uses HTTP/2: its TLS configuration, copied, would otherwise end that
	}
	return t
}

// guardedTransport copies a transport so that it refuses connections that [checkDialed] forbids.
func guardedTransport(own *http.Transport) *http.Transport {
	t := cloneTransport(own)
	if len(t.TLSNextProto) > 0 { // its HTTP/2 would share connections with own, which nobody has checked
		t.ForceAttemptHTTP2 = false
		t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
		t.Protocols = nil
		if t.TLSClientConfig != nil {
			t.TLSClientConfig.NextProtos = []string{"http/1.1"}
		}
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

// checkDialed refuses an address if the registry in ctx may not send requests there.
func checkDialed(ctx context.Context, address string) error {
	p, ok := ctx.Value(dialKey{}).(*remoteRepo)
	if !ok {
		return nil // a proxy
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil || p.mayDial(to.Addr()) {
		return nil
	}
	return fmt.Errorf("%w: %s leads elsewhere: %w", ErrProtocol, p.host.name, &refusedAddress{to.Addr()})
}

// proxied reports whether client goes through a proxy to u.
func proxied(client *http.Client, u *url.URL) bool {
	t := transportOf(client)
	if t == nil || t.Proxy == nil {
		return false
	}
	proxy, err := t.Proxy(&http.Request{Method: http.MethodGet, URL: u, Header: http.Header{}})
	return err == nil && proxy != nil
}
