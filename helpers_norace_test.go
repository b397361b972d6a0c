//go:build !race

// Whether the race detector watches the tests: see helpers_race_test.go.

package ocilocal_test

const raceDetector = false
