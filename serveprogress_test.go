package ocilocal_test

import (
	"bufio"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/ocilocal/ocilocal"
)

// TestServeSlowReader: the answer to a client that reads nothing ends after StallTimeout.
func TestServeSlowReader(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	text := string(noise(77, 32<<20))
	quick := serveAt(t, r, nil)
	d := quick.pushBlob("org/app", text)
	ended := make(chan any)
	h := r.Handler(&ocilocal.HandlerOptions{StallTimeout: 50 * time.Millisecond})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			broken := recover()
			ended <- broken
			panic(broken)
		}()
		h.ServeHTTP(w, r)
	}))
	defer s.Close()
	for range 2 { // by the verifier, and by sendfile
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(conn, "GET /v2/org/app/blobs/%s HTTP/1.1\r\nHost: x\r\n\r\n", d); err != nil {
			t.Fatal(err)
		}
		if got := <-ended; got != http.ErrAbortHandler {
			t.Error(got)
		}
		conn.Close()
		quick.want(200, "GET", "/v2/org/app/blobs/"+string(d), "")
	}
}

// A deadlineRecorder records the write deadlines that it gets.
type deadlineRecorder struct {
	*httptest.ResponseRecorder
	deadlines []time.Time
}

func (d *deadlineRecorder) SetWriteDeadline(t time.Time) error {
	d.deadlines = append(d.deadlines, t)
	return nil
}

// TestServeSteadyReader: a client that takes an answer slowly and steadily gets all of it. The
// kernel tells only from time to time that it has taken something, so each part of the answer has
// many times StallTimeout. At the end no deadline is left for the next request.
func TestServeSteadyReader(t *testing.T) {
	r := openTemp(t, nil)
	d := serveAt(t, r, nil).pushBlob("org/app", string(noise(78, 1<<20)))
	const timeout = time.Hour
	for range 2 { // by the verifier, and by sendfile
		began := time.Now()
		w := &deadlineRecorder{ResponseRecorder: httptest.NewRecorder()}
		r.Handler(&ocilocal.HandlerOptions{StallTimeout: timeout}).ServeHTTP(w, httptest.NewRequest("GET", "/v2/org/app/blobs/"+string(d), nil))
		if w.Code != 200 || w.Body.Len() != 1<<20 {
			t.Errorf("%d, %d bytes", w.Code, w.Body.Len())
		}
		last := len(w.deadlines) - 1
		if last < 4 || !w.deadlines[last].IsZero() {
			t.Fatalf("deadlines %v", w.deadlines)
		}
		for _, deadline := range w.deadlines[:last] {
			if deadline.Sub(began) < 10*timeout {
				t.Errorf("a part of the answer has %v", deadline.Sub(began))
			}
		}
	}
	// The largest timeout is one.
	w := &deadlineRecorder{ResponseRecorder: httptest.NewRecorder()}
	r.Handler(&ocilocal.HandlerOptions{StallTimeout: math.MaxInt64}).ServeHTTP(w, httptest.NewRequest("GET", "/v2/", nil))
	if len(w.deadlines) < 2 || w.deadlines[0].Before(time.Now()) {
		t.Errorf("deadlines %v", w.deadlines)
	}
}

// TestServeTrickle: a client that sends one byte at a time is ended with a 408. The upload keeps
// the bytes that came.
func TestServeTrickle(t *testing.T) {
	t.Parallel()
	r := openTemp(t, nil)
	s := serveAt(t, r, &ocilocal.HandlerOptions{StallTimeout: 200 * time.Millisecond})
	at := s.want(202, "POST", "/v2/org/app/blobs/uploads/", "").header.Get("Location")
	conn, err := net.Dial("tcp", s.host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "PATCH %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nsome bytes", at); err != nil {
		t.Fatal(err)
	}
	go func() {
		for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
			if _, err := conn.Write([]byte("x")); err != nil {
				tick.Stop()
				return
			}
		}
	}()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 408 {
		t.Error(res.Status)
	}
	var last int
	if _, err := fmt.Sscanf(s.want(204, "GET", at, "").header.Get("Range"), "0-%d", &last); err != nil || last == 0 {
		t.Errorf("%d, %v", last, err)
	}
}
