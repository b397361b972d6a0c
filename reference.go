package ocilocal

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
)

// Limits and names of the reference grammar.
const (
	// maxReferenceLen bounds the text before anything is parsed. The longest canonical reference is
	// a name of 255 bytes, a tag of 128 and a sha512 digest of 135, with two separators: 520. Twice
	// that leaves room for spellings that become shorter, and keeps hostile input out of the
	// scanner.
	maxReferenceLen = 1024
	// maxNameLen bounds registry, '/' and repository together. Many clients have this limit
	// (distribution-spec, "Pulling manifests"), so they could not push or pull a longer name.
	maxNameLen = 255
	maxHostLen = 253 // RFC 1035, section 3.1, in text form
	maxTagLen  = 128 // distribution-spec, "Pulling manifests"

	defaultTag = "latest" // the tag of a name without one, as in Docker

	registryDockerHub = "docker.io" // its canonical name; requests go to registry-1.docker.io
	registryGitHub    = "ghcr.io"
)

// A Reference names an artifact: registry, repository, and a tag, a digest or both.
//
// It is always in canonical form. So two spellings of one name are equal by ==, and are the same
// map key. The zero Reference names nothing. Every other one has a name, and a tag or a digest.
type Reference struct {
	name   string // registry + "/" + repository; the registry holds no '/'
	tag    string
	digest digest.Digest
}

// ParseReference reads host[:port]/repository[:tag][@digest] and makes it canonical.
//
// The grammar is that of distribution-spec 1.1, "Pulling manifests":
//
//	repository  [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*
//	tag         [a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}
//	digest      lower-case sha256, sha384 or sha512
//
// The spec does not define the host and the short forms. They follow Docker's rules, which users
// expect of every client:
//
//   - The text before the first '/' is a host only if it has a '.' or a ':', or is localhost, or is
//     an IPv6 address in brackets. Otherwise the host is docker.io. A name without a '/' has no host:
//     "app:5000" is docker.io/library/app with tag 5000.
//   - index.docker.io and registry-1.docker.io are docker.io.
//   - A docker.io repository of one component is in library/.
//   - Without a tag and a digest, the tag is "latest".
//
// Hosts become lower case, and IPv6 addresses (without zone) get their canonical form. A host that
// ends in a number must be an IPv4 address of four decimal parts, because resolvers read 127.1 and
// 0x7f000001 as other spellings of one. [::ffff:127.0.0.1] is refused for the same reason. A port
// is not changed: host and host:443 are two registries. Text that is only a digest is refused, and
// so is any text that begins with "sha256:". docker.io/library/sha256:x is a name.
//
// Nothing else is corrected: no trimming, no unescaping, no lower case for repositories.
//
// Errors: [ErrInvalidReference], which also matches [ErrInvalidDigest] if the digest is invalid.
func ParseReference(s string) (Reference, error) {
	switch {
	case s == "":
		return Reference{}, fmt.Errorf("%w: reference is empty, want host/repository:tag", ErrInvalidReference)
	case len(s) > maxReferenceLen:
		return Reference{}, fmt.Errorf("%w: %s has %d bytes, want at most %d",
			ErrInvalidReference, printable(s), len(s), maxReferenceLen)
	}
	if err := checkPrintable(s); err != nil {
		return Reference{}, err
	}

	var r Reference
	rest, d, pinned := strings.Cut(s, "@")
	if pinned {
		r.digest = digest.Digest(d)
		if err := checkDigest(r.digest); err != nil {
			return Reference{}, fmt.Errorf("%w: %w", ErrInvalidReference, err)
		}
	}
	// A ':' before the last '/' belongs to a port.
	slash := strings.LastIndexByte(rest, '/')
	name, tag, tagged := rest, "", false
	if i := strings.IndexByte(rest[slash+1:], ':'); i >= 0 {
		i += slash + 1
		name, tag, tagged = rest[:i], rest[i+1:], true
	}
	if slash < 0 && isOnlyDigest(name, tagged) {
		return Reference{}, fmt.Errorf("%w: %s is only a digest, want a repository before it: repository@sha256:…",
			ErrInvalidReference, printable(s))
	}
	var err error
	if r.name, err = canonicalName(name); err != nil {
		return Reference{}, err
	}
	switch {
	case tagged:
		if err := checkTag(tag); err != nil {
			return Reference{}, err
		}
		r.tag = tag
	case !pinned:
		r.tag = defaultTag
	}
	return r, nil
}

