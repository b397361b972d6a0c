package ocilocal_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/ocilocal/ocilocal"
)

// TestFileCredentials looks for credentials in files as docker and podman write them.
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

// TestCredentialKeys has the spellings of a registry under which docker, podman and other tools
// have stored credentials.
func TestCredentialKeys(t *testing.T) {
	const entry = `{"username":"u","password":"p"}`
	for ref, keys := range map[string][]string{
		"r.test/org/x": {
			"r.test", "R.test", "r.test/", "r.test/v1/", "r.test/v2", "http://r.test/", "https://r.test", "HTTPS://r.test/v1", "https://r.test/v2/", "https://r.test:443/v2/",
			"https://r.test/v2/_catalog", "r.test/org", "r.test/org/", "https://r.test/org/x", "r.test/org/x/",
		},
		"docker.io/library/x": {
			"https://index.docker.io/v1/", "https://index.docker.io/v1", "index.docker.io/v1/", "index.docker.io", "docker.io", "https://docker.io/", "registry-1.docker.io",
			"https://registry-1.docker.io/v2", "registry.hub.docker.com", "hub.docker.com", "docker.io/library",
		},
		"localhost:5000/a": {"http://localhost:5000/", "localhost:5000/", "http://localhost:5000/v2/"},
		"[::1]:5000/a":     {"[::1]:5000", "http://[0:0::1]:5000/"},
		"not r.test/org/x": {
			"r.test.evil.test", "r.test:5000", "r.test/organ", "r.test/org/x/y", "r.test@evil.test", "ftp://r.test", "http://r.test:443", "https://r.test:80", "", "/", "https://", "r.test/org/v2",
			"x/r.test", "test", "https://evil.test/r.test",
		},
	} {
		name, not := strings.CutPrefix(ref, "not ")
		host, repository, _ := strings.Cut(name, "/")
		for _, key := range keys {
			file := filepath.Join(t.TempDir(), "config.json")
			write(t, file, fmt.Sprintf(`{"auths":{%q:%s}}`, key, entry))
			got, err := ocilocal.FileCredentials(file)(t.Context(), host, repository)
			if err != nil || (got.Username == "u") == not {
				t.Errorf("%q for %s: %v, %v", key, ref, got, err)
			}
		}
	}
	// The longest path counts, and an entry with a credential comes before an empty one.
	for doc, want := range map[string]string{
		`{"r.test":{"username":"host"},"r.test/org":{"username":"org"},"r.test/org/x":{"username":"x"}}`: "x",
		`{"r.test":{"username":"host"},"r.test/org":{"username":"org"},"r.test/other":{"username":"o"}}`: "org",
		`{"r.test":{"username":"host"},"r.test/org":{},"r.test/org/x":{"auth":null}}`:                    "host",
		`{"r.test":{},"https://r.test/v2/":{"username":"address"}}`:                                      "address",
		`{"r.test":{"username":"plain"},"https://r.test":{"username":"address"}}`:                        "plain",
		`{"r.test":{"password":5},"https://r.test":{"username":"address"}}`:                              "address",
	} {
		file := filepath.Join(t.TempDir(), "config.json")
		write(t, file, `{"auths":`+doc+`}`)
		if got, err := ocilocal.FileCredentials(file)(t.Context(), "r.test", "org/x"); err != nil || got.Username != want {
			t.Errorf("%s: %v, %v", doc, got, err)
		}
	}
	// The spellings of base64.
	for _, text := range []string{"dXNlcjpwPz5+fg==", "dXNlcjpwPz5+fg", "dXNlcjpwPz5-fg==", "dXNlcjpwPz5-fg", `dXNlcjpwPz5+fg==\n`, `dXNlcjpw\nPz5+fg==`} {
		file := filepath.Join(t.TempDir(), "config.json")
		write(t, file, `{"auths":{"r.test":{"auth":"`+text+`"}}}`)
		if got, err := ocilocal.FileCredentials(file)(t.Context(), "r.test", "x"); err != nil || got.Username != "user" || got.Password != "p?>~~" {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

// TestFaultySources: a source of credentials that is empty or can't be read does not fail a call
// that needs no credential, and does not hide later sources. If the call is refused, its error
// names the source.
func TestFaultySources(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		name = filepath.Join(dir, name)
		write(t, name, text)
		return name
	}
	s := newServer(t)
	s.put(t, "org/model", "v1", noise(1, 10))
	private := newServer(t)
	private.user, private.password = "me", secretPassword
	private.put(t, "org/model", "v1", noise(1, 10))
	good := ocilocal.StaticCredential(private.host, ocilocal.Credential{Username: "me", Password: secretPassword})
	for name, c := range map[string]struct {
		file  string
		empty bool // there is nothing wrong with it
	}{
		"missing":        {filepath.Join(dir, "missing"), true},
		"below a file":   {filepath.Join(file("plain", "x"), "config.json"), true},
		"null device":    {os.DevNull, true},
		"no bytes":       {file("zero", ""), true},
		"a newline":      {file("newline", "\n"), true},
		"BOM":            {file("bom", "\ufeff{}"), true},
		"null":           {file("null", "null"), true},
		"a list":         {file("list", `{"auths":[]}`), true},
		"store is false": {file("false", `{"credsStore":false}`), true},
		"another's":      {file("another", `{"auths":{"other.test":{"password":7}},"credHelpers":{"other.test":"not-there"}}`), true},
		"a directory":    {dir, false},
		"not JSON":       {file("text", "hush"), false},
		"bad auth":       {file("auth", fmt.Sprintf(`{"auths":{%q:{"auth":"hush"}}}`, private.host)), false},
		"a number":       {file("number", fmt.Sprintf(`{"auths":{%q:{"password":7}}}`, private.host)), false},
		"no helper":      {file("helper", `{"credsStore":"not-there"}`), false},
		"a bad helper":   {file("bad", fmt.Sprintf(`{"credHelpers":{%q:"../sh"}}`, private.host)), false},
	} {
		t.Run(name, func(t *testing.T) {
			source := ocilocal.FileCredentials(c.file)
			if _, err := (&ocilocal.Remote{Credentials: source}).Manifest(t.Context(), s.ref("org/model:v1")); err != nil {
				t.Errorf("without a need: %v", err)
			}
			if _, err := (&ocilocal.Remote{Credentials: ocilocal.FirstCredential(source, good)}).Manifest(t.Context(), private.ref("org/model:v1")); err != nil {
				t.Errorf("before a good source: %v", err)
			}
			_, err := (&ocilocal.Remote{Credentials: source}).Manifest(t.Context(), private.ref("org/model:v1"))
			mustFail(t, err, ocilocal.ErrUnauthorized)
			if !strings.Contains(err.Error(), c.file) || strings.Contains(err.Error(), "(credentials for") == c.empty {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestEnvironmentCredentials: an environment variable may have the text of a config.json. OMMX's
// variables are for one registry.
func TestEnvironmentCredentials(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	for _, name := range []string{"DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(name, filepath.Join(t.TempDir(), "none"))
	}
	t.Setenv("DOCKER_AUTH_CONFIG", `{"auths":{"https://r.test/v1/":{"auth":"dTpw"}}}`)
	t.Setenv("OMMX_BASIC_AUTH_USERNAME", "ommx")
	t.Setenv("OMMX_BASIC_AUTH_PASSWORD", "secret")
	for domain, named := range map[string]string{"ommx.test": "ommx.test", "https://OMMX.test/": "ommx.test", "": "", "bad host": "", "docker.io": "docker.io", "index.docker.io": "docker.io"} {
		t.Setenv("OMMX_BASIC_AUTH_DOMAIN", domain)
		for _, host := range []string{"ommx.test", "ommx.test:5000", "docker.io", "other.test", "r.test"} {
			want := map[bool]string{true: "ommx"}[host == named]
			if host == "r.test" {
				want = "u"
			}
			got, err := ocilocal.DefaultCredentials()(t.Context(), host, "org/x")
			if err != nil || got.Username != want {
				t.Errorf("domain %q, host %s: %v, %v", domain, host, got, err)
			}
		}
	}
}
