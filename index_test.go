package ocilocal_test

import (
	"context"
	"errors"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestQueryCancelled: the end of a context stops a query that is running. The next query works.
func TestQueryCancelled(t *testing.T) {
	r := openTemp(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		close(started)
		done <- ocilocal.IndexQuery(ctx, r, `WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n`)
	}()
	<-started
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
	if err := ocilocal.IndexQuery(t.Context(), r, `SELECT 1`); err != nil {
		t.Error(err)
	}
}