// MustParseReference is [ParseReference] for constants and tests: it panics on an error.
func MustParseReference(s string) Reference {
	r, err := ParseReference(s)
	if err != nil {
		panic("ocilocal: MustParseReference: " + err.Error())
	}
	return r
}

// GitHubReference returns ghcr.io/org/repo/name:tag. Names on GitHub may have upper-case letters,
// but repositories may not, so org, repo and name become lower case. tag is not changed. name may
// have several components; org and repo have one.
//
// Errors: [ErrInvalidReference].
func GitHubReference(org, repo, name, tag string) (Reference, error) {
	for _, part := range [...]string{org, repo, name} {
		// This comes before ToLower, which turns look-alikes such as U+212A (Kelvin) into ASCII.
		if err := checkPrintable(part); err != nil {
			return Reference{}, err
		}
	}
	for _, part := range [...]string{org, repo} {
		if strings.Contains(part, "/") {
			return Reference{}, fmt.Errorf("%w: %s has a '/', want one GitHub organization or repository",
				ErrInvalidReference, printable(part))
		}
	}
	if err := checkTag(tag); err != nil {
		return Reference{}, err
	}
	full, err := canonicalName(strings.ToLower(registryGitHub + "/" + org + "/" + repo + "/" + name))
	if err != nil {
		return Reference{}, err
	}
	return Reference{name: full, tag: tag}, nil
}

// Registry returns the host, with its port if there is one: "docker.io", "localhost:5000",
// "[::1]:5000".
func (r Reference) Registry() string {
	registry, _, _ := strings.Cut(r.name, "/")
	return registry
}

// Repository returns the name within the registry: "library/alpine".
func (r Reference) Repository() string {
	_, repository, _ := strings.Cut(r.name, "/")
	return repository
}

// Name returns the reference without tag and digest: "docker.io/library/alpine".
func (r Reference) Name() string { return r.name }

// Tag returns the tag, or "" for a reference by digest alone.
func (r Reference) Tag() string { return r.tag }

// Digest returns the digest to which the reference is pinned, or "".
func (r Reference) Digest() digest.Digest { return r.digest }

// IsZero reports whether r is the zero Reference, which names nothing.
func (r Reference) IsZero() bool { return r == Reference{} }

// checkGiven refuses the zero Reference. Every exported method that needs a reference calls it.
func (r Reference) checkGiven() error {
	if r.IsZero() {
		return fmt.Errorf("%w: reference is empty", ErrInvalidReference)
	}
	return nil
}

// String returns the canonical spelling with all parts that defaults have set. [ParseReference] of
// it returns r. The zero Reference gives "".
func (r Reference) String() string {
	switch {
	case r.digest == "" && r.tag == "":
		return r.name
	case r.digest == "":
		return r.name + ":" + r.tag
	case r.tag == "":
		return r.name + "@" + string(r.digest)
	default:
		return r.name + ":" + r.tag + "@" + string(r.digest)
	}
}

// WithTag returns the same name with this tag. It drops the digest, which belongs to the old tag.
//
// Errors: [ErrInvalidReference], also for the zero Reference.
func (r Reference) WithTag(tag string) (Reference, error) {
	if r.IsZero() {
		return Reference{}, fmt.Errorf("%w: reference is empty, cannot add tag %s", ErrInvalidReference, printable(tag))
	}
	if err := checkTag(tag); err != nil {
		return Reference{}, err
	}
	return Reference{name: r.name, tag: tag}, nil
}

