// Compare does the same work on ocilocal, oras-go and go-containerregistry in
// one run, and prints what each took, the ratios, and the project's targets.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ocilocal/ocilocal/benchmarks"
)

func main() {
	quick := flag.Bool("quick", false, "small sizes: a look in about a minute, not a result")
	parent := flag.String("dir", "", "directory to work in, on the disk to measure (default: the system's temporary directory)")
	flag.Parse()
	if err := run(*parent, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

func run(parent string, quick bool) (err error) {
	dir, err := os.MkdirTemp(parent, "ocilocal-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c := &comparison{
		ctx: context.Background(), dir: dir, quick: quick,
		refs: 100_000, parallel: 2000, large: 1 << 30, rounds: 3,
		publish: map[string][]time.Duration{}, reopen: map[string][]time.Duration{},
	}
	if quick {
		c.refs, c.parallel, c.large = 5100, 500, 128<<20
	}
	steps := []struct {
		name string
		run  func() error
	}{
		// First: ext4 passes over inodes that were freed in the last seconds, one by
		// one, so creating files is slow after anything that deletes many, as the peers do.
		{"eight goroutines", c.goroutines},
		{"publish and open, peers", c.peers},
		{"publish, ocilocal", c.own},
		{"flatness", c.flatness},
		{"open", c.open},
		{"resolve and list", c.look},
		{"large layer", c.largeLayer},
	}
	for _, s := range steps {
		start := time.Now()
		if err := s.run(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Fprintf(os.Stderr, "%-24s %6.1f s\n", s.name, time.Since(start).Seconds())
	}
	c.report()
	return nil
}

// at are the numbers of refs that every library is measured with.
var at = []int{10, 100, 1000, 5000}

type comparison struct {
	ctx      context.Context
	dir      string
	refs     int // of the big registry
	parallel int // artifacts for each measure with goroutines
	large    int64
	quick    bool
	small    bool // what is being measured has not the target's size
	rounds   int

	publish map[string][]time.Duration // by library, mean at each of at
	reopen  map[string][]time.Duration // by library, open+resolve at each of at
	big     benchmarks.Store
	rows    []row
}

type row struct{ what, figure, target, verdict string }

func (c *comparison) add(what, figure, target string, reached bool) {
	verdict := "**not reached**"
	if reached {
		verdict = "reached"
	}
	if c.small {
		verdict = "not judged: too small a size"
	}
	if target == "" {
		verdict = ""
	}
	c.rows = append(c.rows, row{what, figure, target, verdict})
}

// mean times fn for from..to-1 and returns its mean.
func mean(from, to int, fn func(i int) error) (time.Duration, error) {
	start := time.Now()
	for i := from; i < to; i++ {
		if err := fn(i); err != nil {
			return 0, err
		}
	}
	return time.Since(start) / time.Duration(to-from), nil
}

// median is mean for what is short and rare: it isn't moved by one slow call.
func median(n int, fn func(i int) error) (time.Duration, error) {
	all := make([]time.Duration, n)
	for i := range n {
		start := time.Now()
		if err := fn(i); err != nil {
			return 0, err
		}
		all[i] = time.Since(start)
	}
	slices.Sort(all)
	return all[n/2], nil
}

func (c *comparison) publishOf(s benchmarks.Store) func(i int) error {
	return func(i int) error { return s.Publish(c.ctx, i) }
}

// sizes measures publish and reopen with each number of refs in at.
func (c *comparison) sizes(l benchmarks.Library) error {
	dir := filepath.Join(c.dir, l.Name)
	have := 0
	for _, n := range at {
		s, err := l.Open(c.ctx, dir)
		if err != nil {
			return err
		}
		if have < n {
			if err := s.Fill(c.ctx, have, n); err != nil {
				return err
			}
			have = n
		}
		benchmarks.SyncAll()
		count := min(100, 2*n)
		d, err := mean(have, have+count, c.publishOf(s))
		if err != nil {
			return err
		}
		have += count
		c.publish[l.Name] = append(c.publish[l.Name], d)
		if err := s.Close(); err != nil {
			return err
		}
		d, err = median(9, func(i int) error { return c.openResolve(l, dir, i%have) })
		if err != nil {
			return err
		}
		c.reopen[l.Name] = append(c.reopen[l.Name], d)
	}
	s, err := l.Open(c.ctx, dir)
	if err != nil {
		return err
	}
	defer s.Close()
	resolve, err := mean(0, 20, func(i int) error { return s.Resolve(c.ctx, i*251%have) })
	if err != nil {
		return err
	}
	manifest, err := mean(0, 20, func(i int) error { return s.Manifest(c.ctx, i*251%have) })
	if err != nil {
		return err
	}
	list, err := median(5, func(int) error { _, err := s.List(c.ctx); return err })
	if err != nil {
		return err
	}
	c.add(fmt.Sprintf("%s at 5,000 refs: resolve / resolve + manifest / list all", l.Name), fmt.Sprintf("%s / %s / %s", show(resolve), show(manifest), show(list)), "", true)
	return nil
}

func (c *comparison) openResolve(l benchmarks.Library, dir string, i int) error {
	s, err := l.Open(c.ctx, dir)
	if err != nil {
		return err
	}
	if err := s.Resolve(c.ctx, i); err != nil {
		return err
	}
	return s.Close()
}

func (c *comparison) peers() error {
	for _, l := range []benchmarks.Library{benchmarks.Oras, benchmarks.GGCR} {
		if err := c.sizes(l); err != nil {
			return err
		}
	}
	return nil
}

func (c *comparison) own() error {
	if err := c.sizes(benchmarks.Ocilocal); err != nil {
		return err
	}
	own, oras := c.publish["ocilocal"], c.publish["oras-go"]
	r := float64(oras[3]) / float64(own[3])
	c.add("publish at 5,000 refs, against oras-go", fmt.Sprintf("%.1f× as fast", r), "≥ 10×", r >= 10)
	r = float64(oras[2]) / float64(own[2])
	c.add("publish at 1,000 refs, against oras-go", fmt.Sprintf("%.1f× as fast", r), "> 1×", r > 1)
	return nil
}

// goroutines compares the rates of one and of eight, beside what the file system makes of the same.
func (c *comparison) goroutines() error {
	var lib, plain [2]time.Duration
	numbers := [2]int{1, 8}
	for round := range c.rounds { // alternating, so that a slow spell of the disk hits all
		for k, n := range numbers {
			s, err := benchmarks.Ocilocal.Open(c.ctx, filepath.Join(c.dir, fmt.Sprintf("g%d-%d", n, round)))
			if err != nil {
				return err
			}
			d, err := c.parallelTime(n, c.publishOf(s))
			lib[k] += d
			if err = errors.Join(err, s.Close()); err != nil {
				return err
			}
			dir := filepath.Join(c.dir, fmt.Sprintf("plain%d-%d", n, round))
			if err := errors.Join(os.MkdirAll(filepath.Join(dir, "t"), 0o755), os.Mkdir(filepath.Join(dir, "b"), 0o755)); err != nil {
				return err
			}
			d, err = c.parallelTime(n, func(i int) error { return benchmarks.PlainPublish(dir, i) })
			plain[k] += d
			if err != nil {
				return err
			}
		}
	}
	all := time.Duration(c.rounds * c.parallel)
	figure := func(d [2]time.Duration) (float64, string) {
		r := float64(d[0]) / float64(d[1])
		return r, fmt.Sprintf("%.2f× the rate (%s and %s an artifact)", r, show(d[1]/all), show(d[0]/all))
	}
	r, text := figure(lib)
	c.add("8 goroutines publishing, against 1", text, "≥ 2×", r >= 2)
	_, text = figure(plain)
	c.add("the same files written, synced and linked without a library", text, "", true)
	return nil
}

func (c *comparison) parallelTime(n int, fn func(i int) error) (time.Duration, error) {
	benchmarks.SyncAll()
	start := time.Now()
	err := benchmarks.InParallel(n, 0, c.parallel, fn)
	return time.Since(start), err
}

// flatness fills the big registry with distinct artifacts, and compares its
// first hundred with its last hundred, and with the first of a new one beside.
func (c *comparison) flatness() (err error) {
	c.small = c.quick // and so is all that follows
	if c.big, err = benchmarks.Ocilocal.Open(c.ctx, filepath.Join(c.dir, "big")); err != nil {
		return err
	}
	if err := c.big.Fill(c.ctx, 0, 10); err != nil {
		return err
	}
	benchmarks.SyncAll()
	first, err := mean(10, 110, c.publishOf(c.big))
	if err != nil {
		return err
	}
	if err := c.big.Fill(c.ctx, 110, c.refs-100); err != nil {
		return err
	}
	benchmarks.SyncAll()
	last, err := mean(c.refs-100, c.refs, c.publishOf(c.big))
	if err != nil {
		return err
	}
	// Minutes lie between the two, and a disk has its moods.
	fresh, err := benchmarks.Ocilocal.Open(c.ctx, filepath.Join(c.dir, "fresh"))
	if err != nil {
		return err
	}
	defer fresh.Close()
	if err := fresh.Fill(c.ctx, 0, 10); err != nil {
		return err
	}
	benchmarks.SyncAll()
	var inFresh, inBig time.Duration
	for i := range 100 {
		d, err := mean(10+i, 11+i, c.publishOf(fresh))
		if err != nil {
			return err
		}
		inFresh += d
		if d, err = mean(c.refs+i, c.refs+i+1, c.publishOf(c.big)); err != nil {
			return err
		}
		inBig += d
	}
	r, beside := float64(last)/float64(first), float64(inBig)/float64(inFresh)
	c.add(fmt.Sprintf("publish: last hundred of %s against the first hundred", group(c.refs)),
		fmt.Sprintf("%.2f× (%s / %s)", r, show(last), show(first)), "≤ 1.3×", r <= 1.3)
	c.add("the same against a new registry, in turns", fmt.Sprintf("%.2f× (%s / %s)", beside, show(inBig/100), show(inFresh/100)), "≤ 1.3×", beside <= 1.3)
	c.refs += 100
	return nil
}

func (c *comparison) open() error {
	if err := c.big.Close(); err != nil {
		return err
	}
	empty := filepath.Join(c.dir, "empty")
	s, err := benchmarks.Ocilocal.Open(c.ctx, empty)
	if err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	const n = 101
	var opens, resolves [n]time.Duration
	for i := range n {
		start := time.Now()
		s, err := benchmarks.Ocilocal.Open(c.ctx, empty)
		if err != nil {
			return err
		}
		opens[i] = time.Since(start)
		s.Close()
		start = time.Now()
		if s, err = benchmarks.Ocilocal.Open(c.ctx, filepath.Join(c.dir, "big")); err != nil {
			return err
		}
		if err := s.Resolve(c.ctx, i*997%c.refs); err != nil {
			return err
		}
		resolves[i] = time.Since(start)
		s.Close()
	}
	slices.Sort(opens[:])
	slices.Sort(resolves[:])
	r := float64(resolves[n/2]) / float64(opens[n/2])
	c.add(fmt.Sprintf("open + resolve with %s refs, against opening an empty registry", group(c.refs)),
		fmt.Sprintf("%.2f× (%s / %s)", r, show(resolves[n/2]), show(opens[n/2])), "≤ 3×", r <= 3)
	r = float64(c.reopen["oras-go"][3]) / float64(resolves[n/2])
	c.add("the same, against oras-go at 5,000", fmt.Sprintf("%.0f× as fast", r), "≥ 100×", r >= 100)
	c.big, err = benchmarks.Ocilocal.Open(c.ctx, filepath.Join(c.dir, "big"))
	return err
}

func (c *comparison) look() error {
	const n = 20_000
	for i := range 2000 {
		if err := c.big.Manifest(c.ctx, i*7919%c.refs); err != nil {
			return err
		}
	}
	d, err := mean(0, n, func(i int) error { return c.big.Resolve(c.ctx, i*7919%c.refs) })
	if err != nil {
		return err
	}
	c.add("resolve", show(d), "≤ 25 µs", d <= 25*time.Microsecond)
	if d, err = mean(0, n, func(i int) error { return c.big.Manifest(c.ctx, i*7919%c.refs) }); err != nil {
		return err
	}
	c.add("resolve + read, verify and parse the manifest", show(d), "≤ 60 µs", d <= 60*time.Microsecond)
	list := func(int) error {
		got, err := c.big.List(c.ctx)
		if err == nil && got != c.refs {
			err = fmt.Errorf("%d refs listed, want %d", got, c.refs)
		}
		return err
	}
	if d, err = median(5, list); err != nil {
		return err
	}
	c.add(fmt.Sprintf("list %s refs", group(c.refs)), show(d), "≤ 250 ms", d <= 250*time.Millisecond)
	grown, err := benchmarks.PeakMemory(func() error { return list(0) })
	if err != nil {
		return err
	}
	c.add("memory growth of that", mib(grown), "constant (≤ 8 MiB)", grown >= 0 && grown <= 8<<20)
	pager := c.big.(interface {
		Page(context.Context, int) (int, error)
	})
	if d, err = mean(0, 200, func(i int) error { _, err := pager.Page(c.ctx, i*1009%c.refs); return err }); err != nil {
		return err
	}
	c.add("a page of 100 by prefix", show(d), "≤ 1 ms", d <= time.Millisecond)
	return c.big.Close()
}

func (c *comparison) largeLayer() error {
	size := c.large
	libraries := []benchmarks.Library{benchmarks.Ocilocal, benchmarks.Oras, benchmarks.GGCR}
	plain := make([]time.Duration, c.rounds)
	hash := make([]time.Duration, c.rounds)
	in, out := map[string][]time.Duration{}, map[string][]time.Duration{}
	peakIn, peakOut := map[string]int64{}, map[string]int64{}
	for round := range c.rounds {
		seed := uint64(round)
		name := filepath.Join(c.dir, "plain")
		benchmarks.SyncAll()
		start := time.Now()
		if err := benchmarks.PlainWrite(name, benchmarks.Large(seed, size)); err != nil {
			return err
		}
		plain[round] = time.Since(start)
		if err := os.Remove(name); err != nil {
			return err
		}
		start = time.Now()
		io.CopyBuffer(struct{ io.Writer }{sha256.New()}, benchmarks.Large(seed, size), make([]byte, 256<<10))
		hash[round] = time.Since(start)
		d := benchmarks.DigestLarge(seed, size)
		for _, l := range libraries {
			dir := filepath.Join(c.dir, "large")
			s, err := l.Open(c.ctx, dir)
			if err != nil {
				return err
			}
			benchmarks.SyncAll()
			start := time.Now()
			peak, err := benchmarks.PeakMemory(func() error { return s.Put(c.ctx, d, size, benchmarks.Large(seed, size)) })
			if err != nil {
				return err
			}
			in[l.Name] = append(in[l.Name], time.Since(start))
			peakIn[l.Name] = max(peakIn[l.Name], peak)
			start = time.Now()
			if peak, err = benchmarks.PeakMemory(func() error { return s.Get(c.ctx, d, size) }); err != nil {
				return err
			}
			out[l.Name] = append(out[l.Name], time.Since(start))
			peakOut[l.Name] = max(peakOut[l.Name], peak)
			if err := s.Close(); err != nil {
				return err
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	what := fmt.Sprintf("a layer of %d MiB", size>>20)
	r := float64(middle(plain)) / float64(middle(in["ocilocal"]))
	c.add(what+" in, against plain write + fsync", fmt.Sprintf("%.2f× (%s / %s)", r, speed(size, middle(in["ocilocal"])), speed(size, middle(plain))), "≥ 0.85×", r >= 0.85)
	c.add(what+" in, oras-go / ggcr, not durable", fmt.Sprintf("%s / %s", speed(size, middle(in["oras-go"])), speed(size, middle(in["ggcr"]))), "", true)
	r = float64(middle(hash)) / float64(middle(out["ocilocal"]))
	c.add(what+" out, verified, against sha256", fmt.Sprintf("%.2f× (%s / %s)", r, speed(size, middle(out["ocilocal"])), speed(size, middle(hash))), "≥ 0.8×", r >= 0.8)
	c.add(what+" out, oras-go / ggcr, verified by the caller", fmt.Sprintf("%s / %s", speed(size, middle(out["oras-go"])), speed(size, middle(out["ggcr"]))), "", true)
	peak := max(peakIn["ocilocal"], peakOut["ocilocal"])
	c.add("memory growth of in and out", fmt.Sprintf("%s and %s", mib(peakIn["ocilocal"]), mib(peakOut["ocilocal"])), "< 32 MiB", peak >= 0 && peak < 32<<20)
	return nil
}

func (c *comparison) report() {
	fmt.Println("| publish one artifact, mean, with so many refs | 10 | 100 | 1,000 | 5,000 | durable |\n|---|---|---|---|---|---|")
	libraries := []benchmarks.Library{benchmarks.Ocilocal, benchmarks.Oras, benchmarks.GGCR}
	for _, l := range libraries {
		durable := "no"
		if l.Durable {
			durable = "yes"
		}
		fmt.Printf("| %s | %s | %s |\n", l.Name, join(c.publish[l.Name]), durable)
	}
	fmt.Println("\n| open + resolve + close, with so many refs | 10 | 100 | 1,000 | 5,000 |\n|---|---|---|---|---|")
	for _, l := range libraries {
		fmt.Printf("| %s | %s |\n", l.Name, join(c.reopen[l.Name]))
	}
	fmt.Println("\n| measure | figure | target | |\n|---|---|---|---|")
	for _, r := range c.rows {
		fmt.Printf("| %s | %s | %s | %s |\n", r.what, r.figure, r.target, r.verdict)
	}
}

func join(ds []time.Duration) string {
	var s []string
	for _, d := range ds {
		s = append(s, show(d))
	}
	return strings.Join(s, " | ")
}

func middle(ds []time.Duration) time.Duration {
	s := slices.Clone(ds)
	slices.Sort(s)
	return s[len(s)/2]
}

func show(d time.Duration) string {
	if us := float64(d.Nanoseconds()) / 1e3; us < 1000 {
		return fmt.Sprintf("%.1f µs", us)
	}
	return fmt.Sprintf("%.2f ms", float64(d.Nanoseconds())/1e6)
}

func speed(size int64, d time.Duration) string {
	return fmt.Sprintf("%.2f GB/s", float64(size)/1e9/d.Seconds())
}

func mib(n int64) string {
	if n < 0 {
		return "unknown"
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

func group(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
