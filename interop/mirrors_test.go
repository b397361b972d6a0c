package interop_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ocilocal/ocilocal"
)

// mirroredHost is the registry that a mirror stands for. It does not exist.
const mirroredHost = "registry.example.test"

// A mirror is our handler as a mirror of a real registry that has org/app:v1, an image for two
// platforms.
type mirror struct {
	t      *testing.T
	r      *ocilocal.LocalRegistry
	host   string
	origin string
	index  v1.ImageIndex
	down   atomic.Bool // the origin answers nothing
	mu     sync.Mutex
	asked  []string // the origin, for content
}

// asOCI returns an image for linux in the form of OCI.
func asOCI(t *testing.T, image v1.Image, architecture string) v1.Image {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", architecture
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return mutate.ConfigMediaType(mutate.MediaType(image, types.OCIManifestSchema1), types.OCIConfigJSON)
}

func newMirror(t *testing.T) *mirror {
	need(t, "registry3")
	m := &mirror{t: t, r: newRegistry(t), origin: servers["distribution 3"](t).host}
	m.index = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, architecture := range []string{"amd64", "arm64"} {
		image, err := random.Image(2<<20, 2)
		if err != nil {
			t.Fatal(err)
		}
		m.index = mutate.AppendManifests(m.index, mutate.IndexAddendum{Add: asOCI(t, image, architecture), Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: architecture}}})
	}
	ref, err := name.ParseReference(m.origin+"/org/app:v1", name.Insecure)
	if err == nil {
		err = remote.WriteIndex(ref, m.index, remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatal(err)
	}
	upstream := &ocilocal.Upstream{
		Remote: &ocilocal.Remote{
			Client: &http.Client{Transport: m},
			Retry:  func(int, error) (time.Duration, bool) { return 0, false },
		},
		Name: func(name string) (string, error) {
			_, repository, _ := strings.Cut(name, "/")
			return m.origin + "/" + repository, nil
		},
		Revalidate: -1,
	}
	handler := m.r.Handler(&ocilocal.HandlerOptions{ReadOnly: true, Upstream: upstream, Name: func(r *http.Request, repository string) (string, error) {
		host := mirroredHost
		if ns := r.URL.Query().Get("ns"); ns != "" {
			host = ns
		}
		return host + "/" + repository, nil
	}})
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	m.host = server.Listener.Addr().String()
	return m
}

// RoundTrip implements [http.RoundTripper] for the requests to the origin.
func (m *mirror) RoundTrip(r *http.Request) (*http.Response, error) {
	if m.down.Load() {
		return nil, errors.New("the origin is down")
	}
	m.mu.Lock()
	if r.Method == "GET" {
		m.asked = append(m.asked, r.URL.Path)
	}
	m.mu.Unlock()
	return http.DefaultTransport.RoundTrip(r)
}

// digest returns the digest of the image index.
func (m *mirror) digest() string {
	m.t.Helper()
	d, err := m.index.Digest()
	if err != nil {
		m.t.Fatal(err)
	}
	return d.String()
}

// image returns the manifest of a platform.
func (m *mirror) image(architecture string) *v1.Manifest {
	m.t.Helper()
	index, err := m.index.IndexManifest()
	if err != nil {
		m.t.Fatal(err)
	}
	for _, desc := range index.Manifests {
		if desc.Platform.Architecture != architecture {
			continue
		}
		image, err := m.index.Image(desc.Digest)
		if err != nil {
			m.t.Fatal(err)
		}
		manifest, err := image.Manifest()
		if err != nil {
			m.t.Fatal(err)
		}
		return manifest
	}
	m.t.Fatalf("no image for %s", architecture)
	return nil
}

