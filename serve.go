package ocilocal

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// HandlerOptions govern [LocalRegistry.Handler]. Nil is the zero value: everybody who reaches the
// server may do everything. That suits a test that listens on a loopback address.
type HandlerOptions struct {
	// Host is the host of the local names that are served: repository org/app of the server is
	// Host/org/app in the registry. Empty means localhost, whatever address and port the server has.
	Host string
	// Name, if not nil, returns the local name of a repository, in place of Host. It can use the
	// request's Host header and its query, such as containerd's ?ns=docker.io. The repository has
	// the form that the distribution specification demands. An error answers the request with 404.
	// With an Upstream, Name must refuse registries that are not to be mirrored. Name must not read
	// the body. If Name is set, the handler has no catalog.
	Name func(r *http.Request, repository string) (string, error)
	// Authorize, if not nil, decides about each request before anything is done. repository is as
	// the client names it, and empty for ActionPing and ActionCatalog. If Authorize returns nil, the
	// request goes on. A [*ChallengeError] answers 401 with its challenge, and any other error
	// answers 403. The text of the error is not sent. A mount also asks for ActionPull of the other
	// repository, which the client must name then. Authorize must not read the body.
	Authorize func(r *http.Request, repository string, action Action) error
	// Upstream, if not nil, is a registry from which misses are fetched. A client that may pull can
	// make this registry fetch and keep what it asks for. ReadOnly does not change that.
	Upstream *Upstream
	// ReadOnly refuses pushes and deletions with 405. Other users of the registry may still write.
	ReadOnly bool
	// MaxBlobSize, if positive, is the largest size of a pushed blob, in bytes.
	MaxBlobSize int64
	// MaxUploads is how many uploads may be begun and not ended, in all processes. Zero means 1000.
	// At that number, uploads older than UploadAge are removed. If none is, the next upload is
	// answered with 429. Handlers that work side by side may each exceed it by a 64th.
	MaxUploads int
	// UploadAge is how long an upload may get no byte before it makes place for another one. Zero
	// means 24 hours. Collections remove old uploads as well: see [GCOptions.Held].
	UploadAge time.Duration
	// MinChunk, if positive, is the size of chunks in bytes that clients are asked for, except for
	// the last one. Smaller chunks are taken as well.
	MinChunk int64
	// StallTimeout ends a request without progress: within that time a client must send 4 KiB. Zero
	// means one minute, and a negative value is no limit. To take an answer, a client has ten times
	// that time for each 2 MiB: the kernel does not report smaller steps.
	StallTimeout time.Duration
}

// An Action is what a request asks of a repository.
type Action int

const (
	// ActionPing asks whether there is a registry: GET /v2/.
	ActionPing Action = iota + 1
	// ActionPull reads manifests, blobs, tags and referrers.
	ActionPull
	// ActionPush writes manifests, tags and blobs.
	ActionPush
	// ActionDelete deletes manifests, tags or blobs.
	ActionDelete
	// ActionCatalog lists the repositories.
	ActionCatalog
)

// String returns the action in lower case.
func (a Action) String() string {
	switch a {
	case ActionPing:
		return "ping"
	case ActionPull:
		return "pull"
	case ActionPush:
		return "push"
	case ActionDelete:
		return "delete"
	case ActionCatalog:
		return "catalog"
	}
	return "none"
}

// A ChallengeError is the answer of [HandlerOptions.Authorize] to a client that must authenticate.
// It matches [ErrUnauthorized].
type ChallengeError struct {
	// Challenge is the value of WWW-Authenticate, such as `Basic realm="registry"`.
	Challenge string
}

func (e *ChallengeError) Error() string { return "client must authenticate" }

// Is reports whether target is [ErrUnauthorized].
func (e *ChallengeError) Is(target error) bool { return target == ErrUnauthorized }

const (
	defaultHost         = "localhost"
	defaultMaxUploads   = 1000
	defaultStallTimeout = time.Minute
)

// handler is the distribution API on one registry. All that a later request needs is in the
// registry's root, where any process finds it. The fields below save work: without them, content is
// read or asked for once more.
type handler struct {
	registry *LocalRegistry
	opts     HandlerOptions
	upstream *upstream // nil without one
	turns    manifestTurns

	mu        sync.Mutex            // guards what follows
	hashes    map[string]uploadHash // of uploads, by id: see takeHash
	uncounted int                   // uploads that may begin before they are counted: see admitUpload
}

