package ocilocal

import "context"

// SetFault puts the seam of r's file operations under a test's control: fault
// is called before each one, by any goroutine, and its error is the
// operation's. Nil ends it. No call may be under way.
func SetFault(r *LocalRegistry, fault func(op, name string) error) { r.root.fault = fault }

// OpenFaulty is [Open] with the seam in place from the beginning.
func OpenFaulty(ctx context.Context, dir string, fault func(op, name string) error) (*LocalRegistry, error) {
	return Open(ctx, dir, &Options{fault: fault})
}

// SetLegacyRoot is [Options.LegacyRoot] for an open registry. No call may be under way.
func SetLegacyRoot(r *LocalRegistry, dir string) { r.opts.LegacyRoot = dir }
