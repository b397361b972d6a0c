package ocilocal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Group commit. A durable commit costs an fsync, so callers share them: while one goroutine
// commits, the requests of others queue up, and the next commit takes all of them. There is no
// goroutine for this. One of the callers leads: it commits a batch, and then hands the lead to the
// first in the queue.
//
//	             request                    lead                      commit
//	caller ───▶ in x.queue ──────────▶ in the leader's batch ──────▶ answered by done
//	             │        ▲                  │
//	             │        └── rest: the leader had its answer, and the batch has not begun
//	             └─ withdraw: its context ended
//
// Who owns a request:
//
//   - In x.queue, its caller does. It may withdraw, unless it has been given the lead: a leader
//     must hand the lead on, or all later calls would wait for ever. Both are decided under x.mu.
//   - In a batch, the leader does. The caller waits for the answer even if its context ends,
//     because its part may be committed. The leader looks at the contexts of its batch until the
//     write lock is held.
//   - Each request is answered once. done and lead have room for their one message, so that
//     nobody blocks on a caller that has not come to reading it.
//
// x.leading is set while a caller leads or has been given the lead. Only the leader uses x.writer.
//
// A request that fails undoes its own savepoint and nothing else. A request that panics, or a
// transaction that SQLite has ended, fails the whole batch: nothing of it is committed. A request
// that acts outside the index is alone in its transaction, so that no other one can undo what it
// relies on.

// busyPoll is how long SQLite itself waits for the write lock. It looks again after 1 ms, then
// after twice as long, and so on. A short wait looks often, and begin looks at contexts in between.
const busyPoll = 5 * time.Millisecond

// A writeRequest is one caller's part of a write transaction.
type writeRequest struct {
	ctx      context.Context
	fn       func(*indexTx) error
	alone    bool          // shares its transaction with nobody
	deadline time.Time     // when it has waited long enough for other processes
	done     chan error    // buffered; the outcome
	lead     chan struct{} // buffered; tells the caller to commit the queue
}

// write runs fn in a write transaction and returns once that is durable. Callers that come while
// another one is committing share the next commit. Each has its own savepoint, so an error of fn
// undoes and fails that fn alone. fn must not use the index in any other way than by its argument:
// it would wait for itself, or read what is older than the transaction.
func (x *index) write(ctx context.Context, fn func(*indexTx) error) error {
	return x.request(&writeRequest{ctx: ctx, fn: fn})
}

// writeAlone is write in a transaction that is not shared. All that fn reads is committed, and no
// other call's failure undoes the transaction after fn has acted outside the index. So a collection
// uses it, which deletes files inside fn.
func (x *index) writeAlone(ctx context.Context, fn func(*indexTx) error) error {
	return x.request(&writeRequest{ctx: ctx, fn: fn, alone: true})
}

// request queues a request and waits for its answer, in the meantime leading if it gets the lead.
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
		case err := <-req.done: // it may be committed, so the answer counts
			return err
		case <-req.lead:
		}
	}
	x.lead(req)
	return <-req.done
}

// lead commits the first requests of the queue, and hands the lead to the first of those that are
// left.
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
	defer func() { // after a panic as well, or the others would wait for ever
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

// commit runs a batch in one transaction and answers each of its requests. If self, which leads,
// has its answer before the transaction begins, commit returns the requests that are left.
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

// runAll runs the requests, each in its savepoint, and commits. It answers those that fail
// alone. Its error is that of the transaction, which then must be rolled back.
func (t *indexTx) runAll(batch []*writeRequest) error {
	// A newer program may have migrated the index since it was opened.
	if _, err := t.version(); err != nil {
		return err
	}
	for _, r := range batch {
		failed, err := t.run(r)
		if err != nil {
			return err
		}
		if failed != nil {
			r.answer(failed)
		}
	}
	if err := t.stamp(); err != nil {
		return err
	}
	return t.commit()
}

// run runs one request in its savepoint. failed is the request's error, err the transaction's. On
// errors such as a full disk SQLite may end the whole transaction by itself. Then the savepoint
// does not exist any more, and the requests before this one are undone as well: that is err.
func (t *indexTx) run(r *writeRequest) (failed, err error) {
	if failed := r.ctx.Err(); failed != nil {
		return failed, nil
	}
	if _, err := t.exec("SAVEPOINT request"); err != nil {
		return nil, err
	}
	if failed = r.fn(t); failed != nil {
		clear(t.newTypes)
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

// begin waits for the write lock. Meanwhile it answers the requests whose context ends or whose
// deadline passes, and returns the others. If self is among these, the lock is held. If self has
// its answer, begin returns at once without the lock, so that self's caller can return.
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
