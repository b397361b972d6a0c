package ocilocal

import (
	"context"
	"time"
)

// AskHelper runs a credential helper with another time limit than usual.
func AskHelper(ctx context.Context, name, host string, limit time.Duration) (Credential, error) {
	return askHelper(ctx, name, host, limit)
}
