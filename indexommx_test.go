package ocilocal_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// TestOMMXHostileIndex imports from indexes in which refs is a view, a virtual table or another
// table. They are refused, and none of them is read.
func TestOMMXHostileIndex(t *testing.T) {
	r := openTemp(t, nil)
	for what, text := range hostileRefs {
		o := newOMMXRoot(t, 0)
		o.exec("PRAGMA user_version = 2")
		o.exec("CREATE TABLE ommx_local_registry_metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
		o.exec(strings.ReplaceAll(text, "DIGEST", "manifest_digest"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		report, err := r.ImportOMMX(ctx, o.dir, nil)
		cancel()
		if !errors.Is(err, ocilocal.ErrForeignIndex) || report.Scanned != 0 {
			t.Errorf("%s: %+v, %v", what, report, err)
		}
	}
}