// Handler returns a handler that serves the registry by the API of the OCI distribution
// specification 1.1: pull, push, deletion, tags, referrers and the catalog, below /v2/.
//
// Any number of handlers and processes can serve one root, behind any load balancer: an upload may
// continue in another process. When a manifest is acknowledged with 201, it and all its content
// are durable. No client receives all bytes of damaged content, or a part of a blob that was not
// verified. [Repository] says how long content without a tag stays.
//
// A client that puts or deletes a tag can send If-Match with the ETag that it has seen, or
// If-None-Match: * for a new tag. If another client was faster, the answer is 412, and nothing
// changes.
//
// The handler answers 503 after [LocalRegistry.Close]. A registry that is open read-only is served
// read-only.
func (r *LocalRegistry) Handler(opts *HandlerOptions) http.Handler {
	h := &handler{registry: r, hashes: map[string]uploadHash{}, turns: newManifestTurns()}
	if opts != nil {
		h.opts = *opts
	}
	if h.opts.Host == "" {
		h.opts.Host = defaultHost
	}
	// The catalog looks for this prefix in the index, where names are canonical.
	if name, err := canonicalName(h.opts.Host + "/a/b"); err == nil {
		h.opts.Host = strings.TrimSuffix(name, "/a/b")
	}
	if h.opts.MaxUploads == 0 {
		h.opts.MaxUploads = defaultMaxUploads
	}
	if h.opts.UploadAge == 0 {
		h.opts.UploadAge = defaultHeld
	}
	if h.opts.StallTimeout == 0 {
		h.opts.StallTimeout = defaultStallTimeout
	}
	if r.blobs.readOnly {
		h.opts.ReadOnly = true
	}
	h.upstream = newUpstream(r, h.opts.Upstream, h.turns)
	return h
}

// An exchange is one request and its answer. It goes through these steps:
//
//	parseRoute   the path is checked before anything else is done with it
//	endpoints    405 if the method has no endpoint for this kind of path
//	authorize    the caller's hook; nothing of the registry was read until here
//	repository   the name that the client uses becomes a local name
//	endpoint     answers and returns nil, or writes nothing and returns an error
//	fail         makes a status, a code and a harmless text of that error
//
// An answer that has begun can't become an error. So an endpoint does all that is likely to fail
// before it writes, and stream breaks the connection off if the rest fails.
type exchange struct {
	*handler
	w http.ResponseWriter
	r *http.Request
	serveRoute
	repo *Repository // nil for endpoints without a repository
}

// ServeHTTP implements [http.Handler].
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	x := &exchange{handler: h, w: w, r: r}
	if r.Body != nil && r.Body != http.NoBody {
		x.body(0).stall.begin() // also for a body that nobody reads: the server does, at the end
	}
	route, err := parseRoute(r.URL.Path)
	if err == nil {
		x.serveRoute = route
		err = x.serve()
	}
	if err != nil {
		x.fail(err)
	}
}

// An endpoint serves one method for one kind of path.
type endpoint struct {
	action Action
	serve  func(x *exchange) error
}

// writes reports whether a registry that is served read-only lacks the endpoint.
func (e endpoint) writes() bool { return e.action == ActionPush || e.action == ActionDelete }

// endpoints are all that the handler can do. HEAD is served by the GET of the same path, which
// sends no body then.
var endpoints = map[routeKind]map[string]endpoint{
	routeBase:    {"GET": {ActionPing, (*exchange).ping}},
	routeCatalog: {"GET": {ActionCatalog, (*exchange).catalog}},
	routeTags:    {"GET": {ActionPull, (*exchange).tags}},
	routeManifest: {
		"GET":    {ActionPull, (*exchange).getManifest},
		"PUT":    {ActionPush, (*exchange).putManifest},
		"DELETE": {ActionDelete, (*exchange).deleteManifest},
	},
	routeBlob: {
		"GET":    {ActionPull, (*exchange).getBlob},
		"DELETE": {ActionDelete, (*exchange).deleteBlob},
	},
	routeReferrers: {"GET": {ActionPull, (*exchange).referrers}},
	routeUploads:   {"POST": {ActionPush, (*exchange).beginUpload}},
	routeUpload: {
		"GET":    {ActionPush, (*exchange).uploadStatus},
		"PATCH":  {ActionPush, (*exchange).patchUpload},
		"PUT":    {ActionPush, (*exchange).putUpload},
		"DELETE": {ActionPush, (*exchange).cancelUpload},
	},
}

