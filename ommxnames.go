package ocilocal

import (
	"crypto/rand"
	"strings"
)

// ThrowawayReference returns a new name under which other people can fetch an artifact for an hour:
// ttl.sh/<random>:1h. The OMMX SDK's temp function makes such names too. ttl.sh is a public
// registry that needs no credential. It deletes an artifact after the time in its tag. Until then,
// everybody who knows the name can fetch the artifact.
func ThrowawayReference() Reference {
	return MustParseReference("ttl.sh/" + strings.ToLower(rand.Text()) + ":1h")
}

// isOMMXLocalName reports whether an OMMX v3 registry made up the references of this name:
// <part of its id>.ommx.local/anonymous, /experiment or /checkpoint.
func isOMMXLocalName(host, repository string) bool {
	id, ok := strings.CutSuffix(host, ".ommx.local")
	if !ok || id == "" || strings.Contains(id, ".") {
		return false
	}
	return repository == "anonymous" || repository == "experiment" || repository == "checkpoint"
}
