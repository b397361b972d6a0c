package interop_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/ocilocal/ocilocal"
)

// A client is a tool as a registry sees it. A layout's artifact is named by a tag.
type client struct {
	tool string
	// push sends what a layout has under tag to a repository, under the same tag.
	push func(b *box, s *server, layout, repository, tag string)
	// pull does the reverse into a new layout.
	pull func(b *box, s *server, layout, repository, tag string)
	// digest asks the server.
	digest func(b *box, s *server, repository, tag string) string
}

// plain returns the flags of a tool for a server without TLS.
func (s *server) plain(flags ...string) []string {
	if s.tls {
		return nil
	}
	return flags
}

func (s *server) regctl(b *box, args ...string) string {
	return b.run("regctl", append(args, s.plain("--host", "reg="+s.host+",tls=disabled")...)...)
}

// oras takes localhost for a server without TLS unless it is told.
func (s *server) oras(b *box, plain string, args ...string) string {
	return b.run("oras", append(args, fmt.Sprintf("%s=%t", plain, !s.tls))...)
}

func (s *server) skopeo(b *box, plain string, args ...string) string {
	return b.run("skopeo", append(args, s.plain(plain)...)...)
}

var clients = []client{{
	tool: "oras",
	push: func(b *box, s *server, layout, repository, tag string) {
		s.oras(b, "--to-plain-http", "copy", "--from-oci-layout", layout+":"+tag, s.host+"/"+repository+":"+tag)
	},
	pull: func(b *box, s *server, layout, repository, tag string) {
		s.oras(b, "--from-plain-http", "copy", s.host+"/"+repository+":"+tag, "--to-oci-layout", layout+":"+tag)
	},
	digest: func(b *box, s *server, repository, tag string) string {
		return s.oras(b, "--plain-http", "resolve", s.host+"/"+repository+":"+tag)
	},
}, {
	tool: "regctl",
	push: func(b *box, s *server, layout, repository, tag string) {
		s.regctl(b, "image", "copy", "ocidir://"+layout+":"+tag, s.host+"/"+repository+":"+tag)
	},
	pull: func(b *box, s *server, layout, repository, tag string) {
		s.regctl(b, "image", "copy", s.host+"/"+repository+":"+tag, "ocidir://"+layout+":"+tag)
	},
	digest: func(b *box, s *server, repository, tag string) string {
		return s.regctl(b, "manifest", "head", s.host+"/"+repository+":"+tag)
	},
}, {
	tool: "skopeo",
	push: func(b *box, s *server, layout, repository, tag string) {
		s.skopeo(b, "--dest-tls-verify=false", "copy", "--all", "--preserve-digests", "oci:"+layout+":"+tag, "docker://"+s.host+"/"+repository+":"+tag)
	},
	pull: func(b *box, s *server, layout, repository, tag string) {
		s.skopeo(b, "--src-tls-verify=false", "copy", "--all", "--preserve-digests", "docker://"+s.host+"/"+repository+":"+tag, "oci:"+layout+":"+tag)
	},
	digest: func(b *box, s *server, repository, tag string) string {
		raw := s.skopeo(b, "--tls-verify=false", "inspect", "--raw", "docker://"+s.host+"/"+repository+":"+tag)
		return digest.FromString(raw).String()
	},
}, {
	tool: "crane",
	push: func(b *box, s *server, layout, repository, tag string) {
		b.run("crane", "push", layout, s.host+"/"+repository+":"+tag)
	},
	pull: func(b *box, s *server, layout, repository, tag string) {
		b.run("crane", "pull", "--format=oci", s.host+"/"+repository+":"+tag, layout)
	},
	digest: func(b *box, s *server, repository, tag string) string {
		return b.run("crane", "digest", s.host+"/"+repository+":"+tag)
	},
}}

// Each tool's pushes arrive with our digest in each registry, and every tool
// pulls the same from there.
func TestToolsAndRegistries(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		b := newBox(t)
		b.login(s)
		r := newRegistry(t)
		want := buildImage(t, r, imageName).Digest().String()
		b.run("regctl", "image", "copy", "ocidir://"+exportLayout(t, r, imageName)+":v1", "ocidir://ours:v1") // with a bare tag
		for _, c := range clients {
			repository := "tools/" + c.tool
			c.push(b, s, b.path("ours"), repository, "v1")
			wantEqual(t, c.tool+"'s digest", c.digest(b, s, repository, "v1"), want)
			for _, other := range clients {
				layout := b.path(c.tool + "-" + other.tool)
				other.pull(b, s, layout, repository, "v1")
				back, result := importLayout(t, layout, byDigest)
				wantImported(t, back, result, "", want)
			}
		}
		b.run("crane", "validate", "--remote", s.host+"/tools/oras:v1")
	})
}

