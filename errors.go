package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// How errors are made. Each exported method adds its operation once, with addOp, so that a message
// reads like a sentence and its cause stays reachable:
//
//	*Error                operation, reference or path, digest
//	└ fmt.Errorf("%w: …") the facts, with the sentinel first
//	  ├ sentinel          found by errors.Is: ErrNotFound, ErrDigestMismatch, …
//	  └ cause             an error of the file system, of SQLite, or of the caller's reader or function
//
// An exported method that calls another one gets an *Error from it, and passes that on unchanged.
// No code compares the text of an error. SQLite's errors get their sentinels by code, in index
// files.

// A sentinel is an error with a text of this package that also matches the standard library's error
// of the same meaning, so errors.Is works with either.
type sentinel struct {
	text string
	is   error
}

func (s *sentinel) Error() string        { return s.text }
func (s *sentinel) Is(target error) bool { return s.is != nil && target == s.is }

// The sentinels. An error of this package matches one of them with [errors.Is], or is an error of
// the file system, of the context, or of a reader, writer or function that the caller gave. The
// text of an error may change; do not match it.
var (
	// ErrNotFound: the reference, manifest or blob is not in the registry.
	// It also matches [fs.ErrNotExist].
	ErrNotFound error = &sentinel{"not found", fs.ErrNotExist}
	// ErrClosed: the registry, builder or reader was closed before the call.
	// It also matches [fs.ErrClosed].
	ErrClosed error = &sentinel{"already closed", fs.ErrClosed}
	// ErrExists: the target of an export exists already. It also matches [fs.ErrExist].
	ErrExists error = &sentinel{"already exists", fs.ErrExist}
	// ErrReadOnly: the registry was opened read-only or lies on a read-only file system, and the
	// call would write to it. It also matches [syscall.EROFS].
	ErrReadOnly error = &sentinel{"registry is read-only", syscall.EROFS}
	// ErrNoSpace: the disk (or quota) is full. It also matches [syscall.ENOSPC].
	ErrNoSpace error = &sentinel{"no space left on the disk", syscall.ENOSPC}

	// ErrConflict: the ref points at another digest and the policy keeps it, or it does not point
	// at the digest that the caller expected. [*ConflictError] has the facts.
	ErrConflict = errors.New("ref conflict")
	// ErrDigestMismatch: the bytes hash to another digest than the one named.
	ErrDigestMismatch = errors.New("digest mismatch")
	// ErrSizeMismatch: there are fewer or more bytes than the descriptor says.
	ErrSizeMismatch = errors.New("size mismatch")
	// ErrAbsent: the registry records this layer or manifest as absent: see [ImportResult.Absent].
	// The error matches [ErrNotFound] too.
	ErrAbsent = errors.New("absent")
	// ErrIncomplete: a manifest, config or layer that the artifact needs is missing, so the
	// artifact cannot be published.
	ErrIncomplete = errors.New("artifact is incomplete")

	// ErrInUse: a manifest in the repository needs the content, so it cannot be deleted.
	ErrInUse = errors.New("content is needed")

	// ErrInvalidReference: the text is not a reference.
	ErrInvalidReference = errors.New("invalid reference")
	// ErrBareName: content to import has a name that is not a full reference, such as a tag, and no
	// option gives it another. See [ImportOptions].
	ErrBareName = errors.New("the content's name is not a full reference")
	// ErrInvalidDigest: the text is not a digest that this package accepts: lower-case sha256,
	// sha384 or sha512 of the right length.
	ErrInvalidDigest = errors.New("invalid digest")
	// ErrInvalidManifest: the document is malformed, ambiguous, or contradicts its descriptor.
	ErrInvalidManifest = errors.New("invalid manifest")
	// ErrInvalidLayout: a layout directory or archive is malformed or unsafe.
	ErrInvalidLayout = errors.New("invalid layout")
	// ErrInvalidArgument: the arguments of the call contradict each other or cannot be used.
	ErrInvalidArgument = errors.New("invalid argument")
	// ErrUnsupportedMediaType: this package does not support the format of the content.
	ErrUnsupportedMediaType = errors.New("unsupported media type")
	// ErrArtifactType: the registry's options do not accept the artifact's type.
	ErrArtifactType = errors.New("artifact type refused")
	// ErrTooLarge: the input exceeds one of the package's limits.
	ErrTooLarge = errors.New("limit exceeded")

	// ErrUnauthorized: the registry or its token server requires credentials, or other ones than it
	// got. It also matches [fs.ErrPermission].
	ErrUnauthorized error = &sentinel{"unauthorized", fs.ErrPermission}
	// ErrDenied: the registry accepted the credentials, or requires none, and refuses the request.
	// It also matches [fs.ErrPermission].
	ErrDenied error = &sentinel{"denied", fs.ErrPermission}
	// ErrRateLimited: the registry limits the rate of requests. [RemoteError.RetryAfter] may say
	// how long to wait.
	ErrRateLimited = errors.New("rate limited")
	// ErrUnsupportedManifest: the registry does not accept manifests of this form.
	ErrUnsupportedManifest = errors.New("registry does not accept this form of manifest")
	// ErrRejected: the registry refuses the request with a 4xx status that no other sentinel
	// covers. [RemoteError.Codes] may say why.
	ErrRejected = errors.New("registry rejects the request")
	// ErrProtocol: an answer of a remote registry violates HTTP or distribution-spec, or it asks
	// for a request that would be unsafe.
	ErrProtocol = errors.New("registry broke the protocol")
	// ErrTransport: there was no answer or no complete one, or the registry reported a failure of
	// its own. Trying again later may help.
	ErrTransport = errors.New("registry cannot be reached or fails")

	// ErrForeignIndex: the root's index.sqlite3 was not made by this package for this root, or its
	// schema was altered. It is not changed.
	ErrForeignIndex = errors.New("index belongs to something else")
	// ErrForeignRoot: the directory cannot be a registry, because something else in it has one of
	// the names that a registry uses, or because it belongs to another user. It is not changed. The
	// error also matches [ErrForeignIndex].
	ErrForeignRoot error = &sentinel{"directory belongs to something else", ErrForeignIndex}
	// ErrNewerSchema: the index was written by a newer version of this package. It is not changed.
	// [*SchemaError] has both versions.
	ErrNewerSchema = errors.New("index schema is newer than this program")
	// ErrCorruptIndex: SQLite found the index damaged.
	ErrCorruptIndex = errors.New("index is damaged")
	// ErrBusy: another process held the index's write lock for longer than [Options.BusyTimeout].
	ErrBusy = errors.New("index is locked by another process")
	// ErrIndexIO: reading or writing the index failed in the file system.
	ErrIndexIO = errors.New("index input/output error")
	// ErrUnsafe: garbage collection deleted nothing, because it could have deleted needed content.
	// The report that is returned with it says why.
	ErrUnsafe = errors.New("collection would not be safe")
	// ErrNetworkFS: the root lies on a network file system, where SQLite's WAL is unsafe.
	ErrNetworkFS = errors.New("root is on a network file system")
)

