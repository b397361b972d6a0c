package interop_test

import (
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/ocilocal/ocilocal"
)

// An engine runs containers and keeps images in its own store. Most engines unpack an image that they
// pull, and pack it again when they push it. So the manifest may change, but the config does not.
type engine struct {
	pull func(image string)
	tag  func(from, to string)
	push func(image string) (digest string) // as the engine says
	id   func(image string) string
}

var engines = map[string]func(b *box) engine{
	"podman":  func(b *box) engine { return b.podman("podman") },
	"buildah": func(b *box) engine { return b.podman("buildah") },
	"docker":  func(b *box) engine { return b.dockerd(nil, "--storage-driver", "vfs").engine() },
	"docker with containerd": func(b *box) engine {
		return b.dockerd(nil, "--feature", "containerd-snapshotter=true", "--storage-driver", "native").engine()
	},
	"containerd": func(b *box) engine { return b.containerd(nil).engine() },
	"ctr":        func(b *box) engine { return b.containerd(nil).engine("--local") },
}

// keepsManifests are the engines that push the manifest that they have pulled.
var keepsManifests = map[string]bool{"docker with containerd": true, "containerd": true, "ctr": true}

// TestEngines has each engine pull an image from our handler and push it under another name. Another
// store of the same engine then pulls that, and has the same image.
func TestEngines(t *testing.T) {
	for tool, start := range engines {
		t.Run(tool, func(t *testing.T) {
			t.Parallel()
			r := newRegistry(t)
			host := inProcess(t, &server{}, r.Handler(nil)).host
			image := ociImage(t)
			from, to := host+"/org/app:v1", host+"/org/pushed:v2"
			ref, err := name.ParseReference(from)
			if err == nil {
				err = remote.Write(ref, image, remote.WithContext(t.Context()))
			}
			if err != nil {
				t.Fatal(err)
			}
			first, second := start(newBox(t)), start(newBox(t))
			first.pull(from)
			first.tag(from, to)
			says := first.push(to)
			got, err := r.Resolve(t.Context(), reference(t, "localhost/org/pushed:v2"))
			if err != nil {
				t.Fatal(err)
			}
			if says != "" && says != string(got.Digest) {
				t.Errorf("%s says that it has pushed %s, the registry has %s", tool, says, got.Digest)
			}
			if was, err := image.Digest(); err != nil || keepsManifests[tool] && string(got.Digest) != was.String() {
				t.Errorf("pushed %s, want %s, %v", got.Digest, was, err)
			}
			second.pull(to)
			if a, b := first.id(from), second.id(to); a != b || a == "" {
				t.Errorf("the image is %q and comes back as %q", a, b)
			}
			if _, err := r.GC(t.Context(), &ocilocal.GCOptions{Grace: ocilocal.NoGrace}); err != nil {
				t.Error(err)
			}
			for p, err := range r.Verify(t.Context(), nil) {
				t.Errorf("%v, %v", p, err)
			}
		})
	}
}

// ociImage returns an image with two layers for linux/amd64.
func ociImage(t *testing.T) v1.Image {
	t.Helper()
	image := empty.Image
	for range 2 {
		layer, err := random.Layer(100_000, types.OCILayer)
		if err == nil {
			image, err = mutate.AppendLayers(image, layer)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return asOCI(t, image, "amd64")
}

// podman is for podman and buildah, which have the same flags.
func (b *box) podman(tool string) engine {
	store := b.store()
	run := func(args ...string) string {
		b.t.Helper()
		return b.run(tool, append(store[:len(store):len(store)], args...)...)
	}
	return engine{
		pull: func(image string) { run("pull", "--tls-verify=false", image) },
		tag:  func(from, to string) { run("tag", from, to) },
		push: func(image string) string {
			run("push", "--tls-verify=false", "--digestfile", b.path("digest"), image)
			digest, err := os.ReadFile(b.path("digest"))
			if err != nil {
				b.t.Error(err)
			}
			return strings.TrimSpace(string(digest))
		},
		id: func(image string) string { return run("images", "--quiet", "--no-trunc", image) },
	}
}

var pushedDigest = regexp.MustCompile(`digest: (sha256:[0-9a-f]{64})`)

func (d *dockerd) engine() engine {
	return engine{
		pull: func(image string) {
			at := strings.LastIndex(image, ":")
			d.pull(image[:at], image[at:], "amd64")
		},
		tag: func(from, to string) {
			at := strings.LastIndex(to, ":")
			d.call("POST", "/images/"+from+"/tag?"+url.Values{"repo": {to[:at]}, "tag": {to[at+1:]}}.Encode())
		},
		push: func(image string) string {
			at := strings.LastIndex(image, ":")
			found := pushedDigest.FindStringSubmatch(d.call("POST", "/images/"+image[:at]+"/push?tag="+image[at+1:]))
			if found == nil {
				return ""
			}
			return found[1]
		},
		id: func(image string) string { return d.inspect(image).ID },
	}
}

func (c *containerd) engine(flags ...string) engine {
	images := func(args ...string) string {
		c.b.t.Helper()
		return c.b.run("ctr", append([]string{"--address", c.socket, "images"}, args...)...)
	}
	return engine{
		pull: func(image string) { c.pull(image, "amd64", append(flags, "--plain-http")...) },
		tag:  func(from, to string) { images("tag", from, to) },
		push: func(image string) string {
			images(append(append([]string{"push"}, flags...), "--plain-http", image)...)
			return ""
		},
		id: func(image string) string {
			for line := range strings.Lines(images("list", "name=="+image)) {
				if fields := strings.Fields(line); fields[0] == image {
					return fields[2]
				}
			}
			return ""
		},
	}
}
