package interop_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// workerEnv makes this test binary a process that uses a root: it serves it, or with collectorEnv
// collects it without a grace all the time, until its standard input ends.
const (
	workerEnv    = "OCILOCAL_INTEROP_WORKER"
	collectorEnv = "OCILOCAL_INTEROP_COLLECTOR"
)

// work is the main function of a worker.
func work(root string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		cancel()
	}()
	r, err := ocilocal.Open(ctx, root, nil)
	if err != nil {
		fail(err)
	}
	if os.Getenv(collectorEnv) != "" {
		fmt.Println("collects")
		n := 0
		for ; ctx.Err() == nil; n++ {
			if _, err := r.GC(ctx, &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil && !errors.Is(err, context.Canceled) {
				fail(err)
			}
		}
		fmt.Println(n, "collections")
	} else {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fail(err)
		}
		fmt.Println(l.Addr())
		server := &http.Server{Handler: r.Handler(nil)}
		go func() {
			<-ctx.Done()
			server.Close()
		}()
		_ = server.Serve(l)
	}
	if err := r.Close(); err != nil {
		fail(err)
	}
}

// startWorker starts a worker and returns the first line that it prints. It ends with the test.
func startWorker(t *testing.T, root string, env ...string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), workerEnv+"="+root), env...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	t.Cleanup(func() {
		in.Close()
		if last, err := lines.ReadString('\n'); err == nil {
			t.Log(strings.TrimSpace(last))
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("worker: %v", err)
		}
	})
	line, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// TestConformance runs the official conformance suite of the distribution specification. Nothing
// may fail or be skipped. Some tests the suite itself disables by default.
func TestConformance(t *testing.T) {
	t.Run("one process", func(t *testing.T) {
		conform(t, startWorker(t, t.TempDir()))
	})
	// What neither has is absent, by the word of the upstream.
	t.Run("mirror", func(t *testing.T) {
		upstream := startWorker(t, t.TempDir())
		mirror := httptest.NewServer(newRegistry(t).Handler(&ocilocal.HandlerOptions{Upstream: &ocilocal.Upstream{Host: upstream, Revalidate: -1}}))
		defer mirror.Close()
		conform(t, strings.TrimPrefix(mirror.URL, "http://"))
	})
	// Two processes serve the root in turns, request by request, and a third one collects.
	t.Run("processes", func(t *testing.T) {
		root := t.TempDir()
		var urls []*url.URL
		for range 2 {
			urls = append(urls, &url.URL{Scheme: "http", Host: startWorker(t, root)})
		}
		startWorker(t, root, collectorEnv+"=1")
		var turn atomic.Int64
		balancer := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(urls[turn.Add(1)%2])
		}})
		defer balancer.Close()
		conform(t, strings.TrimPrefix(balancer.URL, "http://"))
	})
}

// conform runs the suite against a registry on loopback.
func conform(t *testing.T, host string) {
	t.Helper()
	b := newBox(t)
	b.write("conformance.yaml", "{}")
	results := filepath.Join(b.dir, "results")
	for key, value := range map[string]string{"OCI_VERSION": "1.1", "OCI_TLS": "disabled", "OCI_REGISTRY": host,
		"OCI_CONFIGURATION": b.path("conformance.yaml"), "OCI_RESULTS_DIR": results} {
		b.setenv(key, value)
	}
	out, stderr, err := b.try("conformance")
	if err != nil {
		t.Errorf("conformance: %v\n%s", err, stderr)
	}
	counts := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^  (Pass|Skip|FAIL|Error)\.*:\s*(\d+)$`).FindAllStringSubmatch(out, -1) {
		counts[m[1]] = m[2]
	}
	t.Logf("%v", counts)
	if counts["Pass"] == "" || counts["Skip"] != "0" || counts["FAIL"] != "0" || counts["Error"] != "0" {
		for line := range strings.Lines(out) {
			if strings.Contains(line, ": Skip") || strings.Contains(line, ": FAIL") || strings.Contains(line, "       - ") {
				t.Log(strings.TrimRight(line, "\n"))
			}
		}
		t.Errorf("results: %v", counts)
	}
}