// An Error adds to an error the operation that failed and its object. The exported method adds it,
// once.
type Error struct {
	Op        string        // the operation: "open", "build", "resolve", …
	Reference string        // the reference, path or name of its object; may be empty
	Digest    digest.Digest // the digest of its object; may be empty
	Err       error         // the cause; never nil
}

// Error prints the operation, its object, and the cause.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("ocilocal: ")
	b.WriteString(e.Op)
	if e.Reference != "" {
		fmt.Fprintf(&b, " %s", printable(e.Reference))
	}
	if e.Digest != "" {
		fmt.Fprintf(&b, " %s", printable(e.Digest.String()))
	}
	b.WriteString(": ")
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes the file system's own errors match [ErrNoSpace] and [ErrReadOnly], as SQLite's do.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrNoSpace:
		return slices.ContainsFunc(noSpace, func(full syscall.Errno) bool { return errors.Is(e.Err, full) })
	case ErrReadOnly:
		return errors.Is(e.Err, syscall.EROFS)
	}
	return false
}

// opError wraps err, if there is one, for the exported method op. An error that an inner exported
// method has wrapped already is not changed. Most methods call addOp instead. opError is for
// iterators, which yield their error, and for wrappers around a body that several methods share.
func opError(op, reference string, d digest.Digest, err error) error {
	if err == nil {
		return nil
	}
	if _, done := errors.AsType[*Error](err); done {
		return err
	}
	return &Error{Op: op, Reference: reference, Digest: d, Err: err}
}

