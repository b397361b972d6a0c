package ocilocal

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A Credential is the login of a user at one registry. The zero Credential means anonymous. Its
// methods print no secret.
type Credential struct {
	Username string
	Password string
	// IdentityToken, an OAuth2 refresh token, is exchanged for tokens instead of a password.
	IdentityToken string
	// RegistryToken is sent to the registry as it is, as a bearer token.
	RegistryToken string
	// Source says where the credential was found, for messages: "Docker's config.json
	// (/home/u/.docker/config.json)". In an anonymous one it says where nothing was found.
	Source string
}

func (c Credential) anonymous() bool {
	return c.Username == "" && c.Password == "" && c.IdentityToken == "" && c.RegistryToken == ""
}

// String returns the user name and the source of the credential, and no secret.
func (c Credential) String() string {
	who := "anonymous"
	if !c.anonymous() {
		who = "credential"
	}
	if c.Username != "" {
		who += " of " + printable(c.Username)
	}
	if c.Source == "" {
		return who
	}
	return who + " (" + c.Source + ")"
}

// GoString is String.
func (c Credential) GoString() string { return c.String() }

// MarshalJSON writes String, so that logging a credential doesn't disclose it. It returns no error.
func (c Credential) MarshalJSON() ([]byte, error) { return json.Marshal(c.String()) }

// A CredentialFunc looks up the credential for a repository of a registry, such as "docker.io" and
// "library/alpine". A function that finds none returns an anonymous Credential whose Source says
// where it looked, and no error. An error must not hold secrets. It does not end the call that
// wanted a credential: the call goes on without one, and names the error if the registry refuses.
// The function must be safe for concurrent use.
type CredentialFunc func(ctx context.Context, host, repository string) (Credential, error)

// StaticCredential returns a function that has one credential for one registry, such as "ghcr.io"
// or "localhost:5000", and none for others. The host may have every spelling that
// [ParseReference] accepts, and may be an address: "index.docker.io" and
// "https://index.docker.io/v1/" are docker.io. If the text is not a host, each call of the
// function returns [ErrInvalidArgument].
func StaticCredential(host string, c Credential) CredentialFunc {
	if c.Source == "" {
		c.Source = "StaticCredential"
	}
	name, wrong := credentialHost(host)
	return func(_ context.Context, asked, _ string) (Credential, error) {
		switch {
		case wrong != nil:
			return Credential{}, fmt.Errorf("%w: StaticCredential: %w", ErrInvalidArgument, wrong)
		case asked != name:
			return Credential{Source: "StaticCredential for " + name}, nil
		}
		return c, nil
	}
}

// credentialHost returns the host of a registry as references name it. host is the spelling of a
// user, who may have copied the address of an API.
func credentialHost(host string) (string, error) {
	name := strings.TrimPrefix(strings.TrimPrefix(host, "https://"), "http://")
	name = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "/"), "/v1"), "/v2")
	return canonicalHost(name)
}

// FirstCredential returns a function that asks each of sources in turn and returns the first
// credential that is not anonymous: a [StaticCredential] for one registry before
// [DefaultCredentials] for all others, for example. A source that fails does not stop the search.
// If no source has a credential, the function returns the errors of those that failed, joined, and
// a Credential whose Source says where it has looked. The context's error ends the search.
func FirstCredential(sources ...CredentialFunc) CredentialFunc {
	sources = slices.Clone(sources)
	return func(ctx context.Context, host, repository string) (Credential, error) {
		var looked []string
		var failed []error
		for _, look := range sources {
			c, err := look(ctx, host, repository)
			switch {
			case ctx.Err() != nil:
				return Credential{}, ctx.Err()
			case err != nil:
				failed = append(failed, err)
			case !c.anonymous():
				return c, nil
			}
			if c.Source != "" {
				looked = append(looked, c.Source)
			}
		}
		return Credential{Source: strings.Join(looked, ", ")}, joined(failed)
	}
}

// joined wraps errors in one, whose text is a single line. It returns nil for none.
func joined(list []error) error {
	var err error
	for _, next := range list {
		if err == nil {
			err = next
		} else {
			err = fmt.Errorf("%w; %w", err, next)
		}
	}
	return err
}

// DefaultCredentials returns a function that looks in the usual places for credentials, each time
// it is called. The first source that has one is taken:
//
//   - the environment variables OMMX_BASIC_AUTH_DOMAIN, _USERNAME and _PASSWORD, for the one
//     registry that the first names;
//   - the environment variable DOCKER_AUTH_CONFIG, which holds the text of a config.json;
//   - Docker's config.json in $DOCKER_CONFIG or ~/.docker;
//   - Podman's auth.json: the file $REGISTRY_AUTH_FILE, or else containers/auth.json in
//     $XDG_RUNTIME_DIR and in $XDG_CONFIG_HOME or ~/.config.
//
// See [FileCredentials] for the files and [FirstCredential] for sources that fail.
func DefaultCredentials() CredentialFunc {
	return func(ctx context.Context, host, repository string) (Credential, error) {
		sources := append([]CredentialFunc{ommxCredential, environmentConfig}, credentialFiles()...)
		return FirstCredential(sources...)(ctx, host, repository)
	}
}

// ommxCredential looks at the variables of the OMMX SDK.
func ommxCredential(_ context.Context, host, _ string) (Credential, error) {
	c := Credential{Source: "OMMX_BASIC_AUTH_*"}
	domain := os.Getenv("OMMX_BASIC_AUTH_DOMAIN")
	if name, err := credentialHost(domain); domain != "" && err == nil && name == host {
		c.Username, c.Password = os.Getenv("OMMX_BASIC_AUTH_USERNAME"), os.Getenv("OMMX_BASIC_AUTH_PASSWORD")
	}
	return c, nil
}

// environmentConfig looks at the config.json in an environment variable.
func environmentConfig(ctx context.Context, host, repository string) (Credential, error) {
	const name = "DOCKER_AUTH_CONFIG"
	text := os.Getenv(name)
	if text == "" {
		return Credential{}, nil
	}
	return findCredential(ctx, name, []byte(text), host, repository)
}

// credentialFiles returns the files that DefaultCredentials looks at.
func credentialFiles() (files []CredentialFunc) {
	add := func(dir string, name ...string) {
		if dir != "" {
			files = append(files, FileCredentials(filepath.Join(append([]string{dir}, name...)...)))
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		home = ""
	}
	below := func(env string, name ...string) string {
		if dir := os.Getenv(env); dir != "" || home == "" {
			return dir
		}
		return filepath.Join(append([]string{home}, name...)...)
	}
	add(below("DOCKER_CONFIG", ".docker"), "config.json")
	if name := os.Getenv("REGISTRY_AUTH_FILE"); name != "" {
		add(name)
		return files
	}
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	add(below("XDG_CONFIG_HOME", ".config"), "containers", "auth.json")
	return files
}
