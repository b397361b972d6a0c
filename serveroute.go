package ocilocal

import (
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
)

// routeKind is the kind of a path.
type routeKind int

const (
	routeBase routeKind = iota + 1
	routeCatalog
	routeTags
	routeManifest
	routeBlob
	routeReferrers
	routeUploads
	routeUpload
)

// A serveRoute is a path of the API:
//
//	/v2/                                   routeBase
//	/v2/_catalog                           routeCatalog: Docker's API, not the specification's
//	/v2/<name>/tags/list                   routeTags
//	/v2/<name>/manifests/<tag or digest>   routeManifest
//	/v2/<name>/blobs/<digest>              routeBlob
//	/v2/<name>/referrers/<digest>          routeReferrers
//	/v2/<name>/blobs/uploads/              routeUploads, also without the last slash
//	/v2/<name>/blobs/uploads/<id>          routeUpload
//
// name, tag and digest have the form that the specification demands, so no later step need guard
// against dots, slashes or control characters in them.
type serveRoute struct {
	kind   routeKind
	name   string        // of the repository
	tag    string        // of routeManifest, or digest is set
	digest digest.Digest // of routeManifest, routeBlob and routeReferrers
	upload string        // of routeUpload, not checked: uploadPath does that
}

// maxRoute is longer than every path of valid parts: 256 bytes are enough for a digest or a tag.
// Longer paths are not looked at.
const maxRoute = len("/v2//blobs/uploads/") + maxNameLen + 256

// errNoEndpoint answers a path that is not the API's.
var errNoEndpoint = serveErrorf(http.StatusNotFound, codeNameUnknown, "no such endpoint")

// parseRoute reads a decoded path, in which %2F has become a slash. It reads from the end, because
// a repository's name may have components like blobs or tags. Its errors are answers: 404 for a
// path that is not the API's or a tag that can't exist, and 400 for a bad name or digest.
func parseRoute(path string) (rt serveRoute, err error) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	switch {
	case path == "/v2" || path == "/v2/":
		return serveRoute{kind: routeBase}, nil
	case !ok || len(path) > maxRoute:
		return rt, errNoEndpoint
	case rest == "_catalog":
		return serveRoute{kind: routeCatalog}, nil
	}
	rest, last, _ := cutLast(rest)
	rest, kind, _ := cutLast(rest)
	switch kind {
	case "tags":
		if last != "list" {
			return rt, errNoEndpoint
		}
		rt = serveRoute{kind: routeTags, name: rest}
	case "manifests":
		rt = serveRoute{kind: routeManifest, name: rest}
		if strings.Contains(last, ":") {
			rt.digest = digest.Digest(last)
		} else if rt.tag = last; !isBareTag(last) {
			return rt, serveErrorf(http.StatusNotFound, codeManifestUnknown, "invalid tag")
		}
	case "blobs":
		if last == "uploads" {
			rt = serveRoute{kind: routeUploads, name: rest}
			break
		}
		rt = serveRoute{kind: routeBlob, name: rest, digest: digest.Digest(last)}
	case "referrers":
		rt = serveRoute{kind: routeReferrers, name: rest, digest: digest.Digest(last)}
	case "uploads":
		name, ok := strings.CutSuffix(rest, "/blobs")
		if !ok {
			return rt, errNoEndpoint
		}
		rt = serveRoute{kind: routeUpload, name: name, upload: last}
		if last == "" {
			rt.kind = routeUploads
		}
	default:
		return rt, errNoEndpoint
	}
	if len(rt.name) > maxNameLen || repositoryFault(rt.name) >= 0 {
		return rt, serveErrorf(http.StatusBadRequest, codeNameInvalid, "invalid repository name")
	}
	if rt.kind == routeBlob || rt.kind == routeReferrers || rt.digest != "" {
		if err := checkDigest(rt.digest); err != nil {
			return rt, serveErrorf(http.StatusBadRequest, codeDigestInvalid, "%v", err)
		}
	}
	return rt, nil
}

// cutLast cuts a path at its last slash.
func cutLast(path string) (before, last string, ok bool) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path, false
	}
	return path[:i], path[i+1:], true
}
