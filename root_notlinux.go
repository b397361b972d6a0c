//go:build !linux

package ocilocal

import "os"

// networkFS can't tell here; the package comment warns of network file systems.
func networkFS(string) (string, error) { return "", nil }

// kernelCopies is false where the kernel isn't asked to copy.
func kernelCopies(_, _ *os.File) bool { return false }
