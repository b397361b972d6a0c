// Serve pushes to and pulls from registry servers in this process, in turns, and prints medians. The
// client is oras-go with four workers. Only ocilocal syncs what it stores.
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
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/olareg/olareg"
	olaregconfig "github.com/olareg/olareg/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/ocilocal/ocilocal"
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
}

func run(ctx context.Context, rounds, small, large, repositories int) error {
	big := make([]byte, large<<20)
	rand.NewChaCha8([32]byte{1}).Read(big)
	times := map[string]map[string][]time.Duration{} // task → server → times
	tasks := []string{fmt.Sprintf("push %d small", small), fmt.Sprintf("pull %d small", small), fmt.Sprintf("push %d MiB", large), fmt.Sprintf("pull %d MiB", large)}
	for _, task := range tasks {
		times[task] = map[string][]time.Duration{}
	}
	for round := range rounds {
		for i := range servers {
			s := servers[(i+round)%len(servers)] // another one first, each time
			took, err := measure(ctx, s, small, big)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			for i, task := range tasks {
				times[task][s.name] = append(times[task][s.name], took[i])
			}
		}
	}
	fmt.Print("| task |")
	for _, s := range servers {
		fmt.Printf(" %s |", s.name)
	}
	fmt.Print(" fastest other / ocilocal |\n|---|", strings.Repeat("---|", len(servers)+1), "\n")
	for _, task := range tasks {
		fmt.Printf("| %s |", task)
		var own, fastest time.Duration
		for i, s := range servers {
			took := times[task][s.name]
			slices.Sort(took)
			median := took[len(took)/2]
			fmt.Printf(" %.0f ms |", float64(median.Microseconds())/1000)
			if i == 0 {
				own = median
			} else if fastest == 0 || median < fastest {
				fastest = median
			}
		}
		fmt.Printf(" %.2f× |\n", float64(fastest)/float64(own))
	}
	if repositories > 0 {
		return tagPages(ctx, repositories)
	}
	return nil
}

// measure returns the times of the tasks.
func measure(ctx context.Context, s server, small int, big []byte) (took []time.Duration, err error) {
	dir, err := os.MkdirTemp("", "ocilocal-serve-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
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
		return func() error {
			var g errgroup.Group
			g.SetLimit(workers)
			for i := range small {
				g.Go(func() error { return fn(i) })
			}
			return g.Wait()
		}
	}
	for _, task := range []func() error{
		all(func(i int) error {
			return push(ctx, repo, fmt.Sprintf("v%d", i), bytes.Repeat(fmt.Appendf(nil, "%08d", i), 512), fmt.Appendf(nil, `{"n":%d}`, i))
		}),
		all(func(i int) error { return pull(ctx, repo, fmt.Sprintf("v%d", i)) }),
		func() error { return push(ctx, repo, "large", big, []byte("{}")) },
		func() error { return pull(ctx, repo, "large") },
	} {
		began := time.Now()
		if err := task(); err != nil {
			return nil, err
		}
		took = append(took, time.Since(began))
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
func tagPages(ctx context.Context, repositories int) error {
	dir, err := os.MkdirTemp("", "ocilocal-serve-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
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
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const pages = 1000
	var took []time.Duration
	for range pages {
		path := fmt.Sprintf("/v2/r%d/app/tags/list?n=10", rand.IntN(repositories))
		res := httptest.NewRecorder()
		began := time.Now()
		h.ServeHTTP(res, httptest.NewRequest("GET", path, nil))
		took = append(took, time.Since(began))
		if res.Code != http.StatusOK {
			return fmt.Errorf("%s: %d", path, res.Code)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	slices.Sort(took)
	fmt.Printf("\n%d repositories with 10 tags: a page of tags takes %v in the median, %v at the 99th percentile; the heap grew by %d KiB in %d pages\n",
		repositories, took[pages/2], took[pages*99/100], (int64(after.HeapAlloc)-int64(before.HeapAlloc))>>10, pages)
	return nil
}
