package benchmarks

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"testing"
)

var (
	long      = flag.Bool("long", false, "also measure ocilocal with 100,000 refs")
	largeSize = flag.Int64("large", 1<<30, "bytes of the large layer")
)

var libraries = []Library{Ocilocal, Oras, GGCR}

// sizes are the numbers of refs to measure a library with.
func sizes(l Library) []int {
	s := []int{10, 100, 1000, 5000}
	if l.Name == Ocilocal.Name && *long {
		s = append(s, 100_000)
	}
	return s
}

// filled opens a new store that has n artifacts.
func filled(b *testing.B, l Library, n int) (s Store, dir string) {
	b.Helper()
	dir = b.TempDir()
	s, err := l.Open(context.Background(), dir)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	if err := s.Fill(context.Background(), 0, n); err != nil {
		b.Fatal(err)
	}
	return s, dir
}

// each runs a benchmark for every library and size.
func each(b *testing.B, run func(b *testing.B, l Library, n int)) {
	for _, l := range libraries {
		for _, n := range sizes(l) {
			b.Run(fmt.Sprintf("%s/refs=%d", l.Name, n), func(b *testing.B) { run(b, l, n) })
		}
	}
}

func BenchmarkPublish(b *testing.B) {
	each(b, func(b *testing.B, l Library, n int) {
		s, _ := filled(b, l, n)
		for i := n; b.Loop(); i++ {
			if err := s.Publish(context.Background(), i); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkPublishParallel tells the time per artifact, not per goroutine.
func BenchmarkPublishParallel(b *testing.B) {
	for _, n := range []int{1, 8} {
		b.Run(fmt.Sprintf("ocilocal/goroutines=%d", n), func(b *testing.B) {
			s, _ := filled(b, Ocilocal, 10)
			b.ResetTimer()
			if err := InParallel(n, 10, 10+b.N, func(i int) error { return s.Publish(context.Background(), i) }); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func BenchmarkOpenResolve(b *testing.B) {
	each(b, func(b *testing.B, l Library, n int) {
		s, dir := filled(b, l, n)
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		for i := 0; b.Loop(); i++ {
			s, err := l.Open(context.Background(), dir)
			if err != nil {
				b.Fatal(err)
			}
			if err := s.Resolve(context.Background(), i%n); err != nil {
				b.Fatal(err)
			}
			s.Close()
		}
	})
}

func BenchmarkResolve(b *testing.B) {
	each(b, func(b *testing.B, l Library, n int) {
		s, _ := filled(b, l, n)
		for i := 0; b.Loop(); i++ {
			if err := s.Resolve(context.Background(), i*7919%n); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkManifest(b *testing.B) {
	each(b, func(b *testing.B, l Library, n int) {
		s, _ := filled(b, l, n)
		for i := 0; b.Loop(); i++ {
			if err := s.Manifest(context.Background(), i*7919%n); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkList(b *testing.B) {
	each(b, func(b *testing.B, l Library, n int) {
		s, _ := filled(b, l, n)
		for b.Loop() {
			if got, err := s.List(context.Background()); err != nil || got != n {
				b.Fatalf("%d refs, want %d: %v", got, n, err)
			}
		}
	})
}

func BenchmarkPage(b *testing.B) {
	for _, n := range sizes(Ocilocal) {
		b.Run(fmt.Sprintf("ocilocal/refs=%d", n), func(b *testing.B) {
			s, _ := filled(b, Ocilocal, n)
			for b.Loop() {
				if got, err := s.(*ocilocalStore).Page(context.Background(), n/2); err != nil || got != min(n, 100) {
					b.Fatalf("%d refs: %v", got, err)
				}
			}
		})
	}
}

func BenchmarkLargeIn(b *testing.B) {
	b.Run("write+fsync", func(b *testing.B) {
		dir := b.TempDir()
		b.SetBytes(*largeSize)
		for i := 0; b.Loop(); i++ {
			if err := PlainWrite(filepath.Join(dir, fmt.Sprint(i)), Large(uint64(i), *largeSize)); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, l := range libraries {
		b.Run(l.Name, func(b *testing.B) {
			s, _ := filled(b, l, 10)
			b.SetBytes(*largeSize)
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				d := DigestLarge(uint64(i), *largeSize)
				b.StartTimer()
				if err := s.Put(context.Background(), d, *largeSize, Large(uint64(i), *largeSize)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkLargeOut(b *testing.B) {
	d := DigestLarge(0, *largeSize)
	b.Run("sha256", func(b *testing.B) {
		b.SetBytes(*largeSize)
		for b.Loop() {
			io.CopyBuffer(struct{ io.Writer }{sha256.New()}, Large(0, *largeSize), make([]byte, 256<<10))
		}
	})
	for _, l := range libraries {
		b.Run(l.Name, func(b *testing.B) {
			s, _ := filled(b, l, 10)
			if err := s.Put(context.Background(), d, *largeSize, Large(0, *largeSize)); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(*largeSize)
			for b.Loop() {
				if err := s.Get(context.Background(), d, *largeSize); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
