package ocilocal

import (
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// A byteRange is a part of a blob.
type byteRange struct{ start, length int64 }

// parseByteRange reads a Range header for content of a size. The forms of RFC 9110, 14.1.2, are:
//
//	bytes=2-5   bytes 2 to 5
//	bytes=2-    byte 2 to the end
//	bytes=-5    the last 5 bytes
//
// whole is true if all of the content is to be sent. That also answers a header that section 14.2
// lets a server ignore: another unit, bad syntax, several ranges. A range of which no byte exists
// is a 416. An end beyond the content means its end.
func parseByteRange(s string, size int64) (_ byteRange, whole bool, err error) {
	spec, ok := strings.CutPrefix(s, "bytes=")
	first, last, dash := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok || !dash || strings.Contains(spec, ",") {
		return byteRange{}, true, nil
	}
	unsatisfiable := serveErrorf(http.StatusRequestedRangeNotSatisfiable, codeSizeInvalid, "blob has %d bytes", size)
	if first == "" { // the last bytes
		n, ok := parseCount(last)
		switch {
		case !ok:
			return byteRange{}, true, nil
		case n == 0 || size == 0:
			return byteRange{}, false, unsatisfiable
		}
		n = min(n, size)
		return byteRange{size - n, n}, false, nil
	}
	start, ok := parseCount(first)
	end, endOK := int64(math.MaxInt64), true
	if last != "" {
		end, endOK = parseCount(last)
	}
	switch {
	case !ok || !endOK:
		return byteRange{}, true, nil
	case start >= size || end < start: // the latter as net/http does
		return byteRange{}, false, unsatisfiable
	}
	return byteRange{start, min(end, size-1) - start + 1}, false, nil
}

// parseContentRange reads the Content-Range of a chunk. The distribution specification spells it
// <first>-<last>, without the unit and the size that RFC 9110 demands.
func parseContentRange(s string) (r byteRange, ok bool) {
	first, last, _ := strings.Cut(s, "-")
	start, ok := parseCount(first)
	end, endOK := parseCount(last)
	if !ok || !endOK || end < start || end == math.MaxInt64 {
		return byteRange{}, false
	}
	return byteRange{start, end - start + 1}, true
}

// parseCount reads decimal digits, without a sign. A number that is too large becomes the largest
// int64: it lies beyond the end of all content, and so has the same meaning.
func parseCount(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		n = math.MaxInt64
	}
	return n, true
}

// etag is the entity tag of content.
func etag(d digest.Digest) string { return `"` + string(d) + `"` }

// matchesETag reports whether an If-None-Match header has the tag of d. The comparison is weak, as
// RFC 9110, 13.1.2, demands: W/"x" matches "x".
func matchesETag(header string, d digest.Digest) bool {
	for header != "" {
		var one string
		one, header, _ = strings.Cut(header, ",")
		one = strings.TrimPrefix(strings.TrimSpace(one), "W/")
		if one == "*" || one == etag(d) {
			return true
		}
	}
	return false
}

// matchesStrongly reports whether an If-Match header has the tag of d, which a weak tag never is
// (RFC 9110, 13.1.1).
func matchesStrongly(header string, d digest.Digest) bool {
	for one := range strings.SplitSeq(header, ",") {
		if one = strings.TrimSpace(one); one == "*" || one == etag(d) {
			return true
		}
	}
	return false
}
