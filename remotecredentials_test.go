package ocilocal_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestStaticCredential: a credential is for one registry, in every spelling of its host.
func TestStaticCredential(t *testing.T) {
	for host, c := range map[string]struct{ asked, never string }{
		"ghcr.io":                     {"ghcr.io", "ghcr.io.evil.test"},
		"GHCR.io":                     {"ghcr.io", "GHCR.io:443"},
		"https://ghcr.io":             {"ghcr.io", "https"},
		"https://ghcr.io/v2/":         {"ghcr.io", "v2"},
		"index.docker.io":             {"docker.io", "index.docker.io.evil.test"},
		"https://index.docker.io/v1/": {"docker.io", "v1"},
		"http://localhost:5000/":      {"localhost:5000", "localhost"},
		"[0:0::1]:5000":               {"[::1]:5000", "[::1]"},
	} {
		look := ocilocal.StaticCredential(host, ocilocal.Credential{Username: "me", Password: "secret"})
		if got, err := look(t.Context(), c.asked, "x"); err != nil || got.Username != "me" {
			t.Errorf("%s: %v, %v", host, got, err)
		}
		if got, err := look(t.Context(), c.never, "x"); err != nil || got.Username != "" {
			t.Errorf("%s for %s: %v, %v", host, c.never, got, err)
		}
	}
	for _, host := range []string{"", "ghcr.io/org", "user@ghcr.io", "ftp://ghcr.io", "ghcr.io:0"} {
		if _, err := ocilocal.StaticCredential(host, ocilocal.Credential{Password: "secret"})(t.Context(), "ghcr.io", "x"); !errors.Is(err, ocilocal.ErrInvalidArgument) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", host, err)
		}
	}
}

// TestFirstCredential asks several sources in turn. The first credential counts, and failures are
// joined.
func TestFirstCredential(t *testing.T) {
	failed := errors.New("locked")
	static := func(host, user string) ocilocal.CredentialFunc {
		return ocilocal.StaticCredential(host, ocilocal.Credential{Username: user, Password: "secret"})
	}
	sources := []ocilocal.CredentialFunc{static("a.test", "one"), static("b.test", "two"), static("a.test", "three"),
		func(_ context.Context, host, _ string) (ocilocal.Credential, error) {
			if host == "fails.test" {
				return ocilocal.Credential{}, failed
			}
			return ocilocal.Credential{}, nil
		}, static("fails.test", "four"), func(_ context.Context, host, _ string) (ocilocal.Credential, error) {
			if host == "broken.test" {
				return ocilocal.Credential{Source: "keyring"}, failed
			}
			return ocilocal.Credential{}, nil
		}}
	first := ocilocal.FirstCredential(sources...)
	sources[0] = nil
	for host, want := range map[string]string{"a.test": "one", "b.test": "two", "none.test": "", "fails.test": "four"} {
		if got, err := first(t.Context(), host, "x"); err != nil || got.Username != want || got.Source == "" {
			t.Errorf("%s: %v, %v", host, got, err)
		}
	}
	if got, err := first(t.Context(), "none.test", "x"); !strings.Contains(got.Source, "a.test, StaticCredential for b.test") {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := first(t.Context(), "broken.test", "x"); !errors.Is(err, failed) || !strings.HasSuffix(got.Source, "keyring") {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := ocilocal.FirstCredential()(t.Context(), "a.test", "x"); err != nil || got != (ocilocal.Credential{}) {
		t.Errorf("%v, %v", got, err)
	}
}

// TestDefaultCredentials looks in all usual places, in their order.
func TestDefaultCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("REGISTRY_AUTH_FILE", filepath.Join(dir, "auth.json"))
	t.Setenv("OMMX_BASIC_AUTH_DOMAIN", "ommx.test:5000")
	t.Setenv("OMMX_BASIC_AUTH_USERNAME", "ommx")
	t.Setenv("OMMX_BASIC_AUTH_PASSWORD", "secret")
	write(t, filepath.Join(dir, "config.json"), `{"auths":{"docker.test":{"username":"docker","password":"secret"},"both.test":{"username":"docker","password":"secret"}}}`)
	write(t, filepath.Join(dir, "auth.json"), `{"auths":{"podman.test":{"username":"podman","password":"secret"},"both.test":{"username":"podman","password":"secret"}}}`)
	for host, want := range map[string]string{
		"ommx.test:5000": "ommx", "ommx.test": "", "ommx.test:50001": "", "ommx.test:5000.evil.test": "", "x.ommx.test:5000": "", "docker.test": "docker", "podman.test": "podman", "both.test": "docker", "none.test": "",
	} {
		got, err := ocilocal.DefaultCredentials()(t.Context(), host, "org/x")
		if err != nil || got.Username != want || got.Source == "" {
			t.Errorf("%s: %v, %v", host, got, err)
		}
		raw, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if text := fmt.Sprintf("%v %+v %#v %s", got, got, &got, raw); strings.Contains(text, "secret") {
			t.Error("printed:", text)
		}
	}
}
