package ocilocal_test

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/ocilocal/ocilocal"
)

// A registry for tests: what a client pushes to the server is in the registry.
func ExampleLocalRegistry_Handler() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	server := httptest.NewServer(registry.Handler(nil))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	client, doneToo := scratch()
	defer doneToo()
	note(client, host+"/team/note:v1", "one")
	if _, err := client.Push(ctx, ocilocal.MustParseReference(host+"/team/note:v1"), nil); err != nil {
		log.Fatal(err)
	}

	for ref, err := range registry.Refs(ctx, nil) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(ref.Reference)
	}
	// Output:
	// localhost/team/note:v1
}

// Everybody may pull what the registry has of one host. Nobody may push.
func ExampleHandlerOptions_readOnly() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	note(registry, "ghcr.io/team/note:v1", "one")
	server := httptest.NewServer(registry.Handler(&ocilocal.HandlerOptions{Host: "ghcr.io", ReadOnly: true}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	client, doneToo := scratch()
	defer doneToo()
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	pulled, err := client.Pull(ctx, ref, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pulled.Update.Outcome)
	_, err = client.Push(ctx, ref, &ocilocal.PushOptions{As: ocilocal.MustParseReference(host + "/team/note:v2")})
	fmt.Println(err != nil)
	// Output:
	// inserted
	// true
}

// Everybody may pull. Alice may push to team/ with her password, and nobody may delete.
func ExampleHandlerOptions_authorize() {
	ctx := context.Background()
	registry, done := scratch()
	defer done()
	server := httptest.NewServer(registry.Handler(&ocilocal.HandlerOptions{
		Authorize: func(r *http.Request, repository string, action ocilocal.Action) error {
			switch action {
			case ocilocal.ActionPing, ocilocal.ActionPull:
				return nil
			case ocilocal.ActionPush:
				user, password, ok := r.BasicAuth()
				if !ok || user != "alice" || subtle.ConstantTimeCompare([]byte(password), []byte("secret")) != 1 {
					return &ocilocal.ChallengeError{Challenge: `Basic realm="team"`}
				}
				if strings.HasPrefix(repository, "team/") {
					return nil
				}
			}
			return errors.New("not allowed")
		},
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	client, doneToo := scratch()
	defer doneToo()
	note(client, host+"/team/note:v1", "one")
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	_, err := client.Push(ctx, ref, nil)
	fmt.Println(errors.Is(err, ocilocal.ErrUnauthorized))

	alice := &ocilocal.Remote{Credentials: ocilocal.StaticCredential(host, ocilocal.Credential{Username: "alice", Password: "secret"})}
	pushed, err := client.Push(ctx, ref, &ocilocal.PushOptions{Remote: alice})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pushed.BlobsSent, "blobs sent")
	// Output:
	// true
	// 2 blobs sent
}

// A mirror of several registries for containerd, which names the registry in the query. A client
// must not choose another one.
func ExampleHandlerOptions_name() {
	registry, done := scratch()
	defer done()
	note(registry, "ghcr.io/team/note:v1", "one") // as if it had been pulled
	mirrored := map[string]bool{"ghcr.io": true, "docker.io": true}
	server := httptest.NewServer(registry.Handler(&ocilocal.HandlerOptions{
		Name: func(r *http.Request, repository string) (string, error) {
			host := r.URL.Query().Get("ns")
			if !mirrored[host] {
				return "", fmt.Errorf("%q is not mirrored", host)
			}
			return host + "/" + repository, nil
		},
		ReadOnly: true, // and Upstream: &ocilocal.Upstream{}
	}))
	defer server.Close()

	for _, ns := range []string{"ghcr.io", "10.0.0.1:5000"} {
		answer, err := http.Head(server.URL + "/v2/team/note/manifests/v1?ns=" + ns)
		if err != nil {
			log.Fatal(err)
		}
		answer.Body.Close()
		fmt.Println(ns, answer.StatusCode)
	}
	// Output:
	// ghcr.io 200
	// 10.0.0.1:5000 404
}

// A server for other machines. It stops when ctx ends: first the server, then the registry.
func ExampleLocalRegistry_Handler_server() {
	serve := func(ctx context.Context, registry *ocilocal.LocalRegistry, authorize func(*http.Request, string, ocilocal.Action) error) error {
		server := &http.Server{
			Addr: ":5000",
			Handler: registry.Handler(&ocilocal.HandlerOptions{
				Authorize:   authorize,
				MaxBlobSize: 10 << 30,
			}),
			ReadHeaderTimeout: 10 * time.Second,
			IdleTimeout:       2 * time.Minute,
			MaxHeaderBytes:    64 << 10,
		}
		stopped := make(chan error, 1)
		context.AfterFunc(ctx, func() {
			limited, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			stopped <- server.Shutdown(limited)
		})
		err := server.ListenAndServeTLS("server.crt", "server.key")
		if errors.Is(err, http.ErrServerClosed) {
			err = <-stopped
		}
		return errors.Join(err, registry.Close())
	}
	_ = serve
}

// A mirror of a registry: it pulls what it does not have, and serves it also while the registry is
// down.
func ExampleUpstream() {
	ctx := context.Background()
	origin, done := scratch()
	defer done()
	note(origin, "localhost/team/note:v1", "one")
	server := httptest.NewServer(origin.Handler(nil))

	cache, doneToo := scratch()
	defer doneToo()
	mirror := httptest.NewServer(cache.Handler(&ocilocal.HandlerOptions{
		ReadOnly: true,
		Upstream: &ocilocal.Upstream{Host: strings.TrimPrefix(server.URL, "http://")},
	}))
	defer mirror.Close()

	ref := ocilocal.MustParseReference(strings.TrimPrefix(mirror.URL, "http://") + "/team/note:v1")
	for _, upstream := range []string{"up", "down"} {
		client, doneThree := scratch()
		defer doneThree()
		pulled, err := client.Pull(ctx, ref, nil)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("upstream", upstream, "pulled", pulled.BlobsWritten, "blobs")
		if upstream == "up" {
			server.Close() // the mirror has what the first client asked for
		}
	}
	// Output:
	// upstream up pulled 3 blobs
	// upstream down pulled 3 blobs
}