// wantOne checks that the mirror has one platform of the image and no layer of the other, that it
// asked for nothing twice, and that it is sound.
func (m *mirror) wantOne() {
	m.t.Helper()
	ctx := m.t.Context()
	manifest := m.image("amd64")
	for _, layer := range append(manifest.Layers, manifest.Config) {
		src, err := m.r.OpenBlob(ctx, ocispec.Descriptor{Digest: digest.Digest(layer.Digest.String()), Size: layer.Size})
		if err == nil {
			_, err = io.Copy(io.Discard, src)
			src.Close()
		}
		if err != nil {
			m.t.Errorf("a blob of the platform: %v", err)
		}
	}
	for _, layer := range m.image("arm64").Layers { // containerd fetches all manifests
		if _, err := m.r.OpenBlob(ctx, ocispec.Descriptor{Digest: digest.Digest(layer.Digest.String()), Size: layer.Size}); !errors.Is(err, ocilocal.ErrNotFound) {
			m.t.Errorf("a layer of the other platform: %v", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := map[string]bool{}
	for _, path := range m.asked {
		if seen[path] {
			m.t.Errorf("the origin was asked twice for %s", path)
		}
		seen[path] = true
	}
	for p, err := range m.r.Verify(ctx, nil) {
		m.t.Errorf("%v, %v", p, err)
	}
}

// TestMirrorClients has each client pull one platform of an image through a mirror, by its tag and by
// the digest of its image index, and again into another store when the origin is down.
func TestMirrorClients(t *testing.T) {
	for tool, pull := range map[string]func(b *box, m *mirror, named, architecture string){
		"skopeo": func(b *box, m *mirror, named, architecture string) {
			b.mirrors(m)
			b.run("skopeo", "--registries-conf", b.path("registries.conf"), "copy", "--override-os", "linux", "--override-arch", architecture, "docker://"+mirroredHost+"/org/app"+named, "oci:"+b.path("copy")+":v1")
		},
		"podman": func(b *box, m *mirror, named, architecture string) {
			b.mirrors(m)
			b.run("podman", append(b.store(), "pull", "--os", "linux", "--arch", architecture, mirroredHost+"/org/app"+named)...)
		},
		"buildah": func(b *box, m *mirror, named, architecture string) {
			b.mirrors(m)
			b.run("buildah", append(b.store(), "pull", "--os", "linux", "--arch", architecture, mirroredHost+"/org/app"+named)...)
		},
		"crane": func(b *box, m *mirror, named, architecture string) {
			b.run("crane", "pull", "--platform", "linux/"+architecture, "--format=oci", m.host+"/org/app"+named, b.path("copy"))
		},
		"oras": func(b *box, m *mirror, named, architecture string) {
			b.run("oras", "copy", "--from-plain-http", "--platform", "linux/"+architecture, m.host+"/org/app"+named, "--to-oci-layout", b.path("copy")+":v1")
		},
		"regctl": func(b *box, m *mirror, named, architecture string) {
			b.run("regctl", "registry", "set", "--skip-check", "--mirror", m.host, mirroredHost)
			b.run("regctl", "registry", "set", "--skip-check", "--tls", "disabled", m.host)
			b.run("regctl", "image", "copy", "--platform", "linux/"+architecture, mirroredHost+"/org/app"+named, "ocidir://copy:v1")
		},
		"ocilocal": func(b *box, m *mirror, named, architecture string) {
			client := &ocilocal.Remote{
				Mirrors: map[string][]ocilocal.Mirror{mirroredHost: {{Location: m.host, Tags: true}}},
			}
			_, err := newRegistry(b.t).Pull(b.t.Context(), reference(b.t, mirroredHost+"/org/app"+named),
				&ocilocal.PullOptions{Remote: client, As: reference(b.t, mirroredHost+"/org/app:v1"), Platform: &ocispec.Platform{OS: "linux", Architecture: architecture}})
			if err != nil {
				b.t.Fatal(err)
			}
		},
		"containerd": func(b *box, m *mirror, named, architecture string) {
			b.containerd(m).pull(mirroredHost+"/org/app"+named, architecture)
		},
		"ctr": func(b *box, m *mirror, named, architecture string) {
			b.containerd(m).pull(mirroredHost+"/org/app"+named, architecture, "--local")
		},
		"docker": func(b *box, m *mirror, named, architecture string) {
			b.dockerd(m, "--storage-driver", "vfs").pull("docker.io/org/app", named, architecture)
		},
		"docker with containerd": func(b *box, m *mirror, named, architecture string) {
			b.dockerd(m, "--feature", "containerd-snapshotter=true", "--storage-driver", "native").pull("docker.io/org/app", named, architecture)
		},
	} {
		for _, by := range []string{"tag", "digest"} {
			t.Run(tool+" by "+by, func(t *testing.T) {
				t.Parallel()
				m := newMirror(t)
				named := ":v1"
				if by == "digest" {
					named = "@" + m.digest()
				}
				pull(newBox(t), m, named, "amd64")
				m.wantOne()
				m.down.Store(true)
				pull(newBox(t), m, named, "amd64")
				m.wantOne()
			})
		}
	}
}

// mirrors tells podman, buildah and skopeo of a mirror.
func (b *box) mirrors(m *mirror) {
	b.t.Helper()
	b.write("registries.conf", fmt.Sprintf("[[registry]]\nprefix = %q\nlocation = %q\n[[registry.mirror]]\nlocation = %q\ninsecure = true\n", mirroredHost, mirroredHost, m.host))
	b.setenv("CONTAINERS_REGISTRIES_CONF", b.path("registries.conf"))
}

// store returns the flags for an empty store of podman or buildah.
func (b *box) store() []string {
	b.t.Helper()
	run := shortDir(b.t)
	return []string{"--root", b.path("store"), "--runroot", run, "--storage-driver", "vfs"}
}

// shortDir makes a directory with a short name, for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "run")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// daemon starts a program that runs until the test ends, and waits until it answers at a socket.
func (b *box) daemon(tool, socket string, args ...string) {
	b.t.Helper()
	if os.Geteuid() != 0 {
		skipped.Lock()
		skipped.tests["root, for "+tool]++
		skipped.Unlock()
		b.t.Skipf("SKIPPED: %s runs as root only", tool)
	}
	program := need(b.t, tool)
	cmd := exec.Command(program, args...)
	cmd.Dir = b.dir
	cmd.Env = append(b.env, "PATH="+cacheDir()+"/bin:"+os.Getenv("PATH"))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	b.t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			cmd.Process.Kill()
			<-ended
		}
		if b.t.Failed() {
			text := log.String()
			b.t.Logf("the log of %s ends:\n%s", tool, text[max(0, len(text)-4000):])
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return
		}
		select {
		case <-ended:
			b.t.Fatalf("%s ended:\n%s", tool, log.String())
		default:
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%s does not answer:\n%s", tool, log.String())
		}
	}
}

// A containerd is a daemon. With a mirror, that is in its hosts.toml.
type containerd struct {
	b      *box
	socket string
}

func (b *box) containerd(m *mirror) *containerd {
	b.t.Helper()
	need(b.t, "ctr")
	run := shortDir(b.t)
	c := &containerd{b, run + "/c.sock"}
	b.write("config.toml", fmt.Sprintf(`version = 3
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]
[grpc]
address = %q
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/amd64"
snapshotter = "native"
differ = "walking"
`, b.path("root"), run+"/state", c.socket))
	if m != nil {
		if err := os.MkdirAll(b.path("hosts/"+mirroredHost), 0o700); err != nil {
			b.t.Fatal(err)
		}
		b.write("hosts/"+mirroredHost+"/hosts.toml", fmt.Sprintf("server = \"https://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", mirroredHost, m.host))
	}
	b.daemon("containerd", c.socket, "--config", b.path("config.toml"))
	return c
}

// pull pulls an image: the daemon does, or with --local the command.
func (c *containerd) pull(image, architecture string, flags ...string) {
	c.b.t.Helper()
	args := append([]string{"--address", c.socket, "images", "pull"}, flags...)
	c.b.run("ctr", append(args, "--hosts-dir", c.b.path("hosts"), "--snapshotter", "native", "--platform", "linux/"+architecture, image)...)
}

// A dockerd is a daemon, with a registry mirror or without. Docker knows mirrors of docker.io only.
type dockerd struct {
	b      *box
	client http.Client
}

func (b *box) dockerd(m *mirror, flags ...string) *dockerd {
	b.t.Helper()
	need(b.t, "containerd")
	run := shortDir(b.t)
	socket := run + "/d.sock"
	d := &dockerd{b: b, client: http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}}
	b.t.Cleanup(d.client.CloseIdleConnections)
	if m != nil {
		flags = append(flags, "--registry-mirror", "http://"+m.host)
	}
	b.daemon("dockerd", socket, append(flags, "--host", "unix://"+socket, "--data-root", b.path("docker"), "--exec-root", run, "--pidfile", run+"/pid",
		"--iptables=false", "--ip6tables=false", "--bridge=none", "--userland-proxy=false")...)
	return d
}

