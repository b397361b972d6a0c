package ocilocal

// SetFault puts the seam of r's file operations under a test's control: fault
// is called before each one that changes something, by any goroutine, and its
// error is the operation's. Nil ends it. No call may be under way.
func SetFault(r *LocalRegistry, fault func(op, name string) error) { r.blobs.fault = fault }
