package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestProcessCondition tells conditions of a process or call from errors about the content that is
// read.
func TestProcessCondition(t *testing.T) {
	for _, err := range []error{
		context.Canceled, context.DeadlineExceeded, ocilocal.ErrClosed, fs.ErrClosed, ocilocal.ErrBusy, ocilocal.ErrIndexIO, ocilocal.ErrNoSpace,
		ocilocal.ErrReadOnly, syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM,
	} {
		wrapped := &ocilocal.Error{Op: "verify", Err: fmt.Errorf("blob: %w", &fs.PathError{Op: "open", Path: "blobs", Err: err})}
		if !ocilocal.ProcessCondition(err) || !ocilocal.ProcessCondition(wrapped) {
			t.Errorf("%v is not a condition of the process", err)
		}
	}
	for _, err := range []error{
		nil, errors.New("else"), syscall.EIO, syscall.EACCES, syscall.ENOENT, fs.ErrNotExist, ocilocal.ErrNotFound, ocilocal.ErrDigestMismatch,
		ocilocal.ErrSizeMismatch, ocilocal.ErrCorruptIndex, ocilocal.ErrForeignIndex, ocilocal.ErrIncomplete,
	} {
		if ocilocal.ProcessCondition(err) {
			t.Errorf("%v is a condition of the process", err)
		}
	}
}
