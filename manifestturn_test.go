package ocilocal_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// hugeManifest returns an image manifest with this layer and about size bytes. Most of it are
// annotations, which take much more memory in a parsed document.
func hugeManifest(layer string, n, size int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `%s,"annotations":{"n":"%d"`, strings.TrimSuffix(imageOf(layer), "}"), n)
	for i := 0; b.Len() < size; i++ {
		b.WriteString(`,"` + strconv.Itoa(i) + `":""`)
	}
	b.WriteString("}}")
	return b.String()
}

// liveHeap returns the bytes of the heap that are in use, without garbage.
func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestServeTurns: of the large manifests that come from clients and from the upstream, four at a
// time are in memory as parsed documents. The others wait for their turn.
func TestServeTurns(t *testing.T) {
	const pulls, pushes, turns = 8, 4, 4
	size := scaled(128<<10, 512<<10, 512<<10)
	m := newMirror(t, nil, nil)
	for _, blob := range []string{"one", "{}"} {
		m.pushBlob("org/app", blob)
	}
	manifests := make([]string, pulls+pushes)
	for n := range manifests {
		manifests[n] = hugeManifest("one", n, size)
	}
	m.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		n, err := strconv.Atoi(strings.TrimPrefix(r.URL.Path, appManifests+"v"))
		if err != nil || r.Method != "GET" {
			return false
		}
		w.Header().Set("Content-Type", imageType)
		io.WriteString(w, manifests[n])
		return true
	})
	// Whoever has parsed a manifest stops at the first file that it creates.
	var parsed atomic.Int32
	goOn := make(chan struct{})
	ocilocal.SetFault(m.r, func(op, _ string) error {
		if op == "create" {
			parsed.Add(1)
			<-goOn
		}
		return nil
	})
	defer ocilocal.SetFault(m.r, nil)
	before := liveHeap()
	var clients sync.WaitGroup
	for n, raw := range manifests {
		clients.Go(func() {
			method, body, want := "GET", "", raw
			status := 200
			if n >= pulls {
				method, body, want, status = "PUT", raw, "", 201
			}
			a, err := m.try(method, fmt.Sprintf("%sv%d", appManifests, n), strings.NewReader(body))
			if err != nil || a.status != status || a.body != want {
				t.Errorf("%s %d: %d, %d bytes, %v", method, n, a.status, len(a.body), err)
			}
		})
	}
	for parsed.Load() < turns {
		runtime.Gosched()
	}
	for stacks, waiting := make([]byte, 4<<20), 0; int(parsed.Load())+waiting < len(manifests); runtime.Gosched() {
		waiting = bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("manifestTurn).begin("))
	}
	if n := parsed.Load(); n > turns {
		t.Errorf("%d large manifests are parsed at a time", n)
	}
	// A parsed one takes eight times its bytes. The others are there as bytes, some in a buffer of
	// twice their size.
	if used, most := liveHeap()-before, int64(size*(turns*8+len(manifests)*2)); used > most {
		t.Errorf("%d bytes of the heap are in use, want at most %d", used, most)
	}
	close(goOn)
	clients.Wait()
	checkSound(t, m.r)
}

// TestServePutUnparsed: while pushes of large manifests wait for a slow upstream, they have only the
// bytes in memory.
func TestServePutUnparsed(t *testing.T) {
	const clients, size = 8, 512 << 10
	layers := make([]string, clients)
	for n := range layers {
		layers[n] = fmt.Sprint("layer ", n)
	}
	m := newMirrorOf(t, layers...)
	asked, answer := make(chan struct{}), make(chan struct{})
	m.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") && r.URL.Path != blobAt("{}") {
			asked <- struct{}{}
			<-answer
		}
		return false
	})
	before := liveHeap()
	var pushes sync.WaitGroup
	for n, layer := range layers {
		pushes.Go(func() {
			a, err := m.try("PUT", fmt.Sprintf("%sn%d", appManifests, n), strings.NewReader(hugeManifest(layer, n, size)))
			if err != nil || a.status != 201 {
				t.Errorf("%d: %d %s, %v", n, a.status, a.body, err)
			}
		})
	}
	for range clients {
		<-asked
	}
	if used, most := liveHeap()-before, int64(size*clients*4); used > most {
		t.Errorf("%d bytes of the heap are in use, want at most %d", used, most)
	}
	close(answer)
	pushes.Wait()
	checkSound(t, m.r)
}
