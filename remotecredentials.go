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

// StaticCredential returns a function that has one credential for one registry,
// such as "ghcr.io" or "localhost:5000", and none for others. The host is taken in every spelling that
// [ParseReference] takes, and as the address of a registry: "index.docker.io" and "https://index.docker.io/v1/"
// are docker.io. What is no host is [ErrInvalidArgument] whenever the function is asked.
func StaticCredential(host string, c Credential) CredentialFunc {
	if c.Source == "" {
		c.Source = "StaticCredential"
	}
	name := strings.TrimPrefix(strings.TrimPrefix(host, "https://"), "http://")
	name = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "/"), "/v1"), "/v2")
	name, wrong := canonicalHost(name)
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

// FirstCredential returns a function that asks each of sources in turn and returns the first credential
// that is not anonymous, or the first error: a [StaticCredential] for one registry before [DefaultCredentials]
// for all others, for example. If none has one, its Source says where all have looked.
func FirstCredential(sources ...CredentialFunc) CredentialFunc {
	sources = slices.Clone(sources)
	return func(ctx context.Context, host, repository string) (Credential, error) {
		var looked []string
		for _, look := range sources {
			c, err := look(ctx, host, repository)
			if err != nil || !c.anonymous() {
				return c, err
			}
			if c.Source != "" {
				looked = append(looked, c.Source)
			}
		}
		return Credential{Source: strings.Join(looked, ", ")}, nil
	}
}

// DefaultCredentials returns a function that looks where users' credentials usually are,
// each time it is called: OMMX's environment variables OMMX_BASIC_AUTH_DOMAIN,
// _USERNAME and _PASSWORD, whose domain must be the very host; Docker's
// config.json in $DOCKER_CONFIG or ~/.docker; and Podman's auth.json: $REGISTRY_AUTH_FILE, or
// else containers/auth.json in $XDG_RUNTIME_DIR and in $XDG_CONFIG_HOME or ~/.config. See
// [FileCredentials]. The first that has one is taken.
func DefaultCredentials() CredentialFunc {
	return func(ctx context.Context, host, repository string) (Credential, error) {
		return FirstCredential(append([]CredentialFunc{ommxCredential}, credentialFiles()...)...)(ctx, host, repository)
	}
}

func ommxCredential(_ context.Context, host, _ string) (Credential, error) {
	c := Credential{Source: "OMMX_BASIC_AUTH_*"}
	if os.Getenv("OMMX_BASIC_AUTH_DOMAIN") == host {
		c.Username, c.Password = os.Getenv("OMMX_BASIC_AUTH_USERNAME"), os.Getenv("OMMX_BASIC_AUTH_PASSWORD")
	}
	return c, nil
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

// A Credential is what a user has to show to one registry. Its methods print no secret.
// The zero Credential means anonymous.
type Credential struct {
	Username string
	Password string
	// IdentityToken, an OAuth2 refresh token, is exchanged for tokens instead of a password.
	IdentityToken string
	// RegistryToken is shown to the registry as it is, as a bearer token.
	RegistryToken string
	// Source says where it is from, or, in an anonymous one, where nothing was
	// found, for messages: "Docker's config.json (/home/u/.docker/config.json)".
	Source string
}

func (c Credential) anonymous() bool {
	return c.Username == "" && c.Password == "" && c.IdentityToken == "" && c.RegistryToken == ""
}

// String says whose credential it is and where it is from.
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

// A CredentialFunc looks up the credential for a repository of a registry, such as
// "docker.io" and "library/alpine". Finding none is no error: it returns an anonymous
// Credential whose Source says where it looked. Errors must not hold secrets.
type CredentialFunc func(ctx context.Context, host, repository string) (Credential, error)
