package ocilocal

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"

	"github.com/opencontainers/go-digest"
)

// digestHexLen is the length of the encoded part for each algorithm that is taken
// (image-spec descriptor.md, "Registered Algorithms"; sha384 is go-digest's).
func digestHexLen(alg digest.Algorithm) int {
	switch alg {
	case digest.SHA256:
		return sha256.Size * 2
	case digest.SHA384:
		return sha512.Size384 * 2
	case digest.SHA512:
		return sha512.Size * 2
	}
	return 0
}

// newHash returns the hash of a validated algorithm.
func newHash(alg digest.Algorithm) hash.Hash {
	switch alg {
	case digest.SHA384:
		return sha512.New384()
	case digest.SHA512:
		return sha512.New()
	default:
		return sha256.New()
	}
}

// hashedDigest returns the digest of what h has hashed. It is [digest.NewDigest] without package fmt,
// which takes as long as the hash of a small manifest.
func hashedDigest(alg digest.Algorithm, h hash.Hash) digest.Digest {
	text := make([]byte, 0, len(digest.SHA512)+1+2*sha512.Size)
	text = append(append(text, alg...), ':')
	return digest.Digest(hex.AppendEncode(text, h.Sum(nil)))
}

// digestOf returns the digest of bytes.
func digestOf(alg digest.Algorithm, b []byte) digest.Digest {
	h := newHash(alg)
	h.Write(b)
	return hashedDigest(alg, h)
}

// checkDigest returns an [ErrInvalidDigest] unless d is lower-case
// sha256, sha384 or sha512 of the right length. Only a digest that passed
// here may become part of a path.
func checkDigest(d digest.Digest) error {
	alg, enc, ok := strings.Cut(string(d), ":")
	n := digestHexLen(digest.Algorithm(alg))
	switch {
	case !ok:
		return fmt.Errorf("%w %s: no algorithm before a ':'", ErrInvalidDigest, printable(string(d)))
	case n == 0:
		return fmt.Errorf("%w %s: algorithm is not sha256, sha384 or sha512", ErrInvalidDigest, printable(string(d)))
	case len(enc) != n:
		return fmt.Errorf("%w %s: %d characters after the ':', want %d", ErrInvalidDigest, printable(string(d)), len(enc), n)
	}
	for i := range len(enc) {
		if c := enc[i]; c-'0' > 9 && c-'a' > 5 { // unsigned: what lies below wraps round
			return fmt.Errorf("%w %s: not lower-case hexadecimal", ErrInvalidDigest, printable(string(d)))
		}
	}
	return nil
}