// WithDigest returns the same name by digest alone. It drops the tag.
//
// Errors: [ErrInvalidReference], also for the zero Reference. It matches [ErrInvalidDigest] too if
// d is invalid.
func (r Reference) WithDigest(d digest.Digest) (Reference, error) {
	if r.IsZero() {
		return Reference{}, fmt.Errorf("%w: reference is empty, cannot add digest %s", ErrInvalidReference, printable(string(d)))
	}
	if err := checkDigest(d); err != nil {
		return Reference{}, fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	return Reference{name: r.name, digest: d}, nil
}

// Compare orders references by name, then by tag (or by digest if there is no tag), as bytes. That
// is the order of the index. It returns -1, 0 or 1, and 0 only if r == o.
func (r Reference) Compare(o Reference) int {
	rName, rRef := r.key()
	oName, oRef := o.key()
	return cmp.Or(
		strings.Compare(rName, oName),
		strings.Compare(rRef, oRef),
		strings.Compare(string(r.digest), string(o.digest)),
	)
}

// MarshalText returns the canonical spelling. The zero Reference gives no bytes. The error is
// always nil.
func (r Reference) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is [ParseReference], except that empty text gives the zero Reference. After an
// error r is unchanged.
//
// Errors are those of [ParseReference].
func (r *Reference) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*r = Reference{}
		return nil
	}
	parsed, err := ParseReference(string(text))
	if err != nil {
		return err
	}
	*r = parsed
	return nil
}

// key returns the primary key of the ref in the index: the name, and the tag if there is one, or
// else the digest. The digest of a reference with a tag is not part of the key: it says at which
// manifest the ref should point.
func (r Reference) key() (name, reference string) {
	if r.tag != "" {
		return r.name, r.tag
	}
	return r.name, string(r.digest)
}

