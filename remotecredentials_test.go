package ocilocal_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

func TestFileCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	helper := func(name, script string) {
		if err := os.WriteFile(filepath.Join(dir, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	helper("good", `read host; echo "{\"ServerURL\":\"$host\",\"Username\":\"u\",\"Secret\":\"for $host\"}"`)
	helper("token", `echo '{"Username":"<token>","Secret":"refresh"}'`)
	helper("none", `echo "credentials not found in native keychain"; exit 1`)
	helper("broken", `echo "the secret is hush" >&2; echo '{"Secret":"hush"'; exit 1`)
	helper("talking", `while :; do echo hushhushhushhushhushhushhushhushhushhush; done`)
	const auth = `"dTpw"` // u:p
	for name, c := range map[string]struct {
		doc, host, repo, want string
		err                   error
		says                  string
	}{
		"host":             {doc: `{"auths":{"r.test":{"auth":` + auth + `}}}`, host: "r.test", want: "u p"},
		"other host":       {doc: `{"auths":{"r.test":{"auth":` + auth + `}}}`, host: "r.test.evil.test"},
		"other port":       {doc: `{"auths":{"r.test":{"auth":` + auth + `}}}`, host: "r.test:5000"},
		"address":          {doc: `{"auths":{"https://r.test/v2/":{"auth":` + auth + `}}}`, host: "r.test", want: "u p"},
		"Docker Hub":       {doc: `{"auths":{"https://index.docker.io/v1/":{"auth":` + auth + `}}}`, host: "docker.io", want: "u p"},
		"fields":           {doc: `{"auths":{"r.test":{"username":"a","password":"b"}}}`, host: "r.test", want: "a b"},
		"repository first": {doc: `{"auths":{"r.test":{"auth":` + auth + `},"r.test/org":{"username":"o","password":"o"}}}`, host: "r.test", repo: "org/x", want: "o o"},
		"other repository": {doc: `{"auths":{"r.test/org":{"username":"o","password":"o"}}}`, host: "r.test", repo: "organ/x"},
		"identity token":   {doc: `{"auths":{"r.test":{"identitytoken":"idt"}}}`, host: "r.test", want: "idt"},
		"empty entry":      {doc: `{"auths":{"r.test":{}}}`, host: "r.test"},
		"bad auth":         {doc: `{"auths":{"r.test":{"auth":"%%%"}}}`, host: "r.test", says: "base64"},
		"helper":           {doc: `{"credHelpers":{"r.test":"good"},"auths":{"r.test":{"auth":` + auth + `}}}`, host: "r.test", want: "u for r.test"},
		"helper's token":   {doc: `{"credHelpers":{"r.test":"token"}}`, host: "r.test", want: "refresh"},
		"store":            {doc: `{"credsStore":"good"}`, host: "docker.io", want: "u for https://index.docker.io/v1/"},
		"store has none":   {doc: `{"credsStore":"none","auths":{"r.test":{"auth":` + auth + `}}}`, host: "r.test", want: "u p"},
		"broken helper":    {doc: `{"credsStore":"broken"}`, host: "r.test", says: "exit status 1"},
		"talking helper":   {doc: `{"credsStore":"talking"}`, host: "r.test", err: ocilocal.ErrTooLarge},
		"no such helper":   {doc: `{"credsStore":"missing"}`, host: "r.test", says: "not found"},
		"helper elsewhere": {doc: `{"credsStore":"../../bin/sh"}`, host: "r.test", err: ocilocal.ErrInvalidArgument},
		"newline":          {doc: `{"credsStore":"good"}`, host: "r.test\nother", err: ocilocal.ErrInvalidArgument},
		"NUL":              {doc: `{"credsStore":"good"}`, host: "r.test\x00other", err: ocilocal.ErrInvalidArgument},
		"no host":          {doc: `{"credsStore":"good"}`, err: ocilocal.ErrInvalidArgument},
		"not JSON":         {doc: `{"auths":{"r.test":{"auth":"hush"`, host: "r.test", says: "not JSON"},
		"wrong types":      {doc: `{"auths":{"r.test":{"auth":["hush"]}}}`, host: "r.test", says: "not JSON"},
		"too large":        {doc: `{"auths":"` + strings.Repeat("x", 1<<20) + `"}`, host: "r.test", err: ocilocal.ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			if runtime.GOOS == "windows" && strings.Contains(c.doc, "cred") {
				t.Skip("helpers are shell scripts here")
			}
			file := filepath.Join(t.TempDir(), "config.json")
			write(t, file, c.doc)
			got, err := ocilocal.FileCredentials(file)(t.Context(), c.host, c.repo)
			if (c.err != nil || c.says != "") != (err != nil) || c.err != nil && !errors.Is(err, c.err) || c.says != "" && !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%v", err)
			}
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Error("secret in", err)
			}
			if s := strings.TrimSpace(strings.Join([]string{got.Username, got.Password, got.IdentityToken}, " ")); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
		})
	}
	got, err := ocilocal.FileCredentials(filepath.Join(dir, "absent"))(t.Context(), "r.test", "x")
	if err != nil || got != (ocilocal.Credential{Source: filepath.Join(dir, "absent")}) {
		t.Errorf("%v, %v", got, err)
	}
}

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
		}, static("fails.test", "four")}
	first := ocilocal.FirstCredential(sources...)
	sources[0] = nil
	for host, want := range map[string]string{"a.test": "one", "b.test": "two", "none.test": ""} {
		if got, err := first(t.Context(), host, "x"); err != nil || got.Username != want || got.Source == "" {
			t.Errorf("%s: %v, %v", host, got, err)
		}
	}
	if got, err := first(t.Context(), "none.test", "x"); !strings.Contains(got.Source, "a.test, StaticCredential for b.test") {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := first(t.Context(), "fails.test", "x"); !errors.Is(err, failed) {
		t.Error(err)
	}
	if got, err := ocilocal.FirstCredential()(t.Context(), "a.test", "x"); err != nil || got != (ocilocal.Credential{}) {
		t.Errorf("%v, %v", got, err)
	}
}

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
