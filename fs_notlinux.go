//go:build !linux

package ocilocal

// networkFS can't tell here; the package comment warns of network file systems.
func networkFS(string) (string, error) { return "", nil }
