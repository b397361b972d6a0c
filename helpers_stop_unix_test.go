//go:build unix

// Stopping and continuing a worker process.

package ocilocal_test

import (
	"os"
	"syscall"
)

func init() {
	suspend = func(p *os.Process) (resume func() error, err error) {
		return func() error { return p.Signal(syscall.SIGCONT) }, p.Signal(syscall.SIGSTOP)
	}
}
