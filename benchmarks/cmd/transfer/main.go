// Transfer imports, exports, pulls and pushes the same artifacts with ocilocal,
// oras-go, go-containerregistry, regclient and, where it is installed, skopeo in one run,
// and prints what each took. The registry is go-containerregistry's, in a process of its own, on loopback.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/ocilocal/ocilocal/benchmarks"
)

func main() {
	quick := flag.Bool("quick", false, "small sizes: a look, not a result")
	parent := flag.String("dir", "", "directory to work in, on the disk to measure (default: the system's temporary directory)")
	serve := flag.Bool("serve", false, "be the registry")
	only := flag.String("only", "", "run the tasks whose name contains this, or one of these that a | separates")
	flag.Parse()
	run := func() error { return measure(*parent, *only, *quick) }
	if *serve {
		run = beRegistry
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "transfer:", err)
		os.Exit(1)
	}
}

// beRegistry serves until its input ends. It prints its address, and for each line of input the bytes sent and received.
func beRegistry() error {
	var in, out atomic.Int64
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = &counted{r.Body, &in}
		handler.ServeHTTP(&countedWriter{w, &out}, r)
	}))
	fmt.Println(l.Addr())
	for s := bufio.NewScanner(os.Stdin); s.Scan(); {
		fmt.Println(out.Swap(0), in.Swap(0))
	}
	return nil
}

type counted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

type countedWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *countedWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// A server is a registry in a process of its own.
type server struct {
	addr  string
	in    io.WriteCloser
	lines *bufio.Scanner
	cmd   *exec.Cmd
}

func start() (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &server{cmd: exec.Command(self, "-serve")}
	s.cmd.Stderr = os.Stderr
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.lines = bufio.NewScanner(out)
	if !s.lines.Scan() {
		return nil, errors.New("registry didn't start")
	}
	s.addr = s.lines.Text()
	return s, nil
}

// bytes returns what the registry has sent and received since the last call.
func (s *server) bytes() (sent, received int64) {
	fmt.Fprintln(s.in)
	s.lines.Scan()
	fmt.Sscan(s.lines.Text(), &sent, &received)
	return sent, received
}

func (s *server) stop() error { return errors.Join(s.in.Close(), s.cmd.Wait()) }

type measurer struct {
	ctx    context.Context
	dir    string
	only   string
	rounds int
	n      int // of directories made
}

