//go:build !(linux && (amd64 || arm64))

package ocilocal

import "os"

// startWriteback is left to the kernel here.
func startWriteback(*os.File, int64, int64) {}
