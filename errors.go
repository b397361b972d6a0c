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

// sentinel is an error that prints clean and still is the standard library's
// error of the same meaning, so that errors.Is works with either.
type sentinel struct {
	text string
	is   error
}

func (s *sentinel) Error() string        { return s.text }
func (s *sentinel) Is(target error) bool { return s.is != nil && target == s.is }

// The sentinels. An error of this package matches one of them with [errors.Is], or is an error of
// the file system, of the context, or of what the caller gave.
// The text of an error is for people; match none of it.
var (
	// ErrNotFound: the reference, manifest or blob is not in the registry.
	// It also matches [fs.ErrNotExist].
	ErrNotFound error = &sentinel{"not found", fs.ErrNotExist}
	// ErrClosed: the registry, builder or reader was closed before the call.
	// It also matches [fs.ErrClosed].
	ErrClosed error = &sentinel{"already closed", fs.ErrClosed}
	// ErrExists: an export target is there already.
	// It also matches [fs.ErrExist].
	ErrExists error = &sentinel{"already exists", fs.ErrExist}
	// ErrReadOnly: a write was asked of a registry that was opened read-only,
	// or that lies on a read-only file system. It also matches [syscall.EROFS].
	ErrReadOnly error = &sentinel{"registry is read-only", syscall.EROFS}
	// ErrNoSpace: the disk (or quota) is full. It also matches [syscall.ENOSPC].
	ErrNoSpace error = &sentinel{"no space left on the disk", syscall.ENOSPC}

	// ErrConflict: the ref points at another digest and the policy keeps it,
	// or it moved away from the digest that the caller expected.
	// [*ConflictError] carries the facts.
	ErrConflict = errors.New("ref conflict")
	// ErrDigestMismatch: the bytes hash to another digest than the one named.
	ErrDigestMismatch = errors.New("digest mismatch")
	// ErrSizeMismatch: there are fewer or more bytes than the descriptor says.
	ErrSizeMismatch = errors.New("size mismatch")
	// ErrAbsent: the registry records this layer or manifest as absent: see
	// [ImportResult.Absent]. The error matches [ErrNotFound] too.
	ErrAbsent = errors.New("absent")
	// ErrIncomplete: a manifest, config or layer that the artifact needs is
	// missing, so it can't be published.
	ErrIncomplete = errors.New("artifact is incomplete")

	// ErrInUse: something in the repository needs the content, so it can't be deleted.
	ErrInUse = errors.New("content is needed")

	// ErrInvalidReference: the text is not a reference.
	ErrInvalidReference = errors.New("invalid reference")
	// ErrBareName: content that is imported has a name that is not a full reference, such as a tag,
	// and no option says what to call it here. See [ImportOptions].
	ErrBareName = errors.New("the content's name is not a full reference")
	// ErrInvalidDigest: the text is not a digest that this package takes:
	// lower-case sha256, sha384 or sha512 of the right length.
	ErrInvalidDigest = errors.New("invalid digest")
	// ErrInvalidManifest: the document is malformed, ambiguous, or contradicts its descriptor.
	ErrInvalidManifest = errors.New("invalid manifest")
	// ErrInvalidLayout: a layout directory or archive is malformed or unsafe.
	ErrInvalidLayout = errors.New("invalid layout")
	// ErrInvalidArgument: the call's arguments contradict each other or can't be used.
	ErrInvalidArgument = errors.New("invalid argument")
	// ErrUnsupportedMediaType: the content is of a format that this package doesn't handle.
	ErrUnsupportedMediaType = errors.New("unsupported media type")
	// ErrArtifactType: the registry's options don't accept the artifact's type.
	ErrArtifactType = errors.New("artifact type refused")
	// ErrTooLarge: the input passes one of the package's limits.
	ErrTooLarge = errors.New("limit exceeded")

	// ErrUnauthorized: the registry or its token server wants credentials, or
	// better ones than it got. It also matches [fs.ErrPermission].
	ErrUnauthorized error = &sentinel{"unauthorized", fs.ErrPermission}
	// ErrDenied: the registry took the credentials, or needs none, and refuses.
	// It also matches [fs.ErrPermission].
	ErrDenied error = &sentinel{"denied", fs.ErrPermission}
	// ErrRateLimited: the registry wants fewer requests. [RemoteError.RetryAfter] may say how long.
	ErrRateLimited = errors.New("rate limited")
	// ErrUnsupportedManifest: the registry doesn't take manifests of this form.
	ErrUnsupportedManifest = errors.New("registry doesn't take this form of manifest")
	// ErrRejected: the registry refuses the request as it is, with a 4xx status that no other
	// sentinel covers. [RemoteError.Codes] may say why.
	ErrRejected = errors.New("registry rejects the request")
	// ErrProtocol: a remote registry answered what HTTP or distribution-spec
	// don't allow, or asked for what would be unsafe.
	ErrProtocol = errors.New("registry broke the protocol")
	// ErrTransport: no answer came, or no complete one, or the registry failed on
	// its side. Trying again later may help.
	ErrTransport = errors.New("registry can't be reached or fails")

	// ErrForeignIndex: the root's index.sqlite3 was not made by this package
	// for this root, or its schema was altered. It is left untouched.
	ErrForeignIndex = errors.New("index belongs to something else")
	// ErrForeignRoot: the directory cannot be a registry, because something else in it has one of
	// the names that a registry uses, or because it belongs to another user. It is left untouched.
	// It also matches [ErrForeignIndex].
	ErrForeignRoot error = &sentinel{"directory belongs to something else", ErrForeignIndex}
	// ErrNewerSchema: the index was written by a newer version of this package.
	// It is left untouched. [*SchemaError] carries both versions.
	ErrNewerSchema = errors.New("index schema is newer than this program")
	// ErrCorruptIndex: SQLite found the index damaged.
	ErrCorruptIndex = errors.New("index is damaged")
	// ErrBusy: another process held the index's write lock for longer than [Options.BusyTimeout].
	ErrBusy = errors.New("index is locked by another process")
	// ErrIndexIO: reading or writing the index failed in the file system.
	ErrIndexIO = errors.New("index input/output error")
	// ErrUnsafe: garbage collection deleted nothing, because it could have
	// deleted what is needed. The report that comes with it says why.
	ErrUnsafe = errors.New("collection would not be safe")
	// ErrNetworkFS: the root lies on a network file system, where SQLite's WAL is unsafe.
	ErrNetworkFS = errors.New("root is on a network file system")
)

