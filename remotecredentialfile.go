package ocilocal

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Limits on sources of credentials.
const (
	maxCredentialFile = 1 << 20
	maxHelperOutput   = 64 << 10
	helperTimeout     = 10 * time.Second
)

// A credentialFile is a Docker config.json or a Podman auth.json. Its parts are read only as far as
// a host needs them, so that an odd entry for one host does not hide those for others.
type credentialFile struct {
	auths   map[string]json.RawMessage // *credentialEntry, by host or repository in many spellings
	helpers map[string]json.RawMessage // string, by host
	store   json.RawMessage            // string
}

// A credentialEntry is an entry of auths.
type credentialEntry struct {
	Auth          string `json:"auth"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// FileCredentials returns a function that reads a file of the form of Docker's config.json or
// Podman's auth.json each time it is called. A file that is missing or empty holds no credentials.
//
// For a host, a helper in credHelpers comes before credsStore, and that before auths. A source that
// fails does not stop the search. If nothing is found, the function returns the failures. In auths,
// the entry for the longest path counts: one for a repository, or for a path above it, comes before
// one for its registry. The names may have all spellings that docker and podman have written:
// "https://host/v2/", "HOST", "host/org/". An entry with a credential comes before an empty one.
//
// A helper is the program docker-credential-<name>, which must be in $PATH. It has 10 seconds. Its
// output never appears in an error, because it may be a secret.
func FileCredentials(name string) CredentialFunc {
	return func(ctx context.Context, host, repository string) (Credential, error) {
		text, err := readCredentialFile(name)
		if err != nil {
			return Credential{Source: name}, err
		}
		return findCredential(ctx, name, text, host, repository)
	}
}

// findCredential looks for a credential in the text of a file. name is for messages.
func findCredential(ctx context.Context, name string, text []byte, host, repository string) (Credential, error) {
	if host == "" || strings.ContainsAny(host+repository, "\r\n\x00") {
		return Credential{}, fmt.Errorf("%w: credentials for host %s", ErrInvalidArgument, printable(host))
	}
	doc, err := parseCredentialFile(text)
	if err != nil {
		return Credential{Source: name}, fmt.Errorf("%s %w", name, err)
	}
	c, err := doc.find(ctx, host, repository)
	if err != nil {
		return Credential{Source: name}, fmt.Errorf("%s: %w", name, err)
	}
	if c.Source = strings.TrimPrefix(c.Source+" in "+name, " in "); c.anonymous() {
		c.Source = name
	}
	return c, nil
}

// readCredentialFile returns the bytes of a file, and nil if the file does not exist.
func readCredentialFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	// Users name /dev/null, or a path below it, to say that they have no such file.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || name == os.DevNull {
		if err == nil {
			err = f.Close()
		}
		return nil, ignoreNoFile(err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := checkRegular(f); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	b, err := readBounded(f, maxCredentialFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// ignoreNoFile drops the errors that say that a file does not exist.
func ignoreNoFile(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}

// errNotConfig is the failure of a part of a file. An error of encoding/json could quote a secret.
var errNotConfig = errors.New("is not JSON of the right form")

// parseCredentialFile reads the outer form of a file.
func parseCredentialFile(b []byte) (*credentialFile, error) {
	b = bytes.TrimSpace(bytes.TrimPrefix(b, []byte("\ufeff")))
	if len(b) == 0 {
		return &credentialFile{}, nil
	}
	var doc struct {
		Auths       json.RawMessage `json:"auths"`
		CredHelpers json.RawMessage `json:"credHelpers"`
		CredsStore  json.RawMessage `json:"credsStore"`
	}
	if json.Unmarshal(b, &doc) != nil {
		return nil, errNotConfig
	}
	f := &credentialFile{store: doc.CredsStore}
	// Some tools write an empty list where they have no entries.
	if json.Unmarshal(doc.Auths, &f.auths) != nil {
		f.auths = nil
	}
	if json.Unmarshal(doc.CredHelpers, &f.helpers) != nil {
		f.helpers = nil
	}
	return f, nil
}

// dockerHubKeys are the hosts under which credentials for Docker Hub are kept. Helpers are asked
// for the first.
var dockerHubKeys = []string{"https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"}

// find returns the credential for a repository. It looks in this order, and takes the first that is
// not anonymous: the helper for the host, the store, the entries of auths. If there is none, find
// returns the failures of all parts of the file that could have one.
func (f *credentialFile) find(ctx context.Context, host, repository string) (Credential, error) {
	var failed []error
	found := func(c Credential, err error) bool {
		if err != nil {
			failed = append(failed, err)
		}
		return err == nil && !c.anonymous()
	}
	keys := []string{host}
	if host == registryDockerHub {
		keys = dockerHubKeys
	}
	for _, key := range keys {
		if helper := helperName(f.helpers[key]); helper != "" {
			if c, err := askHelper(ctx, helper, key, helperTimeout); found(c, err) {
				return c, nil
			}
			break
		}
	}
	if store := helperName(f.store); store != "" && ctx.Err() == nil {
		if c, err := askHelper(ctx, store, keys[0], helperTimeout); found(c, err) {
			return c, nil
		}
	}
	if ctx.Err() != nil {
		return Credential{}, ctx.Err()
	}
	if c, err := f.entry(host, repository); found(c, err) {
		return c, nil
	}
	return Credential{}, joined(failed)
}

// helperName returns the name of a helper, and "" for a value that is not a name.
func helperName(raw json.RawMessage) (name string) {
	if json.Unmarshal(raw, &name) != nil {
		return ""
	}
	return name
}

// entry returns the credential in auths whose name fits the repository best: the longest path, and
// of several spellings of one path, the plainest that holds a credential.
func (f *credentialFile) entry(host, repository string) (Credential, error) {
	type match struct {
		key string
		len int // of the path
	}
	var matches []match
	for key := range f.auths {
		if at, path := credentialKey(key); at == host && (path == "" || strings.HasPrefix(repository+"/", path+"/")) {
			matches = append(matches, match{key, len(path)})
		}
	}
	slices.SortFunc(matches, func(a, b match) int {
		return cmp.Or(b.len-a.len, len(a.key)-len(b.key), strings.Compare(a.key, b.key))
	})
	var failed []error
	for _, m := range matches {
		var e credentialEntry
		if json.Unmarshal(f.auths[m.key], &e) != nil {
			failed = append(failed, fmt.Errorf("an entry of auths %w", errNotConfig))
			continue
		}
		c, err := e.credential()
		if err != nil {
			failed = append(failed, err)
		} else if !c.anonymous() {
			return c, nil
		}
	}
	return Credential{}, joined(failed)
}

// credentialKey reads a name of auths: the registry, as references name it, and the path of the
// repositories for which the entry is, "" for all. A name that can't be read has no registry.
//
// Docker has written the address of an API ("https://index.docker.io/v1/"), podman writes
// "quay.io/org". The paths v1 and v2 are those of the API, and what follows them is not a
// repository.
func credentialKey(key string) (host, path string) {
	rest, scheme := key, ""
	if i := strings.Index(key, "://"); i >= 0 {
		scheme, rest = strings.ToLower(key[:i]), key[i+3:]
	}
	if scheme != "" && scheme != "https" && scheme != "http" {
		return "", ""
	}
	host, path, _ = strings.Cut(rest, "/")
	host = strings.ToLower(host)
	switch scheme {
	case "https":
		host = strings.TrimSuffix(host, ":443")
	case "http":
		host = strings.TrimSuffix(host, ":80")
	}
	switch host {
	case "registry-1.docker.io", "registry.hub.docker.com", "hub.docker.com":
		host = registryDockerHub
	}
	host, err := canonicalHost(host)
	if err != nil {
		return "", ""
	}
	path = strings.Trim(path, "/")
	first, _, _ := strings.Cut(path, "/")
	if (first == "v1" || first == "v2") && (scheme != "" || path == first) {
		path = ""
	}
	return host, path
}

// credential returns the credential of an entry. A user and password in auth come before those in
// the other fields.
func (e credentialEntry) credential() (Credential, error) {
	c := Credential{Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if text := plainBase64(e.Auth); text != "" {
		b, err := base64.RawStdEncoding.DecodeString(text)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return Credential{}, errors.New("an auth is not user:password in base64")
		}
		c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	}
	return c, nil
}

// plainBase64 gives the spellings of base64 one form: without padding and blanks, in the standard
// alphabet.
func plainBase64(s string) string {
	s = strings.Join(strings.Fields(s), "")
	return strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(s, "="))
}

// askHelper runs a credential helper for at most limit. The helper reads the host and prints JSON.
// Its output is in no message, because it may be a secret. Its name comes from a file, so it may
// only have characters that can't lead to another directory or to a shell.
func askHelper(ctx context.Context, name, host string, limit time.Duration) (Credential, error) {
	const longest = 100 // bytes, since messages have the name
	for _, c := range []byte(name) {
		if len(name) > longest || !isLowerAlnum(c) && !('A' <= c && c <= 'Z') && strings.IndexByte("._-", c) < 0 {
			return Credential{}, fmt.Errorf("%w: name of a credential helper: %s", ErrInvalidArgument, printable(name))
		}
	}
	program := "docker-credential-" + name
	timed, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(timed, program, "get")
	cmd.WaitDelay = time.Second // else a child of the helper that keeps the pipe open would block Run
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

// A limitedBuffer keeps at most maxHelperOutput bytes, and fails on more. So a helper can't fill
// the memory.
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
