package ocilocal

import "strings"

// foreignLayer reports whether layers of a media type need not be distributed with their image:
// image-spec layer.md, "Non-Distributable Layers", and Docker's foreign layers. Their descriptors
// may have urls. This package never fetches these.
func foreignLayer(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.nondistributable.v1.tar") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.foreign.diff.tar")
}
