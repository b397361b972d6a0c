//go:build race

// Whether the race detector watches the tests.

package ocilocal_test

// raceDetector is true if the tests are built with -race. A [sync.Pool] then drops a part of what
// it is given, so how much is allocated says nothing about buffers that are used again.
const raceDetector = true