// pull pulls an image by the daemon's API, as the docker command does. named is a tag after a colon, or
// a digest after an @, as the local name of the image has it. The API calls both a tag.
func (d *dockerd) pull(repository, named, architecture string) {
	t := d.b.t
	t.Helper()
	query := url.Values{"fromImage": {repository}, "tag": {named[1:]}, "platform": {"linux/" + architecture}}
	d.call("POST", "/images/create?"+query.Encode())
	if got := d.inspect(repository + named).Architecture; got != architecture {
		t.Errorf("docker has an image for %q", got)
	}
}

// call makes a request to the daemon, as the docker command does, and returns the body of the answer.
func (d *dockerd) call(method, path string) string {
	t := d.b.t
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://docker"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Registry-Auth", "e30=") // {}
	res, err := d.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode >= 300 || strings.Contains(string(body), `"error"`) {
		t.Fatalf("docker %s: %s, %v\n%s", path, res.Status, err, body)
	}
	return string(body)
}

// A dockerImage is what docker says of an image.
type dockerImage struct{ ID, Architecture string }

func (d *dockerd) inspect(image string) (got dockerImage) {
	d.b.t.Helper()
	if err := json.Unmarshal([]byte(d.call("GET", "/images/"+image+"/json")), &got); err != nil {
		d.b.t.Error(err)
	}
	return got
}