// referenceFromKey is the inverse of key. Both parts are validated, because another program can
// alter the index. A name that is not canonical is refused, because no query could find it. A valid
// key costs no allocation, unless its host is an IPv6 address: listings make millions of them.
func referenceFromKey(name, reference string) (Reference, error) {
	canonical, err := canonicalName(name)
	if err != nil {
		return Reference{}, err
	}
	if canonical != name {
		return Reference{}, fmt.Errorf("%w: name %s is not in its canonical form %s",
			ErrInvalidReference, printable(name), printable(canonical))
	}
	// A tag cannot have a ':', and every digest has one.
	if strings.IndexByte(reference, ':') < 0 {
		if err := checkTag(reference); err != nil {
			return Reference{}, err
		}
		return Reference{name: name, tag: reference}, nil
	}
	if err := checkDigest(digest.Digest(reference)); err != nil {
		return Reference{}, fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	return Reference{name: name, digest: digest.Digest(reference)}, nil
}

// checkTag returns an [ErrInvalidReference] unless tag is a tag (distribution-spec, "Pulling
// manifests").
func checkTag(tag string) error {
	i := tagFault(tag)
	switch {
	case i < 0:
		return nil
	case tag == "":
		return fmt.Errorf("%w: tag %q is empty, want 1 to %d characters", ErrInvalidReference, tag, maxTagLen)
	case i >= maxTagLen:
		return fmt.Errorf("%w: tag %s has %d characters, want at most %d",
			ErrInvalidReference, printable(tag), len(tag), maxTagLen)
	case tag[i] == ':':
		return fmt.Errorf("%w: tag %s has a ':', want a digest after '@'", ErrInvalidReference, printable(tag))
	}
	return fmt.Errorf("%w: tag %s has %s at byte %d, want letters, digits, '_', and after the first character '.' or '-'",
		ErrInvalidReference, printable(tag), quoteAt(tag, i), i)
}

// isBareTag reports whether s is a tag. A tag has no '/', ':' or '@', so it is never a full name.
// The ref.name annotation of a layout may be either.
func isBareTag(s string) bool { return tagFault(s) < 0 }

// tagFault returns the offset of the first byte that a tag cannot have there, and -1 if s is a tag.
// For text that is too long, that is the first byte beyond the limit.
func tagFault(s string) int {
	if s == "" {
		return 0
	}
	for i := range min(len(s), maxTagLen) {
		c := s[i]
		if !isLowerAlnum(c) && (c < 'A' || c > 'Z') && c != '_' && (i == 0 || c != '.' && c != '-') {
			return i
		}
	}
	if len(s) > maxTagLen {
		return maxTagLen
	}
	return -1
}

// isOnlyDigest reports whether text without a '/' means a digest and not a name: sha256:…, or 64
// hexadecimal digits, which Docker takes for an image ID. By the grammar both are names with a tag
// or without one. Users who write them mean a digest, and would get a name on Docker Hub.
func isOnlyDigest(name string, tagged bool) bool {
	if tagged {
		return digestHexLen(digest.Algorithm(name)) != 0
	}
	n := digestHexLen(digest.SHA256)
	return len(name) == n && checkDigest(digest.NewDigestFromEncoded(digest.SHA256, name)) == nil
}

// canonicalName returns registry + "/" + repository with all defaults applied. If s has this form
// already, it returns s itself, without allocation. It accepts only the bytes of the grammar, so it
// needs no check before it.
func canonicalName(s string) (string, error) {
	registry, repository, found := strings.Cut(s, "/")
	if !found || !isHost(registry) {
		registry, repository = registryDockerHub, s
	} else {
		var err error
		if registry, err = canonicalHost(registry); err != nil {
			return "", err
		}
	}
	if i := repositoryFault(repository); i >= 0 {
		return "", repositoryError(repository, i)
	}
	switch {
	case registry == registryDockerHub && strings.IndexByte(repository, '/') < 0:
		s = registryDockerHub + "/library/" + repository
	case len(registry)+1+len(repository) != len(s) || s[:len(registry)] != registry:
		s = registry + "/" + repository
	}
	if len(s) > maxNameLen {
		return "", fmt.Errorf("%w: name %s has %d characters, want at most %d for registry and repository",
			ErrInvalidReference, printable(s), len(s), maxNameLen)
	}
	return s, nil
}

// isHost reports whether the text before the first '/' is a host. A repository cannot have an
// upper-case letter, so Localhost must be a host.
func isHost(s string) bool {
	return strings.IndexByte(s, '.') >= 0 || strings.IndexByte(s, ':') >= 0 ||
		strings.HasPrefix(s, "[") || strings.EqualFold(s, "localhost")
}

// canonicalHost checks host[:port] and returns it in lower case. It returns s itself if it is
// canonical already.
func canonicalHost(s string) (string, error) {
	if strings.HasPrefix(s, "[") {
		return canonicalIPv6(s)
	}
	host, port, hasPort := strings.Cut(s, ":")
	if hasPort {
		if err := checkPort(s, port); err != nil {
			return "", err
		}
	}
	if len(host) > maxHostLen {
		return "", fmt.Errorf("%w: host %s has %d characters, want at most %d",
			ErrInvalidReference, printable(host), len(host), maxHostLen)
	}
	upper := false
	label := 0 // offset of the current label
	for i := 0; i <= len(host); i++ {
		if i == len(host) || host[i] == '.' {
			if i == label || host[label] == '-' || host[i-1] == '-' {
				return "", fmt.Errorf("%w: host %s has label %s, want labels that are not empty and begin and end with a letter or digit",
					ErrInvalidReference, printable(host), printable(host[label:i]))
			}
			if i < len(host) {
				label = i + 1
			}
			continue
		}
		switch c := host[i]; {
		case isLowerAlnum(c), c == '-':
		case 'A' <= c && c <= 'Z':
			upper = true
		default:
			return "", fmt.Errorf("%w: host %s has %s at byte %d, want letters, digits, '-' and '.'",
				ErrInvalidReference, printable(host), quoteAt(host, i), i)
		}
	}
	if upper {
		s = strings.ToLower(s)
		host = s[:len(host)]
	}
	if isNumber(host[label:]) {
		if addr, err := netip.ParseAddr(host); err != nil || !addr.Is4() {
			return "", fmt.Errorf("%w: host %s ends in a number, want an IPv4 address of four decimal parts",
				ErrInvalidReference, printable(host))
		}
	}
	if s == "index.docker.io" || s == "registry-1.docker.io" {
		return registryDockerHub, nil
	}
	return s, nil
}

// canonicalIPv6 is canonicalHost for [address][:port]. Zones are refused because they have a
// meaning on one machine only.
func canonicalIPv6(s string) (string, error) {
	text, rest, closed := strings.Cut(s[1:], "]")
	addr, err := netip.ParseAddr(text)
	if !closed || err != nil || !addr.Is6() || addr.Is4In6() || addr.Zone() != "" {
		return "", fmt.Errorf("%w: host %s is not an IPv6 address in brackets, without zone and not mapped from IPv4",
			ErrInvalidReference, printable(s))
	}
	if rest != "" {
		port, ok := strings.CutPrefix(rest, ":")
		if !ok {
			return "", fmt.Errorf("%w: host %s has %s after the ']', want a ':' and a port", ErrInvalidReference, printable(s), printable(rest))
		}
		if err := checkPort(s, port); err != nil {
			return "", err
		}
	}
	return "[" + addr.String() + "]" + rest, nil
}

// checkPort accepts 1 to 65535 without leading zeros, so that each port has one spelling. host is
// the text with the port, for the error.
func checkPort(host, port string) error {
	if host == "http:" || host == "https:" {
		return fmt.Errorf("%w: %q is the start of a URL, want a host without scheme", ErrInvalidReference, host)
	}
	n := 0
	ok := port != "" && len(port) <= len("65535") && port[0] != '0'
	for i := 0; ok && i < len(port); i++ {
		ok = '0' <= port[i] && port[i] <= '9'
		n = n*10 + int(port[i]-'0')
	}
	if !ok || n > 65535 {
		return fmt.Errorf("%w: host %s has port %s, want 1 to 65535 without leading zeros",
			ErrInvalidReference, printable(host), printable(port))
	}
	return nil
}

// isNumber reports whether a resolver could read a host that ends in this lower-case label as an
// IPv4 address (WHATWG URL, "ends-in-a-number checker").
func isNumber(label string) bool {
	digits, hex := strings.CutPrefix(label, "0x")
	for _, c := range []byte(digits) {
		if (c < '0' || c > '9') && (!hex || c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// repositoryFault returns the offset of the first byte that a repository cannot have there, len(s)
// if s ends with a separator or is empty, and -1 if s is a repository. In the grammar, '/' is a
// separator like the others: each must have letters or digits on both sides.
func repositoryFault(s string) int {
	for i := 0; ; {
		start := i
		for i < len(s) && isLowerAlnum(s[i]) {
			i++
		}
		if i == start {
			return i
		}
		if i == len(s) {
			return -1
		}
		switch s[i] {
		case '/', '.':
			i++
		case '_':
			i++
			if i < len(s) && s[i] == '_' {
				i++
			}
		case '-':
			for i < len(s) && s[i] == '-' {
				i++
			}
		default:
			return i
		}
	}
}

// repositoryError returns the error for a finding of repositoryFault.
func repositoryError(s string, i int) error {
	const want = "want lower-case letters and digits, joined by '.', '_', '__' or hyphens, in components separated by '/'"
	switch {
	case s == "":
		return fmt.Errorf("%w: repository %q is empty, %s", ErrInvalidReference, s, want)
	case i == len(s):
		return fmt.Errorf("%w: repository %s ends in %q, %s", ErrInvalidReference, printable(s), s[i-1:], want)
	}
	return fmt.Errorf("%w: repository %s has %s at byte %d, %s", ErrInvalidReference, printable(s), quoteAt(s, i), i, want)
}

// checkPrintable refuses spaces, control characters and everything beyond ASCII, such as letters
// that look like ASCII ones.
func checkPrintable(s string) error {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' {
			return fmt.Errorf("%w: %s has %s at byte %d, want ASCII without spaces and control characters",
				ErrInvalidReference, printable(s), quoteAt(s, i), i)
		}
	}
	return nil
}

// quoteAt quotes the character at s[i:]. Characters beyond ASCII are escaped, so that the message
// shows letters that only look like ASCII ones.
func quoteAt(s string, i int) string {
	_, n := utf8.DecodeRuneInString(s[i:])
	return fmt.Sprintf("%+q", s[i:i+n])
}

// isLowerAlnum reports whether c is a lower-case ASCII letter or a digit.
func isLowerAlnum(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }
