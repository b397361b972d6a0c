package ocilocal_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// remoteRegistry serves a new registry in this process.
func remoteRegistry() (host string, done func()) {
	registry, remove := scratch()
	server := httptest.NewServer(registry.Handler(nil))
	return strings.TrimPrefix(server.URL, "http://"), func() {
		server.Close()
		remove()
	}
}

func ExampleLocalRegistry_Push() {
	ctx := context.Background()
	served, doneServed := scratch()
	defer doneServed()
	server := httptest.NewServer(served.Handler(nil)) // a registry in this process
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	r, done := scratch()
	defer done()
	note(r, host+"/team/note:v1", "one")

	pushed, err := r.Push(ctx, ocilocal.MustParseReference(host+"/team/note:v1"), nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pushed.BlobsSent, "blobs sent")

	// Under another name there. The registry has the blobs, so none is sent.
	pushed, err = r.Push(ctx, ocilocal.MustParseReference(host+"/team/note:v1"), &ocilocal.PushOptions{As: ocilocal.MustParseReference(host + "/team/release:v1")})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pushed.BlobsSent, "sent,", pushed.BlobsMounted, "mounted")
	// Output:
	// 2 blobs sent
	// 0 sent, 2 mounted
}

func ExampleLocalRegistry_Pull() {
	ctx := context.Background()
	served, doneServed := scratch()
	defer doneServed()
	server := httptest.NewServer(served.Handler(nil)) // a registry in this process
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	from, done := scratch()
	defer done()
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	a := note(from, ref.String(), "one")
	if _, err := from.Push(ctx, ref, nil); err != nil {
		log.Fatal(err)
	}

	r, doneToo := scratch()
	defer doneToo()
	pulled, err := r.Pull(ctx, ref, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pulled.Update.Outcome, pulled.Artifact.Digest() == a.Digest())

	// It is here now. One request tells that the tag has not moved.
	pulled, err = r.Pull(ctx, ref, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pulled.Update.Outcome, pulled.BytesReceived, "bytes received")
	// Output:
	// inserted true
	// unchanged 0 bytes received
}

// Load answers from the local registry. With a Remote, it pulls an artifact that is not there.
func ExampleOptions_remote() {
	ctx := context.Background()
	host, doneServer := remoteRegistry()
	defer doneServer()
	from, done := scratch()
	defer done()
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	note(from, ref.String(), "one")
	if _, err := from.Push(ctx, ref, nil); err != nil {
		log.Fatal(err)
	}

	dir, err := os.MkdirTemp("", "ocilocal-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	r, err := ocilocal.Open(ctx, dir, &ocilocal.Options{
		Remote: &ocilocal.Remote{Credentials: ocilocal.DefaultCredentials()},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close()
	a, err := r.Load(ctx, ref)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(a.ArtifactType())
	// Output: application/vnd.example.note
}

func ExampleRemote() {
	ctx := context.Background()
	served, doneServed := scratch()
	defer doneServed()
	server := httptest.NewServer(served.Handler(&ocilocal.HandlerOptions{
		Authorize: func(r *http.Request, _ string, _ ocilocal.Action) error {
			if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
				return &ocilocal.ChallengeError{Challenge: `Basic realm="notes"`}
			}
			return nil
		},
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	r, done := scratch()
	defer done()
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	note(r, ref.String(), "one")

	remote := &ocilocal.Remote{
		Credentials: ocilocal.StaticCredential(host, ocilocal.Credential{Username: "me", Password: "secret"}),
	}
	defer remote.CloseIdleConnections()
	if _, err := r.Push(ctx, ref, &ocilocal.PushOptions{Remote: remote}); err != nil {
		log.Fatal(err)
	}
	for tag, err := range remote.Tags(ctx, ref) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("tag", tag)
	}
	_, err := remote.Resolve(ctx, ocilocal.MustParseReference(host+"/team/note:v2"))
	if e, ok := errors.AsType[*ocilocal.RemoteError](err); ok && errors.Is(err, ocilocal.ErrNotFound) {
		fmt.Println(e.Method, "answered", e.Status)
	}
	// Output:
	// tag v1
	// GET answered 404
}

// The program has the credential of one registry. All others come from the files of docker and podman.
func ExampleFirstCredential() {
	credentials := ocilocal.FirstCredential(
		ocilocal.StaticCredential("registry.example.com", ocilocal.Credential{Username: "me", Password: "secret"}),
		ocilocal.FileCredentials("testdata/nothing.json"), // or DefaultCredentials()
	)
	remote := &ocilocal.Remote{Credentials: credentials}
	defer remote.CloseIdleConnections()
	for _, host := range []string{"registry.example.com", "ghcr.io"} {
		c, err := credentials(context.Background(), host, "team/note")
		fmt.Println(c, err)
	}
	// Output:
	// credential of me (StaticCredential) <nil>
	// anonymous (StaticCredential for registry.example.com, testdata/nothing.json) <nil>
}

func ExampleRemote_Referrers() {
	ctx := context.Background()
	host, doneServer := remoteRegistry()
	defer doneServer()
	r, done := scratch()
	defer done()
	subject := note(r, host+"/team/note:v1", "one")

	b, err := r.NewBuilder(ocilocal.MustParseReference(host+"/team/note:signature"), &ocilocal.BuilderOptions{ArtifactType: "application/vnd.example.signature"})
	if err != nil {
		log.Fatal(err)
	}
	defer b.Cancel()
	if err := b.SetSubject(subject.Descriptor()); err != nil {
		log.Fatal(err)
	}
	if _, err := b.Build(ctx); err != nil {
		log.Fatal(err)
	}
	for _, tag := range []string{"v1", "signature"} {
		if _, err := r.Push(ctx, ocilocal.MustParseReference(host+"/team/note:"+tag), nil); err != nil {
			log.Fatal(err)
		}
	}
	remote := &ocilocal.Remote{}
	defer remote.CloseIdleConnections()
	for d, err := range remote.Referrers(ctx, ocilocal.MustParseReference(host+"/team/note:v1"), "") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(d.ArtifactType, d.Digest.Algorithm() == digest.SHA256)
	}
	// Output: application/vnd.example.signature true
}

// A manifest can be read and deleted on the remote registry. Nothing is stored here.
func ExampleRemote_Manifest() {
	ctx := context.Background()
	host, doneServer := remoteRegistry()
	defer doneServer()
	r, done := scratch()
	defer done()
	a := note(r, host+"/team/note:v1", "one")
	if _, err := r.Push(ctx, a.Reference(), nil); err != nil {
		log.Fatal(err)
	}

	remote := &ocilocal.Remote{}
	defer remote.CloseIdleConnections()
	m, err := remote.Manifest(ctx, a.Reference())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(m.ArtifactType(), len(m.Layers()), "layer")
	if err := remote.Delete(ctx, a.Reference()); err != nil {
		log.Fatal(err)
	}
	_, err = remote.Manifest(ctx, a.Reference())
	fmt.Println(errors.Is(err, ocilocal.ErrNotFound))
	// Output:
	// application/vnd.example.note 1 layer
	// true
}

// A file in docker's format, at another path. An entry for a repository precedes that of its registry.
func ExampleFileCredentials() {
	dir, err := os.MkdirTemp("", "ocilocal-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "config.json")
	config := `{"auths": {
		"registry.example.com": {"username": "everybody", "password": "secret"},
		"registry.example.com/team": {"username": "team", "password": "secret"}
	}}`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		log.Fatal(err)
	}
	credentials := ocilocal.FileCredentials(file)
	for _, repository := range []string{"library/app", "team/app"} {
		c, err := credentials(context.Background(), "registry.example.com", repository)
		fmt.Println(c.Username, err)
	}
	// Output:
	// everybody <nil>
	// team <nil>
}

// Of an image index for several platforms, only one image is pulled.
func ExamplePullOptions_platform() {
	ctx := context.Background()
	host, doneServer := remoteRegistry()
	defer doneServer()
	from, done := scratch()
	defer done()
	index, err := from.NewIndexBuilder(ocilocal.MustParseReference(host+"/team/note:v1"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer index.Cancel()
	for _, arch := range []string{"amd64", "arm64"} {
		desc := note(from, host+"/team/note:"+arch, "for "+arch).Descriptor()
		desc.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		if _, err := index.AddManifest(ctx, desc); err != nil {
			log.Fatal(err)
		}
	}
	built, err := index.Build(ctx)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := from.Push(ctx, built.Reference(), nil); err != nil {
		log.Fatal(err)
	}

	r, doneToo := scratch()
	defer doneToo()
	pulled, err := r.Pull(ctx, ocilocal.MustParseReference(host+"/team/note:v1"), &ocilocal.PullOptions{
		Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"},
	})
	if err != nil {
		log.Fatal(err)
	}
	layers, err := pulled.Artifact.Layers(ctx)
	if err != nil {
		log.Fatal(err)
	}
	text, err := pulled.Artifact.ReadLayer(ctx, layers[0])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d blobs\n", text, pulled.BlobsWritten)
	// Output: for arm64, 3 blobs
}

// A program that draws a bar redraws it with each report. One that logs writes a line for each item.
func ExampleProgress() {
	ctx := context.Background()
	host, doneServer := remoteRegistry()
	defer doneServer()
	r, done := scratch()
	defer done()
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	note(r, ref.String(), "one")

	percent := int64(0)
	bar := func(p ocilocal.Progress) {
		if p.TotalBytes > 0 { // else it is not known yet
			percent = 100 * p.Bytes / p.TotalBytes
		}
		if p.Item.Digest == "" { // a phase begins
			fmt.Print(p.Phase, " ")
		}
	}
	if _, err := r.Push(ctx, ref, &ocilocal.PushOptions{Progress: bar}); err != nil {
		log.Fatal(err)
	}
	fmt.Println(percent, "%")

	var transferred, skipped int
	count := func(p ocilocal.Progress) {
		switch {
		case p.ItemSkipped:
			skipped++
		case p.ItemDone:
			transferred++
			log.Printf("%s: %s, %d bytes", p.Reference, p.Item.Digest, p.Item.Size)
		case p.Phase == ocilocal.PhaseDone:
			fmt.Println(p.Items, "items,", p.SkippedItems, "of them there already")
		}
	}
	if _, err := r.Push(ctx, ref, &ocilocal.PushOptions{Progress: count}); err != nil {
		log.Fatal(err)
	}
	fmt.Println(transferred, "transferred,", skipped, "skipped")
	// Output:
	// plan blobs publish done 100 %
	// 3 items, 3 of them there already
	// 0 transferred, 3 skipped
}

// A mirror near by serves the content. The registry itself says where the tag is, and serves what the mirror does
// not have.
func ExampleRemote_mirrors() {
	ctx := context.Background()
	origin, doneOrigin := scratch()
	defer doneOrigin()
	cache, doneCache := scratch()
	defer doneCache()
	blobs := 0 // that the registry itself sends
	handler := origin.Handler(nil)
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "GET" && strings.Contains(r.URL.Path, "/blobs/") {
			blobs++
		}
		handler.ServeHTTP(w, r)
	}))
	defer registry.Close()
	mirror := httptest.NewServer(cache.Handler(nil))
	defer mirror.Close()
	host, mirrorHost := strings.TrimPrefix(registry.URL, "http://"), strings.TrimPrefix(mirror.URL, "http://")
	from, done := scratch()
	defer done()
	ref := ocilocal.MustParseReference(host + "/team/note:v1")
	note(from, ref.String(), "one")
	for _, to := range []ocilocal.Reference{ref, ocilocal.MustParseReference(mirrorHost + "/cache/team/note:any")} {
		if _, err := from.Push(ctx, ref, &ocilocal.PushOptions{As: to}); err != nil {
			log.Fatal(err)
		}
	}

	r, doneToo := scratch()
	defer doneToo()
	remote := &ocilocal.Remote{Mirrors: map[string][]ocilocal.Mirror{
		host: {{Location: mirrorHost + "/cache"}}, // for example "docker.io": {{Location: "mirror.gcr.io"}}
	}}
	defer remote.CloseIdleConnections()
	pulled, err := r.Pull(ctx, ref, &ocilocal.PullOptions{Remote: remote})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(pulled.Artifact.Reference() == ref, blobs, "blobs from the registry")
	// Output:
	// true 0 blobs from the registry
}
