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

// A serveRoute is a path of the API. Its parts have the form that the specification demands.
type serveRoute struct {
	kind   routeKind
	name   string        // of the repository
	tag    string        // of routeManifest, or digest is set
	digest digest.Digest // of routeManifest, routeBlob and routeReferrers
	upload string        // of routeUpload: not checked
}

// maxRoute is longer than every path of valid parts.
const maxRoute = len("/v2//blobs/uploads/") + maxNameLen + 256

// parseRoute reads a decoded path. It is read from its end, since a repository's name may have
// components like blobs or tags.
func parseRoute(path string) (rt serveRoute, err error) {
	unknown := serveErrorf(http.StatusNotFound, codeNameUnknown, "no such endpoint")
	rest, ok := strings.CutPrefix(path, "/v2/")
	switch {
	case path == "/v2" || path == "/v2/":
		return serveRoute{kind: routeBase}, nil
	case !ok || len(path) > maxRoute:
		return rt, unknown
	case rest == "_catalog":
		return serveRoute{kind: routeCatalog}, nil
	}
	rest, last, _ := cutLast(rest)
	rest, kind, _ := cutLast(rest)
	switch kind {
	case "tags":
		if last != "list" {
			return rt, unknown
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
			return rt, unknown
		}
		rt = serveRoute{kind: routeUpload, name: name, upload: last}
		if last == "" {
			rt.kind = routeUploads
		}
	default:
		return rt, unknown
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
