package ocilocal

import (
	"crypto/rand"
	"strings"
)

// ThrowawayReference makes up a name for an artifact that somebody else should be able to fetch for
// an hour, as the OMMX SDK's temp function does: ttl.sh/<random>:1h. ttl.sh is a public registry
// that needs no credential. It deletes what is pushed after the time that the tag says. Whoever
// knows the name can fetch the artifact until then.
func ThrowawayReference() Reference {
	return MustParseReference("ttl.sh/" + strings.ToLower(rand.Text()) + ":1h")
}

// isOMMXLocalName reports whether an OMMX v3 registry made up the references of this name. Its host
// is a part of the registry's id.
func isOMMXLocalName(host, repository string) bool {
	id, ok := strings.CutSuffix(host, ".ommx.local")
	if !ok || id == "" || strings.Contains(id, ".") {
		return false
	}
	return repository == "anonymous" || repository == "experiment" || repository == "checkpoint"
}
