package ocilocal

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

// RetryFunc decides whether a request that has failed attempt times with err
// (a [*RemoteError] mostly) is sent again, and after how long. It is not asked when the
// call's context has ended.
type RetryFunc func(attempt int, err error) (wait time.Duration, again bool)

// maxRetryWait is how long DefaultRetry waits at most.
const maxRetryWait = time.Minute

// DefaultRetry tries [RemoteError.Temporary] errors again, up to five times. It waits as
// long as the registry asks, and gives up if that is more than a minute;
// otherwise a random time of up to 0.4 seconds, doubled with each attempt.
func DefaultRetry(attempt int, err error) (wait time.Duration, again bool) {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || !e.Temporary() || attempt > maxRetries || e.RetryAfter > maxRetryWait {
		return 0, false
	}
	if e.RetryAfter > 0 {
		// Not all who were turned away come back at the same moment.
		return e.RetryAfter + rand.N(time.Second), true
	}
	most := 400 * time.Millisecond << (attempt - 1)
	return most/8 + rand.N(most), true
}

// maxServerWait bounds what a Retry-After can say, so that no sum overflows.
const maxServerWait = 365 * 24 * time.Hour

// parseRetryAfter reads seconds or a date (RFC 9110, section 10.2.3). What is neither, or past, is 0.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 63); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(n, uint64(maxServerWait/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(s); err == nil {
		return min(max(at.Sub(now), 0), maxServerWait)
	}
	return 0
}

// again asks the retry policy, and waits. It returns nil if the failed attempt is to be repeated.
func (r *Remote) again(ctx context.Context, attempt int, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	e, remote := errors.AsType[*RemoteError](err)
	if remote && e.givenUp {
		return err
	}
	retry := r.Retry
	if retry == nil {
		retry = DefaultRetry
	}
	wait, again := retry(attempt, err)
	if !again {
		if remote {
			e.givenUp = true
		}
		return err
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
