// Serve pushes to and pulls from registry servers in this process, in turns, and prints medians of
// the time and of the processor time, client included. The client is oras-go with four workers.
// ocilocal and distribution sync what they store, the others nothing.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/olareg/olareg"
	olaregconfig "github.com/olareg/olareg/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/ocilocal/ocilocal"
	"github.com/ocilocal/ocilocal/benchmarks"
)

const workers = 4

func main() {
	rounds := flag.Int("rounds", 5, "rounds, of which the medians are printed")
	small := flag.Int("small", 200, "small artifacts")
	large := flag.Int("large", 256, "MiB of the large layer")
	repositories := flag.Int("repositories", 10_000, "repositories with ten tags each, for the list of tags; 0 leaves it out")
	flag.Parse()
	log.SetFlags(0)
	if err := run(context.Background(), *rounds, *small, *large, *repositories); err != nil {
		log.Fatal(err)
	}
}

// A server is a kind of registry. It starts on an empty directory.
type server struct {
	name  string
	start func(dir string) (h http.Handler, stop func() error, err error)
}

var servers = []server{
	{"ocilocal", func(dir string) (http.Handler, func() error, error) {
		r, err := ocilocal.Open(context.Background(), dir, nil)
		if err != nil {
			return nil, nil, err
		}
		return r.Handler(nil), r.Close, nil
	}},
	{"olareg", func(dir string) (http.Handler, func() error, error) {
		s := olareg.New(olaregconfig.Config{
			Storage: olaregconfig.ConfigStorage{StoreType: olaregconfig.StoreDir, RootDir: dir},
			Log:     slog.New(slog.DiscardHandler),
		})
		return s, s.Close, nil
	}},
	{"go-containerregistry", func(dir string) (http.Handler, func() error, error) {
		h := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)))
		return h, func() error { return nil }, nil
	}},
	{"distribution", func(dir string) (http.Handler, func() error, error) {
		config := &configuration.Configuration{Storage: configuration.Storage{
			"filesystem":  {"rootdirectory": dir},
			"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
		}}
		config.Log.AccessLog.Disabled = true
		logrus.SetLevel(logrus.FatalLevel)
		app := handlers.NewApp(context.Background(), config)
		return app, app.Shutdown, nil
	}},
}

// A cost is what a task took.
type cost struct{ time, cpu time.Duration }

// timed returns what fn takes.
func timed(fn func() error) (cost, error) {
	began, cpu := time.Now(), benchmarks.ProcessorTime()
	err := fn()
	return cost{time.Since(began), benchmarks.ProcessorTime() - cpu}, err
}

