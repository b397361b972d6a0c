package ocilocal

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"syscall"
	"time"
)

// The retry state, and who sets and reads it.
//
// The problem: calls are nested. A pull fetches a blob, the blob is one request of several
// attempts, and an attempt may need a token, which is a request with attempts too. If each level
// asked the retry policy about the same failure, five attempts would become 125. And some failures
// do not mean what their status says.
//
// The rule: [Remote.again] is the only place that asks the policy and waits. Each level that can
// repeat its step calls it with the error of that step. Four facts travel with a failure:
//
//   - RemoteError.final: repeating cannot help, although no status says so, because the answer
//     broke the protocol or its content is wrong. The function that makes the error sets it.
//     [RemoteError.Temporary] reads it.
//   - RemoteError.again: repeating will help, whatever the status says, because the step begins
//     differently next time. An upload sets it when its session is gone. Temporary reads it first.
//   - RemoteError.givenUp: the policy was asked about this failure and refused. Only [Remote.again]
//     sets it, and reads it: a level further out gets the error back at once. An upload clears it
//     together with setting again, since a new session is a new step.
//   - remoteCall.once: the request must not be sent again as it is, because its effect is not known
//     (a chunk, the end of an upload). The caller of do sets it. do and doSmall read it, and leave
//     the decision to the caller, which finds out first how far the registry is.
//
// It is safe because an error is owned by the goroutine of its call, and the fields only ever
// forbid attempts, except again, which counts against the policy of the outer step.

// A RetryFunc decides whether a request that has failed attempt times, last with err, is sent
// again, and after which wait. err is a [*RemoteError] in most cases. The function is not asked
// when the call's context has ended. It must be safe for concurrent use.
type RetryFunc func(attempt int, err error) (wait time.Duration, again bool)

const (
	// maxRetryWait is the longest wait to which DefaultRetry agrees.
	maxRetryWait = time.Minute
	// maxRefused is how often DefaultRetry tries again when a connection is refused. That takes
	// 1.35 seconds at most.
	maxRefused = 2
)

// DefaultRetry repeats [RemoteError.Temporary] failures, up to five times. It waits as long as the
// registry asks, and gives up if that is more than a minute. Otherwise it waits for a random time
// of up to 0.45 seconds, doubled with each attempt. If the connection is refused, it gives up after
// two repetitions, within two seconds.
func DefaultRetry(attempt int, err error) (wait time.Duration, again bool) {
	e, ok := errors.AsType[*RemoteError](err)
	if !ok || !e.Temporary() || attempt > maxRetries || e.RetryAfter > maxRetryWait {
		return 0, false
	}
	if refused(err) && attempt > maxRefused {
		return 0, false
	}
	if e.RetryAfter > 0 {
		// Clients that were turned away together do not come back at the same moment.
		return e.RetryAfter + rand.N(time.Second), true
	}
	longest := 400 * time.Millisecond << (attempt - 1)
	return longest/8 + rand.N(longest), true
}

// refused reports whether a connection was refused, because no server listens there.
func refused(err error) bool {
	const windowsRefused = syscall.Errno(10061) // WSAECONNREFUSED, which package syscall does not export
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, windowsRefused)
}

// again decides about a step that has failed attempt times, last with err. It returns nil, after
// the wait, if the step is to be repeated, and otherwise the error of the step.
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
	if r.Logger != nil {
		r.Logger.WarnContext(ctx, "remote request is repeated",
			slog.Int("attempt", attempt), slog.Duration("wait", wait), slog.String("error", err.Error()))
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

// maxServerWait bounds the wait that a Retry-After can ask for, so that no sum overflows.
const maxServerWait = 365 * 24 * time.Hour

// parseRetryAfter reads seconds or a date (RFC 9110, section 10.2.3). Anything else, or a date in
// the past, is 0.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 63); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(n, uint64(maxServerWait/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(s); err == nil {
		return min(max(at.Sub(now), 0), maxServerWait)
	}
	return 0
}