// The registries that shall want credentials do, and the token server gives
// everybody what he may have.
func TestRegistriesWantCredentials(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		resp := s.request(t, "GET", "/v2/", "", "")
		challenge := resp.Header.Get("WWW-Authenticate")
		switch {
		case !s.auth && resp.StatusCode != 200, s.auth && resp.StatusCode != 401:
			t.Errorf("anonymous request: %s", resp.Status)
		case s.auth && s.tokens == nil && !strings.HasPrefix(challenge, "Basic "),
			s.tokens != nil && !strings.HasPrefix(challenge, "Bearer "):
			t.Errorf("the challenge is %q", challenge)
		}
		if !s.auth {
			return
		}
		b := newBox(t)
		b.setenv("SSL_CERT_FILE", s.pki.caFile)
		if _, stderr, err := b.try("crane", "ls", s.host+"/some/thing"); err == nil || !strings.Contains(stderr, "UNAUTHORIZED") {
			t.Errorf("crane without credentials: %v, %s", err, stderr)
		}
	})
}

// An artifact that refers to another is found by oras and regctl in each
// registry, by the referrers API or by the referrers tag.
func TestReferrersInRegistries(t *testing.T) {
	eachServer(t, func(t *testing.T, s *server) {
		b := newBox(t)
		b.login(s)
		b.write("note.txt", "a note")
		name := s.host + "/tools/referrers:v1"
		s.oras(b, "--plain-http", "push", name, "--artifact-type", artifactType, "note.txt:text/plain")
		s.oras(b, "--plain-http", "attach", name, "--artifact-type", "application/vnd.example.note", "note.txt:text/plain")
		s.regctl(b, "artifact", "put", "--artifact-type", "application/vnd.example.other", "--subject", name, "--file", "note.txt", "--file-media-type", "text/plain")
		byOras := s.oras(b, "--plain-http", "discover", "--format", "go-template={{range .referrers}}{{println .digest}}{{end}}", name)
		byRegctl := s.regctl(b, "artifact", "list", "--format", "{{range .Descriptors}}{{println .Digest}}{{end}}", name)
		if lines(byOras) != lines(byRegctl) || strings.Count(lines(byOras), "sha256:") != 2 {
			t.Errorf("oras tells\n%s\nregctl tells\n%s\nwant 2 referrers from each", byOras, byRegctl)
		}
		if !s.auth {
			path := "/v2/tools/referrers/referrers/" + s.oras(b, "--plain-http", "resolve", name)
			if resp := s.request(t, "GET", path, "", ""); s.referrers != (resp.StatusCode == 200) {
				t.Errorf("the referrers API answers %s", resp.Status)
			}
		}
	})
}

// lines sorts the lines of s.
func lines(s string) string {
	list := strings.Fields(s)
	slices.Sort(list)
	return strings.Join(list, "\n")
}

// crane pushes the layout that we wrote, and we refuse by its name the docker archive that it saves.
func TestCraneAndOurLayout(t *testing.T) {
	need(t, "crane")
	need(t, "registry3")
	s := servers["distribution 3"](t)
	b := newBox(t)
	r := newRegistry(t)
	want := buildImage(t, r, imageName).Digest().String()
	b.run("crane", "push", exportLayout(t, r, imageName), s.host+"/ours/layout:v1")
	wantEqual(t, "crane's digest of our layout", b.run("crane", "digest", s.host+"/ours/layout:v1"), want)
	saved := b.path("saved.tar")
	b.run("crane", "pull", "--format=tarball", s.host+"/ours/layout:v1", saved)
	_, err := r.ImportArchiveFile(t.Context(), saved, nil)
	if !errors.Is(err, ocilocal.ErrUnsupportedMediaType) || !strings.Contains(err.Error(), "docker save") {
		t.Errorf("crane's docker archive: %v", err)
	}
}