// median returns the medians of both.
func median(costs []cost) cost {
	mid := func(of func(cost) time.Duration) time.Duration {
		var all []time.Duration
		for _, c := range costs {
			all = append(all, of(c))
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	return cost{mid(func(c cost) time.Duration { return c.time }), mid(func(c cost) time.Duration { return c.cpu })}
}

func run(ctx context.Context, rounds, small, large, repositories int) error {
	// The directories go at the end. In the seconds after many files were deleted, ext4 takes several
	// times as long to make new ones.
	dir, err := os.MkdirTemp("", "ocilocal-serve-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if repositories > 0 {
		if err := tagPages(ctx, filepath.Join(dir, "tags"), repositories); err != nil {
			return err
		}
	}
	big := make([]byte, large<<20)
	rand.NewChaCha8([32]byte{1}).Read(big)
	costs := map[string]map[string][]cost{} // task → server → costs
	tasks := []string{fmt.Sprintf("push %d small", small), fmt.Sprintf("pull %d small", small), fmt.Sprintf("push %d MiB", large), fmt.Sprintf("pull %d MiB", large)}
	for _, task := range tasks {
		costs[task] = map[string][]cost{}
	}
	var bare []cost
	for round := range rounds {
		for i := range servers {
			s := servers[(i+round)%len(servers)] // another one first, each time
			took, err := measure(ctx, s, filepath.Join(dir, fmt.Sprint(s.name, round)), small, big)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			for i, task := range tasks {
				costs[task][s.name] = append(costs[task][s.name], took[i])
			}
		}
		c, err := bareFiles(filepath.Join(dir, fmt.Sprint("bare", round)), small)
		if err != nil {
			return err
		}
		bare = append(bare, c)
	}
	fmt.Print("| task |")
	for _, s := range servers {
		fmt.Printf(" %s |", s.name)
	}
	fmt.Print(" fastest other / ocilocal |\n|---|", strings.Repeat("---|", len(servers)+1), "\n")
	for _, task := range tasks {
		for _, kind := range []struct {
			name string
			of   func(cost) time.Duration
		}{
			{"", func(c cost) time.Duration { return c.time }},
			{", processor", func(c cost) time.Duration { return c.cpu }},
		} {
			fmt.Printf("| %s%s |", task, kind.name)
			var own, fastest time.Duration
			for i, s := range servers {
				took := kind.of(median(costs[task][s.name]))
				fmt.Printf(" %.0f ms |", float64(took.Microseconds())/1000)
				if i == 0 {
					own = took
				} else if fastest == 0 || took < fastest {
					fastest = took
				}
			}
			fmt.Printf(" %.2f× |\n", float64(fastest)/float64(own))
		}
	}
	c := median(bare)
	fmt.Printf("\nThe files of the small artifacts written, synced and linked, and a log synced for each, without a server: %.0f ms, %.0f ms of processor time\n",
		float64(c.time.Microseconds())/1000, float64(c.cpu.Microseconds())/1000)
	return nil
}

// bareFiles does what durable pushes of small artifacts can't do without, as few system calls as
// possible: for each artifact, three new files synced side by side and linked, then a sync of the
// directory, and 32 KiB more in a log and a sync of that.
func bareFiles(dir string, small int) (cost, error) {
	for _, d := range []string{dir, filepath.Join(dir, "new"), filepath.Join(dir, "blobs")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return cost{}, err
		}
	}
	blobs, err := os.Open(filepath.Join(dir, "blobs"))
	if err != nil {
		return cost{}, err
	}
	defer blobs.Close()
	wal, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return cost{}, err
	}
	defer wal.Close()
	var mu sync.Mutex
	return timed(func() error {
		return inParallel(small, func(i int) error {
			var g errgroup.Group
			for j, size := range []int{4096, 10, 400} {
				g.Go(func() error {
					name := fmt.Sprintf("%d-%d", i, j)
					f, err := os.OpenFile(filepath.Join(dir, "new", name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
					if err != nil {
						return err
					}
					defer f.Close()
					if _, err := f.Write(make([]byte, size)); err != nil {
						return err
					}
					if err := f.Sync(); err != nil {
						return err
					}
					return os.Link(f.Name(), filepath.Join(dir, "blobs", name))
				})
			}
			if err := g.Wait(); err != nil {
				return err
			}
			if err := blobs.Sync(); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if _, err := wal.Write(make([]byte, 32<<10)); err != nil {
				return err
			}
			return wal.Sync()
		})
	})
}

// inParallel calls fn with the numbers below n, in as many goroutines as there are workers.
func inParallel(n int, fn func(i int) error) error {
	var g errgroup.Group
	g.SetLimit(workers)
	for i := range n {
		g.Go(func() error { return fn(i) })
	}
	return g.Wait()
}

// measure returns the costs of the tasks.
func measure(ctx context.Context, s server, dir string, small int, big []byte) (took []cost, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	h, stop, err := s.start(dir)
	if err != nil {
		return nil, err
	}
	srv := httptest.NewServer(h)
	defer func() {
		srv.Close()
		if stopErr := stop(); err == nil {
			err = stopErr
		}
	}()
	repo, err := remote.NewRepository(strings.TrimPrefix(srv.URL, "http://") + "/org/app")
	if err != nil {
		return nil, err
	}
	repo.PlainHTTP = true
	all := func(fn func(i int) error) func() error {
		return func() error { return inParallel(small, fn) }
	}
	for _, task := range []func() error{
		all(func(i int) error {
			return push(ctx, repo, fmt.Sprintf("v%d", i), bytes.Repeat(fmt.Appendf(nil, "%08d", i), 512), fmt.Appendf(nil, `{"n":%d}`, i))
		}),
		all(func(i int) error { return pull(ctx, repo, fmt.Sprintf("v%d", i)) }),
		func() error { return push(ctx, repo, "large", big, []byte("{}")) },
		func() error { return pull(ctx, repo, "large") },
	} {
		c, err := timed(task)
		if err != nil {
			return nil, err
		}
		took = append(took, c)
	}
	return took, nil
}

func push(ctx context.Context, repo *remote.Repository, tag string, layer, config []byte) error {
	put := func(mediaType string, b []byte) (ocispec.Descriptor, error) {
		desc := content.NewDescriptorFromBytes(mediaType, b)
		return desc, repo.Push(ctx, desc, bytes.NewReader(b))
	}
	l, err := put("application/octet-stream", layer)
	if err != nil {
		return err
	}
	c, err := put(ocispec.MediaTypeImageConfig, config)
	if err != nil {
		return err
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{l}}
	m.SchemaVersion = 2
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return repo.PushReference(ctx, content.NewDescriptorFromBytes(m.MediaType, raw), bytes.NewReader(raw), tag)
}

func pull(ctx context.Context, repo *remote.Repository, tag string) error {
	desc, src, err := repo.FetchReference(ctx, tag)
	if err != nil {
		return err
	}
	raw, err := content.ReadAll(src, desc)
	src.Close()
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		src, err := repo.Fetch(ctx, d)
		if err != nil {
			return err
		}
		v := content.NewVerifyReader(src, d)
		_, err = io.Copy(io.Discard, v)
		if err == nil {
			err = v.Verify()
		}
		src.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// tagPages lists tags in a registry that has many.
func tagPages(ctx context.Context, dir string, repositories int) error {
	r, err := ocilocal.Open(ctx, dir, nil)
	if err != nil {
		return err
	}
	defer r.Close()
	first, err := ocilocal.ParseReference("localhost/r0/app:v0")
	if err != nil {
		return err
	}
	b, err := r.NewBuilder(first, &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example"})
	if err != nil {
		return err
	}
	a, err := b.Build(ctx)
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(64)
	for i := range repositories {
		for tag := range 10 {
			g.Go(func() error {
				ref, err := ocilocal.ParseReference(fmt.Sprintf("localhost/r%d/app:v%d", i, tag))
				if err == nil {
					_, err = r.Tag(ctx, a.Digest(), ref, nil)
				}
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	h := r.Handler(nil)
	page := func(name string) error {
		path := fmt.Sprintf("/v2/%s/app/tags/list?n=10", name)
		res := httptest.NewRecorder()
		h.ServeHTTP(res, httptest.NewRequest("GET", path, nil))
		if res.Code != http.StatusOK {
			return fmt.Errorf("%s: %d", path, res.Code)
		}
		return nil
	}
	for range 100 { // statements are prepared, and caches filled
		if err := page("r0"); err != nil {
			return err
		}
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const pages = 1000
	var took []time.Duration
	for range pages {
		c, err := timed(func() error { return page(fmt.Sprintf("r%d", rand.IntN(repositories))) })
		if err != nil {
			return err
		}
		took = append(took, c.time)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	slices.Sort(took)
	fmt.Printf("%d repositories with 10 tags: a page of tags takes %v in the median, %v at the 99th percentile; the heap grew by %d KiB in %d pages\n\n",
		repositories, took[pages/2], took[pages*99/100], (int64(after.HeapAlloc)-int64(before.HeapAlloc))>>10, pages)
	return nil
}
