package ocilocal

import (
	"context"
	"errors"
	"net/http"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Upstream makes a [LocalRegistry.Handler] a mirror of another registry. A manifest that is not
// here is pulled with all that it needs, whatever its platforms, before it is served. It then is
// under its own name here, like any other pull. All requests that miss the same content share one
// pull, and an interrupted pull is resumed by the next.
//
// Tags and referrers are listed as they are here. Pushes stay here, too: see HandlerOptions.ReadOnly.
type Upstream struct {
	// Remote is the client to pull with. Nil means [Options.Remote].
	Remote *Remote
	// Host is the registry to pull from, in which a repository has the name that it has here. Empty
	// means the host of the local name. Then HandlerOptions must have a Host or a Name: the server
	// itself is not at localhost.
	Host string
	// MaxBytes, if positive, is how many bytes one miss may add: see [PullOptions]. A miss that needs
	// more is answered with 502.
	MaxBytes int64
	// Revalidate is for how long a tag is served before the registry is asked again. If that fails,
	// for any reason, the tag is served as it is here. Zero means one minute. A negative value asks
	// each time.
	Revalidate time.Duration
}

const (
	defaultRevalidate = time.Minute
	maxAskedTags      = 10_000
)

// resolve returns the descriptor of the manifest of the path. It asks the upstream if there is one.
func (x *exchange) resolve() (ocispec.Descriptor, error) {
	ctx := x.r.Context()
	desc, err := x.repo.Resolve(ctx, x.reference())
	if x.opts.Upstream == nil || err != nil && !errors.Is(err, ErrNotFound) {
		return desc, err
	}
	local, refErr := x.repo.reference(x.reference())
	if refErr != nil {
		return desc, err
	}
	if err == nil && (x.tag == "" || x.askedLately(local)) {
		return desc, nil
	}
	pullErr := x.pullThrough(ctx, local)
	if pullErr == nil {
		return x.repo.Resolve(ctx, x.reference())
	}
	if err == nil {
		x.registry.opts.Logger.Warn("ocilocal: a tag could not be asked for again", "reference", local.String(), "error", pullErr)
		return desc, nil
	}
	if errors.Is(pullErr, ErrNotFound) || ctx.Err() != nil {
		return desc, pullErr
	}
	x.registry.opts.Logger.Warn("ocilocal: a pull from the upstream failed", "reference", local.String(), "error", pullErr)
	return desc, serveErrorf(http.StatusBadGateway, codeUnknown, "the upstream registry failed")
}

// pullThrough brings a manifest from the upstream, under its name here.
func (x *exchange) pullThrough(ctx context.Context, local Reference) error {
	u := x.opts.Upstream
	from := local
	if u.Host != "" {
		name, err := canonicalName(u.Host + "/" + local.Repository())
		if err == nil {
			_, reference := local.key()
			from, err = referenceFromKey(name, reference)
		}
		if err != nil {
			return err
		}
	}
	_, err := x.registry.Pull(ctx, from, &PullOptions{Remote: u.Remote, As: local, MaxBytes: u.MaxBytes, PublishOptions: PublishOptions{Policy: Replace}})
	if err == nil && local.Tag() != "" {
		x.mu.Lock()
		defer x.mu.Unlock()
		if len(x.asked) >= maxAskedTags {
			clear(x.asked)
		}
		x.asked[local] = time.Now()
	}
	return err
}

// askedLately reports whether the upstream need not be asked for a tag again.
func (x *exchange) askedLately(local Reference) bool {
	limit := x.opts.Upstream.Revalidate
	if limit == 0 {
		limit = defaultRevalidate
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	at, ok := x.asked[local]
	return ok && time.Since(at) < limit
}