// serve authorizes the request and calls its endpoint. Authorization comes before the name is
// mapped and before any lookup, so a client without access can't learn what exists.
func (x *exchange) serve() error {
	method := x.r.Method
	if method == "HEAD" {
		method = "GET"
	}
	e, ok := endpoints[x.kind][method]
	if !ok {
		return x.notAllowed("this method is not supported here")
	}
	if err := x.authorize(x.name, e.action); err != nil {
		return err
	}
	if x.opts.ReadOnly && e.writes() {
		return x.notAllowed("the registry is read-only")
	}
	if x.name != "" {
		var err error
		if x.repo, err = x.repository(x.name); err != nil {
			return err
		}
	}
	return e.serve(x)
}

// notAllowed returns a 405, and lists the methods that the path has (RFC 9110, 15.5.6).
func (x *exchange) notAllowed(message string) error {
	allowed := make([]string, 0, 4)
	for method, e := range endpoints[x.kind] {
		if x.opts.ReadOnly && e.writes() {
			continue
		}
		if allowed = append(allowed, method); method == "GET" {
			allowed = append(allowed, "HEAD")
		}
	}
	slices.Sort(allowed)
	x.w.Header().Set("Allow", strings.Join(allowed, ", "))
	return serveErrorf(http.StatusMethodNotAllowed, codeUnsupported, "%s", message)
}

// authorize asks HandlerOptions.Authorize. Its error becomes an answer without the error's text,
// which may hold secrets of the application.
func (x *exchange) authorize(repository string, action Action) error {
	if x.opts.Authorize == nil {
		return nil
	}
	err := x.opts.Authorize(x.r, repository, action)
	if err == nil {
		return nil
	}
	if challenge, ok := errors.AsType[*ChallengeError](err); ok {
		x.w.Header().Set("WWW-Authenticate", challenge.Challenge)
		return serveErrorf(http.StatusUnauthorized, codeUnauthorized, "authentication required")
	}
	return serveErrorf(http.StatusForbidden, codeDenied, "access denied")
}

// repository returns the view of a repository that the client names.
func (x *exchange) repository(repository string) (*Repository, error) {
	name := x.opts.Host + "/" + repository
	if x.opts.Name != nil {
		var err error
		if name, err = x.opts.Name(x.r, repository); err != nil {
			return nil, serveErrorf(http.StatusNotFound, codeNameUnknown, "repository is not known to the registry")
		}
	}
	p, err := x.registry.Repository(name)
	if err != nil {
		return nil, serveErrorf(http.StatusBadRequest, codeNameInvalid, "invalid repository name")
	}
	return p, nil
}

// ping serves GET /v2/. It only checks that the registry is open.
func (x *exchange) ping() error {
	if _, err := x.registry.begin(x.r.Context()); err != nil {
		return err
	}
	x.registry.calls.Done()
	return x.json(map[string]string{})
}

// url returns the address of another resource, for a Location or Link header. It is a path without
// a host: only the client knows by which host and scheme it reached the server. It keeps the prefix
// at which the handler is mounted, and the parameters that are not the API's, such as ns.
//
// [http.StripPrefix] removes the prefix from URL.Path but not from RequestURI, so the difference is
// the prefix. One that begins with // is not used, because a client would read a host in it.
func (x *exchange) url(suffix string, query ...string) string {
	prefix := ""
	given, _, _ := strings.Cut(x.r.RequestURI, "?")
	if p, ok := strings.CutSuffix(given, x.r.URL.EscapedPath()); ok && strings.HasPrefix(p, "/") && !strings.HasPrefix(p, "//") {
		prefix = p
	}
	q := x.r.URL.Query()
	for _, own := range []string{"digest", "mount", "from", "n", "last", "artifactType"} {
		q.Del(own)
	}
	for i := 0; i < len(query); i += 2 {
		q.Set(query[i], query[i+1])
	}
	path := prefix + "/v2/" + suffix
	if len(q) > 0 {
		path += "?" + q.Encode()
	}
	return path
}

// blobURL and uploadURL return addresses of the repository.
func (x *exchange) blobURL(d fmt.Stringer) string { return x.url(x.name + "/blobs/" + d.String()) }
func (x *exchange) uploadURL(id string) string    { return x.url(x.name + "/blobs/uploads/" + id) }