// processCondition reports whether err concerns this process, this call or the disk as a whole, and
// not the file that was being read:
//
//   - the call was cancelled, or the registry closed
//   - the process has no descriptors or no memory left
//   - the disk is full or read-only
//   - the index is busy or cannot be read
//
// Everything that is read next would fail in the same way. So such an error ends a call. It never
// means that content is damaged or missing: otherwise a repair could move good files away, and a
// collection could delete needed ones.
//
// EIO from a blob's file is not such a condition: one bad sector must not end a verification. It is
// not damage either, since the next read may succeed.
func processCondition(err error) bool {
	for _, e := range []error{context.Canceled, context.DeadlineExceeded, ErrClosed, fs.ErrClosed,
		ErrBusy, ErrIndexIO, ErrNoSpace, ErrReadOnly, syscall.EROFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	matches := func(e syscall.Errno) bool { return errors.Is(err, e) }
	return slices.ContainsFunc(noSpace, matches) || slices.ContainsFunc(noResources, matches)
}

// errStop ends a walk early, without an error.
var errStop = errors.New("stop")

// addOp is opError for a deferred call, the first in an exported method with a named result err:
//
//	defer addOp(&err, "tag", ref.String(), d)
func addOp(err *error, op, reference string, d digest.Digest) { *err = opError(op, reference, d, *err) }

// ignoreNotExist returns nil for an error that matches [fs.ErrNotExist]. It is for files that
// another process may have removed already.
func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// printable makes text from outside safe for a message, where it is printed with %s. It bounds the
// text, and quotes it if it is empty or has a character that a terminal or a log could misread. All
// text from files, servers and callers goes through it, unless it was validated.
func printable(s string) string {
	s = boundText(s)
	if s == "" {
		return strconv.Quote(s)
	}
	for _, c := range s {
		if c < 0x21 || c > 0x7e && c != '…' {
			return strconv.Quote(s)
		}
	}
	return s
}

// boundText cuts text to the length that a message may have. It does not make the text safe: use
// [printable], unless other code does that.
func boundText(s string) string {
	const longest = 200
	if len(s) > longest {
		return s[:longest] + "…"
	}
	return s
}

// A ConflictError says that a ref was not moved. It matches [ErrConflict].
type ConflictError struct {
	Reference Reference
	// Existing is the digest at which the ref points. It is empty if the caller expected a ref that
	// does not exist.
	Existing digest.Digest
	// Incoming is the digest that the call would have set.
	Incoming digest.Digest
	// Expected is the digest that PublishOptions.Expected has; empty if it is not set.
	Expected digest.Digest
}

func (e *ConflictError) Error() string {
	switch {
	case e.Expected != "" && e.Existing == "":
		return fmt.Sprintf("%s does not exist, expected %s", e.Reference, e.Expected)
	case e.Expected != "":
		return fmt.Sprintf("%s points at %s, expected %s", e.Reference, e.Existing, e.Expected)
	default:
		return fmt.Sprintf("%s already points at %s, not at %s (use another reference, or the Replace policy)",
			e.Reference, e.Existing, e.Incoming)
	}
}

// Is reports whether target is [ErrConflict].
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// A SchemaError has the schema version of an index, and the newest one that this program supports.
// It matches [ErrNewerSchema].
type SchemaError struct {
	Found, Supported int
}

func (e *SchemaError) Error() string {
	return fmt.Sprintf("index has schema version %d, this program supports up to %d: use a newer ocilocal", e.Found, e.Supported)
}

// Is reports whether target is [ErrNewerSchema].
func (e *SchemaError) Is(target error) bool { return target == ErrNewerSchema }

// A MissingSubjectError says that an artifact's subject is not in the registry. It matches
// [ErrNotFound]. Pull or import the subject to correct it.
type MissingSubjectError struct {
	Artifact digest.Digest      // the artifact with the subject
	Subject  ocispec.Descriptor // as in the artifact's manifest
}

func (e *MissingSubjectError) Error() string {
	return fmt.Sprintf("subject %s of %s is not in the registry (pull or import it)", e.Subject.Digest, e.Artifact)
}

// Is reports whether target is [ErrNotFound] or [fs.ErrNotExist].
func (e *MissingSubjectError) Is(target error) bool {
	return target == ErrNotFound || target == fs.ErrNotExist
}
