package interop_test

import (
	"context"
	"fmt"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/ocilocal/ocilocal"
)

// keychain makes a credential function of a keychain of go-containerregistry.
func keychain(k authn.Keychain) ocilocal.CredentialFunc {
	return func(ctx context.Context, host, repository string) (ocilocal.Credential, error) {
		repo, err := name.NewRepository(host + "/" + repository)
		if err != nil {
			return ocilocal.Credential{}, err
		}
		a, err := authn.Resolve(ctx, k, repo)
		if err != nil {
			return ocilocal.Credential{}, err
		}
		c, err := authn.Authorization(ctx, a)
		if err != nil {
			return ocilocal.Credential{}, err
		}
		return ocilocal.Credential{
			Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
			Source: "keychain",
		}, nil
	}
}

// A keychain of go-containerregistry serves a Remote.
func Example_keychain() {
	chain := authn.NewMultiKeychain(fixedKeychain{"registry.test": {Username: "me", Password: "secret"}})
	look := keychain(chain)
	for _, host := range []string{"registry.test", "other.test"} {
		c, err := look(context.Background(), host, "org/model")
		fmt.Println(c, err)
	}
	// Output:
	// credential of me (keychain) <nil>
	// anonymous (keychain) <nil>
}

// A fixedKeychain holds credentials by registry.
type fixedKeychain map[string]authn.AuthConfig

func (k fixedKeychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	if c, ok := k[r.RegistryStr()]; ok {
		return authn.FromConfig(c), nil
	}
	return authn.Anonymous, nil
}

// orasCredential makes a credential function of one of oras-go, which knows Docker Hub by the host
// that requests go to.
func orasCredential(f auth.CredentialFunc) ocilocal.CredentialFunc {
	return func(ctx context.Context, host, _ string) (ocilocal.Credential, error) {
		if host == "docker.io" {
			host = "registry-1.docker.io"
		}
		c, err := f(ctx, host)
		return ocilocal.Credential{
			Username: c.Username, Password: c.Password, IdentityToken: c.RefreshToken, RegistryToken: c.AccessToken,
			Source: "credential function of oras-go",
		}, err
	}
}

// A credential function of oras-go serves a Remote.
func Example_orasCredential() {
	look := orasCredential(auth.StaticCredential("docker.io", auth.Credential{Username: "me", Password: "secret"}))
	remote := &ocilocal.Remote{Credentials: look}
	for _, host := range []string{"docker.io", "other.test"} {
		c, err := remote.Credentials(context.Background(), host, "org/model")
		fmt.Println(c, err)
	}
	// Output:
	// credential of me (credential function of oras-go) <nil>
	// anonymous (credential function of oras-go) <nil>
}
