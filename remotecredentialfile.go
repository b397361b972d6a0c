package ocilocal

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Limits on where credentials come from.
const (
	maxCredentialFile = 1 << 20
	maxHelperOutput   = 64 << 10
	helperTimeout     = 10 * time.Second
)

// credentialFile is Docker's config.json or Podman's auth.json.
type credentialFile struct {
	Auths       map[string]credentialEntry `json:"auths"`
	CredHelpers map[string]string          `json:"credHelpers"`
	CredsStore  string                     `json:"credsStore"`
}

type credentialEntry struct {
	Auth          string `json:"auth"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// FileCredentials returns a function that reads a file of the form of Docker's config.json
// or Podman's auth.json each time it is called; that the file is missing is no
// error. For a host, a helper in credHelpers comes before credsStore, and that before auths. There,
// an entry for a repository, or for a path above it, comes before one for its registry.
//
// A helper is the program docker-credential-<name>, which must be in $PATH; it has 10
// seconds. Nothing that it prints is shown.
func FileCredentials(name string) CredentialFunc {
	return func(ctx context.Context, host, repository string) (Credential, error) {
		if host == "" || strings.ContainsAny(host+repository, "\r\n\x00") {
			return Credential{}, fmt.Errorf("%w: credentials for host %q", ErrInvalidArgument, clip(host))
		}
		doc, err := readCredentialFile(name)
		if err != nil {
			return Credential{}, err
		}
		c, err := doc.find(ctx, host, repository)
		if err != nil {
			return Credential{}, fmt.Errorf("%s: %w", name, err)
		}
		if c.Source = strings.TrimPrefix(c.Source+" in "+name, " in "); c.anonymous() {
			c.Source = name
		}
		return c, nil
	}
}

func readCredentialFile(name string) (*credentialFile, error) {
	doc := &credentialFile{}
	f, err := os.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return doc, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := checkRegular(f); err != nil {
		return nil, err
	}
	b, err := readBounded(f, maxCredentialFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := parseCredentialFile(b, doc); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return doc, nil
}

func parseCredentialFile(b []byte, doc *credentialFile) error {
	if json.Unmarshal(b, doc) != nil { // whose error could quote a secret
		return errors.New("is not JSON of the right form")
	}
	return nil
}

// dockerHubKeys are the names under which credentials for Docker Hub are kept.
var dockerHubKeys = []string{"https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"}

func (f *credentialFile) find(ctx context.Context, host, repository string) (Credential, error) {
	keys := []string{host}
	if host == registryDockerHub {
		keys = dockerHubKeys
	}
	for _, key := range keys {
		if helper := f.CredHelpers[key]; helper != "" {
			return askHelper(ctx, helper, key, helperTimeout)
		}
	}
	if f.CredsStore != "" {
		// What the store doesn't have may still be in auths.
		if c, err := askHelper(ctx, f.CredsStore, keys[0], helperTimeout); err != nil || !c.anonymous() {
			return c, err
		}
	}
	entry, ok := f.entry(keys, repository)
	if !ok {
		return Credential{}, nil
	}
	return entry.credential()
}

// entry looks for the repository, then for what is above it, down to the host.
func (f *credentialFile) entry(keys []string, repository string) (credentialEntry, bool) {
	for path := repository; path != ""; {
		for _, key := range keys {
			if e, ok := f.Auths[key+"/"+path]; ok {
				return e, true
			}
		}
		path = path[:max(strings.LastIndexByte(path, '/'), 0)]
	}
	for _, key := range keys {
		// Old versions of Docker wrote addresses.
		for _, form := range []string{key, "https://" + key, "http://" + key, "https://" + key + "/", "https://" + key + "/v1/", "https://" + key + "/v2/"} {
			if e, ok := f.Auths[form]; ok {
				return e, true
			}
		}
	}
	return credentialEntry{}, false
}

func (e credentialEntry) credential() (Credential, error) {
	c := Credential{Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if e.Auth != "" {
		b, err := base64.StdEncoding.DecodeString(e.Auth)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return Credential{}, errors.New("an auth is not user:password in base64")
		}
		c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	}
	return c, nil
}

// askHelper runs a credential helper for at most limit: the host goes in, JSON comes out.
func askHelper(ctx context.Context, name, host string, limit time.Duration) (Credential, error) {
	const longest = 100 // it is in messages
	for _, c := range []byte(name) {
		if len(name) > longest || !isLowerAlnum(c) && !('A' <= c && c <= 'Z') && strings.IndexByte("._-", c) < 0 {
			return Credential{}, fmt.Errorf("%w: name of a credential helper: %q", ErrInvalidArgument, clip(name))
		}
	}
	program := "docker-credential-" + name
	timed, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(timed, program, "get")
	cmd.WaitDelay = time.Second // for a child of its own that holds the pipe
	cmd.Stdin = strings.NewReader(host)
	out := &limitedBuffer{}
	cmd.Stdout = out
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return Credential{}, ctx.Err()
	case timed.Err() != nil:
		return Credential{}, fmt.Errorf("%s: no answer after %v", program, limit)
	case out.full:
		return Credential{}, fmt.Errorf("%w: %s prints more than %d bytes", ErrTooLarge, program, maxHelperOutput)
	case err != nil && bytes.Contains(out.b, []byte("credentials not found")):
		return Credential{Source: program}, nil
	case err != nil:
		return Credential{}, fmt.Errorf("%s: %w", program, err) // exit status, or not found; not what it printed
	}
	var doc struct{ Username, Secret string }
	if json.Unmarshal(out.b, &doc) != nil {
		return Credential{}, fmt.Errorf("%s: answer is not JSON of the right form", program)
	}
	c := Credential{Username: doc.Username, Password: doc.Secret, Source: program}
	if doc.Username == "<token>" {
		c.Username, c.Password, c.IdentityToken = "", "", doc.Secret
	}
	return c, nil
}

// A limitedBuffer fails on more than maxHelperOutput bytes.
type limitedBuffer struct {
	b    []byte
	full bool
}

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if len(l.b)+len(p) > maxHelperOutput {
		l.full = true
		return 0, ErrTooLarge
	}
	l.b = append(l.b, p...)
	return len(p), nil
}
