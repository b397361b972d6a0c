package ocilocal

import "context"

// IndexWrite runs fn in r's next write transaction, which it may share with
// others. fn is given a function that runs SQL in it.
func IndexWrite(ctx context.Context, r *LocalRegistry, fn func(exec func(text string) error) error) error {
	return r.index.write(ctx, func(tx *indexTx) error {
		return fn(func(text string) error {
			_, err := tx.exec(text)
			return err
		})
	})
}

// IndexPragma returns what a pragma is on the writer's connection, and on one of the readers'.
func IndexPragma(r *LocalRegistry, name string) (writer, reader string, err error) {
	err = r.index.write(context.Background(), func(tx *indexTx) error {
		_, err := tx.row("PRAGMA "+name, nil, &writer)
		return err
	})
	if err == nil {
		_, err = r.index.row("PRAGMA "+name, nil, &reader)
	}
	return writer, reader, err
}

// IndexQueue returns how many write calls wait for one that leads.
func IndexQueue(r *LocalRegistry) int {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	return len(r.index.queue)
}

// IndexLeading reports whether a write call is under way.
func IndexLeading(r *LocalRegistry) bool {
	r.index.mu.Lock()
	defer r.index.mu.Unlock()
	return r.index.leading
}

// NewerSchema returns options for a program that knows one schema version more.
func NewerSchema(stmts ...string) *Options { return &Options{more: [][]string{stmts}} }

// RefuseNetworkFS returns the error of a root on a file system with that name.
func RefuseNetworkFS(name string, allow bool) error {
	return (&LocalRegistry{opts: Options{AllowNetworkFS: allow}}).checkFS(name)
}
