package ocilocal

import "strings"

// foreignLayer reports whether layers of a media type need not be distributed with their image
// (image-spec layer.md, "Non-Distributable Layers", and Docker's foreign layers). Such a layer may
// be absent from a registry. Its descriptor may have urls, which this package never fetches: they
// would let a manifest send requests to any host.
func foreignLayer(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.nondistributable.v1.tar") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.foreign.diff.tar")
}
