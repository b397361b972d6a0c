package ocilocal

import (
	"context"
	"iter"
)

// Repositories lists the names (registry/repository) that have refs, in order, by the index alone.
// Of opts it uses Prefix, Limit, and the name of After, after which the listing starts. With Name
// it lists that name if it has refs. It reads in pages, as [LocalRegistry.Refs] does. An error is
// yielded once, at the end.
//
// Errors are those of [LocalRegistry.Refs].
func (r *LocalRegistry) Repositories(ctx context.Context, opts *ListOptions) iter.Seq2[string, error] {
	var o ListOptions
	if opts != nil {
		o = *opts
	}
	return func(yield func(string, error) bool) {
		if err := o.check(); err != nil {
			yield("", opError("list repositories", "", "", err))
			return
		}
		from, reference, below := o.bounds()
		after := ""
		if reference != "" {
			after = from
		}
		inPages(o.Limit, listPage, func(last *string, n int) (page []string, err error) {
			if last != nil {
				after = *last
			}
			err = r.within(ctx, func() (err error) {
				page, err = r.index.names(from, after, below, n)
				return err
			})
			return page, opError("list repositories", "", "", err)
		})(yield)
	}
}
