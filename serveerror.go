package ocilocal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
)

// The error codes of the distribution specification, except codeUnknown.
const (
	codeBlobUnknown         = "BLOB_UNKNOWN"
	codeUploadInvalid       = "BLOB_UPLOAD_INVALID"
	codeUploadUnknown       = "BLOB_UPLOAD_UNKNOWN"
	codeDigestInvalid       = "DIGEST_INVALID"
	codeManifestBlobUnknown = "MANIFEST_BLOB_UNKNOWN"
	codeManifestInvalid     = "MANIFEST_INVALID"
	codeManifestUnknown     = "MANIFEST_UNKNOWN"
	codeNameInvalid         = "NAME_INVALID"
	codeNameUnknown         = "NAME_UNKNOWN"
	codeSizeInvalid         = "SIZE_INVALID"
	codeUnauthorized        = "UNAUTHORIZED"
	codeDenied              = "DENIED"
	codeUnsupported         = "UNSUPPORTED"
	codeTooManyRequests     = "TOOMANYREQUESTS"
	codeUnknown             = "UNKNOWN" // as other registries send for a failure of the server
)

// A serveError is an answer with an error body. Its message is sent, so it must have no path,
// no address and no text of another error that may have them.
type serveError struct {
	status  int
	code    string
	message string
}

func (e *serveError) Error() string { return e.message }

// serveErrorf returns a [*serveError]. Its arguments reach the client: see there.
func serveErrorf(status int, code, format string, args ...any) error {
	return &serveError{status, code, fmt.Sprintf(format, args...)}
}

// A damagedError is about content of the registry that a client asked for. It keeps a digest
// mismatch of stored content, a 500, apart from one of pushed content, a 400.
type damagedError struct{ err error }

func (e *damagedError) Error() string { return e.err.Error() }
func (e *damagedError) Unwrap() error { return e.err }

// damaged makes a [damagedError] of an error that says that content is damaged. Other errors and
// nil stay as they are. Endpoints that read content call it.
func damaged(err error) error {
	if saysDamaged(err) {
		return &damagedError{err}
	}
	return err
}

// saysDamaged reports whether the error of a read says that the content is damaged.
func saysDamaged(err error) bool {
	return errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch)
}

// serverErrors are the errors for which the client is not to blame, and their answers. They are
// looked up before clientErrors: for an error that matches both, the client had better try again
// than give up.
var serverErrors = []struct {
	is      error
	status  int
	message string
}{
	{ErrClosed, http.StatusServiceUnavailable, "registry is closed"},
	{ErrBusy, http.StatusServiceUnavailable, "registry is busy"},
	{context.Canceled, http.StatusServiceUnavailable, "request was cancelled"},
	{context.DeadlineExceeded, http.StatusServiceUnavailable, "request took too long"},
	{ErrNoSpace, http.StatusInsufficientStorage, "registry has no space left"},
	{ErrReadOnly, http.StatusServiceUnavailable, "registry cannot be written"}, // though it is open for writing
}

// clientErrors are the errors that the client has caused, and their answers. The first match
// counts.
var clientErrors = []struct {
	is     error
	status int
	code   string
}{
	{ErrTooLarge, http.StatusRequestEntityTooLarge, codeSizeInvalid},
	{ErrIncomplete, http.StatusBadRequest, codeManifestBlobUnknown},
	{ErrUnsupportedMediaType, http.StatusBadRequest, codeManifestInvalid},
	{ErrInvalidManifest, http.StatusBadRequest, codeManifestInvalid},
	{ErrArtifactType, http.StatusForbidden, codeDenied},
	{ErrInUse, http.StatusConflict, codeDenied},
	{ErrDigestMismatch, http.StatusBadRequest, codeDigestInvalid},
	{ErrInvalidDigest, http.StatusBadRequest, codeDigestInvalid},
	{ErrSizeMismatch, http.StatusBadRequest, codeSizeInvalid},
	{ErrInvalidReference, http.StatusBadRequest, codeNameInvalid},
}

// timeoutError is an error of a connection. Timeout says whether a deadline has passed.
type timeoutError interface {
	error
	Timeout() bool
}

