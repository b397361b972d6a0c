package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// busyPoll is how long SQLite itself waits for the write lock. It looks again after 1 ms,
// then after twice as long, and so on; being short, it looks often, and begin can look at contexts in between.
const busyPoll = 5 * time.Millisecond

// A writeRequest is one caller's part of a write transaction.
type writeRequest struct {
	ctx      context.Context
	fn       func(*indexTx) error
	alone    bool          // shares its transaction with nobody
	deadline time.Time     // when it has waited long enough for other processes
	done     chan error    // buffered; the outcome
	lead     chan struct{} // buffered; the caller shall commit the queue itself
}

// write runs fn in a write transaction and returns once that is durable.
// Callers that come while another is committing share the next commit, each in
// a savepoint of its own: an error of fn undoes and fails that fn alone.
func (x *index) write(ctx context.Context, fn func(*indexTx) error) error {
	return x.request(&writeRequest{ctx: ctx, fn: fn})
}

// writeAlone is write in a transaction that nobody shares: all that fn reads is
// committed. What fn does outside the index can't be undone by another's failure.
func (x *index) writeAlone(ctx context.Context, fn func(*indexTx) error) error {
	return x.request(&writeRequest{ctx: ctx, fn: fn, alone: true})
}

func (x *index) request(req *writeRequest) error {
	if x.writer == nil {
		return ErrReadOnly
	}
	ctx := req.ctx
	req.deadline, req.done, req.lead = time.Now().Add(x.busy), make(chan error, 1), make(chan struct{}, 1)
	x.mu.Lock()
	x.queue = append(x.queue, req)
	if !x.leading {
		x.leading = true
		req.lead <- struct{}{}
	}
	x.mu.Unlock()
	select {
	case err := <-req.done:
		return err
	case <-req.lead:
	case <-ctx.Done():
		if x.withdraw(req) {
			return ctx.Err()
		}
		select {
		case err := <-req.done: // a leader has it, so its word counts
			return err
		case <-req.lead:
		}
	}
	x.lead(req)
	return <-req.done
}

// lead commits what is queued, and then lets somebody else lead.
func (x *index) lead(self *writeRequest) {
	x.mu.Lock()
	n := 1
	for !x.queue[0].alone && n < len(x.queue) && !x.queue[n].alone {
		n++
	}
	batch := slices.Clone(x.queue[:n])
	x.queue = slices.Delete(x.queue, 0, n)
	x.mu.Unlock()
	var rest []*writeRequest
	defer func() { // after a panic as well: the others must not wait for ever
		x.mu.Lock()
		defer x.mu.Unlock()
		x.queue = append(rest, x.queue...)
		if len(x.queue) > 0 {
			x.queue[0].lead <- struct{}{}
		} else {
			x.leading = false
		}
	}()
	rest = x.commit(batch, self)
}

// withdraw takes a request out of the queue, unless a leader has taken it or it is to lead.
func (x *index) withdraw(req *writeRequest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	i := slices.Index(x.queue, req)
	if i < 0 || len(req.lead) > 0 {
		return false
	}
	x.queue = slices.Delete(x.queue, i, i+1)
	return true
}

// commit runs a batch in one transaction and answers each of its requests. It
// returns those that are left to do because self, which leads, has its answer.
func (x *index) commit(batch []*writeRequest, self *writeRequest) (rest []*writeRequest) {
	batch = x.begin(batch, self)
	if !slices.Contains(batch, self) {
		return batch
	}
	tx := x.writer
	err := errors.New("a call that shared the transaction ended in a panic")
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.rollback())
		}
		for _, r := range batch {
			r.answer(err)
		}
	}()
	err = tx.runAll(batch)
	return nil
}

// answer tells a request's caller the outcome. The first answer counts.
func (r *writeRequest) answer(err error) {
	select {
	case r.done <- err:
	default:
	}
}

// runAll runs the requests, each in its savepoint, and commits. Those that fail
// by themselves are answered.
func (t *indexTx) runAll(batch []*writeRequest) error {
	// A newer program may have migrated the index since it was opened.
	if _, err := t.version(); err != nil {
		return err
	}
	for _, r := range batch {
		failed, err := t.run(r)
		if err != nil {
			return err // the transaction itself is in doubt
		}
		if failed != nil {
			r.answer(failed)
		}
	}
	if err := t.stamp(); err != nil {
		return err
	}
	_, err := t.exec("COMMIT")
	return err
}

// run runs one request in its savepoint. failed is the request's own error.
func (t *indexTx) run(r *writeRequest) (failed, err error) {
	if failed := r.ctx.Err(); failed != nil {
		return failed, nil
	}
	if _, err := t.exec("SAVEPOINT request"); err != nil {
		return nil, err
	}
	if failed = r.fn(t); failed != nil {
		if _, err := t.exec("ROLLBACK TO request"); err != nil {
			if noTransaction(err) {
				err = nil
			}
			return nil, errors.Join(failed, err)
		}
	}
	if _, err = t.exec("RELEASE request"); noTransaction(err) {
		err = fmt.Errorf("%w: SQLite has undone the transaction", ErrIndexIO)
	}
	return failed, err
}

// begin waits for the write lock. It answers the requests whose context ends or
// whose deadline passes meanwhile, and returns the others: with the lock held
// if self is among them, which otherwise has no reason to wait on.
func (x *index) begin(batch []*writeRequest, self *writeRequest) []*writeRequest {
	for {
		batch = slices.DeleteFunc(batch, func(r *writeRequest) bool {
			err := r.ctx.Err()
			if err != nil {
				r.answer(err)
			}
			return err != nil
		})
		if !slices.Contains(batch, self) {
			return batch
		}
		err := x.writer.begin()
		if err == nil {
			return batch
		}
		now := time.Now()
		batch = slices.DeleteFunc(batch, func(r *writeRequest) bool {
			late := !errors.Is(err, ErrBusy) || now.After(r.deadline)
			if late {
				r.answer(err)
			}
			return late
		})
	}
}
