// Faults and kills at every file operation of something that a test does.
//
// A first run, in which nothing fails, records the operations. Then each of them fails in a
// separate run. Several goroutines may copy and sync files at once, so the order of operations
// differs from run to run. But each operation is done to each file equally often in every run. So
// a point is identified by operation, file and occurrence. If a run does not reach its point, the
// test fails. TestPointsDoNotVary checks that all runs have the same points.

package ocilocal_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// A point is one file operation: the nth time that op is done to name, counted from 1.
type point struct {
	op, name string
	nth      int
}

func (p point) String() string { return fmt.Sprintf("%s %s (%d)", p.op, p.name, p.nth) }

// args returns the words by which a worker process gets a point: see pointFromArgs.
func (p point) args() []string { return []string{p.op, p.name, strconv.Itoa(p.nth)} }

func pointFromArgs(args []string) (p point, err error) {
	if len(args) != 3 {
		return point{}, fmt.Errorf("a point has 3 words, not %q", args)
	}
	p = point{op: args[0], name: args[1]}
	p.nth, err = strconv.Atoi(args[2])
	return p, err
}

// randomText is a random part of a temporary file's name, or the time of a directory of held blobs.
var randomText = regexp.MustCompile(`[A-Z2-7]{26}|\bheld/[0-9]+`)

// pointCounter names the points that a seam passes. Names below base are relative to it, and random
// parts are "*", so that each run has the same names.
type pointCounter struct {
	base   string
	mu     sync.Mutex
	counts map[point]int
	points []point
}

// next returns the point of an operation that is about to be done.
func (c *pointCounter) next(op, name string) point {
	name = filepath.ToSlash(strings.TrimPrefix(name, c.base))
	p := point{op: op, name: randomText.ReplaceAllString(name, "*")}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = map[point]int{}
	}
	c.counts[p]++
	p.nth = c.counts[p]
	c.points = append(c.points, p)
	return p
}

// A pointSeam is a seam of file operations that acts at one point and records all others.
type pointSeam struct {
	pointCounter
	at     point                       // the zero point is never reached
	act    func() error                // at that point; its error is the operation's
	always func(op, name string) error // at every other; nil means none
	hit    atomic.Bool
}

// fault is the seam itself.
func (s *pointSeam) fault(op, name string) error {
	switch p := s.next(op, name); {
	case p == s.at:
		s.hit.Store(true)
		return s.act()
	case s.always != nil:
		return s.always(op, name)
	}
	return nil
}

// everyNth picks each step-th of points, beginning with one that chance picks.
func everyNth(points []point, step int) []point {
	var picked []point
	for i := rand.N(step); i < len(points); i += step {
		picked = append(picked, points[i])
	}
	return picked
}

// TestPointsDoNotVary runs each flow several times, under load. Each run has the same points, in
// any order.
func TestPointsDoNotVary(t *testing.T) {
	for i := range flows {
		f := &flows[i]
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			count := func() map[point]int {
				points := map[point]int{}
				for _, p := range f.points(t) {
					points[point{p.op, p.name, 0}]++
				}
				return points
			}
			first := count()
			for range scaled(2, 5, 50) {
				for p, n := range count() {
					if first[p] != n {
						t.Errorf("%s %s: %d times, then %d", p.op, p.name, first[p], n)
					}
				}
			}
		})
	}
}

// points records those of the flow, from opening to closing.
func (f *flow) points(t *testing.T) []point {
	t.Helper()
	root := f.prepare(t)
	seam := &pointSeam{pointCounter: pointCounter{base: filepath.Dir(root)}, always: f.always}
	r, err := ocilocal.OpenFaulty(t.Context(), root, seam.fault)
	if err != nil {
		t.Fatal(err)
	}
	err = f.run(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return seam.points
}