// answer returns the answer to an error. The first of these that fits counts:
//
//  1. a serveError is the answer already
//  2. the body could not be read: the client stalled, broke off, or sent too much
//  3. the registry can't serve now: see serverErrors
//  4. stored content is damaged: before 5, which would blame the client for it
//  5. the client's fault: see clientErrors
//  6. ErrNotFound, with the code of the endpoint
//  7. anything else is a 500
//
// The text of the error is sent only for 1 and 5, and for a body that is too large. Other texts may
// hold paths and addresses. They are logged instead: see fail.
func (x *exchange) answer(err error) *serveError {
	if e, ok := errors.AsType[*serveError](err); ok {
		return e
	}
	if body, ok := errors.AsType[*badBody](err); ok {
		timeout, ok := errors.AsType[timeoutError](body)
		tooLarge, limited := errors.AsType[*http.MaxBytesError](body) // of a handler around this one
		switch {
		case ok && timeout.Timeout():
			return &serveError{http.StatusRequestTimeout, codeUnknown, "request made no progress"}
		case limited:
			return &serveError{http.StatusRequestEntityTooLarge, codeSizeInvalid, tooLarge.Error()}
		}
		return &serveError{http.StatusBadRequest, codeSizeInvalid, "body ended early or is malformed"}
	}
	err = (&Error{Op: x.r.Method, Err: err}) // for the matches of its Is
	for _, e := range serverErrors {
		if errors.Is(err, e.is) {
			return &serveError{e.status, codeUnknown, e.message}
		}
	}
	if _, ok := errors.AsType[*damagedError](err); ok {
		return &serveError{http.StatusInternalServerError, codeUnknown, "content is damaged"}
	}
	for _, e := range clientErrors {
		if errors.Is(err, e.is) {
			// Send the cause without the operations around it: they hold the local reference, which
			// the client does not know.
			for {
				outer, ok := errors.AsType[*Error](err)
				if !ok {
					break
				}
				err = outer.Err
			}
			return &serveError{e.status, e.code, boundText(err.Error())}
		}
	}
	if errors.Is(err, ErrNotFound) {
		switch x.kind {
		case routeManifest:
			return &serveError{http.StatusNotFound, codeManifestUnknown, "manifest is not known to the registry"}
		case routeUpload:
			return &serveError{http.StatusNotFound, codeUploadUnknown, "upload is not known to the registry"}
		case routeBlob, routeUploads:
			return &serveError{http.StatusNotFound, codeBlobUnknown, "blob is not known to the registry"}
		}
		return &serveError{http.StatusNotFound, codeNameUnknown, "repository is not known to the registry"}
	}
	return &serveError{http.StatusInternalServerError, codeUnknown, "internal error"}
}

// fail answers with an error, and logs it if the server is to blame. It does not log when the
// client is gone: then the error most likely is a cancelled context.
func (x *exchange) fail(err error) {
	e := x.answer(err)
	if e.status >= 500 && x.r.Context().Err() == nil {
		x.registry.opts.Logger.Error("serving failed", slog.String("method", x.r.Method), slog.String("path", x.r.URL.Path), slog.Any("error", err))
	}
	h := x.w.Header()
	// These may have been set for the content that is not sent now. Range and Location stay: by
	// them the client continues an upload that failed.
	for _, name := range []string{"ETag", "Docker-Content-Digest", "Accept-Ranges"} {
		h.Del(name)
	}
	if e.status == http.StatusTooManyRequests || e.status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, _ := json.Marshal(struct {
		Errors []entry `json:"errors"`
	}{[]entry{{e.code, e.message}}}) // strings can always be marshalled
	x.respond(e.status, "application/json", body)
}

// json answers 200 with a document.
func (x *exchange) json(v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	x.respond(http.StatusOK, "application/json", body)
	return nil
}

// respond sends a whole answer, to HEAD without its body. An error of the connection is dropped:
// there is no client left to get it.
func (x *exchange) respond(status int, mediaType string, body []byte) {
	h := x.w.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	x.w.WriteHeader(status)
	if x.r.Method != "HEAD" {
		_ = x.send(func(w *serveWriter) error {
			_, err := w.Write(body)
			return err
		})
	}
}

// empty sends an answer without a body. Its Content-Length is 0, except for a 204, which must not
// have that header (RFC 9110, 8.6).
func (x *exchange) empty(status int) error {
	if status != http.StatusNoContent {
		x.w.Header().Set("Content-Length", "0")
	}
	x.w.WriteHeader(status)
	return nil
}