// An Error says what a method of this package was doing, and to what, when Err stopped it.
// It is added once, by the exported method.
type Error struct {
	Op        string        // the operation: "open", "build", "resolve", …
	Reference string        // the reference, path or name it was done to; may be empty
	Digest    digest.Digest // the digest it was done to; may be empty
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

// opError wraps err, if there is one, for the exported method op.
// An error that an inner exported method has wrapped already stays as it is.
func opError(op, reference string, d digest.Digest, err error) error {
	if err == nil {
		return nil
	}
	if _, done := errors.AsType[*Error](err); done {
		return err
	}
	return &Error{Op: op, Reference: reference, Digest: d, Err: err}
}

// processCondition reports whether err says something about this process, this call or the disk as
// a whole: it is cancelled or closed, out of descriptors, memory or space, may not write, or cannot
// get at the index. Such an error meets whatever is read next as well. It ends a call, and never
// means that what was being read is damaged or missing.
//
// EIO from a blob's file is not such a condition: one bad sector must not end a verification.
// It is not damage either, since the next read may succeed.
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

// ignoreNotExist is for what somebody else may have removed already.
func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// printable makes text from outside safe for a message, where it stands under %s: it bounds the
// text, and quotes it if it is empty or has anything that a terminal or a log could misread. All
// text from files, servers and callers that was not validated goes through it.
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

// boundText cuts text to the length that a message can take. It does not make the text safe: use
// [printable], unless something else does.
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
	// Existing is what the ref points at; empty when a ref that was expected to exist does not.
	Existing digest.Digest
	// Incoming is what was offered and did not become visible under the ref.
	Incoming digest.Digest
	// Expected is the digest that the caller demanded to find, if it did.
	Expected digest.Digest
}

func (e *ConflictError) Error() string {
	switch {
	case e.Expected != "" && e.Existing == "":
		return fmt.Sprintf("%s does not exist, expected it at %s", e.Reference, e.Expected)
	case e.Expected != "":
		return fmt.Sprintf("%s points at %s, expected %s", e.Reference, e.Existing, e.Expected)
	default:
		return fmt.Sprintf("%s already points at %s, not at %s (use another reference, or the Replace policy)",
			e.Reference, e.Existing, e.Incoming)
	}
}

// Is reports whether target is [ErrConflict].
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// A SchemaError says which schema version an index has and which this program
// knows. It matches [ErrNewerSchema].
type SchemaError struct {
	Found, Supported int
}

func (e *SchemaError) Error() string {
	return fmt.Sprintf("index has schema version %d, this program knows up to %d: use a newer ocilocal", e.Found, e.Supported)
}

// Is reports whether target is [ErrNewerSchema].
func (e *SchemaError) Is(target error) bool { return target == ErrNewerSchema }

// A MissingSubjectError says that an artifact's subject isn't in the registry.
// It matches [ErrNotFound]. Pulling or importing the subject mends it.
type MissingSubjectError struct {
	Artifact digest.Digest      // whose subject it is
	Subject  ocispec.Descriptor // as the artifact's manifest has it
}

func (e *MissingSubjectError) Error() string {
	return fmt.Sprintf("subject %s of %s is not in the registry (pull or import it)", e.Subject.Digest, e.Artifact)
}

// Is reports whether target is [ErrNotFound] or [fs.ErrNotExist].
func (e *MissingSubjectError) Is(target error) bool {
	return target == ErrNotFound || target == fs.ErrNotExist
}
