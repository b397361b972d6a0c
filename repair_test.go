package ocilocal_test

import (
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// TestRepairForeignMode: a repair goes on if it cannot change the permissions of another user's
// file.
func TestRepairForeignMode(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("modes are not looked at")
	}
	r := openTemp(t, nil)
	dontWatch(r.Root())
	a := published(t, r, "example.com/a:v1", "layer", nil)
	os.Chmod(blobFile(r, digest.FromString("layer")), 0o644)
	execIndex(t, r.Root(), "DELETE FROM members")
	ocilocal.SetFault(r, func(op, name string) error {
		if op == "chmod" && strings.HasPrefix(name, "blobs/") {
			return syscall.EPERM
		}
		return nil
	})
	report, err := r.Repair(t.Context(), nil)
	ocilocal.SetFault(r, nil)
	if err != nil || len(report.Rewritten) != 1 || len(report.Left) != 1 || report.Left[0].Kind != ocilocal.ProblemMode {
		t.Errorf("%v, %+v", err, report)
	}
	checkArtifact(t, a, "layer")
}