func measure(parent, only string, quick bool) error {
	dir, err := os.MkdirTemp(parent, "ocilocal-transfer-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	m := &measurer{ctx: context.Background(), dir: dir, only: only, rounds: 3}
	many, large, layers, small := 1000, int64(1<<30), int64(32<<20), 500
	if quick {
		many, large, layers, small, m.rounds = 100, 64<<20, 4<<20, 50, 1
	}
	heads := []string{"task"}
	for _, t := range benchmarks.Transfers {
		heads = append(heads, t.Name)
	}
	heads = append(heads, "fastest peer / ocilocal", "ocilocal's memory growth", "its processor time", "MB of bodies on the wire, of each that was measured")
	fmt.Printf("| %s |\n|%s\n", strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	const name = "127.0.0.1:1/bench/artifact"
	if err := m.local(fmt.Sprintf("%d artifacts × 3 × 64 KiB", many), many, func(dir string) (*benchmarks.Work, error) {
		return benchmarks.NewWork(m.ctx, dir, name, 0, many, 3, 64<<10)
	}); err != nil {
		return err
	}
	if err := m.local(fmt.Sprintf("an index of %d images × 3 × 64 KiB", many), 1, func(dir string) (*benchmarks.Work, error) {
		return benchmarks.NewIndexWork(m.ctx, dir, name, many, 3, 64<<10)
	}); err != nil {
		return err
	}
	if err := m.local(fmt.Sprintf("one layer of %d MiB", large>>20), 1, func(dir string) (*benchmarks.Work, error) {
		return benchmarks.NewWork(m.ctx, dir, name, 0, 1, 1, large)
	}); err != nil {
		return err
	}
	if !quick {
		m.rounds = 5 // these are short
	}
	if err := m.remote(fmt.Sprintf("8 layers × %d MiB", layers>>20), 1, 8, layers); err != nil {
		return err
	}
	if err := m.remote(fmt.Sprintf("%d artifacts × 4 KiB", small), small, 1, 4<<10); err != nil {
		return err
	}
	return m.many("16 callers pull one artifact", 16, layers)
}

// many measures callers that pull one artifact of one layer at once: the time, the bytes on the wire, and the bytes that
// were on the disk at a time.
func (m *measurer) many(name string, callers int, size int64) error {
	name += fmt.Sprintf(", one layer of %d MiB", size>>20)
	if !m.wanted(name) {
		return nil
	}
	s, err := start()
	if err != nil {
		return err
	}
	defer s.stop()
	w, err := benchmarks.NewWork(m.ctx, m.fresh("work"), s.addr+"/bench/artifact", 0, 1, 1, size)
	if err != nil {
		return err
	}
	if err := benchmarks.Transfers[0].Push(m.ctx, w.Store, w.Names); err != nil {
		return err
	}
	stored := map[string]int64{}
	if err := m.task(name, 1, func(t benchmarks.Transfer) (*job, error) {
		if t.PullMany == nil {
			return &job{}, nil
		}
		dir := m.fresh("pull")
		var peak func() int64
		begin := func() { peak = benchmarks.PeakDisk(dir) }
		return &job{do: func() error { return t.PullMany(m.ctx, dir, w.Names[0], callers) }, server: s, begin: begin, end: func() error {
			stored[t.Name] = max(stored[t.Name], peak())
			return nil
		}}, nil
	}); err != nil {
		return err
	}
	fmt.Printf("| the same: MB on the disk at a time ")
	for _, t := range benchmarks.Transfers {
		if n, ok := stored[t.Name]; ok {
			fmt.Printf("| %.2f ", float64(n)/1e6)
		} else {
			fmt.Print("| – ")
		}
	}
	fmt.Println("| | | | |")
	return nil
}

func (m *measurer) fresh(name string) string {
	m.n++
	return filepath.Join(m.dir, fmt.Sprintf("%s-%d", name, m.n))
}

// local measures import and export of n artifacts.
func (m *measurer) local(what string, n int, make func(dir string) (*benchmarks.Work, error)) error {
	tasks := map[string]func(*benchmarks.Work, benchmarks.Transfer) func() error{
		"import a directory, " + what: func(w *benchmarks.Work, t benchmarks.Transfer) func() error {
			if t.ImportDir == nil {
				return nil
			}
			return func() error { return t.ImportDir(m.ctx, w.Source(t.Name, false), m.fresh("in"), w.Names) }
		},
		"import a tar, " + what: func(w *benchmarks.Work, t benchmarks.Transfer) func() error {
			if t.ImportTar == nil || t.OneTar && n > 1 {
				return nil
			}
			return func() error { return t.ImportTar(m.ctx, w.Source(t.Name, true), m.fresh("in"), w.Names) }
		},
		"export to a directory, " + what: func(w *benchmarks.Work, t benchmarks.Transfer) func() error {
			if t.ExportDir == nil {
				return nil
			}
			return func() error { return t.ExportDir(m.ctx, w.Own(t.Name), m.fresh("out"), w.Names) }
		},
		"export to a tar, " + what: func(w *benchmarks.Work, t benchmarks.Transfer) func() error {
			if t.ExportTar == nil || t.OneTar && n > 1 {
				return nil
			}
			return func() error { return t.ExportTar(m.ctx, w.Own(t.Name), m.fresh("out"), w.Names) }
		},
	}
	// The same content comes in again, into a store that has all of it.
	again := map[string]func(*benchmarks.Work, benchmarks.Transfer, string) error{
		"import a directory again, " + what: func(w *benchmarks.Work, t benchmarks.Transfer, store string) error {
			return t.ImportDir(m.ctx, w.Source(t.Name, false), store, w.Names)
		},
		"import a tar again, " + what: func(w *benchmarks.Work, t benchmarks.Transfer, store string) error {
			return t.ImportTar(m.ctx, w.Source(t.Name, true), store, w.Names)
		},
	}
	if !slices.ContainsFunc(slices.Concat(slices.Collect(keys(tasks)), slices.Collect(keys(again))), m.wanted) {
		return nil
	}
	w, err := make(m.fresh("work"))
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(keys(tasks)) {
		if err := m.task(name, n, func(t benchmarks.Transfer) (*job, error) { return &job{do: tasks[name](w, t)}, nil }); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(keys(again)) {
		if err := m.task(name, n, func(t benchmarks.Transfer) (*job, error) {
			if first := tasks[strings.Replace(name, " again", "", 1)]; first(w, t) == nil {
				return &job{}, nil
			}
			store := m.fresh("in")
			do := func() error { return again[name](w, t, store) }
			return &job{do: do}, do()
		}); err != nil {
			return err
		}
	}
	return nil
}

func keys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func (m *measurer) wanted(name string) bool {
	return slices.ContainsFunc(strings.Split(m.only, "|"), func(part string) bool { return strings.Contains(name, part) })
}

// remote measures pull and push.
func (m *measurer) remote(what string, n, layers int, size int64) error {
	pull, again, push := "pull, "+what, "pull again, "+what, "push, "+what
	if !m.wanted(pull) && !m.wanted(again) && !m.wanted(push) {
		return nil
	}
	s, err := start()
	if err != nil {
		return err
	}
	defer s.stop()
	w, err := benchmarks.NewWork(m.ctx, m.fresh("work"), s.addr+"/bench/artifact", 0, n, layers, size)
	if err != nil {
		return err
	}
	if err := benchmarks.Transfers[0].Push(m.ctx, w.Store, w.Names); err != nil {
		return err
	}
	if err := m.task(pull, n, func(t benchmarks.Transfer) (*job, error) {
		return &job{do: func() error { return t.Pull(m.ctx, m.fresh("pull"), w.Names) }, server: s}, nil
	}); err != nil {
		return err
	}
	if err := m.task(again, n, func(t benchmarks.Transfer) (*job, error) {
		dir := m.fresh("again")
		return &job{do: func() error { return t.PullAgain(m.ctx, dir, w.Names) }, server: s}, t.Pull(m.ctx, dir, w.Names)
	}); err != nil {
		return err
	}
	// Each push has a registry of its own, which has nothing yet.
	return m.task(push, n, func(t benchmarks.Transfer) (*job, error) {
		s, err := start()
		if err != nil {
			return nil, err
		}
		w, err := benchmarks.NewOwn(m.ctx, m.fresh("push"), s.addr+"/bench/artifact", t.Name, n, layers, size)
		if err != nil {
			return nil, errors.Join(err, s.stop())
		}
		return &job{do: func() error { return t.Push(m.ctx, w.Own(t.Name), w.Names) }, server: s, end: s.stop}, nil
	})
}

// A job is what is measured of a task: one library's part in one round.
type job struct {
	do     func() error
	server *server      // whose bytes are counted; nil without
	begin  func()       // to be called just before; nil for nothing
	end    func() error // to be called afterwards; nil for nothing
}

// task measures one task of n artifacts with each library, in turns, and prints a row.
func (m *measurer) task(name string, n int, prepare func(benchmarks.Transfer) (*job, error)) error {
	if !m.wanted(name) {
		return nil
	}
	took := map[string][]time.Duration{}
	wire := map[string]int64{}
	var busy []time.Duration
	peak := int64(-1)
	few := n == 1 && !strings.Contains(name, "images")
	for round := range m.rounds {
		for i := range benchmarks.Transfers { // not always the same is the first
			t := benchmarks.Transfers[(i+round)%len(benchmarks.Transfers)]
			if t.One && n > 1 {
				continue
			}
			j, err := prepare(t)
			if err == nil && j.do == nil {
				continue
			}
			var d, cpu time.Duration
			var grown, sent int64
			if err == nil {
				d, cpu, grown, sent, err = j.run()
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, t.Name, err)
			}
			took[t.Name] = append(took[t.Name], d)
			if j.server != nil {
				wire[t.Name] = sent
			}
			if t.Name == "ocilocal" {
				peak = max(peak, grown)
				busy = append(busy, cpu)
			}
		}
		// A file system is slow for a while when many files were deleted, and when much was written:
		// what is few files goes at once.
		if few {
			if err := m.clean(); err != nil {
				return err
			}
		}
	}
	m.print(name, took, median(busy), wire, peak)
	return m.clean()
}

// run returns how long the job took, the processor time of this process, by how much memory grew, and how many bytes went over
// the wire.
func (j *job) run() (d, cpu time.Duration, grown, wire int64, err error) {
	benchmarks.SyncAll()
	if j.server != nil {
		j.server.bytes()
	}
	if j.begin != nil {
		j.begin()
	}
	grown, err = benchmarks.PeakMemory(func() error {
		began, busy := time.Now(), benchmarks.ProcessorTime()
		err := j.do()
		d, cpu = time.Since(began), benchmarks.ProcessorTime()-busy
		return err
	})
	if j.server != nil {
		sent, received := j.server.bytes()
		wire = sent + received
	}
	if j.end != nil {
		err = errors.Join(err, j.end())
	}
	return d, cpu, grown, wire, err
}

// clean removes what a task made.
func (m *measurer) clean() error {
	for _, kind := range []string{"in", "out", "pull", "again", "push"} {
		dirs, err := filepath.Glob(filepath.Join(m.dir, kind+"-*"))
		if err != nil {
			return err
		}
		for _, d := range dirs {
			if err := os.RemoveAll(d); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *measurer) print(name string, took map[string][]time.Duration, busy time.Duration, wire map[string]int64, peak int64) {
	fmt.Printf("| %s ", name)
	own := median(took["ocilocal"])
	var fastest, verified time.Duration
	var wires []string
	for _, t := range benchmarks.Transfers {
		d := median(took[t.Name])
		if d == 0 {
			fmt.Print("| – ")
			continue
		}
		fmt.Printf("| %s ", milliseconds(d))
		if n, ok := wire[t.Name]; ok {
			wires = append(wires, fmt.Sprintf("%.2f", float64(n)/1e6))
		}
		if t.Name == "ocilocal" {
			continue
		}
		if fastest == 0 || d < fastest {
			fastest = d
		}
		if (len(wire) > 0 || !t.Unverified) && (verified == 0 || d < verified) {
			verified = d
		}
	}
	ratio := "–"
	if fastest > 0 {
		ratio = fmt.Sprintf("%.2f×", float64(verified)/float64(own))
	}
	if fastest < verified {
		ratio += fmt.Sprintf(" (%.2f× of one that doesn't verify)", float64(fastest)/float64(own))
	}
	fmt.Printf("| %s | %.1f MiB | %s | %s |\n", ratio, float64(peak)/(1<<20), milliseconds(busy), strings.Join(wires, ", "))
}

func median(ds []time.Duration) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(ds))[len(ds)/2]
}

func milliseconds(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1e3)
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}
