package ocilocal

import "context"

const (
	largeManifest     = 64 << 10 // bytes
	maxLargeManifests = 4
)

// manifestTurns bounds how many large documents of a server are in memory in parsed form. It has
// one element for each that is.
//
// The problem: clients and upstreams choose which documents a server parses, and when. Parsed, a
// document can take ten times the memory of its bytes, and more while it is parsed.
//
// The rule: whoever parses a large manifest or list takes a turn first, and ends it when nothing
// refers to the parsed form any more. Nobody holds a turn while waiting for a client, for an
// upstream or for another turn.
//
// It is safe because a turn then lasts only as long as work on this machine, so slow peers keep
// nobody waiting, and no holder of a turn waits for another one.
type manifestTurns chan struct{}

// A manifestTurn is the turn of one request or fetch. Nil needs no turns: a caller of this package
// answers for what it parses. One goroutine uses a manifestTurn at a time.
type manifestTurn struct {
	turns manifestTurns
	held  bool
}

func newManifestTurns() manifestTurns { return make(manifestTurns, maxLargeManifests) }

// newTurn returns a turn that has not begun.
func (t manifestTurns) newTurn() *manifestTurn { return &manifestTurn{turns: t} }

// begin waits until a document of size bytes may be parsed. The error is that of ctx.
func (t *manifestTurn) begin(ctx context.Context, size int) error {
	if t == nil || t.held || size <= largeManifest {
		return nil
	}
	select {
	case t.turns <- struct{}{}:
		t.held = true
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// end ends the turn, if it has begun. It may begin again.
func (t *manifestTurn) end() {
	if t != nil && t.held {
		t.held = false
		<-t.turns
	}
}
